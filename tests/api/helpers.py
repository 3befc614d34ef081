"""What the tests of the HTTP interface share: shapes, calls, a wire, looks at the store."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.service import BASE

Answers = dict[str, Any]

JSON = {"content-type": "application/json"}

PROGRESS = {
    *("completed", "total", "percentage", "highest_step", "next_step", "completed_steps"),
    *("started_at", "last_updated"),
}
SESSION = {
    *("session_id", "workspace_id", "user_id", "language", "status", "progress", "metadata"),
    *("created_at", "expires_at", "finalized_at", "revision"),
}
SAVED = {"success", "session_id", "step_id", "version", "progress", "updated_at"}
STEP = {"session_id", "step_id", "data", "version", "saved_at", "is_draft"}
PROBLEM = {"type", "title", "status", "detail", "instance", "code", "request_id"}

STATUSES = {
    "malformed_json": 400,
    "invalid_header": 400,
    "invalid_idempotency_key": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "session_not_found": 404,
    "step_not_found": 404,
    "draft_not_found": 404,
    "export_not_found": 404,
    "result_not_found": 404,
    "upload_not_found": 404,
    "task_not_found": 404,
    "resume_token_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "session_finalized": 409,
    "nothing_to_finalize": 409,
    "steps_missing": 409,
    "not_finalized": 409,
    "invalid_transition": 409,
    "generation_running": 409,
    "task_exists": 409,
    "idempotency_in_progress": 409,
    "session_conflict": 409,
    "version_conflict": 412,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "invalid_step_id": 422,
    "invalid_step_data": 422,
    "idempotency_mismatch": 422,
    "rate_limited": 429,
    "internal_error": 500,
    "corrupt_record": 500,
    "store_unavailable": 503,
    "overloaded": 503,
    "capacity_reached": 503,
    "store_full": 503,
    "deadline_exceeded": 504,
}
"""The status that the contract gives to each code."""


class Call(NamedTuple):
    """One call of the table: `target` has `{id}` where a session stands, `body` is JSON or None."""

    method: str
    target: str
    body: Any = None

    @property
    def name(self) -> str:
        """How a test report names it."""
        return f"{self.method} {self.target.removeprefix(BASE)}"

    async def send(self, api: AsyncClient, session_id: str = "", **headers: str) -> Response:
        """Send it; `if_match="3"` is a header."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        target = self.target.replace("{id}", session_id)
        if self.body is None:
            return await api.request(self.method, target, headers=fields)
        return await api.request(self.method, target, headers=fields, json=self.body)


_SESSION = BASE + "/{id}"

SAVE = Call("POST", _SESSION + "/steps/1", {"data": {"a": 1}})
PUT = Call("PUT", _SESSION + "/steps/1", {"data": {"a": 1}})
PATCH = Call("PATCH", _SESSION + "/steps/1", {"b": 2})
DELETE_STEP = Call("DELETE", _SESSION + "/steps/1")
GET_STEP = Call("GET", _SESSION + "/steps/1")
BATCH = Call("POST", _SESSION + "/steps", {"steps": {"1": {"a": 1}, "2": {"b": 2}}})
GET_STEPS = Call("GET", _SESSION + "/steps")
PUT_DRAFT = Call("PUT", _SESSION + "/steps/1/draft", {"data": {"d": 1}})
GET_DRAFT = Call("GET", _SESSION + "/steps/1/draft")
DELETE_DRAFT = Call("DELETE", _SESSION + "/steps/1/draft")
PROMOTE = Call("POST", _SESSION + "/steps/1/draft/promote")
GET_PROGRESS = Call("GET", _SESSION + "/progress")
GET_SUMMARY = Call("GET", _SESSION + "/summary")
FINALIZE = Call("POST", _SESSION + "/finalize")
GET_EXPORT = Call("GET", _SESSION + "/export")
REOPEN = Call("POST", _SESSION + "/reopen")
GET_SESSION = Call("GET", _SESSION)
DELETE_SESSION = Call("DELETE", _SESSION)
CREATE = Call("POST", BASE + "/session", {"workspace_id": "w1"})
GET_STATUS = Call("GET", _SESSION + "/status")
SET_STATUS = Call("PUT", _SESSION + "/status", {"status": "processing"})
ADD_EVENT = Call("POST", _SESSION + "/events", {"stage": "a stage", "progress": 10})
GET_EVENTS = Call("GET", _SESSION + "/events")
GET_LANGUAGE = Call("GET", _SESSION + "/language")
SET_LANGUAGE = Call("PUT", _SESSION + "/language", {"language": "de"})
PUT_RESULT = Call("PUT", _SESSION + "/result", {"made": 1})
GET_RESULT = Call("GET", _SESSION + "/result")
GET_UPLOAD = Call("GET", _SESSION + "/upload")
ASK = Call("POST", _SESSION + "/ask", {"question": "What is a draft?"})
GET_HISTORY = Call("GET", _SESSION + "/history")
CREATE_TOKEN = Call("POST", _SESSION + "/resume-tokens", {"label": "a phone"})
GET_TOKENS = Call("GET", _SESSION + "/resume-tokens")
REVOKE_TOKEN = Call("DELETE", _SESSION + "/resume-tokens/0123456789abcdef")
GET_SHORT_STATUS = Call("GET", "/api/status/{id}")
DOWNLOAD = Call("GET", "/api/download/{id}")

