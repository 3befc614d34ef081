"""Sessions in numbers: how many, how old, how full, where people stop."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.onboarding.progress import Progress
from app.onboarding.retention import HOUR_MS, SessionFacts
from app.onboarding.sessions import SessionStatus, State

WARNING_PERCENT, CRITICAL_PERCENT = 70.0, 90.0
"""From which share of the capacity on the health is `warning`, is `critical`."""

AGE_BOUNDS_MS = (HOUR_MS, 6 * HOUR_MS, 24 * HOUR_MS)
"""Where the age distribution is divided, in milliseconds."""

MAX_PAGE = 1000
"""Most sessions on a page of the list."""

MAX_OWN_PAGE = 100
"""Most sessions on a page of a user's own."""

STUCK_SHOWN = 100
"""How many stuck sessions are named."""


class SessionRow(TypedDict):
    """A session in a list; `progress` is null when it cannot be read."""

    session_id: str
    status: str
    workspace_id: str | None
    user_id: str | None
    created_at: str
    last_activity: str
    age_hours: float
    progress: Progress | None


class SessionPage(TypedDict):
    """A page of sessions, newest first; `next_cursor` is null at the end."""

    sessions: list[SessionRow]
    next_cursor: str | None


class OwnSessionRow(TypedDict):
    """A session of a user; `progress` and `expires_at` are null when they cannot be read."""

    session_id: str
    workspace_id: str | None
    status: str
    progress: Progress | None
    created_at: str
    expires_at: str | None


class OwnSessionPage(TypedDict):
    """A page of a user's sessions, newest first; `next_cursor` is null at the end."""

    sessions: list[OwnSessionRow]
    next_cursor: str | None


AgeDistribution = TypedDict(
    "AgeDistribution", {"under_1h": int, "1h_to_6h": int, "6h_to_24h": int, "over_24h": int}
)
"""How many sessions were made how long ago."""


class FunnelStep(TypedDict):
    """How many sessions ever saved a step, and how long it took them to save the next one."""

    step_id: int
    saved: int
    median_seconds_to_next: float | None


class CleanupStats(TypedDict):
    """What was cleaned up so far.

    `removed` counts what rules and clean-ups removed, `expired` what outlived its lifetime,
    `evicted` what had to make room, `tasks_removed` the task sessions that were left over.
    """

    last_run: str | None
    removed: int
    failures: int
    expired: int
    evicted: int
    tasks_removed: int


class StatsView(TypedDict):
    """All sessions in numbers; ages in hours, null without a session."""

    total_sessions: int
    max_capacity: int
    utilization_percent: float
    status_breakdown: dict[str, int]
    age_distribution: AgeDistribution
    average_age_hours: float | None
    oldest_session_hours: float | None
    newest_session_hours: float | None
    funnel: list[FunnelStep]
    cleanup: CleanupStats


class CapacityHealth(TypedDict):
    """How full it is, and what is stuck; `stuck_session_ids` names the first of these."""

    overall_health: Literal["healthy", "warning", "critical"]
    session_count: int
    utilization_percent: float
    stuck_sessions: int
    stuck_session_ids: list[str]
    cleanup_active: bool


class Counts(NamedTuple):
    """What the index counts; times in Unix milliseconds.

    `ages` are the sessions made within the last of each of `AGE_BOUNDS_MS`, `created_sum_s` is the
    sum of all creations in Unix seconds, `max_sessions` 0 without a limit.
    """

    by_status: dict[SessionStatus, int]
    ages: tuple[int, ...]
    created_sum_s: int
    oldest_ms: int | None
    newest_ms: int | None
    max_sessions: int
    cleanup: Mapping[str, int]
    funnel: Mapping[str, int]

    @property
    def total(self) -> int:
        """How many sessions there are."""
        return sum(self.by_status.values())


def view_stats(counts: Counts, steps: int, now_ms: int) -> StatsView:
    """Describe all sessions; `steps` is how many the catalogue of the funnel has."""
    within = [*counts.ages, counts.total]
    return StatsView(
        total_sessions=counts.total,
        max_capacity=counts.max_sessions,
        utilization_percent=utilization(counts.total, counts.max_sessions),
        status_breakdown={status.value: count for status, count in counts.by_status.items()},
        age_distribution={
            "under_1h": within[0],
            "1h_to_6h": within[1] - within[0],
            "6h_to_24h": within[2] - within[1],
            "over_24h": within[3] - within[2],
        },
        average_age_hours=average_age_hours(counts, now_ms),
        oldest_session_hours=_age_hours(counts.oldest_ms, now_ms),
        newest_session_hours=_age_hours(counts.newest_ms, now_ms),
        funnel=[describe_step(counts.funnel, number) for number in range(1, steps + 1)],
        cleanup=describe_cleanup(counts.cleanup),
    )


