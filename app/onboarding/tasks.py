"""The tasks that belong to a short: which are tracked, how they end, how long they stay."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import Fault, InvalidRequestError, InvalidTransitionError
from app.onboarding.cursors import place_of
from app.onboarding.sessions import MAX_OWNER_LENGTH, check_session_id, is_own_string

TASK_LIFE_MS = 7 * 86_400_000
"""How long a task is kept after its last change, in milliseconds: 7 days."""

MAX_ID_LENGTH = 128
"""Longest task_id, short_id and name of a task type, in characters."""

MAX_TASKS = 1000
"""Most tasks in one answer."""

ID_PATTERN = f"^[A-Za-z0-9._-]{{1,{MAX_ID_LENGTH}}}$"
"""What a task_id and a short_id look like."""

RESERVED_SHORT_ID = "task"
"""The word that stands in the place of a short_id where a path names a task."""


class TaskStatus(StrEnum):
    """How a task is; all but `active` are ends."""

    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TaskRule:
    """What is kept of the tasks of a type.

    `tracked`: whether anything is. `kept_until_released`: whether a task that has ended stays, with
    its final status, until its short is released; else it goes at its end.
    """

    tracked: bool = True
    kept_until_released: bool = False


Rules = Mapping[str, TaskRule]
"""The rules by task type."""

TASK_RULES: Rules = {
    "image_analysis": TaskRule(),
    "scenario_generation": TaskRule(kept_until_released=True),
    "video_generation": TaskRule(),
    "finalize_short": TaskRule(),
    "save_scenario": TaskRule(),
    "content_analysis": TaskRule(),
    "data_extraction": TaskRule(),
    "bcm_generation": TaskRule(),
    "scraping": TaskRule(tracked=False),
}
"""The packaged task types."""

MAY_FOLLOW: Mapping[TaskStatus, frozenset[TaskStatus]] = {
    status: frozenset({TaskStatus.ACTIVE, status}) for status in TaskStatus
}
"""Each status with those that it may follow: an active task may end, and any status may be said
again, which renews the task's life."""


class TaskView(TypedDict):
    """A task as clients see it."""

    short_id: str
    task_type: str
    task_id: str
    user_id: str | None
    session_id: str | None
    status: str
    created_at: str
    updated_at: str


class UntrackedTask(TypedDict):
    """The answer about a task of which nothing is kept."""

    tracked: Literal[False]
    task_id: str


class RemovedTask(TypedDict):
    """What removing a task came to."""

    success: Literal[True]
    task_id: str


class ShortTasks(TypedDict):
    """The tasks of a short, newest first; `total_sessions` counts those beyond the answer too."""

    short_id: str
    sessions: list[TaskView]
    total_sessions: int
    timestamp: str


class TaskList(TypedDict):
    """A part of the tasks, newest first; `next_cursor` is null at the end."""

    sessions: list[TaskView]
    total_sessions: int
    next_cursor: str | None
    timestamp: str


