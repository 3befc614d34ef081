"""HTTP/1.1 by httptools and uvicorn, with what each request costs cut down.

Of the 20 us that uvicorn takes for a request, most goes into what few requests need: a parsed URL,
an event to wait for a body that is there already, a timer for each pause between two requests, an
answer in two writes whose headers are looked through one by one. Here a request that is plain is
begun with less, and an answer that is there as a whole leaves in one write; all others go uvicorn's
way, and so do pipelining, flow control and the end of a connection.
"""

import asyncio
import logging
import re
from collections import deque
from functools import lru_cache, partial
from typing import Any

import structlog
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.api.problems import problem
from app.api.streaming import ABORT, EXCHANGE
from app.context import new_request_id

log = structlog.get_logger()

LONGEST_SEGMENT = 1_600
"""Where a longer segment of a path is cut, in bytes: nothing that we serve has one (a user's id has
1,536 at most), and what is cut stays what it was, no id and no number. httptools reads no URL of
65,536 bytes or more."""

LONGEST_HEAD = 1024 * 1024
"""Longest request line and headers that are waited for, in bytes. Four reads of a socket: what
comes in one with the end of a head may be a body."""

LONGEST_QUERY = 30_000
"""Longest query that is read, in bytes."""

COPIED_BYTES = 16 * 1024
"""Up to which an answer is put together with its head before it is sent, in bytes."""

UNREADABLE_QUERY = b"%FF"
"""What stands for a longer one: no UTF-8, so whoever looks into it refuses it."""


