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
    latest, and with `spares_held` it has no answers that were never exported.
    """

    statuses: Sequence[SessionStatus] = ()
    since: Since | None = None
    before_ms: int = 0
    spares_held: bool = False


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


class RecoveryView(TypedDict):
    """What is left of a damaged session, and what is not, by the names of its keys."""

    session_id: str
    status: Literal["error"]
    kept: list[str]
    lost: list[str]


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


# --- What is left of a damaged session ------------------------------------------------------------


class Remains(NamedTuple):
    """What can still be read of a session.

    `progress` and `owner` are the fields that its hashes are to have, `kept` and `lost` the names
    of its keys without its id; those that are lost are to be removed.
    """

    progress: dict[str, str]
    owner: dict[str, str | bytes]
    kept: list[str]
    lost: list[str]


def plan_recovery(found: Mapping[str, Any], *, pin: str, total: int, now_ms: int) -> Remains | None:
    """Judge what was found under the names of a session's keys; None when nothing can be read.

    A string is bytes, a hash a mapping of bytes; anything else is present and of the wrong type.
    `pin` and `total` are those of the catalogue that is assumed where the session does not say.
    """
    hash_of = {name: _strings(found.get(name)) for name in ("progress", "metadata")}
    before, about = hash_of["progress"], hash_of["metadata"]
    pin = before.get("catalogue") or pin
    marks = before.get("saved", "")
    total = len(marks) if marks and not marks.strip("01") else total

    kept: list[str] = []
    lost: list[str] = []
    steps: dict[int, Mapping[str, Any]] = {}
    for number in range(1, total + 1):
        name = f"step:{number}"
        record = _step(found.get(name), number)
        if record is not None:
            steps[number] = record
            kept.append(name)
        elif name in found or marks[number - 1 : number] == "1":
            lost.append(name)
    is_exported = _is_export(found.get("export"))
    for name, is_whole in (
        ("metadata", _is_owner(about)),
        ("progress", _is_progress(before, steps)),
        ("export", is_exported),
        *((each, isinstance(found.get(each), dict)) for each in ("result", "upload")),
        *((each, found.get(each) is STREAM) for each in ("events",)),
    ):
        if is_whole:
            kept.append(name)
        elif name in found or name in ("metadata", "progress"):
            lost.append(name)
    if not kept:
        return None
    revision = _whole(before.get("revision"), 1 if is_exported else 0)
    finalized = before.get("finalized_at", "") if is_exported else ""
    created_ms = _whole(before.get("created_at") or about.get("created_at"), now_ms)
    progress = {
        "status": SessionStatus.ERROR.value,
        "saved": "".join("1" if number in steps else "0" for number in range(1, total + 1)),
        "highest": str(min(total, _whole(before.get("highest"), max(steps, default=0)))),
        "created_at": str(created_ms),
        "finalized_at": finalized if finalized.isdecimal() else "",
        "revision": str(revision),
        "catalogue": pin,
        "held": "0" if finalized.isdecimal() and before.get("held") == "0" else "1",
        "ended_at": str(now_ms),
        "error_message": "The session was damaged, and recovered by an operator",
        "reported_at": str(now_ms),
        # Versions of steps that were deleted go on counting.
        **{name: text for name, text in before.items() if _is_version(name) and text.isdecimal()},
        **{f"v{number}": str(step["version"]) for number, step in steps.items()},
        **{f"s{number}": str(_whole(before.get(f"s{number}"), now_ms)) for number in steps},
    }
    owner: dict[str, str | bytes] = {
        "language": about.get("language") or "en",
        "custom": about.get("custom", "") if _is_object(about.get("custom", "")) else "{}",
        "created_at": str(created_ms),
    }
    owner |= {name: about[name] for name in ("workspace_id", "user_id", "record") if name in about}
    return Remains(progress, owner, kept, lost)


STREAM = object()
"""Stands in what was found for a key that is a stream."""


def _strings(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {
        name.decode(): text.decode()
        for name, text in value.items()
        if _is_utf8(name) and _is_utf8(text)
    }


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except ValueError:
        return False
    return True


def _step(value: object, number: int) -> Mapping[str, Any] | None:
    record = _object(value)
    if record is None or record.get("step_id") != number:
        return None
    version = record.get("version")
    is_whole = isinstance(record.get("data"), dict) and isinstance(version, int) and version > 0
    return record if is_whole else None


def _is_export(value: object) -> bool:
    record = _object(value)
    return record is not None and "checksum" in record and "steps" in record


def _is_object(text: str) -> bool:
    return _object(text.encode()) is not None


def _object(value: object) -> dict[str, Any] | None:
    if not isinstance(value, bytes):
        return None
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _is_owner(about: Mapping[str, str]) -> bool:
    return bool(about.get("language")) and _is_object(about.get("custom", ""))


def _is_progress(before: Mapping[str, str], steps: Mapping[int, object]) -> bool:
    marks = before.get("saved", "")
    saved = {number for number, mark in enumerate(marks, start=1) if mark == "1"}
    numbers = ("highest", "created_at", "updated_at", "deadline", "revision", "changes")
    return (
        before.get("status") in set(SessionStatus)
        and saved == set(steps)
        and all(before.get(name, "").isdecimal() for name in numbers)
        and all(before.get(f"{kind}{number}", "").isdecimal() for kind in "vs" for number in saved)
        and bool(before.get("catalogue"))
    )


def _is_version(name: str) -> bool:
    return name.startswith("v") and name[1:].isdecimal()


def _whole(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default


_RULES: TypeAdapter[tuple[ExpiryRule, ...]] = TypeAdapter(tuple[ExpiryRule, ...])
_RULES_FORM = (
    'a JSON list of rules such as {"status": "error", "older_than_hours": 1, "since": "ended"}'
)
