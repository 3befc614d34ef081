"""The contestants: each a server of its own process, with a store of its own where it needs one."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from app.store.embedded import MEMORY_TUNING
from tests.bench import wizard
from tests.bench.load import Address, Request, Wanted, fetch, is_listening
from tests.bench.machine import Places, cpu_s, on, processes_of
from tests.bench.node_modules import NODE_FILES, find_node, install
from tests.bench.wizard import Operation
from tests.faults.servers import HOST, Valkey, ends_with_us, free_ports, wait_until

REPOSITORY = Path(__file__).parents[2]

KEY = "ok_a-key-of-the-benchmark"
"""The API key of the machine that begins sessions and reports events."""

START_S = 30.0
"""How long a contestant may take to come up."""

ENOUGH = "1000000/minute"
"""A limit that counts everybody and refuses nobody. By the minute, as by default: what a process
has taken for a caller is good for so long."""


class Cost(NamedTuple):
    """What a server and its store have taken so far, in seconds; each process of the server.

    `commands_s` is the time in which the store ran commands, `store_s` all of its CPU time;
    `reads` is how often it read from a connection.
    """

    processes_s: tuple[float, ...]
    store_s: float = 0.0
    commands_s: float = 0.0
    reads: int = 0


@dataclass
class Contestant:
    """A server that runs, and what can be asked of it."""

    name: str
    address: Address
    pid: int
    store: Valkey | None = None
    workers: int = 1
    operations: dict[str, Operation] = field(default_factory=dict)
    learned: dict[str, list[Request]] = field(default_factory=dict)
    """The requests of each operation, with what must come back."""

    @property
    def pids(self) -> list[int]:
        """The processes of the server."""
        return processes_of(self.pid)

    def offer(self, *operations: Operation) -> None:
        self.operations.update({each.name: each for each in operations})

    async def learn(self) -> None:
        """Ask for every operation once, look at the answers, and know how long they are."""
        for operation in self.operations.values():
            self.learned[operation.name] = await operation.learn(self.address)

    def cost(self, pids: list[int]) -> Cost:
        """Say what has been taken so far; `pids` are those of the server."""
        processes_s = tuple(cpu_s([pid]) for pid in pids)
        if self.store is None:
            return Cost(processes_s)
        stats = self.store.command("INFO", "stats")
        return Cost(
            processes_s,
            store_s=cpu_s([self.store.pid]),
            commands_s=int(stats["eventloop_duration_cmd_sum"]) / 1e6,
            reads=int(stats["total_reads_processed"]),
        )


@contextmanager
def serving(
    name: str,
    command: list[str],
    places: Places,
    files: Path,
    port: int,
    environment: dict[str, str],
    store: Valkey | None = None,
) -> Iterator[Contestant]:
    """Run a server for the length of a block; what it says goes to a file.

    Raises RuntimeError with the end of what it said when it does not come up.
    """
    inherited = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    said = files / f"{name.replace(' ', '-')}-{port}.log"
    with said.open("wb") as log, on(places.server):
        process = subprocess.Popen(
            ends_with_us(command),
            cwd=REPOSITORY,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_up(process, (HOST, port), said)
        yield Contestant(name, (HOST, port), process.pid, store)
    except OSError as error:
        if process.poll() is None:
            raise
        told = f"{name} ended with {process.returncode}: {_end_of(said)}"
        raise RuntimeError(told) from error
    finally:
        _end(process)


def _wait_until_up(process: "subprocess.Popen[bytes]", address: Address, said: Path) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode}: {_end_of(said)}")
        return is_listening(address) and _is_live(address)

    try:
        wait_until(answers, START_S, "the server answers")
    except TimeoutError as late:
        raise RuntimeError(f"{late}: {_end_of(said)}") from None


def _is_live(address: Address) -> bool:
    request = Request(wizard.write("GET", "/livez"), Wanted(200, 0, wizard.ANY_LENGTH))
    try:
        asyncio.run(fetch(address, [request], 1))
    except (OSError, RuntimeError):
        return False
    return True


def _end_of(said: Path) -> str:
    return said.read_text(errors="replace")[-2000:]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server with all that it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running_store(places: Places, files: Path) -> Iterator[Valkey]:
    """Run a store for the length of a block, which keeps nothing on disk, for everybody the same.

    Its memory is tuned like that of the store which the service brings along.
    """
    directory = Path(tempfile.mkdtemp(prefix="store-", dir=files))
    with on(places.store), patch.dict(os.environ, MEMORY_TUNING):
        store = Valkey.start(directory)
    with store:
        yield store


def _url(store: Valkey) -> str:
    return f"redis://{HOST}:{store.port}/0"


# --- The contestants ------------------------------------------------------------------------------


def _named(name: str, workers: int) -> str:
    return name if workers == 1 else f"{name}, {workers} workers"


@contextmanager
def bare(
    places: Places,
    files: Path,
    summary_bytes: int = 0,
    export_bytes: int = 0,
    *,
    is_tuned: bool = True,
    workers: int = 1,
) -> Iterator[Contestant]:
    """Run a Starlette application that does nothing."""
    if workers > 1:
        places = places._replace(server=places.server | places.second)
    (port,) = free_ports(1)
    tuning = "tuned" if is_tuned else "untuned"
    command = [sys.executable, "-m", "tests.bench.bare", str(port), str(workers), tuning]
    command += [str(summary_bytes), str(export_bytes)]
    name = _named("bare" if is_tuned else "bare, collector untouched", workers)
    with serving(name, command, places, files, port, {}) as contestant:
        contestant.workers = workers
        contestant.offer(
            Operation(
                "post",
                [wizard.write("POST", "/bare", body) for body in wizard.BODIES.values()],
                lambda answer: bool(answer["ok"]),
            ),
            Operation("get", [wizard.write("GET", "/bare")], lambda answer: bool(answer["ok"])),
            Operation(
                "summary", [wizard.write("GET", "/summary")], lambda answer: "filled" in answer
            ),
            Operation(
                "export", [wizard.write("GET", "/export")], lambda answer: "filled" in answer
            ),
        )
        yield contestant


@contextmanager
def ours(places: Places, files: Path, *, workers: int = 1) -> Iterator[Contestant]:
    """Run the service as operators do, with everything on that it has."""
    if workers > 1:
        places = places._replace(server=places.server | places.second)
    (port,) = free_ports(1)
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    environment = {
        "PORT": str(port),
        "WEB_CONCURRENCY": str(workers),
        "LOG_LEVEL": "info",
        "ONBOARDING_LOG_FORMAT": "json",
        "ONBOARDING_AUTH": "on",
        "ONBOARDING_API_KEYS": f"bench:sessions+generator:{digest}",
        "ONBOARDING_RATE_LIMIT": ENOUGH,
        "ONBOARDING_CREATE_LIMIT": ENOUGH,
        "ONBOARDING_MISS_LIMIT": ENOUGH,
        "ONBOARDING_DRAIN_S": "0",
        "TMPDIR": str(files),
    }
    command = [sys.executable, "-m", "app"]
    name = _named("ours", workers)
    with (
        running_store(places, files) as store,
        serving(
            name, command, places, files, port, {"REDIS_URL": _url(store), **environment}, store
        ) as contestant,
    ):
        contestant.workers = workers
        yield contestant


@contextmanager
def described(places: Places, files: Path) -> Iterator[Contestant]:
    """Run the service as the described system would have been written."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "tests.bench.described:app", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "warning"]
    with (
        running_store(places, files) as store,
        serving(
            "FastAPI", command, places, files, port, {"REDIS_URL": _url(store)}, store
        ) as contestant,
    ):
        yield contestant


@contextmanager
def fastify(places: Places, files: Path, *, is_best: bool) -> Iterator[Contestant]:
    """Run the service on Fastify and ioredis. Raises NoNodeError where that cannot be."""
    node, modules = find_node(), install()
    (port,) = free_ports(1)
    script = NODE_FILES / ("best.js" if is_best else "idiomatic.js")
    name = "Fastify, best" if is_best else "Fastify"
    with running_store(places, files) as store:
        # The modules are not where the script is.
        environment = {
            "REDIS_URL": _url(store),
            "PORT": str(port),
            "NODE_PATH": str(modules),
            "NODE_ENV": "production",
        }
        command = [node, str(script)]
        with serving(name, command, places, files, port, environment, store) as contestant:
            yield contestant
