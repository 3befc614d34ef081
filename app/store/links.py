"""How commands reach a store: the ways that a gateway can send by, all alike for it.

- `SharedLink`: over one connection that everybody shares. What the gateway uses.
- `SharedCluster`: the same for a Cluster, one connection for each node that is spoken to.
- `PooledLink`: over connections that are lent to one call at a time. For what would hold others up:
  parts of large bodies, and commands that wait for something to happen.
"""

import asyncio
from collections.abc import Awaitable, Iterable
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.store.client import (
    REDIRECTIONS,
    Client,
    ClusterClient,
    Command,
    close_client,
    leave_server,
    send_and_wait,
)
from app.store.multiplex import SharedConnection

TRY_AGAIN_S = 0.05
"""How long a Cluster's node is left alone while keys of one call are on their way to another."""


class Way(Enum):
    """Over which of its connections a gateway sends."""

    SHARED = auto()
    """The one that everybody shares."""

    CONFIRMED = auto()
    """The one of those who wait for a replica, so that nobody else does."""

    LENT = auto()
    """One for each call, which may keep the server waiting."""


class Link(Protocol):
    """A way to a store, in one event loop."""

    def send(self, key: str, commands: list[Command]) -> Awaitable[Any]:
        """Send commands about the slot of `key` in a row; give the answer to the first.

        Several come only where replicas are asked. Raises the first error among the answers,
        `TooFewReplicasError` when replicas are asked and none has confirmed, and whatever the
        table of faults knows when the store could not be reached.
        """

    async def send_to_all(self, command: Command) -> list[Any]:
        """Ask every server that takes writes, and give their answers."""

    async def leave(self, since_s: float) -> None:
        """Have connections made anew that answered to a call begun at that time.

        `since_s` is one of `clock.monotonic_s`; a connection that is younger, and has answered
        nobody yet, is none of them.
        """

    async def aclose(self) -> None:
        """Close every connection."""

    def describe(self) -> dict[str, int]:
        """Count `connections`, those that are open, and calls that wait for a reply: `waiting`."""


class SharedLink:
    """One connection to one server."""

    def __init__(
        self, client: Redis, *, timeout_s: float, open_s: float, wait_ms: int | None = None
    ) -> None:
        """Take a client that says how its connections are made; see `SharedConnection`."""
        self._client = client
        self._connection = SharedConnection(
            client.connection_pool.make_connection,
            callbacks=dict(client.response_callbacks),
            timeout_s=timeout_s,
            open_s=open_s,
            wait_ms=wait_ms,
        )

    def send(self, _: str, commands: list[Command]) -> Awaitable[Any]:
        """Send commands in a row; see `Link`."""
        return self._connection.send(commands)

    async def send_to_all(self, command: Command) -> list[Any]:
        """Ask the one server; see `Link`."""
        return [await self._connection.send([command])]

    async def leave(self, since_s: float) -> None:
        """Open the connection anew for what comes next; see `Link`."""
        self._connection.leave(since_s)

    async def aclose(self) -> None:
        """Close the connection; see `Link`."""
        await self._connection.aclose()
        await close_client(self._client)

    def describe(self) -> dict[str, int]:
        """Count connections and calls; see `Link`."""
        return _describe([self._connection])


