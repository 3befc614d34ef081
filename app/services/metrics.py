"""How the service does, in numbers, for whoever watches it."""

import asyncio
from typing import get_args

from app.clock import monotonic_s
from app.errors import StoreError
from app.metrics import (
    ASKS,
    IN_FLIGHT,
    PROCESSES,
    STREAMS_OPEN,
    TASKS,
    Exposition,
    describe_sessions,
    render,
    settle,
)
from app.onboarding.stats import Counts
from app.services.assistant import AssistantService
from app.services.background import Repeated
from app.services.events import EventService
from app.services.health import HealthMonitor, Status
from app.services.limits import InFlight
from app.services.stats import StatsService

SETTLE_EVERY_S = 0.5
"""How often others learn what this process has counted, in seconds."""

COUNT_EVERY_S = 10.0
"""How long it is taken for true what the store has counted, in seconds."""

COUNT_S = 0.5
"""How long the store may take to count, in seconds."""


class MetricsService:
    """Tells the metrics of all processes that share them, from any of these."""

    def __init__(
        self,
        stats: StatsService,
        events: EventService,
        assistant: AssistantService,
        in_flight: InFlight,
        transfers: InFlight,
        health: HealthMonitor,
    ) -> None:
        self._stats = stats
        self._events = events
        self._assistant = assistant
        self._in_flight = in_flight
        self._transfers = transfers
        self._health = health
        self._counts: Counts | None = None
        self._counted_s = -COUNT_EVERY_S
        self._settling = Repeated("metrics", self._settle, SETTLE_EVERY_S)

    def start(self) -> None:
        """Begin to tell the other processes."""
        self._settling.start()

    async def aclose(self) -> None:
        """Tell them for the last time."""
        await self._settling.aclose()
        await self._settle()

    async def describe(self, accept: str) -> Exposition:
        """Write all metrics in a format that the header `Accept` names.

        Those of the sessions are missing while the store is away.
        """
        await self._settle()
        counts = await self._count()
        told = [] if counts is None else describe_sessions(_named(counts), counts.cleanup)
        # A few milliseconds, more where there are many processes.
        return await asyncio.to_thread(render, accept, told)

    async def _settle(self) -> None:
        """Put what this process has counted, and how it is, into the metrics."""
        IN_FLIGHT.labels("requests").set(self._in_flight.count)
        IN_FLIGHT.labels("transfers").set(self._transfers.count)
        STREAMS_OPEN.set(self._events.followers)
        TASKS.set(len(asyncio.all_tasks()))
        ASKS.labels("running").set(self._assistant.running)
        ASKS.labels("waiting").set(self._assistant.waiting)
        for status in get_args(Status):
            PROCESSES.labels(status).set(status == self._health.status)
        settle()

    async def _count(self) -> Counts | None:
        """Ask the store what there is, unless it was asked a moment ago or is away."""
        if not self._health.is_readable:
            self._counts = None
        elif monotonic_s() - self._counted_s >= COUNT_EVERY_S:
            # At once, so that nobody else asks meanwhile.
            self._counted_s = monotonic_s()
            try:
                async with asyncio.timeout(COUNT_S):
                    self._counts = await self._stats.count()
            except (StoreError, TimeoutError):
                self._counts = None
        return self._counts


def _named(counts: Counts) -> dict[str, int]:
    return {status.value: count for status, count in counts.by_status.items()}
