"""Stand between a client and a server: count commands, lose replies, hold, break."""

import asyncio
import random
import socket
import ssl
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from enum import Enum, auto
from types import TracebackType
from typing import NamedTuple, Self

from app.store.scripts import load_script
from tests.faults.servers import HOST

RECORDING = load_script("add_audit").sha.encode()
"""What every writing of the record holds."""


OPENING = {"HELLO", "AUTH", "CLIENT", "SELECT"}
"""What a client sends on a new connection before anything else."""


class Loss(Enum):
    """What becomes of a reply that is lost. The server has carried the command out."""

    SILENCE = auto()
    """Nothing arrives, nor anything after it; the connection stays open."""

    RESET = auto()
    """The connection breaks instead."""

    HALF_SENT = auto()
    """A part of it arrives, then the connection breaks."""


class Held:
    """One command that is kept back on its connection, which goes on behind it.

    `arrived` says that it is here; `reply` is what the server answered to it in the end.
    """

    def __init__(self, part: bytes) -> None:
        self.part = part
        self.arrived = asyncio.Event()
        self.reply: bytes | None = None
        self._sent_on = asyncio.Event()
        self._answered = asyncio.Event()

    async def deliver(self) -> bytes:
        """Let the server have it, whoever still waits for it, and give the server's answer."""
        self._sent_on.set()
        await self._answered.wait()
        assert self.reply is not None
        return self.reply

    def answer(self, reply: bytes) -> None:
        """Note what the server answered."""
        self.reply = reply
        self._answered.set()

    async def pass_on(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        """Wait until it is delivered, and until it is answered: its client may be gone by then."""
        self.arrived.set()
        await self._sent_on.wait()
        writer.write(frame)
        await self._answered.wait()


Choose = Callable[[bytes], Loss | None]
"""Says of a command, as it was sent, how its reply is lost; None for one that arrives."""


class _Asked(NamedTuple):
    name: str
    counted_as: str
    held: Held | None
    loss: Loss | None


class Proxy:
    """Forward `port` to `target_port`; every fault ends with the `async with` block.

    `commands` counts the commands that clients sent by their first word in upper case (what is
    written behind the requests, the record of who did what, as AUDIT), as they arrive here, held
    ones too; `sent_bytes` and `answered_bytes` are how long they and the replies to them were.
    `lost` counts the replies that were lost, by the way. `tls` is what clients meet; the way to the
    server is plain.
    """

    host = HOST

    def __init__(self, target_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.commands: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.answered_bytes: Counter[str] = Counter()
        self._target_port = target_port
        self._tls = tls
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._to_lose: deque[tuple[str | None, Loss]] = deque()
        self._to_hold: list[Held] = []
        self._watched: list[tuple[bytes, list[float]]] = []
        self._lost_share = 0.0
        self._delay_s = (0.0, 0.0)
        self._random = random.Random()
        self._choose: Choose = lambda _: None
        self.lost: Counter[Loss] = Counter()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def drop_replies(self, count: int, *, to: str | None = None) -> None:
        """Lose the next `count` replies, on whichever connection; `to` spares other commands.

        The server has carried the command out. The connection stays open, and nothing more arrives
        on it: a stream of bytes loses none in its middle.
        """
        self.lose_replies(Loss.SILENCE, count, to=to)

    def lose_replies(self, how: Loss, count: int, *, to: str | None = None) -> None:
        """Lose the next `count` replies, on whichever connection; `to` spares other commands."""
        self._to_lose.extend([(to.upper() if to else None, how)] * count)

    def lose_some(self, share: float, seed: int) -> None:
        """Lose such a share of the replies from now on, each in one of the ways.

        What a connection says when it is opened is spared: it says so much that hardly one would.
        """
        self._lost_share = share
        self._random.seed(seed)

    def lose_none(self) -> None:
        """Let every reply through from now on."""
        self._to_lose.clear()
        self._lost_share = 0.0

    def delay(self, longest_s: float, *, shortest_s: float = 0.0) -> None:
        """Let each message take so long, in both directions, each time another while."""
        self._delay_s = (shortest_s, longest_s)

    def watch(self, part: bytes) -> list[float]:
        """Note when each command arrives that holds `part`, in `time.monotonic`."""
        times: list[float] = []
        self._watched.append((part, times))
        return times

    def hold_back(self, part: bytes) -> Held:
        """Keep back the next command that holds `part`, and nothing else."""
        held = Held(part)
        self._to_hold.append(held)
        return held

    def lose(self, choose: Choose) -> None:
        """Ask of every command, as it arrives here, how its reply is lost."""
        self._choose = choose

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
        asked: deque[_Asked] = deque()
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
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[_Asked]
    ) -> None:
        async for frame in _frames(reader):
            name = _command_name(frame)
            counted_as = "AUDIT" if RECORDING in frame else name
            self.commands[counted_as] += 1
            self.sent_bytes[counted_as] += len(frame)
            for part, times in self._watched:
                if part in frame:
                    times.append(time.monotonic())
            held = self._find_held(frame)
            if not name.endswith("SUBSCRIBE"):  # answered by push messages, not by a reply
                asked.append(_Asked(name, counted_as, held, self._choose(frame)))
            if held is not None:
                await held.pass_on(frame, writer)
                continue
            await self._take_time()
            writer.write(frame)
            await writer.drain()

    async def _pump_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[_Asked]
    ) -> None:
        silent = False
        async for frame in _frames(reader):
            loss = None
            if frame[:1] != b">":
                name, counted_as, held, chosen = (
                    asked.popleft() if asked else _Asked("", "", None, None)
                )
                self.answered_bytes[counted_as] += len(frame)
                if held is not None:
                    held.answer(frame)
                loss = self._loss_for(name, chosen)
            silent = silent or loss is Loss.SILENCE
            if silent:
                continue
            await self._take_time()
            if loss is Loss.RESET:
                _reset(writer)
                return
            if loss is Loss.HALF_SENT:
                writer.write(frame[: len(frame) // 2])
                return
            writer.write(frame)
            await writer.drain()

    async def _take_time(self) -> None:
        await self._flowing.wait()
        if any(self._delay_s):
            await asyncio.sleep(self._random.uniform(*self._delay_s))

    def _find_held(self, frame: bytes) -> Held | None:
        for held in self._to_hold:
            if held.part in frame:
                self._to_hold.remove(held)
                return held
        return None

    def _loss_for(self, name: str, chosen: Loss | None) -> Loss | None:
        loss = chosen
        if loss is None and self._to_lose and self._to_lose[0][0] in (None, name):
            _, loss = self._to_lose.popleft()
        elif loss is None and name not in OPENING and self._random.random() < self._lost_share:
            loss = self._random.choice(list(Loss))
        if loss is not None:
            self.lost[loss] += 1
        return loss


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST in the place of FIN: who reads gets an error, and not an end."""
    link: socket.socket = writer.get_extra_info("socket")
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


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
