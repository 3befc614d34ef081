"""Sessions listed and counted, from the index alone."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from app.errors import CorruptRecordError, SessionNotFoundError, StoreError
from app.onboarding.progress import Progress
from app.onboarding.retention import STUCK_MS, SessionFacts
from app.onboarding.sessions import SessionStatus, State
from app.onboarding.stats import AGE_BOUNDS_MS, STUCK_SHOWN, Counts
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway, Reply
from app.store.index import SessionIndex
from app.store.sessions import STATE_FIELDS, SessionStore, read_state

CLASSES = tuple(f"{status}:{kind}" for status in SessionStatus for kind in ("free", "held"))
"""How the index divides the sessions: by status, and by whether answers were never exported."""

LOOKED_AT = 1000
"""How many sessions a page with a filter looks at, at most."""


READ_AT_ONCE = 16
"""How many sessions are read at a time where each lies in a slot of its own."""


class Listed(NamedTuple):
    """A session in the index; `workspace` and `user` are empty where it has none.

    `state` is None where it cannot be read.
    """

    facts: SessionFacts
    workspace: str
    user: str
    state: State | None = None

    @property
    def progress(self) -> Progress | None:
        """How far the session is; None where that cannot be read."""
        return None if self.state is None else self.state.progress


class Owned(NamedTuple):
    """Whose a session must say itself that it is; with an empty `workspace`, of any."""

    workspace: str
    user: str

    def holds(self, owner: object) -> bool:
        """Say whether the workspace and the user of a session's metadata are these."""
        if not isinstance(owner, list):
            return False
        workspace, user = owner
        return user == self.user.encode() and (
            not self.workspace or workspace == self.workspace.encode()
        )


class Occupancy(NamedTuple):
    """How many sessions there are, of how many (0 = any number), and which of them are stuck."""

    sessions: int
    limit: int
    stuck: int
    stuck_ids: list[str]
    is_cleaned: bool


