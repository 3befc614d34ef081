"""From a request to a call: path, headers and body are checked, in this order.

Until then nothing asks the store, unless who sends it has to be looked up. Then it is asked whose
the session is, and the handler does the rest.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.access import AccessMiddleware
from app.api.calls import Call
from app.api.headers import (
    check_codings,
    check_media_type,
    parse_entity_tags,
    parse_idempotency_key,
)
from app.api.middleware import FIELDS, QUIET, ROUTE
from app.api.operations import Body, Handler, Operation, Stream
from app.api.streaming import EXCHANGE, Content, too_large
from app.context import RequestContext, get_context
from app.errors import (
    Fault,
    InvalidRequestError,
    InvalidStepDataError,
    OnboardingError,
    RequestError,
    SessionNotFoundError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from app.onboarding.access import NOBODY, Access
from app.onboarding.audit import Lane
from app.onboarding.catalogue import parse_step_id
from app.onboarding.documents import Document
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.tasks import check_short_id, is_task_id
from app.onboarding.tokens import check_token_id
from app.services.manager import OnboardingSessionManager
from app.settings import Settings
from app.wiring import AppState, Services

T = TypeVar("T")

DONE = "done"
"""What the record says of a call that succeeded; of one that the store failed it names the code."""

INTERRUPTED = "interrupted"
"""What it says of a call that was cut short: by a client that left, its deadline, or a crash."""

OTHER_BODY_BYTES = 64 * 1024
"""Largest body where the settings name no limit of its own, in bytes."""


PARSED_AT_ONCE = 16 * 1024
"""Body below which it is read on the event loop, in bytes: 10 ms at worst."""


class Resource:
    """One path: an ASGI application that hands a request to the operation of its method."""

    def __init__(self, path: str, operations: Mapping[str, Operation]) -> None:
        """Take the operations of a path by their methods."""
        self.path = path
        self.endpoints = {
            method: AccessMiddleware(Endpoint(operation), operation)
            for method, operation in operations.items()
        }
        self.plain = {method for method, operation in operations.items() if _is_plain(operation)}
        if "GET" in operations:
            self.endpoints["HEAD"] = self.endpoints["GET"]
        self._allow = ", ".join(sorted(self.endpoints))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises what its endpoint raises."""
        scope[ROUTE] = self.path
        endpoint = self.endpoints.get(scope["method"])
        parameters = scope["path_params"].values()
        if scope["path"].endswith("\n") and not any(each.endswith("\n") for each in parameters):
            # The router's `$` matches before a final newline, which would alias every path.
            raise HTTPException(404)
        if endpoint is None:
            raise HTTPException(405, headers={"Allow": self._allow})
        await endpoint(scope, receive, send)


def _is_plain(operation: Operation) -> bool:
    """Say whether bodies come, and answers go, in one piece."""
    return (
        operation.at_once == "requests"
        and not operation.quiet
        and not isinstance(operation.body, Stream)
        and all(answer.media_type == "application/json" for answer in operation.answers)
    )


