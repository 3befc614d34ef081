"""What tokens look like, and what may be asked of one that is made."""

import hashlib
import string
from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequestError, ResumeTokenNotFoundError
from app.onboarding.sessions import is_public_id
from app.onboarding.tokens import (
    ResumeRecord,
    check_may_have_tokens,
    check_resume_token,
    check_token_id,
    derive_session_token,
    digest_of,
    make_resume_token,
    make_session_token,
    parse_resume_token,
    parse_session_token,
    view_resume_token,
)

SESSION = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f9"
NO_UUID4 = "0f1e2d3c-4b5a-1978-8695-a4b3c2d1e0f9"
TOKEN_ID = "00ff00ff00ff00ff"
SECRET = bytes(range(32))

session_ids = st.uuids(version=4).map(str)
token_ids = st.binary(min_size=8, max_size=8).map(bytes.hex)
secrets = st.binary(min_size=32, max_size=32)


@given(session_ids, secrets)
def test_a_session_token_tells_its_session_and_its_digest(session_id: str, secret: bytes) -> None:
    token = make_session_token(session_id, secret)
    digest = hashlib.sha256(token.encode()).hexdigest()
    assert parse_session_token(token) == (session_id, digest)
    assert digest_of(token) == digest
    assert set(token) <= set(string.ascii_letters + string.digits + "-_")


@given(session_ids, token_ids, secrets)
def test_a_resume_token_tells_its_session_its_id_its_digest_and_its_secret(
    session_id: str, token_id: str, secret: bytes
) -> None:
    token = make_resume_token(session_id, token_id, secret)
    parsed = parse_resume_token(token)
    assert parsed is not None
    assert (parsed.session_id, parsed.token_id) == (session_id, token_id)
    assert (parsed.digest, parsed.secret) == (digest_of(token), secret)
    assert set(token) <= set(string.ascii_letters + string.digits + "-_")
    assert token not in repr(parsed)
    assert repr(secret) not in repr(parsed)


SESSION_TOKEN = make_session_token(SESSION, SECRET)
RESUME_TOKEN = make_resume_token(SESSION, TOKEN_ID, SECRET)


def spellings(token: str) -> list[str]:
    """Give what is not quite this token."""
    mark, body = token[:4], token[4:]
    last = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    neighbour = last[last.index(body[-1]) ^ 1]
    return [
        *(body, mark, "", mark.upper() + body, mark + token, "o" + token, token[1:]),
        *(token[:-1], token + "A", token + "=", token + "==", token + "\n", " " + token),
        *(mark + body[:-1] + "é", mark + body[:-1] + "+", mark + body[:-1] + "/"),
        *(mark + body[:-1] + "\ud800", mark + body[:-1] + "\0", mark + body[:-1] + "٣"),
        mark + body[:10] + " " + body[11:],
        # The same bytes, where a token does not fill its last character.
        *([mark + body[:-1] + neighbour] if len(body) % 4 else []),
    ]


@pytest.mark.parametrize("text", [*spellings(SESSION_TOKEN), RESUME_TOKEN])
def test_what_is_no_session_token_is_none(text: str) -> None:
    assert parse_session_token(text) is None


@pytest.mark.parametrize("text", [*spellings(RESUME_TOKEN), SESSION_TOKEN])
def test_what_is_no_resume_token_is_none(text: str) -> None:
    assert parse_resume_token(text) is None


@given(st.text() | st.binary(min_size=40, max_size=60).map(lambda b: urlsafe_b64encode(b).decode()))
def test_anything_else_is_none_and_no_error(text: str) -> None:
    for marked in (text, f"ost_{text}", f"ort_{text}"):
        for parsed in (parse_session_token(marked), parse_resume_token(marked)):
            assert parsed is None or is_public_id(parsed.session_id)


def test_a_token_that_names_what_is_no_public_id_is_none() -> None:
    assert parse_session_token(make_session_token(NO_UUID4, SECRET)) is None
    assert parse_resume_token(make_resume_token(NO_UUID4, TOKEN_ID, SECRET)) is None


@given(session_ids, token_ids, secrets)
def test_what_a_resume_token_gives_is_always_the_same_and_opens_its_session(
    session_id: str, token_id: str, secret: bytes
) -> None:
    resume = parse_resume_token(make_resume_token(session_id, token_id, secret))
    assert resume is not None
    given_token = derive_session_token(resume)
    parsed = parse_session_token(given_token)
    assert parsed is not None
    assert parsed.session_id == session_id
    assert derive_session_token(resume) == given_token
    # It does not hold the secret that it was made of.
    assert urlsafe_b64encode(secret).decode()[3:-3] not in given_token


def test_no_two_resume_tokens_give_the_same() -> None:
    tokens = [
        make_resume_token(SESSION, TOKEN_ID, SECRET),
        make_resume_token(SESSION, "00ff00ff00ff00fe", SECRET),
        make_resume_token(SESSION, TOKEN_ID, bytes(32)),
    ]
    parsed = [parse_resume_token(token) for token in tokens]
    assert len({derive_session_token(each) for each in parsed if each is not None}) == 3


# --- What is asked of one that is made ------------------------------------------------------------


@pytest.mark.parametrize(("ttl_s", "label"), [(60, None), (604_800, "a"), (86_400, "é" * 100)])
def test_what_may_be_asked_for(ttl_s: int, label: str | None) -> None:
    check_resume_token(ttl_s, label)


@pytest.mark.parametrize(
    ("ttl_s", "label", "pointers"),
    [
        (59, None, ["/ttl_s"]),
        (604_801, None, ["/ttl_s"]),
        (-60, "", ["/ttl_s", "/label"]),
        (60, "a" * 101, ["/label"]),
        (60, "a\nb", ["/label"]),
        (60, "\x7f", ["/label"]),
        (60, "\ud800", ["/label"]),
    ],
)
def test_what_may_not_be_asked_for_is_named(
    ttl_s: int, label: str | None, pointers: list[str]
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_resume_token(ttl_s, label)
    assert [fault["pointer"] for fault in refused.value.faults] == pointers


@pytest.mark.parametrize("token_id", ["", "0" * 15, "0" * 17, "G" * 16, "A" * 16, "0" * 16 + "\n"])
def test_what_can_be_no_id_of_a_token_answers_like_an_unknown_one(token_id: str) -> None:
    check_token_id(TOKEN_ID)
    with pytest.raises(ResumeTokenNotFoundError):
        check_token_id(token_id)


@pytest.mark.parametrize("session_id", ["a-name", NO_UUID4, "a b", "token", SESSION.upper()])
def test_a_session_whose_id_is_no_uuid4_has_no_tokens(session_id: str) -> None:
    check_may_have_tokens(SESSION)
    with pytest.raises(InvalidRequestError):
        check_may_have_tokens(session_id)


def test_a_token_is_described_without_itself() -> None:
    record = ResumeRecord(TOKEN_ID, "", 1_767_268_800_000, 1_767_268_860_000, None)
    assert view_resume_token(record) == {
        "token_id": TOKEN_ID,
        "label": None,
        "created_at": "2026-01-01T12:00:00.000Z",
        "expires_at": "2026-01-01T12:01:00.000Z",
        "used_at": None,
    }
    used = record._replace(label="a phone", used_ms=1_767_268_801_000)
    assert view_resume_token(used)["used_at"] == "2026-01-01T12:00:01.000Z"
    assert view_resume_token(used)["label"] == "a phone"
