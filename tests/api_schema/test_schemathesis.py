"""The whole interface under generated requests, good and bad, against a real server and store.

A failure is a difference between the document and the service, or an error of the service: no
outage happens here. Access control is on: one user asks, and whatever names a session of theirs is
asked by another user as well, who reaches nothing.
"""

import asyncio
import copy
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple
from uuid import uuid4

import jsonschema_rs
import pytest
import requests
import schemathesis
import uvloop
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from redis import Redis
from schemathesis import Case, CheckFunction, Response
from schemathesis.checks import load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation.hypothesis.builder import (
    HypothesisTestConfig,
    HypothesisTestMode,
    create_test,
)
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)

from app.api.routes import OPERATIONS as ROUTED
from app.clock import now_ms
from app.onboarding.access import Access, Scope
from app.onboarding.tasks import MAX_ID_LENGTH
from app.settings import Settings, load_settings
from tests.access import AUTH, Headers, machine, user
from tests.api_schema.walk import described, validator_of
from tests.conftest import UNLIMITED
from tests.faults.servers import Valkey
from tests.service import BASE, serving

SEED = 20_261_120
EXAMPLES = 7
"""Requests that are drawn for an operation, beside those that cover its schema case by case."""

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(
    copy.deepcopy(described()),
    # Who asks is ours to say: credentials that are drawn open nothing.
    config=schemathesis.Config.from_dict(
        {"seed": SEED, "generation": {"with-security-parameters": False}}
    ),
)
ENDLESS = "GET /api/v1/onboarding/{id}/events/stream"
"""An answer to it has no end that could be waited for; the walk looks at how it begins."""

TASKS = "/api/v1/sessions"
TASK_TYPES = ["scenario_generation", "image_analysis", "scraping"]

OPERATIONS = {
    each.ok().label: each.ok()
    for each in SCHEMA.get_all_operations()
    if isinstance(each, Ok) and each.ok().label != ENDLESS
}
ACCESS = {
    f"{method} {operation.path}": operation.access
    for operation in ROUTED
    for method in operation.methods
}

