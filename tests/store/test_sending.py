"""What is sent says until when it is of use, by the store's clock, and does nothing after that."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app import clock
from app.errors import StoreUnavailableError
from app.onboarding.tasks import Task, TaskStatus
from app.store.gateway import Gateway, RetryPolicy
from app.store.keys import Keys
from app.store.links import PooledLink
from app.store.scripts import load_script
from app.store.tasks import TaskStore
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.store.sessions import WRITES, Place, prepare, working_at
from tests.store.test_gateway import dump
from tests.store.test_scripts import SCRIPTS

HOUR_MS = 3_600_000


class Skew:
    """How far the gateway's host is ahead of the clock that tests go by, in milliseconds."""

    ms = 0

    def now_ms(self) -> int:
        return clock.now_ms() + self.ms


@pytest.fixture
def skew(monkeypatch: pytest.MonkeyPatch) -> Skew:
    skew = Skew()
    monkeypatch.setattr("app.store.gateway.now_ms", skew.now_ms)
    return skew


# --- What is late ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCRIPTS if load_script(name).is_promise])
async def test_no_script_that_promises_something_does_anything_for_a_sending_that_is_late(
    gateway: Gateway, name: str
) -> None:
    keys = ["onboarding:s:metadata", "onboarding:s:progress", "onboarding:s:events"]
    keys += ["onboarding:s:ops", "onboarding:s:step:1", "onboarding:s:draft:1"]
    for key in keys:
        await gateway.command("SET", key, "as it was")
    for off_ms in (-2000, 2000):
        sending = f"{clock.now_ms() + off_ms} 1000"
        args = [sending, *["1"] * 12]
        word, told_ms = await gateway.command(
            "EVAL", load_script(name).text, len(keys), *keys, *args
        )
        assert word == b"late"
        assert abs(int(told_ms) - clock.now_ms()) < 1000
    assert await gateway.command("MGET", *keys) == [b"as it was"] * len(keys)
    assert await gateway.command("DBSIZE") == len(keys)
    await gateway.command("DEL", *keys)


# --- Whose clock is right -------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_host_whose_clock_is_wrong_learns_the_stores_from_one_more_command(
    wired: Place, proxy: Proxy, skew: Skew, hours: int
) -> None:
    session_id = await prepare(wired.manager)
    skew.ms = hours * HOUR_MS
    assert await count_saving(wired, proxy, session_id) == 2
    for _ in range(3):
        assert await count_saving(wired, proxy, session_id) == 1
    # The store's clock steps, or another host is the master.
    skew.ms = -skew.ms
    assert await count_saving(wired, proxy, session_id) == 2
    assert await count_saving(wired, proxy, session_id) == 1


async def test_clocks_that_differ_a_little_cost_nothing(
    wired: Place, proxy: Proxy, skew: Skew
) -> None:
    session_id = await prepare(wired.manager)
    for skew.ms in (-50, 50):
        assert await count_saving(wired, proxy, session_id) == 1


async def count_saving(place: Place, proxy: Proxy, session_id: str) -> int:
    """Save a step and say how many commands that took."""
    before = proxy.commands.copy()
    await place.manager.save_step(session_id, 1, {"a": 1})
    return (proxy.commands - before).total()


class TwoNodes:
    """Answers as two nodes of a Cluster whose clocks are an hour apart; a key tells which one."""

    def __init__(self) -> None:
        self.late = 0

    async def execute_command(self, *parts: Any) -> list[bytes]:
        key, sending = parts[3:5]
        time_ms = clock.now_ms() + (HOUR_MS if key == "ahead" else 0)
        sent_ms, wait_ms = map(int, sending.split(" "))
        # Others get their turn between what was learnt and what is sent next.
        await asyncio.sleep(0)
        if abs(time_ms - sent_ms) > wait_ms:
            self.late += 1
            return [b"late", str(time_ms).encode()]
        return [b"ok"]


def gateway_to(client: Any) -> Gateway:
    return Gateway(
        lambda _: PooledLink(client, send_s=1.5),
        keys=Keys(hash_tag=False),
        lifetime_ms=1000,
        mode="standalone",
        policy=RetryPolicy(base_s=0.001, jitter_s=0.0),
    )


async def test_nodes_whose_clocks_differ_refuse_nobody() -> None:
    nodes = TwoNodes()
    gateway = gateway_to(nodes)
    await asyncio.gather(
        *(gateway.write("SET", key, 1) for key in ("ahead", "right") for _ in range(50))
    )
    assert nodes.late > 0
    assert gateway.failures_last_minute == 0


async def test_who_is_late_again_is_sent_again_after_a_wait_and_refused_at_last() -> None:
    class Astray:
        sent = 0

        async def execute_command(self, *_: Any) -> list[bytes]:
            self.sent += 1
            return [b"late", b"0"]

    astray = Astray()
    gateway = gateway_to(astray)
    with pytest.raises(StoreUnavailableError):
        await gateway.write("SET", "a", 1)
    assert astray.sent == 2 * 4
    assert gateway.failures_last_minute == 4


# --- What was given up ----------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey.start(tmp_path / "apart") as server:
        yield server


async def test_a_store_that_stood_still_does_nothing_for_those_who_have_given_up(
    server: Valkey,
) -> None:
    timeout_s = 0.2
    async with working_at(server.url, redis_timeout_s=timeout_s, retry_attempts=1) as place:
        manager, tasks = place.manager, TaskStore(place.gateway)
        writes: list[Callable[[], Awaitable[Any]]] = [
            lambda: manager.create_session(workspace_id="w"),
            lambda: tasks.create(task("t")),
            lambda: place.gateway.write("HSET", place.gateway.keys.index("config"), "a", "b"),
        ]
        for write in WRITES.values():
            # The first round has the store learn the scripts.
            await write.do(place, await prepare(manager, finalized=write.finalized))
            session_id = await prepare(manager, finalized=write.finalized)
            writes.append(partial(write.do, place, session_id))
        await tasks.create(task("another"))
        await manager.delete_session(await prepare(manager))
        writes.append(partial(manager.delete_session, await prepare(manager)))
        # A connection for each: none could be made meanwhile.
        await asyncio.gather(*(manager.get_session(session_id) for _ in writes))
        before, sent_before = dump(server), scripts_run(server)

        server.freeze()
        try:
            outcomes = await asyncio.gather(*(write() for write in writes), return_exceptions=True)
            await asyncio.sleep(timeout_s)
        finally:
            server.thaw()

        assert {type(each) for each in outcomes} == {StoreUnavailableError}
        server.command("PING")
        assert dump(server) == before
        # Some read first, by a command.
        assert scripts_run(server) - sent_before > 0.8 * len(writes)


def scripts_run(server: Valkey) -> int:
    """Count the scripts that the server has run by their digest."""
    return int(server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"])


def task(task_id: str) -> Task:
    return Task(
        task_id=task_id,
        short_id="s",
        task_type="image_analysis",
        user_id=None,
        session_id=None,
        status=TaskStatus.ACTIVE,
        created_ms=1,
        updated_ms=1,
        operation="0a",
    )
