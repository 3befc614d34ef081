"""Tokens of users: the good ones name somebody, and whatever else is sent is refused as such."""

import asyncio
import base64
import gzip
import json
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import cache
from typing import Any

import hypothesis
import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwe, jws
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
from structlog.testing import capture_logs

from app.errors import KeysUnavailableError, UnauthenticatedError
from app.onboarding.access import Kind, Principal
from app.onboarding.jwt import Verified
from app.services.keyring import ASK_AGAIN_S, MOST_BYTES, Keyring, make_keyring
from tests.conftest import NOON_S, known_settings
from tests.faults.servers import HOST

SECRET = "a secret of thirty-two bytes or more"
ISSUER, AUDIENCE = "https://id.example/", "onboarding"
NOON = int(NOON_S)
GOOD = {
    "sub": "u-1",
    "workspace_id": "w-1",
    "exp": NOON + 60,
    "iat": NOON,
    "iss": ISSUER,
    "aud": AUDIENCE,
}
SOMEBODY = Verified(Principal(Kind.USER, name="u-1", workspace_id="w-1"), NOON + 60.0)


@cache
def key_for(algorithm: str, name: str = "") -> Key:
    """Give a key that signs, the same one for the same words."""
    match algorithm[:2]:
        case "RS" | "PS":
            return RSAKey.generate_key(2048)
        case "ES":
            return ECKey.generate_key(
                {"256": "P-256", "384": "P-384", "512": "P-521"}[algorithm[2:]]
            )
        case "HS":
            return OctKey.import_key(name or SECRET)
        case _:
            return OKPKey.generate_key("Ed25519")


def pem(key: Key) -> str:
    assert not isinstance(key, OctKey)
    return key.as_pem(private=False).decode()


def sign(header: dict[str, Any], payload: Any, key: Key) -> str:
    """Sign anything at all, whatever the library thinks of its header."""
    algorithms = [header["alg"]]
    registry = jws.JWSRegistry(algorithms=algorithms, strict_check_header=False)
    text = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    with warnings.catch_warnings(action="ignore", category=SecurityWarning):
        return jws.serialize_compact(header, text, key, registry=registry)


def token(algorithm: str = "ES256", key: Key | None = None, /, **changed: Any) -> str:
    """Make a token; a claim that is None is left out."""
    claims = {name: value for name, value in {**GOOD, **changed}.items() if value is not None}
    return sign({"alg": algorithm, "kid": "any"}, claims, key or key_for(algorithm))


def part(value: Any) -> str:
    """Write a part of a token: JSON, or text as it is."""
    text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def signed_parts(header: str, payload: str) -> str:
    """Sign two texts that may be no JSON, with the key that is known."""
    parts = f"{part(header)}.{part(payload)}"
    algorithm = jws.JWSRegistry.algorithms["ES256"]
    signature = algorithm.sign(parts.encode(), key_for("ES256"))
    return f"{parts}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def keyring(algorithms: str = "ES256", key: str | None = None, **settings: Any) -> Keyring:
    """Make a keyring with one key, or another."""
    chosen = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, **settings}
    if "jwt_jwks_url" not in chosen:
        chosen["jwt_key"] = key or pem(key_for("ES256"))
    made = make_keyring(known_settings(jwt_algorithms=algorithms, **chosen))
    assert made is not None
    return made


async def wait_until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.005)


async def refusal(ring: Keyring, sent: str) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        await ring.verify(sent)
    assert caught.value.is_invalid
    assert caught.value.__cause__ is None
    return caught.value.detail


@pytest.fixture(autouse=True)
def at_noon(clock: time_machine.Traveller) -> None:
    """Let it be the time at which the tokens are made."""


# --- Good ones ------------------------------------------------------------------------------------

SIGNED_BY = [
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512"),
]


@pytest.mark.parametrize("algorithm", SIGNED_BY)
async def test_a_token_names_a_user_and_says_until_when(algorithm: str) -> None:
    key = key_for("RS256" if algorithm[1] == "S" and algorithm[0] in "RP" else algorithm)
    ring = keyring(algorithm, SECRET if algorithm[0] == "H" else pem(key))

    assert await ring.verify(token(algorithm, key)) == SOMEBODY


async def test_both_curves_that_sign_are_taken() -> None:
    key = OKPKey.generate_key("Ed448")
    assert await keyring("EdDSA", pem(key)).verify(token("EdDSA", key)) == SOMEBODY


