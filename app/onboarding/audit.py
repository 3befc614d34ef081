"""The record of who did what, and who was kept from what: never content, only names."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple, NotRequired

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.onboarding.events import EventId

MAX_AUDITED = 1000
"""Most events of one answer, in number."""

USUAL_AUDITED = 100
"""How many events an answer has where nobody says, at most."""


class Lane(StrEnum):
    """What is kept apart, so that no flood of the one pushes out another."""

    OPERATED = "operated"
    """What operators did."""

    DONE = "done"
    """What was done with one session."""

    REFUSED = "refused"
    """What somebody was kept from."""


class AuditEvent(NamedTuple):
    """Something that was done, or refused; `at_ms` in Unix milliseconds.

    `who` is a principal as it writes itself (`user:ada`), `outcome` says how it ended: `done`, the
    code of a problem, or `interrupted`.
    """

    at_ms: int
    who: str
    action: str
    session_id: str | None
    outcome: str
    lane: Lane


class AuditView(TypedDict):
    """An event of the record; `session_id` stands where a session was named."""

    id: str
    at: str
    who: str
    action: str
    session_id: NotRequired[str]
    outcome: str


class AuditList(TypedDict):
    """A part of the record. `next` is the id to go on after, null at the end."""

    events: list[AuditView]
    next: str | None


def describe_audited(event_id: EventId, fields: Mapping[str, str]) -> AuditView:
    """Describe an event from what is stored of it. Raises `ValueError`, `KeyError` for damage."""
    view = AuditView(
        id=str(event_id),
        at=rfc3339(int(fields["at"])),
        who=fields["who"],
        action=fields["action"],
        outcome=fields["outcome"],
    )
    if "session_id" in fields:
        view["session_id"] = fields["session_id"]
    return view