def view_health(
    session_count: int, max_sessions: int, stuck: int, stuck_ids: list[str], *, cleanup: bool
) -> CapacityHealth:
    """Judge how full it is: below 70 % healthy, below 90 % warning, from 90 % on critical."""
    health: Literal["healthy", "warning", "critical"] = "healthy"
    # By the counts: the share is rounded.
    if max_sessions and 100 * session_count >= CRITICAL_PERCENT * max_sessions:
        health = "critical"
    elif max_sessions and 100 * session_count >= WARNING_PERCENT * max_sessions:
        health = "warning"
    return CapacityHealth(
        overall_health=health,
        session_count=session_count,
        utilization_percent=utilization(session_count, max_sessions),
        stuck_sessions=stuck,
        stuck_session_ids=stuck_ids,
        cleanup_active=cleanup,
    )


def view_row(
    facts: SessionFacts, workspace: str, user: str, progress: Progress | None, now_ms: int
) -> SessionRow:
    """Describe a session in a list."""
    return SessionRow(
        session_id=facts.session_id,
        status=facts.status.value,
        workspace_id=workspace or None,
        user_id=user or None,
        created_at=rfc3339(facts.created_ms),
        last_activity=rfc3339(facts.activity_ms),
        age_hours=_hours(now_ms - facts.created_ms),
        progress=progress,
    )


def view_own_row(facts: SessionFacts, workspace: str, state: State | None) -> OwnSessionRow:
    """Describe a session to the user whose it is; `state` is None when it cannot be read."""
    return OwnSessionRow(
        session_id=facts.session_id,
        workspace_id=workspace or None,
        status=facts.status.value if state is None else state.status,
        progress=None if state is None else state.progress,
        created_at=rfc3339(facts.created_ms),
        expires_at=None if state is None else rfc3339(state.deadline_ms),
    )


def utilization(count: int, limit: int) -> float:
    """Say how much of a limit is used, in percent; 0 without a limit."""
    return round(100 * count / limit, 2) if limit else 0.0


def average_age_hours(counts: Counts, now_ms: int) -> float | None:
    """Say how old sessions are on average; None without a session."""
    if not counts.total:
        return None
    return _hours(now_ms - 1000 * counts.created_sum_s / counts.total)


# --- The funnel -----------------------------------------------------------------------------------


def describe_step(funnel: Mapping[str, int], step_id: int) -> FunnelStep:
    """Describe a step by the counters `saved:<step>` and `gap:<step>:<bucket>`."""
    prefix = f"gap:{step_id}:"
    buckets = {
        int(name.removeprefix(prefix)): count
        for name, count in funnel.items()
        if name.startswith(prefix)
    }
    return FunnelStep(
        step_id=step_id,
        saved=funnel.get(f"saved:{step_id}", 0),
        median_seconds_to_next=median_of(buckets),
    )


def median_of(buckets: Mapping[int, int]) -> float | None:
    """Estimate the median of durations that were counted in buckets, in seconds.

    Bucket b holds those of 2^(b/4) - 1 up to 2^((b+1)/4) - 1 seconds; within it they are taken to
    lie evenly, so that the estimate is off by a fifth at most. None without a duration.
    """
    half = sum(buckets.values()) / 2
    before = 0
    for bucket in sorted(buckets):
        if before + buckets[bucket] >= half > 0:
            low, high = (2 ** (edge / 4) - 1 for edge in (bucket, bucket + 1))
            return round(low + (high - low) * (half - before) / buckets[bucket], 2)
        before += buckets[bucket]
    return None


def describe_cleanup(counted: Mapping[str, int]) -> CleanupStats:
    """Describe what was cleaned up, by its counters."""
    last_run = counted.get("last_run")
    return CleanupStats(
        last_run=None if last_run is None else rfc3339(last_run),
        removed=counted.get("removed", 0),
        failures=counted.get("failures", 0),
        expired=counted.get("expired", 0),
        evicted=counted.get("evicted", 0),
        tasks_removed=counted.get("tasks_removed", 0),
    )


def _age_hours(created_ms: int | None, now_ms: int) -> float | None:
    return None if created_ms is None else _hours(now_ms - created_ms)


def _hours(duration_ms: float) -> float:
    return max(0.0, round(duration_ms / HOUR_MS, 2))
