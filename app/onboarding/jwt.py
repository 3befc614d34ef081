"""The tokens of an identity provider (RFC 7519): which keys verify them, and whom they name.

Only signed tokens in compact form are read (RFC 7515). A key verifies with the algorithms that were
chosen and fit its type, and with no other: what a token says of itself only picks among the keys
that are here. Nothing that it names is ever fetched.
"""

import base64
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import orjson
from joserfc.errors import (
    ClaimError,
    ExpiredTokenError,
    InvalidKeyTypeError,
    JoseError,
    SecurityWarning,
    UnsupportedAlgorithmError,
)
from joserfc.jwa import JWSAlgModel
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey, import_key
from joserfc.jws import JWSRegistry, deserialize_compact
from joserfc.jwt import ClaimsOption, JWTClaimsRegistry
from joserfc.util import urlsafe_b64decode

from app.errors import RequestError, UnauthenticatedError
from app.onboarding.access import Kind, Principal
from app.onboarding.documents import Document
from app.onboarding.sessions import MAX_OWNER_LENGTH, is_own_string

# fmt: off
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
    "HS256", "HS384", "HS512",
]
# fmt: on
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
"""How a token may be signed (RFC 7518 section 3.1, RFC 8037); `none` is never one."""

LONGEST_TOKEN = 8 * 1024
"""Longest token that is looked at, in characters: servers take no longer header fields."""

LEEWAY_S = 30
"""How far the clock of who signs may be ahead, in seconds: by so much `nbf` and `iat` may lie in
the future. `exp` has none, so that what is kept until then ends then."""

SHORTEST_SECRET = 32
"""Shortest secret for HS256, in bytes (RFC 7518 section 3.2)."""

MOST_KEYS = 100
"""How many keys a provider may publish: each takes up to 0.1 ms to read."""


class Verified(NamedTuple):
    """Whom a token names, and until when, in Unix seconds."""

    principal: Principal
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What is asked of every token; an issuer or an audience only where one is set."""

    algorithms: frozenset[str]
    issuer: str | None = None
    audience: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and what it may verify. Two are equal when they verify the same tokens.

    `kid` is the name by which tokens ask for it; None stands for any.
    """

    kid: str | None
    thumbprint: str = field(repr=False)
    algorithms: frozenset[str]
    key: Key = field(compare=False, repr=False)


class TokenHeader(NamedTuple):
    """What a token says of itself, before anything is verified."""

    algorithm: str
    kid: str | None


# --- Keys -----------------------------------------------------------------------------------------


def parse_jwt_key(text: str, algorithms: Collection[str]) -> VerifyingKey:
    r"""Read a key that a deployer chose: a PEM public key, or a secret for HS256 and its kin.

    Lines of a PEM key may be divided by a written `\n`, since few files of variables take others.
    Raises `ValueError` saying what would be right, without the key.
    """
    # What the library only warns of, such as a short key, is refused.
    with warnings.catch_warnings(action="error", category=SecurityWarning):
        key = _read_pem(text) if "BEGIN " in text else _read_secret(text, algorithms)
        fit = _fitting(key, algorithms)
    if not fit:
        raise ValueError("none of the algorithms in ONBOARDING_JWT_ALGORITHMS fits this key")
    return VerifyingKey(None, key.thumbprint(), fit, key)


def parse_jwks(body: bytes, algorithms: Collection[str]) -> tuple[VerifyingKey, ...]:
    """Read the keys that a provider publishes (RFC 7517 section 5).

    Those that cannot verify here are left out. Raises `ValueError` for what is no set of keys.
    """
    document = orjson.loads(body)
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or len(keys) > MOST_KEYS:
        raise ValueError(f"a JWK Set has a list of keys, here of {MOST_KEYS} at most")
    read = (_read_jwk(jwk, algorithms) for jwk in keys)
    return tuple(key for key in read if key is not None)


def find_key(keys: Iterable[VerifyingKey], header: TokenHeader) -> VerifyingKey | None:
    """Find the key that a token asks for; one that names none can only mean a single one."""
    fit = [each for each in keys if header.algorithm in each.algorithms]
    if header.kid is None:
        return fit[0] if len(fit) == 1 else None
    return next((each for each in fit if each.kid in (None, header.kid)), None)


def _read_pem(text: str) -> Key:
    pem = text.replace("\\n", "\n").encode()
    if b"PUBLIC KEY" not in pem or b"PRIVATE" in pem:
        raise ValueError("a PEM key here is a public one: -----BEGIN PUBLIC KEY-----")
    kinds: tuple[type[RSAKey | ECKey | OKPKey], ...] = (RSAKey, ECKey, OKPKey)
    for kind in kinds:
        try:
            return kind.import_key(pem)
        except InvalidKeyTypeError:
            continue
        except SecurityWarning:
            raise ValueError("the key is too short; RSA takes 2048 bits") from None
        except Exception:  # noqa: BLE001 - whatever the library says of it, it is no key
            break
    raise ValueError("the PEM public key cannot be read; RSA, EC and Ed25519 ones can")


def _read_secret(text: str, algorithms: Collection[str]) -> Key:
    secret = text.encode()
    is_taken = any(name.startswith("HS") for name in algorithms)
    if not is_taken or len(secret) < SHORTEST_SECRET:
        raise ValueError(
            f"a PEM public key, or a secret of at least {SHORTEST_SECRET} bytes where HS256, HS384"
            " or HS512 is among ONBOARDING_JWT_ALGORITHMS"
        )
    # Whoever knows a secret can sign with it, so that nothing public may be one.
    if text.lstrip().startswith("{") or not (_is_secret(secret) and _is_secret(_unfold(text))):
        raise ValueError("a public key is no secret; write it as PEM")
    return OctKey.import_key(secret)


