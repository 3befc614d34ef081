"""The log of a session in the store: a bounded stream that its own scripts write."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from app.errors import SessionNotFoundError
from app.onboarding.events import EventId, EventView, Extent, describe_event, parse_event_id
from app.onboarding.generation import Generation
from app.onboarding.sessions import State
from app.store.faults import corrupt
from app.store.gateway import Gateway, Reply
from app.store.generation import GENERATION_FIELDS, read_generation, read_language
from app.store.sessions import STATE_FIELDS, read_state


class Passage(NamedTuple):
    """A part of a log, in order, and what the log reached over when it was read."""

    events: list[EventView]
    extent: Extent


class Scene(NamedTuple):
    """A session at the instant at which the newest event of its log was that of `extent`."""

    state: State
    generation: Generation
    language: str
    extent: Extent


class EventStore:
    """Reads logs. An unknown session raises `SessionNotFoundError`. Each call is one round trip."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys

    async def list_after(self, session_id: str, after: EventId, most: int | None) -> Passage:
        """Read the events after an id, the first `most` of them (None: all)."""
        reply = await self._read(session_id, after, most, [], [])
        key = self._keys.session(session_id).events
        return Passage([read_event(key, *each) for each in reply.values[5]], _extent(reply))

    async def get_scene(self, session_id: str) -> Scene:
        """Read how a session is."""
        reply = await self._read(session_id, None, 0, _SCENE_FIELDS, ["language"])
        keys = self._keys.session(session_id)
        values, [language], *_ = reply.values
        return Scene(
            read_state(keys.progress, values[: len(STATE_FIELDS)]),
            read_generation(keys.progress, values[len(STATE_FIELDS) :]),
            read_language(keys.metadata, language),
            _extent(reply),
        )

    async def _read(
        self,
        session_id: str,
        after: EventId | None,
        most: int | None,
        progress_fields: Sequence[str],
        metadata_fields: Sequence[str],
    ) -> Reply:
        reply = await self._gateway.evaluate(
            "read_events",
            self._keys.session(session_id)[:3],
            [
                "" if after is None else str(after),
                most or 0,
                len(progress_fields),
                *progress_fields,
                *metadata_fields,
            ],
        )
        if reply.word == "not_found":
            raise SessionNotFoundError
        return reply


def _extent(reply: Reply) -> Extent:
    _, _, first, first_type, newest, _ = reply.values
    # A log whose beginning is there begins with that of the session.
    return Extent(
        parse_event_id(first.decode()),
        parse_event_id(newest.decode()),
        whole=first_type == b"session_created",
    )


def read_event(key: str, event_id: bytes, fields: Sequence[bytes]) -> EventView:
    """Read an entry of a log, which is `key`. Raises `CorruptRecordError`."""
    try:
        texts = [part.decode() for part in fields]
        parsed = parse_event_id(event_id.decode()) or EventId(0, 0)
        return describe_event(parsed, dict(zip(texts[::2], texts[1::2], strict=True)))
    except (KeyError, ValueError, OverflowError):
        raise corrupt(key, "the log") from None


_SCENE_FIELDS: list[Any] = [*STATE_FIELDS, *GENERATION_FIELDS]
