"""OpenAPI 3.1 of the service, made from the table of operations that routes and checks."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from typing_extensions import TypedDict

from app import __version__
from app.api.operations import Answer, Body, Operation, Schema, Stream
from app.api.problems import KINDS, MEDIA_TYPE
from app.errors import Fault
from app.onboarding.access import MAY, Access, Scope
from app.onboarding.tasks import ID_PATTERN

OPENAPI_PATH = "/openapi.json"

_REF = "#/components/schemas/{model}"


class Problem(TypedDict, total=False):
    """An error (RFC 9457). `errors` lists the faults of a document by JSON pointer."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: list[Fault]
    current_version: int | None
    missing: list[int]


def describe_operations(operations: Sequence[Operation]) -> bytes:
    """Write the OpenAPI document as JSON."""
    schemas = _Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        for method in operation.methods:
            entry = paths.setdefault(operation.path, {})
            entry[method.lower()] = _describe(operation, method, schemas)
    problem = schemas.refer(Problem)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Onboarding Sessions",
            "version": __version__,
            "summary": "Keeps a long onboarding wizard safe: steps in, a checked export out.",
            "description": _DESCRIPTION,
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations)],
        "paths": paths,
        "components": {
            "schemas": schemas.described,
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "responses": {
                f"Problem{status}": {
                    "description": description,
                    "headers": _refer_headers(_problem_headers(status)),
                    "content": {MEDIA_TYPE: {"schema": problem}},
                }
                for status, description in _problem_descriptions().items()
            },
            "securitySchemes": _SECURITY_SCHEMES,
        },
    }
    return orjson.dumps(document)


def codes_of(operation: Operation) -> list[str]:
    """List every code with which an operation may end badly."""
    codes = [*operation.errors]
    if "{id}" in operation.path:
        codes.append("session_not_found")
    if "{n}" in operation.path:
        codes.append("invalid_step_id")
    if "{task_id}" in operation.path:
        codes.append("task_not_found")
    if "{token_id}" in operation.path:
        codes.append("resume_token_not_found")
    if "{short_id}" in operation.path or "{user_id}" in operation.path:
        codes.append("invalid_request")
    if operation.preconditions:
        codes.append("invalid_header")
    if operation.idempotency_key:
        codes += ["invalid_idempotency_key", "idempotency_mismatch", "idempotency_in_progress"]
    if operation.body is not None:
        codes += ["payload_too_large", "unsupported_media_type"]
    if isinstance(operation.body, Body):
        codes.append("malformed_json")
    if operation.access in MAY:
        codes += ["unauthenticated", "forbidden"]
    if operation.access is not Access.PUBLIC:
        codes.append("rate_limited")
        codes += ["store_unavailable", "overloaded", "deadline_exceeded", "internal_error"]
        if any(method != "GET" for method in operation.methods):
            codes += ["store_full", "store_readonly"]
    return sorted(set(codes), key=lambda code: (KINDS[code].status, code))


class _Schemas:
    """Collects the schemas of documents under their names."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}

    def refer(self, schema: Schema) -> dict[str, Any]:
        """Describe a document and return a reference to it, or the schema that it is."""
        if isinstance(schema, dict):
            return schema
        described = TypeAdapter(schema).json_schema(mode="serialization", ref_template=_REF)
        self.described |= described.pop("$defs", {})
        self.described[schema.__name__] = described
        return {"$ref": _REF.format(model=schema.__name__)}

    def refer_body(self, model: type[BaseModel]) -> dict[str, Any]:
        """Describe what a body may be, as it is checked."""
        _, described = models_json_schema([(model, "validation")], ref_template=_REF)
        self.described |= described.get("$defs", {})
        return {"$ref": _REF.format(model=model.__name__)}


def _describe(operation: Operation, method: str, schemas: _Schemas) -> dict[str, Any]:
    # PUT and POST of one operation need names of their own.
    suffix = "" if method == operation.methods[0] else f"_by_{method.lower()}"
    described: dict[str, Any] = {
        "operationId": operation.name + suffix,
        "summary": operation.summary,
        "tags": [operation.tag],
        "security": _security(operation.access),
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
    }
    if operation.body is not None:
        described["requestBody"] = _request_body(operation.body, schemas)
    return described


def _security(access: Access) -> list[dict[str, list[str]]]:
    """Describe who may call an operation: each entry is one way, with what it takes in brackets."""
    who = sorted(MAY.get(access, ()), key=lambda each: (isinstance(each, Scope), each))
    return [{"api_key" if isinstance(each, Scope) else "bearer": [each.value]} for each in who]


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)\}", operation.path)
    names += [*operation.preconditions]
    if operation.idempotency_key:
        names.append("Idempotency-Key")
    names += [*operation.headers, "X-Request-ID"]
    query = [
        {"name": name, "in": "query", "schema": schema, "description": description}
        for name, schema, description in operation.query
    ]
    return [{"$ref": f"#/components/parameters/{name}"} for name in names] + query


def _request_body(body: Body | Stream, schemas: _Schemas) -> dict[str, Any]:
    if isinstance(body, Stream):
        return {"required": body.required, "content": {body.media_type: {"schema": body.schema}}}
    schema = body.schema if isinstance(body.schema, dict) else schemas.refer_body(body.schema)
    media_types = ["application/json", *(["application/merge-patch+json"] if body.patch else [])]
    return {
        "required": body.required,
        "content": {media_type: {"schema": schema} for media_type in media_types},
    }


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    limited = () if operation.access is Access.PUBLIC else _LIMITS
    responses = {
        str(answer.status): _answer(answer, limited, schemas) for answer in operation.answers
    }
    statuses: dict[int, list[str]] = {}
    for code in codes_of(operation):
        statuses.setdefault(KINDS[code].status, []).append(code)
    for status in statuses:
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Problem{status}"})
    return responses


def _answer(answer: Answer, limited: Sequence[str], schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": answer.description,
        "headers": _refer_headers([*answer.headers, *limited, "X-Request-ID"]),
    }
    if answer.schema is not None:
        schema = schemas.refer(answer.schema)
        described["content"] = {answer.media_type: {"schema": schema}}
    return described


def _refer_headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _problem_headers(status: int) -> list[str]:
    names = ["WWW-Authenticate"] if status == HTTPStatus.UNAUTHORIZED else []
    kinds = [kind for kind in KINDS.values() if kind.status == status]
    if any(kind.retry_after_s is not None for kind in kinds):
        names.append("Retry-After")
    return [*names, *_LIMITS, "X-Request-ID"]


def _problem_descriptions() -> dict[int, str]:
    described: dict[int, list[str]] = {}
    for code, kind in KINDS.items():
        described.setdefault(kind.status, []).append(f"`{code}`: {kind.title}")
    return {status: "; ".join(lines) for status, lines in described.items()}


_DESCRIPTION = """\
A session holds the answers of an onboarding wizard. Save steps one by one or several at once, keep
drafts beside them, finalize to freeze them into an export. A generator reads the export, reports
its progress and stores its result; whoever follows the session's events sees all of it live. Who
is stuck in a step asks a question; who goes on elsewhere takes a resume token along. Tasks stand
beside the sessions: they say what is going on with a short.

