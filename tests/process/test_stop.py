"""How the service ends: SIGTERM with a drain, SIGINT without."""

import signal
import time
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from tests.faults.servers import wait_until
from tests.process.conftest import StartService
from tests.process.service_process import (
    IdleConnection,
    Line,
    ServiceProcess,
    SlowRequest,
    begin_session,
    frozen,
    linux_only,
    save_step,
)
from tests.service import BASE

pytestmark = linux_only

BOTH = [
    pytest.param(1, id="one-process", marks=pytest.mark.xdist_group("stop-1")),
    pytest.param(2, id="two-workers", marks=pytest.mark.xdist_group("stop-2")),
]

DRAIN_S = 1.0


# SIGTERM: one stop of each kind, seen from outside


@dataclass
class Stop:
    """What was seen while a service stopped after SIGTERM; times in seconds since the signal."""

    workers: int
    stores_before: int
    all_said_stopping_after_s: float | None = None
    health: dict[str, object] = field(default_factory=dict)
    readiness: int = 0
    liveness: int = 0
    served_while_draining: list[int] = field(default_factory=list)
    asked_to_leave: list[bool] = field(default_factory=list)
    drained_after_s: float = 0.0
    slow_request: int = 0
    exit_status: int | None = None
    nothing_left: bool = False
    lines: list[Line] = field(default_factory=list)
    stderr: str = ""
    steps_found: dict[str, object] = field(default_factory=dict)

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


@pytest.fixture(scope="module", params=BOTH)
def stop(request: pytest.FixtureRequest, start_shared: StartService) -> Stop:
    """Stop a service that is being used, and watch it."""
    workers: int = request.param
    environment = {"WEB_CONCURRENCY": str(workers), "ONBOARDING_DRAIN_S": str(DRAIN_S)}
    service = start_shared(**environment).wait_until_ready(workers)
    seen = Stop(workers, stores_before=len(service.stores()))
    with service.client() as client:
        session_id = begin_session(client)
        assert save_step(client, session_id, 1, a=1).status_code == 200
    slow = SlowRequest(service.port, f"{BASE}/{session_id}/steps/3", b'{"data": {"slow": true}}')
    kept, idle = _connect_to_each_process(service), _connect_to_each_process(service)

    service.send(signal.SIGTERM)
    begun_s = time.monotonic()
    _watch_the_drain(service, session_id, kept, begun_s, seen)
    wait_until(lambda: all(each.is_closed() for each in idle), 10.0, "the drain is over")
    seen.drained_after_s = time.monotonic() - begun_s
    seen.slow_request = slow.finish()
    for each in kept + idle:
        each.close()

    seen.exit_status = service.wait_for_exit()
    seen.nothing_left = service.leaves_nothing_running()
    seen.lines, seen.stderr = service.lines, service.stderr
    again = start_shared().wait_until_it_answers()
    seen.steps_found = again.get(f"{BASE}/{session_id}/steps").json()["steps"]
    again.stop()
    return seen


def _connect_to_each_process(service: ServiceProcess) -> list[IdleConnection]:
    kept = [IdleConnection(service.port)]
    for worker in service.workers():
        # The others take what comes while this one stands still.
        with frozen(worker):
            kept.append(IdleConnection(service.port))
    return kept


def _watch_the_drain(
    service: ServiceProcess,
    session_id: str,
    kept: list[IdleConnection],
    begun_s: float,
    seen: Stop,
) -> None:
    while time.monotonic() < begun_s + DRAIN_S * 0.8:
        if all(each.status("/health") == 503 for each in kept):
            seen.all_said_stopping_after_s = time.monotonic() - begun_s
            break
    with service.client() as client:
        seen.health = client.get("/health").json()
        seen.readiness = client.get("/readyz").status_code
        seen.liveness = client.get("/livez").status_code
        served = client.get(f"{BASE}/{session_id}"), save_step(client, session_id, 2, b=2)
    seen.served_while_draining = [each.status_code for each in served]
    seen.asked_to_leave = [each.headers.get("connection") == "close" for each in served]


def test_health_says_stopping_at_once(stop: Stop) -> None:
    assert stop.all_said_stopping_after_s is not None
    assert stop.all_said_stopping_after_s < 0.7
    assert (stop.health["status"], stop.health["reason"]) == ("stopping", "stopping")
    assert stop.readiness == 503
    assert stop.liveness == 200


def test_requests_are_served_during_the_drain(stop: Stop) -> None:
    assert stop.served_while_draining == [200, 200]


def test_whoever_is_served_during_the_drain_is_asked_to_connect_elsewhere(stop: Stop) -> None:
    assert stop.asked_to_leave == [True, True]


def test_the_drain_takes_as_long_as_it_is_told_to(stop: Stop) -> None:
    assert DRAIN_S <= stop.drained_after_s < DRAIN_S + 1.5


def test_a_request_in_flight_at_the_end_of_the_drain_is_answered(stop: Stop) -> None:
    assert stop.slow_request == 200


def test_it_ends_with_success_and_leaves_nothing_running(stop: Stop) -> None:
    assert stop.exit_status == 0
    assert stop.stores_before == 1
    assert stop.nothing_left


def test_what_was_written_until_the_end_is_kept(stop: Stop) -> None:
    assert sorted(stop.steps_found) == ["1", "2", "3"]


def test_the_end_is_logged_process_by_process(stop: Stop) -> None:
    assert stop.events.count("drain_started") == stop.workers
    assert stop.events.count("process_stopped") == stop.workers
    assert stop.events[-1] == "service_stopped"
    assert stop.events.count("service_stopped") == 1
    assert [line for line in stop.lines if line["level"] in ("warning", "error", "critical")] == []


def test_nothing_is_said_on_stderr(stop: Stop) -> None:
    assert stop.stderr == ""


# Other signals


def test_sigint_answers_the_request_in_flight(start: StartService) -> None:
    service = start().wait_until_it_answers()
    with service.client() as client:
        session_id = begin_session(client)
    slow = SlowRequest(service.port, f"{BASE}/{session_id}/steps/1", b'{"data": {"slow": true}}')
    with closing(IdleConnection(service.port)) as idle:
        service.send(signal.SIGINT)
        wait_until(idle.is_closed, 5.0, "it stops")

    assert slow.finish() == 200
    assert service.wait_for_exit() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_cuts_the_drain_short(start: StartService, workers: int) -> None:
    service = start(WEB_CONCURRENCY=str(workers), ONBOARDING_DRAIN_S="5")
    service.wait_until_ready(workers)
    service.send(signal.SIGTERM)
    service.wait_for_event("drain_started", count=workers)

    service.send_to_group(signal.SIGINT)

    assert service.wait_for_exit(3.5) == 0
    assert service.leaves_nothing_running()
    assert service.stderr == ""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_right_after_the_start_is_not_lost(
    start: StartService, number: signal.Signals, workers: int
) -> None:
    service = start(WEB_CONCURRENCY=str(workers), ONBOARDING_DRAIN_S="0")
    service.wait_for_event("service_started")

    service.send(number)

    service.wait_for_exit(4.0)
    assert service.leaves_nothing_running()
    assert "Traceback" not in service.stderr