def test_a_curve_that_does_not_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="ONBOARDING_JWT_KEY: none of the algorithms"):
        keyring("EdDSA", pem(OKPKey.generate_key("X25519")))


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": ["else", AUDIENCE]},
        {"exp": NOON + 0.5},
        {"nbf": NOON + 29, "iat": NOON + 29},
        {"nbf": NOON - 1, "iat": None},
        {"exp": 2**53 - 1},
        {"sub": "s" * 128, "workspace_id": "\u4e2d"},
        {"further": {"claims": [1, {"a": None}]}, "jti": "1"},
    ],
    ids=str,
)
async def test_what_may_be_otherwise(changed: dict[str, Any]) -> None:
    claims = {**GOOD, **changed}
    verified = await keyring().verify(token(**changed))
    assert verified.principal.name == claims["sub"]
    assert verified.principal.workspace_id == claims["workspace_id"]
    assert verified.expires_at_s == claims["exp"]


async def test_issuer_and_audience_are_asked_for_where_they_are_set() -> None:
    ring = keyring(jwt_issuer=None, jwt_audience=None)
    assert await ring.verify(token(iss=None, aud=None)) == SOMEBODY
    assert await ring.verify(token(iss="https://else.example/", aud=["else"])) == SOMEBODY


async def test_header_parameters_that_mean_nothing_here_are_ignored() -> None:
    key = key_for("ES256")
    header = {"alg": "ES256", "typ": "at+jwt", "cat": "cl", "x5t": "abc", "nonce": 1}
    assert await keyring().verify(sign(header, GOOD, key)) == SOMEBODY


async def test_a_token_is_good_until_it_expires(clock: time_machine.Traveller) -> None:
    ring, sent = keyring(), token()
    clock.move_to(NOON + 59.999)
    assert await ring.verify(sent) == SOMEBODY
    clock.move_to(NOON + 60)
    assert await refusal(ring, sent) == "The token has expired"


# --- Hostile ones ---------------------------------------------------------------------------------

HEADER = {"alg": "ES256", "kid": "any"}
BODY = json.dumps(GOOD)


def by_public_key(algorithm: str) -> str:
    """Sign with the public key as if it were a secret."""
    parts = f"{part({'alg': algorithm})}.{part(GOOD)}"
    # The library refuses such a secret, so it is made behind its back.
    text = pem(key_for("ES256")).encode()
    signature = jws.JWSRegistry.algorithms[algorithm].sign(parts.encode(), OctKey(text, text))
    return f"{parts}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def encrypted() -> str:
    header = {"alg": "ECDH-ES", "enc": "A128GCM"}
    return jwe.encrypt_compact(header, BODY, key_for("ES256"), registry=jwe.JWERegistry())


def two_signatures() -> str:
    members: list[Any] = [{"protected": {"alg": "ES256"}}, {"protected": {"alg": "ES256"}}]
    return json.dumps(jws.serialize_json(members, BODY, key_for("ES256")))


def flattened() -> str:
    member: Any = {"protected": {"alg": "ES256"}}
    return json.dumps(jws.serialize_json(member, BODY, key_for("ES256")))


def with_signature(change: Callable[[str], str]) -> str:
    parts, _, signature = token().rpartition(".")
    return f"{parts}.{change(signature)}"


def by_embedded_key() -> str:
    key = key_for("ES256", "of the attacker")
    return sign({"alg": "ES256", "jwk": key.as_dict(private=False)}, GOOD, key)


def naming(**further: Any) -> str:
    """A token by another key, that says where that key is."""
    return sign({"alg": "ES256", **further}, GOOD, key_for("ES256", "of the attacker"))


