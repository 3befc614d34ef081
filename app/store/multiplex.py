"""One connection to a server that everybody in an event loop shares.

A connection that is lent to one call at a time costs 38 us for each: a pool and its locks, a stream
to read from, a timer. Here the commands of one turn of the loop leave in one write, and replies,
which a server gives in the order of the commands, are handed out in that order as they come in.
redis-py opens the connection (address, TLS, HELLO, AUTH, sentinels) and says what an error means;
hiredis packs the commands and reads the replies.

What follows from the order:

- Who gives up leaves their place behind; the reply that comes for it is thrown away.
- When the next reply is overdue, none behind it can come: the connection is dropped whole, and
  everybody who waits on it hears so. One timer looks at that place.
- Nothing may be sent that keeps the server waiting, but WAIT: with `wait_ms`, each flush ends with
  one, which vouches for all that the connection has written. The next flush waits for its answer,
  so one WAIT serves all who came meanwhile.
"""

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import hiredis
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import InvalidResponse
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.clock import monotonic_s
from app.store.client import Command, SteadyConnection, end_task
from app.store.faults import TooFewReplicasError, TooMuchAtOnceError

MOST_WAITING = 8192
"""How many calls may wait at once: a few dozen for every request that is served."""

MOST_BYTES = 32 * 1024 * 1024
"""How much may wait to be sent, in bytes: 128 of the largest steps."""

ONCE_MORE_S = 0.01
"""How long an overdue reply is waited for once more, in seconds, and again after each that comes: a
loop that was held up has not read yet what has come meanwhile, and may need many turns for that."""


# Its stub knows only commands of one word.
_pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]


