"""What a run of the service writes: one JSON object a line, and nothing that must stay secret."""

import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from httpx2 import Client

from app.onboarding.access import Scope, write_api_key
from tests.faults.servers import HOST, Valkey, free_ports, wait_until
from tests.process.conftest import StartService
from tests.process.service_process import (
    QUICK_RETRIES,
    REPOSITORY,
    Line,
    ServiceProcess,
    begin_session,
    environment_for,
    linux_only,
    save_step,
)
from tests.service import BASE

PASSWORD = "hunter2-is-the-password"
API_KEY = "ok_hunter3-is-the-key"
ANSWER = "blue whales of the south"
MISSPELT = {
    "ONBOARDING_SESION_TTL_S": "value-of-a-misspelt-one",
    "ONBOARDING_QUUX": "value-of-quux",
}

shared = pytest.mark.xdist_group("log-lines")


@dataclass
class Run:
    """What a run said, and what was asked of it: request id to (method, route, status)."""

    store: Valkey
    asked: dict[str, tuple[str, str | None, int]] = field(default_factory=dict)
    stdout: str = ""
    stderr: str = ""

    @property
    def lines(self) -> list[Line]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    def named(self, event: str) -> list[Line]:
        return [line for line in self.lines if line["event"] == event]

    def ask(
        self, client: Client, method: str, path: str, route: str | None, json: object = None
    ) -> int:
        """Send a request under an id of its own and note what should be logged of it."""
        request_id = f"r-{len(self.asked)}"
        response = client.request(method, path, json=json, headers={"X-Request-ID": request_id})
        assert response.headers["x-request-id"] == request_id
        self.asked[request_id] = (method, route, response.status_code)
        return response.status_code