class Protocol(HttpToolsProtocol):
    """One connection: a problem is the answer to what is no HTTP."""

    # Slots: uvicorn's own attributes are as many as instances share the names of, and with one more
    # each connection would have a dictionary to itself, of 1.5 KB.
    __slots__ = (
        "_direct_app",
        "_head_bytes",
        "_idle_since_s",
        "_in_head",
        "_is_special",
        "_refused",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._is_special = False
        self._refused = False
        self._idle_since_s = 0.0
        # Who comes through no proxy needs nobody who looks for one.
        app: Any = self.app
        app = app.app if isinstance(app, ProxyHeadersMiddleware) else app
        self._direct_app = getattr(app, "fast_path", app)

    # --- What comes in ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what came, unless the head of a request has no end."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > LONGEST_HEAD:
                self.send_400_response("")
                return
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """Begin the head of a request; what the application is told comes with its end."""
        self._in_head, self._head_bytes, self._is_special = True, 0, False
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        name = name.lower()
        if name in _SPECIAL:
            self._is_special = True
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin a request. What is named behind its body is no header of it (RFC 9110 6.5.1)."""
        self._in_head = False
        plain = None if self._is_special else _PLAIN_URL.fullmatch(self.url)
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        if (
            plain is None
            or not (cycle is None or cycle.response_complete)
            or self.parser.get_http_version() != "1.1"
        ):
            self._begin_as_uvicorn_does()
            return
        path, query = plain.groups(b"")
        headers, self.headers = self.headers, _NOWHERE
        scope: Any = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "method": self.parser.get_method().decode(),
            "path": path.decode(),
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            "state": self.app_state,
            ABORT: self.transport.abort,
        }
        self.scope = scope
        self.cycle = scope[EXCHANGE] = cycle = Cycle(self, scope)
        cycle.task = self.loop.create_task(cycle.run(self._direct_app))
        self.tasks.add(cycle.task)

    def _begin_as_uvicorn_does(self) -> None:
        """Begin a request whose URL or headers ask for a closer look, or one that has to wait."""
        path, mark, query = self.url.partition(b"?")
        segments = (segment[:LONGEST_SEGMENT] for segment in path.split(b"/"))
        query = query if len(query) <= LONGEST_QUERY else UNREADABLE_QUERY
        url, headers, expects = (
            b"/".join(segments) + mark + query,
            self.headers,
            self.expect_100_continue,
        )
        super().on_message_begin()
        scope: Any = self.scope
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        if self.parser.should_upgrade() and self._has_body():
            # The parser stops at an upgrade, and a body behind it would be lost in silence.
            self.send_400_response("")
            return
        # ASGI has no word for it: to close under an answer that a client takes no more of.
        scope["headers"], scope[ABORT] = headers, self.transport.abort
        super().on_headers_complete()
        self.headers = _NOWHERE

    def on_chunk_header(self) -> None:
        """Begin a piece of a body, or what is named behind the last one: it has an end, too."""
        self._in_head, self._head_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._in_head = False
        cycle: Any = self.cycle
        if cycle.response_complete:
            return
        if not cycle.body:
            # The whole body as a rule, which need not be copied.
            cycle.body = body
        else:
            if isinstance(cycle.body, bytes):
                cycle.body = bytearray(cycle.body)
            cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """End a request that was begun."""
        cycle = self.cycle
        if self._refused:
            return
        if type(cycle) is not Cycle:
            super().on_message_complete()
        elif not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # --- Between two requests ---------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Go on with the next request that has come, or wait for one."""
        if self.pipeline:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self.flow.read_paused and not self.transport.is_closing():
            self.flow.resume_reading()
        # One timer is left to run over many pauses: to set one and to cancel it costs 1.5 us.
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._close_when_idle_at(self._idle_since_s + self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = self.loop.time()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if nothing has come for long enough, and nothing is being served."""
        self.timeout_keep_alive_task = None
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            # The end of that request sets the timer again.
            return
        at_s = self._idle_since_s + self.timeout_keep_alive
        if at_s > self.loop.time():
            self._close_when_idle_at(at_s)
        else:
            super().timeout_keep_alive_handler()

    def _close_when_idle_at(self, at_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(at_s, self.timeout_keep_alive_handler)

    # --- The end ----------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - says nothing that we do not
        """Refuse what is no HTTP, and close: nobody knows where the next request begins."""
        self._refused = True
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                # The request before it is still being answered; close when that is done.
                cycle.keep_alive = False
                return
            if cycle.response_started or self.pipeline:
                # It would be taken for the rest of that answer, or for the answer to another.
                self.transport.close()
                return
        request_id = new_request_id()
        log.info("unreadable_request_refused", request_id=request_id)
        detail = "This cannot be served as HTTP/1.1; see to the request line and the headers"
        response = problem("invalid_header", detail, instance=None, request_id=request_id)
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
        head += [name + b": " + value for name, value in response.raw_headers]
        head.append(b"x-request-id: " + request_id.encode())
        self.transport.write(b"\r\n".join([*head, b"", response.body]))
        self.transport.close()

    def _has_body(self) -> bool:
        headers = dict(self.headers)
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


class Cycle(RequestResponseCycle):
    """A plain request and its answer, either of which may go as a whole: see `Exchange`."""

    logger = logging.getLogger("uvicorn.error")
    task: asyncio.Task[None]

    def __init__(self, protocol: Protocol, scope: Any) -> None:
        # As uvicorn does, without passing seventeen things.
        self.scope = scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.default_headers = protocol.server_state.default_headers
        self.on_response = protocol.on_response_complete
        self.keep_alive = protocol.parser.should_keep_alive()
        self._tasks = protocol.tasks

    # What most have in common, until one is different.
    body: Any = b""
    message_event: Any
    access_log = False
    disconnected = False
    waiting_for_100_continue = False
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding: bool | None = None
    expected_content_length = 0
    _is_read = False

    async def run(self, app: Any) -> None:
        """Serve the request."""
        try:
            await app(self.scope, self.receive, self.send)
            if not self.response_complete:
                # What an application may not do, uvicorn knows how to end.
                await self.run_asgi(_give_up)
        except BaseException as failure:  # noqa: BLE001 - as uvicorn does
            await self.run_asgi(partial(_raise, failure))
        finally:
            self._tasks.discard(self.task)
            # Both lead back here: circles would be left for the garbage collector.
            scope: Any = self.scope
            del scope[EXCHANGE]
            self.on_response = _nothing

    async def receive(self) -> Any:
        """Give what has come of the body; all of it, when it came with the head."""
        if self.whole_body is not None:
            self.message_event.clear()
            return {"type": "http.request", "body": self.take_body(), "more_body": False}
        if self.message_event is _NOBODY_WAITS:
            self.message_event = asyncio.Event()
            if self.body and not self._is_read:
                self.message_event.set()
        message: Any = await super().receive()
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    @property
    def whole_body(self) -> bytes | None:
        """The body; None unless it has come as a whole, and nobody has read it yet."""
        if self.more_body or self.disconnected or self.response_complete or self._is_read:
            return None
        return bytes(self.body)

    def take_body(self) -> bytes:
        """Give what has come of the body, and keep nothing of it."""
        self._is_read = True
        body, self.body = self.body, b""
        return bytes(body)

    async def send_whole(self, status: int, head: str, body: bytes, *, is_last: bool) -> None:
        """Send an answer in one write; `head` has its headers, each with the end of its line.

        Nothing comes after the `is_last` on a connection.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if is_last or not self.keep_alive:
            self.keep_alive = False
            head += "connection: close\r\n"
        date = _write_headers(*self.default_headers)
        parts = (STATUS_LINE[status], date, head.encode("latin-1"), b"\r\n", body)
        self.response_started = self.response_complete = True
        if len(body) < COPIED_BYTES:
            self.transport.write(b"".join(parts))
        else:
            self.transport.writelines(parts)
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class _NobodyWaits:
    """What stands for the event until somebody waits for it, which few do."""

    def set(self) -> None:
        """Wake nobody."""

    def clear(self) -> None:
        """Let nobody wait."""


_NOBODY_WAITS = Cycle.message_event = _NobodyWaits()


def _nothing() -> None:
    """What an answer that has ended sets off."""


@lru_cache(maxsize=8)
def _write_headers(*headers: tuple[bytes, bytes]) -> bytes:
    """Write headers as they are sent: those that uvicorn has anew every second."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


async def _give_up(*_: object) -> None:
    """End without more to say."""


async def _raise(failure: BaseException, *_: object) -> None:
    """Say what went wrong to who runs an application."""
    raise failure


_ASGI = {"version": "3.0", "spec_version": "2.3"}

_SPECIAL = frozenset(
    {
        # Whoever is told to go on, or to speak something else; and where proxies say who asks.
        *(b"expect", b"upgrade", b"x-forwarded-for", b"x-forwarded-proto"),
    }
)
"""The headers that uvicorn does something about."""

_NOWHERE: Any = deque(maxlen=0)
"""Where what is named behind a body is put, instead of into the headers."""

_PLAIN_URL = re.compile(rb"(/(?!/)[A-Za-z0-9/._~-]{0,400})(?:\?([!-\"$-~]{0,400}))?")
"""A URL that is what it says: a path with nothing to decode, and a query."""
