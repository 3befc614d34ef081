"""The store dies, is away or stands still under load, and comes back."""

import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import StartService
from tests.faults.load import Load, Watch
from tests.faults.report import Row
from tests.faults.servers import Valkey

Begin = Callable[[str], Row]
Runs = Callable[[int], int]

LATEST_S = 15.2
"""The deadline of a request, and the way of the answer on a busy machine."""

REFUSALS = {"503 store_unavailable", "503 overloaded", "504 deadline_exceeded"}
"""What a client may be told during an outage that outlasts it."""

LEAVING = {"down": (Valkey.kill, Valkey.restart), "frozen": (Valkey.freeze, Valkey.thaw)}


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
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)


@pytest.mark.chaos
@pytest.mark.parametrize("away_s", [5, 30])
@pytest.mark.parametrize("how", ["down", "frozen"])
def test_an_outage(
    start: StartService, store: Valkey, report: Begin, runs: Runs, how: str, away_s: int
) -> None:
    away_s = 4 if (how, away_s) == ("frozen", 5) else away_s
    row = report(f"store {how} for {away_s} s, 100 requests/s")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(1)):
        with Load(service.url) as load, Watch(service.url, "/livez") as watch:
            leave, return_ = LEAVING[how]
            leave(store)
            time.sleep(away_s)
            return_(store)
            after_s = load.wait_for_ack(time.monotonic())
            time.sleep(2)
        row.add(load.ledger, load.ledger.read_back(service.url))
        row.beside |= {
            "longest answer": f"{load.ledger.longest_answer_s:.1f} s",
            "served again after": f"{after_s:.2f} s",
            "slowest /livez": f"{max(watch.took_s) * 1000:.0f} ms",
        }
        assert (row.lost, row.duplicated) == (0, 0)
        assert row.errors.keys() <= (REFUSALS if away_s == 30 else set())
        assert load.ledger.longest_answer_s < LATEST_S
        assert after_s < 1.5
        assert watch.statuses.keys() == {200}
        assert max(watch.took_s) < 0.1
