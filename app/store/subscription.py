"""One connection on which the store tells this process which logs have grown.

The scripts publish to a channel that has the name of the log. A message only says that there is
something to read; the log itself is what counts, so a lost message delays, and loses nothing.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError

from app.errors import StoreUnavailableError
from app.store.client import Client, close_client, end_task
from app.store.faults import judge

log = structlog.get_logger()

Listener = Callable[[bytes], None]
"""Takes a message; an empty one says that messages may have been missed."""

CONFIRMED_WITHIN_S = 2.0
"""Longest wait for the store to confirm that a channel is listened to, in seconds."""

QUIET_S = 5.0
"""How long the store may say nothing before it is asked whether it is there, and again before the
connection is given up, in seconds."""

PAUSES_S = (0.05, 0.2, 0.5, 1.0)
"""Pauses before the connection is opened again, in seconds; the last one is kept to."""

ANCHOR = "onboarding:index:streams"
"""A channel on which nothing is said. It is always listened to: redis-py reads nothing before the
first channel, and would not notice that a connection without one is lost."""


@dataclass(slots=True, eq=False)
class _Channel:
    """`confirming` is there only while somebody waits: it takes as much as all the rest."""

    listeners: tuple[Listener, ...] = ()
    is_confirmed: bool = False
    confirming: asyncio.Event | None = None

    def confirm(self) -> None:
        """Note that whatever is published from now on is heard."""
        self.is_confirmed = True
        if self.confirming is not None:
            self.confirming.set()
            self.confirming = None


class Subscription:
    """Passes on what is published to any number of channels, over one connection.

    It connects when the first listener comes and again whenever the connection is lost.
    """

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self._make_client = make_client
        self._channels: dict[str, _Channel] = {}
        self._pubsub: Any = None
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def is_connected(self) -> bool:
        """Whether what is published is heard at the moment."""
        return self._pubsub is not None

    async def add(self, name: str, listener: Listener) -> None:
        """Listen to a channel; whatever is published after this returns is passed on.

        Raises `StoreUnavailableError` when the store does not confirm that in time.
        """
        channel = self._channels.setdefault(name, _Channel())
        channel.listeners += (listener,)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_on(), name="subscription")
        try:
            if not channel.is_confirmed:
                confirming = channel.confirming = channel.confirming or asyncio.Event()
                async with asyncio.timeout(CONFIRMED_WITHIN_S):
                    # Also when it is not the first listener, whose word may have been cut short.
                    await self._send(name, wanted=True)
                    await confirming.wait()
        except BaseException as failure:
            self.remove(name, listener)
            if isinstance(failure, TimeoutError):
                raise StoreUnavailableError from None
            raise

    def remove(self, name: str, listener: Listener) -> None:
        """Listen no more. The store is told beside whoever asks, which may be waited for."""
        channel = self._channels.get(name)
        if channel is None:
            return
        channel.listeners = tuple(each for each in channel.listeners if each != listener)
        if not channel.listeners:
            del self._channels[name]
            telling = asyncio.create_task(self._send(name, wanted=False), name="unsubscribe")
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def aclose(self) -> None:
        """Close the connection."""
        self._closing = True
        for telling in list(self._telling):
            await end_task(telling)
        if self._reader is not None:
            await end_task(self._reader)

    async def _send(self, name: str, *, wanted: bool) -> None:
        """Say that a channel is wanted or not, unless that has changed meanwhile."""
        # One at a time: the lock is fair, so what the store hears last is what was said last.
        async with self._sending:
            if self._pubsub is None or (name in self._channels) is not wanted:
                return
            if not self._pubsub.connection.is_connected:
                # It would be opened anew, for nobody to read: the reader begins again.
                return
            try:
                await (self._pubsub.subscribe if wanted else self._pubsub.unsubscribe)(name)
            except Exception as failure:  # noqa: BLE001 - the reader sees it too, and begins again
                log.debug("subscription_send_failed", exception=type(failure).__name__)

    async def _read_on(self) -> None:
        failures = 0
        while not self._closing:
            try:
                await self._read()
            except Exception as failure:  # noqa: BLE001 - whatever it was, the next one may hold
                if any(channel.is_confirmed for channel in self._channels.values()):
                    failures = 0
                fault = judge(failure)
                kind = fault.kind if fault else type(failure).__name__
                if not failures:
                    # Once for each outage.
                    log.warning("subscription_lost", fault=kind)
            for channel in self._channels.values():
                channel.is_confirmed = False
            await asyncio.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
            failures += 1

    async def _read(self) -> None:
        """Read until the connection is lost. Raises what the client raises."""
        client = self._make_client()
        pubsub = None
        try:
            pubsub = await _open(client)
            async with self._sending:
                await pubsub.subscribe(ANCHOR, *self._channels)
                self._pubsub = pubsub
            asked = False
            while True:
                message = await pubsub.get_message(timeout=QUIET_S)
                if message is not None:
                    asked = False
                    self._pass_on(message)
                elif asked:
                    raise RedisConnectionError("the store has fallen silent")
                else:
                    asked = True
                    async with self._sending:
                        await pubsub.ping()
        finally:
            async with self._sending:
                self._pubsub = None
                if pubsub is not None:
                    await pubsub.aclose()
                await close_client(client)

    def _pass_on(self, message: dict[str, Any]) -> None:
        name = message["channel"]
        channel = self._channels.get(name.decode()) if name is not None else None
        if channel is None:
            return
        text = b""
        if message["type"] == "subscribe":
            channel.confirm()
        elif message["type"] == "message":
            text = message["data"]
        else:
            return
        for listener in channel.listeners:
            listener(text)


async def _open(client: Client) -> Any:
    if not isinstance(client, RedisCluster):
        return client.pubsub()
    # What is published on any node of a Cluster is heard on every one.
    await client.initialize()
    return client.pubsub(node=client.get_random_node())
