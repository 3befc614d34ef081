"""Every call that asks the store, ready to be sent: what comes before it, and what it sends."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.api.operations import Operation
from app.api.routes import OPERATIONS
from app.onboarding.access import Access
from app.onboarding.files import PART_BYTES
from tests.service import BASE

S = BASE + "/{id}"
STEP = S + "/steps/{n}"
DRAFT = STEP + "/draft"
TOKENS = S + "/resume-tokens"
TASKS = "/api/v1/sessions"
TASK = TASKS + "/task/{task_id}"
SHORT = TASKS + "/{short_id}"
ADMIN = "/api/v1/admin"


@dataclass
class World:
    """What one call is about: its own session, and one word that names everything else of its own.

    `sent` are headers of the call alone; `told` is what answers have told so far.
    """

    api: AsyncClient
    raw: Redis
    prefix: str = "onboarding:%s:"
    word: str = field(default_factory=lambda: uuid.uuid4().hex)
    sent: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What every command about this world holds one of."""
        return [self.word, *filter(None, [self.told.get("id")])]

    def fill(self, template: Any) -> Any:
        """Put what is known into a path, a body, or a part of one."""
        match template:
            case str():
                for name, value in self.places.items():
                    template = template.replace(f"{{{name}}}", value)
            case list():
                return [self.fill(each) for each in template]
            case dict():
                return {name: self.fill(each) for name, each in template.items()}
        return template

    @property
    def places(self) -> Mapping[str, str]:
        """What stands for each name in braces."""
        own = dict.fromkeys(("word", "user_id", "task_id", "short_id"), self.word)
        return {**own, "n": "1", **self.told}

    def key(self, name: str) -> str:
        """Name a key of the session."""
        return self.prefix % self.told["id"] + name


Before = Callable[[World], Awaitable[None]]


class Act(NamedTuple):
    """A call by what it sends, how it ends, and what has to be there before.

    `before` names other calls of the table, or does something to the store. `needs` says whether a
    session is made first.
    """

    body: Any = None
    status: int = 200
    before: Sequence[str | Before] = ()
    content: bytes | None = None
    files: Any = None
    query: Mapping[str, str] = {}
    needs: bool = True


def overwrite(name: str, value: str) -> Before:
    """Put something foreign in the place of a key of the session."""

    async def do(world: World) -> None:
        await world.raw.delete(world.key(name))
        await world.raw.set(world.key(name), value, ex=600)

    return do


async def break_task(world: World) -> None:
    """Put something foreign in the place of the task."""
    await world.raw.hset(f"onboarding:task:{world.word}", "status", "nothing of ours")


async def complete(world: World) -> None:
    """Have the session's generation complete, and wait until the index knows."""
    for status in ("processing", "complete"):
        path = world.fill(f"{S}/status")
        response = await world.api.put(path, json={"status": status}, headers=world.sent)
        assert response.status_code == 200, response.text
    await be_listed(world, status="complete")


async def be_listed(world: World, **query: str) -> None:
    """Wait until the index knows whose the session is: on a Cluster it follows."""
    query["user_id"] = world.word
    async with asyncio.timeout(5):
        while True:
            page = await world.api.get(f"{ADMIN}/sessions", params=query, headers=world.sent)
            if page.json()["sessions"]:
                return
            await asyncio.sleep(0.02)


LARGE = b"x" * (PART_BYTES + 1)
SAVE_2 = f"POST {S}/steps (step 2)"
RESULT = f"PUT {S}/result (of one part)"
KEPT_TASK = f"POST {TASKS}/task (kept until released)"
OF_TASK = {**dict.fromkeys(("task_id", "short_id", "user_id"), "{word}"), "session_id": "{id}"}

