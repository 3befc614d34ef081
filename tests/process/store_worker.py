"""Processes beside the test that work on its store: they make sessions, sweep, and are killed.

One Python process is started and forks the others, which begin within milliseconds.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from tests.faults.servers import ends_with_us
from tests.process.service_process import REPOSITORY, environment_for

PROGRAM = """
import asyncio
import json
import os
import sys
from functools import cache

from app.errors import SessionCapacityError
from app.onboarding.tasks import TASK_RULES
from app.services.manager import make_manager
from app.services.sweeper import Sweeper
from app.services.tasks import TaskService
from app.settings import load_settings
from app.store.connect import connect
from app.store.retention import RetentionStore
from app.store.stats import StatsStore


async def sweep(settings, lease_s):
    gateway = connect(settings)
    sweeper = Sweeper(
        RetentionStore(gateway),
        StatsStore(gateway, max_sessions=0, interval_s=settings.cleanup_interval_s),
        TaskService(gateway, TASK_RULES),
        rules=settings.expiry_rules,
        interval_s=settings.cleanup_interval_s,
        pin=settings.catalogue.pin,
        lease_s=lease_s,
    )
    while not await sweeper.sweep():
        await asyncio.sleep(0.01)
    await gateway.aclose()


async def create(settings, count):
    gateway = connect(settings)
    manager = make_manager(gateway, settings)

    async def make():
        try:
            return await manager.create_session()
        except SessionCapacityError:
            return None

    made = await asyncio.gather(*(make() for _ in range(count)))
    await gateway.aclose()
    return made


@cache
def settings_of(text):
    settings = load_settings(**json.loads(text))
    # Read before the fork, and not by every child.
    assert settings.catalogue
    return settings


def work(order):
    settings = settings_of(json.dumps(order["settings"]))
    if order["do"] == "sweep":
        # Whoever sweeps says so once a session; nobody reads it here.
        sys.stdout = sys.stderr = open(os.devnull, "w")
        asyncio.run(sweep(settings, order["lease_s"]))
        return None
    sys.stdout = open(os.devnull, "w")
    return asyncio.run(create(settings, order["count"]))


answers = sys.stdout
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "sweep":
        settings_of(json.dumps(order["settings"]))
        child = os.fork()
        if child == 0:
            work(order)
            os._exit(0)
        print(child, file=answers, flush=True)
        # Until it is collected, its id is nobody else's.
        sys.stdin.readline()
        os.waitpid(child, 0)
        print("ended", file=answers, flush=True)
    else:
        made = work(order)
        print(json.dumps(made), file=answers, flush=True)
"""


class StoreWorker:
    """One such process, ended after its block."""

    def __init__(self, directory: Path) -> None:
        self._errors = directory / "worker-stderr"
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                ends_with_us([sys.executable, "-c", PROGRAM]),
                cwd=REPOSITORY,
                env=environment_for(directory / "data"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_until_ready(self) -> Self:
        assert self._read() == "ready"
        return self

    def order(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def start_sweep(self, lease_s: float, **settings: Any) -> int:
        """Have a process of its own sweep once, and give its id."""
        self.order(do="sweep", lease_s=lease_s, settings=settings)
        return int(self._read())

    def wait_for_sweep(self) -> None:
        self.order(do="collect")
        assert self._read() == "ended"

    def kill_sweep(self, pid: int) -> None:
        """End it as a crash does."""
        os.kill(pid, signal.SIGKILL)
        self.wait_for_sweep()

    def made(self) -> list[str | None]:
        """Give what `order(do="create", count=...)` has come to."""
        found: list[str | None] = json.loads(self._read())
        return found

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"it ended: {self._errors.read_text()[-2000:]}")
        return line
