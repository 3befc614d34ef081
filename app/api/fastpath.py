"""The way of the requests that wizards send all day: what surrounds each of them, in one function.

The layers that stand around every request (Starlette's own, the router, `RequestMiddleware`, CORS,
`ProblemMiddleware`, `DeadlineMiddleware`) cost more than what these requests ask for. Those that
name a session in the plain way and are answered as a whole need none of their special cases, so
the same is done here once, flat: an id, a context, a deadline, errors as problems, a line in the
log. Who may do it, the checks and the handlers are the same (`Resource.endpoints`).

Whatever is not plain goes through the layers. tests/api/test_fastpath.py sends the same requests
both ways and compares the answers and the lines.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import structlog
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.access import AccessMiddleware
from app.api.calls import Reply
from app.api.dispatch import Resource
from app.api.headers import describe_limits, is_request_id
from app.api.middleware import FIELDS, STANDINGS, tell_served
from app.api.problems import CLIENT_CLOSED, explain
from app.api.streaming import EXCHANGE, Exchange
from app.clock import monotonic_s
from app.context import RequestContext, new_request_id, set_context
from app.errors import DeadlineExceededError
from app.wiring import Services

log = structlog.get_logger()

LOOK_S = 0.1
"""How often requests are looked through for those whose time is over, in seconds."""

GIVEN_UP = math.inf
"""What stands for the deadline of a request that was given up at it."""


class FastPath:
    """Serves the plain requests by itself, and hands all others on."""

    def __init__(
        self, app: ASGIApp, routes: Iterable[Route], *, deadline_s: float, origins: Sequence[str]
    ) -> None:
        self.app = app
        self._log = log.bind()
        self._deadline_s = deadline_s
        self._origins = frozenset(origin.encode() for origin in origins)
        self._endpoints = dict(_plain_endpoints(routes))
        self._running: dict[asyncio.Task[Any], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request, or what else a server asks of an application."""
        path = _PLAIN_PATH.fullmatch(scope["path"]) if EXCHANGE in scope else None
        if path is not None:
            found = self._endpoints.get((scope["method"], path[2], path[3] is None))
            fields = dict(scope["headers"])
            # Not where a header comes twice, nor for a page of somebody else.
            if (
                found is not None
                and len(fields) == len(scope["headers"])
                and fields.get(b"origin") not in self._origins
            ):
                scope[FIELDS] = fields
                return self._serve(scope, receive, found, path)
        return self.app(scope, receive, send)

    async def _serve(
        self, scope: Scope, receive: Receive, found: "_Found", path: re.Match[str]
    ) -> None:
        begun_s = monotonic_s()
        (route, gate), (session_id, _, step) = found, path.groups()
        scope["path_params"] = {"id": session_id} if step is None else {"id": session_id, "n": step}
        sent = scope[FIELDS].get(b"x-request-id")
        request_id = "" if sent is None else sent.decode("latin-1")
        if not request_id or not is_request_id(request_id):
            request_id = new_request_id()
        context = RequestContext(request_id, begun_s + self._deadline_s)
        # The server made a task for this request, so its context is nobody else's.
        set_context(context)
        exchange: Exchange = scope[EXCHANGE]
        task = exchange.task
        self._running[task] = context.deadline_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        services: Services = scope["state"]["services"]
        reply: Any = None
        status, answered_s = CLIENT_CLOSED, 0.0
        try:
            try:
                reply = await (gate.reply_at_once(scope, context) or gate.reply(scope, receive))
            except asyncio.CancelledError:
                if self._running[task] != GIVEN_UP:
                    raise
                task.uncancel()
                reply = explain(scope, DeadlineExceededError())
            except ClientDisconnect:
                pass  # Nobody is left to answer.
            except Exception as failure:  # noqa: BLE001 - the last resort, nobody sees a stack
                reply = explain(scope, failure)
            finally:
                del self._running[task]
            answered_s = monotonic_s()
            if reply is not None:
                if type(reply) is Reply:
                    status, head = reply.status, reply.head
                else:
                    status = reply.status_code
                    lines = [b"%b: %b\r\n" % pair for pair in reply.raw_headers]
                    head = b"".join(lines).decode("latin-1")
                limits = describe_limits(scope[STANDINGS]) if STANDINGS in scope else ""
                head = f"{head}x-request-id: {request_id}\r\n{limits}"
                is_last = services.health.is_stopping
                await exchange.send_whole(status, head, reply.body, is_last=is_last)
        finally:
            method = scope["method"]
            tell_served(self._log, method, route, context, status, begun_s, answered_s)

    def _look(self) -> None:
        """Give up on requests whose time is over."""
        now_s = monotonic_s()
        for task, deadline_s in self._running.items():
            if deadline_s < now_s:
                self._running[task] = GIVEN_UP
                task.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK_S, self._look) if self._running else None


class _Found(NamedTuple):
    """What serves a plain request: the route, and who lets it in."""

    route: str
    gate: AccessMiddleware


def _plain_endpoints(routes: Iterable[Route]) -> Iterator[tuple[tuple[str, str, bool], _Found]]:
    """Give what is found by a method, the word behind the session's id, and whether that is all."""
    for route in routes:
        shape = _PLAIN_ROUTE.fullmatch(route.path)
        resource = route.endpoint
        if shape and isinstance(resource, Resource):
            for method in resource.plain:
                found = _Found(route.path, resource.endpoints[method])
                yield (method, shape[1], shape[2] is None), found


_PLAIN_ROUTE = re.compile(r"/api/v1/onboarding/\{id\}/([a-z-]+)(/\{n\})?")
_PLAIN_PATH = re.compile(
    r"/api/v1/onboarding/"
    r"([0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})"
    r"/([a-z-]+)(?:/([0-9]+))?"
)
