"""The feed: every event of every session, for whoever acts on them, in any process."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from app.onboarding.events import EventId, EventView, describe_event, parse_event_id
from app.onboarding.retention import DeleteReason
from app.store.gateway import Gateway

READ_AT_ONCE = 100
"""How many events are read at a time."""

LOOKED_AT_ONCE = 1000
"""How many events are looked at at a time for what is to be forgotten."""


class FedEvent(NamedTuple):
    """An event of a session."""

    session_id: str
    event: EventView


class FeedStore:
    """The feed: a bounded stream that is written by the scripts that change sessions."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._key = gateway.keys.index("feed")

    async def newest(self) -> EventId:
        """Give the id of the newest event, that of nothing when there is none."""
        found = await self._gateway.command("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return _entry_id(found[0]) if found else EventId(0, 0)

    async def list_after(self, after: EventId) -> tuple[list[FedEvent], EventId]:
        """Read events after an id; give the place to go on from. What is no event is left out."""
        found = await self._gateway.command(
            "XRANGE", self._key, f"({after}", "+", "COUNT", READ_AT_ONCE
        )
        events = [event for entry in found if (event := _event(entry)) is not None]
        return events, _entry_id(found[-1]) if found else after

    async def forget_erased(self) -> None:
        """Take out what happened to sessions that were erased, but for their end.

        An event has what was said with it: the message of a progress, the name of a file. One
        command for each 1,000 events of the feed, and one for each of these in which there is some.
        """
        erased: set[bytes] = set()
        latest = "+"
        # Backwards: the end of a session comes before what it ended.
        while found := await self._gateway.command(
            "XREVRANGE", self._key, latest, "-", "COUNT", LOOKED_AT_ONCE
        ):
            gone: list[bytes] = []
            for entry_id, told in found:
                fields = dict(_pairs(told))
                session_id = fields.get(b"session_id", b"")
                if fields.get(b"reason") == DeleteReason.ERASURE.encode():
                    erased.add(session_id)
                elif session_id in erased:
                    gone.append(entry_id)
            if gone:
                await self._gateway.command("XDEL", self._key, *gone)
            latest = f"({found[-1][0].decode()}"


def _entry_id(entry: Sequence[Any]) -> EventId:
    return parse_event_id(entry[0].decode()) or EventId(0, 0)


def _event(entry: Sequence[Any]) -> FedEvent | None:
    try:
        fields = {name.decode(): value.decode() for name, value in _pairs(entry[1])}
        session_id = fields.pop("session_id")
        return FedEvent(session_id, describe_event(_entry_id(entry), fields))
    except (KeyError, ValueError, OverflowError):
        return None


def _pairs(told: Any) -> Iterable[tuple[bytes, bytes]]:
    # Pairs, or a map, as the client gives entries.
    return told.items() if isinstance(told, dict) else zip(told[::2], told[1::2], strict=True)
