"""Tasks in the store: one hash each, and the lists that they stand in.

A task stands in the list of its short, in that of its user if it has one, and in that of all. Where
keys have no hash tags, one script does all of it at once. Where they have, the task lies in another
slot than its lists. Lists are hints there: they are told before a task begins or goes on, and after
it has gone, so that a task always stands in its lists; what a list says of a task that is gone is
skipped and taken off by whoever reads it.
"""

import asyncio
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from app.errors import (
    CorruptRecordError,
    InvalidTransitionError,
    StoreError,
    TaskExistsError,
    TaskNotFoundError,
)
from app.onboarding.tasks import TASK_LIFE_MS, Task, TaskStatus
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway
from app.store.keys import ListKeys

log = structlog.get_logger()

READS_AT_ONCE = 32
"""Most tasks that are read at once where each lies in a slot of its own."""

_FIELDS = (
    *("task_type", "short_id", "user_id", "session_id"),
    *("status", "created_at", "updated_at", "operation"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whose tasks are listed: those of a short, of a user, or all."""

    short_id: str | None = None
    user_id: str | None = None

    def has(self, task: Task) -> bool:
        """Say whether a task belongs here."""
        return self.short_id in (None, task.short_id) and self.user_id in (None, task.user_id)


class TaskPage(NamedTuple):
    """A part of a list, newest first.

    `total` counts the whole list. `next` is the place of its last task, None at the end.
    """

    tasks: list[Task]
    total: int
    next: str | None


class OldTasks(NamedTuple):
    """Those of a list that expire first.

    `gone` are entries whose task is not there any more; `looked_at` counts all entries.
    """

    tasks: list[Task]
    gone: list[str]
    looked_at: int


class TaskStore:
    """Keeps tasks. An id that is handed in is known to be safe in a key."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys

    async def create(self, task: Task) -> None:
        """Keep a new task. Raises `TaskExistsError` when there is one with this id.

        One round trip; five where keys have hash tags.
        """
        if self._keys.hash_tag:
            if await self.get(task.task_id) is not None:
                raise TaskExistsError
            await self._enlist(task)
        fields: list[Argument] = []
        for name, value in _values(task).items():
            if value is not None:
                fields += (name, value)
        lists = self._beside(task)
        reply = await self._gateway.evaluate(
            "create_task",
            [self._keys.task(task.task_id), *_flat(lists)],
            [task.operation, TASK_LIFE_MS, task.place, _expiring(lists), *fields],
        )
        if reply.word == "exists":
            raise TaskExistsError

    async def get(self, task_id: str) -> Task | None:
        """Read a task; None when there is none. One command, two when it is not there."""
        key = self._keys.task(task_id)
        task = self._read(task_id, await self._gateway.command("HMGET", key, *_FIELDS))
        if task is None and await self._gateway.command("EXISTS", key):
            # Made between the two looks, or without any field of a task.
            task = self._read(task_id, await self._gateway.command("HMGET", key, *_FIELDS))
            if task is None:
                raise corrupt(key, "the task")
        return task

    async def change(
        self, task: Task, status: TaskStatus, may_follow: Collection[TaskStatus], *, at_ms: int
    ) -> None:
        """Set the status of a task that was read, and begin its life anew.

        Raises `TaskNotFoundError`, and `InvalidTransitionError` when its status is none of those
        that this one may follow. One round trip; three where keys have hash tags.
        """
        if self._keys.hash_tag:
            await self._enlist(task)
        lists = self._beside(task)
        args: list[Argument] = [task.operation, TASK_LIFE_MS, task.place, _expiring(lists)]
        args += [status, _between_bars(may_follow), at_ms]
        reply = await self._gateway.remove(
            "change_task", [self._keys.task(task.task_id), *_flat(lists)], args
        )
        _check_done(reply.word, reply.values, status)

    async def remove(
        self, task: Task, *, to: TaskStatus | None = None, may_follow: Collection[TaskStatus] = ()
    ) -> None:
        """Remove a task that was read, because it gets the status `to`, or in any status.

        Raises `TaskNotFoundError`, and `InvalidTransitionError` when its status is none of those
        that this one may follow. One round trip; three where keys have hash tags.
        """
        allowed = "" if to is None else _between_bars(may_follow)
        reply = await self._gateway.remove(
            "remove_task",
            [self._keys.task(task.task_id), *_flat(self._beside(task))],
            [task.operation, task.place, allowed],
        )
        _check_done(reply.word, reply.values, to or task.status)
        if self._keys.hash_tag:
            # It is gone. What is left on the lists goes when somebody reads them.
            with suppress(StoreError):
                for lists in self._apart(task):
                    await self._gateway.evaluate("delist_tasks", _flat(lists), [task.place])

    async def drop(self, task_id: str) -> None:
        """Remove what was found and cannot be read as a task.

        Nothing tells whether this call did it: a DEL that is sent again finds nothing either.
        """
        await self._gateway.write("DEL", self._keys.task(task_id))

    async def list_newest(self, scope: Scope, *, after: str | None, limit: int) -> TaskPage:
        """Read a part of a list, from its newest task or `after` a place on.

        A task that cannot be read is left out, with a line in the log. One round trip, and another
        one when the list names tasks that are gone; as many as there are tasks in the answer, and
        one, where keys have hash tags.
        """
        lists = self._of(scope)
        reply = await self._gateway.evaluate(
            "list_tasks", lists, [after or "", limit, self._prefix, *_FIELDS]
        )
        total, more, entries, values = reply.values
        names = [entry.decode() for entry in entries]
        tasks, gone = await self._read_all(names, values, scope)
        if gone:
            # Whoever may not write can read all the same.
            with suppress(StoreError):
                delisted = await self._gateway.evaluate("delist_tasks", lists, gone)
                total -= delisted.values[0]
        return TaskPage(tasks, total, names[-1] if more else None)

    async def list_old(self, unchanged_ms: int, *, skip: int, limit: int) -> OldTasks:
        """Read tasks that were not changed for so long, those that expire first, first.

        `skip` of them are passed over. Expired ones are among those that are gone.
        """
        left_ms = max(0, TASK_LIFE_MS - unchanged_ms)
        reply = await self._gateway.evaluate(
            "list_old_tasks",
            [self._keys.tasks().ends],
            [left_ms, skip, limit, self._prefix, *_FIELDS],
        )
        entries, values = reply.values
        names = [entry.decode() for entry in entries]
        return OldTasks(*await self._read_all(names, values, Scope()), len(names))

    async def list_places(self, user_id: str, *, most: int) -> list[str]:
        """List the places of a user's tasks, the oldest first, whatever has become of them."""
        entries = self._keys.tasks(user_id).entries
        return [
            each.decode() for each in await self._gateway.command("ZRANGE", entries, 0, most - 1)
        ]

    async def delist(self, entries: Sequence[str], user_id: str | None = None) -> None:
        """Take entries off the list of a user, or of all tasks."""
        await self._gateway.evaluate("delist_tasks", self._keys.tasks(user_id), entries)

    @property
    def _prefix(self) -> str:
        return "" if self._keys.hash_tag else self._keys.task_prefix

    def _of(self, scope: Scope) -> ListKeys:
        if scope.short_id is not None:
            return self._keys.short(scope.short_id)
        return self._keys.tasks(scope.user_id)

    def _beside(self, task: Task) -> list[ListKeys]:
        """Name the lists that a script can reach together with the task."""
        return [] if self._keys.hash_tag else [each for slot in self._apart(task) for each in slot]

    def _apart(self, task: Task) -> list[list[ListKeys]]:
        """Name the lists of a task by the slots that they lie in, that of all tasks last."""
        of_user = [] if task.user_id is None else [self._keys.tasks(task.user_id)]
        return [[self._keys.short(task.short_id)], [*of_user, self._keys.tasks()]]

    async def _enlist(self, task: Task) -> None:
        short, index = self._apart(task)
        for lists, expiring in ((short, 1), (index, _expiring(index))):
            await self._gateway.evaluate(
                "enlist_task", _flat(lists), [TASK_LIFE_MS, task.place, expiring]
            )

    async def _read_all(
        self, entries: Sequence[str], values: Sequence[Any], scope: Scope
    ) -> tuple[list[Task], list[str]]:
        """Make tasks of what was read for entries, and name the entries that stand for none."""
        ids = [entry.partition(":")[2] for entry in entries]
        if self._keys.hash_tag:
            values = await self._read_apart(ids)
        tasks: list[Task] = []
        gone: list[str] = []
        for entry, task_id, found in zip(entries, ids, values, strict=True):
            try:
                task = self._read(task_id, found)
            except CorruptRecordError:
                continue
            if task is not None and task.place == entry and scope.has(task):
                tasks.append(task)
            else:
                gone.append(entry)
        return tasks, gone

    async def _read_apart(self, ids: Sequence[str]) -> list[Any]:
        async def read(task_id: str) -> Any:
            try:
                return await self._gateway.command("HMGET", self._keys.task(task_id), *_FIELDS)
            except CorruptRecordError:
                return b"damaged"

        values: list[Any] = []
        for start in range(0, len(ids), READS_AT_ONCE):
            values += await asyncio.gather(*map(read, ids[start : start + READS_AT_ONCE]))
        return values

    def _read(self, task_id: str, values: Any) -> Task | None:
        if isinstance(values, list) and not any(values):
            return None
        try:
            kind, short_id, user_id, session_id, status, created, updated, operation = values
            return Task(
                task_id=task_id,
                short_id=short_id.decode(),
                task_type=kind.decode(),
                user_id=None if user_id is None else user_id.decode(),
                session_id=None if session_id is None else session_id.decode(),
                status=TaskStatus(status.decode()),
                created_ms=int(created),
                updated_ms=int(updated),
                operation=operation.decode(),
            )
        except (AttributeError, TypeError, ValueError):
            raise corrupt(self._keys.task(task_id), "the task") from None


def new_operation() -> str:
    """Draw what tells the making of one task from that of any other."""
    return os.urandom(12).hex()


def _values(task: Task) -> dict[str, str | int | None]:
    return {
        "task_type": task.task_type,
        "short_id": task.short_id,
        "user_id": task.user_id,
        "session_id": task.session_id,
        "status": task.status,
        "created_at": task.created_ms,
        "updated_at": task.updated_ms,
    }


def _flat(lists: Sequence[ListKeys]) -> list[str]:
    return [key for each in lists for key in each]


def _expiring(lists: Sequence[ListKeys]) -> int:
    # All but the last, from which the clean-up counts what has expired.
    return max(0, len(lists) - 1)


def _between_bars(statuses: Collection[TaskStatus]) -> str:
    return f"|{'|'.join(statuses)}|"


def _check_done(word: str, values: Sequence[bytes], status: TaskStatus) -> None:
    if word == "not_found":
        raise TaskNotFoundError
    if word == "invalid_transition":
        raise InvalidTransitionError(values[0].decode(), status, "task")
