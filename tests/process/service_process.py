"""The service as an operator starts it: `python -m app` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Self

import pytest
from httpx2 import Client, Response, TransportError

from tests.faults.servers import HOST, ends_with_us, wait_until
from tests.service import BASE

REPOSITORY = Path(__file__).parents[2]

START_S = 15.0
"""How long a service may take to come up before a test gives up; half a second is usual."""

QUICK_RETRIES = {
    "ONBOARDING_RETRY_ATTEMPTS": "2",
    "ONBOARDING_RETRY_BASE_S": "0.05",
    "ONBOARDING_RETRY_JITTER_S": "0",
    "ONBOARDING_REDIS_TIMEOUT_S": "0.2",
}
"""Settings that no test waits a backoff for, while the store is away on purpose."""

UNLIMITED = {
    "ONBOARDING_RATE_LIMIT": "off",
    "ONBOARDING_CREATE_LIMIT": "off",
    "ONBOARDING_MISS_LIMIT": "off",
}
"""Settings for tests that ask as much as they like: they all come from one address."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Line = dict[str, Any]


class ServiceProcess:
    """One `python -m app`, with its output in files, killed with all it started after its block.

    Its environment holds nothing of whoever runs the tests. Every process that it starts inherits
    a variable with a name of its own, by which they are found again, orphans included.
    """

    def __init__(self, files: Path, data_dir: Path, **environment: str) -> None:
        """Start it; `files` is a fresh directory for what it says."""
        files.mkdir(parents=True)
        self.data_dir = data_dir
        self._stdout, self._stderr = files / "stdout", files / "stderr"
        self._mark = f"STARTED_BY_TEST={files}"
        # What it leaves behind when it is killed goes with the files of the test.
        own = {"STARTED_BY_TEST": str(files), "TMPDIR": str(files), **environment}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                ends_with_us([sys.executable, "-m", "app"]),
                cwd=REPOSITORY,
                env=environment_for(data_dir, **own),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid

    # What it says

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def lines(self) -> list[Line]:
        """Every finished line of stdout; each must be JSON."""
        finished, _, _ = self.stdout.rpartition("\n")
        return [json.loads(line) for line in finished.splitlines()]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    def wait_for_event(self, event: str, limit_s: float = START_S, count: int = 1) -> Line:
        """Wait until stdout has `count` lines of an event; gives the last one."""
        self._wait(lambda: self.events.count(event) >= count, limit_s, f"{event} is logged")
        return [line for line in self.lines if line["event"] == event][-1]

    # Where it is, and what belongs to it

    @property
    def port(self) -> int:
        return int(self.wait_for_event("service_started")["port"])

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Give a client that keeps its connection."""
        with Client(base_url=self.url, timeout=30, trust_env=False) as client:
            yield client

    def get(self, path: str) -> Response:
        """Ask on a fresh connection."""
        with self.client() as client:
            return client.get(path)

    def answers(self) -> bool:
        """Say whether it serves."""
        try:
            return self.get("/livez").status_code == 200
        except TransportError:
            return False

    def wait_until_it_answers(self, limit_s: float = START_S) -> Self:
        self._wait(self.answers, limit_s, "the service answers")
        return self

    def wait_until_ready(self, workers: int = 1) -> Self:
        """Wait until every one of its processes serves."""
        self.wait_for_event("process_started", count=workers)
        return self.wait_until_it_answers()

    def processes(self) -> list[int]:
        """Find every Python process that it started, itself included, that still runs."""
        mark = self._mark.encode()
        return [
            pid
            for pid in _all_processes()
            if mark in _read(pid, "environ").split(b"\0") and not _is_store(pid)
        ]

    def workers(self) -> list[int]:
        """Find the processes that serve, where WEB_CONCURRENCY asks for several."""
        return [
            pid
            for pid in self.processes()
            if pid != self.pid and b"spawn_main" in _read(pid, "cmdline")
        ]

    def stores(self) -> list[int]:
        """Find every Valkey that runs on the data directory, whoever started it."""
        return stores_on(self.data_dir)

    # Its end

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def send_to_group(self, number: signal.Signals) -> None:
        """Signal it and what it started, as Ctrl-C in a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it as a crash does; what it started is on its own."""
        self._process.kill()
        self._process.wait()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for_exit(self, limit_s: float = START_S) -> int:
        """Wait for its end and give its exit status."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"the service still runs after {limit_s} s; {self._said()}"
            ) from None

    def leaves_nothing_running(self) -> bool:
        """Say whether, after its end, its store is gone and so is every process it started.

        The store must have ended first; multiprocessing's own helper may take a moment longer.
        """
        if self.stores():
            return False
        with suppress(TimeoutError):
            wait_until(lambda: not self.processes(), 2.0, "its processes are gone")
        return not self.processes()

    def stop(self) -> None:
        """End it in order, without a drain."""
        self.send(signal.SIGINT)
        assert self.wait_for_exit() == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if sys.platform == "linux":
            wait_until(lambda: not _kill(self.processes()), 5.0, "no process of it is left")

    def _wait(self, is_true: Callable[[], bool], limit_s: float, claim: str) -> None:
        def look() -> bool:
            if is_true():
                return True
            if self.has_ended():
                raise RuntimeError(f"it ended with {self._process.returncode}; {self._said()}")
            return False

        try:
            wait_until(look, limit_s, claim)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; {self._said()}") from None

    def _said(self) -> str:
        return f"stdout: {self.stdout[-2000:]}\nstderr: {self.stderr[-2000:]}"


