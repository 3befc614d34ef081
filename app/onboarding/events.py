"""The log of a session: what happened, in order, under ids that only rise."""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, NotRequired

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import InvalidRequestError
from app.onboarding.generation import StatusView
from app.onboarding.progress import Progress

EVENT_TYPES = (
    *("session_created", "step_saved", "step_deleted", "metadata_changed", "language_changed"),
    *("progress", "status_changed", "finalized", "reopened", "result_stored", "recovered"),
    "deleted",
)
"""What can happen. Drafts and the high-water mark make no event."""

FEED_TYPES = (*EVENT_TYPES, "expired", "evicted")
"""What can happen to any session; in a session's own log its end is only `deleted`."""

MAX_EVENTS = 1000
"""Most events of one answer, in number; the log keeps at least as many."""


class EventView(TypedDict):
    """One thing that happened; which members it has beside the first three depends on `type`."""

    id: str
    type: str
    at: str
    step_id: NotRequired[int]
    version: NotRequired[int]
    revision: NotRequired[int]
    language: NotRequired[str]
    status: NotRequired[str]
    error_message: NotRequired[str]
    stage: NotRequired[str]
    progress: NotRequired[int]
    message: NotRequired[str | None]
    event_id: NotRequired[str]
    size: NotRequired[int]
    checksum: NotRequired[str]
    content_type: NotRequired[str]
    filename: NotRequired[str]
    kept: NotRequired[int]
    lost: NotRequired[int]


class EventList(TypedDict):
    """A part of the log. `next` is the id to go on after, null at the end of the log.

    `gap` says that events between the id that was asked for and the first one here are gone.
    """

    session_id: str
    events: list[EventView]
    next: str | None
    gap: bool


class Snapshot(StatusView):
    """How a session is at one instant, with which a live stream begins.

    The status of the generation, and in `steps` how far the wizard is. `gap` says that events were
    missed which nobody can give any more.
    """

    type: Literal["snapshot"]
    language: str
    finalized_at: str | None
    revision: int
    steps: Progress
    gap: bool


class EventId(NamedTuple):
    """The id of an event: when it was written by the store's clock, and a count within the ms."""

    ms: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.sequence}"


class Extent(NamedTuple):
    """What a log reaches over: its ends, and whether its beginning is still there.

    Both ids are None for a log without events.
    """

    first: EventId | None
    newest: EventId | None
    whole: bool


BEFORE_ALL = EventId(0, 0)
"""Lower than the id of every event."""


def parse_event_id(text: str) -> EventId | None:
    """Read an id, `<ms>-<sequence>` or `<ms>`; None when it is none."""
    found = _EVENT_ID.fullmatch(text)
    if not found:
        return None
    return EventId(int(found[1]), int(found[2] or 0))


def parse_after(text: str | None) -> EventId:
    """Read the id to go on after; without one, that is before all. Raises `InvalidRequestError`."""
    place = BEFORE_ALL if text is None else parse_event_id(text)
    if place is None:
        raise InvalidRequestError("after is the id of an event, such as 1767268800000-0")
    return place


def is_gap(after: EventId, extent: Extent) -> bool:
    """Say whether events after an id may be missing from a log.

    Ids that the log has not reached count as missed too: they come from another log.
    """
    if extent.first is None or extent.newest is None:
        return after > BEFORE_ALL
    return after > extent.newest or (after < extent.first and not extent.whole)


def describe_event(event_id: EventId, fields: Mapping[str, str]) -> EventView:
    """Describe an event from what is stored of it. Raises `ValueError`, `KeyError` for damage."""
    described: dict[str, object] = {
        "id": str(event_id),
        "type": fields["type"],
        "at": rfc3339(int(fields["at"])),
    }
    if fields["type"] == "progress":
        described["message"] = None
    for name, value in fields.items():
        if name not in {"type", "at"}:
            described[name] = int(value) if name in _NUMBERS else value
    return described  # type: ignore[return-value] # the fields that our scripts write


# 19 digits fit into 64 bits, and time in milliseconds takes 13.
_EVENT_ID = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?")
_NUMBERS = frozenset({"step_id", "version", "revision", "progress", "size", "kept", "lost"})
