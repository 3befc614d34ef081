"""Tasks that belong to a short: what workers say of their work, and who may ask about it."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import structlog

from app.clock import now_ms, rfc3339
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    StoreError,
    TaskExistsError,
    TaskNotFoundError,
)
from app.onboarding.cursors import check_limit, parse_cursor, write_cursor
from app.onboarding.tasks import (
    MAX_TASKS,
    MAY_FOLLOW,
    Rules,
    ShortTasks,
    Task,
    TaskList,
    TaskStatus,
    TaskView,
    check_new_task,
    check_short_id,
    check_task_change,
    check_task_filter,
    check_task_id,
    is_kept_until_released,
    is_tracked,
    parse_task_status,
    stays,
    view_task,
)
from app.settings import load_settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.tasks import Scope, TaskStore, new_operation

__all__ = ["TaskService", "TaskStatus", "get_task_service", "new_task_id"]

log = structlog.get_logger()

DAY_MS = 86_400_000

CLEANED_AT_ONCE = 500
"""Most tasks that the clean-up looks at in one round trip."""


class TaskService:
    """Tracks tasks, by the rules of their types.

    `create_task`, `complete_task`, `fail_task` and `cancel_task` are for the worker that does the
    task: when the store cannot do its part they log that and go on, because the work matters more
    than what is told of it. Every other method raises a `StoreError` then. All raise
    `InvalidRequestError` for what can be no task; what else they raise, they say.
    """

    def __init__(self, gateway: Gateway | None = None, rules: Rules | None = None) -> None:
        """Take the way to the store and the rules; by default those of the environment.

        Raises `SettingsError` and `EmbeddedStoreError` then, as `get_onboarding_session_manager`.
        """
        if gateway is None or rules is None:
            settings = load_settings()
            gateway = connect(settings) if gateway is None else gateway
            rules = settings.task_rules if rules is None else rules
        self._gateway = gateway
        self._rules = rules
        self._tasks = TaskStore(gateway)

    async def create_task(
        self,
        task_type: str,
        short_id: str | None = None,
        *,
        user_id: str | None = None,
        task_id: str | None = None,
        session_id: str | None = None,
    ) -> str:
        """Say that a task has begun, and return its id, made when none is given.

        A worker that begins again finds its task there, which is logged and no error.
        """
        task_id = new_task_id() if task_id is None else task_id
        try:
            await self.create_session(
                task_type,
                short_id=short_id,
                user_id=user_id,
                task_id=task_id,
                session_id=session_id,
            )
        except (StoreError, TaskExistsError) as failure:
            log.warning("task_not_tracked", task_id=task_id, code=failure.code)
        return task_id

    async def complete_task(self, task_id: str) -> TaskView | None:
        """Say that a task is done; None when it was not tracked, or the store is away.

        Raises `InvalidTransitionError` when it has ended otherwise.
        """
        return await self._end(task_id, TaskStatus.COMPLETED)

    async def fail_task(self, task_id: str) -> TaskView | None:
        """Say that a task has failed. Returns and raises as `complete_task` does."""
        return await self._end(task_id, TaskStatus.FAILED)

    async def cancel_task(self, task_id: str) -> TaskView | None:
        """Say that a task was cancelled. Returns and raises as `complete_task` does."""
        return await self._end(task_id, TaskStatus.CANCELLED)

    async def create_session(
        self,
        task_type: str,
        *,
        short_id: str | None = None,
        user_id: str | None = None,
        task_id: str | None = None,
        session_id: str | None = None,
    ) -> TaskView | None:
        """Track a task; None when its rule says that nothing is kept, or it has no short.

        `session_id` is the onboarding session that it belongs to. Raises `TaskExistsError`.
        """
        check_new_task(
            self._rules,
            task_type,
            short_id=short_id,
            user_id=user_id,
            task_id=task_id,
            session_id=session_id,
        )
        if short_id is None or not is_tracked(self._rules, task_type, short_id):
            return None
        at_ms = now_ms()
        task = Task(
            task_id=new_task_id() if task_id is None else task_id,
            short_id=short_id,
            task_type=task_type,
            user_id=user_id,
            session_id=session_id,
            status=TaskStatus.ACTIVE,
            created_ms=at_ms,
            updated_ms=at_ms,
            operation=new_operation(),
        )
        await self._tasks.create(task)
        log.info("task_created", **_about(task))
        return view_task(task)

    async def update_session_status(self, task_id: str, status: TaskStatus | str) -> TaskView:
        """Set the status of a task, and say how it is then.

        The current status again begins the task's life anew. An end removes the task, unless its
        rule says that it is kept until it is released. Raises `TaskNotFoundError`,
        `InvalidTransitionError`.
        """
        check_task_id(task_id)
        wanted = parse_task_status(status)
        task = await self._tasks.get(task_id)
        if task is None:
            raise TaskNotFoundError
        check_task_change(task.status, wanted)
        at_ms = now_ms()
        if stays(self._rules, task.task_type, wanted):
            await self._tasks.change(task, wanted, MAY_FOLLOW[wanted], at_ms=at_ms)
        else:
            await self._tasks.remove(task, to=wanted, may_follow=MAY_FOLLOW[wanted])
        if task.status != wanted:
            log.info("task_ended", **_about(task), status=wanted)
        return view_task(replace(task, status=wanted, updated_ms=at_ms))

    async def remove_session(self, task_id: str) -> bool:
        """Remove a task, whatever its status, one that is damaged too; False when there is none."""
        check_task_id(task_id)
        try:
            task = await self._tasks.get(task_id)
        except CorruptRecordError:
            await self._tasks.drop(task_id)
            removed = True
        else:
            removed = task is not None and await self._remove(task)
        if removed:
            log.info("task_removed", task_id=task_id)
        return removed

    async def get_session(self, task_id: str) -> TaskView | None:
        """Read a task; None when there is none."""
        check_task_id(task_id)
        task = await self._tasks.get(task_id)
        return None if task is None else view_task(task)

    async def get_sessions_by_short_id(
        self,
        short_id: str,
        *,
        user_id: str | None = None,
        task_type: str | None = None,
        status: TaskStatus | str | None = None,
    ) -> list[TaskView]:
        """List the tasks of a short, newest first, the newest 1,000 at most."""
        found = await self.list_short(short_id, user_id=user_id, task_type=task_type, status=status)
        return found["sessions"]

    async def list_short(
        self,
        short_id: str,
        *,
        user_id: str | None = None,
        task_type: str | None = None,
        status: TaskStatus | str | None = None,
    ) -> ShortTasks:
        """List the tasks of a short, newest first, the newest 1,000 at most, and count all.

        One round trip; with a filter, one for each 1,000 tasks of the short.
        """
        check_short_id(short_id)
        check_task_filter(self._rules, user_id=user_id, task_type=task_type)
        wanted = None if status is None else parse_task_status(status)
        is_filtered = not (user_id is None and task_type is None and wanted is None)
        scope = Scope(short_id=short_id)
        page = await self._tasks.list_newest(scope, after=None, limit=MAX_TASKS)
        tasks, total = page.tasks, page.total
        if is_filtered:
            tasks, total = [], 0
            while True:
                for task in page.tasks:
                    if (
                        user_id in (None, task.user_id)
                        and task_type in (None, task.task_type)
                        and wanted in (None, task.status)
                    ):
                        total += 1
                        if total <= MAX_TASKS:
                            tasks.append(task)
                if page.next is None:
                    break
                page = await self._tasks.list_newest(scope, after=page.next, limit=MAX_TASKS)
        return ShortTasks(
            short_id=short_id,
            sessions=[view_task(task) for task in tasks],
            total_sessions=total,
            timestamp=rfc3339(now_ms()),
        )

    async def list_sessions(
        self, *, user_id: str | None = None, limit: int = MAX_TASKS, cursor: str | None = None
    ) -> TaskList:
        """List the tasks of a user, or all, newest first, and count them.

        `cursor` goes on after an earlier answer: what comes or goes meanwhile changes nothing in
        what follows. One round trip, however many there are.
        """
        check_task_filter(self._rules, user_id=user_id)
        check_limit(limit, MAX_TASKS)
        after = None if cursor is None else parse_cursor(cursor)
        page = await self._tasks.list_newest(Scope(user_id=user_id), after=after, limit=limit)
        return TaskList(
            sessions=[view_task(task) for task in page.tasks],
            total_sessions=page.total,
            next_cursor=None if page.next is None else write_cursor(page.next),
            timestamp=rfc3339(now_ms()),
        )

    async def release_scenarios(self, short_id: str) -> int:
        """Remove the tasks of a short that are kept until now, whatever their status; count them.

        One round trip for each of them, and one for each 1,000 tasks of the short.
        """
        check_short_id(short_id)
        removed = 0
        after = None
        while True:
            page = await self._tasks.list_newest(
                Scope(short_id=short_id), after=after, limit=MAX_TASKS
            )
            for task in page.tasks:
                if is_kept_until_released(self._rules, task.task_type):
                    removed += await self._remove(task)
            after = page.next
            if after is None:
                break
        log.info("tasks_released", short_id=short_id, removed=removed)
        return removed

    async def cleanup_old_sessions(self, days: float = 7) -> int:
        """Remove the tasks that ended so many days ago and were never released; count them.

        Those that have expired by themselves, whatever their status, are counted too.
        """
        if not days >= 0:
            raise InvalidRequestError("days is 0 or more")
        removed = passed_over = 0
        while True:
            old = await self._tasks.list_old(
                int(min(days, 10_000) * DAY_MS), skip=passed_over, limit=CLEANED_AT_ONCE
            )
            if old.gone:
                await self._tasks.delist(old.gone)
            ended = [task for task in old.tasks if task.status is not TaskStatus.ACTIVE]
            for task in ended:
                removed += await self._remove(task)
            removed += len(old.gone)
            passed_over += old.looked_at - len(old.gone) - len(ended)
            if old.looked_at < CLEANED_AT_ONCE:
                break
        if removed:
            log.info("tasks_cleaned", removed=removed)
        return removed

    async def list_places(self, user_id: str, *, most: int) -> list[str]:
        """List the places of a user's tasks, for `erase`."""
        return await self._tasks.list_places(user_id, most=most)

    async def erase(self, user_id: str, places: Sequence[str]) -> int:
        """Remove what stands at some places of a user's tasks, whatever its status; count it.

        What cannot be read as a task is removed too. Meant for a few places: all at once.
        """

        async def remove(place: str) -> bool:
            task_id = place.partition(":")[2]
            try:
                task = await self._tasks.get(task_id)
            except CorruptRecordError:
                await self._tasks.drop(task_id)
                return True
            return task is not None and task.user_id == user_id and await self._remove(task)

        removed = sum(await asyncio.gather(*map(remove, places)))
        await self._tasks.delist(places, user_id)
        return removed

    async def aclose(self) -> None:
        """Close the connections of this event loop; the next call opens them again."""
        await self._gateway.aclose()

    async def _end(self, task_id: str, status: TaskStatus) -> TaskView | None:
        try:
            return await self.update_session_status(task_id, status)
        except TaskNotFoundError:
            return None
        except StoreError as failure:
            log.warning("task_not_ended", task_id=task_id, code=failure.code)
            return None

    async def _remove(self, task: Task) -> bool:
        try:
            await self._tasks.remove(task)
        except TaskNotFoundError:
            return False
        return True


def new_task_id() -> str:
    """Make an id for a task: a UUID4."""
    return str(uuid.uuid4())


@cache
def get_task_service() -> TaskService:
    """Return this process's service, made from the environment; it connects when it is first used.

    It finds the store as `get_onboarding_session_manager` does, and raises the same.
    """
    return TaskService()


def _about(task: Task) -> dict[str, str]:
    told = {"task_id": task.task_id, "task_type": task.task_type, "short_id": task.short_id}
    return told if task.session_id is None else {**told, "session_id": task.session_id}
