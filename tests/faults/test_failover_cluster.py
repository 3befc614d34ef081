"""A master of a Cluster dies under load, and its replica takes its place."""

import random
import time
from collections.abc import Iterator

import pytest
from redis.crc import key_slot

from tests.faults.conftest import REFUSALS, Begin, Runs, StartService
from tests.faults.load import Load
from tests.faults.shards import Shards

pytestmark = pytest.mark.chaos

LATEST_S = 6.0
"""How long after the death a write into any slot is acknowledged again."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    with Shards.start(tmp_path_factory.mktemp("shards")) as shards:
        yield shards


@pytest.mark.parametrize("durability", ["local", "replicated"])
def test_a_master_dies(
    start: StartService, shards: Shards, report: Begin, runs: Runs, durability: str
) -> None:
    """With `replicated` it is started again once its replica is promoted: there is no other one."""
    row = report(f"Cluster 3+3, a master killed, {durability}")
    service = start(REDIS_URL=shards.url, ONBOARDING_DURABILITY=durability)
    promoted_s, again_s = [], []
    for _ in range(runs(10)):
        shards.settle()
        with Load(service.url) as load:
            dead, slots = random.choice(list(shards.masters().items()))
            dead.kill()
            died_s = time.monotonic()
            shards.wait_for_another(dead)
            promoted_s.append(time.monotonic() - died_s)
            if durability == "replicated":
                dead.restart()
            again_s.append(wait_for_slots(load, slots, died_s + 0.1) - died_s)
            load.wait_for_acks(load.ledger.acknowledged + 100)
        if durability == "local":
            dead.restart()
        shards.settle()
        row.add(load.ledger, load.ledger.read_back(service.url))
    row.beside = {
        "promoted after": f"{min(promoted_s):.1f} to {max(promoted_s):.1f} s",
        "again after": f"{min(again_s):.1f} to {max(again_s):.1f} s",
    }
    assert row.errors.keys() <= REFUSALS
    assert (row.lost, row.duplicated) == (0, 0)
    assert max(again_s) < LATEST_S


def wait_for_slots(load: Load, slots: range, after_s: float, limit_s: float = 30.0) -> float:
    """Wait for a write into some slots that is acknowledged after a moment; say when it was."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        for at_s, session_id in [*load.ledger.saved]:
            if at_s > after_s and session_id and key_slot(session_id.encode()) in slots:
                return at_s
        time.sleep(0.01)
    raise TimeoutError(f"no write into these slots for {limit_s} s; {load.ledger.errors}")
