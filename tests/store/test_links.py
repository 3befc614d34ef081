"""The ways to a store: all answer alike, and the shared one knows its way in a Cluster."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ResponseError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.address import parse_store_url
from app.clock import monotonic_s
from app.settings import Settings
from app.store.client import REDIRECTIONS, ClusterClient, Command, make_client
from app.store.connect import connect
from app.store.faults import Remedy, TooFewReplicasError, judge
from app.store.gateway import Gateway
from app.store.links import Link, PooledLink, SharedCluster, SharedLink
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, ClusterSet, Valkey, wait_until

SHORT_S = 0.3


def client_of(url: str, timeout_s: float) -> Any:
    return make_client(
        parse_store_url(url), timeout_s=timeout_s, max_connections=2, client_name="onboarding-test"
    )


@asynccontextmanager
async def shared(url: str, timeout_s: float = 5.0, **how: Any) -> AsyncIterator[Any]:
    client = client_of(url, timeout_s)
    kind = SharedCluster if isinstance(client, ClusterClient) else SharedLink
    link = kind(client, timeout_s=timeout_s, open_s=1.5 * timeout_s, **how)
    try:
        yield link
    finally:
        await link.aclose()


@asynccontextmanager
async def lent(url: str) -> AsyncIterator[Link]:
    link = PooledLink(client_of(url, 5.0), send_s=5.0)
    try:
        yield link
    finally:
        await link.aclose()


SCRIPT = "return {KEYS[1], ARGV[1], {1, 'x', false}, redis.call('GET', KEYS[1])}"
SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

EVERY_SHAPE: list[Command] = [
    ("SET", "{t}a", "1"),
    ("SET", "{t}a", "2", "NX"),
    ("GET", "{t}a"),
    ("GET", "{t}none"),
    ("EXISTS", "{t}a"),
    ("INCRBY", "{t}a", "x"),
    ("HSET", "{t}h", "f", "1", "g", b"\x00\xff"),
    ("HGET", "{t}h", "f"),
    ("HMGET", "{t}h", "f", "none"),
    ("HGETALL", "{t}h"),
    ("HKEYS", "{t}h"),
    ("HEXISTS", "{t}h", "none"),
    ("HSET", "{t}a", "f", "1"),
    ("SADD", "{t}s", "a"),
    ("SMEMBERS", "{t}s"),
    ("SREM", "{t}s", "a"),
    ("ZADD", "{t}z", "1.5", "a"),
    ("ZRANGE", "{t}z", 0, -1),
    ("ZRANGE", "{t}z", 0, -1, "WITHSCORES"),
    ("ZSCORE", "{t}z", "a"),
    ("XADD", "{t}x", "1-1", "f", "v"),
    ("XREVRANGE", "{t}x", "+", "-", "COUNT", 1),
    ("XREAD", "STREAMS", "{t}x", "0"),
    ("XDEL", "{t}x", "1-1"),
    ("PTTL", "{t}a"),
    ("EVALSHA", "0" * 40, 1, "{t}a"),
    ("EVAL", SCRIPT, 1, "{t}a", "x"),
    ("EVALSHA", SHA, 1, "{t}a", "x"),
    ("EVAL", "return redis.error_reply('OOPS it is')", 1, "{t}a"),
    ("GET", "{t}a", "{t}b"),
    ("DEL", "{t}a", "{t}h", "{t}s", "{t}z", "{t}x"),
]


async def outcome(link: Link, command: Command) -> Any:
    try:
        answer = await link.send("{t}", [command])
    except Exception as failure:  # noqa: BLE001 - it is the outcome
        return type(failure), str(failure)
    return type(answer), answer


async def assert_alike(url: str) -> None:
    async with lent(url) as one, shared(url) as other:
        await one.send("{t}", [EVERY_SHAPE[-1]])
        expected = [await outcome(one, command) for command in EVERY_SHAPE]
        assert [await outcome(other, command) for command in EVERY_SHAPE] == expected
        assert expected[0] == (bool, True)
        assert expected[5][0] is ResponseError
        assert expected[25][0] is NoScriptError


class TestASharedLinkAnswersAsALentOneDoes:
    @pytest.mark.parametrize("options", ["", "?protocol=2", "?db=3"])
    async def test_on_one_server(self, valkey: Valkey, options: str) -> None:
        await assert_alike(f"redis://{HOST}:{valkey.port}{options}")

    async def test_when_every_server_is_asked(self, valkey: Valkey) -> None:
        async with lent(valkey.url) as one, shared(valkey.url) as other:
            (told,), (expected,) = [
                await each.send_to_all(("INFO", "memory")) for each in (other, one)
            ]
            assert told.keys() == expected.keys()
            assert told["maxmemory"] == expected["maxmemory"]

    async def test_when_nobody_is_there(self) -> None:
        async with shared(f"redis://{HOST}:1") as link:
            with pytest.raises(LostConnectionError):
                await link.send("a", [("GET", "a")])
            assert link.describe() == {"connections": 0, "waiting": 0}


async def test_what_is_open_and_who_waits_is_counted(valkey: Valkey) -> None:
    async with Proxy(valkey.port) as proxy, shared(f"redis://{HOST}:{proxy.port}") as link:
        assert link.describe() == {"connections": 0, "waiting": 0}
        await link.send("a", [("GET", "a")])
        assert link.describe() == {"connections": 1, "waiting": 0}
        proxy.hold()
        asked = [asyncio.ensure_future(link.send("a", [("GET", "a")])) for _ in range(3)]
        await asyncio.sleep(0)
        assert link.describe() == {"connections": 1, "waiting": 3}
        proxy.release()
        await asyncio.gather(*asked)


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_every_event_loop_has_a_connection_of_its_own(
    settings: Settings, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def use(gateway: Gateway, name: str) -> None:
        names = [f"{name}{number}" for number in range(20)]
        for each in names:
            await gateway.write("SETEX", each, 60, each)
        answers = await asyncio.gather(*(gateway.command("GET", each) for each in names))
        assert answers == [each.encode() for each in names]
        assert gateway.describe_pool() == {"connections": 1, "waiting": 0}

    gateway = connect(settings)
    with (
        asyncio.Runner(loop_factory=make_loop) as first,
        asyncio.Runner(loop_factory=make_loop) as second,
    ):
        for _ in range(2):
            first.run(use(gateway, "first"))
            second.run(use(gateway, "second"))
        first.run(gateway.aclose())
        second.run(use(gateway, "second"))
        second.run(gateway.aclose())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    directory = tmp_path_factory.mktemp("cluster")
    with ClusterSet.start(directory, replicas=1, repl_diskless_sync_delay=0) as running:
        yield running


def node_at(cluster: ClusterSet, port: int) -> Valkey:
    return next(node for node in (*cluster.nodes, *cluster.replicas) if node.port == port)


def slot_of(link: SharedCluster, key: str) -> tuple[int, Any, Any]:
    """The key's slot, the node that has it, and one that does not."""
    owner = link._client.node_of(key)
    other = next(node for node in link._client.get_primaries() if node != owner)
    return key_slot(key.encode()), owner, other


