"""A balancer before several services: requests go to those who say that they are ready."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import count
from types import TracebackType
from typing import NamedTuple, Self

from tests.faults.servers import HOST

LOOK_EVERY_S = 0.25
"""How often each service is asked whether it is ready, in seconds."""

IDLE_S = 60.0
"""How long an idle connection to a service is used again, in seconds, as most balancers do."""

NOBODY = (
    b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: application/json\r\n"
    b'content-length: 21\r\nconnection: close\r\n\r\n{"code":"no_backend"}'
)


class Link(NamedTuple):
    """A connection to a service, and since when it is idle."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since_s: float = 0.0


class Backend:
    """A service, whether it is ready, and the connections to it that are kept."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_ready = False
        self._idle: deque[Link] = deque()

    async def look(self) -> None:
        """Ask it once, on a connection of its own."""
        head = b""
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(1.0):
                link = await self._connect()
                with closing(link.writer):
                    link.writer.write(b"GET /readyz HTTP/1.1\r\nhost: balancer\r\n\r\n")
                    head = await link.reader.readuntil(b"\r\n\r\n")
        self.is_ready = head.startswith(b"HTTP/1.1 200 ")

    async def take(self) -> Link:
        """Take a kept connection, or make one."""
        while self._idle:
            link = self._idle.pop()
            if not link.reader.at_eof() and time.monotonic() - link.idle_since_s < IDLE_S:
                return link
            link.writer.close()
        return await self._connect()

    def give_back(self, link: Link) -> None:
        """Keep a connection whose answer has ended."""
        self._idle.append(link._replace(idle_since_s=time.monotonic()))

    def close(self) -> None:
        """Close what is kept."""
        for link in self._idle:
            link.writer.close()

    async def _connect(self) -> Link:
        return Link(*await asyncio.open_connection(HOST, self.port))


class Balancer:
    """Forward `url` to the services at `ports` that are ready, in turn; nothing is sent twice.

    Connections are kept on both sides. `broken` counts requests that were begun and got no whole
    answer, by what went wrong.
    """

    def __init__(self, *ports: int) -> None:
        self.broken: Counter[str] = Counter()
        self._backends = [Backend(port) for port in ports]
        self._turns = count()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{HOST}:{port}"

    def ready(self) -> list[int]:
        """Give the ports of those who are ready."""
        return [backend.port for backend in self._backends if backend.is_ready]

    async def __aenter__(self) -> Self:
        for backend in self._backends:
            await backend.look()
            self._begin(asyncio.create_task(_keep_looking(backend)))
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for backend in self._backends:
            backend.close()
        await self._server.wait_closed()

    def _begin(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._begin(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._pass_on(reader, writer):
                pass
        writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False when the connection is of no more use."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(_fields(head).get(b"content-length", b"0")))
        ready = [backend for backend in self._backends if backend.is_ready]
        if not ready:
            writer.write(NOBODY)
            return False
        backend = ready[next(self._turns) % len(ready)]
        try:
            link = await backend.take()
        except OSError as refused:
            self.broken[f"{type(refused).__name__} in connecting"] += 1
            return False
        is_whole = False
        try:
            link.writer.write(head + body)
            is_kept = await _copy_answer(link.reader, writer)
            is_whole = True
        except (OSError, asyncio.IncompleteReadError) as broken:
            if not writer.is_closing():
                self.broken[type(broken).__name__] += 1
            return False
        finally:
            if not is_whole:
                link.writer.transport.abort()
        if is_kept:
            backend.give_back(link)
        else:
            link.writer.close()
        return True


class ConnectionBalancer(Balancer):
    """The same for connections, as a network does it that knows nothing of HTTP.

    A connection stays with its service, ready or not, until one side closes it.
    """

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._begin(task)
        ready = [backend for backend in self._backends if backend.is_ready]
        with closing(writer), suppress(OSError, asyncio.CancelledError):
            link = await ready[next(self._turns) % len(ready)].take()
            with closing(link.writer):
                pumps = [_pump(reader, link.writer), _pump(link.reader, writer)]
                tasks = [asyncio.create_task(pump) for pump in pumps]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in tasks:
                        each.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def _keep_looking(backend: Backend) -> None:
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        await backend.look()


async def _copy_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Copy one answer; say whether the connection that it came on is kept."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = _fields(head)
    # Whether a connection is kept is a matter of its two ends.
    writer.write(b"\r\n".join(_lines(head)) + b"\r\n\r\n")
    writer.write(await reader.readexactly(int(fields.get(b"content-length", b"0"))))
    if fields.get(b"transfer-encoding") == b"chunked":
        size = -1
        while size != 0:
            line = await reader.readuntil(b"\r\n")
            size = int(line, 16)
            writer.write(line + await reader.readexactly(size + 2))
            await writer.drain()
    await writer.drain()
    return fields.get(b"connection") != b"close"


def _lines(head: bytes) -> Iterator[bytes]:
    for line in head.rstrip().split(b"\r\n"):
        if not line.lower().startswith(b"connection:"):
            yield line


def _fields(head: bytes) -> dict[bytes, bytes]:
    _, *lines = head.rstrip().split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in pairs}
