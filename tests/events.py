"""A client of the live stream: what a browser's EventSource does, over a connection of its own."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

from httpx2 import URL

from tests.service import BASE

ENDS = {"deleted", "bye"}
"""The types after which the service ends a stream."""


class Event(NamedTuple):
    """One event as it came; `id` is None when it brought none."""

    type: str
    id: str | None
    data: dict[str, Any]


class StreamEndedError(Exception):
    """The stream is over: the service ended it or the connection was closed."""


class EventSource:
    """Follows one session. It reads only when it is asked for an event: one that is not, stalls.

    `last_event_id` is that of the last event which was given, `retry_ms` and `comments` are what
    came with it. `is_whole` says after the end whether the service ended the stream in order.
    """

    def __init__(
        self, url: URL | str, session_id: str, *, last_event_id: str | None = None
    ) -> None:
        """Follow the session at the service that listens on `url`."""
        self.last_event_id = last_event_id
        self.retry_ms: int | None = None
        self.comments = 0
        self.headers: dict[str, str] = {}
        self.is_whole = False
        self._url = URL(url)
        self._session_id = session_id
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._text = b""
        self._events: list[Event] = []

    async def open(self, *, receive_buffer: int | None = None) -> Self:
        """Connect and ask, again too: then for what comes after the last event that was given.

        `receive_buffer` is how many bytes the kernel may take ahead, or so.
        """
        self.close()
        link = socket.socket(socket.AF_INET6 if ":" in self._url.host else socket.AF_INET)
        link.setblocking(False)
        if receive_buffer is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(link, (self._url.host, self._url.port))
            limit = receive_buffer or 65_536
            self._reader, self._writer = await asyncio.open_connection(sock=link, limit=limit)
        except BaseException:
            link.close()
            raise
        self._text, self._events, self.is_whole = b"", [], False
        path = f"{BASE}/{self._session_id}/events/stream"
        lines = [f"GET {path} HTTP/1.1", "host: test", "accept: text/event-stream"]
        if self.last_event_id is not None:
            lines.append(f"last-event-id: {self.last_event_id}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(30):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *fields = head.rstrip().split("\r\n")
        assert status == "HTTP/1.1 200 OK", head
        pairs = (field.partition(":") for field in fields)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        return self

    async def receive(self, limit_s: float = 10.0) -> Event:
        """Give the next event. Raises `StreamEndedError`, and TimeoutError after `limit_s`."""
        async with asyncio.timeout(limit_s):
            while not self._events:
                await self._read_on()
        event = self._events.pop(0)
        self.last_event_id = self.last_event_id if event.id is None else event.id
        return event

    async def receive_many(self, count: int, limit_s: float = 20.0) -> list[Event]:
        """Give the next `count` events; raises what `receive` raises."""
        async with asyncio.timeout(limit_s):
            return [await self.receive(limit_s) for _ in range(count)]

    async def receive_until(self, event_type: str, limit_s: float = 20.0) -> list[Event]:
        """Give the events up to the first of a type; raises what `receive` raises."""
        received: list[Event] = []
        async with asyncio.timeout(limit_s):
            while not received or received[-1].type != event_type:
                received.append(await self.receive(limit_s))
        return received

    async def receive_all(self, limit_s: float = 20.0) -> list[Event]:
        """Give the events up to the end of the stream. Raises TimeoutError after `limit_s`."""
        received: list[Event] = []
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    received.append(await self.receive(limit_s))
                except StreamEndedError:
                    return received

    async def wait_for_comments(self, count: int, limit_s: float = 20.0) -> None:
        """Wait until there were `count` comments; events are kept for whoever asks."""
        async with asyncio.timeout(limit_s):
            while self.comments < count:
                await self._read_on()

    async def status_of(self, path: str) -> int:
        """Ask for something else on the same connection, once the stream is over."""
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
        async with asyncio.timeout(10):
            return int((await self._reader.readuntil(b"\r\n\r\n")).split(b" ")[1])

    def close(self) -> None:
        """Go away at once, as a browser does whose page is closed."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _read_on(self) -> None:
        assert self._reader is not None
        try:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            self._text += (await self._reader.readexactly(size + 2))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError):
            raise StreamEndedError from None
        if size == 0:
            self.is_whole = True
            raise StreamEndedError
        *blocks, self._text = self._text.split(b"\n\n")
        for block in blocks:
            self._take(block.decode())

    def _take(self, block: str) -> None:
        """Take what lies between two empty lines. Fails for a line that says nothing known."""
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, colon, value = line.partition(":")
            assert colon, line
            if name == "":
                self.comments += 1
                continue
            assert name in {"id", "event", "data", "retry"}, line
            assert name not in fields, block
            fields[name] = value.removeprefix(" ")
        if "retry" in fields:
            self.retry_ms = int(fields["retry"])
        if "data" in fields:
            event = Event(fields["event"], fields.get("id"), json.loads(fields["data"]))
            self._events.append(event)


@asynccontextmanager
async def following(
    url: URL | str,
    session_id: str,
    *,
    last_event_id: str | None = None,
    receive_buffer: int | None = None,
) -> AsyncIterator[EventSource]:
    """Follow a session for the length of a block."""
    source = EventSource(url, session_id, last_event_id=last_event_id)
    try:
        yield await source.open(receive_buffer=receive_buffer)
    finally:
        source.close()
