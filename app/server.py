"""The HTTP server: uvicorn, with what it says and does by itself done our way."""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from app.metrics import forget_process, shared_by_workers
from app.protocol import Protocol

GRACE_S = 10
"""How long requests in flight may go on after the drain, in seconds."""

KEEP_ALIVE_S = 75
"""How long a connection may be idle, in seconds. Longer than balancers keep theirs (nginx and most
others 60): whoever closes first must be the one that sends, or a request may meet the close."""

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