# As long as any run of tests takes.
OWNER, INTRUDER = (user(each, exp=now_ms() // 1000 + 86_400) for each in ("u1", "u2"))
SHOWN = {
    Access.OPEN: {},
    Access.TASKS: machine(Scope.GENERATOR),
    Access.OPERATE: machine(Scope.ADMIN),
}
"""What is shown where it is not what the owner of the sessions shows."""


@contextmanager
def serving_in_a_thread(settings: Settings) -> Iterator[str]:
    """Serve beside the test, since Schemathesis asks synchronously; gives the URL."""
    urls: Queue[str] = Queue()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(settings) as client:
            urls.put(str(client.base_url))
            await stop.wait()

    # The event loop that uvicorn takes in production.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        thread = Thread(target=runner.run, args=[serve()])
        thread.start()
        try:
            yield urls.get(timeout=10)
        finally:
            runner.get_loop().call_soon_threadsafe(stop.set)
            thread.join(10)


SAVED, DRAFTED, FINALIZED = "saved", "drafted", "finalized"
UPLOADED, STORED = "uploaded", "stored"
STATES = [
    frozenset(state)
    for state in (
        *({UPLOADED, SAVED, DRAFTED, STORED}, {UPLOADED, SAVED, FINALIZED}),
        *({SAVED}, {DRAFTED, STORED}, ()),
    )
]
"""The states in which a request may find its session and step. The first refuses least."""


_SNAPSHOT = """
local kept = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  kept[key] = redis.sha1hex(redis.call('DUMP', key))
end
return cjson.encode(kept)
"""


class Service:
    """A running service, and sessions on it in every state."""

    def __init__(self, url: str, store_url: str) -> None:
        self.url = url
        self.client = requests.Session()
        # Nothing is looked for in the environment before each request.
        self.client.trust_env = False
        self._store = Redis.from_url(store_url, decode_responses=True)
        self._as_begun: dict[tuple[frozenset[str], int], Aim] = {}
        self._drawn: dict[str, int] = {}

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._store.close()

    def snapshot(self, session_id: str) -> dict[str, str]:
        """Give digests of all that is kept of a session, by their keys."""
        kept: dict[str, str] = json.loads(str(self._store.eval(_SNAPSHOT, 0, f"*{session_id}*")))
        return kept

    def state_for(self, drawn: str) -> frozenset[str]:
        """Give the state that a drawn id stands for: each in turn, and the same for the same id."""
        return STATES[self._drawn.setdefault(drawn, len(self._drawn)) % len(STATES)]

    def begin(self, state: frozenset[str], number: int) -> "Aim":
        """Give a session that is, with one of its steps, in a state."""
        known = self._as_begun.pop((state, number), None)
        if known is not None:
            return known
        session_id = self._begin(state, number)
        return Aim(session_id, state, number, self.snapshot(session_id))

    def keep(self, aim: "Aim") -> None:
        """Take a session back, for another request, if it is still as it began."""
        if self.snapshot(aim.session_id) == aim.begun:
            self._as_begun[(aim.state, aim.number)] = aim

    def _begin(self, state: frozenset[str], number: int) -> str:
        if UPLOADED in state:
            files = {"file": ("a.txt", b"text")}
            made = self.client.post(f"{self.url}/api/upload", files=files, headers=OWNER)
            session_id = str(made.json()["session_id"])
        else:
            session_id = str(self._send("POST", "/session", {"workspace_id": "w1"})["session_id"])
        step = f"/{session_id}/steps/{number}"
        if SAVED in state:
            self._send("POST", step, {"data": {"a": [1, {"b": None}]}})
        if DRAFTED in state:
            self._send("PUT", f"{step}/draft", {"data": {"c": 1.5}})
        if STORED in state:
            self._send("PUT", f"/{session_id}/result", {"made": 1})
        if FINALIZED in state:
            self._send("POST", f"/{session_id}/finalize", None)
        return session_id

    def send(self, case: Case[Any], shown: Headers, session_id: str | None = None) -> Response:
        """Send a case as somebody, about another session if one is named."""
        parameters = case.path_parameters
        if session_id is not None:
            case.path_parameters = {**parameters, "id": session_id}
        response = case.call(base_url=self.url, session=self.client, headers={**shown})
        case.path_parameters = parameters
        return response

    def begin_task(self, name: str) -> str:
        """Begin a task, of which some have ended, and give its id."""
        task = {"task_type": TASK_TYPES[0], "short_id": "s1"}
        task_id = str(
            self._request("POST", f"{TASKS}/task", task, machine(Scope.GENERATOR))["task_id"]
        )
        if name > "m":
            ended = {"status": "completed"}
            self._request("PATCH", f"{TASKS}/task/{task_id}", ended, machine(Scope.GENERATOR))
        return task_id

    def begin_handing_over(self, session_id: str) -> dict[str, Any]:
        """Make a resume token of a session."""
        return self._send("POST", f"/{session_id}/resume-tokens", None)

    def _send(self, method: str, path: str, body: Any) -> dict[str, Any]:
        return self._request(method, BASE + path, body)

    def _request(self, method: str, path: str, body: Any, shown: Headers = OWNER) -> dict[str, Any]:
        response = self.client.request(method, f"{self.url}{path}", json=body, headers=shown)
        assert response.ok, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="module")
def patient_looks() -> Iterator[None]:
    """Let no look at the store be given up because the thread that draws requests was busy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in ("connect", "health"):
            monkeypatch.setattr(f"app.store.{module}.STEP_S", 30.0)
        yield


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, patient_looks: None
) -> Iterator[tuple[str, str]]:
    """Serve on a store, for all tests; gives the URLs of both."""
    with (
        Valkey.start(tmp_path_factory.mktemp("valkey")) as store,
        # So many questions a second are asked nowhere else.
        serving_in_a_thread(
            load_settings(redis_url=store.url, asks_per_second=100_000, **UNLIMITED, **AUTH)
        ) as url,
    ):
        yield url, store.url


@pytest.fixture
def service(place: tuple[str, str]) -> Iterator[Service]:
    """Ask, with sessions of one test: operators may have removed those of another."""
    with closing(Service(*place)) as service:
        yield service


class Aim(NamedTuple):
    """A session, the state in which it and a step began, and what was kept of it then."""

    session_id: str
    state: frozenset[str]
    number: int
    begun: dict[str, str]


def settle(case: Case[Any], service: Service) -> Aim | None:
    """Point a case that names some session and step to ones that exist; leave what is invalid.

    Gives the session that it names now.
    """
    aim = None
    number = str(case.path_parameters.get("n", "1"))
    if "n" in case.path_parameters and is_valid("n", number):
        number = str(1 + int(number) % 23)
        case.path_parameters["n"] = number
    if is_valid("id", str(case.path_parameters.get("id"))):
        # The cases that cover the schema have all the same id; the drawn ones have any.
        state = service.state_for(case.path_parameters["id"]) if is_drawn(case) else STATES[0]
        step = int(number) if is_valid("n", number) else 1
        aim = service.begin(state, min(step, 23))
        case.path_parameters["id"] = aim.session_id
    task_id = str(case.path_parameters.get("task_id", ""))
    if is_valid("task_id", task_id):
        case.path_parameters["task_id"] = service.begin_task(task_id)
    if is_valid("token_id", str(case.path_parameters.get("token_id"))) and is_valid(
        "id", str(case.path_parameters["id"])
    ):
        made = service.begin_handing_over(case.path_parameters["id"])
        case.path_parameters["token_id"] = made["token_id"]
    body = case.body if isinstance(case.body, dict) else {}
    if isinstance(body.get("token"), str):
        handed_over = service.begin(frozenset(), 1).session_id
        body["token"] = service.begin_handing_over(handed_over)["token"]
    task_type = body.get("task_type")
    if isinstance(task_type, str) and 1 <= len(task_type) <= MAX_ID_LENGTH:
        # No schema names the types, since a deployer adds to them.
        body["task_type"] = TASK_TYPES[len(task_type) % len(TASK_TYPES)]
    return aim


def check_intrusion(case: Case[Any], aim: Aim, service: Service) -> None:
    """Send a case as somebody whose session it is not: to them there is none, and it stays as is.

    What is wrong with the request as such comes first, as it does for an unknown session.
    """
    before = service.snapshot(aim.session_id) if "token_id" in case.path_parameters else aim.begun
    foreign = refusal_of(service.send(case, INTRUDER))
    if foreign != (404, "session_not_found"):
        assert foreign == refusal_of(service.send(case, OWNER, str(uuid4())))
    assert service.snapshot(aim.session_id) == before


def refusal_of(response: Response) -> tuple[int, str]:
    assert response.status_code >= 400, response.status_code
    return response.status_code, str(response.json()["code"])


def is_drawn(case: Case[Any]) -> bool:
    return case.meta is not None and case.meta.phase.name == TestPhase.FUZZING


PASSED_OVER = ("X-Request-ID", "Content-Disposition")
"""Headers that are not refused when they cannot be read: another name is found."""

OWN_STRINGS = {
    *("/workspace_id", "/user_id", "/language"),
    *("/stage", "/message", "/event_id", "/error_message", "/cursor"),
}
"""Where no schema says all that is asked: language tags, no control characters, no message of an
error where there is none, a cursor that is one of ours."""


def drop_what_means_nothing(case: Case[Any]) -> None:
    """Leave out invalid headers, unless they are what the case is about."""
    assert case.meta is not None
    data = case.meta.phase.data
    for name in ("If-Match", "If-None-Match", *PASSED_OVER):
        sent = case.headers.get(name)
        if sent is None or is_valid(name, sent):
            continue
        # In the cases that cover the schema Schemathesis sends a 0 where it wants a tag, and then
        # nothing behind the headers would be looked at.
        intended = is_drawn(case) or data.parameter == name
        if name in PASSED_OVER or not intended:
            del case.headers[name]


@cache
def validator_of_parameter(name: str) -> jsonschema_rs.Validator:
    return validator_of(described()["components"]["parameters"][name]["schema"])


def is_valid(parameter: str, value: str) -> bool:
    return validator_of_parameter(parameter).is_valid(value)


def is_excused(problem: dict[str, Any]) -> bool:
    """Say whether a request that meets the schema may be refused like this all the same."""
    codes = {fault["code"] for fault in problem.get("errors", [])}
    pointers = {fault["pointer"] for fault in problem.get("errors", [])}
    # No schema can ask of numbers at any depth that a double keeps them exactly.
    inexact = {"integer_range", "number_range"}
    # To JSON Schema 56.0 is an integer.
    with_fraction = {"int_type"}
    match problem["code"]:
        case "version_conflict" | "idempotency_mismatch":
            # By the state of the step; by an earlier request.
            return True
        case "invalid_step_id":
            # Several steps at once: 24 to 999 may be the steps of another catalogue.
            return str(problem["instance"]).endswith("/steps")
        case "invalid_step_data":
            # A merge patch that takes the last answer away; a draft without answers, promoted.
            return bool(codes) and codes <= inexact | {"min_properties"}
        case "invalid_request":
            # What the query may say instead is among these too.
            return codes <= inexact | with_fraction or pointers <= OWN_STRINGS
        case _:
            return False


def is_form_of_other_types(case: Case[Any]) -> bool:
    """Say whether the schema refuses a field of a form for its type: a form has only texts."""
    form = case.body if case.media_type == "multipart/form-data" else None
    return isinstance(form, dict) and not isinstance(form.get("language", ""), str)


@pytest.mark.parametrize("label", OPERATIONS)
def test_a_generated_request_is_answered_as_the_document_says(label: str, service: Service) -> None:
    statuses: set[int] = set()
    shown = SHOWN.get(ACCESS[label], OWNER)

    def check(case: Case[Any]) -> None:
        aim = settle(case, service)
        drop_what_means_nothing(case)
        if aim is not None:
            check_intrusion(case, aim, service)
        response = service.send(case, shown)
        if aim is not None:
            service.keep(aim)
        excused = response.status_code in {412, 422} and is_excused(response.json())
        excluded: list[CheckFunction] = [positive_data_acceptance] if excused else []
        if is_form_of_other_types(case):
            excluded.append(negative_data_rejection)
        if min(statuses, default=400) < 300:
            excluded.append(ignored_auth)
        statuses.add(response.status_code)
        case.validate_response(response, headers={**shown}, excluded_checks=excluded)

    # What `schema.parametrize()` would do, had its plugin learned to work with pytest 9.
    create_test(
        operation=OPERATIONS[label],
        test_func=check,
        config=HypothesisTestConfig(
            project=SCHEMA.config,
            modes=[HypothesisTestMode.COVERAGE, HypothesisTestMode.FUZZING],
            settings=hypothesis_settings(
                max_examples=EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
            # Whatever the profile of the run says.
            explicit_setting_names={"max_examples"},
            seed=SEED,
        ),
    )()

    # It would mean little if every request had been refused at the door.
    assert min(statuses) < 300
    assert max(statuses) >= 400
