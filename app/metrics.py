"""What is measured: every metric, how it is counted, and how it is told.

Requests and commands are tallied in plain numbers, and `settle` puts them into the metrics: twice a
second, and when somebody asks. For one request the library takes a microsecond, and three where
several workers write each number into a file; a tally takes a third of one. What happens seldom is
counted at once.

No label can be grown by a client: there are so many routes, methods and statuses, policies, kinds
of errors.
"""

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    exposition,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 5.0, 10.0, 15.0)
"""Where the durations of requests are divided, in seconds: finely where answers are as a rule; then
after one retry, after two, after three, at the deadline."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""The methods that are told apart."""

OTHER = "other"
"""What stands for any other method."""

NO_ROUTE = "none"
"""What stands for the route of a request that no route is for."""

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which the library knows where the processes of one service put their numbers. It
is read when the library is imported."""

_PREFIX = "onboarding-metrics-"

_registry = CollectorRegistry()


class _Durations(Histogram):
    """A histogram that takes many durations at once."""

    def add(self, within: Sequence[int], total_s: float) -> None:
        """Take durations that were counted by the buckets they are in."""
        self._sum.inc(total_s)
        for bucket, count in zip(self._buckets, within, strict=True):
            if count:
                bucket.inc(count)


# --- The metrics: where there are several processes, a gauge adds up those that live --------------

REQUESTS = Counter(
    "onboarding_requests",
    "Requests that were answered, probes aside.",
    ["route", "method", "status"],
    registry=_registry,
)
DURATIONS = _Durations(
    "onboarding_request_duration_seconds",
    "How long it took until the answer began.",
    ["route"],
    buckets=BUCKETS_S,
    registry=_registry,
)
IN_FLIGHT = Gauge(
    "onboarding_requests_in_flight",
    "Requests that are being served, and files that are on their way.",
    ["among"],
    multiprocess_mode="livesum",
    registry=_registry,
)
STREAMS_OPEN = Gauge(
    "onboarding_streams_open",
    "Live streams of events.",
    multiprocess_mode="livesum",
    registry=_registry,
)
ASKS = Gauge(
    "onboarding_asks",
    "Questions that are being answered, and that wait for a turn.",
    ["state"],
    multiprocess_mode="livesum",
    registry=_registry,
)
TASKS = Gauge(
    "onboarding_tasks",
    "Tasks of the event loops: requests, streams, and the work beside them.",
    multiprocess_mode="livesum",
    registry=_registry,
)
PROCESSES = Gauge(
    "onboarding_processes",
    "Processes by what their health says, which is how they find the store.",
    ["status"],
    multiprocess_mode="livesum",
    registry=_registry,
)
STORE_COMMANDS = Counter(
    "onboarding_store_commands",
    "Commands that were sent to the store, those of probes aside.",
    registry=_registry,
)
STORE_RETRIES = Counter(
    "onboarding_store_retries",
    "Calls to the store that were to be sent again.",
    registry=_registry,
)
STORE_RETRIES_DENIED = Counter(
    "onboarding_store_retries_denied",
    "Calls that were not sent again, since too many had been.",
    registry=_registry,
)
STORE_ERRORS = Counter(
    "onboarding_store_errors",
    "Sendings to the store that failed, by kind.",
    ["kind"],
    registry=_registry,
)
REFUSALS = Counter(
    "onboarding_limits_refused",
    "Requests that were refused because of a limit, by policy.",
    ["policy"],
    registry=_registry,
)
AUDIT_DROPPED = Counter(
    "onboarding_audit_events_dropped",
    "Events that are missing in the record.",
    registry=_registry,
)


# --- Tallies --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """Requests of one route, method and status that are not in the metrics yet."""

    requests: Counter
    durations: _Durations
    count: int = 0
    total_s: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))


@dataclass(slots=True)
class StoreTally:
    """Commands that are not in the metrics yet."""

    commands: int = 0


STORE_TALLY = StoreTally()

_tallies: dict[tuple[str | None, str, int], _Tally] = {}


def count_request(route: str | None, method: str, status: int, took_s: float) -> None:
    """Count a request that a route, given by its template, has answered; None if none has."""
    tally = _tallies.get((route, method, status))
    if tally is None:
        tally = _tally_of(route, method, status)
    tally.count += 1
    tally.total_s += took_s
    tally.within[bisect_left(BUCKETS_S, took_s)] += 1


def settle() -> None:
    """Put what was tallied into the metrics. To be called where requests are counted."""
    for tally in _tallies.values():
        if tally.count:
            tally.requests.inc(tally.count)
            tally.durations.add(tally.within, tally.total_s)
            tally.count, tally.total_s, tally.within = 0, 0.0, [0] * len(tally.within)
    STORE_COMMANDS.inc(STORE_TALLY.commands)
    STORE_TALLY.commands = 0


def _tally_of(route: str | None, method: str, status: int) -> _Tally:
    method = method if method in METHODS else OTHER
    tally = _tallies.get((route, method, status))
    if tally is None:
        label = NO_ROUTE if route is None else route
        tally = _Tally(REQUESTS.labels(label, method, status), DURATIONS.labels(label))
        _tallies[(route, method, status)] = tally
    return tally


# --- Several processes ----------------------------------------------------------------------------


@contextmanager
def shared_by_workers() -> Iterator[None]:
    """Let processes that are started within the block count together, from nothing.

    They put their numbers into a directory of their own, which is gone after the block.
    """
    with TemporaryDirectory(prefix=_PREFIX) as directory:
        os.environ[_DIRECTORY] = directory
        try:
            yield
        finally:
            del os.environ[_DIRECTORY]


def discard_shared() -> None:
    """Remove what is shared, in the place of the process that shared it: it is gone."""
    directory = Path(os.environ.get(_DIRECTORY, ""))
    # Never one that somebody else has named.
    if directory.name.startswith(_PREFIX):
        rmtree(directory, ignore_errors=True)


def forget_process(pid: int) -> None:
    """Take a process that has ended out of the gauges; what it has counted stays."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]


