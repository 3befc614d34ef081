"""Questions in the store: the last ones of a session, and how many were asked of late."""

import orjson

from app.errors import SessionNotFoundError
from app.onboarding.assistant import MAX_HISTORY, AskedQuestion, parse_asked
from app.store.faults import corrupt
from app.store.gateway import Gateway

CLAIM_S = 0.25
"""How long the store may take to say whether there were too many questions, in seconds."""


class AssistantStore:
    """Keeps questions with their answers. An unknown session raises `SessionNotFoundError`.

    Each call is one round trip.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys

    async def add(self, session_id: str, asked: AskedQuestion, *, at_ms: int) -> None:
        """Keep a question with its answer, of which the last ones stay, and count it.

        It renews the session's life. It is no change of the session: nothing is locked by it, and
        nothing that was prepared meanwhile is in vain.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(
            "add_answer",
            keys,
            [keys.history],
            [orjson.dumps(asked), asked["processing_time_ms"], MAX_HISTORY],
            at_ms=at_ms,
        )
        if reply.word == "not_found":
            raise SessionNotFoundError

    async def list_asked(self, session_id: str) -> list[AskedQuestion]:
        """Read the last questions, oldest first. Raises `CorruptRecordError`."""
        keys = self._keys.session(session_id)
        reply = await self._gateway.evaluate("read_history", [*keys[:2], keys.history])
        if reply.word == "not_found":
            raise SessionNotFoundError
        return [read_asked(keys.history, text) for text in reply.values[0]]

    async def claim(self, per_second: int) -> bool:
        """Count a question that is about to be asked; False when there were too many of late.

        No more than `per_second` are let through within any second, by all processes together.
        Raises a `StoreError` when the store does not say in time; it is asked once.
        """
        reply = await self._gateway.evaluate_once(
            "claim_ask", [self._keys.asks], [per_second], limit_s=CLAIM_S
        )
        return reply.word == "ok"


def read_asked(key: str, text: bytes) -> AskedQuestion:
    """Read an entry of a history, which is `key`. Raises `CorruptRecordError`."""
    try:
        return parse_asked(orjson.loads(text))
    except ValueError:
        raise corrupt(key, "the history") from None
