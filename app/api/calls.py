"""A call: one request, checked, as handlers get it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.headers import EntityTags
from app.api.streaming import Content
from app.errors import Fault, InvalidRequestError, InvalidStepDataError
from app.onboarding.access import ANYONE, Principal
from app.onboarding.documents import Document, json_pointer
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.steps import NO_PRECONDITION, Precondition
from app.services.manager import OnboardingSessionManager
from app.wiring import Services

Model = TypeVar("Model", bound=BaseModel)


class Reply:
    """A JSON answer, there as a whole; Starlette's takes 4 us more to be made.

    `further` are headers beside those that all have, in lower case; no value holds a line break.
    """

    __slots__ = ("body", "further", "status")

    def __init__(self, status: int, body: bytes, further: Sequence[tuple[str, str]]) -> None:
        self.status = status
        self.body = body
        self.further = further

    @property
    def head(self) -> str:
        """The headers as they are sent, each with the end of its line."""
        text = f"{_HEAD}content-length: {len(self.body)}\r\n"
        for name, value in self.further:
            text += f"{name}: {value}\r\n"
        return text

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        """Send it, as an ASGI application does."""
        pairs = (*_ALWAYS, ("content-length", str(len(self.body))), *self.further)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


_ALWAYS = (("cache-control", "no-store"), ("content-type", "application/json"))
_HEAD = "".join(f"{name}: {value}\r\n" for name, value in _ALWAYS)


@dataclass(slots=True)
class Call:
    """One checked request of somebody who may send it. Handlers do not change it.

    `session_id`, `step_id`, `body` (JSON) and `content` (anything, as it comes) are those that the
    operation has; `parameters` are all those of the path, checked, by their names.
    """

    scope: Scope
    services: Services
    principal: Principal
    session_id: str
    step_id: int
    parameters: Mapping[str, str]
    if_match: EntityTags | None = None
    if_none_match: EntityTags | None = None
    idempotent: IdempotentRequest | None = None
    body: Document | None = None
    content: Content | None = None

    @property
    def headers(self) -> Headers:
        """The request's headers."""
        return Headers(scope=self.scope)

    @property
    def credential(self) -> bytes | None:
        """What was shown to say who sends the request; None where access control is off."""
        if self.principal is ANYONE:
            return None
        shown = self.headers.get("authorization") or self.headers.get("x-api-key") or ""
        return shown.encode("latin-1")

    @property
    def manager(self) -> OnboardingSessionManager:
        """The use cases of a session."""
        return self.services.manager

    @property
    def precondition(self) -> Precondition:
        """The preconditions of a change: If-Match compares strongly, If-None-Match weakly."""
        if self.if_match is None and self.if_none_match is None:
            return NO_PRECONDITION
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
            detail = "The query is too long, or not percent-encoded UTF-8"
            raise InvalidRequestError(detail) from None
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

    def incoming(self) -> Content:
        """The body of an operation that takes it as it comes."""
        if self.content is None:
            raise AssertionError("the operation takes no such body")
        return self.content

    def parse(self, model: type[Model], defaults: dict[str, Any] | None = None) -> Model:
        """Read the body, and `defaults` behind it, as a model. Raises `InvalidRequestError`."""
        members = {**(defaults or {}), **(self.body or {})}
        try:
            return model.model_validate(members)
        except ValidationError as unfit:
            faults = [
                Fault(pointer=json_pointer(each["loc"]), code=each["type"], detail=each["msg"])
                for each in unfit.errors(include_url=False, include_input=False)
            ]
        names = ", ".join(sorted({fault["pointer"][1:] for fault in faults}))
        raise InvalidRequestError(f"Not acceptable: {names}", faults)

    def answer(
        self,
        content: object,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        etag: str | None = None,
    ) -> Reply:
        """Answer with a document, or with anything that becomes JSON; `etag` without its quotes."""
        body = content.text if isinstance(content, Document) else orjson.dumps(content)
        further: tuple[tuple[str, str], ...] = ()
        if etag is not None:
            further = (("etag", f'"{etag}"'),)
        if headers:
            further += (*headers.items(),)
        if self.idempotent is not None and self.idempotent.replayed:
            further += (("idempotent-replayed", "true"),)
        return Reply(status, body, further)

    def not_modified(self, etag: str) -> Response:
        """Answer that the client has what it asks for; `etag` without its quotes."""
        headers = {"cache-control": "no-store", "etag": f'"{etag}"'}
        return Response(status_code=304, headers=headers)
