"""What must hold, and whether it does."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.bench.rounds import Asked, Cell, Results, Sample, Spread
from tests.bench.streams import Streams

BARE, OURS, FASTAPI, FASTIFY, BEST = "bare", "ours", "FastAPI", "Fastify", "Fastify, best"
UNTUNED = "bare, collector untouched"
TWO = "ours, 2 workers"

Bounds = dict[str, tuple[str, float]]
"""For an operation of ours which one of somebody else it is compared with, and how many times as
often it must be done in the same time."""

AGAINST_BARE: Bounds = {
    "save": ("post", 1.0),
    "get": ("get", 0.95),
    "progress": ("get", 0.95),
    "summary": ("summary", 0.7),
    "export": ("export", 0.7),
}
AGAINST_FASTAPI: Bounds = {
    "save": ("save", 50.0),
    "summary": ("summary", 60.0),
    "get": ("get", 8.0),
    "progress": ("progress", 8.0),
}
AGAINST_BEST: Bounds = {
    "save": ("save", 1.2),
    "summary": ("summary", 2.0),
    "get": ("get", 0.85),
    "progress": ("progress", 0.85),
}

OVERWRITE_US = 8.0
NEW_STEP_US = 18.0
"""How long the store may run commands for a save."""

TAIL = 2.0
"""How many times as long as half of the answers 99 % of them may take."""

SECOND_WORKER = 1.10
"""How much CPU a request may cost with two workers, of what it costs with one."""

STREAM_BYTES = 20 * 1024


class Growth(NamedTuple):
    """What a save costs with so many sessions in the store."""

    sessions: int
    store_bytes: int
    commands_us: float
    per_s: float


@dataclass
class Findings:
    """All that was measured."""

    main: Results = field(default_factory=Results)
    workers: Results = field(default_factory=Results)
    asked: dict[str, Asked] = field(default_factory=dict)
    """What each operation of ours asks of the store."""
    alone_us: dict[str, Spread] = field(default_factory=dict)
    """How long the store runs commands for a save, with a core for itself."""
    growth: list[Growth] = field(default_factory=list)
    streams: Streams | None = None
    floor: dict[str, float] = field(default_factory=dict)
    """SETs a second, by who sends them."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    wrong: dict[str, int] = field(default_factory=dict)
    """Answers that were not what they must be."""


class Row(NamedTuple):
    """One row of the budget; `holds` is None when it was not measured."""

    claim: str
    bound: str
    value: str
    holds: bool | None


def judge(findings: Findings) -> list[Row]:
    """Hold what was measured against the budget."""
    return [
        *_ratios(findings.main, BARE, AGAINST_BARE, "a bare route"),
        *_commands(findings),
        *_store(findings),
        *_ratios(findings.main, FASTAPI, AGAINST_FASTAPI, "FastAPI as described"),
        *_ratios(findings.main, BEST, AGAINST_BEST, "Fastify at its best"),
        *_tails(findings.main),
        *_workers(findings.workers),
        *_streams(findings.streams),
    ]


def status_of(findings: Findings, rows: Iterable[Row], *, judges: bool) -> int:
    """Give the exit status: 1 when an answer was wrong, or a row misses and that is judged."""
    misses = judges and any(row.holds is False for row in rows)
    return int(bool(findings.wrong) or misses)


def _ratios(results: Results, other: str, bounds: Bounds, name: str) -> Iterator[Row]:
    for operation, (theirs, bound) in bounds.items():
        ratio = results.ratio(Cell(OURS, operation), Cell(other, theirs))
        yield _at_least(f"{operation}: requests/s, times those of {name}", bound, ratio)


def _commands(findings: Findings) -> Iterator[Row]:
    for operation in ("save", "get", "progress"):
        asked = findings.asked.get(operation)
        count = None if asked is None else float(round(asked.commands))
        yield _at_most(f"{operation}: commands to the store", 1, count, "{:.0f}".format)
    for operation in ("summary", "export"):
        asked = findings.asked.get(operation)
        count = None if asked is None else float(round(asked.round_trips))
        yield _at_most(f"{operation}: round trips to the store", 1, count, "{:.0f}".format)


def _store(findings: Findings) -> Iterator[Row]:
    for operation, bound in (("save", OVERWRITE_US), ("new", NEW_STEP_US)):
        what = "an overwrite" if operation == "save" else "a new step"
        spread = findings.alone_us.get(operation)
        value = None if spread is None else spread.middle
        yield _at_most(f"{what}: the store's time in commands", bound, value, "{:.1f} us".format)


def _tails(results: Results) -> Iterator[Row]:
    for operation in AGAINST_BARE:
        tail = results.middle(Cell(OURS, operation), tail_of)
        yield _at_most(f"{operation}: p99, times p50", TAIL, tail, "{:.2f}".format)


def tail_of(sample: Sample) -> float:
    """Say how many times as long as half of the answers 99 % of them took."""
    return sample.p99_ms / sample.p50_ms if sample.p50_ms else 0.0


def _workers(results: Results) -> Iterator[Row]:
    for operation in ("save", "get"):
        ratio = results.ratio(Cell(TWO, operation), Cell(OURS, operation), _server_us)
        value = None if ratio is None else ratio.middle
        yield _at_most(
            f"{operation}: CPU a request with two workers, times that with one",
            SECOND_WORKER,
            value,
            _two,
        )


def _server_us(sample: Sample) -> float:
    return sample.server_us


def _streams(streams: Streams | None) -> Iterator[Row]:
    each = None if streams is None else streams.bytes_each
    yield _at_most("memory of an idle stream", STREAM_BYTES, each, _kilobytes)
    added = None if streams is None else float(streams.connections)
    claim = "connections to the store that all streams add"
    yield _at_most(claim, 1, added, "{:.0f}".format)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _kilobytes(value: float) -> str:
    return f"{value / 1024:.1f} KB"


def _at_least(claim: str, bound: float, spread: Spread | None) -> Row:
    if spread is None:
        return Row(claim, f"at least {bound:g}", "not measured", None)
    value = f"{spread.middle:.2f} ({spread.low:.2f} to {spread.high:.2f})"
    return Row(claim, f"at least {bound:g}", value, spread.middle >= bound)


def _at_most(claim: str, bound: float, value: float | None, write: Callable[[float], str]) -> Row:
    told = f"at most {write(bound)}"
    if value is None:
        return Row(claim, told, "not measured", None)
    return Row(claim, told, write(value), value <= bound)