# --- What is told ---------------------------------------------------------------------------------


class Exposition(NamedTuple):
    """All metrics as text."""

    text: bytes
    media_type: str


def describe_sessions(by_status: Mapping[str, int], cleaned_up: Mapping[str, int]) -> list[Metric]:
    """Describe what the store counts for all processes: sessions, and what sweepers did so far.

    `cleaned_up` has `removed`, `expired`, `evicted`, `tasks_removed`, `failures`, and `last_run` in
    Unix milliseconds once there was one.
    """
    sessions = GaugeMetricFamily(
        "onboarding_sessions", "Sessions by status, at most 10 seconds ago.", labels=["status"]
    )
    for status, count in by_status.items():
        sessions.add_metric([status], count)
    removed = CounterMetricFamily(
        "onboarding_sweeper_removed", "What was cleaned up, in all processes.", labels=["what"]
    )
    for what, name in _CLEANED_UP.items():
        removed.add_metric([what], cleaned_up.get(name, 0))
    failures = CounterMetricFamily(
        "onboarding_sweeper_failures",
        "What sweeps could not do, in all processes.",
        value=cleaned_up.get("failures", 0),
    )
    last_run = GaugeMetricFamily(
        "onboarding_sweeper_last_run_timestamp_seconds", "When a sweep last came to its end."
    )
    if "last_run" in cleaned_up:
        last_run.add_metric([], cleaned_up["last_run"] / 1000)
    return [sessions, removed, failures, last_run]


_CLEANED_UP = {
    "sessions": "removed",
    "expired_sessions": "expired",
    "evicted_sessions": "evicted",
    "tasks": "tasks_removed",
}


class _Everything:
    """The metrics of this process, or of all that count together, and what the store has said."""

    def __init__(self, told: Iterable[Metric]) -> None:
        self._told = told

    def collect(self) -> Iterable[Metric]:
        """Give them, as the library asks for them."""
        for metric in self._counted():
            # When each counter began: twice the lines, and of several processes nobody knows.
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric
        yield from self._told

    def _counted(self) -> Iterable[Metric]:
        if _DIRECTORY in os.environ:
            everywhere: Collector = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
            return everywhere.collect()
        return _registry.collect()


def render(accept: str, told: Iterable[Metric]) -> Exposition:
    """Write all metrics, and what was `told` beside, in the format that a header `Accept` names."""
    # Not by the library's own look at the header: it repeats parts of it in the content type.
    if "application/openmetrics-text" in accept:
        text = openmetrics.generate_latest(_Everything(told))  # type: ignore[no-untyped-call]
        return Exposition(text, openmetrics.CONTENT_TYPE_LATEST)
    text = exposition.generate_latest(_Everything(told))
    return Exposition(text, exposition.CONTENT_TYPE_PLAIN_0_0_4)
