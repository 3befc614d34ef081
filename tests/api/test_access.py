"""Every route under every kind of credentials: who is let in, and what everybody else is told."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from httpx2 import AsyncClient, Response
from starlette.routing import Route as RoutedPath

from app.api.access import AccessMiddleware
from app.api.dispatch import Resource
from app.api.routes import OPERATIONS
from app.clock import now_ms
from app.main import create_app
from app.onboarding.access import Access, Scope
from app.settings import Settings
from tests.access import AUTH, Headers, bearer, machine, user
from tests.api.helpers import answer_of, problem_of, unknown_id
from tests.conftest import known_settings
from tests.service import BASE, serving

BODIES: dict[str, Any] = {
    "save_step": {"data": {"a": 1}},
    "patch_step": {"b": 2},
    "save_steps": {"steps": {"2": {"a": 1}}},
    "save_draft": {"data": {"a": 1}},
    "create_resume_token": {"label": "phone"},
    "resume_session": {"token": "ort_unknown"},
    "add_event": {"stage": "a stage", "progress": 10},
    "set_status": {"status": "processing"},
    "set_language": {"language": "de"},
    "put_result": {"made": 1},
    "ask_question": {"question": "What is a draft?"},
    "stream_answer": {"question": "What is a draft?"},
    "create_session": {"workspace_id": "w1"},
    "create_task": {"task_type": "image_analysis", "short_id": "s1"},
    "set_task_status": {"status": "completed"},
    "clean_up": {"status": "error", "dry_run": True},
    "change_sessions": {"session_ids": [unknown_id()], "set": {"language": "de"}},
    "set_config": {"cleanup_interval_s": 60},
}
"""A body that each operation takes, where it takes one."""

WIZARD, OTHER_WIZARD = "its session token", "another session's token"
USER, OTHER_USER, OTHER_WORKSPACE = "its user", "another user", "another workspace"
SESSIONS, GENERATOR, ADMIN = map(str, Scope)
NOTHING, GARBAGE, EXPIRED = "nothing", "garbage", "an expired token"

UNKNOWN = [NOTHING, GARBAGE, EXPIRED]
FOREIGN = [OTHER_WIZARD, OTHER_USER, OTHER_WORKSPACE]
CALLERS = [*UNKNOWN, *FOREIGN, WIZARD, USER, SESSIONS, GENERATOR, ADMIN]

PEOPLE = {WIZARD, USER, *FOREIGN}
USERS = {USER, OTHER_USER, OTHER_WORKSPACE}
EVERYBODY = {*PEOPLE, SESSIONS, GENERATOR, ADMIN}

# As section 7 of the contract says it, path by path.
_READ_BY_GENERATORS = "export|status|events|events/stream|result|upload|language"
MAY: list[tuple[str, str, set[str]]] = [
    ("GET", r"/livez|/healthz?|/readyz|/openapi\.json|/docs", {*EVERYBODY, *UNKNOWN}),
    ("POST", f"{BASE}/resume", {*EVERYBODY, *UNKNOWN}),
    ("GET", f"{BASE}/steps", EVERYBODY),
    ("POST", f"{BASE}/session|/api/upload", {*USERS, SESSIONS}),
    ("GET", f"{BASE}/mine", USERS),
    ("GET", rf"{BASE}/{{id}}/({_READ_BY_GENERATORS})", {*PEOPLE, SESSIONS, GENERATOR}),
    ("GET", r"/api/(status|download)/{id}", {*PEOPLE, SESSIONS, GENERATOR}),
    ("PUT", rf"{BASE}/{{id}}/(status|result)", {*PEOPLE, GENERATOR}),
    ("POST", rf"{BASE}/{{id}}/events", {*PEOPLE, GENERATOR}),
    ("[A-Z]+", rf"{BASE}/{{id}}(/.*)?", {*PEOPLE, SESSIONS}),
    ("[A-Z]+", r"/api/v1/sessions(/.*)?", {GENERATOR}),
    ("[A-Z]+", r"/api/v1/admin/.*|/metrics", {ADMIN}),
]
"""Who may call what; the first line that fits counts. Foreign people may, on sessions of theirs."""


class Route(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def may(self) -> set[str]:
        """Who may call it."""
        for method, path, callers in MAY:
            if re.fullmatch(method, self.method) and re.fullmatch(path, self.path):
                return callers
        raise LookupError(str(self))

    async def send(self, api: AsyncClient, session_id: str, headers: Headers) -> Response:
        """Call it about a session; of an answer that has no end, only the head is read."""
        target = self.path.replace("{id}", session_id).replace("{n}", "1")
        target = re.sub(r"{\w+}", "x1", target.replace("{token_id}", "0" * 16))
        sent: dict[str, Any] = {"headers": headers}
        if self.path == "/api/upload":
            sent["files"] = {"file": ("a.txt", b"text")}
        elif self.name in BODIES:
            sent["json"] = BODIES[self.name]
        async with api.stream(self.method, target, **sent) as response:
            if not self.path.endswith("events/stream") or response.status_code != 200:
                await response.aread()
            return response


ROUTES = [
    Route(method, operation.path, operation.name)
    for operation in OPERATIONS
    for method in operation.methods
]


class Place(NamedTuple):
    """A session of user u1, made through the interface, and the credentials of everybody."""

    session_id: str
    shown: dict[str, Headers]


class Guarded:
    """A service with access control on."""

    def __init__(self, api: AsyncClient) -> None:
        self.api = api

    async def begin(self) -> Place:
        """Make a session with all that it can have, and a foreign one."""
        made = await self._create(user())
        session_id, own = made["session_id"], bearer(made["session_token"])
        other = await self._create(user("u2"))
        session = f"{BASE}/{session_id}"
        for method, path, body in (
            ("POST", "/steps/1", {"data": {"a": 1}}),
            ("POST", "/finalize", {}),
            ("PUT", "/result", {"made": 1}),
            ("POST", "/reopen", {}),
            ("PUT", "/steps/1/draft", {"data": {"a": 1}}),
        ):
            answer = await self.api.request(method, session + path, json=body, headers=own)
            assert answer.is_success, answer.text
        shown = {
            NOTHING: {},
            GARBAGE: bearer("garbage"),
            EXPIRED: user(exp=now_ms() // 1000 - 3600),
            OTHER_WIZARD: bearer(other["session_token"]),
            OTHER_USER: user("u2"),
            OTHER_WORKSPACE: user(workspace_id="w2"),
            WIZARD: own,
            USER: user(),
            **{str(scope): machine(scope) for scope in Scope},
        }
        return Place(session_id, shown)

    async def _create(self, headers: Headers) -> dict[str, Any]:
        body = {"workspace_id": "w1"}
        return answer_of(await self.api.post(f"{BASE}/session", json=body, headers=headers), 201)


@pytest.fixture
async def guarded(settings: Settings) -> AsyncIterator[Guarded]:
    async with serving(
        known_settings(**{**settings.model_dump(exclude_unset=True), **AUTH})
    ) as api:
        yield Guarded(api)


def test_no_route_leads_past_the_question_who_may() -> None:
    asked = set()
    for route in create_app(known_settings()).routes:
        assert isinstance(route, RoutedPath)
        assert isinstance(route.endpoint, Resource)
        for method, endpoint in route.endpoint.endpoints.items():
            assert isinstance(endpoint, AccessMiddleware)
            asked.add((method, route.path))
    known = {(route.method, route.path) for route in ROUTES if route.may}
    assert asked == known | {("HEAD", path) for method, path in known if method == "GET"}


def test_no_session_is_open_to_whoever_shows_nothing() -> None:
    named = [each for each in OPERATIONS if re.search(r"{\w*id}", each.path)]
    assert [each.name for each in named if each.access in (Access.OPEN, Access.ANY)] == []


@pytest.mark.parametrize("route", ROUTES, ids=str)
async def test_a_route_lets_in_whom_the_table_names_and_tells_others_nothing(
    route: Route, guarded: Guarded
) -> None:
    place = await guarded.begin()
    # Those who may come last: one of them may remove the session.
    for caller in sorted(CALLERS, key=lambda each: (each in route.may, CALLERS.index(each))):
        answer = await route.send(guarded.api, place.session_id, place.shown[caller])
        if caller not in route.may:
            code = "unauthenticated" if caller in UNKNOWN else "forbidden"
            problem_of(answer, code)
            assert ("www-authenticate" in answer.headers) == (code == "unauthenticated")
        elif caller in FOREIGN and "{id}" in route.path:
            unknown = await route.send(guarded.api, other := unknown_id(), place.shown[caller])
            problem_of(answer, "session_not_found")
            assert told(answer, place.session_id) == told(unknown, other)
        else:
            assert answer.status_code not in (401, 403, 429, 500), answer.text
            if route.method == "DELETE" or route.name == "reopen_session":
                place = await guarded.begin()
            elif "{id}" in route.path:
                assert answer.status_code != 404 or "session_not_found" not in answer.text


def told(answer: Response, session_id: str) -> tuple[Any, ...]:
    """Give all that an answer says, but for the ids."""
    request_id = answer.headers["x-request-id"]
    text = answer.text.replace(session_id, "<id>").replace(request_id, "<request>")
    headers = {**answer.headers, "x-request-id": "", "date": ""}
    return answer.status_code, headers, text


async def test_a_live_stream_ends_when_what_was_shown_is_good_no_more(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.02)
    place = await guarded.begin()
    session, own = f"{BASE}/{place.session_id}", place.shown[WIZARD]
    made = await guarded.api.post(f"{session}/resume-tokens", headers=own)
    link = answer_of(made, 201)
    resumed = await guarded.api.post(f"{BASE}/resume", json={"token": link["token"]})
    given = bearer(answer_of(resumed)["session_token"])
    async with guarded.api.stream("GET", f"{session}/events/stream", headers=given) as response:
        lines = response.aiter_lines()
        while not (await anext(lines)).startswith("event: snapshot"):
            pass
        revoked = f"{session}/resume-tokens/{link['token_id']}"
        answer_of(await guarded.api.delete(revoked, headers=own))
        async with asyncio.timeout(5):
            async for _ in lines:
                pass
