"""What nobody but its owner should read, followed through every route: it is kept, and told nobody.

A canary is a string that is nowhere else; each stands in one place of the requests.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.api.routes import OPERATIONS
from app.logs import configure_logging
from app.onboarding.access import Scope, write_api_key
from app.onboarding.assistant import AgentContext, Chunk, Result, Said, Stage
from tests.access import AUTH, Headers, bearer, user
from tests.api.conftest import Log
from tests.api.helpers import JSON, answer_of, ask, exchange, problem_of, unknown_id
from tests.service import BASE

ANSWERS = [
    *("data key", "data value", "draft", "metadata key", "metadata value", "question", "answer"),
    *("failure", "stage", "message", "error message", "event id", "run", "bad body"),
]
FILES = ["result body", "result name", "upload body", "upload name", "upload language"]
LABELS = ["label", "query", "path", "header", "language", "Idempotency-Key", "cursor", "step"]
SECRETS = [
    *("bad session token", "bad resume token", "bad key", "bad jwt", "jwt id"),
    *(f"{scope} key" for scope in Scope),
]
OWNERS = ["user", "workspace", "user of a task"]
"""Ids of owners stand in the names of keys of the index, and users in the record."""

CANARIES = {
    name: f"Canary{number}Zq{name.title().replace(' ', '')}"
    for number, name in enumerate([*ANSWERS, *FILES, *LABELS, *SECRETS, *OWNERS])
}
C = CANARIES

KEYS = {scope: f"ok_{C[f'{scope} key']}" for scope in Scope}


class Talkative:
    """An agent whose answer, or failure, is a canary."""

    def make(self, _: AgentContext) -> "Talkative":
        """Make an agent for a question."""
        return self

    async def ask(self, question: str) -> AsyncIterator[Said]:
        """Answer, or fail."""
        yield Stage(C["stage"])
        if question.startswith("fail"):
            raise RuntimeError(C["failure"])
        yield Chunk(C["answer"])
        yield Result(C["answer"], 0.9, 4)

    async def aclose(self) -> None:
        """Have nothing to close."""


class Walk:
    """Sends requests with canaries, and keeps every problem that is answered."""

    def __init__(self, api: AsyncClient) -> None:
        self.api = api
        self.problems: list[str] = []

    async def __call__(
        self, method: str, path: str, shown: Headers, status: int = 200, **sent: Any
    ) -> Response:
        """Send a request that has a header and a query more than it needs, and check its status."""
        extra = {"x-junk": C["header"], "cookie": f"a={C['header']}", "user-agent": C["header"]}
        headers = {**extra, **shown, **sent.pop("headers", {})}
        query = {"junk": C["query"], **sent.pop("params", {})}
        response = await self.api.request(method, path, headers=headers, params=query, **sent)
        assert response.status_code == status, (method, path, response.text)
        self.note(response)
        return response

    def note(self, response: Response) -> None:
        """Keep what a problem says, but for where it repeats what the path and the pointers are."""
        if response.headers.get("content-type") == "application/problem+json":
            problem = problem_of(response, response.json()["code"])
            del problem["instance"]
            for fault in problem.get("errors", []):
                del fault["pointer"]
            self.problems.append(json.dumps([problem, *response.headers.values()]))


@pytest.fixture
async def walk(log: Log, serve: Callable[..., Any]) -> Walk:
    configure_logging("debug", "json")
    keys = ",".join(write_api_key(f"{scope}-machine", [scope], KEYS[scope]) for scope in Scope)
    agent = f"{__name__}:Talkative"
    return Walk(await serve(**{**AUTH, "api_keys": keys}, agent=agent, rate_limit="10000/minute"))


async def test_canaries_are_found_nowhere_but_where_they_belong(
    walk: Walk, log: Log, raw: Redis
) -> None:
    owner = user(C["user"], C["workspace"], jti=C["jwt id"])
    admin = {"x-api-key": KEYS[Scope.ADMIN]}
    session_id, tokens = await live(walk, owner)
    await generate(walk, session_id, owner)
    await track(walk)
    await guess(walk, session_id, owner)
    await operate(walk, session_id, admin)
    names, values = await keep(raw)
    await walk("DELETE", f"{BASE}/{session_id}", owner)
    await walk("DELETE", f"/api/v1/admin/users/{C['user']}", admin)
    later_names, later_values = await keep(raw)
    told = [(await walk("GET", path, admin)).text for path in TELLING]
    told.append(await read_whole_record(walk, admin))

    seen = {(line["method"], line["route"]) for line in log.requests() if line["status"] < 300}
    wanted = {(method, each.path) for each in OPERATIONS for method in each.methods}
    assert wanted - seen == {("GET", each.path) for each in OPERATIONS if each.quiet}

    credentials = [*owner.values(), *KEYS.values(), *tokens]
    secrets = pick(*SECRETS)
    secrets |= {f"credential {n}": secret_of(each) for n, each in enumerate(credentials)}
    assert found(C | secrets, log.text) == set()
    assert found(C | secrets, *walk.problems) == set()
    assert found(C | secrets, *told) == set()
    unnamed = secrets | pick(*ANSWERS, *FILES, *LABELS)
    assert found(unnamed, names, later_names) == set()
    assert found(secrets, values, later_values) == set()
    # What was looked through, and holds what belongs there.
    assert len(walk.problems) > 40
    kept = pick("data key", "data value", "draft", "answer", "message", "label", "result name")
    assert found(kept, values) == set(kept)
    assert found(pick("user"), names) == {"user"}


TELLING = [
    each.path
    for each in OPERATIONS
    if each.methods == ["GET"] and "{" not in each.path and not each.name.startswith("list_")
    if each.name != "get_audit"
]
"""What tells of the service, and not of single sessions or tasks."""


def pick(*names: str) -> dict[str, str]:
    return {name: C[name] for name in names}


def found(canaries: dict[str, str], *texts: str) -> set[str]:
    """Name the canaries that stand in a text."""
    whole = "\n".join(texts).lower()
    return {name for name, canary in canaries.items() if canary.lower() in whole}


def secret_of(credential: str) -> str:
    """Give the end of a credential, in which nothing is that anybody may know."""
    return credential[-40:]


async def keep(raw: Redis) -> tuple[str, str]:
    """Give the names of all keys, and all that is kept under them."""
    names, values = [], []
    async for key in raw.scan_iter(count=1000):
        kind = (await ask(raw, "TYPE", key)).decode()
        read = {
            "string": ("GET", key),
            "hash": ("HGETALL", key),
            "stream": ("XRANGE", key, "-", "+"),
            "set": ("SMEMBERS", key),
            "zset": ("ZRANGE", key, 0, -1),
            "list": ("LRANGE", key, 0, -1),
        }[kind]
        names.append(key.decode())
        values.append(repr(await ask(raw, *read)))
    return "\n".join(names), "\n".join(values)


async def read_whole_record(walk: Walk, admin: Headers) -> str:
    """Give the record without the one place that names users: who did it."""
    record = answer_of(await walk("GET", "/api/v1/admin/audit", admin, params={"limit": "1000"}))
    assert record["next"] is None
    assert {each["who"] for each in record["events"]} >= {f"user:{C['user']}", "nobody"}
    return json.dumps([{**each, "who": ""} for each in record["events"]])


async def live(walk: Walk, owner: Headers) -> tuple[str, list[str]]:
    """Make a session and answer, ask and hand over; gives its id and the tokens that were given."""
    body = {
        "workspace_id": C["workspace"],
        "user_id": C["user"],
        "metadata": {C["metadata key"]: C["metadata value"]},
    }
    keyed = {"idempotency-key": C["Idempotency-Key"]}
    made = await walk("POST", f"{BASE}/session", owner, 201, json=body, headers=keyed)
    await walk("POST", f"{BASE}/session", owner, 201, json=body, headers=keyed)
    session_id, token = made.json()["session_id"], made.json()["session_token"]
    session, own = f"{BASE}/{session_id}", bearer(token)
    data = {C["data key"]: [C["data value"], {C["data key"]: C["data value"]}]}
    step = f"{session}/steps/1"
    for method in ("POST", "PUT"):
        await walk(method, step, own, json={"data": data}, headers=keyed)
    await walk("PATCH", step, own, json=data, headers=keyed)
    await walk(
        "POST", f"{session}/steps", own, json={"steps": {"2": data, "4": data}}, headers=keyed
    )
    for number in (1, 3):
        draft = f"{session}/steps/{number}/draft"
        await walk("PUT", draft, own, json={"data": {"a": C["draft"]}}, headers=keyed)
        await walk("GET", draft, own)
    await walk("POST", f"{step}/draft/promote", own, headers=keyed)
    await walk("DELETE", f"{session}/steps/3/draft", own)
    await walk("DELETE", f"{session}/steps/2", own, headers=keyed)
    for path in ("", "/steps", "/steps/1", "/progress", "/summary", "/language", "/history"):
        await walk("GET", session + path, own)
    await walk("PUT", f"{session}/language", own, json={"language": "de"}, headers=keyed)
    await walk("GET", f"{BASE}/mine", owner)

    for question, status in ((C["question"], 200), (f"fail {C['question']}", 500)):
        await walk("POST", f"{session}/ask", own, status, json={"question": question})
        await walk("POST", f"{session}/ask-stream", own, json={"question": question})

    label = {"label": C["label"]}
    made = await walk("POST", f"{session}/resume-tokens", own, 201, json=label)
    tokens = [token, made.json()["token"]]
    resumed = await walk("POST", f"{BASE}/resume", {}, json={"token": made.json()["token"]})
    tokens.append(resumed.json()["session_token"])
    await walk("GET", f"{session}/resume-tokens", bearer(tokens[-1]))
    await walk("DELETE", f"{session}/resume-tokens/{made.json()['token_id']}", own)
    await walk("POST", f"{BASE}/resume", {}, 404, json={"token": made.json()["token"]})
    made = await walk("POST", f"{session}/resume-tokens", own, 201, json=label)
    return session_id, [*tokens, made.json()["token"]]


async def generate(walk: Walk, session_id: str, own: Headers) -> None:
    """Walk through the generation, and come with a file."""
    session, generator = f"{BASE}/{session_id}", {"x-api-key": KEYS[Scope.GENERATOR]}
    keyed = {"idempotency-key": C["Idempotency-Key"]}
    for _ in range(2):
        await walk("POST", f"{session}/finalize", own, json={"force": True}, headers=keyed)
    await walk("GET", f"{session}/export", generator)
    await walk("POST", f"{session}/steps/1", own, 409, json={"data": {"a": C["data value"]}})
    await walk("PUT", f"{session}/status", generator, json={"status": "processing"})
    event = {"stage": C["stage"], "progress": 10, "message": C["message"]}
    event["event_id"] = C["event id"]
    for status in (201, 200):
        await walk("POST", f"{session}/events", generator, status, json=event)
    named = {"content-disposition": f'attachment; filename="{C["result name"]}.pdf"'}
    await walk(
        *("PUT", f"{session}/result", generator, 201),
        content=C["result body"].encode(),
        headers={**named, "content-type": f"application/{C['result name']}", **keyed},
    )
    await walk(
        *("PUT", f"{session}/result", generator, 409),
        content=C["result body"].encode(),
        headers=named,
        params={"run": C["run"]},
    )
    failed = {"status": "error", "error_message": C["error message"]}
    await walk("PUT", f"{session}/status", generator, json=failed, headers=keyed)
    await walk("PUT", f"{session}/status", generator, 409, json={"status": "complete"})
    for path in ("/status", "/events", "/result", "/language"):
        await walk("GET", session + path, generator)
    for path in ("status", "download"):
        await walk("GET", f"/api/{path}/{session_id}", generator)
    async with walk.api.stream("GET", f"{session}/events/stream", headers=generator) as response:
        assert response.status_code == 200
    await walk("POST", f"{session}/reopen", own, headers=keyed)

    files = {"file": (C["upload name"], C["upload body"].encode())}
    made = await walk("POST", "/api/upload", own, 201, files=files)
    await walk("GET", f"{BASE}/{made.json()['session_id']}/upload", own)
    language = {"language": C["upload language"]}
    await walk("POST", "/api/upload", own, 422, files=files, data=language)


async def track(walk: Walk) -> None:
    """Walk through the life of tasks."""
    generator, tasks = {"x-api-key": KEYS[Scope.GENERATOR]}, "/api/v1/sessions"
    task = {"task_type": "scenario_generation", "short_id": "s1", "task_id": "t1"}
    owned = {**task, "user_id": C["user of a task"]}
    await walk("POST", f"{tasks}/task", generator, 201, json=owned)
    await walk("POST", f"{tasks}/task", generator, 409, json=owned)
    await walk("POST", f"{tasks}/task", generator, 422, json={**owned, "task_type": C["step"]})
    of_user = {"user_id": C["user of a task"]}
    await walk("GET", tasks, generator, params=of_user)
    await walk("GET", f"{tasks}/s1", generator, params=of_user)
    await walk("GET", f"{tasks}/task/t1", generator)
    await walk("PATCH", f"{tasks}/task/t1", generator, json={"status": "completed"})
    await walk("PATCH", f"{tasks}/task/t1", generator, 422, json={"status": C["bad body"]})
    await walk("POST", f"{tasks}/s1/scenario-saved", generator)
    await walk("POST", f"{tasks}/task", generator, 201, json=owned)
    await walk("DELETE", f"{tasks}/task/t1", generator)


async def guess(walk: Walk, session_id: str, own: Headers) -> None:
    """Send what is refused: for the credentials, the path, the headers, the query, the body."""
    session = f"{BASE}/{session_id}"
    good = own["authorization"]
    machine_of_sessions = {"x-api-key": KEYS[Scope.SESSIONS]}
    await walk("GET", session, machine_of_sessions)
    for shown in (
        *(bearer(f"ost_{C['bad session token']}"), bearer(C["bad session token"])),
        *(bearer(f"ort_{C['bad resume token']}"), {"x-api-key": C["bad key"]}),
        *({"authorization": f"{good}{C['bad jwt']}"}, {"authorization": f"Basic {C['bad key']}"}),
        {"authorization": good, "x-api-key": KEYS[Scope.SESSIONS]},
    ):
        await walk("GET", session, shown, 401)
        await walk("POST", f"{session}/steps/1", shown, 401, json={"data": {"a": C["bad body"]}})
        await walk("GET", "/api/v1/admin/audit", shown, 401)
    await walk("GET", session, {}, 401)
    await walk("GET", session, user("u2"), 404)
    await walk("GET", "/api/v1/admin/stats", machine_of_sessions, 403)
    await walk("POST", f"{BASE}/resume", {}, 404, json={"token": f"ort_{C['bad resume token']}"})
    await walk("POST", f"{BASE}/resume", {}, 422, json={"token": [C["bad resume token"]]})

    await walk("GET", f"/{C['path']}", own, 404)
    await walk("GET", f"{BASE}/{C['path']}", own, 404)
    await walk("GET", f"{BASE}/{unknown_id()}", own, 404)
    await walk("GET", f"{session}/steps/{C['step']}", own, 422)
    walk.note(await exchange(walk.api, C["path"].upper(), session, own.items()))
    for name in (
        "if-match",
        "if-none-match",
        "idempotency-key",
        "content-type",
        "content-encoding",
    ):
        sent = {**JSON, name: f'"{C["header"]}'}
        await walk(
            *("POST", f"{session}/steps/1", own, 415 if name.startswith("content") else 400),
            content=b'{"data":{"a":1}}',
            headers=sent,
        )
    await walk("POST", f"{BASE}/session", own, 422, params={"language": C["language"]})
    await walk("PUT", f"{session}/language", own, 422, json={"language": C["language"]})
    await walk("GET", f"{BASE}/mine", own, 422, params={"cursor": C["cursor"]})
    await walk("GET", f"{session}/events", own, 422, params={"after": C["cursor"]})
    bad = C["bad body"]
    for body in (
        *(f'{{"data":{{"{bad}":1e999}}}}', f'{{"data":{{"{bad}":1,"{bad}":2}}}}'),
        *(f'{{"data":"{bad}"}}', f'{{"{bad}":1}}', f'"{bad}"', f'{{"data":{bad}}}', bad),
    ):
        status = 400 if bad in (body, body[8:-1]) else 422
        for path in ("/steps/1", "/steps", "/events", "/ask"):
            target = session + path
            await walk("POST", target, own, status, content=body.encode(), headers=JSON)


async def operate(walk: Walk, session_id: str, admin: Headers) -> None:
    """Walk through what operators do."""
    base = "/api/v1/admin"
    await walk("GET", f"{base}/sessions", admin, params={"user_id": C["user"]})
    await walk("GET", f"{base}/sessions", admin, 422, params={"cursor": C["cursor"]})
    change = {"session_ids": [session_id], "set": {"language": "fr"}}
    await walk("POST", f"{base}/sessions/bulk", admin, json=change)
    change["set"] = {"language": C["language"]}
    await walk("POST", f"{base}/sessions/bulk", admin, 422, json=change)
    await walk("POST", f"{base}/cleanup", admin, json={"status": "error", "dry_run": True})
    await walk("POST", f"{base}/cleanup", admin, 422, json={"status": C["bad body"]})
    await walk("PATCH", f"{base}/config", admin, json={"cleanup_interval_s": 60})
    await walk("PATCH", f"{base}/config", admin, 422, json={"cleanup_interval_s": C["bad body"]})
    await walk("POST", f"{base}/sessions/{session_id}/recover", admin)
    await walk("GET", f"{base}/audit", admin, 422, params={"after": C["cursor"]})