HOSTILE: dict[str, Callable[[], str]] = {
    # How it is signed.
    "none": lambda: f"{part({'alg': 'none'})}.{part(GOOD)}.",
    "None": lambda: f"{part({'alg': 'None'})}.{part(GOOD)}.AA",
    "NONE with a signature": lambda: f"{part({'alg': 'NONE'})}.{token().partition('.')[2]}",
    "no alg": lambda: f"{part({'kid': 'any'})}.{part(GOOD)}.AA",
    "alg is a list": lambda: f"{part({'alg': ['ES256']})}.{part(GOOD)}.AA",
    "alg is null": lambda: f"{part({'alg': None})}.{part(GOOD)}.AA",
    "alg is a number": lambda: f"{part({'alg': 256})}.{part(GOOD)}.AA",
    "alg in small letters": lambda: f"{part({'alg': 'es256'})}.{part(GOOD)}.AA",
    "HS256 by the public key": lambda: by_public_key("HS256"),
    "HS512 by the public key": lambda: by_public_key("HS512"),
    "HS256 by a secret": lambda: token("HS256"),
    "an algorithm that is not listed": lambda: token("RS256"),
    "by another key": lambda: token("ES256", key_for("ES256", "of the attacker")),
    "a signature of zeros": lambda: with_signature(lambda _: part("\0" * 64)),
    "a signature of one byte": lambda: with_signature(lambda _: "AA"),
    "a truncated signature": lambda: with_signature(lambda signature: signature[:-8]),
    "a longer signature": lambda: with_signature(lambda signature: signature + "AAAA"),
    "a signature in DER": lambda: with_signature(lambda _: "MAYCAQECAQE"),
    "the signature of another token": lambda: with_signature(
        lambda _: token(sub="u-2").rpartition(".")[2]
    ),
    "two signatures": two_signatures,
    "flattened JSON": flattened,
    "encrypted": encrypted,
    # What it asks for.
    "an embedded key": by_embedded_key,
    "jku": lambda: naming(jku=f"http://{HOST}:9/jwks"),
    "x5u": lambda: naming(x5u=f"http://{HOST}:9/cert"),
    "x5c": lambda: naming(x5c=["MIIB"]),
    "a path in kid": lambda: naming(kid="../../../../dev/null"),
    "SQL in kid": lambda: naming(kid="x' UNION SELECT 'key"),
    "kid is a number": lambda: signed_parts('{"alg":"ES256","kid":1}', BODY),
    "kid is an object": lambda: signed_parts('{"alg":"ES256","kid":{}}', BODY),
    "crit": lambda: signed_parts('{"alg":"ES256","crit":["exp"],"exp":1}', BODY),
    "an empty crit": lambda: signed_parts('{"alg":"ES256","crit":[]}', BODY),
    "crit is a number": lambda: signed_parts('{"alg":"ES256","crit":1}', BODY),
    "b64": lambda: signed_parts('{"alg":"ES256","b64":false,"crit":["b64"]}', BODY),
    "b64 without crit": lambda: signed_parts('{"alg":"ES256","b64":false}', BODY),
    # How it is written.
    "nothing": lambda: "",
    "dots": lambda: "..",
    "one part": lambda: part(GOOD),
    "two parts": lambda: f"{part(HEADER)}.{part(GOOD)}",
    "four parts": lambda: f"{token()}.AA",
    "an empty header": lambda: f".{part(GOOD)}.AA",
    "an empty payload": lambda: f"{part(HEADER)}..AA",
    "an empty signature": lambda: f"{part(HEADER)}.{part(GOOD)}.",
    "a megabyte": lambda: "a" * 1_000_000,
    "a megabyte of dots": lambda: "." * 1_000_000,
    "more than 8 KiB": lambda: token(further="x" * 8192),
    "not ASCII": lambda: f"{token()[:-1]}\u00e9",
    "a letter that looks like another": lambda: token().replace("e", "\u0435"),
    "NUL": lambda: f"{token()}\0",
    "a line break": lambda: f"{token()}\n",
    "padding": lambda: f"{token()}==",
    "standard base64": lambda: f"{part(HEADER)}.{part(GOOD)}.++//",
    "base64 of an impossible length": lambda: f"{part(HEADER)}.{part(GOOD)}.AAAAA",
    "other spare bits": lambda: with_signature(lambda text: text[:-1] + chr(ord(text[-1]) + 1)),
    "a header that is no JSON": lambda: signed_parts("ES256", BODY),
    "a header that is a string": lambda: signed_parts('"alg b64 crit"', BODY),
    "a header that is a list": lambda: signed_parts('["alg"]', BODY),
    "a header that is not UTF-8": lambda: f"gICA.{part(GOOD)}.AA",
    "a deep header": lambda: signed_parts(f'{{"alg":"ES256","a":{"[" * 2000}', BODY),
    "a header that says alg twice": lambda: signed_parts('{"alg":"none","alg":"ES256"}', BODY),
    "a payload that says sub twice": lambda: signed_parts(
        json.dumps(HEADER), BODY.replace('{"sub"', '{"sub": "u-2", "sub"')
    ),
    "a payload that says exp twice, spelled otherwise": lambda: signed_parts(
        json.dumps(HEADER), BODY.replace('{"sub"', '{"\\u0065xp": 1, "sub"')
    ),
    "a payload that is no JSON": lambda: signed_parts(json.dumps(HEADER), "sub=u-1"),
    "a payload that is a list": lambda: signed_parts(json.dumps(HEADER), f"[{BODY}]"),
    "a payload that is a string": lambda: signed_parts(json.dumps(HEADER), '"sub"'),
    "a payload with NaN": lambda: signed_parts(
        json.dumps(HEADER), BODY.replace(str(NOON + 60), "NaN")
    ),
    "a deep payload": lambda: signed_parts(json.dumps(HEADER), f'{{"a":{"[" * 2000}'),
    # What it claims.
    "expired": lambda: token(exp=NOON),
    "expired long ago": lambda: token(exp=0),
    "a negative exp": lambda: token(exp=-1e300),
    "no exp": lambda: token(exp=None),
    "exp is text": lambda: token(exp=str(NOON + 60)),
    "exp is a list": lambda: token(exp=[NOON + 60]),
    "exp is true": lambda: token(exp=True),
    "exp is infinite": lambda: signed_parts(
        json.dumps(HEADER), BODY.replace(str(NOON + 60), "1e999")
    ),
    "exp is huge": lambda: token(exp=10**400),
    "exp has 5000 digits": lambda: signed_parts(
        json.dumps(HEADER), BODY.replace(str(NOON + 60), "9" * 5000)
    ),
    "not yet": lambda: token(nbf=NOON + 31),
    "nbf is text": lambda: token(nbf="0"),
    "made in the future": lambda: token(iat=NOON + 31),
    "iat is an object": lambda: token(iat={}),
    "no sub": lambda: token(sub=None),
    "sub is null": lambda: signed_parts(json.dumps(HEADER), BODY.replace('"u-1"', "null")),
    "sub is a number": lambda: token(sub=1),
    "sub is a list": lambda: token(sub=["u-1"]),
    "sub is empty": lambda: token(sub=""),
    "sub is too long": lambda: token(sub="s" * 129),
    "sub has a line break": lambda: token(sub="u-1\nx"),
    "sub has NUL": lambda: token(sub="u-1\0"),
    "sub has half of a pair": lambda: token(sub="\ud800"),
    "no workspace": lambda: token(workspace_id=None),
    "workspace_id is a number": lambda: token(workspace_id=7),
    "workspace_id is an object": lambda: token(workspace_id={"id": "w-1"}),
    "workspace_id is empty": lambda: token(workspace_id=""),
    "workspace_id has a control character": lambda: token(workspace_id="w\x7f1"),
    "another aud": lambda: token(aud="billing"),
    "other auds": lambda: token(aud=["billing", "onboarding2"]),
    "aud is a part": lambda: token(aud="onboard"),
    "no aud": lambda: token(aud=None),
    "an empty list of auds": lambda: token(aud=[]),
    "aud is an object": lambda: token(aud={AUDIENCE: True}),
    "auds that are no text": lambda: token(aud=[AUDIENCE, 1]),
    "another iss": lambda: token(iss="https://id.example"),
    "iss is a list": lambda: token(iss=[ISSUER]),
    "no iss": lambda: token(iss=None),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))
