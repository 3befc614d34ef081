"""Credentials of every kind, as a service with access control on is shown them."""

import hashlib
from typing import Any

from joserfc import jwt
from joserfc.jwk import OctKey

from app.clock import now_ms
from app.onboarding.access import Scope

SECRET = "a secret of tests that is long enough to sign with"
API_KEYS = {scope: f"ok_a-key-with-the-scope-{scope}" for scope in Scope}

AUTH: dict[str, Any] = {
    "auth": "on",
    "jwt_key": SECRET,
    "jwt_algorithms": "HS256",
    "jwt_issuer": "https://id.example",
    "jwt_audience": "onboarding",
    "api_keys": ",".join(
        f"{scope}-key:{scope}:{hashlib.sha256(key.encode()).hexdigest()}"
        for scope, key in API_KEYS.items()
    ),
}
"""Settings with which a service takes all of them."""

Headers = dict[str, str]


def user(user_id: str = "u1", workspace_id: str = "w1", **claims: Any) -> Headers:
    """Show the token of a user, good for five minutes."""
    told = {
        "iss": AUTH["jwt_issuer"],
        "aud": AUTH["jwt_audience"],
        "sub": user_id,
        "workspace_id": workspace_id,
        "exp": now_ms() // 1000 + 300,
        **claims,
    }
    return bearer(jwt.encode({"alg": "HS256"}, told, OctKey.import_key(SECRET)))


def machine(scope: Scope) -> Headers:
    """Show an API key with one scope."""
    return {"x-api-key": API_KEYS[scope]}


def bearer(token: str) -> Headers:
    """Show a token."""
    return {"authorization": f"Bearer {token}"}
