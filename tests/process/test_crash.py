"""What is left after the service, one of its workers or its store is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client, TransportError

from tests.faults.servers import wait_until
from tests.process.conftest import StartService
from tests.process.service_process import (
    QUICK_RETRIES,
    REPOSITORY,
    ServiceProcess,
    begin_session,
    environment_for,
    linux_only,
    save_step,
    shared,
    within,
)
from tests.service import BASE

pytestmark = linux_only


class Writer:
    """A client that saves step after step, each with a number, until it is refused.

    `acknowledged` says which number was answered with 200, by session and step; `last_status` is
    the refusal, None when there was no answer any more.
    """

    def __init__(self, service: ServiceProcess) -> None:
        self.acknowledged: dict[tuple[str, int], int] = {}
        self.last_status: int | None = None
        self._service = service
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        number = count()
        try:
            with self._service.client() as client:
                while self.last_status is None:
                    self._fill_a_session(client, number)
        except TransportError:
            return

    def _fill_a_session(self, client: Client, number: Iterator[int]) -> None:
        response = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
        if response.status_code != 201:
            self.last_status = response.status_code
            return
        session_id = response.json()["session_id"]
        for step_id, at in zip(range(1, 24), number, strict=False):
            response = save_step(client, session_id, step_id, number=at)
            if response.status_code != 200:
                self.last_status = response.status_code
                return
            self.acknowledged[session_id, step_id] = at

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def saved_numbers(service: ServiceProcess, sessions: set[str]) -> dict[tuple[str, int], int]:
    """Read back what a `Writer` wrote."""
    found = {}
    with service.client() as client:
        for session_id in sessions:
            response = client.get(f"{BASE}/{session_id}/steps")
            assert response.status_code == 200
            for step_id, step in response.json()["steps"].items():
                found[session_id, int(step_id)] = step["data"]["number"]
    return found


# The service


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_of_the_service_loses_no_acknowledged_write_and_leaves_no_process_and_no_port(
    start: StartService, tmp_path: Path, workers: int
) -> None:
    own = {"WEB_CONCURRENCY": str(workers), "TMPDIR": str(tmp_path)}
    service = start(**own).wait_until_ready(workers)
    port = service.port
    assert len(shared(tmp_path)) == workers - 1
    writer = Writer(service)
    wait_until(lambda: len(writer.acknowledged) >= 300, 30.0, "300 steps are saved")
    service.kill()
    wait_until(lambda: not service.stores(), 5.0, "no orphan of the store is left")
    writer.join()
    # A worker that still ends must not keep the port.
    again = start(PORT=str(port))
    wait_until(lambda: not service.processes(), 5.0, "no orphan of a worker is left")
    assert shared(tmp_path) == []
    # Of two processes the store may end before the one that still serves.
    assert writer.last_status in (None, 503)

    again.wait_until_it_answers(5.0)
    found = saved_numbers(again, {session_id for session_id, _ in writer.acknowledged})
    lost = {at: n for at, n in writer.acknowledged.items() if found.get(at) != n}
    assert lost == {}
    # At most the one write that was under way is there without having been acknowledged.
    assert len(found) - len(writer.acknowledged) in (0, 1)


# The store


def test_a_store_that_is_killed_is_an_outage_and_never_a_500_and_loses_no_acknowledged_write(
    start: StartService,
) -> None:
    service = start(ONBOARDING_DRAIN_S="0", **QUICK_RETRIES).wait_until_it_answers()
    writer = Writer(service)
    wait_until(lambda: len(writer.acknowledged) >= 100, 30.0, "100 steps are saved")
    with service.client() as client:
        session_id = begin_session(client)
        path = f"{BASE}/{session_id}"
        save_step(client, session_id, 1, a=1)
        (store,) = service.stores()

        os.kill(store, signal.SIGKILL)

        answers = [client.get(path)]  # before health knows
        wait_until(lambda: client.get("/health").json()["status"] == "down", 1.5, "it is down")
        with within(0.5):
            assert client.get("/health").status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        answers += [
            client.get(f"{path}/steps"),
            client.get(f"{path}/steps/1"),
            client.get(f"{path}/progress"),
            save_step(client, session_id, 1, a=2),
            client.put(f"{path}/steps/2/draft", json={"data": {"a": 1}}),
            client.post(f"{path}/finalize"),
            client.post(f"{BASE}/session", json={"workspace_id": "w1"}),
            client.delete(path),
        ]
    assert {(each.status_code, each.json()["code"]) for each in answers} == {
        (503, "store_unavailable")
    }
    assert all("retry-after" in each.headers for each in answers)
    writer.join()
    assert writer.last_status == 503

    service.send(signal.SIGTERM)
    assert service.wait_for_exit() == 0
    assert service.stderr == ""
    assert "request_crashed" not in service.events

    # A new start finds every one.
    again = start().wait_until_it_answers()
    found = saved_numbers(again, {session_id for session_id, _ in writer.acknowledged})
    lost = {at: n for at, n in writer.acknowledged.items() if found.get(at) != n}
    assert lost == {}


# Beside the service

REPL = """
import asyncio, json, sys
from app.services.manager import get_onboarding_session_manager

async def main(session_id):
    manager = get_onboarding_session_manager()
    step = await manager.get_step(session_id, 1)
    progress = await manager.get_progress(session_id)
    await manager.save_step(session_id, 2, {"from": "the REPL"})
    health = await manager.health_check()
    return {"data": step["data"], "completed": progress["completed"], "health": health}

print(json.dumps(asyncio.run(main(sys.argv[1]))))
"""


def run_beside(data_dir: Path, session_id: str) -> dict[str, Any]:
    """Run the REPL's lines in a process of their own; gives what they print."""
    finished = subprocess.run(
        [sys.executable, "-c", REPL, session_id],
        cwd=REPOSITORY,
        env=environment_for(data_dir),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def test_a_repl_attaches_to_the_store_of_the_running_service_and_without_one_starts_it_and_ends_it(
    start: StartService, data_dir: Path
) -> None:
    service = start().wait_until_it_answers()
    stores = service.stores()
    with service.client() as client:
        session_id = begin_session(client)
        save_step(client, session_id, 1, a=1)

        seen = run_beside(data_dir, session_id)

        assert seen["data"] == {"a": 1}
        assert seen["completed"] == 1
        assert seen["health"]["overall_healthy"] is True
        step = client.get(f"{BASE}/{session_id}/steps/2").json()
        assert step["data"] == {"from": "the REPL"}
        assert service.stores() == stores
        assert client.get("/health").json()["status"] == "ok"
    service.stop()

    assert run_beside(data_dir, session_id)["data"] == {"a": 1}

    assert service.stores() == []
