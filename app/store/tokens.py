"""Tokens in the store: the digests of those that open a session, never the tokens."""

from collections.abc import Mapping
from typing import NamedTuple

from app.clock import LAST_MS
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    ResumeTokenNotFoundError,
    SessionNotFoundError,
)
from app.onboarding.sessions import Session
from app.onboarding.tokens import (
    MAX_OPEN_TOKENS,
    MAX_RESUME_TOKENS,
    MAX_SESSION_TOKENS,
    REPEAT_MS,
    ResumeRecord,
    ResumeToken,
    is_token_id,
)
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway, Reply
from app.store.sessions import Updated


class NewResumeToken(NamedTuple):
    """What is kept of a resume token that is made; times in milliseconds, `label` "" for none."""

    token_id: str
    digest: str
    lifetime_ms: int
    label: str


class TokenStore:
    """Keeps the digests of tokens, in one hash of each session. Each call is one round trip.

    Every method raises `CorruptRecordError` where that hash cannot be read. What changes it renews
    the session's life, and is no change of the session. The methods that do not say what an unknown
    session has raise `SessionNotFoundError`.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys

    # --- Session tokens ---------------------------------------------------------------------------

    async def is_session_token(self, session_id: str, digest: str) -> bool:
        """Say whether this is the digest of a token that opens the session.

        No token opens an unknown session.
        """
        key = self._keys.session(session_id).tokens
        return bool(await self._gateway.command("HEXISTS", key, f"session:{digest}"))

    async def get_seed(self, session_id: str) -> str | None:
        """Read what the maker of a session kept there of its first token.

        None without, and for an unknown session.
        """
        key = self._keys.session(session_id).tokens
        seed = await self._gateway.command("HGET", key, "seed")
        try:
            return None if seed is None else str(seed.decode())
        except ValueError:
            raise corrupt(key, "the seed") from None

    async def add_session_token(self, session_id: str, digest: str, *, at_ms: int) -> None:
        """Let a session token in; of more than `MAX_SESSION_TOKENS` the oldest goes."""
        await self._change("add_session_token", session_id, [digest, MAX_SESSION_TOKENS], at_ms)

    # --- Resume tokens ----------------------------------------------------------------------------

    async def create(self, session_id: str, new: NewResumeToken, *, at_ms: int) -> int:
        """Keep a resume token; give when its time is over, in Unix milliseconds.

        Raises `InvalidRequestError` when too many wait to be used.
        """
        args: list[Argument] = [new.token_id, new.digest, new.lifetime_ms]
        args += [MAX_OPEN_TOKENS, MAX_RESUME_TOKENS, new.label]
        reply = await self._change("create_resume_token", session_id, args, at_ms)
        if reply.word == "too_many":
            raise InvalidRequestError(
                f"{MAX_OPEN_TOKENS} resume tokens of this session wait to be used, which is the"
                " most there may be; revoke one first"
            )
        return int(reply.values[0])

    async def list_open(self, session_id: str) -> list[ResumeRecord]:
        """Read the resume tokens that can be used, or revoked, newest first.

        One that was used can be revoked as long as it is remembered, since what it gave is good.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.evaluate("read_tokens", [*keys[:2], keys.tokens])
        if reply.word == "not_found":
            raise SessionNotFoundError
        now_ms, flat = int(reply.values[0]), reply.values[1]
        records = read_tokens(keys.tokens, dict(zip(flat[::2], flat[1::2], strict=True)))
        left = [each for each in records if each.used_ms is not None or each.expires_ms > now_ms]
        return sorted(left, key=lambda each: (each.created_ms, each.token_id), reverse=True)

    async def use(self, token: ResumeToken, session_digest: str, *, at_ms: int) -> Session:
        """Use a resume token: let in the session token that it gives, and read the session.

        Used again while that is possible, it renews nothing. Raises `ResumeTokenNotFoundError` also
        for an unknown session, and for one whose damage lets no token be judged: that is in the
        log, and nobody learns of a session by a token that may be wrong.
        """
        args: list[Argument] = [token.token_id, token.digest, session_digest]
        args += [REPEAT_MS, MAX_SESSION_TOKENS]
        try:
            reply = await self._change("use_resume_token", token.session_id, args, at_ms)
        except (SessionNotFoundError, CorruptRecordError):
            raise ResumeTokenNotFoundError from None
        keys = self._keys.session(token.session_id)
        return Updated(token.session_id, keys, reply.values).read()

    async def revoke(self, session_id: str, token_id: str, *, at_ms: int) -> None:
        """Revoke a resume token, and the session token that it gave.

        Raises `ResumeTokenNotFoundError`.
        """
        await self._change("revoke_resume_token", session_id, [token_id], at_ms)

    async def _change(self, name: str, session_id: str, args: list[Argument], at_ms: int) -> Reply:
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(name, keys, args=args, at_ms=at_ms)
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "resume_token_not_found":
                raise ResumeTokenNotFoundError
        return reply


def read_tokens(key: str, fields: Mapping[bytes, bytes]) -> list[ResumeRecord]:
    """Read the resume tokens of all that `key` keeps. Raises `CorruptRecordError`."""
    try:
        return [
            _record(name.removeprefix(b"resume:").decode(), text.decode())
            for name, text in fields.items()
            if name.startswith(b"resume:")
        ]
    except ValueError:
        raise corrupt(key, "the tokens") from None


def _record(token_id: str, text: str) -> ResumeRecord:
    """Read what is kept of one token. Raises `ValueError`."""
    _, created, expires, used, _, label = text.split(" ", 5)
    times = [int(created), int(expires), int(used)]
    if not is_token_id(token_id) or not all(0 <= at_ms <= LAST_MS for at_ms in times):
        raise ValueError(token_id)
    return ResumeRecord(token_id, label, times[0], times[1], times[2] or None)
