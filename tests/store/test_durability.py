"""Replicated durability: nothing is acknowledged that a replica has not got."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    contextmanager,
)
from functools import partial
from typing import Any

import pytest

from app.errors import SessionNotFoundError, StoreUnavailableError
from app.store.scripts import HINTS, READING
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey, follows, wait_until
from tests.service import BASE
from tests.store.sessions import (
    READS,
    WRITES,
    Place,
    count_events,
    keyed,
    prepare,
    working_at,
)
from tests.store.test_scripts import SCRIPTS, contract_of, files_of

pytestmark = pytest.mark.xdist_group("durability")

WAIT_S = 0.15
"""How long a sending of these tests waits for a replica."""

REPLICATED: dict[str, Any] = {"durability": "replicated", "redis_timeout_s": 2 * WAIT_S}


class Pair:
    """A master and its replica."""

    def __init__(self, master: Valkey, replica: Valkey) -> None:
        self.master = master
        self.replica = replica

    @contextmanager
    def frozen_replica(self) -> Iterator[None]:
        """Hold the replica where it is for the length of a block."""
        self.replica.freeze()
        try:
            yield
        finally:
            self.replica.thaw()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("pair")
    with ExitStack() as stack:
        master = Valkey.start(directory / "master", repl_diskless_sync_delay=0)
        stack.enter_context(master)
        replica = Valkey.start(directory / "replica", replicaof=(HOST, master.port))
        stack.enter_context(replica)
        wait_until(lambda: follows(replica), 10, "the replica follows its master")
        yield Pair(master, replica)


@pytest.fixture
async def place(pair: Pair) -> AsyncIterator[Place]:
    """A manager that waits for the replica."""
    pair.master.command("FLUSHALL")
    async with working_at(pair.master.url, **REPLICATED) as place:
        yield place


@pytest.fixture
async def front(pair: Pair) -> AsyncIterator[Proxy]:
    pair.master.command("FLUSHALL")
    async with Proxy(pair.master.port) as proxy:
        yield proxy


def behind(front: Proxy, **overrides: Any) -> AbstractAsyncContextManager[Place]:
    url = f"redis://{front.host}:{front.port}/0"
    return working_at(url, **{**REPLICATED, **overrides})


class TestOnTheWire:
    async def test_a_write_and_its_wait_are_sent_together(self, front: Proxy, pair: Pair) -> None:
        async with behind(front, redis_timeout_s=5.0) as place:
            session_id = await prepare(place.manager)
            await place.manager.save_step(session_id, 5, {"a": 1})
            front.commands.clear()
            pair.master.freeze()
            try:
                saving = asyncio.create_task(place.manager.save_step(session_id, 5, {"a": 2}))
                async with asyncio.timeout(2):
                    while front.commands.total() < 2:
                        await asyncio.sleep(0.001)
            finally:
                pair.master.thaw()
            assert (await saving)["version"] == 2
            assert front.commands == {"EVALSHA": 1, "WAIT": 1}

    async def test_one_with_an_idempotency_key_brings_a_mark_along(self, front: Proxy) -> None:
        async with behind(front) as place:
            session_id = await prepare(place.manager)
            front.commands.clear()
            await place.manager.save_step(session_id, 5, {"a": 1}, request=keyed())
            assert front.commands == {"EVALSHA": 1, "EVAL": 1, "WAIT": 1}

    async def test_no_read_waits(self, front: Proxy) -> None:
        async with behind(front) as place:
            session_id = await prepare(place.manager, finalized=True)
            await place.generation.store_result(session_id, {"a": 1})
            front.commands.clear()
            for read in READS.values():
                await read(place, session_id)
            assert front.commands["WAIT"] == 0

    async def test_nothing_waits_where_the_master_is_enough(self, front: Proxy) -> None:
        async with behind(front, durability="local") as place:
            session_id = await prepare(place.manager)
            await place.manager.save_step(session_id, 5, {"a": 1}, request=keyed())
            assert front.commands["WAIT"] == 0


class TestAReplicaThatStandsStill:
    async def test_lets_no_write_be_acknowledged_and_reads_go_on(
        self, place: Place, pair: Pair
    ) -> None:
        # Connections that have written before: WAIT knows how far.
        writes: list[Awaitable[Any]] = [
            each.do(place, await prepare(place.manager, finalized=each.finalized))
            for each in WRITES.values()
        ]
        writes.append(place.manager.create_session(workspace_id="w"))
        writes.append(place.manager.delete_session(await prepare(place.manager)))
        read_from = await prepare(place.manager, finalized=True)
        await place.generation.store_result(read_from, {"a": 1})
        with pair.frozen_replica():
            writing = asyncio.gather(*writes, return_exceptions=True)
            while not writing.done():
                for read in READS.values():
                    async with asyncio.timeout(WAIT_S):
                        await read(place, read_from)
            outcomes = await writing
        assert [type(each) for each in outcomes] == [StoreUnavailableError] * len(outcomes)

    async def test_and_no_repeat_is_vouched_for_by_memory(self, place: Place, pair: Pair) -> None:
        manager = place.manager
        saved, patched, finalized = [await prepare(manager) for _ in range(3)]
        before = await count_events(place.gateway, saved)
        again = keyed()

        async def repeat() -> Sequence[Any]:
            return await asyncio.gather(
                manager.save_step(saved, 5, {"a": 5}, request=keyed()),
                manager.patch_step(patched, 1, {"b": 1}, request=keyed()),
                manager.finalize(finalized),
                return_exceptions=True,
            )

        with pair.frozen_replica():
            assert [type(each) for each in await repeat()] == [StoreUnavailableError] * 3
            assert [type(each) for each in await repeat()] == [StoreUnavailableError] * 3
        step, patch, answer = await repeat()
        assert (step["version"], patch["version"]) == (1, 2)
        assert await manager.finalize(finalized) == answer
        assert await manager.save_step(saved, 5, {"a": 5}, request=again) == step
        assert again.replayed
        assert await count_events(place.gateway, saved) == before + 1

    async def test_a_write_that_outlasts_it_takes_effect_once(
        self, place: Place, pair: Pair
    ) -> None:
        session_id = await prepare(place.manager)
        before = await count_events(place.gateway, session_id)
        with pair.frozen_replica():
            saving = asyncio.create_task(place.manager.save_step(session_id, 5, {"a": 5}))
            while place.gateway.failures_last_minute == 0:
                await asyncio.sleep(0.005)
        assert (await saving)["version"] == 1
        assert await count_events(place.gateway, session_id) == before + 1
        pair.master.command("WAIT", 1, 2000)
        key = place.gateway.keys.session(session_id).step(5)
        assert pair.replica.command("GET", key) == pair.master.command("GET", key)

    async def test_a_delete_that_outlasts_it_is_done(self, place: Place, pair: Pair) -> None:
        session_id = await prepare(place.manager)
        with pair.frozen_replica():
            deleting = asyncio.create_task(place.manager.delete_session(session_id))
            while place.gateway.failures_last_minute == 0:
                await asyncio.sleep(0.005)
        await deleting
        with pytest.raises(SessionNotFoundError):
            await place.manager.get_session(session_id)


async def test_a_full_store_deletes_though_the_first_reply_is_lost(
    front: Proxy, pair: Pair
) -> None:
    async with behind(front) as place:
        session_id = await prepare(place.manager)
        pair.master.command("CONFIG", "SET", "maxmemory", 1)
        try:
            front.drop_replies(2)  # the script's and WAIT's
            await place.manager.delete_session(session_id)
        finally:
            pair.master.command("CONFIG", "SET", "maxmemory", 0)
        assert front.commands["EVAL"] > 0
        with pytest.raises(SessionNotFoundError):
            await place.manager.get_session(session_id)


async def test_without_a_replica_the_service_starts_reads_and_says_what_it_cannot_do(
    serve: Callable[..., Awaitable[Any]], session_id: str
) -> None:
    client = await serve(**REPLICATED)
    health = await client.get("/health")
    assert health.json()["status"] == "degraded"
    assert health.json()["reason"] == "too_few_replicas"
    assert health.json()["redis"]["connected"]
    assert not health.json()["redis"]["writable"]
    refused = await client.post(f"{BASE}/session", json={"workspace_id": "w1"})
    assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    assert (await client.get(f"{BASE}/{session_id}")).status_code == 200


async def test_with_a_replica_health_is_ok(
    serve: Callable[..., Awaitable[Any]], pair: Pair
) -> None:
    client = await serve(redis_url=pair.master.url, **REPLICATED)
    assert (await client.get("/health")).json()["status"] == "ok"


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A Cluster of one master with all slots, and its replica."""
    directory = tmp_path_factory.mktemp("shard")
    config: dict[str, Any] = {"cluster_enabled": True, "repl_diskless_sync_delay": 0}
    with ExitStack() as stack:
        master, replica = (
            stack.enter_context(Valkey.start(directory / name, **config)) for name in "ab"
        )
        master.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        replica.command("CLUSTER", "MEET", HOST, master.port, master.bus_port)
        known = str(master.command("CLUSTER", "MYID"))
        wait_until(lambda: known in str(replica.command("CLUSTER", "NODES")), 10, "they met")
        replica.command("CLUSTER", "REPLICATE", known)
        wait_until(lambda: follows(replica), 10, "the replica follows its master")
        for node in (master, replica):
            wait_until(partial(is_ok, node), 10, "the cluster is ok")
        yield Pair(master, replica)


