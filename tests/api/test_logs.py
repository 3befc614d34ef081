"""One line per request, and never anything that a user wrote."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.conftest import Log
from tests.api.helpers import (
    CREATE,
    DELETE_SESSION,
    FINALIZE,
    GET_EXPORT,
    GET_PROGRESS,
    GET_SESSION,
    GET_STEP,
    GET_STEPS,
    GET_SUMMARY,
    JSON,
    PATCH,
    PROMOTE,
    PUT_DRAFT,
    REOPEN,
    SAVE,
    answer_of,
    exchange,
    is_time,
    problem_of,
    step_path,
    unknown_id,
)
from tests.faults.servers import HOST, free_ports
from tests.service import BASE

CANARY = "Canary7Zq"

EVERY_LINE = {"timestamp", "level", "event"}
REQUEST_LINE = {"method", "route", "status", "duration_ms", "redis_commands", "retries"}


@pytest.fixture
async def api(log: Log, api: AsyncClient) -> AsyncClient:
    """Run the service after logging was set up."""
    return api


# --- A line per request ---------------------------------------------------------------------------


async def test_every_line_is_json_with_a_time_a_level_and_an_event(
    api: AsyncClient, log: Log, session_id: str
) -> None:
    for call in (SAVE, FINALIZE, REOPEN, DELETE_SESSION, GET_SESSION):
        await call.send(api, session_id)

    lines = log.lines()

    assert {line["event"] for line in lines} >= {"process_started", "request_served"}
    for line in lines:
        assert line.keys() >= EVERY_LINE
        assert is_time(line["timestamp"])
        assert line["level"] in {"debug", "info", "warning", "error", "critical"}
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", line["event"])


async def test_a_request_makes_one_line_with_every_field(
    api: AsyncClient, log: Log, session_id: str
) -> None:
    log.lines()

    answer_of(await SAVE.send(api, session_id, x_request_id="r-1"))

    [line] = log.requests()
    assert line.keys() >= EVERY_LINE | REQUEST_LINE | {"request_id", "session_id"}
    assert line["level"] == "info"
    assert line["request_id"] == "r-1"
    assert line["session_id"] == session_id
    assert line["method"] == "POST"
    assert line["route"] == f"{BASE}/{{id}}/steps/{{n}}"
    assert line["status"] == 200
    assert 0 < line["duration_ms"] < 5000
    assert line["redis_commands"] >= 1
    assert line["retries"] == 0


async def test_every_line_of_a_request_carries_its_id(api: AsyncClient, log: Log) -> None:
    log.lines()

    created = await CREATE.send(api)

    lines = log.lines()
    assert {line["event"] for line in lines} == {"session_created", "request_served"}
    assert {line["request_id"] for line in lines} == {created.headers["x-request-id"]}


async def test_one_accepted_write_and_one_read_take_one_command(
    api: AsyncClient, log: Log, session_id: str
) -> None:
    await SAVE.send(api, session_id)
    log.lines()
    calls = [SAVE, PUT_DRAFT, GET_STEP, GET_STEPS, GET_PROGRESS, GET_SUMMARY, GET_SESSION]
    for call in [*calls, DELETE_SESSION]:
        answer_of(await call.send(api, session_id))
        await call.send(api, session_id)
        first = log.requests()[0]
        # A script that the store meets for the first time is sent twice.
        assert first["redis_commands"] in {1, 2}, call.name
    session_id = answer_of(await CREATE.send(api), 201)["session_id"]
    log.lines()
    for call in calls:
        answer_of(await call.send(api, session_id))
        assert [line["redis_commands"] for line in log.requests()] == [1], call.name


async def test_refused_requests_make_their_line_too(
    api: AsyncClient, log: Log, session_id: str
) -> None:
    log.lines()
    step = f"{BASE}/{{id}}/steps/{{n}}"
    refused: list[tuple[Response, str | None, str | None]] = [
        (await GET_STEP.send(api, session_id), step, session_id),
        (await api.get(f"{BASE}/nobody/steps/1"), step, None),
        (await api.get("/nope"), None, None),
        (await api.put(f"{BASE}/session"), f"{BASE}/session", None),
        (await api.post(step_path(session_id, 1), content=b"{", headers=JSON), step, session_id),
    ]

    lines = log.requests()

    assert len(lines) == len(refused)
    for line, (response, route, known) in zip(lines, refused, strict=True):
        assert line["status"] == response.status_code
        assert line["route"] == route
        assert line["request_id"] == response.headers["x-request-id"]
        assert line.get("session_id") == known
        if response.status_code != 404 or known is None:
            assert line["redis_commands"] == 0


async def test_probes_make_no_line(api: AsyncClient, log: Log) -> None:
    log.lines()
    for path in ("/livez", "/health", "/healthz", "/readyz"):
        answer_of(await api.get(path))
        await api.head(path)

    assert log.lines() == []


async def test_a_replay_is_not_told_as_a_second_event(api: AsyncClient, log: Log) -> None:
    log.lines()
    for _ in range(2):
        created = answer_of(await CREATE.send(api, idempotency_key="k1"), 201)
    session_id = created["session_id"]
    await SAVE.send(api, session_id)
    for call in (FINALIZE, FINALIZE, REOPEN, REOPEN):
        answer_of(await call.send(api, session_id, idempotency_key="k1"))

    events = [line["event"] for line in log.lines() if line["event"] != "request_served"]

    assert events == ["session_created", "session_finalized", "session_reopened"]


# --- What is never there --------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 3},
        "kind": {"enum": ["a", "b"]},
        "const": {"const": 1},
        "mail": {"type": "string", "format": "email"},
        "pattern": {"type": "string", "pattern": "^[0-9]+$"},
        "list": {"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"type": "number"}},
        "one": {"oneOf": [{"type": "number"}, {"type": "null"}]},
        "any": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "not": {"not": {"type": "string"}},
        "inner": {"type": "object", "additionalProperties": False, "properties": {"a": True}},
        "closed": {"type": "object", "unevaluatedProperties": False},
        "names": {"type": "object", "propertyNames": {"maxLength": 3}},
        "patterned": {"type": "object", "patternProperties": {"^Can": {"type": "number"}}},
        "never": False,
        "depends": {"type": "object", "dependentRequired": {CANARY: ["b"]}},
        "contains": {"type": "array", "contains": {"type": "number"}},
        "number": {"type": "number", "multipleOf": 7},
        "size": {"type": "object", "maxProperties": 0},
    },
}

UNFIT = {
    **dict.fromkeys(("text", "kind", "const", "mail", "pattern", "one", "any", "not"), CANARY),
    **{name: {CANARY: CANARY} for name in ("inner", "closed", "names", "patterned", "depends")},
    **{name: [CANARY, CANARY] for name in ("list", "contains")},
    "never": CANARY,
    "number": CANARY,
    "size": {CANARY: 1},
}

C = CANARY.encode()

BAD_BODIES = [
    b'{"data":{"' + C + b'":1e999}}',
    b'{"data":{"' + C + b'":1,"' + C + b'":2}}',
    b'{"data":{"a":"' + C + b'\\ud800"}}',
    b'{"data":{"a":"' + C + b'\xff"}}',
    b'{"data":{"a":"' + C,
    b'{"data":{"a":' + C + b"}}",
    b'{"data":"' + C + b'"}',
    b'{"' + C + b'":{"a":1}}',
    b'"' + C + b'"',
    b"\xef\xbb\xbf" + C,
    b'{"data":' + b'{"' + C + b'":' * 70 + b"1" + b"}" * 70 + b"}",
    b'{"steps":{"' + C + b'":{"a":1}}}',
    b'{"steps":{"1":"' + C + b'"}}',
    b'{"workspace_id":["' + C + b'"],"user_id":{"' + C + b'":1},"metadata":"' + C + b'"}',
    b'{"workspace_id":"' + C + b'\\n","language":"' + C + b'"}',
    b'{"force":"' + C + b'"}',
]

BAD_HEADERS: list[dict[str, str]] = [
    {"if-match": CANARY},
    {"if-match": f'"{CANARY}"'},
    {"if-none-match": f"W/{CANARY}"},
    {"idempotency-key": f"{CANARY} {CANARY}"},
    {"idempotency-key": CANARY},
    {"content-type": f"text/{CANARY}"},
    {"content-type": f"application/json; charset={CANARY}"},
    {"content-encoding": CANARY},
    {"x-request-id": f"{CANARY} {CANARY}"},
    {"authorization": f"Bearer {CANARY}"},
    {"x-api-key": CANARY},
    {"cookie": f"a={CANARY}"},
    {"origin": f"https://{CANARY}.example"},
    {"user-agent": CANARY},
    {"accept": CANARY},
    {"last-event-id": CANARY},
]


def check_problem(response: Response) -> None:
    """Check that no word of a problem holds the canary; paths and pointers may name it."""
    if response.headers["content-type"] != "application/problem+json":
        return
    problem = problem_of(response, response.json()["code"])
    del problem["instance"]
    for fault in problem.get("errors", []):
        del fault["pointer"]
    assert CANARY not in json.dumps(problem)


async def test_an_answer_never_gets_into_the_log_or_a_problem(
    serve: Callable[..., Any], raw: Redis, log: Log, tmp_path: Path
) -> None:
    steps = [
        {"id": 1, "key": "one", "title": "One", "phase": 1, "required": True},
        {"id": 2, "key": "two", "title": "Two", "phase": 1, "required": True, "schema": SCHEMA},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"version": "1", "steps": steps}))
    api = await serve(steps_file=tmp_path / "steps.json", cors_origins="https://a.example")
    owner = {"workspace_id": CANARY, "user_id": CANARY, "metadata": {CANARY: CANARY}}
    data = {CANARY: [CANARY, {CANARY: CANARY}]}
    created = await api.post(f"{BASE}/session?{CANARY}={CANARY}", json=owner)
    session_id = answer_of(created, 201)["session_id"]

    # What is accepted, and read again.
    accepted = [
        SAVE._replace(body={"data": data}),
        PATCH._replace(body=data),
        PUT_DRAFT._replace(body={"data": data}),
        PROMOTE,
        *(GET_STEP, GET_STEPS, GET_SUMMARY, GET_SESSION, FINALIZE, GET_EXPORT, REOPEN),
    ]
    for call in accepted:
        answer_of(await call.send(api, session_id, idempotency_key=CANARY))

    # What is refused: by the schema, as a body, for its headers, its query and its path.
    unfit = await api.post(step_path(session_id, 2), json={"data": UNFIT})
    assert len(problem_of(unfit, "invalid_step_data")["errors"]) >= len(UNFIT)
    check_problem(unfit)
    check_problem(await api.post(f"{BASE}/{session_id}/steps", json={"steps": {"2": UNFIT}}))
    targets = [
        *(("POST", step_path(session_id, 1)), ("PATCH", step_path(session_id, 2))),
        *(("PUT", step_path(session_id, "1/draft")), ("POST", f"{BASE}/{session_id}/steps")),
        *(("POST", f"{BASE}/session"), ("POST", f"{BASE}/{session_id}/finalize")),
    ]
    for body in BAD_BODIES:
        for method, target in targets:
            check_problem(await api.request(method, target, content=body, headers=JSON))
    for headers in BAD_HEADERS:
        sent = [*(JSON | headers).items()]
        check_problem(
            await exchange(api, "POST", step_path(session_id, 1), sent, b'{"data":{"a":1}}')
        )
    for query in (
        f"workspace_id={CANARY}%0a",
        f"{CANARY}=1&{CANARY}=2",
        f"{CANARY}=%ff",
        f"workspace_id=w&language={CANARY}{CANARY}",
    ):
        check_problem(await api.post(f"{BASE}/session?{query}"))
    for path in (f"/{CANARY}", f"{BASE}/{CANARY}", f"{BASE}/{session_id}/steps/{CANARY}"):
        for method in ("GET", "POST", CANARY.upper()):
            check_problem(await exchange(api, method, path))

    # What was damaged meanwhile.
    for key, value in [("step:1", CANARY), ("export", CANARY)]:
        await raw.set(f"onboarding:{session_id}:{key}", value, keepttl=True)
    for call in (GET_STEP, GET_STEPS, PATCH, FINALIZE, GET_EXPORT):
        check_problem(await call.send(api, session_id))
    await raw.hset(f"onboarding:{session_id}:progress", "highest", CANARY)
    for call in (SAVE, GET_PROGRESS, GET_SUMMARY, FINALIZE, REOPEN, PUT_DRAFT):
        check_problem(await call.send(api, session_id))
    answer_of(await DELETE_SESSION.send(api, session_id))
    check_problem(await GET_STEP.send(api, unknown_id()))

    assert "request_served" in log.text
    assert "corrupt_record_found" in log.text
    assert CANARY.lower() not in log.text.lower()


async def test_the_address_and_the_password_of_the_store_are_never_logged(
    serve: Callable[..., Any], log: Log
) -> None:
    [port] = free_ports(1)
    api = await serve(redis_url=f"redis://{CANARY}user:{CANARY}@{HOST}:{port}/0", retry_attempts=2)

    for call in (CREATE, GET_SESSION, SAVE, FINALIZE, DELETE_SESSION):
        response = await call.send(api, unknown_id())
        problem_of(response, "store_unavailable")
        assert f":{port}" not in response.text
        assert CANARY not in response.text

    assert any(line.get("retries") for line in log.requests())
    assert f":{port}" not in log.text
    assert HOST not in log.text
    assert CANARY not in log.text
