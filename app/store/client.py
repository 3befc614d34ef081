"""Make the redis-py client for an address, with everything switched off that acts by itself.

redis-py retries in three places of its own: a connection, the clients that ask the sentinels, a
Cluster client. Here none of them does: a command whose reply was lost may have been carried out,
so only the gateway sends one again, which knows what is safe. What stays are a Cluster's MOVED,
ASK and TRYAGAIN, where the node that answers so has refused the command.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    Redis,
    RedisCluster,
    Sentinel,
    SentinelConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.cluster import ClusterNode, PipelineCommand
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.cluster import PRIMARY
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import MovedError, RedisError
from redis.exceptions import TimeoutError as StoreTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from app.address import StoreAddress
from app.store.faults import TooFewReplicasError

Command = tuple[str | bytes | int, ...]
Client = Redis | RedisCluster

REDIRECTIONS = 5
"""How often a Cluster may send commands on to another node before that counts as a failure."""

ALL_SENTINELS_S = 0.2
"""How long all sentinels are waited for, in seconds; after that half of them is enough."""

CANCEL_AGAIN_S = 0.1
"""How soon a task that did not end is cancelled again, in seconds."""


def make_client(
    address: StoreAddress, *, timeout_s: float, max_connections: int, client_name: str
) -> Client:
    """Make a client that sends every command once; it connects when it is first used.

    `timeout_s` limits each step: the wait for a free connection (but not the wait for others who
    wait for one, which only its caller can limit), connecting, every reply. One command may need
    several, since a new connection first asks the sentinels, and a Cluster client its nodes in
    turn. `max_connections` is the size of the pool, in a Cluster of each node's. `client_name` is
    what CLIENT LIST shows. Replies are bytes, in redis-py's unified shapes.

    When no connection becomes free in time, a command raises ConnectionError("No connection
    available."); a Cluster client cannot wait and raises MaxConnectionsError at once.
    """
    common: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "client_name": client_name,
        "retry": Retry(NoBackoff(), 0),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        **_further(address),
    }
    data: dict[str, Any] = {
        "username": address.username,
        "password": address.password,
        "legacy_responses": False,
        **common,
    }
    if address.mode == "cluster":
        return ClusterClient(
            startup_nodes=[ClusterNode(host, port) for host, port in address.nodes],
            max_connections=max_connections,
            # By default every fifth MOVED closes all connections, under commands in flight too.
            reinitialize_steps=0,
            ssl=address.tls,
            **data,
        )
    data |= {"db": address.db, "max_connections": max_connections, "timeout": timeout_s}
    if address.mode == "sentinel":
        return Redis.from_pool(_sentinel_pool(address, common, data, max_connections))
    if address.unix_socket is not None:
        data |= {"connection_class": _UnixConnection, "path": address.unix_socket}
    else:
        host, port = address.nodes[0]
        kind = _TlsConnection if address.tls else _TcpConnection
        data |= {"connection_class": kind, "host": host, "port": port}
    return Redis.from_pool(_Pool(**data))


async def send_and_wait(client: Client, key: str, commands: list[Command], wait_ms: int) -> Any:
    """Send commands about the slot of `key`, and have a replica confirm what they wrote.

    All of it goes over one connection in one round trip: WAIT counts replicas that have what its
    own connection wrote, and does not wait inside a script or a transaction. Gives the answer to
    the first command. Raises the first error among the answers, and `TooFewReplicasError` when no
    replica has confirmed within `wait_ms`.
    """
    row = [*commands, ("WAIT", 1, wait_ms)]
    if isinstance(client, ClusterClient):
        answers = await client.send_in_a_row(key, row)
    else:
        pipeline = client.pipeline(transaction=False)
        for command in row:
            pipeline.execute_command(*command)
        answers = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    if answers[-1] < 1:
        raise TooFewReplicasError
    return answers[0]


async def leave_server(client: Client) -> None:
    """Have every connection made anew before it is used again: the master may be another one.

    Those in use finish what they are doing. A client of sentinels asks them again, one of a Cluster
    asks for its nodes, any other looks its host up again.
    """
    if isinstance(client, RedisCluster):
        cast("ClusterClient", client).look_again()
        return
    await cast("_Pool", client.connection_pool).leave()


async def close_client(client: Client) -> None:
    """Close every connection of a client from `make_client`, those in use too."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        # After an error the client counts as not initialized, and its aclose() does nothing.
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")
    elif isinstance(client.connection_pool, SentinelConnectionPool):
        await client.connection_pool.sentinel_manager.aclose()


async def end_task(task: asyncio.Task[Any]) -> None:
    """End a task that uses a client; what it is doing is given up.

    Once is not enough: a cancellation that meets asyncio.timeout as it is entered is taken for the
    timeout's own and lost (seen with redis-py's check of an idle connection).
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)


def _further(address: StoreAddress) -> dict[str, Any]:
    """Give the URL's options as redis-py's arguments, without those for the sentinels."""
    further: dict[str, Any] = {
        name: value for name, value in address.options.items() if not name.startswith("sentinel_")
    }
    if "protocol" in further:
        further["protocol"] = int(further["protocol"])
    if "ssl_check_hostname" in further:
        further["ssl_check_hostname"] = further["ssl_check_hostname"] == "true"
    return further


def _sentinel_pool(
    address: StoreAddress, common: dict[str, Any], data: dict[str, Any], max_connections: int
) -> SentinelConnectionPool:
    sentinels = _Sentinels(
        address.nodes,
        sentinel_kwargs={
            "username": address.options.get("sentinel_username"),
            "password": address.options.get("sentinel_password"),
            "ssl": address.tls,
            # Every connection of the pool may ask at once, after a failover.
            "max_connections": max_connections,
            **common,
        },
    )
    for each in sentinels.sentinels:
        # A client that is made by host and port takes no class for its connections.
        each.connection_pool.connection_class = _TlsConnection if address.tls else _TcpConnection
    kind = _SentinelTlsConnection if address.tls else _SentinelConnection
    return _WaitingSentinelPool(  # type: ignore[no-untyped-call]
        address.service, sentinels, connection_class=kind, **data
    )


class SteadyConnection(AbstractConnection):
    """A connection on which no cancellation is lost, and that says when it has broken.

    redis-py sends through asyncio.wait_for, which before Python 3.12 takes no notice of a
    cancellation that comes as it is done: the reply was then waited for as though nobody had given
    it up. It sends in a task of its own, too, and a connection that was closed before that began is
    an AttributeError. One that has broken is a RuntimeError on uvloop.
    """

    def hand_over(self) -> tuple[asyncio.StreamWriter, Callable[[str], Exception]]:
        """Give away what an open connection writes to, and what makes an error of a reply's text.

        What is left is a connection that is not open. The writer closes its transport when nobody
        holds it any more. Raises ConnectionError for one that the server has closed already: of
        that, who takes it over would not hear.
        """
        reader, writer = self._reader, self._writer
        if reader is None or writer is None or reader.at_eof() or writer.transport.is_closing():
            raise LostConnectionError("The server closed the connection")
        self._reader = self._writer = None
        return writer, self._parser.parse_error

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        """Send what was packed, as redis-py does. Raises what redis-py raises."""
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        writer: Any = self._writer
        try:
            async with asyncio.timeout(self.socket_timeout):
                if isinstance(command, str):
                    command = command.encode()
                writer.writelines([command] if isinstance(command, bytes) else command)
                await writer.drain()
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise StoreTimeoutError("Timeout writing to socket") from None
        except (OSError, RuntimeError) as failure:
            await self.disconnect(nowait=True)
            raise LostConnectionError("The connection was lost while writing") from failure
        except BaseException:
            # What was written by half must not be followed by anything.
            await self.disconnect(nowait=True)
            raise


class _TcpConnection(SteadyConnection, Connection):
    pass


class _TlsConnection(SteadyConnection, SSLConnection):
    pass


class _UnixConnection(SteadyConnection, UnixDomainSocketConnection):
    pass


class _SentinelConnection(SteadyConnection, SentinelManagedConnection):
    pass


class _SentinelTlsConnection(SteadyConnection, SentinelManagedSSLConnection):
    pass


class _Pool(BlockingConnectionPool):
    """A pool that gets every connection back, whatever is cancelled.

    redis-py closes a connection that is to be made anew while it holds the lock of the pool, and
    waits until that is done: with TLS as long as the other end takes to agree. Who gives one back
    meanwhile waits for that lock, and when they are cancelled there it counts as in use for ever.
    Closed before that, and without a wait, nobody waits for the lock.
    """

    async def release(self, connection: AbstractConnection) -> None:
        """Take a connection back."""
        if connection.should_reconnect():  # type: ignore[no-untyped-call]
            await connection.disconnect(nowait=True)
        await super().release(connection)

    async def leave(self) -> None:
        """Have every connection made anew before it is used again. Waits for nobody."""
        await self.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
        await self.close_idle()

    async def close_idle(self) -> None:
        """Close the connections that nobody uses. Waits for nobody."""
        for connection in [*self._available_connections]:
            await connection.disconnect(nowait=True)


class _WaitingSentinelPool(SentinelConnectionPool, _Pool):
    """The Sentinel pool, waiting `timeout` seconds for a free connection like the blocking one."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Close connections; the idle ones, as when the master is another one, without a wait."""
        if inuse_connections:
            await super().disconnect()
        else:
            await self.close_idle()


class _Sentinels(Sentinel):
    """Sentinels that are all asked, and of which the one is believed that knows of the last change.

    redis-py believes the first that answers. But one that was cut off together with an old master
    names that one for as long as this lasts, and so does, for a moment, one that has just started.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._asking: set[asyncio.Task[Any]] = set()

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Find the master. Raises MasterNotFoundError."""
        asking = [asyncio.create_task(_ask(each, service_name)) for each in self.sentinels]
        for each in asking:
            # Nobody gives up one that is slow: its connection would have to be made for each call,
            # and where sentinels are far it would never be made in time.
            self._asking.add(each)
            each.add_done_callback(self._asking.discard)
        answered, waiting = await asyncio.wait(asking, timeout=ALL_SENTINELS_S)
        while waiting and 2 * sum(each.result() is not None for each in answered) < len(asking):
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answered |= more
        last: dict[str, Any] = max(
            (state for each in answered if (state := each.result())), key=_rank, default={}
        )
        if not last or not self.check_master_state(last, service_name):
            raise MasterNotFoundError(f"No master found for {service_name!r}")
        return last["ip"], last["port"]

    async def aclose(self) -> None:
        """Close the connections to the sentinels."""
        for each in list(self._asking):
            await end_task(each)
        await super().aclose()


async def _ask(sentinel: Redis, service_name: str) -> dict[str, Any] | None:
    """Ask a sentinel what it knows of a master; None when it does not answer, or knows none."""
    try:
        masters: Any = await sentinel.sentinel_masters()
    except (RedisError, OSError):
        return None
    state: dict[str, Any] | None = masters.get(service_name)
    return state


def _rank(state: dict[str, Any]) -> tuple[int, bool, bool]:
    """Say how much what a sentinel knows is worth: more, the later the change that it knows of.

    During a failover the one that leads it is the last to name the new master.
    """
    return state["config-epoch"], not state["is_sdown"], "failover" not in str(state["flags"])


class ClusterClient(RedisCluster):
    """A Cluster client that follows ASK, which a node answers while a slot moves away from it.

    redis-py 8.1 sends ASKING and the command one after the other on whichever connection has been
    idle longest: with an even number of idle ones they never meet, and all 16 tries fail. To a
    node that it does not know yet it cannot send at all.

    And once it knows the nodes, it asks the first master among them what commands there are: while
    that one is down, it would reach no other either.
    """

    def __init__(self, *, ssl: bool, **kwargs: Any) -> None:
        super().__init__(ssl=ssl, **kwargs)
        # It takes no class for its connections; nodes that it finds get these arguments too.
        kind = _TlsConnection if ssl else _TcpConnection
        self.connection_kwargs["connection_class"] = kind
        for node in self.startup_nodes:
            node.connection_class = kind

    async def initialize(self, *args: Any, **kwargs: Any) -> RedisCluster:
        """Learn the nodes, if they are not known; when the first master fails, ask the next."""
        try:
            return await super().initialize(*args, **kwargs)
        except BaseException as failure:
            for node in self.nodes_manager.get_nodes_by_server_type(PRIMARY)[:1]:
                self.nodes_manager.move_node_to_end_of_cached_nodes(node.name)
            if not isinstance(failure, LostConnectionError | StoreTimeoutError):
                raise
        return await super().initialize(*args, **kwargs)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Send a command; one that comes before the nodes are known would go to any of them."""
        await self.initialize()
        return await super().execute_command(*args, **kwargs)

    async def _determine_slot(self, command: str, *args: Any) -> int:
        """Find the slot of a command.

        Where XREADGROUP has its key, redis-py asks a node, and one alone: while that does not
        answer, no queue could be read on any other.
        """
        if command != "XREADGROUP":
            return await super()._determine_slot(command, *args)
        return self.keyslot(args[args.index("STREAMS") + 1])

    def get_node(
        self, host: str | None = None, port: int | None = None, node_name: str | None = None
    ) -> ClusterNode | None:
        """Find a node; one asked for by name, as after ASK, is added when it is not known."""
        node = super().get_node(host, port, node_name)
        if node_name is None:
            return node
        if node is None:
            new_host, _, new_port = node_name.rpartition(":")
            node = self.node_at(new_host, int(new_port))
        return cast("ClusterNode", _AskedNode(node))

    async def send_in_a_row(self, key: str, commands: list[Command]) -> list[Any]:
        """Send commands to the node of a key, on one connection; errors are among the answers.

        A node that answers MOVED has carried out nothing, and the next one is asked. ASK is left to
        be tried again later.
        """
        answers: list[Any] = []
        for _ in range(REDIRECTIONS):
            await self.initialize()
            node = self.get_node_from_key(key)
            pipeline = self.pipeline()
            for command in commands:
                pipeline.execute_command(*command, target_nodes=node)
            answers = await pipeline.execute(raise_on_error=False, allow_redirections=False)
            if type(answers[0]) is not MovedError:
                break
            await self.nodes_manager.move_slot(answers[0])
        if any(isinstance(each, LostConnectionError | StoreTimeoutError) for each in answers):
            self.look_again()
        return answers

    def look_again(self) -> None:
        """Ask for the nodes before the next command. Connections that work stay open."""
        self._initialize = True

    async def learn_nodes(self, failed: str | None) -> None:
        """Ask for the nodes, and the one that has failed after all others; a name, if any has.

        For who sends to nodes by itself, and need not know what commands there are.
        """
        await self.nodes_manager.initialize(last_failed_node_name=failed)

    def knows(self, name: str) -> bool:
        """Say whether there is a node of this name, as far as is known."""
        return name in self.nodes_manager.nodes_cache

    def make_connection(self, node: ClusterNode) -> SteadyConnection:
        """Make a connection to a node that is not open yet."""
        once = {"retry": Retry(NoBackoff(), 0)}
        connection: Any = node.connection_class(**{**node.connection_kwargs, **once})
        return cast("SteadyConnection", connection)

    def node_of(self, key: str) -> ClusterNode:
        """Find the master of a key's slot. Raises SlotNotCoveredError when it is not known."""
        return cast("ClusterNode", self.get_node_from_key(key))

    def node_at(self, host: str, port: int) -> ClusterNode:
        """Find a node by its address; one that is not known yet is added."""
        node = self.nodes_manager.get_node(host=host, port=port)
        if node is None:
            node = ClusterNode(host, port, PRIMARY, **self.connection_kwargs)
            self.nodes_manager.set_nodes(self.nodes_manager.nodes_cache, {node.name: node})
        return node


class _AskedNode:
    """A Cluster node that sends ASKING together with the next command, on one connection."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node
        self._asking = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Send a command; raises what the node itself would raise."""
        if args == ("ASKING",):
            self._asking = True
            return True
        if not self._asking:
            return await self._node.execute_command(*args, **kwargs)
        self._asking = False
        kwargs.pop("asking", None)
        command = PipelineCommand(1, *args, **kwargs)
        await self._node.execute_pipeline([PipelineCommand(0, "ASKING"), command])
        if isinstance(command.result, Exception):
            raise command.result
        return command.result
