"""Callers go away at every moment: nobody gets another's answer, and no connection is left."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import uvloop

from app.clock import monotonic_s
from app.errors import StoreError
from tests.faults.conftest import Begin, Runs
from tests.faults.proxy import Proxy
from tests.faults.report import Row
from tests.faults.servers import HOST, Valkey, follows, wait_until
from tests.store.sessions import Place, working_at

CALLERS = 64
"""How many ask at once: more than there are connections, so that some wait for one."""

OPERATIONS = 400
"""How many operations a run has, over all callers."""

LONGEST_DELAY_S = 0.004
"""How long a command or a reply takes on its way at most."""

SHARE = 0.7
"""How often a caller means to go away; sometimes the answer comes before that."""


@dataclass
class Caller:
    """Reads what nobody else has, writes what nobody else writes, and goes away at times.

    Its session has its number in step 1, and in step 2 what it wrote last.
    """

    place: Place
    random: random.Random
    numbers: "count[int]"
    session_id: str = ""
    own: int = 0
    written: set[int] = field(default_factory=set)
    """What may stand in step 2: what was acknowledged last, and what was given up after it."""
    version: int = 0
    patience_s: float = LONGEST_DELAY_S
    """How long the last answer took that was waited for."""
    answered: int = 0
    cancelled: int = 0
    done_all_the_same: int = 0
    """Writes that were given up after they had left."""
    wrong: int = 0

    async def prepare(self) -> None:
        self.own = next(self.numbers)
        self.session_id = await self.place.manager.create_session(workspace_id=f"w{self.own}")
        await self.place.manager.save_steps(
            self.session_id, {1: {"number": self.own}, 2: {"number": self.own}}
        )
        self.written, self.version = {self.own}, 1

    async def work(self, operations: int) -> None:
        calls = (self.read, self.save, self.read_session, self.read_all)
        for _ in range(operations):
            call = self.random.choice(calls)
            if self.random.random() < SHARE:
                await self.give_up(call)
            else:
                begun_s = monotonic_s()
                await call()
                self.patience_s = monotonic_s() - begun_s
                self.answered += 1

    async def give_up(self, call: Callable[[], Awaitable[None]]) -> None:
        calling = asyncio.ensure_future(call())
        await asyncio.wait([calling], timeout=self.random.uniform(0, 1.2 * self.patience_s))
        calling.cancel()
        await asyncio.wait([calling])
        if calling.cancelled():
            self.cancelled += 1
        else:
            calling.result()
            self.answered += 1

    async def read(self) -> None:
        step = await self.place.manager.get_step(self.session_id, 1)
        self.wrong += step is None or step["data"] != {"number": self.own}

    async def read_session(self) -> None:
        session = await self.place.manager.get_session(self.session_id)
        found = session["session_id"], session["workspace_id"]
        self.wrong += found != (self.session_id, f"w{self.own}")

    async def read_all(self) -> None:
        steps = await self.place.manager.get_all_steps(self.session_id)
        self.wrong += steps[1]["data"] != {"number": self.own}
        self.wrong += steps[2]["data"]["number"] not in self.written

    async def save(self) -> None:
        number = next(self.numbers)
        self.written.add(number)
        saved: Any = await self.place.manager.save_step(self.session_id, 2, {"number": number})
        self.wrong += saved["session_id"] != self.session_id or saved["version"] <= self.version
        self.done_all_the_same += saved["version"] - self.version - 1
        self.version = saved["version"]
        self.written = {number}


@pytest.mark.parametrize(
    "durability", ["local", pytest.param("replicated", marks=pytest.mark.chaos)]
)
def test_who_goes_away_leaves_nothing_and_takes_nobodys_answer(
    tmp_path: Path, report: Begin, runs: Runs, durability: str
) -> None:
    row = report(f"operations, about half of them cancelled ({durability})")
    row.runs = runs(10_000 // OPERATIONS)
    with ExitStack() as servers:
        store = servers.enter_context(Valkey.start(tmp_path / "store", repl_diskless_sync_delay=0))
        if durability == "replicated":
            replica = servers.enter_context(
                Valkey.start(tmp_path / "replica", replicaof=(HOST, store.port))
            )
            wait_until(lambda: follows(replica), 10, "the replica follows")
        # The loop that the service runs on.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(measure(row, store, durability))


async def measure(row: Row, store: Valkey, durability: str) -> None:
    numbers = count()
    async with (
        Proxy(store.port) as proxy,
        working_at(f"redis://{HOST}:{proxy.port}/0", durability=durability) as place,
    ):
        callers = [Caller(place, random.Random(n), numbers) for n in range(CALLERS)]
        await asyncio.gather(*(caller.prepare() for caller in callers))
        before = own_tasks()
        proxy.delay(LONGEST_DELAY_S)
        each = -(-row.runs * OPERATIONS // CALLERS)
        await asyncio.gather(*(caller.work(each) for caller in callers))
        proxy.delay(0)
        await asyncio.gather(*(caller.read_all() for caller in callers))

        row.acknowledged = sum(caller.answered for caller in callers)
        wrong = sum(caller.wrong for caller in callers)
        cancelled = sum(caller.cancelled for caller in callers)
        waiting = place.gateway.describe_pool()["waiting"]
        left = await connections_left(place, store)
        row.beside = {
            "cancelled": f"{cancelled:,}",
            "cancelled writes that were done": str(sum(c.done_all_the_same for c in callers)),
            "wrong answers": str(wrong),
            "places left": str(waiting),
            "connections leaked": str(left),
            "tasks left": str(len(own_tasks() - before)),
        }
        assert wrong == 0
        assert (waiting, left) == (0, 0)
        assert own_tasks() - before == set()
        assert cancelled >= 0.4 * (cancelled + row.acknowledged)


async def connections_left(place: Place, store: Valkey) -> int:
    """Count the connections that the store has and the gateway does not know of."""

    def left() -> int:
        known = place.gateway.describe_pool()["connections"]
        listed = store.command("CLIENT", "LIST")
        return sum("name=onboarding " in line for line in listed.splitlines()) - known

    for _ in range(200):
        if left() == 0:
            break
        await asyncio.sleep(0.01)
    return left()


def own_tasks() -> set[Any]:
    """Find the tasks that run, those of a proxy aside."""
    return {
        task
        for task in asyncio.all_tasks()
        if "Proxy." not in getattr(task.get_coro(), "__qualname__", "")
    }


async def test_nobody_is_forgotten_when_a_server_is_left(tmp_path: Path) -> None:
    """A write to a demoted master has the connection made anew, under whoever is cancelled."""
    with Valkey.start(tmp_path / "store") as store:
        async with working_at(f"redis://{HOST}:{store.port}/0") as place:
            store.command("REPLICAOF", HOST, 1)
            lots = random.Random(1)

            async def call(number: int) -> None:
                with suppress(StoreError, TimeoutError):
                    async with asyncio.timeout(lots.random() * 0.05):
                        if number % 2:
                            await place.gateway.write("SET", "k", number)
                        else:
                            await place.gateway.command("GET", "k")

            for _ in range(10):
                await asyncio.gather(*map(call, range(200)))
            assert place.gateway.describe_pool()["waiting"] == 0
            assert await connections_left(place, store) == 0
