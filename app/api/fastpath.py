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
from collections.abc import Iterable, Sequence
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.dispatch import Resource
from app.api.headers import is_request_id
from app.api.middleware import HEADERS, ROUTE, is_stopping
from app.api.problems import CLIENT_CLOSED, explain
from app.api.streaming import WHOLE
from app.clock import monotonic_s
from app.context import RequestContext, get_context, new_request_id, set_context
from app.errors import DeadlineExceededError
from app.metrics import count_request
from app.onboarding.sessions import is_public_id

log = structlog.get_logger()

BASE = "/api/v1/onboarding/"

LOOK_S = 0.1
"""How often requests are looked through for those whose time is over, in seconds."""


class FastPath:
    """Serves the plain requests by itself, and hands all others on."""

    def __init__(
        self, app: ASGIApp, routes: Iterable[Route], *, deadline_s: float, origins: Sequence[str]
    ) -> None:
        self.app = app
        self._deadline_s = deadline_s
        self._origins = frozenset(origin.encode() for origin in origins)
        self._endpoints = dict(_plain_endpoints(routes))
        self._running: dict[asyncio.Task[Any], float] = {}
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        endpoint = self._find(scope) if WHOLE in scope else None
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        begun_s = monotonic_s()
        request_id = ""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = request_id or value.decode("latin-1")
            elif name == b"origin" and value in self._origins:
                await self.app(scope, receive, send)
                return
        if not is_request_id(request_id):
            request_id = new_request_id()
        context = RequestContext(request_id, begun_s + self._deadline_s)
        # The server made a task for this request, so its context is nobody else's.
        set_context(context)
        reply = await self._answer(endpoint, scope, receive, context.deadline_s)
        status = CLIENT_CLOSED
        answered_s = monotonic_s()
        if reply is not None:
            start, body = reply
            status = start["status"]
            headers = [*start["headers"], (b"x-request-id", request_id.encode())]
            for name, text in scope.get(HEADERS, {}).items():
                headers.append((name.encode(), text.encode()))
            if is_stopping(scope):
                headers.append((b"connection", b"close"))
            await scope[WHOLE](status, headers, body)
        known = get_context() or context
        method, route = scope["method"], scope[ROUTE]
        count_request(route, method, status, answered_s - begun_s)
        log.info(
            "request_served",
            method=method,
            route=route,
            status=status,
            duration_ms=round((monotonic_s() - begun_s) * 1000, 2),
            redis_commands=context.meter.commands,
            retries=context.meter.retries,
            principal=known.principal.label,
        )

    def _find(self, scope: Scope) -> ASGIApp | None:
        """Find the endpoint of a plain request, and note in the scope what its path says."""
        parts = scope["path"].split("/")
        if len(parts) < 6:
            return None
        found = self._endpoints.get((scope["method"], len(parts), parts[5]))
        if found is None or not parts[-1] or not scope["path"].startswith(BASE):
            return None
        if not is_public_id(parts[4]):
            return None
        scope[ROUTE], endpoint = found
        scope["path_params"] = (
            {"id": parts[4]} if len(parts) == 6 else {"id": parts[4], "n": parts[6]}
        )
        return endpoint

    async def _answer(
        self, endpoint: ASGIApp, scope: Scope, receive: Receive, deadline_s: float
    ) -> tuple[Message, bytes] | None:
        """Give the head and the body of the answer; None when nobody is left to take it."""
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        task = asyncio.current_task()
        if task is None:
            raise AssertionError("a server serves each request in a task")
        self._running[task] = deadline_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        try:
            await endpoint(scope, receive, collect)
        except asyncio.CancelledError:
            if task not in self._overdue:
                raise
            self._overdue.discard(task)
            task.uncancel()
            return _reply(explain(scope, DeadlineExceededError()))
        except ClientDisconnect:
            return None
        except Exception as failure:  # noqa: BLE001 - the last resort, so that nobody sees a stack
            return _reply(explain(scope, failure))
        finally:
            del self._running[task]
        return messages[0], messages[1]["body"]

    def _look(self) -> None:
        """Give up on requests whose time is over."""
        now_s = monotonic_s()
        for task, deadline_s in self._running.items():
            if deadline_s < now_s and task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
        running = bool(self._running)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(LOOK_S, self._look) if running else None


def _reply(response: Response) -> tuple[Message, bytes]:
    start = {"status": response.status_code, "headers": response.raw_headers}
    return start, bytes(response.body)


def _plain_endpoints(
    routes: Iterable[Route],
) -> Iterable[tuple[tuple[str, int, str], tuple[str, ASGIApp]]]:
    """Give what is found by method, number of segments and the word behind the session's id."""
    for route in routes:
        parts = route.path.split("/")
        resource = route.endpoint
        if not isinstance(resource, Resource) or not route.path.startswith(f"{BASE}{{id}}/"):
            continue
        if len(parts) == 6 or (len(parts) == 7 and parts[6] == "{n}"):
            for method, endpoint in resource.endpoints.items():
                if resource.is_plain(method):
                    yield (method, len(parts), parts[5]), (route.path, endpoint)
