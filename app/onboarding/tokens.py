"""Tokens that open a session: what they look like, and what may be known of them.

A token names its session, so that nothing but that session has to be looked at to judge it; what
makes it hard to guess are 256 random bits, which come from the caller. Only its digest is kept.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import Fault, InvalidRequestError, ResumeTokenNotFoundError
from app.onboarding.sessions import SessionView, check_session_id, is_own_string, is_public_id

SECRET_BYTES = 32
"""How much of a token is random."""

TOKEN_ID_BYTES = 8
"""How long the id of a resume token is; its random bytes are what protects it."""

MAX_SESSION_TOKENS = 100
"""How many session tokens a session has at most: the oldest goes."""

MAX_OPEN_TOKENS = 20
"""How many resume tokens of a session may wait to be used."""

MAX_RESUME_TOKENS = 100
"""How many resume tokens of a session are remembered at most, used ones included."""

MIN_TTL_S, DEFAULT_TTL_S, MAX_TTL_S = 60, 86_400, 604_800
"""How long a resume token may live, in seconds: a minute, a day, a week."""

MAX_LABEL_LENGTH = 100
"""Longest label of a resume token, in characters."""

REPEAT_MS = 60_000
"""How long after its first use a resume token gives the same answer again, in milliseconds."""


class SessionToken(NamedTuple):
    """What a session token tells: the session that it opens, and its own digest."""

    session_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """What a resume token tells; `token_id` is 16 hex digits. Its secret is never shown."""

    session_id: str
    token_id: str
    digest: str
    secret: bytes = field(repr=False)


class ResumeRecord(NamedTuple):
    """What is kept of a resume token; times in Unix milliseconds, `label` is "" without one."""

    token_id: str
    label: str
    created_ms: int
    expires_ms: int
    used_ms: int | None


class CreatedResumeToken(TypedDict):
    """A resume token, shown once."""

    token_id: str
    token: str
    expires_at: str


class ResumeTokenView(TypedDict):
    """What can be told of a resume token."""

    token_id: str
    label: str | None
    created_at: str
    expires_at: str
    used_at: str | None


class ResumeTokenList(TypedDict):
    """The resume tokens of a session that can be used, or revoked, newest first."""

    session_id: str
    resume_tokens: list[ResumeTokenView]


class RevokedResumeToken(TypedDict):
    """What revoking a resume token came to."""

    success: Literal[True]
    session_id: str
    token_id: str


class ResumedSessionView(SessionView):
    """A session, with a token that opens it from now on."""

    session_token: str


def digest_of(token: str) -> str:
    """Give the SHA-256 of a whole token, in hex: all that is kept of it."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_session_token(session_id: str, secret: bytes) -> str:
    """Write a session token of 32 random bytes; the session is a UUID4."""
    return _SESSION_MARK + _encode(_session_bytes(session_id) + secret)


def parse_session_token(text: str) -> SessionToken | None:
    """Read a session token; None for anything else, another spelling of the same included."""
    raw = _decode(text, _SESSION_MARK, _ID_BYTES + SECRET_BYTES)
    session_id = None if raw is None else _session_id(raw)
    return None if session_id is None else SessionToken(session_id, digest_of(text))


def make_resume_token(session_id: str, token_id: str, secret: bytes) -> str:
    """Write a resume token of 32 random bytes; `token_id` is 16 hex digits."""
    return _RESUME_MARK + _encode(_session_bytes(session_id) + bytes.fromhex(token_id) + secret)


def parse_resume_token(text: str) -> ResumeToken | None:
    """Read a resume token; None for anything else, another spelling of the same included."""
    raw = _decode(text, _RESUME_MARK, _ID_BYTES + TOKEN_ID_BYTES + SECRET_BYTES)
    session_id = None if raw is None else _session_id(raw)
    if raw is None or session_id is None:
        return None
    token_id, secret = raw[_ID_BYTES:-SECRET_BYTES].hex(), raw[-SECRET_BYTES:]
    return ResumeToken(session_id, token_id, digest_of(text), secret)


def derive_session_token(resumed: ResumeToken) -> str:
    """Make the session token that a resume token gives: whoever asks again gets the same.

    It can only be made by who has the resume token, so that neither has to be kept.
    """
    message = b"onboarding session token " + bytes.fromhex(resumed.token_id)
    return make_session_token(
        resumed.session_id, hmac.digest(resumed.secret, message, hashlib.sha256)
    )


def derive_first_token(session_id: str, seed: str, credential: bytes) -> str:
    """Make the session token that is told to who begins a session and may have to ask again.

    It takes the `seed`, 32 random bytes in hex that are kept, and what they showed, which is not:
    who has only one of them cannot make it.
    """
    secret = hmac.digest(bytes.fromhex(seed), credential, hashlib.sha256)
    return make_session_token(session_id, secret)


def is_token_id(token_id: str) -> bool:
    """Say whether a resume token may have this id."""
    return _TOKEN_ID.fullmatch(token_id) is not None


def check_token_id(token_id: str) -> None:
    """Raise `ResumeTokenNotFoundError` for what can be no id: it answers like an unknown one."""
    if not is_token_id(token_id):
        raise ResumeTokenNotFoundError


def check_may_have_tokens(session_id: str) -> None:
    """Raise `InvalidRequestError` for a session that tokens cannot name: its id is no UUID4."""
    check_session_id(session_id)
    if not is_public_id(session_id):
        raise InvalidRequestError("Only a session whose session_id is a UUID4 has tokens")


def check_resume_token(ttl_s: int, label: str | None) -> None:
    """Raise `InvalidRequestError`, naming every field at fault, unless a token may be made so."""
    faults = []
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        detail = f"{MIN_TTL_S} to {MAX_TTL_S} seconds"
        faults.append(Fault(pointer="/ttl_s", code="integer", detail=detail))
    if label is not None and not is_own_string(label, MAX_LABEL_LENGTH):
        detail = f"1 to {MAX_LABEL_LENGTH} characters, none of them a control character"
        faults.append(Fault(pointer="/label", code="string", detail=detail))
    if faults:
        names = ", ".join(fault["pointer"][1:] for fault in faults)
        raise InvalidRequestError(f"Not acceptable: {names}", faults)


def view_resume_token(record: ResumeRecord) -> ResumeTokenView:
    """Describe a resume token to a client."""
    return ResumeTokenView(
        token_id=record.token_id,
        label=record.label or None,
        created_at=rfc3339(record.created_ms),
        expires_at=rfc3339(record.expires_ms),
        used_at=None if record.used_ms is None else rfc3339(record.used_ms),
    )


_SESSION_MARK, _RESUME_MARK = "ost_", "ort_"
_ID_BYTES = 16
_TOKEN_ID = re.compile(r"[0-9a-f]{16}")
_SPELLING = re.compile(r"[A-Za-z0-9_-]+")


def _encode(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str, mark: str, size: int) -> bytes | None:
    encoded = text.removeprefix(mark)
    if encoded == text or len(encoded) != -(-4 * size // 3) or not _SPELLING.fullmatch(encoded):
        return None
    raw = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    # The last character may hold bits that are none of the token's.
    return raw if _encode(raw) == encoded else None


def _session_bytes(session_id: str) -> bytes:
    return bytes.fromhex(session_id.replace("-", ""))


def _session_id(raw: bytes) -> str | None:
    digits = raw[:_ID_BYTES].hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    session_id = "-".join(parts)
    return session_id if is_public_id(session_id) else None
