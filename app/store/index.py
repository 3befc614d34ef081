"""The index of all sessions, from which they are listed, counted, and chosen for removal.

Without hash tags the script that changes a session keeps the index true in the same step
(`lua/session.lua`). With them the two lie in different slots: room for a session is reserved before
it is made, and whatever changes it is followed here, within a second. The sweeper repairs what was
missed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import structlog

from app.clock import now_ms
from app.errors import OnboardingError
from app.onboarding.retention import Capacity, DeleteReason
from app.store.client import end_task

if TYPE_CHECKING:
    from app.store.gateway import Gateway

log = structlog.get_logger()

FOLLOW_S = 0.2
"""How long changes are gathered before the index follows them, in seconds."""

LEAVE_S = 2.0
"""How long a process that ends waits for the index to follow, in seconds."""

AT_ONCE = 16
"""How many sessions are followed at a time."""

RECLAIMED_AT_ONCE = 200
"""How many sessions one script takes out, so that it does not hold others up: about 2 ms."""

RESERVED_MS = 60_000
"""How long a session that is about to be made may take, in milliseconds: more than any request."""

SCANNED_AT_ONCE = 500
"""How many keys one look at the whole store takes in."""

ADOPTED = ":adopted"
"""Field of `entries`: every session that was there before the index was looked for."""

TRIES = 3
"""How often following a session is tried while others follow it too."""


class SessionIndex:
    """Keeps the index true where a script of the session cannot."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._entries = gateway.keys.index("entries")

    async def reserve(
        self, session_id: str, capacity: Capacity, *, pin: str, at_ms: int
    ) -> tuple[bool, list[str]]:
        """Reserve room for a session; say whether there is any, and which sessions must go for it.

        These have lost their room in any case.
        """
        condemned: list[str] = []
        is_reclaimed = False
        while True:
            reply = await self._gateway.evaluate(
                "reserve_session",
                [self._entries],
                [
                    *(session_id, at_ms, self._gateway.lifetime_ms, *capacity, pin),
                    "1" if is_reclaimed else "",
                ],
            )
            condemned += [each.decode() for each in reply.values]
            if reply.word == "ok":
                return True, condemned
            if is_reclaimed and not reply.values:
                return False, condemned
            if not is_reclaimed:
                await self.reclaim()
                is_reclaimed = True

    async def release(self, session_id: str) -> None:
        """Give back the room of a session that was not made."""
        await self._gateway.evaluate("release_room", [self._entries], [session_id])

    async def list_condemned(self) -> list[str]:
        """List the sessions that have lost their room and are still to be removed."""
        members = await self._gateway.command("SMEMBERS", self._keys.index("condemned"))
        return sorted(each.decode() for each in members)

    async def acquit(self, session_id: str) -> None:
        """Note that a condemned session is gone."""
        await self._gateway.command("SREM", self._keys.index("condemned"), session_id)

    async def remove(self, session_id: str, reason: DeleteReason, *, at_ms: int) -> None:
        """Take a session out that is gone."""
        await self._unplace(session_id, reason, at_ms, "")

    async def follow(self, session_id: str, *, is_over: bool = False) -> None:
        """Put a session where it belongs now, or take it out when it is gone.

        One that is not there may be about to be made, unless its time `is_over`.
        """
        if not await self.move(session_id):
            at_ms = now_ms()
            reserved_since = "" if is_over else at_ms - RESERVED_MS
            await self._unplace(session_id, DeleteReason.LIFETIME, at_ms, reserved_since)

    async def move(self, session_id: str) -> bool:
        """Put a session where it belongs now; False when it is gone.

        Whoever removed it says so, and why: it is left to them, and at last to the sweeper.
        """
        keys = self._keys.session(session_id)
        for _ in range(TRIES):
            entry = await self._gateway.command("HGET", self._entries, session_id)
            fed = entry.split(b"\n")[0].rpartition(b" ")[2] if entry else b"-"
            # Without hash tags the scripts of the session feed their events.
            known = fed if self._keys.hash_tag else b"+"
            facts = await self._gateway.evaluate("read_facts", keys[:3], [known])
            if facts.word == "not_found":
                return False
            placed = await self._gateway.evaluate(
                "place_session",
                [self._entries],
                [session_id, fed if entry else "", *facts.values],
            )
            if placed.word == "ok":
                break
        return True

    async def reclaim(self) -> None:
        """Take every session out whose lifetime is over."""
        if self._keys.hash_tag:
            await self._reclaim_followed()
            return
        while True:
            reply = await self._gateway.evaluate(
                "reclaim_sessions", [self._entries], [RECLAIMED_AT_ONCE]
            )
            if int(reply.values[0]) < RECLAIMED_AT_ONCE:
                return

    async def _reclaim_followed(self) -> None:
        seen: list[bytes] = []
        while True:
            past = await self._gateway.command(
                *("ZRANGEBYSCORE", self._keys.index("deadlines"), "-inf", now_ms()),
                *("LIMIT", 0, RECLAIMED_AT_ONCE),
            )
            if not past or past == seen:
                # Nothing is left, or nothing that could be taken out now.
                return
            seen = past
            await self.follow_all([each.decode() for each in past], is_over=True)

    async def repair(self, cursor: str) -> tuple[str, int]:
        """Look at a part of the index, from `cursor` on ("0" at first), and mend what is wrong.

        Gives where the next part begins, "0" at the end, and how many entries were looked at that
        pointed at nothing (0 where keys have hash tags: there, each one is followed anew).
        """
        if not self._keys.hash_tag:
            reply = await self._gateway.evaluate(
                "repair_index", [self._entries], [cursor, RECLAIMED_AT_ONCE]
            )
            return reply.values[0].decode(), int(reply.values[1])
        found = await self._gateway.command(
            "HSCAN", self._entries, cursor, "COUNT", RECLAIMED_AT_ONCE
        )
        following, entries = found
        names = entries if isinstance(entries, dict) else entries[::2]
        await self.follow_all([name.decode() for name in names if not name.startswith(b":")])
        return str(following.decode() if isinstance(following, bytes) else following), 0

    async def adopt(self) -> int:
        """Bring in the sessions that the index does not know, and say how many there were.

        They were made before there was an index, or the index was lost since. All keys are looked
        through for them, once for each index. Not on a Cluster: there, a session comes in with its
        next write.
        """
        is_known = await self._gateway.command("HEXISTS", self._entries, ADOPTED)
        if is_known or self._gateway.mode == "cluster":
            return 0
        adopted, cursor = 0, "0"
        while True:
            following, found = await self._gateway.command(
                *("SCAN", cursor, "MATCH", self._keys.session("*").progress),
                *("COUNT", SCANNED_AT_ONCE),
            )
            ids = [key.decode().split(":")[1].strip("{}") for key in found]
            if ids:
                entries = await self._gateway.command("HMGET", self._entries, *ids)
                unknown = [name for name, entry in zip(ids, entries, strict=True) if entry is None]
                await self.follow_all(unknown)
                adopted += len(unknown)
            cursor = following.decode() if isinstance(following, bytes) else str(following)
            if cursor == "0":
                await self._gateway.command("HSET", self._entries, ADOPTED, 1)
                return adopted

    async def _unplace(
        self, session_id: str, reason: DeleteReason, at_ms: int, spare_since: int | str
    ) -> None:
        await self._gateway.evaluate(
            "unplace_session",
            [self._entries],
            [session_id, reason.event, reason, at_ms, spare_since],
        )

    async def follow_all(self, session_ids: Sequence[str], *, is_over: bool = False) -> None:
        """Follow several; what fails is logged, and left to the sweeper."""
        await self._try_all(partial(self.follow, is_over=is_over), session_ids)

    async def move_all(self, session_ids: Sequence[str]) -> None:
        """Move several; what fails is logged, and left to the sweeper."""
        await self._try_all(self.move, session_ids)

    async def _try_all(
        self, do: Callable[[str], Awaitable[object]], session_ids: Sequence[str]
    ) -> None:
        for start in range(0, len(session_ids), AT_ONCE):
            names = session_ids[start : start + AT_ONCE]
            await asyncio.gather(*(self._try(do, each) for each in names))

    async def _try(self, do: Callable[[str], Awaitable[object]], session_id: str) -> None:
        try:
            await do(session_id)
        except OnboardingError as failure:
            # The sweeper comes by again.
            log.warning("index_not_followed", session_id=session_id, code=failure.code)


