"""What the tests of the running service may ask for."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.process.service_process import ServiceProcess, end_stores_on

StartService = Callable[..., ServiceProcess]
"""`start(NAME="value")` starts a service with these variables."""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Give a data directory that is not there yet."""
    with _short_directory() as directory:
        yield directory / "data"


@pytest.fixture
def start(tmp_path: Path, data_dir: Path) -> Iterator[StartService]:
    """Give a function that starts services on `data_dir`; they end after the test."""
    with _starter(tmp_path, data_dir) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartService]:
    """Give a function that starts services which serve all tests of the module."""
    with (
        _short_directory() as directory,
        _starter(tmp_path_factory.mktemp("shared"), directory / "data") as start,
    ):
        yield start


@contextmanager
def _starter(files: Path, data_dir: Path) -> Iterator[StartService]:
    number = count()
    with ExitStack() as stack:
        if sys.platform == "linux":
            stack.callback(end_stores_on, data_dir)

        def start(**environment: str) -> ServiceProcess:
            service = ServiceProcess(files / f"said-{next(number)}", data_dir, **environment)
            return stack.enter_context(service)

        yield start


@contextmanager
def _short_directory() -> Iterator[Path]:
    # A path that leaves room for a socket; that of tmp_path may not.
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        yield Path(name)