WRITES: dict[str, Act] = {
    f"POST {STEP}": Act({"data": {"a": 1}}),
    f"PUT {STEP}": Act({"data": {"a": 1}}, before=[f"PUT {DRAFT}"]),
    f"PUT {STEP} (over another)": Act({"data": {"a": 2}}, before=[f"PUT {STEP}"]),
    f"PATCH {STEP}": Act({"b": 2}, before=[f"PUT {STEP}"]),
    f"DELETE {STEP}": Act(before=[f"PUT {STEP}"]),
    f"POST {S}/steps": Act({"steps": {"1": {"a": 1}, "2": {"b": 2}}}),
    SAVE_2: Act({"steps": {"2": {"b": 2}}}),
    f"PUT {DRAFT}": Act({"data": {"d": 1}}),
    f"DELETE {DRAFT}": Act(before=[f"PUT {DRAFT}"]),
    f"POST {DRAFT}/promote": Act(before=[f"PUT {DRAFT}"]),
    f"POST {S}/events": Act({"stage": "a stage", "progress": 10}, 201),
    f"POST {S}/events (with an id)": Act(
        {"stage": "a stage", "progress": 10, "event_id": "e1"}, 201
    ),
    f"PUT {S}/status": Act({"status": "processing"}),
    f"PUT {S}/language": Act({"language": "de"}),
    f"POST {S}/finalize": Act(before=[f"PUT {STEP}"]),
    f"POST {S}/reopen": Act(before=[f"PUT {STEP}", f"POST {S}/finalize"]),
    f"PUT {S}/result": Act(content=LARGE, status=201),
    RESULT: Act(content=b"{}", status=201),
    f"PUT {S}/result (over another)": Act(content=b"[]", status=201, before=[RESULT]),
    "POST /api/upload": Act(files={"file": ("{word}.txt", LARGE)}, status=201, needs=False),
    f"POST {S}/ask": Act({"question": "What is a draft?"}),
    f"POST {S}/ask-stream": Act({"question": "What is a draft?"}),
    f"POST {BASE}/session": Act({"workspace_id": "{word}", "user_id": "{word}"}, 201, needs=False),
    f"DELETE {S}": Act(before=[f"PUT {STEP}", f"PUT {DRAFT}", RESULT]),
    f"POST {TOKENS}": Act({"label": "a phone"}, 201),
    f"DELETE {TOKENS}/{{token_id}}": Act(before=[f"POST {TOKENS}"]),
    f"POST {BASE}/resume": Act({"token": "{token}"}, before=[f"POST {TOKENS}"]),
    f"POST {TASKS}/task": Act(
        {
            "task_type": "image_analysis",
            **OF_TASK,
        },
        201,
    ),
    KEPT_TASK: Act(
        {
            "task_type": "scenario_generation",
            **OF_TASK,
        },
        201,
    ),
    f"PATCH {TASK}": Act({"status": "failed"}, before=[f"POST {TASKS}/task"]),
    f"PATCH {TASK} (kept until released)": Act({"status": "completed"}, before=[KEPT_TASK]),
    f"DELETE {TASK}": Act(before=[f"POST {TASKS}/task"]),
    f"DELETE {TASK} (damaged)": Act(before=[f"POST {TASKS}/task", break_task]),
    f"POST {SHORT}/scenario-saved": Act(before=[KEPT_TASK]),
    f"POST {ADMIN}/cleanup": Act({"status": "complete"}, before=[f"PUT {STEP}", complete]),
    f"POST {ADMIN}/sessions/bulk": Act(
        {"session_ids": ["{id}"], "set": {"language": "de", "metadata": {"a": 1}}}
    ),
    f"POST {ADMIN}/sessions/{{id}}/recover": Act(
        before=[f"PUT {STEP}", SAVE_2, overwrite("step:2", "nothing of ours")]
    ),
    f"POST {ADMIN}/sessions/{{id}}/recover (nothing)": Act(
        before=[overwrite("metadata", "nothing of ours"), overwrite("progress", "of ours")]
    ),
    f"DELETE {ADMIN}/users/{{user_id}}": Act(
        before=[f"PUT {STEP}", f"POST {TASKS}/task", be_listed]
    ),
    f"PATCH {ADMIN}/config": Act({"cleanup_interval_s": 1800, "max_sessions": None}, needs=False),
}
"""Every call that may change something; what stands in brackets tells variations apart."""

