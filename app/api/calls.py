"""A call: a request whose path, headers and body have been checked, in this order.

Nothing here asks the store: a request that is refused here has cost it nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.headers import (
    EntityTags,
    check_media_type,
    parse_entity_tags,
    parse_idempotency_key,
)
from app.api.middleware import QUIET, ROUTE, SESSION_ID
from app.errors import (
    Fault,
    InvalidRequestError,
    InvalidStepDataError,
    PayloadTooLargeError,
    RequestError,
    SessionNotFoundError,
)
from app.onboarding.catalogue import parse_step_id
from app.onboarding.documents import MAX_FAULTS, Document, json_pointer
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import is_public_id
from app.onboarding.steps import Precondition
from app.services.manager import OnboardingSessionManager
from app.settings import Settings
from app.wiring import AppState, Services

if TYPE_CHECKING:
    from app.api.operations import Body, Operation

Model = TypeVar("Model", bound=BaseModel)

OTHER_BODY_BYTES = 64 * 1024
"""Largest body where the settings name no limit of its own, in bytes."""


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. `session_id`, `step_id` and `body` are those that the operation has."""

    scope: Scope
    services: Services
    session_id: str
    step_id: int
    if_match: EntityTags | None
    if_none_match: EntityTags | None
    idempotent: IdempotentRequest | None
    body: Document | None

    @property
    def manager(self) -> OnboardingSessionManager:
        """The use cases of a session."""
        return self.services.manager

    @property
    def precondition(self) -> Precondition:
        """The preconditions of a change: If-Match compares strongly, If-None-Match weakly."""
        return Precondition(
            if_match=None if self.if_match is None else self.if_match.versions(weakly=False),
            if_none_match=(
                None if self.if_none_match is None else self.if_none_match.versions(weakly=True)
            ),
        )

    @property
    def query(self) -> dict[str, str]:
        """The query parameters. Raises `InvalidRequestError` for one that comes twice."""
        try:
            pairs = parse_qsl(
                self.scope["query_string"].decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=50,
            )
        except ValueError:
            raise InvalidRequestError("The query is not percent-encoded UTF-8") from None
        if len(dict(pairs)) != len(pairs):
            raise InvalidRequestError("A query parameter may be sent once")
        return dict(pairs)

    def data(self) -> Document:
        """The member `data` of the body, with its bytes. Raises `InvalidStepDataError`."""
        return self.document().part("data", InvalidStepDataError)

    def document(self) -> Document:
        """The body of an operation that requires one."""
        if self.body is None:
            raise AssertionError("the operation takes no body")
        return self.body

    def parse(self, model: type[Model], defaults: dict[str, Any] | None = None) -> Model:
        """Read the body, and `defaults` behind it, as a model. Raises `InvalidRequestError`."""
        members = {**(defaults or {}), **(self.body or {})}
        try:
            return model.model_validate(members)
        except ValidationError as unfit:
            faults = [
                Fault(pointer=json_pointer(each["loc"]), code=each["type"], detail=each["msg"])
                for each in unfit.errors(include_url=False, include_input=False)
            ][:MAX_FAULTS]
        names = ", ".join(sorted({fault["pointer"][1:] for fault in faults}))
        raise InvalidRequestError(f"Not acceptable: {names}", faults)

    def answer(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        """Answer with a document, or with anything that becomes JSON."""
        body = content.text if isinstance(content, Document) else orjson.dumps(content)
        headers = {"cache-control": "no-store", **(headers or {})}
        if self.idempotent is not None and self.idempotent.replayed:
            headers["idempotent-replayed"] = "true"
        return Response(body, status, headers, "application/json")

    def not_modified(self, etag: str) -> Response:
        """Answer that the client has what it asks for."""
        return Response(status_code=304, headers={"cache-control": "no-store", "etag": etag})


class Resource:
    """One path: an ASGI application that checks a request and hands it to its operation."""

    def __init__(self, path: str, operations: dict[str, "Operation"]) -> None:
        """Take the operations of a path by their methods."""
        self.path = path
        self._operations = dict(operations)
        if "GET" in operations:
            self._operations["HEAD"] = operations["GET"]
        self._allow = ", ".join(sorted(self._operations))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises what the operation and the checks raise."""
        scope[ROUTE] = self.path
        operation = self._operations.get(scope["method"])
        if scope["path"].endswith("\n"):
            # The router's `$` matches before a final newline, which would alias every path.
            raise HTTPException(404)
        if operation is None:
            raise HTTPException(405, headers={"Allow": self._allow})
        if operation.quiet:
            scope[QUIET] = True
        response = await operation.handler(await _check(operation, scope, receive))
        await response(scope, receive, send)


async def _check(operation: "Operation", scope: Scope, receive: Receive) -> Call:
    state = cast("AppState", scope["state"])
    services, settings = state["services"], state["settings"]
    parameters: dict[str, str] = scope["path_params"]
    session_id, step_id = parameters.get("id", ""), 0
    if session_id:
        if not is_public_id(session_id):
            raise SessionNotFoundError
        scope[SESSION_ID] = session_id
    if "n" in parameters:
        step_id = parse_step_id(parameters["n"])
        services.manager.check_known_step(step_id)

    headers = Headers(scope=scope)
    if_match = if_none_match = None
    if "If-Match" in operation.preconditions:
        if_match = parse_entity_tags("If-Match", headers.getlist("if-match"))
    if "If-None-Match" in operation.preconditions:
        if_none_match = parse_entity_tags("If-None-Match", headers.getlist("if-none-match"))
    key = None
    if operation.idempotency_key:
        key = parse_idempotency_key(headers.getlist("idempotency-key"))

    raw = b""
    body = None
    if operation.body is not None:
        raw = await _read(operation.body, settings, headers, receive)
        if raw or operation.body.required:
            steps = operation.body.limit == "step"
            body = Document.parse(raw, InvalidStepDataError if steps else InvalidRequestError)
    idempotent = None
    if key is not None:
        idempotent = IdempotentRequest.of(
            caller="",
            method=scope["method"],
            path=scope["path"],
            key=key,
            query=scope["query_string"],
            body=raw,
        )
    return Call(scope, services, session_id, step_id, if_match, if_none_match, idempotent, body)


async def _read(body: "Body", settings: Settings, headers: Headers, receive: Receive) -> bytes:
    """Read a body no larger than it may be; one that says it is larger is not read at all."""
    limit = settings.max_step_bytes if body.limit == "step" else OTHER_BODY_BYTES
    length = headers.get("content-length")
    chunked = "transfer-encoding" in headers
    if body.required or chunked or (length or "0").strip("0"):
        check_media_type(
            headers.get("content-type"), headers.get("content-encoding"), patch=body.patch
        )
    if length is not None and length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(limit: int) -> RequestError:
    return PayloadTooLargeError(f"The body may take {limit} bytes")