async def test_a_hostile_token_is_refused(hostile: Callable[[], str]) -> None:
    assert await keyring().verify(token()) == SOMEBODY
    await refusal(keyring("ES256,HS256,HS512"), hostile())


@pytest.mark.parametrize("hostile", [by_public_key("HS256"), token("HS256"), token()])
async def test_a_public_key_verifies_by_no_secret_algorithm(hostile: str) -> None:
    ring = keyring("HS256,HS384,HS512,RS256", pem(key_for("RS256")))
    await refusal(ring, hostile)


async def test_a_secret_verifies_by_no_other_algorithm() -> None:
    ring = keyring("HS256,RS256,ES256", SECRET)
    for algorithm in ("RS256", "ES256"):
        await refusal(ring, token(algorithm))
    await refusal(ring, token("HS256", key_for("HS256", "another secret of thirty-two bytes")))


@pytest.mark.parametrize(
    "secret",
    ["!" * 32, "!" * 32 + "letters", "\u20ac" * 11, "0123456789abcdef" * 4, "A" * 43 + "="],
)
async def test_a_secret_is_any_text_of_32_bytes(secret: str) -> None:
    key = OctKey.import_key(secret)
    assert await keyring("HS256", secret).verify(token("HS256", key)) == SOMEBODY


@pytest.mark.parametrize("kind", ["ES256", "EdDSA", "RS256"])
def test_nothing_public_is_taken_for_a_secret(kind: str) -> None:
    key = key_for(kind)
    assert not isinstance(key, OctKey)
    bare = "".join(pem(key).splitlines()[1:-1])
    ssh = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK0wmN/Cr3JXqmLW7u+g9pTh+wyqDHpSQEIQczXkVx9q"
    for public in (pem(key), bare, json.dumps(key.as_dict(private=False)), ssh):
        with pytest.raises(ValueError, match="ONBOARDING_JWT_KEY: ") as caught:
            keyring("HS256", public)
        assert bare not in str(caught.value)


