"""The store dies, is away or stands still under load, and comes back."""

import asyncio
import time

import pytest
from httpx2 import AsyncClient, Client, Limits

from tests.faults.conftest import REFUSALS, Begin, Runs, StartService
from tests.faults.load import PATIENCE_S, Load, Watch
from tests.faults.servers import Valkey
from tests.service import BASE

LATEST_S = 15.2
"""The deadline of a request, and the way of the answer on a busy machine."""

LEAVING = {"down": (Valkey.kill, Valkey.restart), "frozen": (Valkey.freeze, Valkey.thaw)}


@pytest.mark.chaos
def test_nobody_notices_that_the_store_was_killed(
    start: StartService, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("store killed, back after 1.5 s, 100 requests/s")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(20)):
        with Load(service.url) as load:
            store.kill()
            time.sleep(1.5)
            store.restart()
            load.wait_for_ack(time.monotonic())
        row.add(load.ledger, load.ledger.read_back(service.url))
        row.beside["overloaded"] = str(row.errors["503 overloaded"])
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("how", "away_s"), [("down", 5), ("down", 30), ("frozen", 4), ("frozen", 30)]
)
def test_an_outage(
    start: StartService, store: Valkey, report: Begin, runs: Runs, how: str, away_s: int
) -> None:
    row = report(f"store {how} for {away_s} s, 100 requests/s")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(1)):
        with Load(service.url) as load, Watch(service.url, "/livez") as watch:
            leave, return_ = LEAVING[how]
            leave(store)
            time.sleep(away_s)
            return_(store)
            after_s = time_of_a_newcomer(service.url)
            load.wait_for_ack(time.monotonic())
            time.sleep(2)
        row.add(load.ledger, load.ledger.read_back(service.url))
        row.beside |= {
            "overloaded": str(row.errors["503 overloaded"]),
            "longest answer": f"{load.ledger.longest_answer_s:.1f} s",
            "a newcomer was served after": f"{after_s:.2f} s",
            "slowest /livez": f"{max(watch.took_s) * 1000:.0f} ms",
        }
        assert (row.lost, row.duplicated) == (0, 0)
        assert row.errors.keys() <= (REFUSALS if away_s == 30 else set())
        assert load.ledger.longest_answer_s < LATEST_S
        assert after_s < 1.5
        assert watch.statuses.keys() == {200}
        assert how == "down" or max(watch.took_s) < 0.1


@pytest.mark.chaos
def test_an_outage_under_a_stream_of_requests_that_nobody_holds_back(
    start: StartService, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("store down for 5 s, 100 requests/s that wait for no answer")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(3)):
        with Stream(service.url, per_second=100) as stream:
            store.kill()
            time.sleep(5)
            store.restart()
            after_s = time_of_a_newcomer(service.url)
            time.sleep(5)  # those who came last before the store did have waited so long at most
        row.add(stream.ledger, stream.ledger.read_back(service.url))
        row.beside |= {
            "longest answer": f"{stream.ledger.longest_answer_s:.1f} s",
            "a newcomer was served after": f"{after_s:.2f} s",
        }
        assert (row.lost, row.duplicated) == (0, 0)
        # More than ONBOARDING_MAX_IN_FLIGHT would wait: the rest is told at once to come again.
        assert row.errors.keys() == {"503 overloaded"}
        assert stream.ledger.longest_answer_s < LATEST_S


class Stream(Load):
    """So many new sessions a second, whether those before were answered or not."""

    def __init__(self, url: str, *, per_second: int) -> None:
        super().__init__(url, wizards=per_second, per_second=per_second)
        self._url = url
        self._between_s, self._pace_s = 1 / per_second, 0.0

    async def _run(self) -> None:
        limits = Limits(max_connections=None)
        begun_s = time.monotonic()
        sent = 0
        async with (
            AsyncClient(timeout=PATIENCE_S, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as sending,
        ):
            while not self._ended.is_set():
                sending.create_task(self._begin_a_session(client))
                sent += 1
                await asyncio.sleep(begun_s + sent * self._between_s - time.monotonic())

    async def _begin_a_session(self, client: AsyncClient) -> None:
        answer = await self._send(client, f"{self._url}{BASE}/session", {"workspace_id": "w1"})
        if answer is not None:
            self.ledger.sessions.add(answer.json()["session_id"])


def time_of_a_newcomer(url: str) -> float:
    """Say how long somebody who comes now waits until a session is begun, who tries until it is.

    Those who wait already are served when their turn comes, 1, 2 and 4 s after the one before.
    """
    begun_s = time.monotonic()
    with Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        while time.monotonic() < begun_s + PATIENCE_S:
            answer = client.post(f"{BASE}/session", json={"workspace_id": "w1"})
            if answer.status_code == 201:
                return time.monotonic() - begun_s
            assert answer.status_code in (503, 504), answer.text
            time.sleep(0.01)
    raise TimeoutError(f"nobody was served for {PATIENCE_S} s")