class SharedCluster:
    """One connection to each node of a Cluster, where redis-py knows which slot lies."""

    def __init__(
        self,
        client: ClusterClient,
        *,
        timeout_s: float,
        open_s: float,
        wait_ms: int | None = None,
    ) -> None:
        self._client = client
        self._asks_replicas = wait_ms is not None
        self._options: dict[str, Any] = {
            "callbacks": dict(client.response_callbacks),
            "timeout_s": timeout_s,
            "open_s": open_s,
            "wait_ms": wait_ms,
        }
        self._nodes: dict[str, SharedConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        # How often it was asked for to look, and up to which of these that was done.
        self._asked = 1
        self._looked = 0
        self._looking = asyncio.Lock()
        self._failed: str | None = None

    async def send(self, key: str, commands: list[Command]) -> Any:
        """Send commands to the node of a key, and on to where that sends them; see `Link`.

        A node that answers MOVED, ASK or TRYAGAIN has carried out nothing. Raises the last of these
        after `REDIRECTIONS`, and ASK at once where replicas are asked.
        """
        client = self._client
        asked: ClusterNode | None = None
        for tries_left in reversed(range(REDIRECTIONS)):
            if self.is_to_look:
                await self._look()
            try:
                node = asked or client.node_of(key)
                return await self._to(node).send(commands, asking=asked is not None)
            except MovedError as moved:
                await client.nodes_manager.move_slot(moved)
                asked = None
                if not tries_left:
                    raise
            except AskError as ask:
                if self._asks_replicas or not tries_left:
                    raise
                asked = client.node_at(ask.host, ask.port)
            except TryAgainError:
                if not tries_left:
                    raise
                await asyncio.sleep(TRY_AGAIN_S)
            except (LostConnectionError, StoreTimeoutError, TimeoutError):
                self._failed = node.name
                self._asked += 1
                raise
            except (ClusterDownError, SlotNotCoveredError):
                self._asked += 1
                raise
        raise AssertionError("the last try raises")

    async def send_to_all(self, command: Command) -> list[Any]:
        """Ask every master; see `Link`."""
        if self.is_to_look:
            await self._look()
        nodes = self._client.get_primaries()
        return await asyncio.gather(*(self._to(node).send([command]) for node in nodes))

    async def leave(self, since_s: float) -> None:  # noqa: ARG002 - connections to nodes stay right
        """Ask for the nodes before the next command; see `Link`."""
        self._asked += 1

    async def aclose(self) -> None:
        """Close every connection; see `Link`."""
        for connection in self._nodes.values():
            await connection.aclose()
        await asyncio.gather(*self._closing)
        await close_client(self._client)

    def describe(self) -> dict[str, int]:
        """Count connections and calls; see `Link`."""
        return _describe(self._nodes.values())

    @property
    def is_to_look(self) -> bool:
        """Whether the nodes are to be asked for before the next command."""
        return self._looked < self._asked

    async def _look(self) -> None:
        """Learn where the slots lie, if that is to be looked up."""
        async with asyncio.timeout(self._options["open_s"]), self._looking:
            if not self.is_to_look:
                return
            asked, failed = self._asked, self._failed
            await self._client.learn_nodes(failed)
            self._looked = asked
            if self._failed == failed:
                self._failed = None
        for name, connection in [*self._nodes.items()]:
            if not self._client.knows(name) and not connection.waiting:
                del self._nodes[name]
                closing = asyncio.create_task(connection.aclose())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    def _to(self, node: ClusterNode) -> SharedConnection:
        connection = self._nodes.get(node.name)
        if connection is None:
            make_connection = partial(self._client.make_connection, node)
            connection = SharedConnection(make_connection, **self._options)
            self._nodes[node.name] = connection
        return connection


class PooledLink:
    """Connections that are lent to one call at a time, by redis-py."""

    def __init__(self, client: Client, *, send_s: float, wait_ms: int | None = None) -> None:
        """Take a client; `send_s` is how long one sending may take, whatever it is held up by."""
        self._client = client
        self._send_s = send_s
        self._wait_ms = wait_ms

    async def send(self, key: str, commands: list[Command]) -> Any:
        """Send commands in a row; see `Link`."""
        task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        try:
            async with asyncio.timeout(self._send_s):
                if self._wait_ms is None:
                    return await self._client.execute_command(*commands[0])
                return await send_and_wait(self._client, key, commands, self._wait_ms)
        finally:
            if task is not None and task.cancelling() > before:
                # It may have been lost on the way: one that meets asyncio.timeout as it is entered
                # is taken for the timeout's own.
                raise asyncio.CancelledError

    async def send_to_all(self, command: Command) -> list[Any]:
        """Ask the one server; see `Link`."""
        return [await self._client.execute_command(*command)]

    async def leave(self, since_s: float) -> None:  # noqa: ARG002 - idle ones cost little to make
        """Have every connection made anew; see `Link`."""
        await leave_server(self._client)

    async def aclose(self) -> None:
        """Close every connection; see `Link`."""
        await close_client(self._client)

    def describe(self) -> dict[str, int]:
        """Count nothing; see `Link`."""
        return {"connections": 0, "waiting": 0}


def _describe(connections: Iterable[SharedConnection]) -> dict[str, int]:
    return {
        "connections": sum(each.is_open for each in connections),
        "waiting": sum(each.waiting for each in connections),
    }
