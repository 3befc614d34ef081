"""The HTTP server: uvicorn, with what it says and does by itself done our way."""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from app.api.problems import problem
from app.api.streaming import ABORT
from app.context import new_request_id
from app.metrics import forget_process, shared_by_workers

log = structlog.get_logger()

GRACE_S = 10
"""How long requests in flight may go on after the drain, in seconds."""

KEEP_ALIVE_S = 75
"""How long a connection may be idle, in seconds. Longer than balancers keep theirs (nginx and most
others 60): whoever closes first must be the one that sends, or a request may meet the close."""

LONGEST_SEGMENT = 1_600
"""Where a longer segment of a path is cut, in bytes: nothing that we serve has one (a user's id has
1,536 at most), and what is cut stays what it was, no id and no number. httptools reads no URL of
65,536 bytes or more."""

LONGEST_HEAD = 1024 * 1024
"""Longest request line and headers that are waited for, in bytes. Four reads of a socket: what
comes in one with the end of a head may be a body."""

LONGEST_QUERY = 30_000
"""Longest query that is read, in bytes."""

UNREADABLE_QUERY = b"%FF"
"""What stands for a longer one: no UTF-8, so whoever looks into it refuses it."""


BACKLOG = 2048
"""Connections that may wait to be accepted."""


READY_ANSWER_S = 0.2
"""How long a worker may take to say that it serves, in seconds."""


class CannotListenError(Exception):
    """Nobody can listen on the address; the message is one line that names the variables."""


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one. Raises `CannotListenError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as refused:
        reason = (refused.strerror or "no such address").partition(" (")[0]
        raise CannotListenError(f"HOST, PORT: cannot listen there ({reason})") from None
    listener.set_inheritable(True)
    # Connections inherit it. uvloop sets it anyway; asyncio only where the socket names its
    # protocol, and without it an answer waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(factory: str, listener: socket.socket, workers: int) -> int:
    """Serve the application that a factory makes until a signal comes; return the exit status.

    With several workers this process only watches over them. To be called from the main thread.
    """
    config = make_config(factory, factory=True, workers=workers)
    if workers > 1:
        crew = Crew(config, sockets=[listener])
        with shared_by_workers():
            crew.run()
        failed = any(worker.exitcode == STARTUP_FAILURE for worker in crew.processes)
        return STARTUP_FAILURE if failed else 0
    server = uvicorn.Server(config)
    # uvicorn takes the signals when it serves, and when it is done sends itself what ended it: by
    # then it is the server again that hears it, and no harm is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])
    return 0 if server.started else STARTUP_FAILURE


def make_config(app: Callable[..., Any] | str, **options: Any) -> uvicorn.Config:
    """Make a configuration that serves an application, or what a factory of that name makes."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        **options,
    )


class Crew(Multiprocess):
    """Workers that are stopped by the signal that came: at SIGINT they do not drain."""

    _signal = signal.SIGTERM
    _known: frozenset[int | None] = frozenset()

    def handle_int(self) -> None:
        """Stop at once, as a keyboard asks."""
        self._signal = signal.SIGINT
        super().handle_int()

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have died, and count none that is gone as one that serves."""
        super().keep_subprocess_alive()
        known = frozenset(worker.pid for worker in self.processes)
        for pid in self._known - known:
            if pid is not None:
                forget_process(pid)
        self._known = known

    def terminate_all(self) -> None:
        """Pass the signal on; a worker that does not serve yet has nothing to drain."""
        for worker in self.processes:
            if worker.exitcode is None and worker.pid is not None:
                serves = worker.is_ready(timeout=READY_ANSWER_S)
                os.kill(worker.pid, self._signal if serves else signal.SIGTERM)


class Protocol(HttpToolsProtocol):
    """HTTP by httptools, with a problem as the answer to what is no HTTP."""

    _head_bytes = 0
    _in_head = True
    _refused = False

    def data_received(self, data: bytes) -> None:
        """Take what came, unless the head of a request has no end."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > LONGEST_HEAD:
                self.send_400_response("")
                return
        if not self._refused:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything: of a connection that was reset the timer would be left."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin a request, its URL no longer than can be parsed."""
        self._in_head = False
        path, mark, query = self.url.partition(b"?")
        segments = (segment[:LONGEST_SEGMENT] for segment in path.split(b"/"))
        query = query if len(query) <= LONGEST_QUERY else UNREADABLE_QUERY
        self.url = b"/".join(segments) + mark + query
        if self.parser.should_upgrade() and self._has_body():
            # The parser stops at an upgrade, and a body behind it would be lost in silence.
            self.send_400_response("")
            return
        # ASGI has no word for it: to close under an answer that a client takes no more of.
        scope: Any = self.scope
        scope[ABORT] = self.transport.abort
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request that was begun."""
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - says nothing that we do not
        """Refuse what is no HTTP, and close: nobody knows where the next request begins."""
        self._refused = True
        cycle: Any = self.cycle  # None before the first request, whatever its annotation says
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                # The request before it is still being answered; close when that is done.
                cycle.keep_alive = False
                return
            if cycle.response_started:
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
