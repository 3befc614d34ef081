"""What surrounds every request: its id, its context, its line in the log, and CORS."""

import asyncio
import os
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.headers import is_request_id
from app.api.problems import CLIENT_CLOSED, problem
from app.clock import monotonic_s
from app.context import RequestContext, reset_context, set_context
from app.errors import DeadlineExceededError

log = structlog.get_logger()

ROUTE = "onboarding.route"
"""Where in the scope the dispatcher leaves the template of the route."""

SESSION_ID = "onboarding.session_id"
"""Where it leaves the id of the session, once it is known to be one."""

QUIET = "onboarding.quiet"
"""Where it says that no line is to be logged: for probes, which ask every second."""


class RequestMiddleware:
    """Gives each request an id and a context, and logs one line when it is done."""

    def __init__(self, app: ASGIApp, deadline_s: float) -> None:
        self.app = app
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun_s = monotonic_s()
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if is_request_id(sent) else os.urandom(16).hex()
        context = RequestContext(request_id, begun_s + self._deadline_s)
        status = CLIENT_CLOSED

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        token = set_context(context)
        try:
            await self.app(scope, receive, note)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        finally:
            if QUIET not in scope:
                known = SESSION_ID in scope
                log.info(
                    "request_served",
                    method=scope["method"],
                    route=scope.get(ROUTE),
                    status=status,
                    duration_ms=round((monotonic_s() - begun_s) * 1000, 2),
                    redis_commands=context.meter.commands,
                    retries=context.meter.retries,
                    **({"session_id": scope[SESSION_ID]} if known else {}),
                )
            reset_context(token)


class DeadlineMiddleware:
    """Gives up on a request whose answer has not begun when its time is over."""

    def __init__(self, app: ASGIApp, deadline_s: float) -> None:
        self.app = app
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises `DeadlineExceededError`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._deadline_s) as limit:

                async def lift(message: Message) -> None:
                    limit.reschedule(None)
                    await send(message)

                await self.app(scope, receive, lift)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError from None


class ExactCORSMiddleware:
    """CORS for the listed origins; to any other, no header says that CORS exists here."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app = app
        self._origins = frozenset(origins)
        self._cors = _ProblemCORS(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=[
                *("Content-Type", "If-Match", "If-None-Match", "Idempotency-Key"),
                *("X-Request-ID", "Authorization", "Last-Event-ID"),
            ],
            expose_headers=[
                *("ETag", "Location", "Retry-After", "X-Request-ID", "Idempotent-Replayed"),
            ],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        known = scope["type"] == "http" and Headers(scope=scope).get("origin") in self._origins
        await (self._cors if known else self.app)(scope, receive, send)


class _ProblemCORS(CORSMiddleware):
    """Starlette's CORS, refusing a preflight with a problem instead of plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        detail = "The preflight asks for a method or a header that is not allowed here"
        scope = {"raw_path": b"*"}
        return problem(scope, "invalid_header", detail, headers={"vary": "Origin"})
