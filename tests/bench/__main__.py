"""The benchmark as a program: `make bench`, or `python -m tests.bench --help`."""

import argparse
import asyncio
import resource
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from tests.bench import machine
from tests.bench.budget import judge, status_of
from tests.bench.load import Limits
from tests.bench.node_modules import NoNodeError, node_version, wanted_versions
from tests.bench.picture import draw, groups_of
from tests.bench.plan import PARTS, Options, Plan
from tests.bench.report import render
from tests.bench.rounds import say

NOT_MEASURED = 2
"""Exit status when somebody does not come up, or does not answer what was asked."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print the report, and return the exit status."""
    asked = _parse(arguments)
    _allow_connections()
    place = machine.describe()
    parts = frozenset(asked.only or (["main"] if asked.quick else PARTS))
    rounds = asked.rounds or (3 if asked.quick else 5)
    limits = Limits(asked.warm, asked.measure)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as files,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        plan = Plan(Options(rounds, limits, parts, asked.quick), runner, Path(files))
        try:
            plan.run()
        except RuntimeError as failed:
            say(f"bench: {failed}")
            return NOT_MEASURED
    findings = plan.findings
    rows = judge(findings)
    now = datetime.now(UTC)
    findings.notes[:0] = [_method(rounds, limits)]
    report = render(findings, rows, f"{now:%Y-%m-%d %H:%M} UTC on {place}", _versions())
    _write(asked.out, report)
    groups = groups_of(findings.main)
    if groups:
        caption = f"{now:%Y-%m-%d}, median of {rounds} rounds, 64 connections, one process."
        _write(asked.picture, draw(groups, caption))
    sys.stdout.write(report)
    for row in rows:
        if row.holds is False:
            say(f"misses: {row.claim}")
    return status_of(findings, rows, judges=not asked.no_judge)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured: 5, or 3 with --quick"
    )
    parser.add_argument("--measure", type=float, default=1.0, help="for how many seconds each time")
    parser.add_argument("--warm", type=float, default=0.3, help="seconds before that, not counted")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts instead of all")
    parser.add_argument("--quick", action="store_true", help="save, get and progress, beside bare")
    parser.add_argument("--no-judge", action="store_true", help="a row that misses is no failure")
    parser.add_argument("--out", type=Path, default=Path(".bench/report.md"), help="the report")
    parser.add_argument(
        "--picture", type=Path, default=Path(".bench/ratios.svg"), help="the ratios"
    )
    return parser.parse_args(arguments)


def _allow_connections() -> None:
    """Allow as many open files as the system lets us; what is started from here inherits that."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _versions() -> dict[str, str]:
    known = machine.versions()
    try:
        return {**known, "node": node_version(), **wanted_versions()}
    except NoNodeError:
        return known


def _method(rounds: int, limits: Limits) -> str:
    return (
        f"Rounds: {rounds}, each line {limits.measure_s:g} s in each, in another order every time;"
        " medians are told, and ratios are taken within a round. Everybody is sent the same headers"
        " and bodies, and has a store of its own without files. Ours has access control, the access"
        " line, metrics and limits on; bare has its heap frozen and the collector's thresholds"
        " raised."
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
