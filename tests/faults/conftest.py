"""What the tests of faults ask for: a service as operators start it, a row, a number of runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.faults.report import Row, render
from tests.faults.servers import Valkey
from tests.process.service_process import ServiceProcess

ROWS = pytest.StashKey[list[Row]]()

StartService = Callable[..., ServiceProcess]
Begin = Callable[[str], Row]
Runs = Callable[[int], int]

REFUSALS = {"503 store_unavailable", "503 overloaded", "504 deadline_exceeded"}
"""What a client may be told during an outage that outlasts it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="as often as the figures ask for")
    parser.addoption("--runs", type=int, help="so often, whatever the figures ask for")
    parser.addoption("--minutes", type=float, default=30.0, help="how long the soak takes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(render(rows))


@pytest.fixture
def runs(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Give how often to run, of how often the figure asks for: once, unless it is `make chaos`."""
    config = request.config
    if config.getoption("--chaos", default=False):
        return lambda full: config.getoption("--runs") or full
    return lambda _: 1


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], Row]:
    """Give a function that begins a row of the table."""

    def begin(fault: str) -> Row:
        row = Row(fault)
        request.config.stash.setdefault(ROWS, []).append(row)
        return row

    return begin


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Valkey]:
    """Run a store that keeps what it acknowledged over its own death."""
    with Valkey.start(tmp_path / "store", appendonly=True) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartService]:
    """Give a function that starts services: `start(REDIS_URL=...)`; they end after the test."""
    number = count()
    with ExitStack() as stack:

        def start(**environment: str) -> ServiceProcess:
            at = next(number)
            service = ServiceProcess(
                tmp_path / f"said-{at}", tmp_path / f"data-{at}", **environment
            )
            return stack.enter_context(service).wait_until_it_answers()

        yield start


@pytest.fixture
def minutes(request: pytest.FixtureRequest) -> float:
    """Give how long the soak takes."""
    return float(request.config.getoption("--minutes"))
