"""Stand between a client and a server: count commands, lose replies, hold, break."""

import asyncio
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from app.store.scripts import load_script
from tests.faults.servers import HOST

RECORDING = load_script("add_audit").sha.encode()
"""What every writing of the record holds."""


class Proxy:
    """Forward `port` to `target_port`; every fault ends with the `async with` block.

    `commands` counts the commands that clients sent by their first word in upper case (what is
    written behind the requests, the record of who did what, as AUDIT), as they
    arrive here, held ones too. `tls` is what clients meet; the way to the server is plain.
    """

    host = HOST

    def __init__(self, target_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.commands: Counter[str] = Counter()
        self._target_port = target_port
        self._tls = tls
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._to_drop: deque[str | None] = deque()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def drop_replies(self, count: int, *, to: str | None = None) -> None:
        """Swallow the next `count` replies, on whichever connection; `to` spares other commands.

        The server has carried the command out, the connection stays open and in step.
        """
        self._to_drop.extend([to.upper() if to else None] * count)

    def hold(self) -> None:
        """Keep back everything in both directions, connections open, until `release()`."""
        self._flowing.clear()

    def release(self) -> None:
        """Let go on, with what was kept back first."""
        self._flowing.set()

    def reset_all(self) -> None:
        """Break every open connection, with what it holds; new ones are taken."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    def refuse(self) -> None:
        """Close every new connection at once, until `accept()`; the open ones go on."""
        self._refusing = True

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.release()
        self.reset_all()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            if not self._refusing:
                await self._forward(reader, writer)
        except OSError:
            pass  # one side is gone; the other one follows
        finally:
            await self._close(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(HOST, self._target_port)
        self._writers.add(server_writer)
        asked: deque[str] = deque()
        pumps = (
            asyncio.create_task(self._pump_commands(reader, server_writer, asked)),
            asyncio.create_task(self._pump_replies(server_reader, writer, asked)),
        )
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self._close(server_writer)

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        """Close after what is on its way has arrived; `reset_all()` ends the wait."""
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self._writers.discard(writer)

    async def _pump_commands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[str]
    ) -> None:
        async for frame in _frames(reader):
            name = _command_name(frame)
            self.commands["AUDIT" if RECORDING in frame else name] += 1
            if not name.endswith("SUBSCRIBE"):  # answered by push messages, not by a reply
                asked.append(name)
            await self._flowing.wait()
            writer.write(frame)
            await writer.drain()

    async def _pump_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[str]
    ) -> None:
        async for frame in _frames(reader):
            if frame[:1] != b">" and self._drops(asked.popleft() if asked else ""):
                continue
            await self._flowing.wait()
            writer.write(frame)
            await writer.drain()

    def _drops(self, name: str) -> bool:
        if not self._to_drop or self._to_drop[0] not in (None, name):
            return False
        self._to_drop.popleft()
        return True


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Cut a stream of RESP 2 or 3 into whole messages, nested ones in one piece."""
    buffer = bytearray()
    while data := await reader.read(65_536):
        buffer += data
        while (end := _frame_end(buffer, 0)) is not None:
            yield bytes(buffer[:end])
            del buffer[:end]


def _frame_end(buffer: bytearray, start: int) -> int | None:
    """Find where the message that begins at `start` ends; None while it is not all there."""
    line_end = buffer.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, size = buffer[start : start + 1], buffer[start + 1 : line_end]
    end = line_end + 2
    if kind in b"$=!" and size != b"-1":  # a text of so many bytes
        end += int(size) + 2
        return end if end <= len(buffer) else None
    if kind in b"*~>%|":  # so many messages, for a map and for attributes so many pairs
        members = max(int(size), 0) * (2 if kind in b"%|" else 1) + (kind == b"|")
        for _ in range(members):
            after = _frame_end(buffer, end)
            if after is None:
                return None
            end = after
    return end


def _command_name(frame: bytes) -> str:
    """Give the first word of a command, an array of texts, in upper case."""
    return frame.split(b"\r\n", 3)[2].decode().upper()
