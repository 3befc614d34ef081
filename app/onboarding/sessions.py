"""The session: who it belongs to, what state it is in, what it looks like from outside."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from app.clock import rfc3339, rfc3339_each
from app.errors import Fault, InvalidRequestError
from app.onboarding.catalogue import Catalogue
from app.onboarding.documents import Document
from app.onboarding.progress import Progress, describe_progress

MAX_OWNER_LENGTH = 128
"""Longest workspace_id and user_id, in characters."""


RESERVED_SESSION_IDS = frozenset({"short", "task", "token"})
"""What no session is called: `onboarding:task:metadata` would be its key and that of a task."""


class SessionStatus(StrEnum):
    """What the generator makes of the session."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETE = "complete"
    ERROR = "error"


class SessionView(TypedDict):
    """A session as clients see it."""

    session_id: str
    workspace_id: str | None
    user_id: str | None
    language: str
    status: str
    progress: Progress
    metadata: dict[str, Any]
    created_at: str
    expires_at: str
    finalized_at: str | None
    revision: int


class NewSessionView(SessionView):
    """A session as it is told to who began it.

    `session_token` opens it: it is there with access control on, and told only here.
    """

    session_token: NotRequired[str]


class ProgressView(TypedDict):
    """The answer to a look at the progress."""

    session_id: str
    status: str
    progress: Progress
    finalized_at: str | None
    revision: int
    expires_at: str


class SummaryMetadata(TypedDict):
    """Who a session belongs to; `custom` is what the caller attached."""

    user_id: str | None
    workspace_id: str | None
    language: str
    started_at: str
    custom: dict[str, Any]


class SummaryStats(TypedDict):
    """A session in numbers; the last two are the questions asked, and how long the answers took."""

    completed_steps: int
    total_steps: int
    completion_percentage: float
    session_age_seconds: int
    last_updated: str
    request_count: int
    total_processing_ms: int


class StepSummary(TypedDict):
    """One line of a summary; only a saved step has `saved_at` and `version`."""

    step_id: int
    key: str
    title: str
    required: bool
    saved_at: NotRequired[str]
    version: NotRequired[int]
    has_draft: bool


class SummaryView(TypedDict):
    """A session at a glance, without its answers."""

    session_id: str
    status: str
    language: str
    finalized_at: str | None
    revision: int
    progress: Progress
    metadata: SummaryMetadata
    stats: SummaryStats
    steps: list[StepSummary]


class Summary(Document):
    """A session at a glance: a mapping like `SummaryView`."""

    __slots__ = ()


class DeletedSession(TypedDict):
    """What deleting a session came to."""

    success: Literal[True]
    session_id: str
    message: str
    deleted_at: str


@dataclass(slots=True)
class Owner:
    """What a session is made with. `custom` is the object that the caller attached.

    Nobody changes one, as with `State`.
    """

    workspace_id: str | None
    user_id: str | None
    language: str
    custom: bytes = b"{}"


@dataclass(slots=True)
class State:
    """What one read of a session's progress tells; times in Unix milliseconds.

    Nobody changes one. To have that checked, frozen, takes 1 us for each that is made.
    """

    status: str
    saved: str
    highest: int
    created_ms: int
    updated_ms: int
    deadline_ms: int
    finalized_ms: int | None
    revision: int
    run_revision: int = 0

    @property
    def progress(self) -> Progress:
        """How far the session is."""
        return describe_progress(self.saved, self.highest, self.created_ms, self.updated_ms)


@dataclass(frozen=True, slots=True)
class SessionChanges:
    """What is to change of a session: fields of `Owner` by name (None removes one), the status.

    `error_message` belongs to the status `error`.
    """

    owner: Mapping[str, str | bytes | None] = field(default_factory=dict)
    status: SessionStatus | None = None
    error_message: str = ""


