"""The sweeper: what must be cleaned up without anybody asking for it, by one process at a time."""

import os
from collections.abc import Sequence

import structlog

from app.clock import monotonic_s, now_ms
from app.errors import OnboardingError
from app.onboarding.retention import (
    DeleteReason,
    ExpiryRule,
    SessionFacts,
    plan_expiry,
    terms_of,
)
from app.onboarding.stats import average_age_hours
from app.services.background import Repeated
from app.services.tasks import TaskService
from app.store.retention import RetentionStore
from app.store.stats import StatsStore

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
"""How often it is asked whether a sweep is due, in seconds: so soon a new interval holds."""

LEASE_S = 15.0
"""How long a sweeper that is not heard of keeps others from sweeping, in seconds."""


class LeaseLostError(Exception):
    """Somebody else sweeps now."""


class Sweeper:
    """Removes what expiry rules and lifetimes have ended, and mends the index.

    Every process has one; a lease in the store lets one of them sweep at a time. Each removal is
    one script, so a sweeper that dies leaves nothing half done, and the next one goes on.
    """

    def __init__(
        self,
        retention: RetentionStore,
        stats: StatsStore,
        tasks: TaskService,
        *,
        rules: Sequence[ExpiryRule],
        interval_s: float,
        pin: str,
        lease_s: float = LEASE_S,
    ) -> None:
        """Take what does the work; `interval_s` holds unless operators have set another one."""
        self._retention = retention
        self._stats = stats
        self._tasks = tasks
        self._rules = tuple(rules)
        self._interval_s = interval_s
        self._pin = pin
        self._lease_s = lease_s
        self._claimed_s = 0.0
        self._failures = 0
        self._is_sweeping = False
        self._name = os.urandom(8).hex()
        self._looking = Repeated("sweeper", self.sweep_if_due, LOOK_EVERY_S)

    def start(self) -> None:
        """Begin to sweep in the background."""
        self._looking.start()

    async def aclose(self) -> None:
        """End; a sweep that is going on is given up."""
        await self._looking.aclose()

    async def sweep_if_due(self) -> bool:
        """Sweep when it is time, and nobody else does; say whether it was done."""
        await self._retention.finish_evictions(at_ms=now_ms())
        return await self._try_to_sweep(now=False)

    async def sweep(self) -> bool:
        """Sweep now, unless somebody else does; say whether it was done."""
        return await self._try_to_sweep(now=True)

    async def _try_to_sweep(self, *, now: bool) -> bool:
        if self._is_sweeping:
            return False
        self._is_sweeping = True
        try:
            if not await self._claim(now=now):
                return False
            await self._sweep()
        except LeaseLostError:
            log.warning("sweep_lost")
            return False
        finally:
            self._is_sweeping = False
        return True

    async def _sweep(self) -> None:
        """Sweep, and give the lease back, whether it went well or not."""
        tasks_removed = self._failures = 0
        try:
            removed = await self._remove_due()
            repaired = await self._repair()
            tasks_removed = await self._tasks.cleanup_old_sessions()
            await self._report(removed, repaired, tasks_removed)
        except LeaseLostError:
            raise
        except Exception as failure:  # noqa: BLE001 - the next one may go better
            self._failures += 1
            log.error("sweep_failed", exception=type(failure).__name__)
        await self._retention.finish_sweep(
            self._name, failures=self._failures, tasks_removed=tasks_removed
        )

    async def _remove_due(self) -> int:
        """Remove what is over; count what rules have ended."""
        await self._retention.finish_evictions(at_ms=now_ms())
        await self._retention.reclaim()
        listed: dict[str, SessionFacts] = {}
        for rule in self._rules:
            due = await self._retention.list_due(terms_of(rule, now_ms()))
            listed |= {each.session_id: each for each in due}
            await self._keep_lease()
        removed = 0
        for session_id, rule in plan_expiry(self._rules, listed.values(), now_ms()).items():
            removed += await self._remove(session_id, rule)
            await self._keep_lease()
        return removed

    async def _remove(self, session_id: str, rule: ExpiryRule) -> bool:
        at_ms = now_ms()
        try:
            is_gone = await self._retention.remove(
                session_id, terms_of(rule, at_ms), DeleteReason.RULE, at_ms=at_ms
            )
        except OnboardingError as failure:
            self._failures += 1
            log.warning("session_not_removed", session_id=session_id, code=failure.code)
            return False
        if is_gone:
            log.info("session_expired", session_id=session_id, since=rule.since)
        return is_gone

    async def _repair(self) -> int:
        repaired, cursor = await self._retention.adopt(), "0"
        while True:
            cursor, mended = await self._retention.repair(cursor)
            repaired += mended
            if cursor == "0":
                return repaired
            await self._keep_lease()

    async def _report(self, removed: int, repaired: int, tasks_removed: int) -> None:
        at_ms = now_ms()
        counts = await self._stats.count(self._pin, at_ms)
        log.info(
            "sweep_finished",
            removed=removed,
            repaired=repaired,
            tasks_removed=tasks_removed,
            failures=self._failures,
            sessions=counts.total,
            by_status={status.value: count for status, count in counts.by_status.items()},
            average_age_hours=average_age_hours(counts, at_ms),
            store_memory_bytes=await self._stats.used_memory(),
        )

    async def _keep_lease(self) -> None:
        """Prolong the lease in time. Raises `LeaseLostError` when it is somebody else's."""
        is_due = monotonic_s() - self._claimed_s > self._lease_s / 3
        if is_due and not await self._claim(now=True):
            raise LeaseLostError

    async def _claim(self, *, now: bool) -> bool:
        is_ours = await self._retention.claim_sweep(
            self._name, lease_s=self._lease_s, interval_s=self._interval_s, now=now
        )
        if is_ours:
            self._claimed_s = monotonic_s()
        return is_ours