class SharedConnection:
    """A connection that is opened when it is needed, and at once when it was lost.

    Calls that come before it is open wait for that; where it fails they fail with it, and the next
    call makes another attempt. There is one at a time.
    """

    def __init__(
        self,
        make_connection: Callable[[], SteadyConnection],
        *,
        callbacks: Mapping[Any, Callable[[Any], Any]],
        timeout_s: float,
        open_s: float,
        wait_ms: int | None = None,
    ) -> None:
        """Take what makes a connection that is not open yet; it belongs to the running loop.

        `callbacks` give the replies of some commands the shape that callers know. `timeout_s` is
        how long a reply may take, `open_s` an attempt to open, both in seconds; `wait_ms` how long
        a replica may take to confirm, None = none is asked.
        """
        self._loop = asyncio.get_running_loop()
        self._make_connection = make_connection
        self._callbacks = callbacks
        self._timeout_s = timeout_s
        self._open_s = open_s
        self._wait = None if wait_ms is None else _pack(("WAIT", 1, wait_ms))
        self._nobody: asyncio.Future[Any] = self._loop.create_future()
        self._nobody.cancel()
        self._queue: list[_Call] = []
        self._queued_bytes = 0
        self._is_flush_due = False
        self._wire: _Wire | None = None
        self._left: set[_Wire] = set()
        self._opening: asyncio.Task[None] | None = None
        self._is_closed = False

    def send(self, commands: list[Command], *, asking: bool = False) -> Awaitable[Any]:
        """Send commands in a row, of which there are several only with `wait_ms`.

        Raises `TooMuchAtOnceError`. What is returned gives the answer to the first. `asking` puts
        ASKING before it, for a slot that a Cluster moves. It raises what the store answers;
        redis-py's ConnectionError and TimeoutError, after which nobody knows whether it was done;
        and `TooFewReplicasError`.
        """
        callback = self._callbacks.get(commands[0][0])
        if asking:
            commands = [("ASKING",), *commands]
        replies = len(commands)
        packed = _pack(commands[0]) if replies == 1 else b"".join(map(_pack, commands))
        wire, queue = self._wire, self._queue
        queued_bytes = unsent = self._queued_bytes + len(packed)
        waiting = len(queue)
        if wire is not None:
            waiting += len(wire.waiting)
            if wire.is_paused:
                unsent += wire.unsent
        if waiting >= MOST_WAITING or unsent > MOST_BYTES:
            raise TooMuchAtOnceError
        self._queued_bytes = queued_bytes
        waiter = self._loop.create_future()
        queue.append((waiter, packed, replies))
        if not self._is_flush_due:
            self._flush_soon()
        # As for nearly every command: to wait in one coroutine more takes 0.3 us.
        return waiter if callback is None else _shape(waiter, callback)

    def leave(self, opened_before_s: float) -> None:
        """Use it no more if it was opened before a time of `clock.monotonic_s`, or has been used.

        What is on its way over it may finish; what comes next opens another. Who waited for it to
        be opened asked before that, and what they complain of came over it all the same.
        """
        wire = self._wire
        if wire is not None and (wire.has_served or wire.opened_s < opened_before_s):
            self._wire = None
            self._left.add(wire)
            wire.close_when_done()
            self._go_on()

    async def aclose(self) -> None:
        """Close it; who waits gets a ConnectionError."""
        self._is_closed = True
        if self._opening is not None:
            await end_task(self._opening)
        for wire in self._wires:
            wire.drop(LostConnectionError("The connection was closed"))
        self._fail_queue(LostConnectionError("The connection was closed"))

    @property
    def is_open(self) -> bool:
        """Whether there is a connection now."""
        return self._wire is not None

    @property
    def waiting(self) -> int:
        """How many calls wait, those counted that were given up."""
        return len(self._queue) + sum(len(wire.waiting) for wire in self._wires)

    @property
    def _wires(self) -> list["_Wire"]:
        return [*self._left, self._wire] if self._wire else [*self._left]

    def _flush_soon(self) -> None:
        """See to it that what is gathered is sent."""
        if self._is_closed:
            self._fail_queue(LostConnectionError("The connection was closed"))
        elif self._wire is not None:
            if not self._is_flush_due:
                self._is_flush_due = True
                self._loop.call_soon(self._flush)
        elif self._opening is None:
            self._opening = self._loop.create_task(self._open(), name="shared-connection")

    def _flush(self) -> None:
        """Send what is gathered, in one write."""
        self._is_flush_due = False
        wire = self._wire
        if wire is None:
            self._go_on()
            return
        if self._wait is not None and wire.waiting:
            # The server is held by WAIT; when that is answered, this is done again.
            return
        calls = [call for call in self._queue if not call[0].done()]
        self._queue.clear()
        self._queued_bytes = 0
        if not calls:
            return
        packed = [call[1] for call in calls]
        if self._wait is None:
            for waiter, _, replies in calls:
                if replies > 1:
                    wire.waiting.append(self._nobody)
                wire.waiting.append(waiter)
        else:
            batch = _Batch(calls, self._go_on)
            wire.waiting.extend([batch] * batch.expected)
            packed.append(self._wait)
        wire.write(packed)

    async def _open(self) -> None:
        try:
            self._wire = await self._connect()
        except Exception as failure:  # noqa: BLE001 - whatever it is, those who wait hear it
            self._fail_queue(failure)
        except asyncio.CancelledError:
            self._fail_queue(LostConnectionError("The connection was given up before it was open"))
            raise
        finally:
            self._opening = None
        self._go_on()

    async def _connect(self) -> "_Wire":
        connection = self._make_connection()
        try:
            async with asyncio.timeout(self._open_s):
                await connection.connect()  # type: ignore[no-untyped-call]
            return _Wire(connection, self._timeout_s, self._lose)
        finally:
            # What was handed over is not its own any more.
            await connection.disconnect(nowait=True)

    def _lose(self, wire: "_Wire", failure: Exception) -> None:
        self._left.discard(wire)
        if wire is not self._wire:
            return
        self._wire = None
        if not wire.has_served:
            # So would the next one be, and the next.
            self._fail_queue(failure)
        elif not self._is_closed:
            self._flush_soon()

    def _go_on(self) -> None:
        if self._queue:
            self._flush_soon()

    def _fail_queue(self, failure: Exception) -> None:
        calls, self._queue, self._queued_bytes = self._queue, [], 0
        for waiter, _, _ in calls:
            _fail(waiter, failure)


