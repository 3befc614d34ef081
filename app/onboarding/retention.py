"""How long sessions are kept, how many there may be, and what may end one before its lifetime."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from app.errors import Fault, InvalidRequestError
from app.onboarding.sessions import SessionStatus

HOUR_MS = 3_600_000

MAX_AT_ONCE = 1000
"""How many sessions one clean-up removes, or one bulk change takes, at most."""

STUCK_MS = 30 * 60_000
"""How long a session is `processing` without a write before it counts as stuck: 30 minutes."""

LONGEST_AGE_HOURS = 24 * 365 * 100
"""Largest age that a rule or a filter may name: a hundred years."""

MOST_SESSIONS = 1_000_000_000
"""Largest limit that may be set."""

SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 0.1, 365 * 86_400
"""Between which bounds the pause between two sweeps may be set, in seconds."""

CapacityPolicy: TypeAlias = Literal["refuse", "evict_oldest"]


class Capacity(NamedTuple):
    """How many sessions there may be (0 = any number), and what becomes of one too many.

    A limit that operators have set outweighs this one.
    """

    limit: int
    policy: CapacityPolicy


NO_LIMIT = Capacity(0, "refuse")


class Since(StrEnum):
    """From when the age of a session is counted.

    `ENDED` is when its generation became complete or error, `ACTIVITY` the last accepted write.
    """

    CREATED = "created"
    ENDED = "ended"
    ACTIVITY = "activity"


class ExpiryRule(BaseModel):
    """Sessions that end before their lifetime does: those of a status, or all, from an age on.

    Whatever it says, a session with answers that were never exported stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: SessionStatus | None = None
    older_than_hours: float = Field(ge=0, le=LONGEST_AGE_HOURS, strict=True)
    since: Since = Since.CREATED

    @property
    def statuses(self) -> tuple[SessionStatus, ...]:
        """The statuses that it is about."""
        return tuple(SessionStatus) if self.status is None else (self.status,)


class SessionFacts(NamedTuple):
    """What is known of a session without looking at it; times in Unix milliseconds.

    `is_held` tells that it has answers that were never exported.
    """

    session_id: str
    status: SessionStatus
    is_held: bool
    created_ms: int
    ended_ms: int | None
    activity_ms: int

    def moment_ms(self, since: Since) -> int | None:
        """Say from when its age is counted; None for one that has not come so far."""
        match since:
            case Since.CREATED:
                return self.created_ms
            case Since.ENDED:
                return self.ended_ms
            case Since.ACTIVITY:
                return self.activity_ms


class DeleteReason(StrEnum):
    """Why a session goes."""

    REQUEST = "request"
    CLEANUP = "cleanup"
    UNREADABLE = "unreadable"
    RULE = "rule"
    LIFETIME = "lifetime"
    CAPACITY = "capacity"
    ERASURE = "erasure"

    @property
    def event(self) -> str:
        """The type of the event in the feed."""
        match self:
            case DeleteReason.RULE | DeleteReason.LIFETIME:
                return "expired"
            case DeleteReason.CAPACITY:
                return "evicted"
            case _:
                return "deleted"


@dataclass(frozen=True, slots=True)
class Terms:
    """What must still be so when a session is removed.

    Its status is one of `statuses` (none = any), the moment `since` is `before_ms` (Unix ms) at the
    latest, with `spares_held` it has no answers that were never exported, and with `user_id` it is
    that user's, by its own word: what cannot be read names nobody else.
    """

    statuses: Sequence[SessionStatus] = ()
    since: Since | None = None
    before_ms: int = 0
    spares_held: bool = False
    user_id: str | None = None