@pytest.mark.xdist_group("sets")
class TestACluster:
    async def test_answers_as_over_lent_connections(self, cluster: ClusterSet) -> None:
        await assert_alike(cluster.url)

    async def test_every_key_goes_to_its_node_at_once(self, cluster: ClusterSet) -> None:
        def refused() -> int:
            told = [node.command("INFO", "errorstats") for node in cluster.nodes]
            return sum(each.get("errorstat_MOVED", {"count": 0})["count"] for each in told)

        before = refused()
        for _ in range(3):
            async with shared(cluster.url) as link:
                keys = [f"k{number}" for number in range(30)]
                await asyncio.gather(*(link.send(key, [("SET", key, key)]) for key in keys))
                answers = await asyncio.gather(*(link.send(key, [("GET", key)]) for key in keys))
                assert answers == [key.encode() for key in keys]
                assert link.describe() == {"connections": 3, "waiting": 0}
        assert refused() == before

    async def test_every_master_is_asked(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            ports = {each["tcp_port"] for each in await link.send_to_all(("INFO", "server"))}
            assert ports == {node.port for node in cluster.nodes}

    async def test_moved_is_followed_and_remembered(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send("{moved}", [("SET", "{moved}", "1")])
            slot, owner, other = slot_of(link, "{moved}")
            link._client.nodes_manager.slots_cache[slot] = [other]
            asked = [link.send("{moved}", [("GET", "{moved}")]) for _ in range(20)]
            assert await asyncio.gather(*asked) == [b"1"] * 20
            assert link._client.node_of("{moved}") == owner

    async def test_a_slot_that_has_moved_is_found(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send("{gone}", [("DEL", "{gone}")])
            slot, owner, other = slot_of(link, "{gone}")
            for source, target in ((owner, other), (other, owner)):
                name = node_at(cluster, target.port).command("CLUSTER", "MYID")
                for port in (target.port, source.port):
                    node_at(cluster, port).command("CLUSTER", "SETSLOT", slot, "NODE", name)
                assert await link.send("{gone}", [("SET", "{gone}", "1")]) is True
                assert link._client.node_of("{gone}") == target
                assert await link.send("{gone}", [("DEL", "{gone}")]) == 1

    async def test_a_slot_that_two_nodes_send_each_other_is_given_up(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url) as link:
            await link.send("{astray}", [("GET", "{astray}")])
            slot, owner, other = slot_of(link, "{astray}")
            first, second = node_at(cluster, owner.port), node_at(cluster, other.port)

            def refused() -> int:
                told = [each.command("INFO", "errorstats") for each in (first, second)]
                return sum(each.get("errorstat_MOVED", {"count": 0})["count"] for each in told)

            before = refused()
            first.command("CLUSTER", "SETSLOT", slot, "NODE", second.command("CLUSTER", "MYID"))
            try:
                with pytest.raises(MovedError):
                    await link.send("{astray}", [("GET", "{astray}")])
            finally:
                first.command("CLUSTER", "SETSLOT", slot, "NODE", first.command("CLUSTER", "MYID"))
            assert refused() == before + REDIRECTIONS

    async def test_ask_is_followed(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send("{ask}", [("DEL", "{ask}")])
            slot, source, target = slot_of(link, "{ask}")
            with cluster.migrating(slot, source, target):
                asked = [link.send("{ask}", [("INCR", "{ask}")]) for _ in range(20)]
                # What is on its way to the same node meanwhile gets no ASKING that is not its own.
                other = [link.send("{moved}", [("ECHO", "a")]) for _ in range(20)]
                assert sorted(await asyncio.gather(*asked)) == list(range(1, 21))
                assert await asyncio.gather(*other) == [b"a"] * 20
                with pytest.raises(ResponseError, match="value is not an integer"):
                    await link.send("{ask}", [("INCRBY", "{ask}", "x")])
                assert await link.send("{ask}", [("DEL", "{ask}")]) == 1
            assert link._client.node_of("{ask}") == source

    async def test_ask_to_a_node_that_it_has_not_met(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send("{ask}", [("DEL", "{ask}")])
            slot, source, target = slot_of(link, "{ask}")
            await link._client.nodes_manager.nodes_cache.pop(target.name).disconnect()
            with cluster.migrating(slot, source, target):
                assert await link.send("{ask}", [("GET", "{ask}")]) is None

    async def test_ask_is_left_to_be_tried_later_where_replicas_are_asked(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url, wait_ms=1000) as link:
            assert await link.send("{ask}", [("DEL", "{ask}")]) in (0, 1)
            slot, source, target = slot_of(link, "{ask}")
            with (
                cluster.migrating(slot, source, target),
                pytest.raises(AskError),
            ):
                await link.send("{ask}", [("SET", "{ask}", "1"), ("SET", "{ask}2", "1")])
            assert await link.send("{ask}", [("SET", "{ask}", "1"), ("DEL", "{ask}")]) is True

    async def test_keys_that_are_on_their_way_are_waited_for(
        self, cluster: ClusterSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.store.links.TRY_AGAIN_S", 0.01)
        async with shared(cluster.url) as link:
            await link.send("{try}", [("SET", "{try}a", "1")])
            await link.send("{try}", [("DEL", "{try}b")])
            slot, source, target = slot_of(link, "{try}")
            both: list[Command] = [("MGET", "{try}a", "{try}b")]
            told = node_at(cluster, source.port)

            def refused() -> int:
                stats = told.command("INFO", "errorstats")
                return int(stats.get("errorstat_TRYAGAIN", {"count": 0})["count"])

            before = refused()
            with cluster.migrating(slot, source, target):
                with pytest.raises(TryAgainError):
                    await link.send("{try}", both)
                assert refused() == before + REDIRECTIONS
                monkeypatch.setattr("app.store.links.TRY_AGAIN_S", 0.1)
                asked = asyncio.create_task(link.send("{try}", both))
                while refused() == before + REDIRECTIONS:
                    await asyncio.sleep(0.001)
            assert await asked == [b"1", None]

    async def test_too_few_replicas_are_told_by_the_node_of_the_key(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url, wait_ms=100) as link:
            assert await link.send("{few}", [("SET", "{few}", "1")]) is True
            _, owner, other = slot_of(link, "{few}")
            replica = cluster.replicas[cluster.nodes.index(node_at(cluster, owner.port))]
            replica.freeze()
            try:
                with pytest.raises(TooFewReplicasError):
                    await link.send("{few}", [("SET", "{few}", "2")])
                elsewhere = next(
                    key
                    for key in map(str, range(100))
                    if link._client.node_of(key).port == other.port
                )
                assert await link.send(elsewhere, [("SET", elsewhere, "1")]) is True
            finally:
                replica.thaw()

    async def test_a_slot_that_nobody_serves_has_the_nodes_asked_again(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url) as link:
            await link.send("{none}", [("GET", "{none}")])
            slot, _, _ = slot_of(link, "{none}")
            link._client.nodes_manager.slots_cache[slot] = []
            with pytest.raises(SlotNotCoveredError):
                await link.send("{none}", [("GET", "{none}")])
            assert await link.send("{none}", [("GET", "{none}")]) is None

    async def test_when_it_is_down_the_nodes_are_asked_again(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send("{down}", [("GET", "{down}")])
            slot, owner, _ = slot_of(link, "{down}")
            node = node_at(cluster, owner.port)
            node.command("CLUSTER", "DELSLOTS", slot)
            try:
                with pytest.raises(ClusterDownError):
                    await link.send("{down}", [("GET", "{down}")])
            finally:
                node.command("CLUSTER", "ADDSLOTS", slot)
            assert link.is_to_look
            wait_until(
                lambda: "cluster_state:ok" in str(node.command("CLUSTER", "INFO")), 10, "it is up"
            )
            assert await link.send("{down}", [("GET", "{down}")]) is None

    async def test_what_has_failed_is_asked_last(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url) as link:
            await link.send_to_all(("PING",))
            failed = link._client.get_primaries()[0]
            dead = node_at(cluster, failed.port)
            dead.freeze()
            try:
                for _ in range(12):
                    link._failed = failed.name
                    await link.leave(monotonic_s())
                    begun_s = monotonic_s()
                    await link._look()
                    assert monotonic_s() - begun_s < 1
            finally:
                dead.thaw()

    async def test_nodes_that_are_gone_are_left_by_whoever_looks_first(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url) as link:
            await link.send_to_all(("PING",))
            for port in (1, 2, 3):
                link._to(link._client.node_at("127.0.0.1", port))
            await link.leave(monotonic_s())
            await asyncio.gather(*(link.send(key, [("GET", key)]) for key in "abc"))
            assert link._nodes.keys() == {node.name for node in link._client.get_primaries()}

    async def test_to_look_again_is_not_forgotten_while_somebody_looks(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url) as link:
            looking = asyncio.create_task(link._look())
            await asyncio.sleep(0)
            await link.leave(monotonic_s())
            await looking
            assert link.is_to_look
            await link.send("a", [("GET", "a")])
            assert not link.is_to_look

    async def test_a_key_that_a_script_derives_in_a_slot_that_moves_is_no_damage(
        self, cluster: ClusterSet
    ) -> None:
        script = "return redis.call('EXISTS', KEYS[1], KEYS[1] .. 'none')"
        async with shared(cluster.url) as link:
            await link.send("{derived}", [("SET", "{derived}", "1")])
            slot, source, target = slot_of(link, "{derived}")
            with (
                cluster.migrating(slot, source, target),
                pytest.raises(ResponseError) as refused,
            ):
                await link.send("{derived}", [("EVAL", script, 1, "{derived}")])
            fault = judge(refused.value)
            assert fault is not None
            assert fault.remedy is Remedy.RETRY

    async def test_a_queue_is_read_while_the_master_that_knew_the_commands_is_down(
        self, cluster: ClusterSet
    ) -> None:
        client = client_of(cluster.url, SHORT_S)
        link = PooledLink(client, send_s=2.0)
        await client.initialize()
        told = client.commands_parser.node
        key = next(key for key in map(str, range(100)) if client.node_of(key).name != told.name)
        await link.send(key, [("XGROUP", "CREATE", key, "g", "$", "MKSTREAM")])
        read: Command = ("XREADGROUP", "GROUP", "g", "me", "STREAMS", key, ">")
        dead = node_at(cluster, told.port)
        dead.freeze()
        try:
            assert not await link.send("", [read])
        finally:
            dead.thaw()
            await link.aclose()

    async def test_to_leave_it_is_to_ask_for_the_nodes_and_keep_the_connections(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url) as link:
            await link.send_to_all(("PING",))
            wires = [link._to(node)._wire for node in link._client.get_primaries()]
            await link.leave(monotonic_s())
            assert link.is_to_look
            await link.send_to_all(("PING",))
            assert [link._to(node)._wire for node in link._client.get_primaries()] == wires

    async def test_closing_leaves_no_connection(self, cluster: ClusterSet) -> None:
        for node in (*cluster.nodes, *cluster.replicas):
            wait_until(
                lambda node=node: "name=onboarding-test" not in str(node.command("CLIENT LIST")),  # type: ignore[misc]
                5.0,
                "no connection is left",
            )

    async def test_a_node_that_is_away_keeps_nobody_from_the_others(
        self, cluster: ClusterSet
    ) -> None:
        async with shared(cluster.url, SHORT_S) as link:
            await link.send_to_all(("PING",))
            _, owner, other = slot_of(link, "{away}")
            served = next(
                key for key in map(str, range(100)) if link._client.node_of(key).port == other.port
            )
            away = node_at(cluster, owner.port)
            away.freeze()
            try:
                lost = asyncio.create_task(link.send("{away}", [("SET", "{away}", "1")]))
                for _ in range(10):
                    assert await link.send(served, [("SET", served, "1")]) is True
                with pytest.raises(StoreTimeoutError):
                    await lost
                assert await link.send(served, [("SET", served, "1")]) is True
            finally:
                away.thaw()
            assert await link.send("{away}", [("SET", "{away}", "1")]) is True

    async def test_a_replica_that_was_promoted_is_found(self, cluster: ClusterSet) -> None:
        async with shared(cluster.url, SHORT_S) as link:
            await link.send("{dead}", [("SET", "{dead}", "1")])
            _, owner, _ = slot_of(link, "{dead}")
            dead = node_at(cluster, owner.port)
            heir = cluster.replicas[cluster.nodes.index(dead)]
            node_at(cluster, owner.port).command("WAIT", 1, 1000)
            dead.kill()
            with pytest.raises(LostConnectionError):
                await link.send("{dead}", [("GET", "{dead}")])
            heir.command("CLUSTER", "FAILOVER", "TAKEOVER")
            async with asyncio.timeout(10):
                while True:
                    try:
                        assert await link.send("{dead}", [("GET", "{dead}")]) == b"1"
                        break
                    except (LostConnectionError, StoreTimeoutError, ClusterDownError):
                        await asyncio.sleep(0.01)
            assert link._client.node_of("{dead}").port == heir.port