def _is_secret(text: bytes) -> bool:
    try:
        OctKey.import_key(text)
    except (ValueError, SecurityWarning):
        return False
    return True


def _unfold(text: str) -> bytes:
    """Decode base64, in which some show public keys; what is too short for one comes as it is."""
    try:
        decoded = base64.b64decode(text.translate(_URLSAFE) + "==")
    except ValueError:
        decoded = b""
    return decoded if len(decoded) >= SHORTEST_SECRET else text.encode()


def _read_jwk(jwk: Any, algorithms: Collection[str]) -> VerifyingKey | None:
    # One of type oct is a secret that was published, and so is the private part of any other.
    if not isinstance(jwk, dict) or jwk.get("kty") not in _ASYMMETRIC or "d" in jwk:
        return None
    try:
        with warnings.catch_warnings(action="error", category=SecurityWarning):
            key = import_key(jwk)
            fit = _fitting(key, algorithms)
            thumbprint = key.thumbprint()
    except Exception:  # noqa: BLE001 - one key that is damaged or weak must not lose the others
        return None
    return VerifyingKey(key.kid or thumbprint, thumbprint, fit, key) if fit else None


def _fitting(key: Key, algorithms: Collection[str]) -> frozenset[str]:
    """Choose the algorithms that a key may be used with, by its type and what it says of itself."""
    try:
        if isinstance(key, OKPKey) and key.curve_name not in _SIGNING_CURVES:
            return frozenset()
        key.check_key_op("verify")
        return frozenset(each.name for each in JWSRegistry.filter_algorithms(key, list(algorithms)))
    except (JoseError, LookupError):
        # A curve that the library does not know is a LookupError.
        return frozenset()


_ASYMMETRIC = ("RSA", "EC", "OKP")
_SIGNING_CURVES = ("Ed25519", "Ed448")
_URLSAFE = str.maketrans("-_", "+/")


# --- Tokens ---------------------------------------------------------------------------------------


def read_header(token: str, rules: TokenRules) -> TokenHeader:
    """Read what a token says of itself. Raises `UnauthenticatedError`."""
    if len(token) > LONGEST_TOKEN:
        raise UnauthenticatedError(f"The token is longer than {LONGEST_TOKEN} characters")
    if not _COMPACT.fullmatch(token):
        raise UnauthenticatedError(_NO_JWT)
    try:
        header = Document.parse(urlsafe_b64decode(token.partition(".")[0].encode()))
    except (ValueError, RequestError):
        raise UnauthenticatedError(_NO_JWT) from None
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or not isinstance(kid, str | None):
        raise UnauthenticatedError(_NO_JWT)
    if algorithm not in rules.algorithms:
        raise UnauthenticatedError("The token is signed in a way that is not taken here")
    # No extension is understood here, and one that is critical must be (RFC 7515 section 4.1.11).
    if not header.keys().isdisjoint(("crit", "b64")):
        raise UnauthenticatedError("The token asks for an extension that is not known here")
    return TokenHeader(algorithm, kid)


def read_claims(token: str, key: VerifyingKey, rules: TokenRules, now_ms: int) -> Verified:
    """Verify a token of which `read_header` was told. Raises `UnauthenticatedError`."""
    claims = _verify(token, key)
    try:
        registry = JWTClaimsRegistry(now_ms // 1000, LEEWAY_S, **_options(rules))
        registry.validate(dict(claims))
    except ExpiredTokenError:
        raise UnauthenticatedError(_EXPIRED) from None
    except ClaimError as unfit:
        # The claims that are looked at are named by us, not by the token.
        raise UnauthenticatedError(f"The token's {unfit.claim} is not as it must be") from None
    if claims["exp"] * 1000 <= now_ms:
        raise UnauthenticatedError(_EXPIRED)
    principal = Principal(
        Kind.USER, name=_name(claims, "sub"), workspace_id=_name(claims, "workspace_id")
    )
    return Verified(principal, float(claims["exp"]))


class _Registry(JWSRegistry):
    """What the library asks: the algorithms of one key, and no limit beside that on the token."""

    max_header_length = max_payload_length = max_signature_length = LONGEST_TOKEN

    def __init__(self, algorithms: Collection[str]) -> None:
        # Header parameters that nobody knows are ignored (RFC 7515 section 4).
        super().__init__(algorithms=algorithms, strict_check_header=False)

    def get_alg(self, name: str) -> JWSAlgModel:
        """Give an algorithm, without a warning that EdDSA has a newer name (RFC 9864)."""
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


def _verify(token: str, key: VerifyingKey) -> Mapping[str, Any]:
    try:
        signed = deserialize_compact(token, key.key, registry=_Registry(key.algorithms))
    except (JoseError, ValueError):
        raise UnauthenticatedError("The token's signature does not fit") from None
    try:
        return Document.parse(signed.payload)
    except RequestError:
        raise UnauthenticatedError(_NO_JWT) from None


def _options(rules: TokenRules) -> dict[str, ClaimsOption]:
    options: dict[str, ClaimsOption] = {
        name: {"essential": True} for name in ("exp", "sub", "workspace_id")
    }
    for name, value in (("iss", rules.issuer), ("aud", rules.audience)):
        if value is not None:
            options[name] = {"essential": True, "value": value}
    return options


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value = claims[claim]
    if not isinstance(value, str) or not is_own_string(value, MAX_OWNER_LENGTH):
        raise UnauthenticatedError(
            f"The token's {claim} must be a string of 1 to {MAX_OWNER_LENGTH} characters, without"
            " control characters"
        )
    return value


_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_NO_JWT = "The token is no signed JWT in compact form"
_EXPIRED = "The token has expired"