def test_a_short_key_is_refused() -> None:
    with warnings.catch_warnings(action="ignore", category=SecurityWarning):
        key = RSAKey.generate_key(1024)
    with pytest.raises(ValueError, match="2048 bits"):
        keyring("RS256", pem(key))


@hypothesis.settings(deadline=None)
@given(st.text(max_size=60) | st.lists(st.text(max_size=20)).map(".".join))
def test_whatever_is_sent_is_refused(sent: str) -> None:
    ring = keyring()
    asyncio.run(refusal(ring, sent))


@hypothesis.settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "crit", "typ", "b64", "jku"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.just("ES256"),
            st.lists(st.text(max_size=3), max_size=2),
        ),
    ),
    st.one_of(st.just(GOOD), st.text(max_size=9)),
)
def test_whatever_a_signed_token_says_there_is_no_other_error(
    header: dict[str, Any], payload: Any
) -> None:
    sent = signed_parts(json.dumps(header), json.dumps(payload))
    with suppress(UnauthenticatedError):
        assert asyncio.run(keyring().verify(sent)).principal == SOMEBODY.principal


async def test_a_refusal_shows_nothing_of_the_token() -> None:
    for name, hostile in HOSTILE.items():
        detail = await refusal(keyring(), hostile())
        assert detail.isascii(), name
        assert len(detail) < 120, name
        assert not any(word in detail for word in ("u-1", "w-1", "id.example", "billing")), name


def test_without_a_key_there_is_no_keyring() -> None:
    assert make_keyring(known_settings()) is None


# --- Keys that a provider publishes ---------------------------------------------------------------


class Provider:
    """An identity provider: answers with its keys, or with what a test has it answer."""

    def __init__(self) -> None:
        self.fetches = 0
        self.answer: bytes | None = None
        self.is_waiting = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.publish()

    def publish(self, **keys: Key | dict[str, Any]) -> None:
        """Publish keys by their `kid`."""
        self.send({"keys": [public(kid, key) for kid, key in keys.items()]})

    def send(self, document: Any, status: str = "200 OK", header: str = "X-A: b") -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{header}\r\n\r\n"
        self.answer = head.encode() + body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.fetches += 1
                self.is_waiting.set()
                await self.may_answer.wait()
                if self.answer is None:
                    break
                writer.write(self.answer)
                await writer.drain()
        writer.close()