@pytest.fixture(scope="module")
def run(start_shared: StartService, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a service of two workers through a life with all that may go wrong in one."""
    with Valkey.start(tmp_path_factory.mktemp("store"), requirepass=PASSWORD) as store:
        seen = Run(store)
        service = start_shared(
            ENVIRONMENT="production",
            ONBOARDING_AUTH="on",
            ONBOARDING_API_KEYS=write_api_key("tests", [Scope.SESSIONS], API_KEY),
            WEB_CONCURRENCY="2",
            REDIS_URL=f"redis://:{PASSWORD}@localhost:{store.port}/0",
            ONBOARDING_DRAIN_S="0",
            ONBOARDING_LOG_FORMAT="",  # stdout is no terminal here
            **MISSPELT,
            **QUICK_RETRIES,
        ).wait_until_ready(2)
        with service.client() as client:
            client.headers["X-API-Key"] = API_KEY
            session_id = _use(seen, client)
            _lean_on(service)
            with socket.create_connection((HOST, service.port)) as link:
                link.sendall(f"{ANSWER} is no HTTP\r\n\r\n".encode())
                assert link.recv(1024).startswith(b"HTTP/1.1 400")
            store.command("SET", f"onboarding:{session_id}:step:2", ANSWER)
            seen.ask(client, "GET", f"{BASE}/{session_id}/steps/2", f"{BASE}/{{id}}/steps/{{n}}")
            store.stop()
            service.wait_for_event("store_health_changed", count=4)
            assert seen.ask(client, "GET", f"{BASE}/{session_id}", f"{BASE}/{{id}}") == 503
            store.restart()
            service.wait_for_event("store_health_changed", count=6)
        service.send(signal.SIGTERM)
        assert service.wait_for_exit() == 0
    seen.stdout, seen.stderr = service.stdout, service.stderr
    return seen


def _use(seen: Run, client: Client) -> str:
    session_id = begin_session(client)
    path, route = f"{BASE}/{session_id}", f"{BASE}/{{id}}"
    step = {"data": {"answer": ANSWER}}
    seen.ask(client, "POST", f"{path}/steps/1", f"{route}/steps/{{n}}", step)
    seen.ask(client, "POST", f"{path}/steps/2", f"{route}/steps/{{n}}", step)
    seen.ask(client, "PUT", f"{path}/steps/3/draft", f"{route}/steps/{{n}}/draft", step)
    seen.ask(client, "GET", f"{path}/steps/1", f"{route}/steps/{{n}}")
    seen.ask(client, "GET", f"{path}/summary", f"{route}/summary")
    seen.ask(client, "POST", f"{path}/steps/1", f"{route}/steps/{{n}}", {"data": ANSWER})
    seen.ask(client, "POST", f"{path}/steps/99", f"{route}/steps/{{n}}", step)
    seen.ask(client, "GET", f"{BASE}/{ANSWER.replace(' ', '-')}", f"{BASE}/{{id}}")
    seen.ask(client, "GET", f"/{ANSWER.replace(' ', '-')}", None)
    seen.ask(client, "DELETE", f"{path}/summary", f"{route}/summary")
    for probe in ("/livez", "/health", "/healthz", "/readyz"):
        assert client.get(probe, headers={"X-Request-ID": "a-probe"}).status_code == 200
    return session_id


def _lean_on(service: ServiceProcess) -> None:
    """Let both workers write at the same time."""

    def write(_: int) -> None:
        with service.client() as client:
            client.headers["X-API-Key"] = API_KEY
            session_id = begin_session(client)
            for step_id in range(1, 24):
                assert save_step(client, session_id, step_id, answer=ANSWER).status_code == 200

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))


# The shape


@shared
def test_every_line_is_one_json_object_that_begins_with_time_level_and_event(run: Run) -> None:
    assert run.stdout.endswith("\n")
    assert len(run.lines) > 6 * 24
    for line in run.lines:
        assert list(line)[:3] == ["timestamp", "level", "event"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line["timestamp"])
        assert line["level"] in {"debug", "info", "warning", "error", "critical"}
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", line["event"])


@shared
def test_nothing_is_said_on_stderr(run: Run) -> None:
    assert run.stderr == ""


@shared
def test_each_request_has_one_line_with_its_route_and_its_cost(run: Run) -> None:
    served = {line["request_id"]: line for line in run.named("request_served")}
    assert len(served) == len(run.named("request_served"))
    logged = {
        request_id: (served[request_id]["method"], served[request_id]["route"], status)
        for request_id, (_, _, status) in run.asked.items()
        if served[request_id]["status"] == status
    }
    assert logged == run.asked
    for line in served.values():
        assert line["duration_ms"] >= 0
        assert line["redis_commands"] >= 0
        assert line["retries"] >= 0
    # The first request of a process may have had to bring the script along.
    assert (served["r-1"]["redis_commands"], served["r-1"]["retries"]) == (1, 0)
    assert "session_id" in served["r-1"]


@shared
def test_what_a_request_met_is_logged_under_its_id(run: Run) -> None:
    outage = next(id_ for id_, (_, _, status) in run.asked.items() if status == 503)
    said = [line["event"] for line in run.lines if line.get("request_id") == outage]
    assert said == ["store_call_retried", "store_call_failed", "request_served"]


@shared
def test_probes_have_no_line(run: Run) -> None:
    assert "a-probe" not in run.stdout
    probes = {"/livez", "/health", "/healthz", "/readyz"}
    assert [line for line in run.named("request_served") if line["route"] in probes] == []


@shared
def test_the_life_of_the_processes_is_logged(run: Run) -> None:
    for event, times in {
        "service_started": 1,
        "process_started": 2,
        "drain_started": 2,
        "process_stopped": 2,
        "service_stopped": 1,
    }.items():
        assert len(run.named(event)) == times, event


@shared
def test_the_store_going_and_coming_is_logged_by_each_process(run: Run) -> None:
    seen = [line["status"] for line in run.named("store_health_changed")]
    assert seen.count("down") == 2
    assert seen.count("ok") == 4


# What must not stand there


@shared
def test_the_listening_address_stands_once_and_that_of_redis_nowhere(run: Run) -> None:
    (started,) = run.named("service_started")
    with_host = [line for line in run.stdout.splitlines() if HOST in line]
    with_port = re.findall(rf"\b{started['port']}\b", run.stdout)
    assert len(with_host) == 1
    assert started["host"] == HOST
    assert len(with_port) == 1
    assert "localhost" not in run.stdout
    assert re.findall(rf"\b{run.store.port}\b", run.stdout) == []


@shared
def test_no_secret_and_no_answer_stands_in_the_log(run: Run) -> None:
    for secret in (PASSWORD, API_KEY, ANSWER, ANSWER.replace(" ", "-")):
        assert secret not in run.stdout


@shared
def test_no_line_holds_a_stack(run: Run) -> None:
    assert "Traceback" not in run.stdout
    assert 'File \\"' not in run.stdout


# Warnings about the environment


@shared
def test_unknown_variables_are_named_once_and_their_values_are_not(run: Run) -> None:
    (warning,) = run.named("unknown_variables_ignored")
    assert warning["level"] == "warning"
    assert warning["variables"] == sorted(MISSPELT)
    for value in MISSPELT.values():
        assert value not in run.stdout


def test_a_quiet_environment_is_not_warned_of(start: StartService) -> None:
    service = start(ONBOARDING_SESSION_TTL_S="60", SESSION_TTL="60").wait_until_it_answers()
    service.stop()
    assert [line for line in service.lines if line["level"] != "info"] == []


def test_the_log_level_keeps_what_is_below_it_out(start: StartService) -> None:
    port = free_ports(1)[0]
    service = start(PORT=str(port), LOG_LEVEL="warning", ONBOARDING_QUUX="1")
    wait_until(lambda: _listens(port), 15.0, "it serves")
    service.stop()
    assert service.events == ["unknown_variables_ignored"]


def test_a_redis_that_refuses_the_password_is_not_described(
    start: StartService, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Valkey.start(tmp_path_factory.mktemp("store"), requirepass="another") as store:
        url = f"redis://somebody:{PASSWORD}@localhost:{store.port}/0"
        service = start(REDIS_URL=url, **QUICK_RETRIES).wait_until_it_answers()
        assert service.get("/health").json()["status"] == "down"
        with service.client() as client:
            created = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
        assert created.status_code == 503
        service.stop()
    said = service.stdout + service.stderr + created.text
    for secret in (PASSWORD, "somebody", "localhost", str(store.port)):
        assert secret not in said


# A log that cannot be written: a full disk, a reader that went away


@pytest.fixture
def unheard(start: StartService, tmp_path: Path) -> Iterator[tuple[ServiceProcess, Valkey]]:
    """Give a service whose every further line fails with an OSError, and its store."""
    with Valkey.start(tmp_path / "store") as store:
        service = start(REDIS_URL=store.url, ONBOARDING_DRAIN_S="0", **QUICK_RETRIES)
        service.wait_until_ready()
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (0, 0))
        yield service, store


@linux_only
def test_requests_are_answered_though_the_log_cannot_be_written_and_sigterm_ends_it(
    unheard: tuple[ServiceProcess, Valkey],
) -> None:
    service, store = unheard
    with service.client() as client:
        session_id = begin_session(client)
        assert save_step(client, session_id, 1, a=1).status_code == 200
        store.freeze()
        assert save_step(client, session_id, 1, a=2).status_code == 503
        store.thaw()
    service.send(signal.SIGTERM)
    service.wait_for_exit(4.0)  # with any status: Python has one of its own for a lost stdout


@linux_only
def test_health_goes_on_though_the_log_cannot_be_written_and_sigint_ends_it(
    unheard: tuple[ServiceProcess, Valkey],
) -> None:
    service, store = unheard
    with service.client() as client:
        store.freeze()
        wait_until(lambda: client.get("/health").status_code == 503, 1.5, "it is down")
        store.thaw()
        wait_until(lambda: client.get("/health").status_code == 200, 1.5, "it is well")
    service.send(signal.SIGINT)
    service.wait_for_exit(4.0)


# The format


LOG_A_LINE = """
import structlog
from app.logs import configure_logging
configure_logging("info", None)
structlog.get_logger().info("something_happened", number=4711)
"""


def test_a_terminal_gets_lines_for_people(tmp_path_factory: pytest.TempPathFactory) -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", LOG_A_LINE],
            cwd=REPOSITORY,
            env=environment_for(tmp_path_factory.mktemp("none")),
            stdout=theirs,
            timeout=30,
            check=True,
        )
        said = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "something_happened" in said
    assert "4711" in said
    assert not said.startswith("{")


def _listens(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex((HOST, port)) == 0
