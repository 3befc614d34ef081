"""The load: requests that are ready to be sent, over connections with one of them in flight each.

Closed loop: who has an answer asks the next question at once. Every answer is checked, its status
and how long its body is, while it is measured. A request costs about 10 us here, so that a server
on another core is what the measurement is of.
"""

import asyncio
import gc
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple

Address = tuple[str, int]

SILENCE_S = 30.0
"""How long the slowest answer may take before nothing is expected any more, in seconds."""

MOST = 2_000_000
"""Most latencies that one measurement keeps: 16 MB."""


class Wanted(NamedTuple):
    """What an answer must be: its status, and how many bytes its body may have."""

    status: int
    shortest: int
    longest: int


class Request(NamedTuple):
    """A request as it goes onto the wire, and what must come back."""

    sent: bytes
    wanted: Wanted


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes


@dataclass
class Window:
    """What was answered in a stretch of time.

    `latencies_ns` are those of requests that were also sent in it, so that nobody is counted who
    waited for the measurement itself.
    """

    answered: int = 0
    took_s: float = 0.0
    latencies_ns: list[int] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that were not what they must be, by what was wrong."""

    @property
    def per_s(self) -> float:
        return self.answered / self.took_s if self.took_s else 0.0

    def percentile_ms(self, share: float) -> float:
        """Say within how many milliseconds a share of the answers came."""
        if not self.latencies_ns:
            return 0.0
        ordered = sorted(self.latencies_ns)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6


class Connection(asyncio.Protocol):
    """A connection that takes HTTP/1.1 answers apart by their Content-Length."""

    def __init__(self) -> None:
        self._held = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._held = data
            return
        length = _content_length(data, end)
        if length < 0:
            self.broken("answer without Content-Length")
            return
        missing = end + 4 + length - len(data)
        if missing > 0:
            self._held = data
            return
        self._held = b""
        if missing:
            self.broken("more bytes than Content-Length says")
            return
        self.answered(data, length)

    def answered(self, data: bytes, length: int) -> None:
        """Take an answer, whose body are the last `length` bytes of the data."""
        raise NotImplementedError

    def broken(self, how: str) -> None:
        """Take that no more answers can be told apart here."""
        raise NotImplementedError

    def close(self) -> None:
        self._transport.abort()


def _content_length(data: bytes, end: int) -> int:
    at = data.find(b"content-length: ", 0, end)
    if at < 0:
        at = data[:end].lower().find(b"content-length: ")
    if at < 0:
        return -1
    text = data[at + 16 : data.find(b"\r\n", at)]
    return int(text) if text.isdigit() else -1


class _Loop:
    """What the connections of one measurement share."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self.next = requests.__next__
        self.window = Window()
        self.begun_ns = 0
        """When the measurement began; 0 before it, and after it."""
        self.is_over = False
        self.in_flight = 0
        self.used_up = asyncio.Event()

    def wrong(self, what: str) -> None:
        self.window.wrong[what] += 1
        if sum(self.window.wrong.values()) >= 1000:
            self.used_up.set()


class _Asking(Connection):
    """A connection that asks the next question as soon as the last one is answered."""

    def __init__(self, loop: _Loop) -> None:
        super().__init__()
        self._loop = loop
        self._status = b""
        self._wanted = Wanted(0, 0, 0)
        self._sent_ns = 0
        self._is_waiting = False

    def ask(self) -> None:
        try:
            sent, wanted = self._loop.next()
        except StopIteration:
            self._loop.used_up.set()
            return
        if wanted is not self._wanted:
            self._wanted = wanted
            self._status = b"HTTP/1.1 %d " % wanted.status
        self._is_waiting = True
        self._loop.in_flight += 1
        self._sent_ns = time.perf_counter_ns()
        self._transport.write(sent)

    def answered(self, data: bytes, length: int) -> None:
        now_ns = time.perf_counter_ns()
        loop = self._loop
        if not self._is_waiting:
            loop.wrong("answer that nobody asked for")
            return
        self._is_waiting = False
        loop.in_flight -= 1
        _, shortest, longest = self._wanted
        if not data.startswith(self._status):
            loop.wrong(f"status {data[9:12].decode('latin-1')} instead of {self._wanted.status}")
        elif not shortest <= length <= longest:
            loop.wrong(f"body of {length} bytes instead of {shortest} to {longest}")
        elif loop.begun_ns:
            window = loop.window
            window.answered += 1
            if self._sent_ns >= loop.begun_ns and window.answered < MOST:
                window.latencies_ns.append(now_ns - self._sent_ns)
        if not loop.is_over:
            self.ask()

    def broken(self, how: str) -> None:
        self._end(how)
        self.close()

    def connection_lost(self, _: Exception | None) -> None:
        self._end("connection lost")

    def _end(self, how: str) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._loop.in_flight -= 1
            self._loop.wrong(how)


class Limits(NamedTuple):
    """How long a measurement takes: first `warm_s` that count for nothing, then `measure_s`."""

    warm_s: float
    measure_s: float


