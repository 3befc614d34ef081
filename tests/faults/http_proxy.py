"""Stand between an HTTP client and the service: lose answers, answer instead of it, cut, refuse."""

import asyncio
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

from httpx2 import URL

from tests.faults.servers import HOST


class Request(NamedTuple):
    """A request as it arrived here."""

    method: str
    path: str
    headers: dict[str, str]


class HttpProxy:
    """Forward `url` to the service at `target`, one request a connection.

    The faults that are planned come in their order, one for each request; after them everything
    passes. `requests` are all that arrived, `connections` counts those that were refused too.
    """

    def __init__(self, target: URL) -> None:
        self.target = target
        self.requests: list[Request] = []
        self.connections = 0
        self._planned: deque[bytes | int | None] = deque()
        self._refusing = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{HOST}:{port}"

    # What can go wrong

    def answer(self, *answers: bytes) -> None:
        """Answer the next requests with these bytes; the service does not hear of them."""
        self._planned.extend(answers)

    def lose(self, count: int = 1) -> None:
        """Let the service do what the next requests want, and close instead of the answer."""
        self._planned.extend([0] * count)

    def break_off(self, after: int) -> None:
        """Close after so many bytes of the next answer, which is one with an end."""
        self._planned.append(after)

    def say_nothing(self, count: int = 1) -> None:
        """Keep the next requests to oneself, with their connections open."""
        self._planned.extend([None] * count)

    def refuse(self, count: int = 1_000_000) -> None:
        """Close the next connections at once."""
        self._refusing = count

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = 0

    def cut(self) -> None:
        """Break every open connection."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    # How it is done

    async def __aenter__(self) -> Self:
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
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        self.connections += 1
        try:
            if self._refusing:
                self._refusing -= 1
                return
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._pass_on(reader, writer)
        except asyncio.CancelledError:
            return
        finally:
            self._writers.discard(writer)
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = _parse(head)
        body = await reader.readexactly(int(request.headers.get("content-length", "0")))
        self.requests.append(request)
        if self._planned:
            await self._fail(self._planned.popleft(), head, body, reader, writer)
            return
        service, to_service = await self._send(head, body)
        gone = asyncio.create_task(reader.read())  # it sends no more, so this is its end
        try:
            while True:
                more = asyncio.create_task(service.read(65_536))
                await asyncio.wait({gone, more}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() or not (data := await more):
                    more.cancel()
                    return
                writer.write(data)
                await writer.drain()
        finally:
            gone.cancel()
            to_service.transport.abort()

    async def _fail(
        self,
        planned: bytes | int | None,
        head: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if planned is None:
            await reader.read()
        elif isinstance(planned, bytes):
            writer.write(planned)
            await writer.drain()
        else:
            service, to_service = await self._send(head, body)
            answer = await service.read()
            to_service.close()
            writer.write(answer[:planned])
            await writer.drain()

    async def _send(
        self, head: bytes, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        service, to_service = await asyncio.open_connection(self.target.host, self.target.port)
        first, _, rest = head.partition(b"\r\n")
        to_service.write(first + b"\r\nconnection: close\r\n" + rest + body)
        return service, to_service


def _parse(head: bytes) -> Request:
    first, *fields = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (field.partition(":") for field in fields)
    return Request(method, path, {name.lower(): value.strip() for name, _, value in pairs})
