"""The ASGI application."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from app import __version__
from app.api.middleware import DeadlineMiddleware, ExactCORSMiddleware, RequestMiddleware
from app.api.problems import ProblemMiddleware, describe_http_exception
from app.api.routes import build_routes
from app.errors import StoreError
from app.logs import configure_logging
from app.settings import Settings, load_settings
from app.wiring import AppState, build_services

log = structlog.get_logger()


def create_app(settings: Settings) -> Starlette:
    """Make the application."""
    app = Starlette(
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
    return create_app(settings)


def _lifespan(settings: Settings) -> Callable[[Starlette], AbstractAsyncContextManager[AppState]]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[AppState]:
        services = build_services(settings)
        await services.health.start()
        try:
            await services.manager.learn_catalogues()
        except StoreError as away:
            # The store may come later: the process serves, says that it is down, and heals.
            log.warning("store_absent_at_start", code=away.code)
        _drain_on_sigterm(settings.drain_s, services.health.stop_soon)
        log.info("process_ready", version=__version__)
        try:
            yield AppState(services=services, settings=settings)
        finally:
            await services.aclose()
            log.info("process_stopped")

    return lifespan


def _drain_on_sigterm(drain_s: float, announce: Callable[[], None]) -> None:
    """Put a drain before what the server does at SIGTERM: say `stopping`, serve on, then stop.

    A balancer needs that time to see it and to send its requests elsewhere. SIGINT, which comes
    from a keyboard, stops at once.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop):
        return
    loop = asyncio.get_running_loop()

    def drain(number: int, frame: FrameType | None) -> None:
        announce()
        log.info("drain_started", drain_s=drain_s)
        loop.call_soon_threadsafe(loop.call_later, drain_s, stop, number, frame)

    signal.signal(signal.SIGTERM, drain)
