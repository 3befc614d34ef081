"""Errors as answers: problem+json for everything (RFC 9457)."""

import traceback
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.streaming import REST
from app.context import get_context
from app.errors import (
    CorruptRecordError,
    DeadlineExceededError,
    OnboardingError,
    RateLimitedError,
    RequestError,
    StepsMissingError,
    UnauthenticatedError,
    VersionConflictError,
)

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"

CLIENT_CLOSED = 499
"""Status in the log for a request whose client went away; nothing is sent. From nginx."""


class Kind(NamedTuple):
    """What a code means in HTTP; `retry_after_s` where asking again makes sense."""

    status: int
    title: str
    retry_after_s: int | None = None


KINDS: dict[str, Kind] = {
    "malformed_json": Kind(400, "The body is not JSON"),
    "invalid_header": Kind(400, "A header cannot be read"),
    "invalid_idempotency_key": Kind(400, "The Idempotency-Key cannot be read"),
    "unauthenticated": Kind(401, "Who asks is not known"),
    "forbidden": Kind(403, "Who asks may not do this"),
    "not_found": Kind(404, "There is nothing here"),
    "session_not_found": Kind(404, "No such session"),
    "step_not_found": Kind(404, "The step is not saved"),
    "draft_not_found": Kind(404, "The step has no draft"),
    "export_not_found": Kind(404, "The session has no export"),
    "result_not_found": Kind(404, "The session has no result"),
    "upload_not_found": Kind(404, "The session has no file"),
    "task_not_found": Kind(404, "No such task"),
    "resume_token_not_found": Kind(404, "No such resume token"),
    "method_not_allowed": Kind(405, "The method is not allowed here"),
    "session_finalized": Kind(409, "The session is finalized"),
    "nothing_to_finalize": Kind(409, "There is nothing to finalize"),
    "steps_missing": Kind(409, "Required steps are missing"),
    "not_finalized": Kind(409, "The session is not finalized"),
    "invalid_transition": Kind(409, "The status cannot follow the current one"),
    "generation_running": Kind(409, "A generator is working"),
    "task_exists": Kind(409, "There is such a task already"),
    "idempotency_in_progress": Kind(409, "The first request is still running"),
    "session_conflict": Kind(409, "The session kept changing"),
    "version_conflict": Kind(412, "The precondition does not hold"),
    "payload_too_large": Kind(413, "The body is too large"),
    "unsupported_media_type": Kind(415, "The media type is not supported"),
    "invalid_request": Kind(422, "The request is not acceptable"),
    "invalid_step_id": Kind(422, "No such step number"),
    "invalid_step_data": Kind(422, "The answers are not acceptable"),
    "idempotency_mismatch": Kind(422, "The Idempotency-Key was used otherwise"),
    "rate_limited": Kind(429, "Too much is asked at once", retry_after_s=1),
    "too_many_streams": Kind(429, "Too many live streams are open", retry_after_s=5),
    "internal_error": Kind(500, "Something went wrong here"),
    "corrupt_record": Kind(500, "A record cannot be read"),
    "store_unavailable": Kind(503, "The store does not answer", retry_after_s=2),
    "store_full": Kind(503, "The store is full", retry_after_s=30),
    "store_readonly": Kind(503, "The store takes no writes", retry_after_s=10),
    "capacity_reached": Kind(503, "There are too many sessions", retry_after_s=60),
    "overloaded": Kind(503, "Too many requests at once", retry_after_s=1),
    "deadline_exceeded": Kind(504, "The request took too long"),
}
"""Every code, with what it means in HTTP."""


def problem(
    code: str,
    detail: str,
    *,
    instance: str | None,
    request_id: str | None,
    headers: dict[str, str] | None = None,
    **members: Any,
) -> Response:
    """Make the answer for a code, with further `members` beside the standard ones."""
    kind = KINDS[code]
    body = {
        "type": f"urn:onboarding:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "request_id": request_id,
        **members,
    }
    retry_after = {} if kind.retry_after_s is None else {"retry-after": str(kind.retry_after_s)}
    headers = {"cache-control": "no-store", **retry_after, **(headers or {})}
    return Response(orjson.dumps(body), kind.status, headers, MEDIA_TYPE)


def describe(scope: Scope, error: OnboardingError) -> Response:
    """Make the answer for an error of ours."""
    members: dict[str, Any] = {}
    if isinstance(error, RequestError) and error.faults:
        members["errors"] = error.faults
    if isinstance(error, VersionConflictError):
        members["current_version"] = error.current_version
    if isinstance(error, StepsMissingError):
        members["missing"] = error.missing
    headers = None
    if isinstance(error, RateLimitedError):
        headers = {"retry-after": str(error.retry_after_s)}
    if isinstance(error, UnauthenticatedError):
        # RFC 6750 section 3: what was shown is called wrong only when something was.
        invalid = ', error="invalid_token"' if error.is_invalid else ""
        headers = {"www-authenticate": f'Bearer realm="onboarding"{invalid}'}
    return _problem_here(scope, error.code, error.detail, headers=headers, **members)


async def describe_http_exception(request: Request, error: Exception) -> Response:
    """Make the answer for what the router says: no such path, no such method."""
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (error.headers or {}).get("Allow", "")
        detail = f"Allowed here: {allow}"
        headers = {"allow": allow}
        return _problem_here(request.scope, "method_not_allowed", detail, headers=headers)
    detail = "No such path; /docs lists those that there are"
    return _problem_here(request.scope, "not_found", detail)


class ProblemMiddleware:
    """Turns errors into answers, and sends the rest of an answer that leaves it for later."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
            rest: ASGIApp | None = scope.pop(REST, None)
            if rest is not None:
                await rest(scope, receive, watch)
        except ClientDisconnect:
            # Nobody is left to answer; the log line says 499.
            raise
        except Exception as error:  # noqa: BLE001 - the last resort, so that nobody sees a stack
            response = explain(scope, error)
        else:
            return
        if begun:
            raise RuntimeError("an answer that had begun could not be finished")
        await response(scope, receive, send)


def explain(scope: Scope, error: Exception) -> Response:
    """Make the answer for whatever went wrong, and log what operators should know of it."""
    if isinstance(error, OnboardingError):
        if isinstance(error, CorruptRecordError | DeadlineExceededError):
            log.warning("request_failed", code=error.code)
        return describe(scope, error)
    log.error("request_crashed", exception=type(error).__name__, at=_frames(error))
    detail = "Something went wrong here; the operators find it by the request_id"
    return _problem_here(scope, "internal_error", detail)


def _problem_here(scope: Scope, code: str, detail: str, **members: Any) -> Response:
    context = get_context()
    # The path as it was sent is a URI reference; ASCII by the protocol.
    path = (scope.get("raw_path") or b"/").decode("ascii", "replace").partition("?")[0]
    request_id = None if context is None else context.request_id
    return problem(code, detail, instance=path, request_id=request_id, **members)


def _frames(error: BaseException) -> list[str]:
    # Where, not what: messages and values may hold answers.
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return [
        f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in frames
    ]
