"""The record of who did what: noted at once, written behind the requests, read by operators."""

import asyncio
import os
from collections import deque
from contextlib import suppress
from operator import itemgetter

import structlog

from app.clock import now_ms
from app.metrics import AUDIT_DROPPED
from app.onboarding.audit import MAX_AUDITED, USUAL_AUDITED, AuditEvent, AuditList, Lane
from app.onboarding.cursors import check_limit
from app.onboarding.events import parse_after
from app.store.audit import AuditStore
from app.store.client import end_task
from app.store.gateway import Gateway

log = structlog.get_logger()

MAX_WAITING = 5000
"""How many events of each lane wait while the store is away."""

AT_ONCE = 100
"""How many events one batch has, at most: half a millisecond, in which the store does nothing
else."""

BEHIND_AT_ONCE = 500
"""How many it has where as many wait: small ones would not catch up where the store is far away."""

GATHER_S = 0.02
"""Pause after a batch, in seconds, unless another one would be full: to write an event by itself
takes a fifth of what the request takes that it tells of. Who is killed loses what still waits."""

TRY_AGAIN_S = 1.0
"""Pause before a batch is sent again that could not be kept, in seconds."""

SEEN_WITHIN_S = 1.0
"""How long a reader waits for what this process has noted before, in seconds."""

LEAVE_S = 2.0
"""How long a process that ends may take to write what still waits, in seconds."""


_Noted = tuple[int, AuditEvent]
"""The how manieth event it was, and the event."""


class AuditTrail:
    """Notes what happens, and writes it soon, in its order, as long as the store takes it.

    One for each process, for one event loop. While the store is away, events wait; of too many the
    oldest are lost, which is logged. The lanes wait apart, as they are kept.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._store = AuditStore(gateway)
        self._writer = os.urandom(8).hex()
        self._waiting = {lane: deque[_Noted](maxlen=MAX_WAITING) for lane in Lane}
        self._batch: list[_Noted] = []
        self._batches = 0
        self._noted = 0
        self._settled = 0
        self._dropped = 0
        self._has_more = asyncio.Event()
        self._has_written = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    def record(
        self, who: str, action: str, session_id: str | None, outcome: str, lane: Lane
    ) -> None:
        """Note that somebody did something, or was not let through. Waits for nothing."""
        waiting = self._waiting[lane]
        if len(waiting) == MAX_WAITING:
            self._dropped += 1
            AUDIT_DROPPED.inc()
        self._noted += 1
        event = AuditEvent(now_ms(), who, action, session_id, outcome, lane)
        waiting.append((self._noted, event))
        self._has_more.set()

    async def list_events(self, after: str | None = None, limit: int = USUAL_AUDITED) -> AuditList:
        """Read up to `limit` events after an id, oldest first, those of this process included.

        Raises `InvalidRequestError`, `CorruptRecordError`, and a `StoreError` where the store
        cannot do its part.
        """
        place = parse_after(after)
        check_limit(limit, MAX_AUDITED)
        await self._settle(SEEN_WITHIN_S)
        events = await self._store.list_after(place, limit + 1)
        page = events[:limit]
        return AuditList(events=page, next=page[-1]["id"] if len(events) > limit else None)

    def start(self) -> None:
        """Begin to write in the background."""
        self._writing = asyncio.create_task(self._write(), name="audit")

    async def aclose(self) -> None:
        """Write what still waits, if that can be done soon, and end."""
        if self._writing is not None:
            await self._settle(LEAVE_S)
            await end_task(self._writing)
            self._writing = None
        lost = len(self._batch) + sum(map(len, self._waiting.values()))
        if lost:
            AUDIT_DROPPED.inc(lost)
            log.warning("audit_events_lost", count=lost)

    async def _settle(self, limit_s: float) -> None:
        """Wait until nothing waits of what was noted up to now, or the time is over."""
        last = self._noted
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._settled < last:
                    self._has_written.clear()
                    await self._has_written.wait()

    async def _write(self) -> None:
        while True:
            if not self._batch:
                self._batch = await self._next_batch()
                self._batches += 1
            try:
                await self._store.add(
                    [event for _, event in self._batch],
                    writer=self._writer,
                    number=self._batches,
                )
            except Exception as failure:  # noqa: BLE001 - the same batch again, it may be kept
                log.warning("audit_unreachable", exception=type(failure).__name__)
                self._tell_dropped()
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            self._settled, _ = self._batch[-1]
            self._batch = []
            self._has_written.set()
            self._tell_dropped()
            if sum(map(len, self._waiting.values())) < AT_ONCE:
                await asyncio.sleep(GATHER_S)

    async def _next_batch(self) -> list[_Noted]:
        """Wait for events, and take those of all lanes in the order in which they happened."""
        lanes = self._waiting.values()
        while not any(lanes):
            self._has_more.clear()
            await self._has_more.wait()
        most = AT_ONCE if sum(map(len, lanes)) < BEHIND_AT_ONCE else BEHIND_AT_ONCE
        batch: list[_Noted] = []
        while len(batch) < most and (filled := [lane for lane in lanes if lane]):
            if len(filled) == 1:
                [lane] = filled
                batch += [lane.popleft() for _ in range(min(len(lane), most - len(batch)))]
            else:
                batch.append(min(filled, key=itemgetter(0)).popleft())
        return batch

    def _tell_dropped(self) -> None:
        if self._dropped:
            log.warning("audit_events_dropped", count=self._dropped)
            self._dropped = 0