class ReleasedTasks(TypedDict):
    """What releasing a short came to."""

    short_id: str
    removed: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task; times in Unix milliseconds.

    `operation` tells it from another one that had its id before or has it later.
    """

    task_id: str
    short_id: str
    task_type: str
    user_id: str | None
    session_id: str | None
    status: TaskStatus
    created_ms: int
    updated_ms: int
    operation: str

    @property
    def place(self) -> str:
        """Where it stands among others, by the order of these texts: by when it was made."""
        return place_of(self.created_ms, self.task_id)


def view_task(task: Task) -> TaskView:
    """Describe a task to a client."""
    return TaskView(
        short_id=task.short_id,
        task_type=task.task_type,
        task_id=task.task_id,
        user_id=task.user_id,
        session_id=task.session_id,
        status=task.status.value,
        created_at=rfc3339(task.created_ms),
        updated_at=rfc3339(task.updated_ms),
    )


def is_tracked(rules: Rules, task_type: str, short_id: str | None) -> bool:
    """Say whether a task is kept: it has a short, and its type is tracked."""
    return short_id is not None and rules[task_type].tracked


def is_kept_until_released(rules: Rules, task_type: str) -> bool:
    """Say whether a task of this type stays when it has ended.

    A type that is not known any more has the rule of an ordinary one.
    """
    return rules.get(task_type, TaskRule()).kept_until_released


def stays(rules: Rules, task_type: str, status: TaskStatus) -> bool:
    """Say whether a task is still there once it has got this status."""
    return status is TaskStatus.ACTIVE or is_kept_until_released(rules, task_type)


def check_task_change(current: TaskStatus, wanted: TaskStatus) -> None:
    """Raise `InvalidTransitionError` unless the status may follow the current one."""
    if current not in MAY_FOLLOW[wanted]:
        raise InvalidTransitionError(current, wanted, "task")


def check_new_task(
    rules: Rules,
    task_type: str,
    *,
    short_id: str | None,
    user_id: str | None,
    task_id: str | None,
    session_id: str | None,
) -> None:
    """Raise `InvalidRequestError`, naming every field at fault."""
    faults = []
    if task_type not in rules:
        faults.append(Fault(pointer="/task_type", code="task_type", detail=_known_types(rules)))
    if short_id is not None and not is_short_id(short_id):
        faults.append(Fault(pointer="/short_id", code="short_id", detail=_SHORT_ID))
    if task_id is not None and not is_task_id(task_id):
        faults.append(Fault(pointer="/task_id", code="task_id", detail=_TASK_ID))
    if user_id is not None and not is_own_string(user_id, MAX_OWNER_LENGTH):
        faults.append(Fault(pointer="/user_id", code="string", detail=_USER_ID))
    if session_id is not None:
        try:
            check_session_id(session_id)
        except InvalidRequestError as unfit:
            faults.append(Fault(pointer="/session_id", code="session_id", detail=unfit.detail))
        if len(session_id) > MAX_ID_LENGTH:
            detail = f"At most {MAX_ID_LENGTH} characters"
            faults.append(Fault(pointer="/session_id", code="string_too_long", detail=detail))
    if faults:
        told = "; ".join(f"{fault['pointer'][1:]}: {fault['detail']}" for fault in faults)
        raise InvalidRequestError(f"Not acceptable: {told}", faults)


def check_task_filter(
    rules: Rules, *, user_id: str | None = None, task_type: str | None = None
) -> None:
    """Raise `InvalidRequestError` for what no task can have."""
    if user_id is not None and not is_own_string(user_id, MAX_OWNER_LENGTH):
        raise InvalidRequestError(f"user_id: {_USER_ID}")
    if task_type is not None and task_type not in rules:
        raise InvalidRequestError(f"task_type: {_known_types(rules)}")


def is_task_id(task_id: str) -> bool:
    """Say whether this can be the id of a task."""
    return _ID.fullmatch(task_id) is not None


def check_task_id(task_id: str) -> None:
    """Raise `InvalidRequestError` unless this can be the id of a task."""
    if not is_task_id(task_id):
        raise InvalidRequestError(f"task_id: {_TASK_ID}")


def is_short_id(short_id: str) -> bool:
    """Say whether this can be the id of a short."""
    return _ID.fullmatch(short_id) is not None and short_id != RESERVED_SHORT_ID


def check_short_id(short_id: str) -> None:
    """Raise `InvalidRequestError` unless this can be the id of a short."""
    if not is_short_id(short_id):
        raise InvalidRequestError(f"short_id: {_SHORT_ID}")


def parse_task_status(status: str) -> TaskStatus:
    """Read a status. Raises `InvalidRequestError`, naming those that there are."""
    try:
        return TaskStatus(status)
    except ValueError:
        raise InvalidRequestError(f"status is one of {', '.join(TaskStatus)}") from None


def parse_task_rules(value: object) -> dict[str, TaskRule]:
    """Read rules by task type, as JSON text or as an object.

    Raises `ValueError`, in one line that says what would be right.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"not JSON; {_EXAMPLE}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"an object by task type; {_EXAMPLE}")  # noqa: TRY004 - as settings do
    return {name: _parse_rule(name, rule) for name, rule in value.items()}


def _parse_rule(name: str, rule: Any) -> TaskRule:
    if not _ID.fullmatch(name):
        raise ValueError(f"a task type is 1 to {MAX_ID_LENGTH} of A-Z a-z 0-9 . _ -, not {name!r}")
    if isinstance(rule, TaskRule):
        return rule
    known = {"tracked", "kept_until_released"}
    if (
        not isinstance(rule, Mapping)
        or not rule.keys() <= known
        or not all(isinstance(value, bool) for value in rule.values())
    ):
        raise ValueError(f"the rule of {name} has tracked and kept_until_released, true or false")
    return TaskRule(**rule)


def _known_types(rules: Rules) -> str:
    return f"One of {', '.join(rules)}"


_ID = re.compile(ID_PATTERN.removesuffix("$"))
_TASK_ID = f"1 to {MAX_ID_LENGTH} of A-Z a-z 0-9 . _ -"
_SHORT_ID = f"{_TASK_ID}, and not {RESERVED_SHORT_ID}"
_USER_ID = f"1 to {MAX_OWNER_LENGTH} characters, none of them a control character"
_EXAMPLE = 'such as {"my_type": {"tracked": true, "kept_until_released": false}}'
