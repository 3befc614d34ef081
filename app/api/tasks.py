"""Tasks over HTTP: begun, ended, looked at, released."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.errors import TaskNotFoundError
from app.onboarding.access import Access
from app.onboarding.cursors import parse_limit
from app.onboarding.sessions import MAX_OWNER_LENGTH
from app.onboarding.tasks import (
    ID_PATTERN,
    MAX_ID_LENGTH,
    MAX_TASKS,
    ReleasedTasks,
    RemovedTask,
    ShortTasks,
    TaskList,
    TaskStatus,
    TaskView,
    UntrackedTask,
)
from app.services.tasks import new_task_id

_ID = StringConstraints(pattern=ID_PATTERN)
_USER = StringConstraints(min_length=1, max_length=MAX_OWNER_LENGTH)
_SESSION_ID = StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")
_TYPE = StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)


class CreateTask(BaseModel):
    """A task that begins; `session_id` is the onboarding session that it belongs to."""

    model_config = ConfigDict(strict=True, extra="ignore")

    task_type: Annotated[str, _TYPE, Field(examples=["image_analysis", "scenario_generation"])]
    short_id: Annotated[str, _ID] | None = None
    user_id: Annotated[str, _USER] | None = None
    task_id: Annotated[str, _ID] | None = None
    session_id: Annotated[str, _SESSION_ID] | None = None


class SetTaskStatus(BaseModel):
    """A status to set; the current one begins the task's life anew."""

    model_config = ConfigDict(strict=True, extra="ignore")

    status: Literal["active", "completed", "failed", "cancelled"]


async def create_task(call: Call) -> ASGIApp:
    """Track a task, unless nothing is kept of its type or it has no short."""
    wanted = call.parse(CreateTask)
    task_id = new_task_id() if wanted.task_id is None else wanted.task_id
    view = await call.services.tasks.create_session(
        wanted.task_type,
        short_id=wanted.short_id,
        user_id=wanted.user_id,
        task_id=task_id,
        session_id=wanted.session_id,
    )
    if view is None:
        return call.answer(UntrackedTask(tracked=False, task_id=task_id))
    return call.answer(view, 201)


async def get_task(call: Call) -> ASGIApp:
    """Show a task."""
    view = await call.services.tasks.get_session(call.parameters["task_id"])
    if view is None:
        raise TaskNotFoundError
    return call.answer(view)


async def set_task_status(call: Call) -> ASGIApp:
    """Set the status of a task."""
    wanted = call.parse(SetTaskStatus)
    return call.answer(
        await call.services.tasks.update_session_status(call.parameters["task_id"], wanted.status)
    )


async def delete_task(call: Call) -> ASGIApp:
    """Remove a task."""
    task_id = call.parameters["task_id"]
    if not await call.services.tasks.remove_session(task_id):
        raise TaskNotFoundError
    return call.answer(RemovedTask(success=True, task_id=task_id))


async def list_tasks(call: Call) -> ASGIApp:
    """List all tasks, or those of a user."""
    query = call.query
    limit = parse_limit(query.get("limit", str(MAX_TASKS)), MAX_TASKS)
    return call.answer(
        await call.services.tasks.list_sessions(
            user_id=query.get("user_id"), limit=limit, cursor=query.get("cursor")
        )
    )


async def list_short_tasks(call: Call) -> ASGIApp:
    """List the tasks of a short."""
    query = call.query
    return call.answer(
        await call.services.tasks.list_short(
            call.parameters["short_id"],
            user_id=query.get("user_id"),
            task_type=query.get("task_type"),
            status=query.get("status"),
        )
    )


async def release_scenarios(call: Call) -> ASGIApp:
    """Remove the tasks of a short that were kept until now."""
    short_id = call.parameters["short_id"]
    removed = await call.services.tasks.release_scenarios(short_id)
    return call.answer(ReleasedTasks(short_id=short_id, removed=removed))


_BASE = "/api/v1/sessions"
_TASK = _BASE + "/task/{task_id}"
_SHORT = _BASE + "/{short_id}"

_OWNER: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_OWNER_LENGTH}
_BY_USER = ("user_id", _OWNER, "Only tasks of this user")

OPERATIONS = [
    # The fixed paths before the one that is a short's id.
    Operation(
        methods=["POST"],
        path=_BASE + "/task",
        handler=create_task,
        name="create_task",
        access=Access.TASKS,
        summary="Begin a task",
        tag="Tasks",
        body=Body(schema=CreateTask),
        answers=[
            Answer(status=201, description="The task", schema=TaskView),
            Answer(
                description="Nothing is kept: the type is not tracked, or there is no `short_id`",
                schema=UntrackedTask,
            ),
        ],
        errors=["invalid_request", "task_exists", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_TASK,
        handler=get_task,
        name="get_task",
        access=Access.TASKS,
        summary="Show a task",
        tag="Tasks",
        answers=[Answer(description="The task", schema=TaskView)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["PATCH"],
        path=_TASK,
        handler=set_task_status,
        name="set_task_status",
        access=Access.TASKS,
        summary="Say how a task is; one that ends is removed, unless its type is kept",
        tag="Tasks",
        body=Body(schema=SetTaskStatus),
        answers=[Answer(description="The task, as it is now or was last", schema=TaskView)],
        errors=["invalid_request", "invalid_transition", "corrupt_record"],
    ),
    Operation(
        methods=["DELETE"],
        path=_TASK,
        handler=delete_task,
        name="delete_task",
        access=Access.TASKS,
        summary="Remove a task, whatever its status",
        tag="Tasks",
        answers=[Answer(description="It is gone", schema=RemovedTask)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_BASE,
        handler=list_tasks,
        name="list_tasks",
        access=Access.TASKS,
        summary="List tasks, newest first",
        tag="Tasks",
        query=[
            _BY_USER,
            ("limit", {"type": "integer", "minimum": 1, "maximum": MAX_TASKS}, "Most tasks"),
            ("cursor", {"type": "string"}, "Go on after an answer: its `next_cursor`"),
        ],
        answers=[Answer(description="A part of the tasks", schema=TaskList)],
        errors=["invalid_request", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_SHORT,
        handler=list_short_tasks,
        name="list_short_tasks",
        access=Access.TASKS,
        summary="List the tasks of a short, newest first, 1,000 at most",
        tag="Tasks",
        query=[
            _BY_USER,
            ("task_type", {"type": "string"}, "Only tasks of this type"),
            (
                "status",
                {"type": "string", "enum": [*TaskStatus]},
                "Only tasks with this status",
            ),
        ],
        answers=[Answer(description="The tasks", schema=ShortTasks)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["POST"],
        path=_SHORT + "/scenario-saved",
        handler=release_scenarios,
        name="release_scenarios",
        access=Access.TASKS,
        summary="Remove the scenario tasks of a short, whatever their status",
        tag="Tasks",
        answers=[Answer(description="How many there were", schema=ReleasedTasks)],
        errors=["corrupt_record"],
    ),
]
