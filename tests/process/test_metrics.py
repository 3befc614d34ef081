"""The metrics of several workers: counted together, kept when one dies, begun anew by a restart."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx2 import Client

from tests.faults.servers import wait_until
from tests.process.conftest import StartService
from tests.process.service_process import ServiceProcess, frozen, linux_only, shared
from tests.service import BASE

pytestmark = linux_only

COUNTED = f'onboarding_requests_total{{method="GET",route="{BASE}/steps",status="200"}}'
OK = 'onboarding_processes{status="ok"}'


def read(client: Client) -> dict[str, float]:
    """Read all series."""
    response = client.get("/metrics")
    assert response.status_code == 200
    pairs = (line.rpartition(" ") for line in response.text.splitlines() if line[0] != "#")
    return {series: float(value) for series, _, value in pairs}


@contextmanager
def client_of(service: ServiceProcess, other: int) -> Iterator[Client]:
    """Give a client whose connection leads to the worker that is not the other one."""
    with service.client() as client:
        with frozen(other):
            read(client)
        yield client


def wait_for(client: Client, series: str, value: float) -> None:
    """Ask a worker for a value until it tells that one: it learns of others within a second."""
    wait_until(lambda: read(client).get(series) == value, 5.0, f"{series} is {value}")


def test_workers_count_together_and_anew_with_the_service(
    start: StartService, tmp_path: Path
) -> None:
    service = start(WEB_CONCURRENCY="2", TMPDIR=str(tmp_path)).wait_until_ready(2)
    doomed, other = service.workers()
    with client_of(service, doomed) as client, client_of(service, other) as client_of_doomed:
        for each in (client_of_doomed, client_of_doomed, client):
            assert each.get(f"{BASE}/steps").status_code == 200
        for each in (client, client_of_doomed):
            wait_for(each, COUNTED, 3)
            wait_for(each, OK, 2)
        assert len(shared(tmp_path)) == 1

        # One dies: what it has counted stays, and it counts as serving no more.
        os.kill(doomed, signal.SIGKILL)
        service.wait_for_event("process_started", count=3)
        wait_for(client, OK, 2)
        assert read(client)[COUNTED] == 3

    service.stop()
    assert service.stderr == ""
    assert shared(tmp_path) == []
    # By itself a process shares nothing, and has counted nothing yet.
    service = start(TMPDIR=str(tmp_path)).wait_until_ready()
    with service.client() as client:
        told = read(client)
    assert COUNTED not in told
    assert told[OK] == 1
    assert shared(tmp_path) == []
    service.stop()
