"""How `python -m app` comes up, and how it refuses to."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.servers import HOST, free_ports
from tests.process.conftest import StartService
from tests.process.service_process import (
    QUICK_RETRIES,
    ServiceProcess,
    begin_session,
    linux_only,
    save_step,
    within,
)
from tests.service import BASE

REFUSED = 2
"""Exit status of a service that cannot use its environment."""


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Give a port on which somebody else listens."""
    with socket.create_server((HOST, 0)) as other:
        yield int(other.getsockname()[1])


def refusal(service: ServiceProcess) -> str:
    """Wait for a refused start; gives the one line that says why."""
    assert service.wait_for_exit() == REFUSED
    assert service.stdout == ""
    lines = service.stderr.splitlines()
    assert len(lines) == 1, service.stderr
    return lines[0]


# With the embedded store


def test_it_starts_with_a_store_of_its_own_and_the_next_start_finds_its_data_within_2_s(
    start: StartService, data_dir: Path
) -> None:
    first = start().wait_until_it_answers()
    body = first.get("/health").json()
    assert (body["status"], body["redis"]["mode"]) == ("ok", "embedded")
    assert data_dir.stat().st_mode & 0o077 == 0
    with first.client() as client:
        session_id = begin_session(client)
        assert save_step(client, session_id, 1, company="Test Corp").status_code == 200
        before = client.get(f"{BASE}/{session_id}").json()
        step = client.get(f"{BASE}/{session_id}/steps/1").json()
    assert step["data"] == {"company": "Test Corp"}
    first.stop()

    with within(2.0):
        second = start().wait_until_it_answers()
    with second.client() as client:
        assert client.get(f"{BASE}/{session_id}").json() == before
        assert client.get(f"{BASE}/{session_id}/steps/1").json() == step


@linux_only
def test_a_second_service_on_the_same_data_directory_is_refused_and_harms_nobody(
    start: StartService, data_dir: Path
) -> None:
    first = start().wait_until_it_answers()
    stores = first.stores()

    assert str(data_dir) in refusal(start())

    assert first.stores() == stores
    assert len(stores) == 1
    assert first.get("/health").status_code == 200


# Refusals


def test_bad_settings_are_named_all_at_once_in_one_line(
    start: StartService, data_dir: Path
) -> None:
    wrong = {
        "PORT": "70000",
        "WEB_CONCURRENCY": "none",
        "ONBOARDING_DRAIN_S": "-1",
        "ONBOARDING_AUTH": "yes",
        "ONBOARDING_API_KEYS": "hunter2",
        "REDIS_URL": "redis://:hunter2@store.invalid:0/x",
    }

    line = refusal(start(**wrong))

    assert [name for name in wrong if name not in line] == []
    assert "hunter2" not in line
    assert "store.invalid" not in line
    assert not data_dir.exists()


def test_production_without_a_redis_is_refused(start: StartService, data_dir: Path) -> None:
    line = refusal(start(ENVIRONMENT="production"))

    for name in ("REDIS_URL", "UPSTASH_REDIS_URL", "UPSTASH_REDIS_TOKEN", "ONBOARDING_AUTH"):
        assert name in line
    assert not data_dir.exists()


def test_a_data_directory_that_cannot_be_made_is_refused(
    start: StartService, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()

    assert str(file) in refusal(start(ONBOARDING_DATA_DIR=str(file / "data")))


@linux_only
def test_a_port_in_use_ends_it_with_a_line_and_without_an_orphan_store(
    start: StartService, taken_port: int
) -> None:
    service = start(PORT=str(taken_port))

    assert service.wait_for_exit() not in (0, -signal.SIGTERM, -signal.SIGKILL)
    said = service.stdout + service.stderr
    assert "in use" in said
    assert "Traceback" not in said
    assert service.leaves_nothing_running()


def test_a_host_that_this_machine_does_not_have_is_refused_by_name(start: StartService) -> None:
    service = start(HOST="203.0.113.1")  # TEST-NET-3 of RFC 5737

    assert service.wait_for_exit() == REFUSED
    lines = service.stderr.splitlines()
    assert len(lines) == 1
    assert "HOST" in lines[0]


@linux_only
def test_a_service_whose_workers_cannot_come_up_does_not_end_with_success(
    start: StartService, data_dir: Path
) -> None:
    service = start(WEB_CONCURRENCY="2")
    service.wait_for_event("service_started")
    # The workers are still on their way; what tells them where the store is gets lost now.
    lock = data_dir / "holder.lock"
    lock.unlink()
    lock.mkdir()

    assert service.wait_for_exit() > 0
    assert service.leaves_nothing_running()


# With a Redis that is away


@pytest.fixture(scope="module")
def absent(start_shared: StartService) -> ServiceProcess:
    """Give a service whose store is not there."""
    address = f"redis://{HOST}:{free_ports(1)[0]}"
    return start_shared(REDIS_URL=address, **QUICK_RETRIES).wait_until_it_answers()


@pytest.mark.xdist_group("start-absent")
def test_without_its_redis_it_lives_but_is_not_ready(absent: ServiceProcess) -> None:
    assert absent.get("/livez").status_code == 200
    for path in ("/health", "/healthz", "/readyz"):
        with within(0.5):
            response = absent.get(path)
        assert response.status_code == 503
        assert response.json()["status"] == "down"
        assert response.json()["redis"]["connected"] is False


@pytest.mark.xdist_group("start-absent")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/session"),
        ("GET", "/00000000-0000-4000-8000-000000000000"),
        ("POST", "/00000000-0000-4000-8000-000000000000/steps/1"),
        ("DELETE", "/00000000-0000-4000-8000-000000000000"),
    ],
)
def test_without_its_redis_a_session_is_unavailable_not_absent(
    absent: ServiceProcess, method: str, path: str
) -> None:
    body = {"workspace_id": "w1", "data": {"a": 1}} if method == "POST" else None
    with absent.client() as client:
        response = client.request(method, BASE + path, json=body)

    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["code"] == "store_unavailable"


@pytest.mark.xdist_group("start-absent")
def test_without_its_redis_it_starts_none_of_its_own(absent: ServiceProcess) -> None:
    assert not absent.data_dir.exists()


def test_a_redis_that_accepts_and_says_nothing_is_down(start: StartService) -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        service = start(REDIS_URL=f"redis://{HOST}:{port}", **QUICK_RETRIES)
        service.wait_until_it_answers()
        with within(0.5):
            assert service.get("/health").json()["status"] == "down"
        with service.client() as client:
            response = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
        assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