STEP_CALLS = [
    *(SAVE, PUT, PATCH, DELETE_STEP, GET_STEP),
    *(PUT_DRAFT, GET_DRAFT, DELETE_DRAFT, PROMOTE),
]
"""The calls whose path names a step."""

SESSION_CALLS = [
    *STEP_CALLS,
    *(BATCH, GET_STEPS, GET_PROGRESS, GET_SUMMARY, FINALIZE, GET_EXPORT, REOPEN),
    *(GET_STATUS, SET_STATUS, ADD_EVENT, GET_EVENTS, GET_LANGUAGE, SET_LANGUAGE),
    *(PUT_RESULT, GET_RESULT, GET_UPLOAD, GET_SHORT_STATUS, DOWNLOAD),
    *(ASK, GET_HISTORY, CREATE_TOKEN, GET_TOKENS, REVOKE_TOKEN),
    *(GET_SESSION, DELETE_SESSION),
]
"""The calls whose path names a session; the live stream, which does not end, aside."""

BODY_CALLS = [SAVE, PUT, BATCH, PATCH, PUT_DRAFT, CREATE, FINALIZE, ASK, CREATE_TOKEN]
"""The calls that take a body."""


class Claims:
    """Cases that are looked at one after another on one service; all that fail are told."""

    def __init__(self) -> None:
        self._failed: list[Exception] = []

    @contextmanager
    def about(self, what: object) -> Iterator[None]:
        try:
            yield
        except (AssertionError, LookupError) as failure:
            failure.add_note(f"about {what}")
            self._failed.append(failure)

    def settle(self) -> None:
        if self._failed:
            raise ExceptionGroup("these did not hold", self._failed)


def unknown_id() -> str:
    """Make the id of a session that nobody has."""
    return str(uuid.uuid4())


def step_path(session_id: str, step_id: int | str) -> str:
    return f"{BASE}/{session_id}/steps/{step_id}"


async def save(
    api: AsyncClient, session_id: str, step_id: int = 1, data: Answers | None = None
) -> Answers:
    """Save a step that can be saved, and give the answer."""
    body = {"data": data or {"a": 1}}
    return answer_of(await api.post(step_path(session_id, step_id), json=body))


async def create(api: AsyncClient, **body: Any) -> str:
    """Begin a session and give its id."""
    created = await api.post(f"{BASE}/session", json={"workspace_id": "w1", **body})
    return str(answer_of(created, 201)["session_id"])


def answer_of(response: Response, status: int = 200) -> Answers:
    """Check that a call succeeded, and give its JSON."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert isinstance(body, dict)
    return body


def problem_of(response: Response, code: str) -> Answers:
    """Check that a call was refused with this code, in the shape of every error, and give it."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    body: Answers = response.json()
    assert body["code"] == code, body
    assert response.status_code == body["status"] == STATUSES[code]
    assert body.keys() >= PROBLEM
    assert body["type"] == f"urn:onboarding:problem:{code}"
    assert body["title"]
    assert isinstance(body["title"], str)
    assert body["detail"]
    assert isinstance(body["detail"], str)
    assert body["request_id"] == response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"
    for fault in body.get("errors", []):
        assert fault.keys() >= {"pointer", "code", "detail"}
        assert fault["pointer"] == "" or fault["pointer"].startswith("/")
    return body


def pointers_of(problem: Answers) -> set[str]:
    return {fault["pointer"] for fault in problem["errors"]}


def is_time(text: str) -> bool:
    """Say whether text is a time as the contract writes it: RFC 3339 in UTC with Z."""
    return re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text) is not None


def check_progress(progress: Answers, saved: Iterable[int], *, total: int = 23) -> None:
    """Check that a progress counts exactly the steps in `saved`."""
    steps = sorted(saved)
    unsaved = sorted(set(range(1, total + 1)) - set(steps))
    assert progress.keys() >= PROGRESS
    assert progress["completed"] == len(steps)
    assert progress["total"] == total
    assert progress["percentage"] == round(100 * len(steps) / total, 2)
    assert progress["completed_steps"] == steps
    assert progress["next_step"] == (unsaved[0] if unsaved else None)
    assert is_time(progress["started_at"])
    assert is_time(progress["last_updated"])