Errors are `application/problem+json`. Every answer carries `X-Request-ID`. A write that may have to
be sent again takes an `Idempotency-Key`; a change that must not overwrite another takes `If-Match`.

Where access control is off, everybody may call everything, and shows nothing. Where it is on, a
wizard shows the token of its session, a user that of an identity provider, and a machine a key; a
session of somebody else is answered as one that is not there. How much may still be asked for is
said in `RateLimit`.
"""

_SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "`wizard`: the `session_token` of a session, which opens that one. `user`: "
        "a JWT of the identity provider, which opens the sessions of that user",
    },
    "api_key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The key of a machine, which has scopes: `sessions`, `generator`, `admin`",
    },
}


def _parameter(name: str, where: str, description: str, pattern: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": description,
        "schema": {"type": "string", "pattern": pattern},
    }


_TAGS = r'^(\*|(W/)?"[!#-~]*"( *, *(W/)?"[!#-~]*")*)$'
_PARAMETERS: dict[str, Any] = {
    "id": {
        **_parameter("id", "path", "The session: a lower-case UUID4", ""),
        "schema": {"type": "string", "format": "uuid"},
    },
    "n": _parameter("n", "path", "The number of a step of the catalogue", "^[1-9][0-9]{0,2}$"),
    "task_id": _parameter("task_id", "path", "The task", ID_PATTERN),
    "short_id": _parameter("short_id", "path", "The short that tasks belong to", ID_PATTERN),
    "user_id": _parameter("user_id", "path", "The user", r"^[^\x00-\x1f\x7f-\x9f]{1,128}$"),
    "token_id": _parameter("token_id", "path", "The resume token: 16 hex digits", "^[0-9a-f]{16}$"),
    "If-Match": _parameter("If-Match", "header", "Change only this version of the step", _TAGS),
    "If-None-Match": _parameter(
        "If-None-Match", "header", "Reading: 304 if unchanged. Saving: `*` if not there yet", _TAGS
    ),
    "Idempotency-Key": _parameter(
        "Idempotency-Key",
        "header",
        "The same key and request again: the first answer again, for 24 hours",
        r'^([A-Za-z0-9._~-]{1,255}|"([ !#-\[\]-~]|\\["\\]){1,255}")$',
    ),
    "Last-Event-ID": _parameter(
        "Last-Event-ID",
        "header",
        "Go on after this event; what cannot be read begins anew, with `gap`",
        "^[ -~]*$",
    ),
    "Content-Disposition": _parameter(
        "Content-Disposition", "header", "The file name to give back: `filename`", "^[ -~]*$"
    ),
    "X-Request-ID": _parameter(
        "X-Request-ID", "header", "Your name for the request", "^[A-Za-z0-9._-]{1,128}$"
    ),
}

_LIMITS = ("RateLimit", "RateLimit-Policy")
"""Headers of every answer, as long as limits are set and the store can tell how the caller stands.
"""

_HEADERS: dict[str, Any] = {
    name: {"description": description, "schema": {"type": "string"}}
    for name, description in {
        "ETag": "The version of the step, or the checksum of the body, in double quotes",
        "Content-Disposition": "`attachment`, with the file name",
        "Location": "The path of the session",
        "Idempotent-Replayed": "`true` when this is the first answer again",
        "RateLimit": 'What is left of each limit, and when there is more: `"requests";r=597;t=1`',
        "RateLimit-Policy": 'The limits: `"requests";q=600;w=60` is 600 a minute',
        "Retry-After": "When to try again, in seconds",
        "WWW-Authenticate": '`Bearer`; with `error="invalid_token"` when what was shown was wrong',
        "X-Request-ID": "The name of the request in the log",
    }.items()
}