class Endpoint:
    """One operation: an ASGI application that checks a request and hands it to the handler."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._checked = [name for name in _CHECKS if f"{{{name}}}" in operation.path]
        # What few requests send, and is looked for only then.
        self._conditions = frozenset(
            {name.lower().encode() for name in operation.preconditions}
            | ({b"idempotency-key"} if operation.idempotency_key else set())
        )
        body = operation.body
        self._takes_body = isinstance(body, Body)
        self._unfit: type[RequestError] = InvalidRequestError
        if isinstance(body, Body) and body.limit == "step":
            self._unfit = InvalidStepDataError
        self._unusual = self._conditions | (_CODINGS if self._takes_body else frozenset())
        self.handle: Handler = self._handle_on_record if operation.audited else operation.handler
        """Handles a call that was checked, and is counted."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises what the checks and the handler raise."""
        operation = self._operation
        if operation.quiet:
            scope[QUIET] = True
        call = await self._take(scope, receive)
        # Counted from here on: whoever takes their time to send a body keeps nobody out.
        counted, whose = call.services.in_flight, ""
        if operation.at_once == "transfers":
            counted, whose = call.services.transfers, call.session_id or call.principal.identity
        if operation.at_once != "own":
            counted.enter(whose)
        try:
            await self._check_session(call)
            if operation.audited:
                await self._recorded(call, lambda: self._send(call, scope, receive, send))
            else:
                await self._send(call, scope, receive, send)
        finally:
            if operation.at_once != "own":
                counted.leave(whose)

    async def reply(self, scope: Scope, receive: Receive) -> ASGIApp:
        """Give the answer to a plain request. Raises what the checks and the handler raise."""
        call = await self._take(scope, receive)
        call.services.in_flight.enter()
        try:
            await self._check_session(call)
            return await self.handle(call)
        finally:
            call.services.in_flight.leave()

    def is_usual(self, scope: Scope) -> bool:
        """Say whether a plain request has no header that asks for more, and its body is here."""
        fields = scope[FIELDS]
        if not self._unusual.isdisjoint(fields):
            return False
        if not self._takes_body:
            return True
        body = scope[EXCHANGE].whole_body
        return (
            body is not None
            and 0 < len(body) < min(PARSED_AT_ONCE, scope["state"]["settings"].max_step_bytes)
            and fields.get(b"content-type") == b"application/json"
        )

    def call(self, scope: Scope, context: RequestContext) -> Call:
        """Give the call that a plain request is, of which `is_usual` holds.

        Raises what is wrong with the step's number, or the body.
        """
        services: Services = scope["state"]["services"]
        parameters = scope["path_params"]
        step_id = 0
        if "n" in parameters:
            step_id = _parse_known_step(services.manager, parameters["n"])
        call = Call(scope, services, context.principal, parameters["id"], step_id, parameters)
        if self._takes_body:
            call.body = Document.parse(scope[EXCHANGE].take_body(), self._unfit)
        return call

    async def _check_session(self, call: Call) -> None:
        if call.session_id:
            await call.services.access.check_session(call.principal, call.session_id)

    async def _handle_on_record(self, call: Call) -> ASGIApp:
        return await self._recorded(call, lambda: self._operation.handler(call))

    async def _send(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._operation.handler(call)
        await response(scope, receive, send)

    async def _recorded(self, call: Call, handle: Callable[[], Awaitable[T]]) -> T:
        """Handle what stays on record when it was done, or may have been."""
        outcome: str | None = INTERRUPTED
        try:
            answer = await handle()
            outcome = DONE
        except OnboardingError as failure:
            # Where the store did not answer, it may have been done all the same.
            outcome = failure.code if isinstance(failure, StoreUnavailableError) else None
            raise
        else:
            return answer
        finally:
            context = get_context()
            # Of nobody it is only known what they did when it succeeded.
            is_known = outcome == DONE or self._operation.access is not Access.OPEN
            if outcome is not None and is_known and context is not None:
                operates = self._operation.access is Access.OPERATE
                call.services.audit.record(
                    str(call.principal),
                    self._operation.name,
                    context.session_id,
                    outcome,
                    Lane.OPERATED if operates else Lane.DONE,
                )

    async def _take(self, scope: Scope, receive: Receive) -> Call:
        """Check a request, in the order that is promised: path, headers, body."""
        call, key = self._check(scope, receive)
        if self._operation.body is not None or key is not None:
            await self._take_rest(call, key, receive)
        return call

    def _check(self, scope: Scope, receive: Receive) -> tuple[Call, str | None]:
        """Check the path and the headers, and give the Idempotency-Key if there is one."""
        operation = self._operation
        state: AppState = scope["state"]
        services = state["services"]
        parameters: dict[str, str] = scope["path_params"]
        context = get_context()
        principal = NOBODY if context is None else context.principal
        session_id, step_id = parameters.get("id", ""), 0
        if session_id and (context is None or context.session_id != session_id):
            # Whoever asked for access has looked at it: it can be the id of no session.
            raise SessionNotFoundError
        if "n" in parameters:
            step_id = _parse_known_step(services.manager, parameters["n"])
        for name in self._checked:
            _CHECKS[name](parameters[name])
        if "user_id" in parameters:
            user_id = _read_segment(operation.path, scope, "user_id")
            parameters = {**parameters, "user_id": user_id}
        call = Call(scope, services, principal, session_id, step_id, parameters)
        key = None
        fields = scope.get(FIELDS) or dict(scope["headers"])
        if not self._conditions.isdisjoint(fields):
            sent = call.headers
            if "If-Match" in operation.preconditions:
                call.if_match = parse_entity_tags("If-Match", sent.getlist("if-match"))
            if "If-None-Match" in operation.preconditions:
                tags = sent.getlist("if-none-match")
                call.if_none_match = parse_entity_tags("If-None-Match", tags)
            if operation.idempotency_key:
                key = parse_idempotency_key(sent.getlist("idempotency-key"))
        if isinstance(operation.body, Stream):
            call.content = _open(operation.body, state["settings"], scope, receive)
        return call, key

    async def _take_rest(self, call: Call, key: str | None, receive: Receive) -> None:
        """Read and check the body, and take an Idempotency-Key together with it."""
        operation, scope, raw = self._operation, call.scope, b""
        if isinstance(operation.body, Body):
            settings: Settings = scope["state"]["settings"]
            raw = await _read(operation.body, settings, scope, receive)
            if raw or operation.body.required:
                if len(raw) < PARSED_AT_ONCE:
                    call.body = Document.parse(raw, self._unfit)
                else:
                    # A long look at 256 KB takes 0.2 s, which nobody else should wait for.
                    call.body = await asyncio.to_thread(Document.parse, raw, self._unfit)
        if key is not None:
            call.idempotent = IdempotentRequest.of(
                caller=call.principal.identity,
                method=scope["method"],
                path=scope["path"],
                key=key,
                query=scope["query_string"],
                body=raw,
            )


_CODINGS = frozenset({b"content-encoding", b"transfer-encoding"})


def _parse_known_step(manager: OnboardingSessionManager, text: str) -> int:
    """Read the number of a step. Raises `InvalidStepIdError` unless a catalogue in use has it."""
    step_id = manager.catalogue.numbers.get(text)
    if step_id is None:
        step_id = parse_step_id(text)
        manager.check_known_step(step_id)
    return step_id


def _check_task(task_id: str) -> None:
    # What can be no id answers like an unknown one.
    if not is_task_id(task_id):
        raise TaskNotFoundError


_CHECKS: Mapping[str, Callable[[str], None]] = {
    "task_id": _check_task,
    "short_id": check_short_id,
    "token_id": check_token_id,
}
"""What is asked of further parameters of a path, by their names."""


def _read_segment(template: str, scope: Scope, name: str) -> str:
    """Read a parameter of the path that may hold any character, a slash too.

    From the path as it was sent: in the decoded one a slash and the text %2F are the same.
    """
    segments = template.split("/")
    # Counted from the end: a proxy's prefix may come before.
    place = segments.index(f"{{{name}}}") - len(segments)
    sent = scope["raw_path"].partition(b"?")[0].split(b"/")[place]
    try:
        return unquote_to_bytes(sent).decode()
    except UnicodeDecodeError:
        detail = "Not percent-encoded UTF-8"
        fault = Fault(pointer=f"/{name}", code="string", detail=detail)
        raise InvalidRequestError(f"Not acceptable: {name}", [fault]) from None


def _open(body: Stream, settings: Settings, scope: Scope, receive: Receive) -> Content:
    """Let a body come in, unless it says that it is larger than it may be."""
    headers = Headers(scope=scope)
    limit = settings.max_upload_bytes if body.limit == "upload" else settings.max_result_bytes
    limit += body.form_bytes
    check_codings([*headers.getlist("content-encoding"), *headers.getlist("transfer-encoding")])
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large(limit)
    return Content(scope, receive, limit)


async def _read(body: Body, settings: Settings, scope: Scope, receive: Receive) -> bytes:
    """Read a body no larger than it may be; one that says it is larger is not read at all."""
    limit = settings.max_step_bytes if body.limit == "step" else OTHER_BODY_BYTES
    fields: Mapping[bytes, bytes] = scope.get(FIELDS) or dict(scope["headers"])
    length = fields.get(b"content-length", b"")
    is_usual = (
        fields.get(b"content-type") == b"application/json"
        and b"transfer-encoding" not in fields
        and b"content-encoding" not in fields
        and len(fields) == len(scope["headers"])
    )
    if not is_usual and (body.required or b"transfer-encoding" in fields or length.strip(b"0")):
        headers = Headers(scope=scope)
        codings = [*headers.getlist("content-encoding"), *headers.getlist("transfer-encoding")]
        check_media_type(headers.get("content-type"), codings, patch=body.patch)
    if length.isdigit() and int(length) > limit:
        raise too_large(limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        whole: bytes = message.get("body", b"")
        if len(whole) > limit:
            raise too_large(limit)
        return whole
    chunks: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()