def is_ok(node: Valkey) -> bool:
    return "cluster_state:ok" in str(node.command("CLUSTER", "INFO"))


async def test_on_a_cluster_the_node_that_took_the_script_is_waited_for(shard: Pair) -> None:
    url = f"redis+cluster://{HOST}:{shard.master.port}"
    async with working_at(url, **REPLICATED) as place:
        session_id = await prepare(place.manager)
        for write in WRITES.values():
            made = await prepare(place.manager, finalized=write.finalized)
            await write.do(place, made)
        assert (await place.manager.save_step(session_id, 5, {"a": 1}))["version"] == 1
        with shard.frozen_replica():
            with pytest.raises(StoreUnavailableError):
                await place.manager.save_step(session_id, 5, {"a": 2}, request=keyed())
            await place.manager.get_step(session_id, 5)
        wait_until(lambda: follows(shard.replica), 10, "the replica follows again")
        again = await place.manager.save_step(session_id, 5, {"a": 2}, request=keyed())
        assert again["version"] == 2

        # The client still takes the old master for the one with the slots: it is told MOVED.
        shard.replica.command("CLUSTER", "FAILOVER")
        promoted = partial(shard.replica.command, "ROLE")
        wait_until(lambda: promoted()[0] == "master", 10, "the replica is promoted")
        wait_until(lambda: follows(shard.master), 10, "the old master follows")
        assert (await place.manager.save_step(session_id, 5, {"a": 3}))["version"] == 3


class TestWhatIsWaitedFor:
    def test_scripts_that_only_read_are_those_that_say_so(self) -> None:
        saying = {name for name in SCRIPTS if contract_of(name).endswith(": it reads.")}
        assert saying == READING

    def test_every_hint_is_a_script_and_no_change_of_a_session_is_one(self) -> None:
        assert set(SCRIPTS) >= HINTS
        assert READING.isdisjoint(HINTS)
        assert [name for name in HINTS | READING if "session" in files_of(name)] == []

    def test_what_is_neither_is_a_promise(self) -> None:
        changes = {name for name in SCRIPTS if "session" in files_of(name)}
        others = {"delete_session", "create_task", "change_task", "remove_task", "save_part"}
        others |= {"mend_session", "claim_key", "run_command", "add_job"}
        assert set(SCRIPTS) - READING - HINTS == changes | others
