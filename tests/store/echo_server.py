"""A server of a few commands that answers when it is told to, in pieces, wrongly or not at all."""

import asyncio
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import hiredis

from tests.faults.servers import HOST

OPENING = (b"HELLO", b"CLIENT")
"""What redis-py says on a new connection."""

MOST_PIECES = 200

Words = list[bytes]


class EchoServer:
    """Listens on a port, or on a socket in the file system; ends with its `async with` block.

    It knows `ECHO text`, `INCR key`, `FAIL text`, `FILL bytes`, `WAIT replicas milliseconds`, and
    what redis-py says at first. `counters` is what INCR has counted. `said` holds what came with
    each read, `opened` counts connections.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None, path: Path | None = None) -> None:
        self.port = 0
        self.path = path
        self.said: list[list[Words]] = []
        self.opened = 0
        self.counters: Counter[bytes] = Counter()
        self.replicas = 1
        """What WAIT answers."""
        self.piece: int | None = None
        """How many bytes of an answer leave at once; None = all. It has few pieces all the same."""
        self.is_holding = False
        """Whether answers are kept back, those on opening aside."""
        self.takes = True
        """Whether new connections are taken, or closed at once."""
        self.greets = True
        """Whether anything is said on new connections."""
        self.on_open: Callable[[Peer], None] = lambda _: None
        """What is done as soon as redis-py holds a connection for open."""
        self.peers: list[Peer] = []
        self._tls = tls

    @property
    def commands(self) -> list[Words]:
        """All that came after the opening, in order."""
        return [words for read in self.said for words in read]

    @property
    def peer(self) -> "Peer":
        """The newest of the connections that are open."""
        return self.peers[-1]

    def release(self) -> None:
        """Send what was kept back, and keep nothing back from now on."""
        self.is_holding = False
        for peer in self.peers:
            peer.release()

    async def got(self, count: int) -> None:
        """Wait until so many commands have come."""
        await until(lambda: len(self.commands) >= count)

    async def listen(self) -> None:
        """Begin to take connections, on the port that it had before."""
        loop = asyncio.get_running_loop()
        if self.path is not None:
            self._server = await loop.create_unix_server(lambda: Peer(self), str(self.path))
            return
        self._server = await loop.create_server(
            lambda: Peer(self), HOST, self.port, ssl=self._tls, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop_listening(self) -> None:
        """Refuse connections; those that are open go on."""
        self._server.close()
        # Whoever came just before that is not told.
        await asyncio.sleep(0)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for peer in self.peers:
            peer.transport.abort()
        await until(lambda: not self.peers)
        await self._server.wait_closed()


class Peer(asyncio.Protocol):
    """One connection, seen by the server."""

    def __init__(self, server: EchoServer) -> None:
        self.transport: Any = None
        self.kept: deque[bytes] = deque()
        """The answers that are kept back."""
        self.is_silent = False
        """Whether nothing is answered here any more, ever."""
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._reader = hiredis.Reader()
        self._leaving: deque[bytes] = deque()
        self._left_to_greet = 4

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._server.opened += 1
        self._server.peers.append(self)
        if not self._server.takes:
            transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        self._server.peers.remove(self)
        self._leaving.clear()

    def data_received(self, data: bytes) -> None:
        if not self._server.greets:
            return
        self._reader.feed(data)
        read = list(self._commands())
        asked = [words for words in read if words[0] not in OPENING]
        if asked:
            self._server.said.append(asked)
        for words in read:
            answer = self._answer(words)
            if words[0] in OPENING:
                self.say(answer)
                self._left_to_greet -= 1
                if not self._left_to_greet:
                    self._server.on_open(self)
            elif self._server.is_holding:
                self.kept.append(answer)
            else:
                self.say(answer)

    def release(self, count: int | None = None) -> None:
        """Send what was kept back, or so many answers of it."""
        for _ in range(len(self.kept) if count is None else min(count, len(self.kept))):
            self.say(self.kept.popleft())

    def half_send(self) -> None:
        """Send a part of what was kept back, and close."""
        if self.kept:
            answer = self.kept.popleft()
            self.transport.write(answer[: len(answer) // 2])
        self.transport.close()

    def close(self) -> None:
        """Close when what is to be sent has been sent."""
        self.transport.close()

    def reset(self) -> None:
        """Break the connection, so that who reads gets an error and not an end."""
        link = self.transport.get_extra_info("socket")
        with suppress(OSError):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def say(self, answer: bytes) -> None:
        """Send bytes, whole or in pieces."""
        if self.is_silent or self.transport.is_closing():
            return
        size = self._server.piece
        if size is None and not self._leaving:
            self.transport.write(answer)
            return
        size = max(size or len(answer), len(answer) // MOST_PIECES)
        if not self._leaving:
            self._loop.call_soon(self._send_a_piece)
        self._leaving.extend(answer[at : at + size] for at in range(0, len(answer), size))

    def _send_a_piece(self) -> None:
        if self._leaving and not self.transport.is_closing():
            self.transport.write(self._leaving.popleft())
            self._loop.call_soon(self._send_a_piece)

    def _commands(self) -> Iterator[Words]:
        while (words := self._reader.gets()) is not False:
            yield words

    def _answer(self, words: Words) -> bytes:
        match words:
            case [b"HELLO", *_]:
                return b"%1\r\n+proto\r\n:3\r\n"
            case [b"CLIENT", *_]:
                return b"+OK\r\n"
            case [b"ECHO", text]:
                return b"$%d\r\n%b\r\n" % (len(text), text)
            case [b"INCR", key]:
                self._server.counters[key] += 1
                return b":%d\r\n" % self._server.counters[key]
            case [b"FAIL", text]:
                return b"-%b\r\n" % text
            case [b"FILL", size]:
                return b"$%b\r\n%b\r\n" % (size, b"x" * int(size))
            case [b"WAIT", *_]:
                return b":%d\r\n" % self._server.replicas
            case _:
                return b"-ERR unknown command\r\n"


async def until(is_true: Callable[[], bool]) -> None:
    """Look every millisecond, for 5 s at most."""
    async with asyncio.timeout(5.0):
        while not is_true():
            await asyncio.sleep(0.001)
