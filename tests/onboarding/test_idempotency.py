import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.onboarding.idempotency import IdempotentRequest

REQUEST: dict[str, Any] = {
    "caller": "u1",
    "method": "POST",
    "path": "/api/v1/onboarding/s1/steps/1",
    "key": "k1",
    "query": b"a=1",
    "body": b'{"data":{"a":1}}',
}

# Who asks may be called anything. A method, a path that the router admits and a key hold no line
# feed; a query and a body may be any bytes. Few characters, so that two of them meet often.
_WORDS = st.text("a/ \\", max_size=4)
_REQUESTS = st.fixed_dictionaries(
    {
        "caller": st.text("a/ \n", max_size=4),
        "method": st.sampled_from(["POST", "PUT"]),
        "path": _WORDS,
        "key": _WORDS,
        "query": st.binary(max_size=3) | st.text("01\n", max_size=4).map(str.encode),
        "body": st.binary(max_size=3) | st.text("01\n", max_size=4).map(str.encode),
    }
)


def test_a_repeat_has_the_same_digests() -> None:
    assert IdempotentRequest.of(**REQUEST) == IdempotentRequest.of(**REQUEST)


@pytest.mark.parametrize("component", ["caller", "method", "path", "key"])
def test_the_scope_is_caller_method_path_and_key(component: str) -> None:
    first, other = (
        IdempotentRequest.of(**REQUEST),
        IdempotentRequest.of(**{**REQUEST, component: REQUEST[component] + "x"}),
    )
    assert other.scope != first.scope
    assert other.fingerprint == first.fingerprint


@pytest.mark.parametrize("component", ["query", "body"])
def test_the_fingerprint_is_query_and_body(component: str) -> None:
    first, other = (
        IdempotentRequest.of(**REQUEST),
        IdempotentRequest.of(**{**REQUEST, component: REQUEST[component] + b" "}),
    )
    assert other.fingerprint != first.fingerprint
    assert other.scope == first.scope


@given(_REQUESTS, _REQUESTS)
@example({**REQUEST, "query": b"1", "body": b"1"}, {**REQUEST, "query": b"11", "body": b""})
@example({**REQUEST, "query": b"", "body": b"1\n0"}, {**REQUEST, "query": b"0", "body": b""})
@example({**REQUEST, "caller": "a\nPOST"}, {**REQUEST, "caller": "a"})
@example({**REQUEST, "path": "/a", "key": "b"}, {**REQUEST, "path": "/", "key": "ab"})
def test_two_requests_share_a_digest_only_if_they_share_its_components(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    first, second = IdempotentRequest.of(**one), IdempotentRequest.of(**other)
    scopes = [
        tuple(each[part] for part in ("caller", "method", "path", "key")) for each in (one, other)
    ]
    sent = [(each["query"], each["body"]) for each in (one, other)]
    assert (first.scope == second.scope) == (scopes[0] == scopes[1])
    assert (first.fingerprint == second.fingerprint) == (sent[0] == sent[1])


@given(_REQUESTS)
def test_digests_are_64_hexadecimal_digits_that_tell_nothing(request: dict[str, Any]) -> None:
    derived = IdempotentRequest.of(**request)
    for digest in (derived.scope, derived.fingerprint):
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert not derived.replayed
