"""The record in the store: bounded streams whose ids rise together."""

from collections.abc import Sequence
from typing import Any

from app.onboarding.audit import AuditEvent, AuditView, Lane, describe_audited
from app.onboarding.events import EventId, parse_event_id
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway

KEPT = 10_000
"""How many events are kept of each lane, at least."""

REMEMBERED_MS = 3_600_000
"""How long a writer's last batch is known again, in milliseconds: an hour."""


class AuditStore:
    """Keeps what happened, each lane in a stream. Each call is one round trip."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = [gateway.keys.audit(lane) for lane in Lane]

    async def add(self, events: Sequence[AuditEvent], *, writer: str, number: int) -> None:
        """Keep a batch of events, once however often it is sent.

        Whoever writes has a name of its own, numbers its batches from 1, and goes on to the next
        one when this one is known to be kept.
        """
        args: list[Argument] = [number, KEPT, REMEMBERED_MS]
        for at_ms, who, action, session_id, outcome, lane in events:
            args += (_NUMBERS[lane], at_ms, _bytes(who), action, outcome, _bytes(session_id or ""))
        keys = [self._gateway.keys.audit(f"batch:{writer}"), *self._keys]
        await self._gateway.evaluate("add_audit", keys, args)

    async def list_after(self, after: EventId, limit: int) -> list[AuditView]:
        """Read up to `limit` events after an id, oldest first. Raises `CorruptRecordError`."""
        reply = await self._gateway.evaluate("read_audit", self._keys, [str(after), limit])
        return [self._read(*entry) for entry in reply.values[0]]

    def _read(self, stream: int, event_id: bytes, fields: Sequence[Any]) -> AuditView:
        try:
            texts = [part.decode() for part in fields]
            parsed = parse_event_id(event_id.decode()) or EventId(0, 0)
            return describe_audited(parsed, dict(zip(texts[::2], texts[1::2], strict=True)))
        except (KeyError, ValueError, OverflowError):
            raise corrupt(self._keys[stream - 1], "the record") from None


_NUMBERS = {lane: number for number, lane in enumerate(Lane, start=1)}


def _bytes(text: str) -> bytes:
    # A batch that could not be sent would keep all others from being kept.
    return text.encode(errors="replace")