async def measure(
    address: Address,
    requests: Iterable[Request],
    connections: int,
    limits: Limits,
    at_ends: Callable[[], None] = lambda: None,
) -> Window:
    """Ask for a while, one question after the other, and say what came back.

    A list is asked again and again; an iterator once, and its end ends the measurement. `at_ends`
    is called at the beginning and at the end of what is measured.
    """
    source = iter(requests) if isinstance(requests, Iterator) else cycle(requests)
    loop = _Loop(source)
    asking = [_Asking(loop) for _ in range(connections)]
    with _without_garbage_collection():
        await _connect(address, asking)
        for each in asking:
            each.ask()
        await _wait(loop, limits.warm_s)
        at_ends()
        loop.begun_ns = begun_ns = time.perf_counter_ns()
        await _wait(loop, limits.measure_s)
        loop.window.took_s = (time.perf_counter_ns() - begun_ns) / 1e9
        loop.begun_ns = 0
        at_ends()
        loop.is_over = True
        deadline_s = time.monotonic() + SILENCE_S
        while loop.in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.002)
        if loop.in_flight:
            loop.window.wrong["no answer"] += loop.in_flight
    for each in asking:
        each.close()
    await asyncio.sleep(0)
    return loop.window


async def _wait(loop: _Loop, for_s: float) -> None:
    try:
        await asyncio.wait_for(loop.used_up.wait(), for_s)
    except TimeoutError:
        return


class _Fetching(Connection):
    """A connection that asks, and hands on what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._answer: asyncio.Future[Answer] | None = None

    async def fetch(self, request: Request) -> Answer:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request.sent)
        return await asyncio.wait_for(self._answer, SILENCE_S)

    def answered(self, data: bytes, length: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(int(data[9:12]), data[len(data) - length :]))

    def broken(self, how: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(how))

    def connection_lost(self, _: Exception | None) -> None:
        self.broken("connection lost")


async def fetch(
    address: Address, requests: Iterable[Request], connections: int = 32
) -> list[Answer]:
    """Ask each question once and give the answers in their order.

    Raises ConnectionError, TimeoutError, and RuntimeError when an answer has not the status that
    was wanted; how long its body is does not matter here.
    """
    numbered = enumerate(requests)
    answers: dict[int, Answer] = {}
    fetching = [_Fetching() for _ in range(connections)]
    await _connect(address, fetching)

    async def work(connection: _Fetching) -> None:
        for number, request in numbered:
            answer = await connection.fetch(request)
            if answer.status != request.wanted.status:
                first = request.sent.partition(b" HTTP/")[0].decode()
                raise RuntimeError(f"{first} answered {answer.status}: {answer.body[:500]!r}")
            answers[number] = answer

    try:
        await asyncio.gather(*map(work, fetching))
    finally:
        for connection in fetching:
            connection.close()
    return [answers[number] for number in sorted(answers)]


async def _connect(address: Address, connections: Iterable[Connection]) -> None:
    """Connect them all; no more at a time than a listening socket keeps waiting."""
    loop = asyncio.get_running_loop()
    left = iter(connections)

    async def connect(connection: Connection) -> None:
        await loop.create_connection(lambda: connection, *address)

    while some := list(islice(left, 64)):
        await asyncio.gather(*map(connect, some))


# --- The floor: what the store does by itself -----------------------------------------------------


class _Setting(asyncio.Protocol):
    """A connection that sends the same SETs again as soon as all of the last ones are answered."""

    def __init__(self, batch: bytes, depth: int, window: Window) -> None:
        self._batch = batch
        self._wanted = b"+OK\r\n" * depth
        self._depth = depth
        self._window = window
        self._held = b""
        self.is_over = False
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self._batch)

    def data_received(self, data: bytes) -> None:
        self._held += data
        if len(self._held) < len(self._wanted):
            return
        if self._held == self._wanted:
            self._window.answered += self._depth
        else:
            self._window.wrong["reply other than OK"] += 1
        self._held = b""
        if not self.is_over:
            self.transport.write(self._batch)


async def measure_sets(address: Address, value: bytes, depth: int, limits: Limits) -> Window:
    """SET a value again and again, `depth` commands in a write, on one connection."""
    command = b"*3\r\n$3\r\nSET\r\n$5\r\nfloor\r\n$%d\r\n%s\r\n" % (len(value), value)
    window = Window()
    loop = asyncio.get_running_loop()
    _, setting = await loop.create_connection(
        lambda: _Setting(command * depth, depth, window), *address
    )
    with _without_garbage_collection():
        await asyncio.sleep(limits.warm_s)
        window.answered, begun_ns = 0, time.perf_counter_ns()
        await asyncio.sleep(limits.measure_s)
        window.took_s = (time.perf_counter_ns() - begun_ns) / 1e9
    setting.is_over = True
    setting.transport.abort()
    return window


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def is_listening(address: Address) -> bool:
    """Say whether somebody takes connections there."""
    try:
        with socket.create_connection(address, timeout=1.0):
            return True
    except OSError:
        return False
