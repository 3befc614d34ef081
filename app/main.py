"""The ASGI application."""

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app import __version__
from app.api.fastpath import FastPath
from app.api.middleware import DeadlineMiddleware, ExactCORSMiddleware, RequestMiddleware
from app.api.problems import ProblemMiddleware, describe_http_exception
from app.api.routes import build_routes
from app.logs import configure_logging
from app.metrics import discard_shared
from app.settings import Settings, load_settings
from app.wiring import AppState, build_services

log = structlog.get_logger()

ORPHAN_GRACE_S = 2.0
"""How long a worker without its parent finishes requests, in seconds: the store may be gone too."""


class Service(Starlette):
    """The application, with a short way for the requests that come all day."""

    def __init__(self, settings: Settings, routes: list[Route], **options: Any) -> None:
        super().__init__(routes=routes, **options)
        self.fast_path = FastPath(
            super().__call__,
            routes,
            deadline_s=settings.request_deadline_s,
            origins=settings.cors_origins,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        await self.fast_path(scope, receive, send)


def create_app(settings: Settings) -> Starlette:
    """Make the application."""
    app = Service(
        settings,
        routes=build_routes(),
        lifespan=_lifespan(settings),
        middleware=[
            Middleware(RequestMiddleware, deadline_s=settings.request_deadline_s),
            Middleware(ExactCORSMiddleware, origins=settings.cors_origins),
            Middleware(ProblemMiddleware),
            Middleware(DeadlineMiddleware, deadline_s=settings.request_deadline_s),
        ],
        exception_handlers={HTTPException: describe_http_exception},
    )
    # `/x/` is another path than `/x`; a redirect would lose the body of a POST.
    app.router.redirect_slashes = False
    return app


def create_app_from_environment() -> Starlette:
    """Make the application as a server's process needs it, logging included."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    app = create_app(settings)
    # What was loaded stays as long as the process. To look through all of it for garbage would hold
    # every request up for 40 ms and more, and most of all when many calls fail at once.
    gc.freeze()
    # What a request leaves behind goes by its reference counts. A look at the young after every 700
    # costs a fifth of the throughput, and holds some requests up for 6 ms more.
    gc.set_threshold(50_000, 20, 100)
    return app


def _lifespan(settings: Settings) -> Callable[[Starlette], AbstractAsyncContextManager[AppState]]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[AppState]:
        services = build_services(settings)
        await services.start()
        _announce_stop(settings.drain_s, services.stop_soon)
        _end_with_parent()
        log.info("process_started", version=__version__)
        try:
            yield AppState(services=services, settings=settings)
        finally:
            await services.aclose()
            if _is_orphan():
                discard_shared()
            log.info("process_stopped")

    return lifespan


def _announce_stop(drain_s: float, announce: Callable[[], None]) -> None:
    """Put an announcement before what the server does at a signal, and at SIGTERM a drain.

    A balancer needs that time to see it and to send its requests elsewhere: say `stopping`, serve
    on, then stop. SIGINT, which comes from a keyboard, stops at once. Without the announcement the
    server would wait for every live stream.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number, delay_s in ((signal.SIGTERM, drain_s), (signal.SIGINT, 0.0)):
        stop = signal.getsignal(number)
        if callable(stop):
            signal.signal(number, _announcing(stop, announce, loop, delay_s))


def _announcing(
    stop: Callable[[int, FrameType | None], object],
    announce: Callable[[], None],
    loop: asyncio.AbstractEventLoop,
    delay_s: float,
) -> Callable[[int, FrameType | None], None]:
    def drain(number: int, frame: FrameType | None) -> None:
        # A signal may come in the middle of anything, a line of the log too; the loop does it
        # between two things.
        loop.call_soon_threadsafe(announce)
        if delay_s or number == signal.SIGTERM:
            loop.call_soon_threadsafe(loop.call_later, delay_s, stop, number, frame)
            loop.call_soon_threadsafe(lambda: log.info("drain_started", drain_s=delay_s))
        else:
            stop(number, frame)

    return drain


def _is_orphan() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _end_with_parent() -> None:
    """Stop when the process that watches over the workers is gone, whatever ended it.

    It held the embedded store and would have passed on the signals: without it a worker would
    hold the port for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(parent.sentinel)
        log.warning("parent_process_lost")
        os.kill(os.getpid(), signal.SIGINT)
        loop.call_later(ORPHAN_GRACE_S, os._exit, 1)

    loop.add_reader(parent.sentinel, stop)
