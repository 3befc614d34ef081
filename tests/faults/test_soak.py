"""Use everything for half an hour, with a fault a minute, and see what piles up."""

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import chain, cycle
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import NamedTuple, Self

import pytest

from app.store.connect import BULK_CONNECTIONS
from tests.faults.aside import Aside, aside
from tests.faults.conftest import StartService
from tests.faults.load import Load
from tests.faults.mix import Mix
from tests.faults.proxy import Proxy
from tests.faults.report import Row
from tests.faults.servers import Valkey
from tests.faults.states import NEEDS, connect, frozen, full, killed
from tests.process.service_process import ServiceProcess, linux_only

MOST_GROWTH_BYTES = 1024 * 1024
MOST_MORE = 5
"""How many more file descriptors, and tasks, there may be in the end."""

EXPLAINED = {"503 store_full"}
"""What a client may be told: a full store is the one fault that is not outlasted."""


MOST_CONNECTIONS = 2 + BULK_CONNECTIONS + 4
"""Most connections of a process to the store: the pools, two to listen, two for health."""


class Sample(NamedTuple):
    """How a process was at a moment of `time.monotonic`.

    `connections` are those to the store, `files` all other open files and sockets: how many the
    pool has opened is a matter of how much was wanted at once since they were last broken.
    """

    at_s: float
    resident_bytes: int
    files: int
    connections: int
    tasks: int


class Gauges:
    """Looks at a process once a second for the length of a block."""

    def __init__(self, service: ServiceProcess, store_port: int) -> None:
        self.samples: list[Sample] = []
        self._service = service
        self._store_port = store_port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def between(self, begin_s: float, end_s: float) -> list[Sample]:
        return [sample for sample in self.samples if begin_s <= sample.at_s < end_s]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(30.0)

    def _look(self) -> None:
        proc = Path(f"/proc/{self._service.pid}")
        with self._service.client() as client:
            while not self._ended.wait(1.0):
                told = client.get("/metrics").text.splitlines()
                [tasks] = [line for line in told if line.startswith("onboarding_tasks ")]
                status = (proc / "status").read_text().splitlines()
                [resident] = [line for line in status if line.startswith("VmRSS:")]
                size = int(resident.split()[1]) * 1024
                files, connections = self._count_files(proc)
                number = int(float(tasks.split()[1]))
                self.samples.append(Sample(time.monotonic(), size, files, connections, number))

    def _count_files(self, proc: Path) -> tuple[int, int]:
        """Count open files, and among them, not counted there, the connections to the store."""
        to_store = {
            f"socket:[{fields[9]}]"
            for fields in map(str.split, (proc / "net/tcp").read_text().splitlines())
            if fields[2].endswith(f":{self._store_port:04X}")
        }
        links: list[str] = []
        for each in (proc / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.append(str(each.readlink()))
        connections = sum(link in to_store for link in links)
        return len(links) - connections, connections


class Middle(NamedTuple):
    """The medians of what was seen in a while."""

    resident_bytes: float
    files: float
    tasks: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Self:
        return cls(
            median(sample.resident_bytes for sample in samples),
            median(sample.files for sample in samples),
            median(sample.tasks for sample in samples),
        )


# The faults


def _kill(store: Valkey, _: Proxy, __: Aside) -> None:
    with killed(store):
        time.sleep(1.5)


def _freeze(store: Valkey, _: Proxy, __: Aside) -> None:
    with frozen(store):
        time.sleep(4.0)


def _forget_scripts(store: Valkey, _: Proxy, __: Aside) -> None:
    store.command("SCRIPT", "FLUSH")


def _reset(_: Valkey, proxy: Proxy, loop: Aside) -> None:
    loop.do(proxy.reset_all)


def _fill(store: Valkey, _: Proxy, __: Aside) -> None:
    with full(store):
        time.sleep(2.0)


def _close_connections(store: Valkey, _: Proxy, __: Aside) -> None:
    with closing(connect(store)) as admin:
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]


FAULTS: list[Callable[[Valkey, Proxy, Aside], None]] = [
    *(_kill, _freeze, _forget_scripts, _reset, _fill, _close_connections),
]

ROUNDS = 3
"""How many rounds of all faults there are at least: one to warm up, and two to be compared."""


@linux_only
@pytest.mark.chaos
def test_nothing_piles_up(
    start: StartService,
    tmp_path: Path,
    report: Callable[[str], Row],
    minutes: float,
) -> None:
    rounds = max(ROUNDS, int(minutes / len(FAULTS)))
    pause_s = minutes * 60 / (rounds * len(FAULTS))
    row = report(f"soak of {minutes:g} min, a fault every {pause_s:.0f} s, 50 requests/s and a mix")
    with (
        Valkey.start(tmp_path / "store", appendonly=True, **NEEDS) as store,
        aside(Proxy(store.port)) as (proxy, loop),
    ):
        service = start(REDIS_URL=f"redis://{proxy.host}:{proxy.port}/0")
        with (
            Gauges(service, proxy.port) as gauges,
            Load(service.url, wizards=50, per_second=50.0) as load,
            aside(Mix(service.url)) as (mix, _),
        ):
            begun_s = time.monotonic()
            faults = cycle(FAULTS)
            settled: list[list[Sample]] = []
            for number in range(rounds * len(FAULTS)):
                due_s = begun_s + number * pause_s
                next(faults)(store, proxy, loop)
                time.sleep(max(0.0, due_s + pause_s - time.monotonic()))
                # What the fault has set in motion has come to rest by then.
                settled.append(gauges.between(due_s + pause_s / 2, due_s + pause_s))
            load.wait_for_ack(time.monotonic())
        row.add(load.ledger, load.ledger.read_back(service.url))
    by_round = [
        Middle.of([*chain.from_iterable(settled[at : at + len(FAULTS)])])
        for at in range(0, len(settled), len(FAULTS))
    ]
    first, last = by_round[1], by_round[-1]
    grown_bytes = last.resident_bytes - first.resident_bytes
    most_connections = max(sample.connections for sample in gauges.samples)
    row.errors += mix.refused
    row.beside |= {
        "beside the load": f"{mix.asked:,} calls, {mix.cancelled:,} of them given up",
        "RSS": " ".join(f"{each.resident_bytes / 2**20:.1f}" for each in by_round) + " MB",
        "grown after the first round": f"{grown_bytes / 1024:.0f} KB",
        "files": " ".join(f"{each.files:.0f}" for each in by_round),
        "tasks": " ".join(f"{each.tasks:.0f}" for each in by_round),
        "connections to the store": f"{most_connections} at most",
    }
    assert mix.wrong == {}
    assert row.errors.keys() <= EXPLAINED
    assert (row.lost, row.duplicated) == (0, 0)
    assert grown_bytes <= MOST_GROWTH_BYTES
    assert abs(last.files - first.files) <= MOST_MORE
    assert most_connections <= MOST_CONNECTIONS
    assert abs(last.tasks - first.tasks) <= MOST_MORE
