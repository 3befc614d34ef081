"""What surrounds every request: its id, its context, its line in the log, and CORS."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.headers import describe_policies, describe_standings, is_request_id
from app.api.problems import CLIENT_CLOSED, problem
from app.api.streaming import EXTEND
from app.clock import monotonic_s
from app.context import RequestContext, get_context, new_request_id, reset_context, set_context
from app.errors import DeadlineExceededError
from app.metrics import count_request
from app.wiring import Services

log = structlog.get_logger()

ROUTE = "onboarding.route"
"""Where in the scope the dispatcher leaves the template of the route."""

FIELDS = "onboarding.fields"
"""Where a plain request has its headers by their names, of which none comes twice."""

STANDINGS = "onboarding.standings"
"""Where it says how the caller stands with the limits, for the answer, whatever that will be."""

QUIET = "onboarding.quiet"
"""Where it says that nothing is to be logged or counted: for probes, which ask every second."""


class RequestMiddleware:
    """Gives each request an id and a context, counts it, and logs one line when it is done."""

    def __init__(self, app: ASGIApp, deadline_s: float) -> None:
        self.app = app
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _keep_encoded_slashes(scope)
        begun_s = monotonic_s()
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        request_id = sent if is_request_id(sent) else new_request_id()
        context = RequestContext(request_id, begun_s + self._deadline_s)
        status = CLIENT_CLOSED
        answered_s = 0.0

        waits_for_leave = "expect" in headers
        read = False

        async def note_body() -> Message:
            nonlocal read
            message = await receive()
            read = not message.get("more_body", False)
            return message

        async def note(message: Message) -> None:
            nonlocal status, answered_s
            if message["type"] == "http.response.start":
                status, answered_s = message["status"], monotonic_s()
                answer = MutableHeaders(scope=message)
                answer["x-request-id"] = request_id
                standings = scope.get(STANDINGS)
                if standings:
                    answer["ratelimit-policy"] = describe_policies(standings)
                    answer["ratelimit"] = describe_standings(standings)
                # Whether a body that waits for leave still comes is open: what comes next may be
                # it, or not.
                if (waits_for_leave and not read) or is_stopping(scope):
                    answer["connection"] = "close"
            await send(message)

        token = set_context(context)
        try:
            await self.app(scope, note_body if waits_for_leave else receive, note)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        finally:
            if QUIET not in scope:
                route, known = scope.get(ROUTE), get_context() or context
                tell_served(log, scope["method"], route, known, status, begun_s, answered_s)
            reset_context(token)


def tell_served(
    log: Any,
    method: str,
    route: str | None,
    context: RequestContext,
    status: int,
    begun_s: float,
    answered_s: float,
) -> None:
    """Count a request that has ended, and write its line to a log.

    Times are those of `clock.monotonic_s`; `answered_s` is 0 when no answer began.
    """
    ended_s = monotonic_s()
    # Until the answer began: what comes after it goes at the pace of the client.
    count_request(route, method, status, (answered_s or ended_s) - begun_s)
    log.info(
        "request_served",
        method=method,
        route=route,
        status=status,
        duration_ms=round((ended_s - begun_s) * 1000, 2),
        redis_commands=context.meter.commands,
        retries=context.meter.retries,
        principal=context.principal.label,
    )


def is_stopping(scope: Scope) -> bool:
    """Say whether this process is about to end, so that clients had better go elsewhere.

    A connection that is kept until the end is closed under whoever sends just then.
    """
    services: Services | None = scope.get("state", {}).get("services")
    return services is not None and services.health.is_stopping


def _keep_encoded_slashes(scope: Scope) -> None:
    """Let %2F stand in the decoded path: it is a part of a segment, no separator (RFC 3986 2.2)."""
    path = scope.get("raw_path", b"").partition(b"?")[0]
    if b"%2f" in path.lower():
        scope["path"] = unquote(re.sub(b"(?i)%2f", b"%252F", path).decode("ascii"))


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

                def extend() -> float:
                    limit.reschedule(asyncio.get_running_loop().time() + self._deadline_s)
                    return self._deadline_s

                scope[EXTEND] = extend
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
                *("X-Request-ID", "Authorization", "Last-Event-ID", "Content-Disposition"),
                "X-API-Key",
            ],
            expose_headers=[
                *("ETag", "Location", "Retry-After", "X-Request-ID", "Idempotent-Replayed"),
                *("Content-Disposition", "WWW-Authenticate", "RateLimit", "RateLimit-Policy"),
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
        context = get_context()
        return problem(
            "invalid_header",
            detail,
            instance=None,
            request_id=None if context is None else context.request_id,
            headers={"vary": "Origin"},
        )