@dataclass(slots=True)
class Session:
    """A session read whole, its answers aside. Nobody changes one, as with `State`.

    `versions`, as they are written, and `saved_ms` (Unix milliseconds) are those of the saved steps
    in their order. `changes` counts what was changed since the session was made; two equal counts
    are two equal sessions. The export of one that was recovered may be lost, which is no damage any
    more. So far, `request_count` questions were answered, which took `total_processing_ms` in all.
    """

    session_id: str
    owner: Owner
    state: State
    pin: str
    changes: int
    versions: Sequence[str]
    saved_ms: Sequence[int]
    is_export_lost: bool = False
    request_count: int = 0
    total_processing_ms: int = 0


def view_session(session_id: str, owner: Owner, state: State) -> SessionView:
    """Describe a session to a client."""
    return SessionView(
        session_id=session_id,
        workspace_id=owner.workspace_id,
        user_id=owner.user_id,
        language=owner.language,
        status=state.status,
        progress=state.progress,
        metadata=Document(owner.custom).value,
        created_at=rfc3339(state.created_ms),
        expires_at=rfc3339(state.deadline_ms),
        finalized_at=_time(state.finalized_ms),
        revision=state.revision,
    )


def view_progress(session_id: str, state: State) -> ProgressView:
    """Describe how far a session is to a client."""
    return {
        "session_id": session_id,
        "status": state.status,
        "progress": state.progress,
        "finalized_at": _time(state.finalized_ms),
        "revision": state.revision,
        "expires_at": rfc3339(state.deadline_ms),
    }