def environment_for(data_dir: Path, **environment: str) -> dict[str, str]:
    """Make an environment for the service or for a program beside it."""
    # HOME and the like are of no concern to it; PATH and TMPDIR are the machine's.
    inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return {
        **inherited,
        "PORT": "0",
        "ONBOARDING_LOG_FORMAT": "json",
        "ONBOARDING_DATA_DIR": str(data_dir),
        **UNLIMITED,
        **environment,
    }


def stores_on(data_dir: Path) -> list[int]:
    """Find every Valkey that runs on a data directory: it makes that its working directory."""
    home = data_dir.resolve()
    return [pid for pid in _all_processes() if _is_store(pid) and _working_directory(pid) == home]


def end_stores_on(data_dir: Path) -> None:
    """Wait until no Valkey runs on a data directory; one that stays is killed."""
    # A store ends by itself when its starter is gone.
    with suppress(TimeoutError):
        wait_until(lambda: not stores_on(data_dir), 5.0, "the store is gone")
    _kill(stores_on(data_dir))


def begin_session(client: Client) -> str:
    """Begin a session and give its id."""
    response = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
    assert response.status_code == 201, response.text
    return str(response.json()["session_id"])


def save_step(client: Client, session_id: str, step_id: int, **data: object) -> Response:
    """Send the answers of a step."""
    return client.post(f"{BASE}/{session_id}/steps/{step_id}", json={"data": data})


class SlowRequest:
    """A client that sends the headers and half of its body, and the rest when it is told to."""

    def __init__(self, port: int, path: str, body: bytes) -> None:
        half = len(body) // 2
        self._rest = body[half:]
        self._connection = HTTPConnection(HOST, port, timeout=30)
        self._connection.putrequest("POST", path)
        self._connection.putheader("Content-Type", "application/json")
        self._connection.putheader("Content-Length", str(len(body)))
        self._connection.endheaders(body[:half])

    def finish(self) -> int:
        """Send the rest and give the status of the answer; 0 when there is none."""
        try:
            self._connection.send(self._rest)
            return self._connection.getresponse().status
        except (OSError, HTTPException):
            return 0
        finally:
            self._connection.close()


class IdleConnection:
    """A connection that was used once and is kept: a server that stops closes it."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection(HOST, port, timeout=30)
        self.status("/livez")

    def status(self, path: str) -> int:
        """Ask once more; 0 when the connection is closed."""
        try:
            self._connection.request("GET", path)
            with self._connection.getresponse() as response:
                response.read()
                return response.status
        except (OSError, HTTPException):
            return 0

    def is_closed(self) -> bool:
        """Say whether the server has closed it."""
        link = self._connection.sock
        if link is None:
            return True
        link.setblocking(False)
        try:
            return link.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            link.settimeout(30)

    def close(self) -> None:
        self._connection.close()


def shared(directory: Path) -> list[Path]:
    """Find what workers share, for which a service has made it in its TMPDIR."""
    return [*directory.glob("onboarding-metrics-*")]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Hold a process where it is for the length of a block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: _state(pid) == "T", 5.0, "the process stands still")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Fail when the block takes longer."""
    begun_s = time.monotonic()
    yield
    took_s = time.monotonic() - begun_s
    assert took_s <= limit_s, f"it took {took_s:.2f} s"


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be collected does not."""
    return _state(pid) not in ("Z", "X", "")


def _kill(pids: list[int]) -> list[int]:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _is_store(pid: int) -> bool:
    return b"valkey-server" in _read(pid, "cmdline")


def _all_processes() -> list[int]:
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in found if is_alive(pid)]


def _state(pid: int) -> str:
    # After the name, which stands in parentheses and may hold any character.
    return _read(pid, "stat").rpartition(b") ")[2][:1].decode()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _working_directory(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None
