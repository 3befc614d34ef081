"""Bodies that do not come, or go, in one piece: each side is waited for, but not for ever."""

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from app.clock import monotonic_s
from app.context import learn
from app.errors import DeadlineExceededError, PayloadTooLargeError

STALL_S = 20.0
"""How long a client may take nothing of an answer before it is cut off, in seconds."""

BIT_BYTES = 32 * 1024
"""How much is sent at once, in bytes. The server takes 64 KiB before it waits: a client that takes
5 KB/s is never cut off."""

LONGEST_BODY_S = 3600.0
"""How long a body may take to come in, in seconds: as long as its parts are kept."""

EXTEND = "onboarding.extend"
"""Where in the scope lies a function that begins the time limit of the request anew, and returns
it in seconds."""

REST = "onboarding.rest"
"""Where in the scope an answer that has begun may leave an application that sends the rest of it.
That is called when all has returned that stood around the beginning: a stream goes on for an hour,
and what surrounds a request would be a third of the memory that it takes."""

ABORT = "onboarding.abort"
"""Where the server leaves a function that closes the connection at once."""

EXCHANGE = "onboarding.exchange"
"""Where it leaves, for a plain request, what takes the body and sends the answer as a whole."""


class Exchange(Protocol):
    """A plain request and its answer, as the server has them."""

    task: asyncio.Task[None]
    """What serves it, and nothing else."""

    @property
    def whole_body(self) -> bytes | None:
        """The body; None unless it has come as a whole, and nobody has read it yet."""

    def take_body(self) -> bytes:
        """Give what has come of the body, and keep nothing of it."""

    async def send_whole(self, status: int, head: str, body: bytes, *, is_last: bool) -> None:
        """Send an answer in one write; `head` has its headers, each with the end of its line.

        Nothing comes after the `is_last` on a connection.
        """


EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    # What nginx holds back otherwise.
    "x-accel-buffering": "no",
}
"""The headers of an answer that consists of server-sent events."""

BEAT = b": still here\n\n"
"""What is sent so that a silent stream does not pass for a dead one."""


class CutOffError(ClientDisconnect):
    """The connection was closed under an answer that could not be finished."""


class Content:
    """A body as it comes in, no larger than `limit` bytes; iterated once.

    The time limit of the request begins anew with each piece, for an hour at most.
    """

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self._scope = scope
        self._receive = receive
        self._limit = limit
        self._until_s = monotonic_s() + LONGEST_BODY_S

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Give the bytes.

        Raises `PayloadTooLargeError`, `DeadlineExceededError`, `ClientDisconnect`.
        """
        size = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > self._limit:
                raise too_large(self._limit)
            if monotonic_s() > self._until_s:
                raise DeadlineExceededError
            extend = self._scope.get(EXTEND)
            if extend is not None:
                _allow(extend())
            if chunk:
                yield chunk


class Outlet:
    """The way out of an answer that is sent piece by piece."""

    __slots__ = ("_scope", "_send")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send

    async def begin(self, status: int, headers: dict[str, str]) -> None:
        """Send the head."""
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._pass({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Send a piece. Raises `CutOffError` when the client does not take it."""
        # What is read for the next one has a time of its own.
        _allow(STALL_S)
        # A client may be slow, so each bit counts as taken by itself.
        for start in range(0, len(body), BIT_BYTES) or [0]:
            end = start + BIT_BYTES
            await self._pass(
                {
                    "type": "http.response.body",
                    "body": body[start:end],
                    "more_body": more or end < len(body),
                }
            )

    async def cut_off(self) -> NoReturn:
        """Close the connection, so that nobody takes what was sent for the whole."""
        if self.abort():
            # The server hears of it in a moment, and need not wonder why the answer has no end.
            for _ in range(2):
                await asyncio.sleep(0)
        raise CutOffError

    def abort(self) -> bool:
        """Close the connection at once, and say whether the server can do that."""
        abort = self._scope.get(ABORT)
        if abort is not None:
            abort()
        return abort is not None

    async def _pass(self, message: Message) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await self._send(message)
        except TimeoutError:
            await self.cut_off()


def write_event(kind: str, data: bytes, event_id: str | None = None) -> bytes:
    """Write a server-sent event; `data` is JSON, and so a line."""
    named = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (named, kind.encode(), data)


def _allow(limit_s: float) -> None:
    """Let the request go on asking the store for so long."""
    learn(deadline_s=monotonic_s() + limit_s)


def too_large(limit: int) -> PayloadTooLargeError:
    """Say that a body is larger than it may be."""
    return PayloadTooLargeError(f"The body may take {limit} bytes")