class StatsStore:
    """Reads the index. What one call costs does not depend on how many sessions there are."""

    def __init__(self, gateway: Gateway, *, max_sessions: int, interval_s: float) -> None:
        """Take what holds where operators have set nothing else."""
        self._gateway = gateway
        self._keys = gateway.keys
        self._entries = [gateway.keys.index("entries")]
        self._index = SessionIndex(gateway)
        self._sessions = SessionStore(gateway)
        self._max_sessions = max_sessions
        self._interval_ms = int(interval_s * 1000)

    async def count(self, pin: str, at_ms: int) -> Counts:
        """Count the sessions; the funnel is that of the catalogue `pin`."""
        await self._index.reclaim()
        moments = [max(0, at_ms - bound_ms) for bound_ms in AGE_BOUNDS_MS]
        reply = await self._gateway.evaluate(
            "count_sessions", self._entries, [self._max_sessions, pin, *moments]
        )
        limit, created_sum_s, oldest, newest, classes, ages, cleanup, funnel = reply.values
        by_status = dict.fromkeys(SessionStatus, 0)
        for class_, count in zip(classes[::2], classes[1::2], strict=True):
            by_status[SessionStatus(class_.decode().partition(":")[0])] += int(count)
        return Counts(
            by_status=by_status,
            ages=tuple(int(count) for count in ages),
            created_sum_s=int(created_sum_s),
            oldest_ms=_moment_ms(oldest),
            newest_ms=_moment_ms(newest),
            max_sessions=int(limit),
            cleanup=_counters(self._keys.index("cleanup"), cleanup),
            funnel=_counters(self._keys.index(f"funnel:{pin}"), funnel),
        )

    async def occupancy(self, at_ms: int) -> Occupancy:
        """Count what the health of the whole is judged by."""
        # What has outlived its lifetime is stuck no more.
        await self._index.reclaim()
        reply = await self._gateway.evaluate(
            "count_capacity",
            self._entries,
            [self._max_sessions, at_ms - STUCK_MS, STUCK_SHOWN, self._interval_ms],
        )
        count, limit, stuck, is_active, ids = reply.values
        return Occupancy(
            int(count), int(limit), int(stuck), [each.decode() for each in ids], is_active == b"1"
        )

    async def list_page(
        self,
        after: str,
        limit: int,
        *,
        status: SessionStatus | None = None,
        workspace: str = "",
        user: str = "",
        owned: bool = False,
    ) -> tuple[list[Listed], str]:
        """List sessions, newest first, after a place ("" = from the newest).

        Gives the place of the last one that was looked at, "" at the end. Where a filter leaves
        few, a page may be shorter than `limit` although there are more. With `owned`, a session
        must say itself that it is the user's, and of the workspace: the index is a hint. One round
        trip; another one for each session that is not where the index has it, or where keys have
        hash tags, there two with `owned`.
        """
        if user:
            sets = [f"user:{user}"]
        elif workspace:
            sets = [f"workspace:{workspace}"]
        else:
            sets = [f"created:{each}" for each in CLASSES if status is None or _is(each, status)]
        statuses = "" if status is None else f"|{status}|"
        looked_at = LOOKED_AT if user or workspace else limit
        prefix = "" if self._keys.hash_tag else self._keys.session_prefix
        args: list[Argument] = [after, limit, looked_at, statuses, workspace, user]
        args += [prefix, len(STATE_FIELDS), *STATE_FIELDS, *sets]
        reply = await self._gateway.evaluate("page_sessions", self._entries, args)
        place, *rows = reply.values
        # Of this call: a semaphore belongs to the event loop that it was first waited for in.
        turn = asyncio.Semaphore(READ_AT_ONCE)
        read = partial(self._read_apart, turn) if self._keys.hash_tag else self._read_beside
        wanted = Owned(workspace, user) if owned else None
        listed = await asyncio.gather(*(read(row, wanted) for row in rows))
        return [each for each in listed if each is not None], place.decode()

    async def repair(self, session_id: str) -> None:
        """Put a session where it belongs in the index, or take it out when it is gone."""
        await self._index.follow_all([session_id])

    async def _read_beside(self, row: Sequence[Any], wanted: Owned | None) -> Listed | None:
        listed, values = _listed(row), row[7]
        key = self._keys.session(listed.facts.session_id).progress
        if isinstance(values, list) and not any(values):
            await self.repair(listed.facts.session_id)
            return None
        if wanted is not None and not wanted.holds(row[8]):
            return None
        with suppress(CorruptRecordError):
            if not isinstance(values, list):
                raise corrupt(key)
            listed = listed._replace(state=read_state(key, values))
        return listed

    async def _read_apart(
        self, turn: asyncio.Semaphore, row: Sequence[Any], wanted: Owned | None
    ) -> Listed | None:
        listed = _listed(row)
        session_id = listed.facts.session_id
        try:
            async with turn:
                if wanted is not None and not wanted.holds(await self._read_owner(session_id)):
                    return None
                state = await self._sessions.get_state(session_id)
        except SessionNotFoundError:
            await self.repair(session_id)
            return None
        except CorruptRecordError:
            return listed
        return listed._replace(state=state)

    async def _read_owner(self, session_id: str) -> object:
        key = self._keys.session(session_id).metadata
        with suppress(CorruptRecordError):
            return await self._gateway.command("HMGET", key, "workspace_id", "user_id")
        return None

    async def used_memory(self) -> int | None:
        """Ask how much memory all nodes use, in bytes; None when the store will not say."""
        try:
            nodes = await self._gateway.command_everywhere("INFO", "memory")
        except (StoreError, ResponseError):
            return None
        return sum(int(node["used_memory"]) for node in nodes)


def read_listed(reply: Reply) -> list[SessionFacts]:
    """Read the sessions that a script of the index lists."""
    return [_listed(row).facts for row in reply.values]


def _listed(row: Sequence[Any]) -> Listed:
    session_id, created, class_, ended, activity, workspace, user = (
        part.decode() for part in row[:7]
    )
    status, _, kind = class_.partition(":")
    facts = SessionFacts(
        session_id=session_id,
        # What no script writes any more is told as what an operator will look at.
        status=SessionStatus(status) if status in _STATUSES else SessionStatus.ERROR,
        is_held=kind == "held",
        created_ms=int(created),
        ended_ms=int(ended) if ended else None,
        activity_ms=int(float(activity)),
    )
    return Listed(facts, workspace, user)


_STATUSES = frozenset(SessionStatus)


def _is(class_: str, status: SessionStatus) -> bool:
    return class_.startswith(f"{status}:")


def _moment_ms(place: bytes) -> int | None:
    return int(place.partition(b":")[0]) if place else None


def _counters(key: str, flat: Sequence[bytes]) -> dict[str, int]:
    try:
        return {
            name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)
        }
    except ValueError:
        raise corrupt(key, "the counters") from None