def view_summary(
    session: Session, catalogue: Catalogue, drafts: frozenset[int], now_ms: int
) -> Summary:
    """Describe a session at a glance; `drafts` are the numbers of the steps that have one.

    It is put together as text: what a catalogue says of its steps is the same for all sessions, and
    23 objects to be encoded take three times as long.
    """
    owner, state, progress = session.owner, session.state, session.state.progress
    return Summary(
        orjson.dumps(
            {
                "session_id": session.session_id,
                "status": state.status,
                "language": owner.language,
                "finalized_at": _time(state.finalized_ms),
                "revision": state.revision,
                "progress": progress,
                "metadata": {
                    "user_id": owner.user_id,
                    "workspace_id": owner.workspace_id,
                    "language": owner.language,
                    "started_at": progress["started_at"],
                    "custom": orjson.Fragment(owner.custom),
                },
                "stats": {
                    "completed_steps": progress["completed"],
                    "total_steps": progress["total"],
                    "completion_percentage": progress["percentage"],
                    "session_age_seconds": max(0, (now_ms - state.created_ms) // 1000),
                    "last_updated": progress["last_updated"],
                    "request_count": session.request_count,
                    "total_processing_ms": session.total_processing_ms,
                },
                "steps": orjson.Fragment(_summarize_steps(session, catalogue, drafts)),
            }
        )
    )


def describe_owner(owner: Owner, created_ms: int) -> SummaryMetadata:
    """Describe who a session belongs to."""
    return SummaryMetadata(
        user_id=owner.user_id,
        workspace_id=owner.workspace_id,
        language=owner.language,
        started_at=rfc3339(created_ms),
        custom=Document(owner.custom).value,
    )


def is_public_id(session_id: str) -> bool:
    """Say whether this can be the id of a session over HTTP: a canonical lower-case UUID4."""
    return _UUID4.fullmatch(session_id) is not None


def check_session_id(session_id: str) -> None:
    """Raise `InvalidRequestError` unless the id may stand in a key: `[A-Za-z0-9._-]`, not empty.

    Neither may it be a word with which the names of other keys go on.
    """
    if not _KEY_SAFE.fullmatch(session_id):
        raise InvalidRequestError("A session_id is made of the characters A-Z a-z 0-9 . _ -")
    if session_id in RESERVED_SESSION_IDS:
        words = ", ".join(sorted(RESERVED_SESSION_IDS))
        raise InvalidRequestError(f"This session_id is reserved, as are all of {words}")


def is_session_id(session_id: str) -> bool:
    """Say whether a session may be called this."""
    return bool(_KEY_SAFE.fullmatch(session_id)) and session_id not in RESERVED_SESSION_IDS


def check_owner(
    workspace_id: str | None, user_id: str | None, language: str, *, workspace_required: bool
) -> None:
    """Raise `InvalidRequestError`, naming every field at fault."""
    faults = []
    if workspace_id is None and workspace_required:
        faults.append(Fault(pointer="/workspace_id", code="required", detail="This is required"))
    for name, value in (("workspace_id", workspace_id), ("user_id", user_id)):
        if value is not None and not is_own_string(value, MAX_OWNER_LENGTH):
            detail = f"1 to {MAX_OWNER_LENGTH} characters, none of them a control character"
            faults.append(Fault(pointer=f"/{name}", code="string", detail=detail))
    faults += _language_faults(language)
    if faults:
        names = ", ".join(fault["pointer"][1:] for fault in faults)
        raise InvalidRequestError(f"Not acceptable: {names}", faults)


def check_language(language: str) -> None:
    """Raise `InvalidRequestError` unless this is a language tag."""
    faults = _language_faults(language)
    if faults:
        raise InvalidRequestError("Not acceptable: language", faults)


def parse_status(status: str) -> SessionStatus:
    """Read a status. Raises `InvalidRequestError`."""
    try:
        return SessionStatus(status)
    except ValueError:
        names = ", ".join(SessionStatus)
        fault = Fault(pointer="/status", code="enum", detail=f"One of {names}")
        raise InvalidRequestError(f"status is one of {names}", [fault]) from None


def parse_changes(updates: Mapping[str, Any]) -> SessionChanges:
    """Read what is to change of a session from its fields by name.

    Raises `InvalidRequestError` for a field that cannot be changed, or not to this.
    """
    unknown = sorted(updates.keys() - set(_CHANGEABLE))
    if unknown:
        known = ", ".join(_CHANGEABLE)
        faults = [
            Fault(pointer=f"/{name}", code="unknown_field", detail=f"One of {known}")
            for name in unknown
        ]
        raise InvalidRequestError(f"These cannot be changed: {', '.join(unknown)}", faults)
    if not updates:
        raise InvalidRequestError(f"Change at least one of {', '.join(_CHANGEABLE)}")
    texts = {name: value for name, value in updates.items() if name not in _OBJECTS}
    for name, value in texts.items():
        if not isinstance(value, str) and (value is not None or name not in _REMOVABLE):
            fault = Fault(pointer=f"/{name}", code="string_type", detail="A string")
            raise InvalidRequestError(f"Not acceptable: {name}", [fault])
    check_owner(
        texts.get("workspace_id"),
        texts.get("user_id"),
        texts.get("language", "en"),
        workspace_required=False,
    )
    status = parse_status(texts["status"]) if "status" in texts else None
    message = texts.get("error_message") or ""
    if message and (status is not SessionStatus.ERROR or not is_own_string(message, 2000)):
        fault = Fault(
            pointer="/error_message",
            code="string",
            detail="1 to 2000 characters without control characters, with the status error",
        )
        raise InvalidRequestError("Not acceptable: error_message", [fault])
    owner: dict[str, str | bytes | None] = {
        name: texts[name] for name in ("workspace_id", "user_id", "language") if name in texts
    }
    if "metadata" in updates:
        if not isinstance(updates["metadata"], Mapping):
            fault = Fault(pointer="/metadata", code="dict_type", detail="An object")
            raise InvalidRequestError("Not acceptable: metadata", [fault])
        owner["custom"] = Document.of(updates["metadata"]).text
    return SessionChanges(owner, status, message)


def plan_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> SessionChanges | None:
    """Say what was changed of a session's description; None when nothing was.

    Raises `InvalidRequestError` for a member that cannot be changed.
    """
    changed = {
        name: after.get(name)
        for name in sorted(before.keys() | after.keys())
        if name not in before or name not in after or not _is_same(before[name], after[name])
    }
    return parse_changes(changed) if changed else None


def _is_same(one: object, other: object) -> bool:
    # As JSON: to Python, 1 and 1.0 and True are equal.
    with suppress(TypeError):
        return orjson.dumps(one, option=_SORTED) == orjson.dumps(other, option=_SORTED)
    return False


def is_own_string(text: str, longest: int) -> bool:
    """Say whether text may stand in a field of ours: not empty, no control characters."""
    return 1 <= len(text) <= longest and not _CONTROL.search(text) and _is_unicode(text)


def is_language_tag(tag: str) -> bool:
    """Say whether a tag is well-formed (RFC 5646 2.1) and at most 35 long (RFC 5646 4.4.1)."""
    if tag.lower() in _IRREGULAR_TAGS:
        return True
    return len(tag) <= _LONGEST_TAG and _LANGUAGE_TAG.fullmatch(tag) is not None


def _language_faults(language: str) -> list[Fault]:
    if is_language_tag(language):
        return []
    detail = "A language tag as in BCP 47, such as en or pt-BR"
    return [Fault(pointer="/language", code="language_tag", detail=detail)]


def _summarize_steps(session: Session, catalogue: Catalogue, drafts: frozenset[int]) -> str:
    """Write the list of `StepSummary` as JSON."""
    parts = [*_frame_steps(catalogue, session.state.saved, drafts)]
    # Marks beyond the catalogue, which a damaged session may have, are not shown.
    shown = len(parts) // 4
    parts[1::4] = session.versions[:shown]
    parts[3::4] = rfc3339_each(session.saved_ms[:shown])
    return "".join(parts)


@lru_cache(maxsize=1024)
def _frame_steps(catalogue: Catalogue, saved: str, drafts: frozenset[int]) -> list[str]:
    """Write what sessions with the same marks, as most have, share of the list of `StepSummary`.

    In parts, with a "" for each version and for each time at which a step was saved:
    `[{..."version":`, ``, `,"saved_at":"`, ``, `"},{..."version":`, ``, ... `"},{...}]`.
    """
    parts = []
    text = "["
    for step_id, line in enumerate(catalogue.summary_lines, start=1):
        text += line + ("true" if step_id in drafts else "false")
        if saved[step_id - 1 : step_id] == "1":
            parts += [text + ',"version":', "", ',"saved_at":"', ""]
            text = '"'
        text += "},"
    return [*parts, text[:-1] + "]"]


def _time(at_ms: int | None) -> str | None:
    return None if at_ms is None else rfc3339(at_ms)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


_SORTED = orjson.OPT_SORT_KEYS
_CHANGEABLE = ("status", "error_message", "language", "metadata", "user_id", "workspace_id")
_OBJECTS = frozenset({"metadata"})
_REMOVABLE = frozenset({"user_id", "workspace_id", "error_message"})

_UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_KEY_SAFE = re.compile(r"[A-Za-z0-9._-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Registered before the syntax was as it is (RFC 5646 section 2.1, grandfathered, irregular).
_IRREGULAR_TAGS = frozenset(
    {
        *("en-gb-oed", "i-ami", "i-bnn", "i-default", "i-enochian", "i-hak", "i-klingon", "i-lux"),
        *("i-mingo", "i-navajo", "i-pwn", "i-tao", "i-tay", "i-tsu"),
        *("sgn-be-fr", "sgn-be-nl", "sgn-ch-de"),
    }
)
_LONGEST_TAG = 35
_LANGUAGE_TAG = re.compile(
    r"""
    (?: [a-z]{2,3} (?: -[a-z]{3} ){0,3} | [a-z]{4} | [a-z]{5,8} )  # language, extended language
    (?: -[a-z]{4} )?                                               # script
    (?: -(?: [a-z]{2} | [0-9]{3} ) )?                              # region
    (?: -(?: [a-z0-9]{5,8} | [0-9][a-z0-9]{3} ) )*                 # variants
    (?: -[0-9a-wy-z] (?: -[a-z0-9]{2,8} )+ )*                      # extensions
    (?: -x (?: -[a-z0-9]{1,8} )+ )?                                # private use
    | x (?: -[a-z0-9]{1,8} )+
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
