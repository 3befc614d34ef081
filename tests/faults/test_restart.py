"""Services end and begin while they are used: nobody who comes by a balancer notices."""

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from httpx2 import AsyncClient

from tests.events import EventSource
from tests.faults.aside import aside
from tests.faults.balancer import Balancer, ConnectionBalancer
from tests.faults.conftest import Begin, Runs, StartService
from tests.faults.load import Load
from tests.faults.servers import HOST, Valkey, free_ports, wait_until
from tests.process.service_process import within
from tests.service import BASE

EXIT_S = 20.0
"""How long the end of a service may take after SIGTERM."""

STREAMS = 20


class Followers:
    """Clients who follow a session each, and come back whenever their stream ends.

    `ends` counts how the streams ended: by `bye`, or `broken`.
    """

    def __init__(self, url: str, count: int = STREAMS) -> None:
        self.ends: Counter[str] = Counter()
        self.following = 0
        self._url = url
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        async with AsyncClient(base_url=self._url, trust_env=False) as client:
            for _ in range(self._count):
                answer = await client.post(f"{BASE}/session", json={"workspace_id": "w1"})
                session_id = answer.json()["session_id"]
                self._tasks.append(asyncio.create_task(self._follow(session_id)))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, session_id: str) -> None:
        source = EventSource(self._url, session_id)
        try:
            while True:
                await source.open()
                self.following += 1
                try:
                    received = await source.receive_all(600.0)
                finally:
                    self.following -= 1
                is_bye = source.is_whole and received[-1].type == "bye"
                self.ends["bye" if is_bye else "broken"] += 1
                await asyncio.sleep(0.5)
        finally:
            source.close()


@pytest.mark.parametrize(
    ("kind", "drain_s", "workers"),
    [
        (Balancer, 0.5, 1),  # which is two looks of the balancer
        pytest.param(Balancer, 5.0, 1, marks=pytest.mark.chaos),
        pytest.param(Balancer, 5.0, 2, marks=pytest.mark.chaos),
        pytest.param(ConnectionBalancer, 5.0, 1, marks=pytest.mark.chaos),
    ],
)
def test_nobody_notices_that_one_service_after_the_other_is_restarted(
    start: StartService,
    store: Valkey,
    report: Begin,
    runs: Runs,
    kind: type[Balancer],
    drain_s: float,
    workers: int,
) -> None:
    balanced = "requests" if kind is Balancer else "connections"
    row = report(
        f"2 services of {workers} process(es) restarted in turn, drain {drain_s} s, "
        f"{balanced} balanced, 100 requests/s"
    )
    longest_exit_s = 0.0
    for _ in range(runs(5)):
        ports = free_ports(2)
        environment = {
            "REDIS_URL": store.url,
            "ONBOARDING_DRAIN_S": str(drain_s),
            "WEB_CONCURRENCY": str(workers),
        }
        services = {port: start(PORT=str(port), **environment) for port in ports}
        with (
            aside(kind(*ports)) as (balancer, _),
            aside(Followers(balancer.url)) as (followers, _),
            Load(balancer.url, wizards=50) as load,
        ):
            for port in ports:
                wait_until(lambda: len(balancer.ready()) == 2, 10.0, "both are ready")
                wait_until(lambda: followers.following == STREAMS, 10.0, "all follow")
                services[port].send(signal.SIGTERM)
                begun_s = time.monotonic()
                assert services[port].wait_for_exit(EXIT_S) == 0
                longest_exit_s = max(longest_exit_s, time.monotonic() - begun_s)
                services[port] = start(PORT=str(port), **environment)
            load.wait_for_ack(time.monotonic())
            broken, ends = Counter(balancer.broken), Counter(followers.ends)
        row.add(load.ledger, load.ledger.read_back(f"http://{HOST}:{ports[0]}"))
        assert [service.stderr for service in services.values()] == ["", ""]
        row.beside |= {
            "exit after": f"{longest_exit_s:.1f} s",
            "streams ended by bye": f"{ends['bye']}, otherwise {ends['broken']}",
        }
        assert broken == {}
        assert ends.keys() == {"bye"}
        assert ends["bye"] >= STREAMS
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)


def test_a_service_comes_up_without_its_store_and_heals_when_it_comes(
    start: StartService, tmp_path: Path, report: Begin, runs: Runs
) -> None:
    row = report("start without the store, which comes later")
    longest_start_s = longest_s = 0.0
    for run in range(runs(10)):
        [port] = free_ports(1)
        begun_s = time.monotonic()
        service = start(REDIS_URL=f"redis://{HOST}:{port}/0")
        longest_start_s = max(longest_start_s, time.monotonic() - begun_s)
        with service.client() as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 503
            with within(0.5):
                health = client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "down")
            with Valkey.start(tmp_path / f"late-{run}", port=port):
                begun_s = time.monotonic()
                wait_until(lambda: client.get("/health").status_code == 200, 1.5, "it is well")
                longest_s = max(longest_s, time.monotonic() - begun_s)
                assert client.get("/readyz").status_code == 200
                assert client.get("/health").json()["redis"]["version"]
                answer = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
                assert answer.status_code == 201
                path = f"{BASE}/{answer.json()['session_id']}"
                assert client.get(path).status_code == 200
        service.stop()
        row.runs += 1
    row.beside |= {
        "up after": f"{longest_start_s:.2f} s",
        "well after": f"{longest_s:.2f} s",
    }
    # Less than a second repeat would take: nobody waits for the store.
    assert longest_start_s < 3.0