def public(kid: str, key: Key | dict[str, Any]) -> dict[str, Any]:
    if isinstance(key, dict):
        return {"kid": kid, **key}
    return {"kid": kid, **key.as_dict(private=isinstance(key, OctKey))}


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    monkeypatch.setenv("NO_PROXY", HOST)
    provider = Provider()
    provider.publish(first=key_for("ES256"))
    server = await asyncio.start_server(provider.serve, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("ONBOARDING_JWT_JWKS_URL", f"http://{HOST}:{port}/jwks?x=y")
    yield provider
    provider.may_answer.set()
    server.close()


@pytest.fixture
async def ring(provider: Provider) -> AsyncIterator[Keyring]:
    """Give a keyring that has the keys of the provider."""
    made = make_keyring(known_settings(jwt_algorithms="RS256,ES256,EdDSA,HS256"))
    assert made is not None
    await made.start()
    yield made
    await made.aclose()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give a function that lets time pass between two looks: `later(60)`."""
    now_s = 1000.0

    def pass_by(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr("app.services.keyring.monotonic_s", lambda: now_s)
    return pass_by


def by(kid: str | None, key: Key, algorithm: str = "ES256") -> str:
    header = {"alg": algorithm} if kid is None else {"alg": algorithm, "kid": kid}
    return sign(header, GOOD, key)


OLD, NEW = key_for("ES256"), key_for("ES256", "new")


async def test_published_keys_are_there_when_it_has_started(
    provider: Provider, ring: Keyring
) -> None:
    assert await ring.verify(by("first", OLD)) == SOMEBODY
    assert (provider.fetches, ring.generation) == (1, 1)


async def test_a_new_key_is_fetched_when_a_token_has_it(provider: Provider, ring: Keyring) -> None:
    provider.publish(first=OLD, second=NEW)
    assert await ring.verify(by("second", NEW)) == SOMEBODY
    assert await ring.verify(by("first", OLD)) == SOMEBODY
    assert (provider.fetches, ring.generation) == (2, 2)


async def test_a_key_that_was_withdrawn_is_gone(provider: Provider, ring: Keyring) -> None:
    provider.publish(second=NEW)
    await ring.verify(by("second", NEW))
    assert "key that is not known" in await refusal(ring, by("first", OLD))


async def test_made_up_keys_are_looked_for_once_a_minute(
    provider: Provider, ring: Keyring, later: Callable[[float], None]
) -> None:
    for number in range(20):
        await refusal(ring, by(f"made-up-{number}", NEW))
    assert provider.fetches == 2
    later(ASK_AGAIN_S - 1)
    await refusal(ring, by("made-up", NEW))
    assert provider.fetches == 2
    later(1)
    await refusal(ring, by("made-up", NEW))
    assert provider.fetches == 3
    # The same keys as before.
    assert ring.generation == 1


async def test_many_who_wait_for_a_new_key_cause_one_look(
    provider: Provider, ring: Keyring
) -> None:
    provider.publish(second=NEW)
    provider.may_answer.clear()
    provider.is_waiting.clear()
    asked = [asyncio.create_task(ring.verify(by("second", NEW))) for _ in range(50)]
    await provider.is_waiting.wait()
    # Whoever goes away does not take the look with them.
    asked[0].cancel()
    late = asyncio.create_task(ring.verify(by("second", NEW)))
    await asyncio.sleep(0)
    provider.may_answer.set()
    assert await asyncio.gather(*asked[1:], late) == [SOMEBODY] * 50
    assert provider.fetches == 2


async def test_nobody_waits_long_for_a_provider_that_says_nothing(
    provider: Provider, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.keyring.WAIT_S", 0.05)
    provider.may_answer.clear()
    assert "not known" in await refusal(ring, by("second", NEW))
    assert await ring.verify(by("first", OLD)) == SOMEBODY


BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"<html>", "200 OK"),
    "not UTF-8": (b'{"keys": "\xff"}', "200 OK"),
    "a list": ([], "200 OK"),
    "no keys": ({}, "200 OK"),
    "keys that are no list": ({"keys": {}}, "200 OK"),
    "too many keys": ({"keys": [{}] * 101}, "200 OK"),
    "an error": ({"keys": []}, "500 Oh"),
    "a redirect": ({"keys": []}, "302 Found"),
    "too long": (b'{"keys": []}' + b" " * MOST_BYTES, "200 OK"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_look_that_fails_keeps_the_keys(
    name: str, provider: Provider, ring: Keyring
) -> None:
    document, status = BAD_ANSWERS[name]
    provider.send(document, status, "Location: ftp://else.example/jwks")
    with capture_logs() as lines:
        await refusal(ring, by("second", NEW))
    assert await ring.verify(by("first", OLD)) == SOMEBODY
    assert (provider.fetches, ring.generation) == (2, 1)
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("jwks_fetch_failed", "warning")
    assert HOST not in str(line)
    assert "x=y" not in str(line)


async def test_a_packed_answer_is_not_unpacked(provider: Provider, ring: Keyring) -> None:
    packed = gzip.compress(json.dumps({"keys": [public("second", NEW)]}).encode())
    provider.send(packed, header="Content-Encoding: gzip")
    await refusal(ring, by("second", NEW))
    assert ring.generation == 1


async def test_a_provider_that_is_away_stops_no_start_and_may_come_later(
    provider: Provider, later: Callable[[float], None]
) -> None:
    provider.answer = None
    ring = make_keyring(known_settings())
    assert ring is not None
    with capture_logs() as lines:
        await ring.start()
        # It is not the token that is wrong: nobody should throw it away.
        with pytest.raises(KeysUnavailableError):
            await ring.verify(by("first", OLD))
    # No issuer and no audience is set: that is told as well.
    assert {line["event"] for line in lines} == {"jwks_fetch_failed", "tokens_not_bound"}
    assert ring.generation == 0

    provider.publish(first=OLD)
    later(ASK_AGAIN_S)
    assert await ring.verify(by("first", OLD)) == SOMEBODY
    assert ring.generation == 1
    await ring.aclose()


async def test_keys_are_fetched_again_without_a_request(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.keyring.REFRESH_EVERY_S", 0.01)
    monkeypatch.setattr("app.services.keyring.RETRY_AFTER_S", 0.01)
    ring = make_keyring(known_settings())
    assert ring is not None
    await ring.start()
    provider.answer = None
    await wait_until(lambda: provider.fetches > 4)
    assert ring.generation == 1
    provider.publish(first=OLD, second=NEW)
    await wait_until(lambda: ring.generation == 2)
    await ring.aclose()
    assert "jwks" not in [task.get_name() for task in asyncio.all_tasks()]


async def test_the_same_keys_in_another_order_are_no_change(
    provider: Provider, ring: Keyring, later: Callable[[float], None]
) -> None:
    provider.publish(first=OLD, second=NEW)
    await ring.verify(by("second", NEW))
    provider.publish(second=NEW, first=OLD)
    later(ASK_AGAIN_S)
    await refusal(ring, by("third", NEW))
    assert (provider.fetches, ring.generation) == (3, 2)


async def test_keys_that_cannot_verify_are_left_out(provider: Provider, ring: Keyring) -> None:
    secret = OctKey.import_key(SECRET)
    x25519 = OKPKey.generate_key("X25519")
    good = NEW.as_dict(private=False)
    with warnings.catch_warnings(action="ignore", category=SecurityWarning):
        short = RSAKey.generate_key(1024)
    provider.send(
        {
            "keys": [
                *(None, 1, "key", [], {}, {"kty": "EC"}, {"kty": []}, {"kty": "AKP", "kid": "pq"}),
                {**good, "kid": "enc", "use": "enc"},
                {**good, "kid": "signs", "key_ops": ["sign"]},
                {**good, "kid": "other", "alg": "ES384"},
                {**good, "kid": "curve", "crv": "P-257"},
                {**good, "kid": "damaged", "x": good["y"]},
                {**good, "kid": 5},
                public("short", short),
                public("secret", secret),
                public("x25519", x25519),
                {**NEW.as_dict(private=True), "kid": "private"},
                {**good, "kid": "good", "use": "sig", "alg": "ES256", "x-further": {}},
            ]
        }
    )
    assert await ring.verify(by("good", NEW)) == SOMEBODY
    for kid in ("enc", "signs", "other", "curve", "damaged", "private"):
        await refusal(ring, by(kid, NEW))
    await refusal(ring, by("secret", secret, "HS256"))
    await refusal(ring, by("short", short, "RS256"))


async def test_a_provider_without_a_fit_key_lets_nobody_in(
    provider: Provider, ring: Keyring
) -> None:
    provider.publish(secret=OctKey.import_key(SECRET))
    with capture_logs() as lines, pytest.raises(KeysUnavailableError):
        await ring.verify(by("second", NEW))
    assert "jwks_found_unfit" in [line["event"] for line in lines]
    with pytest.raises(KeysUnavailableError):
        await ring.verify(by("first", OLD))
    assert ring.generation == 2


async def test_a_token_without_a_kid_can_only_mean_a_single_key(
    provider: Provider, ring: Keyring, later: Callable[[float], None]
) -> None:
    assert await ring.verify(by(None, OLD)) == SOMEBODY
    rsa = key_for("RS256")
    provider.publish(first=OLD, second=NEW, third=rsa)
    await ring.verify(by("second", NEW))
    await refusal(ring, by(None, OLD))
    assert await ring.verify(by(None, rsa, "RS256")) == SOMEBODY


async def test_a_kid_with_another_algorithm_is_no_way_to_a_key(
    provider: Provider, ring: Keyring
) -> None:
    await refusal(ring, by("first", key_for("RS256"), "RS256"))
    await refusal(ring, by_public_key("HS256"))