class IndexFollower:
    """Gathers the sessions that were changed, and has the index follow them soon."""

    def __init__(self, gateway: "Gateway") -> None:
        self._index = SessionIndex(gateway)
        self._waiting: dict[asyncio.AbstractEventLoop, tuple[set[str], asyncio.Task[None]]] = {}
        self._following: set[asyncio.Task[None]] = set()

    def note(self, session_id: str) -> None:
        """Take note of a change."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting.get(loop)
        if waiting is None:
            # Tasks belong to an event loop; those of loops that are closed are gone.
            self._waiting = {o: w for o, w in self._waiting.items() if not o.is_closed()}
            changed: set[str] = set()
            task = loop.create_task(self._follow_soon(changed), name="index")
            self._following.add(task)
            task.add_done_callback(self._following.discard)
            waiting = self._waiting[loop] = (changed, task)
        waiting[0].add(session_id)

    async def aclose(self) -> None:
        """Have the index follow what this event loop has changed, now.

        When the store is away, that is given up after `LEAVE_S`: the sweeper makes up for it.
        """
        loop = asyncio.get_running_loop()
        # Those that are no longer waited with use the connections that are about to be closed.
        following = [task for task in self._following if task.get_loop() is loop]
        waiting = self._waiting.pop(loop, None)
        if waiting is not None:
            changed, task = waiting
            task.cancel()
            following.append(loop.create_task(self._follow(changed), name="index"))
        if following:
            _, late = await asyncio.wait(following, timeout=LEAVE_S)
            for task in late:
                await end_task(task)

    async def _follow_soon(self, changed: set[str]) -> None:
        await asyncio.sleep(FOLLOW_S)
        self._waiting.pop(asyncio.get_running_loop(), None)
        await self._follow(changed)

    async def _follow(self, changed: set[str]) -> None:
        await self._index.move_all(sorted(changed))