class _Wire(asyncio.Protocol):
    """An open connection, with those who wait for its replies in the order of these."""

    def __init__(
        self,
        connection: SteadyConnection,
        timeout_s: float,
        lose: Callable[["_Wire", Exception], None],
    ) -> None:
        """Take over a connection that redis-py has opened."""
        self.waiting: deque[_Sink] = deque()
        self.opened_s = monotonic_s()
        self._timeout_s = timeout_s
        self._lose = lose
        self._loop = asyncio.get_running_loop()
        self._writer, parse_error = connection.hand_over()
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=parse_error, notEnoughData=_NOT_YET
        )
        self._taken = 0
        # How many replies there will have been when those to a flush are there, and when that left.
        self._flushes: deque[tuple[int, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._reads = 0
        self._seen_reads: int | None = None
        self.is_paused = False
        self._is_leaving = False
        self._failure: Exception = LostConnectionError("The server closed the connection")
        self._transport: Any = self._writer.transport
        self._transport.set_protocol(self)

    @property
    def has_served(self) -> bool:
        """Whether anybody has had a reply."""
        return self._taken > 0

    @property
    def unsent(self) -> int:
        """How many bytes wait to be sent."""
        size: int = self._transport.get_write_buffer_size()
        return size

    def write(self, packed: list[bytes]) -> None:
        """Send what those wait for who were put into `waiting` just now."""
        now_s = self._loop.time()
        flushes = self._flushes
        while flushes and flushes[0][0] <= self._taken:
            flushes.popleft()
        flushes.append((self._taken + len(self.waiting), now_s))
        if self._timer is None:
            self._timer = self._loop.call_at(now_s + self._timeout_s, self._look)
        self._transport.write(b"".join(packed))

    def close_when_done(self) -> None:
        """Close as soon as nobody waits."""
        self._is_leaving = True
        if not self.waiting:
            self._transport.close()

    def drop(self, failure: Exception) -> None:
        """Close at once, and have everybody who waits hear why."""
        self._failure = failure
        self._transport.abort()
        self._end()

    def data_received(self, data: bytes) -> None:
        """Hand out what has come."""
        reader, waiting = self._reader, self.waiting
        before = len(waiting)
        self._reads += 1
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _NOT_YET:
                if not isinstance(reply, _SPECIAL):
                    sink = waiting.popleft()
                    if not sink.done():
                        sink.set_result(reply)
                elif isinstance(reply, Exception):
                    sink = waiting.popleft()
                    if not sink.done():
                        sink.set_exception(reply)
        except (InvalidResponse, IndexError) as failure:
            # Not a reply, or one that nobody asked for: whose the next would be, nobody knows.
            self._taken += before - len(waiting)
            self.drop(InvalidResponse(str(failure)))
            return
        self._taken += before - len(waiting)
        if self._is_leaving and not waiting:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        """Have everybody who waits hear that it is gone."""
        self._end()

    def pause_writing(self) -> None:
        """Note that what is to be sent piles up."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Note that it is sent again."""
        self.is_paused = False

    def _look(self) -> None:
        """See whether the reply that is due next is overdue."""
        self._timer = None
        while self._flushes and self._flushes[0][0] <= self._taken:
            self._flushes.popleft()
        if not self._flushes:
            return
        now_s, due_s = self._loop.time(), self._flushes[0][1] + self._timeout_s
        if now_s < due_s:
            self._seen_reads = None
            self._timer = self._loop.call_at(due_s, self._look)
        elif self._reads != self._seen_reads:
            # It is on its way, or is about to be read.
            is_first = self._seen_reads is None
            self._seen_reads = self._reads
            pause_s = ONCE_MORE_S if is_first else max(ONCE_MORE_S, self._timeout_s / 4)
            self._timer = self._loop.call_at(now_s + pause_s, self._look)
        else:
            self.drop(StoreTimeoutError("Timeout reading from the store"))

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._lose(self, self._failure)
        waiting, self.waiting = self.waiting, deque()
        for sink in waiting:
            if not sink.done():
                sink.set_exception(copy.copy(self._failure))


class _Batch:
    """The calls of one flush, whose answers wait for what WAIT says; a sink for all its replies."""

    def __init__(self, calls: Sequence["_Call"], settled: Callable[[], None]) -> None:
        self.expected = sum(call[2] for call in calls) + 1
        self._calls = calls
        self._replies: list[Any] = []
        self._settled = settled

    def done(self) -> bool:
        """Say whether it takes no more: it takes all."""
        return False

    def set_result(self, reply: Any) -> None:
        """Take the next reply."""
        self._replies.append(reply)
        if len(self._replies) == self.expected:
            self._settle()

    set_exception = set_result

    def _settle(self) -> None:
        at, confirmed = 0, self._replies[-1]
        for waiter, _, replies in self._calls:
            mine = self._replies[at : at + replies]
            at += replies
            failure = next(
                (each for each in (*mine, confirmed) if isinstance(each, Exception)), None
            )
            if failure is None and confirmed < 1:
                failure = TooFewReplicasError()
            if failure is not None:
                _fail(waiter, failure)
            elif not waiter.done():
                waiter.set_result(mine[0])
        self._settled()


async def _shape(waiter: asyncio.Future[Any], callback: Callable[[Any], Any]) -> Any:
    """Give an answer the shape that callers know."""
    return callback(await waiter)


def _fail(waiter: asyncio.Future[Any], failure: Exception) -> None:
    """Raise a failure to one of several: each gets an exception of their own, and its traceback."""
    if not waiter.done():
        waiter.set_exception(copy.copy(failure))


_Call = tuple[asyncio.Future[Any], bytes, int]
"""Who waits, the commands as they are sent, and how many replies there will be."""

_Sink = asyncio.Future[Any] | _Batch
_SPECIAL = (Exception, hiredis.PushNotification)
"""What is no usual answer: an error, or news that nobody asked for."""

_NOT_YET = object()