READS: dict[str, Act] = {
    f"GET {STEP}": Act(before=[f"PUT {STEP}"]),
    f"GET {S}/steps": Act(before=[f"PUT {STEP}"]),
    f"GET {DRAFT}": Act(before=[f"PUT {DRAFT}"]),
    f"GET {S}/progress": Act(),
    f"GET {S}/summary": Act(),
    f"GET {S}/status": Act(),
    f"GET {S}/language": Act(),
    "GET /api/status/{id}": Act(),
    f"GET {S}/events": Act(),
    f"GET {S}/export": Act(before=[f"PUT {STEP}", f"POST {S}/finalize"]),
    f"GET {S}/result": Act(before=[RESULT]),
    "GET /api/download/{id}": Act(before=[RESULT]),
    f"GET {S}/upload": Act(before=["POST /api/upload"], needs=False),
    f"GET {S}/history": Act(before=[f"POST {S}/ask"]),
    f"GET {TOKENS}": Act(before=[f"POST {TOKENS}"]),
    f"GET {S}": Act(),
    f"GET {TASK}": Act(before=[f"POST {TASKS}/task"]),
    f"GET {TASKS}": Act(before=[f"POST {TASKS}/task"], query={"user_id": "{word}"}),
    f"GET {SHORT}": Act(before=[f"POST {TASKS}/task"]),
    f"GET {ADMIN}/sessions": Act(query={"user_id": "{word}"}),
    f"GET {ADMIN}/stats": Act(),
    f"GET {ADMIN}/health": Act(),
    f"GET {ADMIN}/config": Act(),
    f"GET {ADMIN}/audit": Act(),
    # With access control, only a user has sessions of their own.
    f"GET {BASE}/mine": Act(query={"user_id": "{word}"}),
}
"""Every other call that asks the store and is answered whole."""

STREAM = f"GET {S}/events/stream"
"""The one whose answer does not end."""

CALLS = {**WRITES, **READS, STREAM: Act()}

WITHOUT_STORE = {f"GET {BASE}/steps", "GET /metrics"}
"""Calls that are answered from memory, beside the public ones."""


def name_of(call: str) -> str:
    """Give method and path of a call, without what tells variations apart."""
    return call.partition(" (")[0]


def every_name() -> set[str]:
    """Give method and path of every operation but the public ones."""
    return {
        f"{method} {operation.path}"
        for operation in OPERATIONS
        for method in operation.methods
        if operation.access is not Access.PUBLIC
    }


def operation_of(call: str) -> Operation:
    """Find the operation of a call."""
    method, _, path = name_of(call).partition(" ")
    [found] = [each for each in OPERATIONS if each.path == path and method in each.methods]
    return found


async def prepare(world: World, call: str) -> None:
    """Do what comes before a call."""
    act = CALLS[call]
    if act.needs and "id" not in world.told:
        await do_before(world, f"POST {BASE}/session")
    for step in act.before:
        if isinstance(step, str):
            await do_before(world, step)
        else:
            await step(world)


async def do_before(world: World, call: str) -> None:
    """Do a call that another one needs, with what it needs itself, and take note of its answer."""
    await prepare(world, call)
    response = await send(world, call)
    assert response.status_code == CALLS[call].status, (call, response.text)
    learn(world, response)


def learn(world: World, response: Response) -> None:
    """Take note of the names that an answer tells."""
    if response.headers.get("content-type") != "application/json":
        return
    told = response.json()
    for name, place in (("session_id", "id"), ("token", "token"), ("token_id", "token_id")):
        if told.get(name):
            world.told.setdefault(place, told[name])


async def send(world: World, call: str) -> Response:
    """Send a call."""
    method, _, path = name_of(call).partition(" ")
    act = CALLS[call]
    sending: dict[str, Any] = {"headers": world.sent, "params": world.fill(dict(act.query))}
    if act.content is not None:
        sending["content"] = act.content
    elif act.files is not None:
        name, content = act.files["file"]
        sending["files"] = {"file": (world.fill(name), content)}
    elif act.body is not None:
        sending["json"] = world.fill(act.body)
    return await world.api.request(method, world.fill(path), **sending)
