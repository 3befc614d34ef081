import asyncio
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvloop
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import MasterNotFoundError
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004 - redis-py's is another class than the builtin one
    MaxConnectionsError,
    RedisClusterException,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from app.address import StoreAddress, parse_store_url, unix_address, upstash_address
from app.store.client import close_client, make_client
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, ClusterSet, SentinelSet, Valkey, free_ports, wait_until

PASSWORD = "p@ss /?#%:ü"
SHORT_S = 0.2

sets = pytest.mark.xdist_group("sets")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    directory = tmp_path_factory.mktemp("open")
    with Valkey.start(directory, unixsocket=str(directory / "a b.sock")) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    directory = tmp_path_factory.mktemp("locked")
    alice = ("alice", "on", f">{PASSWORD}", "~*", "+@all")
    with Valkey.start(directory, requirepass=PASSWORD, user=alice) as running:
        yield running


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSet]:
    with SentinelSet.start(tmp_path_factory.mktemp("sentinels")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    with ClusterSet.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@asynccontextmanager
async def tls_proxy(certificate: Path, server: Valkey) -> AsyncIterator[Proxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with Proxy(server.port, tls=context) as proxy:
        yield proxy


@asynccontextmanager
async def client_of(
    address: StoreAddress | str, *, timeout_s: float = 5.0, max_connections: int = 4
) -> AsyncIterator[Any]:
    """A client, untyped: the stubs of Redis and RedisCluster differ."""
    if isinstance(address, str):
        address = parse_store_url(address)
    client = make_client(
        address, timeout_s=timeout_s, max_connections=max_connections, client_name="onboarding-test"
    )
    try:
        yield client
    finally:
        await close_client(client)


async def assert_works(address: StoreAddress | str) -> None:
    script = "redis.call('SET', KEYS[1], ARGV[1]) return redis.call('MGET', KEYS[1], KEYS[2])"
    sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    async with client_of(address) as client:
        assert await client.set("{t}:a", "1") is True
        assert await client.get("{t}:a") == b"1"
        await client.execute_command("EVAL", script, 2, "{t}:a", "{t}:b", "2")
        answer = await client.execute_command("EVALSHA", sha, 2, "{t}:a", "{t}:b", "3")
        assert answer == [b"3", None]


class TestEveryFormConnects:
    async def test_tcp(self, server: Valkey) -> None:
        await assert_works(server.url)

    async def test_valkey_is_redis(self, server: Valkey) -> None:
        await assert_works(f"valkey://localhost:{server.port}")

    async def test_a_unix_socket_with_a_blank_in_its_path(self, server: Valkey) -> None:
        path = str(server.directory / "a b.sock")
        await assert_works(unix_address(path))
        await assert_works(f"unix://{quote(path)}?db=2")
        await assert_works(f"unix://{path}")

    async def test_a_password(self, locked: Valkey) -> None:
        await assert_works(f"redis://:{quote(PASSWORD, safe='')}@{HOST}:{locked.port}/0")

    async def test_an_acl_user(self, locked: Valkey) -> None:
        await assert_works(f"redis://alice:{quote(PASSWORD, safe='')}@{HOST}:{locked.port}/0")

    async def test_a_database(self, server: Valkey) -> None:
        async with client_of(f"redis://{HOST}:{server.port}/3") as client:
            await client.set("only-in-3", "1")
        async with client_of(f"redis://{HOST}:{server.port}?db=3") as client:
            assert await client.get("only-in-3") == b"1"
        async with client_of(server.url) as client:
            assert await client.get("only-in-3") is None

    async def test_resp2_answers_in_the_same_shapes(self, server: Valkey) -> None:
        async def entries(url: str) -> Any:
            async with client_of(url) as client:
                await client.delete("s")
                await client.xadd("s", {"a": "b"}, id="1-1")
                return await client.xread({"s": "0"})

        assert await entries(server.url) == await entries(server.url + "?protocol=2")

    async def test_tls(self, server: Valkey, certificate: Path) -> None:
        async with tls_proxy(certificate, server) as proxy:
            for scheme in ("rediss", "valkeys"):
                await assert_works(
                    f"{scheme}://localhost:{proxy.port}?ssl_ca_certs={quote(str(certificate))}"
                )

    async def test_tls_refuses_a_certificate_that_nobody_vouches_for(
        self, server: Valkey, certificate: Path
    ) -> None:
        async with tls_proxy(certificate, server) as proxy:
            with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                await assert_works(f"rediss://localhost:{proxy.port}")
            await assert_works(f"rediss://localhost:{proxy.port}?ssl_cert_reqs=none")

    async def test_upstash(
        self, locked: Valkey, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with tls_proxy(certificate, locked) as proxy:
            await assert_works(upstash_address(f"rediss://localhost:{proxy.port}", PASSWORD))

    @sets
    async def test_sentinel(self, sentinels: SentinelSet) -> None:
        await assert_works(sentinels.url)

    @sets
    async def test_cluster(self, cluster: ClusterSet) -> None:
        await assert_works(cluster.url)


class TestACommandIsSentOnce:
    async def assert_sent_once(self, client: Any, proxy: Proxy) -> None:
        """The reply to one INCR is lost: the client says so, and the server has done it once."""
        await client.delete("{once}")
        assert await client.execute_command("INCR", "{once}") == 1
        proxy.drop_replies(1, to="INCR")
        with pytest.raises(TimeoutError):
            await client.execute_command("INCR", "{once}")
        assert proxy.commands["INCR"] == 2
        assert await client.get("{once}") == b"2"

    async def test_standalone(self, server: Valkey) -> None:
        async with (
            Proxy(server.port) as proxy,
            client_of(f"redis://{HOST}:{proxy.port}", timeout_s=SHORT_S) as client,
        ):
            await self.assert_sent_once(client, proxy)

    @sets
    async def test_sentinel(self, sentinels: SentinelSet, monkeypatch: pytest.MonkeyPatch) -> None:
        async with (
            Proxy(sentinels.acting_master().port) as proxy,
            client_of(sentinels.url, timeout_s=SHORT_S) as client,
        ):

            async def discover_master(service_name: str) -> tuple[str, int]:
                return HOST, proxy.port

            manager = client.connection_pool.sentinel_manager
            monkeypatch.setattr(manager, "discover_master", discover_master)
            await self.assert_sent_once(client, proxy)

    @sets
    async def test_cluster(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url) as client:
            await client.get("{once}")
            owner = client.get_node_from_key("{once}").port
        async with (
            Proxy(owner) as proxy,
            client_of(cluster.url, timeout_s=SHORT_S) as client,
        ):
            client.nodes_manager.address_remap = lambda address: (
                (HOST, proxy.port) if address[1] == owner else address
            )
            await self.assert_sent_once(client, proxy)

    @pytest.mark.parametrize("fault", ["hold", "reset_all", "refuse"])
    async def test_a_broken_connection_is_no_reason_to_send_again(
        self, server: Valkey, fault: str
    ) -> None:
        async with (
            Proxy(server.port) as proxy,
            client_of(f"redis://{HOST}:{proxy.port}", timeout_s=SHORT_S) as client,
        ):
            await client.get("a")
            proxy.hold()
            sent = asyncio.create_task(client.execute_command("INCR", "a"))
            async with asyncio.timeout(5.0):
                while not proxy.commands["INCR"]:
                    await asyncio.sleep(0.001)
            if fault == "refuse":
                proxy.refuse()
            if fault != "hold":
                proxy.reset_all()
            with pytest.raises(TimeoutError if fault == "hold" else ConnectionError):
                await sent
            if fault == "refuse":
                with pytest.raises(ConnectionError):
                    await client.get("a")
                proxy.accept()
            proxy.release()
            await client.get("a")
            assert proxy.commands["INCR"] == 1

    async def test_a_connection_begins_with_nothing_but_its_name(self, server: Valkey) -> None:
        """No health check, no notifications, no tracking: HELLO, SETNAME and twice SETINFO."""
        async with (
            Proxy(server.port) as proxy,
            client_of(f"redis://{HOST}:{proxy.port}") as client,
        ):
            await client.get("a")
            assert proxy.commands == {"HELLO": 1, "CLIENT": 3, "GET": 1}
            assert "onboarding-test" in str(server.command("CLIENT LIST"))


@sets
class TestAClusterRedirects:
    async def test_moved(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url) as client:
            await client.set("{moved}", "1")
            slot, owner, other = _slot(client, "{moved}")
            client.nodes_manager.slots_cache[slot] = [other]
            assert await client.get("{moved}") == b"1"
            assert client.get_node_from_key("{moved}") == owner

    async def test_moved_leaves_commands_in_flight_alone(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url) as client:
            await client.set("{moved}", "1")
            slot, owner, other = _slot(client, "{moved}")
            waiting = asyncio.create_task(client.execute_command("BLPOP", "{moved}list", 4))
            async with asyncio.timeout(5.0):
                while len(owner._connections) == len(owner._free):
                    await asyncio.sleep(0.001)
            for _ in range(10):
                client.nodes_manager.slots_cache[slot] = [other]
                await client.get("{moved}")
            await client.execute_command("RPUSH", "{moved}list", "x")
            assert await waiting == [b"{moved}list", b"x"]

    @pytest.mark.parametrize("idle", [1, 2, 3, 4])
    async def test_ask_with_any_number_of_idle_connections(
        self, cluster: ClusterSet, idle: int
    ) -> None:
        async with client_of(cluster.url) as client:
            await client.delete("{ask}")
            slot, source, target = _slot(client, "{ask}")
            connections = [target.acquire_connection() for _ in range(idle)]
            for connection in connections:
                target.release(connection)
            with cluster.migrating(slot, source, target):
                assert await client.set("{ask}", idle) is True
                assert await client.get("{ask}") == str(idle).encode()
                await client.delete("{ask}")

    async def test_ask_to_a_node_it_has_not_met(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url) as client:
            await client.delete("{ask}")
            slot, source, target = _slot(client, "{ask}")
            await client.nodes_manager.nodes_cache.pop(target.name).disconnect()
            with cluster.migrating(slot, source, target):
                assert await client.get("{ask}") is None

    async def test_an_error_after_ask_is_raised(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url) as client:
            await client.delete("{ask}")
            slot, source, target = _slot(client, "{ask}")
            with (
                cluster.migrating(slot, source, target),
                pytest.raises(ResponseError, match="value is not an integer"),
            ):
                await client.execute_command("INCRBY", "{ask}", "x")


@sets
async def test_a_master_that_is_away_keeps_no_new_client_of_a_cluster_from_the_others(
    cluster: ClusterSet,
) -> None:
    away, *others = cluster.nodes
    nodes = tuple((HOST, node.port) for node in others)
    ranges = others[0].command("CLUSTER", "SLOTS")
    first, last = next(each[:2] for each in ranges if each[2][1] == others[1].port)
    key = next(key for key in map(str, range(100)) if first <= key_slot(key.encode()) <= last)
    away.freeze()
    try:
        async with client_of(StoreAddress("cluster", nodes=nodes), timeout_s=0.5) as client:
            assert await client.set(key, "1")
    finally:
        away.thaw()


@sets
async def test_the_first_command_of_a_client_of_a_cluster_goes_to_the_node_of_its_key(
    cluster: ClusterSet,
) -> None:
    def refused() -> int:
        told = [node.command("INFO", "errorstats") for node in cluster.nodes]
        return sum(each.get("errorstat_MOVED", {"count": 0})["count"] for each in told)

    before = refused()
    for _ in range(8):
        async with client_of(parse_store_url(cluster.url)) as client:
            await client.get("a")
    assert refused() == before


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_has_broken_says_so_in_every_loop(
    server: Valkey, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def send_over_a_broken_one() -> None:
        async with client_of(parse_store_url(server.url)) as client:
            assert await client.ping()
            (connection,) = client.connection_pool._available_connections
            connection._writer.transport.abort()
            await asyncio.sleep(0)
            with pytest.raises(ConnectionError):
                await connection.send_packed_command([b"PING\r\n"])
            assert not connection.is_connected

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(send_over_a_broken_one())


async def test_a_connection_that_the_server_has_closed_is_not_handed_over(server: Valkey) -> None:
    async with client_of(server.url) as client:
        connection = client.connection_pool.make_connection()
        await connection.connect()
        server.command("CLIENT", "KILL", "TYPE", "normal")
        async with asyncio.timeout(5.0):
            while not connection._reader.at_eof():
                await asyncio.sleep(0.001)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                connection.hand_over()
            await connection.disconnect(nowait=True)


def _slot(client: RedisCluster, key: str) -> tuple[int, ClusterNode, ClusterNode]:
    """The key's slot, the node that has it, and one that does not."""
    owner = client.get_node_from_key(key)
    assert owner is not None
    other = next(node for node in client.get_primaries() if node != owner)
    return key_slot(key.encode()), owner, other


class TestNoConnectionIsFree:
    async def test_standalone(self, server: Valkey) -> None:
        async with client_of(server.url, timeout_s=SHORT_S, max_connections=1) as client:
            await self.assert_waits(client)

    async def test_unix(self, server: Valkey) -> None:
        address = unix_address(str(server.directory / "a b.sock"))
        async with client_of(address, timeout_s=SHORT_S, max_connections=1) as client:
            await self.assert_waits(client)

    @sets
    async def test_sentinel(self, sentinels: SentinelSet) -> None:
        async with client_of(sentinels.url, timeout_s=SHORT_S, max_connections=1) as client:
            await self.assert_waits(client)

    @sets
    async def test_a_cluster_client_cannot_wait(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url, max_connections=1) as client:
            await client.get("{t}")
            _, node, _ = _slot(client, "{t}")
            taken = node.acquire_connection()
            with pytest.raises(MaxConnectionsError) as failure:
                await client.get("{t}")
            assert str(failure.value) == ""
            node.release(taken)
            await client.get("{t}")

    async def assert_waits(self, client: Any) -> None:
        taken = await client.connection_pool.get_connection()
        began = time.monotonic()
        with pytest.raises(ConnectionError) as failure:
            await client.get("a")
        assert time.monotonic() - began >= SHORT_S * 0.9
        assert type(failure.value) is ConnectionError
        assert str(failure.value) == "No connection available."

        waiting = asyncio.create_task(client.get("a"))
        await asyncio.sleep(0)
        await client.connection_pool.release(taken)
        await waiting


class TestACancellationIsHeardWheneverItComes:
    async def test_standalone(self, server: Valkey) -> None:
        await self.assert_heard(server.url)

    async def test_unix(self, server: Valkey) -> None:
        await self.assert_heard(unix_address(str(server.directory / "a b.sock")))

    async def test_tls(self, server: Valkey, certificate: Path) -> None:
        async with tls_proxy(certificate, server) as proxy:
            url = f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={quote(str(certificate))}"
            await self.assert_heard(url)

    @sets
    async def test_sentinel(self, sentinels: SentinelSet) -> None:
        await self.assert_heard(sentinels.url)

    @sets
    async def test_cluster(self, cluster: ClusterSet) -> None:
        await self.assert_heard(cluster.url)

    async def assert_heard(self, address: StoreAddress | str) -> None:
        at_once = 12
        async with client_of(address, max_connections=at_once) as client:
            await asyncio.gather(*(client.get("{t}") for _ in range(at_once)))
            for turns in range(at_once):
                # Nothing comes for longer than anybody waits here.
                asking = asyncio.create_task(client.execute_command("BLPOP", "{t}:none", 4))
                for _ in range(turns):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking], timeout=2)
                assert asking.cancelled(), turns


class TestWhatAFailureLooksLike:
    """The classes that `app/store/faults.py` tells apart."""

    async def test_nobody_listens(self) -> None:
        (port,) = free_ports(1)
        node = f"{HOST}:{port}"
        assert await _failure(f"redis://{node}") is ConnectionError
        assert await _failure("unix:///nobody/is/here") is ConnectionError
        assert await _failure(f"redis+sentinel://{node}/mymaster") is MasterNotFoundError
        assert await _failure(f"redis+cluster://{node}") is RedisClusterException

    async def test_nobody_answers(self, tmp_path: Path) -> None:
        with Valkey.start(tmp_path) as frozen:
            frozen.freeze()
            node = f"{HOST}:{frozen.port}"
            assert await _failure(f"redis://{node}") is TimeoutError
            assert await _failure(f"redis+sentinel://{node}/mymaster") is MasterNotFoundError
            assert await _failure(f"redis+cluster://{node}") is RedisClusterException

    async def test_the_password_is_wrong(self, locked: Valkey) -> None:
        node = f"{HOST}:{locked.port}"
        assert await _failure(f"redis://{node}") is AuthenticationError
        assert await _failure(f"redis://:wrong@{node}") is AuthenticationError

    @sets
    async def test_the_password_is_wrong_in_a_set(
        self, sentinels: SentinelSet, cluster: ClusterSet
    ) -> None:
        url = sentinels.url.replace("://", "://nobody:wrong@")
        assert await _failure(url) is AuthenticationError
        url = cluster.url.replace("://", "://nobody:wrong@")
        with pytest.raises(RedisClusterException) as failure:
            await assert_works(url)
        assert isinstance(failure.value.__cause__, AuthenticationError)


async def _failure(url: str) -> type[BaseException]:
    async with client_of(url, timeout_s=SHORT_S) as client:
        with pytest.raises(Exception) as failure:  # noqa: PT011 - the class is the answer
            await client.get("a")
        return failure.type


class TestClose:
    async def test_it_leaves_no_connection(self, server: Valkey) -> None:
        async with client_of(server.url) as client:
            await asyncio.gather(*(client.get("a") for _ in range(4)))
        _assert_closed(server)

    @sets
    async def test_nor_to_a_sentinel(self, sentinels: SentinelSet) -> None:
        async with client_of(sentinels.url) as client:
            await client.get("a")
        for each in (sentinels.acting_master(), *sentinels.sentinels):
            _assert_closed(each)

    @sets
    async def test_nor_to_a_cluster_after_a_failure(self, cluster: ClusterSet) -> None:
        async with client_of(cluster.url, timeout_s=SHORT_S) as client:
            for key in "abcdefgh":
                await client.set(key, "1")
            with pytest.raises(TimeoutError):
                await client.execute_command("BLPOP", "{empty}", 0)
        for node in cluster.nodes:
            _assert_closed(node)

    async def test_it_may_come_before_the_first_use_and_twice(self, server: Valkey) -> None:
        nowhere = (
            server.url,
            "redis+sentinel://localhost/mymaster",
            "redis+cluster://localhost",
        )
        for url in nowhere:
            async with client_of(url) as client:
                await close_client(client)


def _assert_closed(server: Valkey) -> None:
    wait_until(
        lambda: "name=onboarding-test" not in str(server.command("CLIENT LIST")),
        5.0,
        "no connection of the client is left",
    )


@sets
class TestSentinels:
    async def test_one_that_is_away_or_stands_still_keeps_nobody_from_the_master(
        self, sentinels: SentinelSet
    ) -> None:
        (dead,) = free_ports(1)
        still, *others = sentinels.sentinels
        nodes = tuple((HOST, port) for port in (dead, *(each.port for each in (still, *others))))
        address = StoreAddress("sentinel", nodes=nodes, service=sentinels.service)
        still.freeze()
        try:
            for _ in range(2):
                async with client_of(address, max_connections=8) as client:
                    began = time.monotonic()
                    await asyncio.gather(*(client.get("a") for _ in range(8)))
                    assert time.monotonic() - began < 0.9
        finally:
            still.thaw()

    async def test_one_that_was_left_behind_is_not_believed(
        self, sentinels: SentinelSet, server: Valkey, tmp_path: Path
    ) -> None:
        """As the one that was cut off together with an old master: it has missed an election."""
        service = "elected"
        master = sentinels.acting_master()
        with Valkey.start_sentinel(tmp_path / "late") as late:
            late.command("SENTINEL", "MONITOR", service, HOST, server.port, 1)
            with Valkey.start_sentinel(tmp_path / "new") as new:
                new.command("SENTINEL", "MONITOR", service, HOST, master.port, 1)
                hello = (HOST, new.port, "0" * 40, 7, service, HOST, master.port, 7)
                new.command("PUBLISH", "__sentinel__:hello", ",".join(map(str, hello)))
                for nodes in ((late, new), (new, late)):
                    address = StoreAddress(
                        "sentinel",
                        nodes=tuple((HOST, each.port) for each in nodes),
                        service=service,
                    )
                    async with client_of(address) as client:
                        assert (await client.info("server"))["tcp_port"] == master.port

    async def test_a_new_master_is_found(self, tmp_path: Path) -> None:
        with SentinelSet.start(tmp_path) as own:
            async with client_of(own.url, timeout_s=SHORT_S) as client:
                await client.set("a", "1")
                await client.execute_command("WAIT", 1, 1000)
                own.master.kill()
                deadline = time.monotonic() + 20.0
                value = None
                while value is None and time.monotonic() < deadline:
                    try:
                        value = await client.get("a")
                    except (ConnectionError, TimeoutError):
                        await asyncio.sleep(0.05)
                assert value == b"1"
            # The sentinel that led tells the others a little later.
            wait_until(lambda: own.acting_master() is own.replica, 10.0, "all know the new master")
