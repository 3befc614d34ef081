"""The store forgets its scripts, is restarted, or dies again and again with every write on disk."""

import time
from pathlib import Path

import pytest

from tests.faults.conftest import Begin, Runs, StartService
from tests.faults.load import Load
from tests.faults.servers import Valkey

EACH = 1_000
"""How many writes are acknowledged around each death."""


@pytest.mark.chaos
def test_a_store_that_dies_with_every_write_on_disk_has_lost_none(
    start: StartService, tmp_path: Path, report: Begin, runs: Runs
) -> None:
    row = report("AOF always, store killed under as much load as it takes")
    with Valkey.start(tmp_path / "store", appendonly=True, appendfsync="always") as store:
        service = start(REDIS_URL=store.url)
        ledgers = []
        for _ in range(runs(20)):
            with Load(service.url, per_second=1000) as load:
                load.wait_for_acks(EACH // 2)
                store.kill()
                store.restart()
                load.wait_for_acks(EACH)
            ledgers.append(load.ledger)
        for ledger in ledgers:
            row.add(ledger, ledger.read_back(service.url))
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)
    assert row.acknowledged >= EACH * row.runs


@pytest.mark.chaos
def test_nobody_notices_that_the_store_was_restarted(
    start: StartService, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("store restarted, 100 requests/s")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(10)):
        with Load(service.url) as load:
            store.restart()
            load.wait_for_ack(time.monotonic())
        row.add(load.ledger, load.ledger.read_back(service.url))
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)


@pytest.mark.chaos
def test_nobody_notices_that_the_store_has_forgotten_its_scripts(
    start: StartService, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("SCRIPT FLUSH ten times, 100 requests/s")
    service = start(REDIS_URL=store.url)
    for _ in range(runs(10)):
        with Load(service.url, wizards=20) as load:
            for flushes in range(1, 11):
                store.command("SCRIPT", "FLUSH", "SYNC")
                load.wait_for_acks(20 + 10 * flushes)
        row.add(load.ledger, load.ledger.read_back(service.url))
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)