# --- The wire: requests that a client library would not send as they are --------------------------


async def exchange(
    api: AsyncClient,
    method: str,
    target: str | bytes,
    headers: Iterable[tuple[str, str | bytes]] = (),
    body: bytes | AsyncIterable[bytes] = b"",
) -> Response:
    """Send exactly these bytes on a connection of its own and give the answer.

    A body that is iterated is sent as it comes until the answer begins; nothing is said about it
    that `headers` do not say.
    """
    target = target.encode() if isinstance(target, str) else target
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"host: test", b"connection: close"]
    for name, value in headers:
        lines.append(name.encode() + b": " + (value.encode() if isinstance(value, str) else value))
    if isinstance(body, bytes) and body:
        lines.append(b"content-length: %d" % len(body))
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    try:
        writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        answer = asyncio.create_task(_read_response(reader, bodiless=method == "HEAD"))
        if isinstance(body, bytes):
            writer.write(body)
        else:
            async for chunk in body:
                if answer.done() or writer.is_closing():
                    break
                writer.write(chunk)
                try:
                    await writer.drain()
                except ConnectionError:
                    break
        return await asyncio.wait_for(answer, 10)
    finally:
        writer.close()


async def _read_response(reader: asyncio.StreamReader, *, bodiless: bool) -> Response:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(first.split(" ")[1])
    parts = [line.partition(":") for line in lines if line]
    headers = [(name.lower(), value.strip()) for name, _, value in parts]
    length = 0 if bodiless else int(dict(headers).get("content-length", "0"))
    return Response(status, headers=headers, content=await reader.readexactly(length))


# --- Looks at the store ---------------------------------------------------------------------------


async def ask(raw: Redis, *parts: str | bytes | int) -> Any:
    """Send one command and give the reply as it is."""
    return await raw.execute_command(*parts)  # type: ignore[no-untyped-call]


async def dump(raw: Redis) -> dict[str, tuple[str, Any]]:
    """Give every key with its type and value, but for the health probe's and the record."""
    beside = (b"onboarding:canary", b"onboarding:index:audit")
    keys = [key async for key in raw.scan_iter(count=1000) if not key.startswith(beside)]
    kinds = [kind.decode() for kind in await _ask_all(raw, [("TYPE", key) for key in keys])]
    values = await _ask_all(raw, [_READ[kind](key) for key, kind in zip(keys, kinds, strict=True)])
    return {
        key.decode(): (kind, value) for key, kind, value in zip(keys, kinds, values, strict=True)
    }


_READ: dict[str, Callable[[bytes], tuple[str | bytes | int, ...]]] = {
    "string": lambda key: ("GET", key),
    "hash": lambda key: ("HGETALL", key),
    "stream": lambda key: ("XRANGE", key, "-", "+"),
    "set": lambda key: ("SMEMBERS", key),
    "zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
    "list": lambda key: ("LRANGE", key, 0, -1),
}


async def _ask_all(raw: Redis, asked: list[tuple[str | bytes | int, ...]]) -> list[Any]:
    async with raw.pipeline(transaction=False) as pipeline:
        for parts in asked:
            pipeline.execute_command(*parts)
        return list(await pipeline.execute())


async def keys_of(raw: Redis, session_id: str) -> list[str]:
    """Give every key that names a session."""
    return sorted([key.decode() async for key in raw.scan_iter(f"*{session_id}*", count=1000)])


async def commands(raw: Redis) -> dict[str, int]:
    """Count the commands that the store has run, those that no request causes aside."""
    stats: dict[str, dict[str, int]] = await raw.info("commandstats")
    return {name: count["calls"] for name, count in stats.items() if name not in _BESIDE_REQUESTS}


_BESIDE_REQUESTS = {"cmdstat_eval", "cmdstat_set", "cmdstat_info", "cmdstat_hkeys"}
"""What the health probe asks, the look at the catalogues in use, and `commands` itself."""


async def events_of(raw: Redis, session_id: str) -> list[dict[str, str]]:
    """Give the fields of every event of a session, in order."""
    entries = await ask(raw, "XRANGE", f"onboarding:{session_id}:events", "-", "+")
    return [_fields(entry[1]) for entry in entries]


def _fields(reply: Any) -> dict[str, str]:
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


async def types_of(raw: Redis, session_id: str) -> list[str]:
    """Give the type of every event of a session, in order."""
    return [event["type"] for event in await events_of(raw, session_id)]


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