def plan_expiry(
    rules: Iterable[ExpiryRule], sessions: Iterable[SessionFacts], now_ms: int
) -> dict[str, ExpiryRule]:
    """Choose the sessions whose time is over, each with the first rule that says so.

    Never one that holds answers which were never exported.
    """
    due: dict[str, ExpiryRule] = {}
    rules = list(rules)
    for session in sessions:
        if session.is_held:
            continue
        for rule in rules:
            moment_ms = session.moment_ms(rule.since)
            if session.status not in rule.statuses or moment_ms is None:
                continue
            if moment_ms <= terms_of(rule, now_ms).before_ms:
                due[session.session_id] = rule
                break
    return due


def terms_of(rule: ExpiryRule, now_ms: int) -> Terms:
    """Say what must hold of a session for a rule to end it."""
    before_ms = int(now_ms - rule.older_than_hours * HOUR_MS)
    statuses = () if rule.status is None else (rule.status,)
    return Terms(statuses, rule.since, before_ms, spares_held=True)


def parse_expiry_rules(text: str) -> tuple[ExpiryRule, ...]:
    """Read rules from JSON. Raises `ValueError` saying what would be right."""
    try:
        return _RULES.validate_python(orjson.loads(text))
    except ValidationError as unfit:
        first = unfit.errors(include_url=False, include_input=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise ValueError(f"{_RULES_FORM} (at /{where}: {first['msg']})") from None
    except orjson.JSONDecodeError:
        raise ValueError(_RULES_FORM) from None


# --- What operators ask for -----------------------------------------------------------------------


class CleanupView(TypedDict):
    """What a clean-up removed, or would remove; `more` when there are more than it took."""

    removed: int
    session_ids: list[str]
    more: bool


class BulkFailure(TypedDict):
    """A session that could not be changed, and why."""

    session_id: str
    code: str


class BulkView(TypedDict):
    """What became of a change to several sessions."""

    updated: int
    failed: list[BulkFailure]


class ErasureView(TypedDict):
    """What was removed of a user; `more` when there is more than one call takes."""

    user_id: str
    removed: int
    tasks_removed: int
    more: bool


class ConfigView(TypedDict):
    """What all processes share."""

    max_sessions: int
    cleanup_interval_s: float


def plan_cleanup(
    status: SessionStatus | None, older_than_hours: float | None, now_ms: int, *, everything: bool
) -> Terms:
    """Say which sessions a clean-up is about; ages are counted from when they were made.

    Raises `InvalidRequestError` when it does not say which.
    """
    if status is None and older_than_hours is None and not everything:
        raise InvalidRequestError('Say which: a status, older_than_hours, or {"all": true}')
    if older_than_hours is not None and not 0 <= older_than_hours <= LONGEST_AGE_HOURS:
        raise InvalidRequestError(f"older_than_hours is 0 to {LONGEST_AGE_HOURS}")
    return Terms(
        () if status is None else (status,),
        None if older_than_hours is None else Since.CREATED,
        0 if older_than_hours is None else int(now_ms - older_than_hours * HOUR_MS),
    )


def check_config(changes: Mapping[str, Any]) -> dict[str, int | float | None]:
    """Check what operators set for all processes. Raises `InvalidRequestError`."""
    try:
        return _Config.model_validate(changes).model_dump(exclude_unset=True)
    except ValidationError as unfit:
        faults = [
            Fault(
                pointer=f"/{'/'.join(map(str, each['loc']))}", code=each["type"], detail=each["msg"]
            )
            for each in unfit.errors(include_url=False, include_input=False)
        ]
    names = ", ".join(sorted({fault["pointer"][1:] for fault in faults}))
    raise InvalidRequestError(f"Not acceptable: {names}", faults)


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    max_sessions: int | None = Field(None, ge=0, le=MOST_SESSIONS)
    cleanup_interval_s: float | None = Field(
        None, ge=SHORTEST_INTERVAL_S, le=LONGEST_INTERVAL_S, allow_inf_nan=False
    )


_RULES: TypeAdapter[tuple[ExpiryRule, ...]] = TypeAdapter(tuple[ExpiryRule, ...])
_RULES_FORM = (
    'a JSON list of rules such as {"status": "error", "older_than_hours": 1, "since": "ended"}'
)
