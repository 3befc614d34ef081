"""Tokens in the store: the digests of those that open a session, never the tokens."""

from app.errors import SessionNotFoundError
from app.onboarding.tokens import MAX_SESSION_TOKENS
from app.store.faults import corrupt
from app.store.gateway import Gateway


class TokenStore:
    """Keeps the digests of tokens, in one hash of each session. Each call is one round trip."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys

    async def is_session_token(self, session_id: str, digest: str) -> bool:
        """Say whether this is the digest of a token that opens the session.

        No token opens an unknown session. Raises `CorruptRecordError`.
        """
        key = self._keys.session(session_id).tokens
        return bool(await self._gateway.command("HEXISTS", key, f"session:{digest}"))

    async def get_seed(self, session_id: str) -> str | None:
        """Read what the maker of a session kept there of its first token; None without.

        Raises `CorruptRecordError`.
        """
        key = self._keys.session(session_id).tokens
        seed = await self._gateway.command("HGET", key, "seed")
        try:
            return None if seed is None else str(seed.decode())
        except ValueError:
            raise corrupt(key, "the seed") from None

    async def add_session_token(self, session_id: str, digest: str, *, at_ms: int) -> None:
        """Let a session token in; of more than `MAX_SESSION_TOKENS` the oldest goes.

        It renews the session's life and is no change of it. Raises `SessionNotFoundError`,
        `CorruptRecordError`.
        """
        reply = await self._gateway.change(
            "add_session_token",
            self._keys.session(session_id),
            args=[digest, MAX_SESSION_TOKENS],
            at_ms=at_ms,
        )
        if reply.word == "not_found":
            raise SessionNotFoundError
