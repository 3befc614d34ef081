"""The whole interface under generated requests, good and bad, against a real server and store.

A failure is a difference between the document and the service, or an error of the service: no
outage happens here.
"""

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from queue import Queue
from threading import Thread
from typing import Any
from uuid import UUID

import jsonschema_rs
import pytest
import requests
import schemathesis
import uvloop
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, CheckFunction
from schemathesis.checks import load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation.hypothesis.builder import (
    HypothesisTestConfig,
    HypothesisTestMode,
    create_test,
)
from schemathesis.generation.meta import TestPhase
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from app.onboarding.tasks import MAX_ID_LENGTH
from app.settings import Settings, load_settings
from tests.api_schema.walk import described, validator_of
from tests.conftest import UNLIMITED
from tests.servers import Valkey
from tests.service import BASE, serving

SEED = 20_261_120
EXAMPLES = 15
"""Requests that are drawn for an operation, beside those that cover its schema case by case."""

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(
    copy.deepcopy(described()), config=schemathesis.Config.from_dict({"seed": SEED})
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
    *({UPLOADED, SAVED, DRAFTED, STORED}, {SAVED}, {DRAFTED, STORED}),
    *({UPLOADED, SAVED, FINALIZED}, set[str]()),
]
"""The states in which a request may find its session and step. The first refuses least."""


class Service:
    """A running service, and sessions on it in every state."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = requests.Session()

    def begin(self, state: set[str], number: int) -> str:
        """Begin a session, bring it and one of its steps into a state, and give its id."""
        if UPLOADED in state:
            made = self.client.post(f"{self.url}/api/upload", files={"file": ("a.txt", b"text")})
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

    def begin_task(self, name: str) -> str:
        """Begin a task, of which some have ended, and give its id."""
        task = {"task_type": TASK_TYPES[0], "short_id": "s1"}
        task_id = str(self._request("POST", f"{TASKS}/task", task)["task_id"])
        if name > "m":
            self._request("PATCH", f"{TASKS}/task/{task_id}", {"status": "completed"})
        return task_id

    def begin_handing_over(self, session_id: str) -> dict[str, Any]:
        """Make a resume token of a session."""
        return self._send("POST", f"/{session_id}/resume-tokens", None)

    def _send(self, method: str, path: str, body: Any) -> dict[str, Any]:
        return self._request(method, BASE + path, body)

    def _request(self, method: str, path: str, body: Any) -> dict[str, Any]:
        response = self.client.request(method, f"{self.url}{path}", json=body)
        assert response.ok, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with (
        Valkey.start(tmp_path_factory.mktemp("valkey")) as store,
        # So many questions a second are asked nowhere else.
        serving_in_a_thread(
            load_settings(redis_url=store.url, asks_per_second=100_000, **UNLIMITED)
        ) as url,
    ):
        yield Service(url)


def settle(case: Case[Any], service: Service) -> None:
    """Point a case that names some session and step to ones that exist; leave what is invalid."""
    number = str(case.path_parameters.get("n", "1"))
    if "n" in case.path_parameters and is_valid("n", number):
        number = str(1 + int(number) % 23)
        case.path_parameters["n"] = number
    if is_valid("id", str(case.path_parameters.get("id"))):
        # The cases that cover the schema have all the same id; the drawn ones have any.
        chosen = UUID(case.path_parameters["id"]).int if is_drawn(case) else 0
        step = int(number) if is_valid("n", number) else 1
        case.path_parameters["id"] = service.begin(STATES[chosen % len(STATES)], min(step, 23))
    if case.path.endswith("/mine") and not case.query:
        # Whose they are must be said, but only where nobody says who they are.
        case.query = {"user_id": "u1"}
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
        body["token"] = service.begin_handing_over(service.begin(set(), 1))["token"]
    task_type = body.get("task_type")
    if isinstance(task_type, str) and 1 <= len(task_type) <= MAX_ID_LENGTH:
        # No schema names the types, since a deployer adds to them.
        body["task_type"] = TASK_TYPES[len(task_type) % len(TASK_TYPES)]


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

    def check(case: Case[Any]) -> None:
        settle(case, service)
        drop_what_means_nothing(case)
        response = case.call(base_url=service.url, session=service.client)
        statuses.add(response.status_code)
        excused = response.status_code in {412, 422} and is_excused(response.json())
        excluded: list[CheckFunction] = [positive_data_acceptance] if excused else []
        if is_form_of_other_types(case):
            excluded.append(negative_data_rejection)
        case.validate_response(response, excluded_checks=excluded)

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
            seed=SEED,
        ),
    )()

    # It would mean little if every request had been refused at the door.
    assert min(statuses) < 300
    assert max(statuses) >= 400
