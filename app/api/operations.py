"""The table of operations: one entry routes, checks and documents a call."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel
from starlette.types import ASGIApp

from app.api.calls import Call
from app.onboarding.access import Access

Handler: TypeAlias = Callable[[Call], Awaitable[ASGIApp]]
"""Does what a call asks for and gives the answer, which knows how to send itself."""

Schema: TypeAlias = type | dict[str, Any]
"""How a document is described: a TypedDict or model, or JSON Schema itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A JSON body that an operation takes.

    `limit` names the largest size that the settings allow. `patch` admits the media type of a
    merge patch too.
    """

    schema: type[BaseModel] | dict[str, Any]
    limit: Literal["step", "other"] = "other"
    required: bool = True
    patch: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A body that an operation takes as it comes.

    `limit` names the largest size that the settings allow, `form_bytes` is what may surround it.
    """

    schema: dict[str, Any]
    limit: Literal["upload", "result"]
    media_type: str = "*/*"
    form_bytes: int = 0
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an operation answers when it succeeds."""

    status: int = 200
    description: str
    schema: Schema | None = None
    media_type: str = "application/json"
    headers: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call: its path, what it takes, what it does, how it can end.

    `{id}` in the path is a session, `{n}` a step; both are checked before the handler runs, and
    their errors need not be listed in `errors`. `access` is what is asked of the caller. `query`
    describes further parameters by name, `headers` names headers that the operation reads itself.

    A `quiet` one is neither logged nor measured: probes. `at_once` says among what it is counted
    while it is served: what may last is counted apart, or has a limit of its own. What is `audited`
    stays on record.
    """

    methods: Sequence[str]
    path: str
    handler: Handler
    name: str
    access: Access
    summary: str
    tag: str
    answers: Sequence[Answer]
    errors: Sequence[str] = ()
    body: Body | Stream | None = None
    query: Sequence[tuple[str, dict[str, Any], str]] = ()
    headers: Sequence[str] = ()
    preconditions: Sequence[Literal["If-Match", "If-None-Match"]] = ()
    idempotency_key: bool = False
    quiet: bool = False
    at_once: Literal["requests", "transfers", "own"] = "requests"
    audited: bool = False
