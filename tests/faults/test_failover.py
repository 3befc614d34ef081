"""The master dies, is cut off or is relieved under load, and another one takes its place."""

import random
import time
from collections.abc import Iterator

import pytest

from tests.faults.conftest import REFUSALS, Begin, Runs, StartService
from tests.faults.hosts import AS_ADVISED, HURRIED, SERVICE, Hosts
from tests.faults.load import Load
from tests.faults.report import Row

LATEST_S = 5.0
"""How long after the fault a write is acknowledged again."""

DYING_S = 0.15
"""How long a host that has lost the others lives on."""

AFTERWARDS = 50
"""How many writes are waited for once they go on."""


@pytest.fixture(scope="module")
def hosts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosts]:
    pace = AS_ADVISED if request.config.getoption("--chaos", default=False) else HURRIED
    with Hosts.start(tmp_path_factory.mktemp("hosts"), pace, appendonly=True) as hosts:
        yield hosts


both = pytest.mark.parametrize(
    "durability", ["replicated", pytest.param("local", marks=pytest.mark.chaos)]
)


@both
def test_the_masters_host_dies(
    start: StartService, hosts: Hosts, report: Begin, runs: Runs, durability: str
) -> None:
    row = report(f"master's host cut off, then killed, {durability}")
    service = start(REDIS_URL=hosts.url, ONBOARDING_DURABILITY=durability)
    again_s = []
    for _ in range(runs(20)):
        hosts.settle()
        with Load(service.url) as load:
            at_any_moment(hosts)
            master, others = hosts.master(), hosts.others()
            random.shuffle(others)
            for other in others:
                time.sleep(random.uniform(0, 0.03))
                hosts.cut(master, other)
            time.sleep(DYING_S)
            master.die()
            again_s.append(go_on(load))
        row.add(load.ledger, load.ledger.read_back(service.url))
        master.come_back()
        hosts.heal()
    tell(row, again_s)
    assert row.errors.keys() <= REFUSALS
    if durability == "replicated":
        assert (row.lost, row.duplicated) == (0, 0)
    assert max(again_s) < LATEST_S


@pytest.mark.chaos
@pytest.mark.parametrize("durability", ["replicated", "local"])
def test_clients_are_on_the_old_masters_side(
    start: StartService, hosts: Hosts, report: Begin, runs: Runs, durability: str
) -> None:
    """The sentinel beside the old master is on that side, too, and goes on naming it."""
    row = report(f"master cut off, but not from the service, {durability}")
    service = start(REDIS_URL=hosts.url, ONBOARDING_DURABILITY=durability)
    again_s = []
    for _ in range(runs(10)):
        hosts.settle()
        with Load(service.url) as load:
            at_any_moment(hosts)
            master = hosts.master()
            for other in hosts.others():
                hosts.cut(master, other)
            begun_s = time.monotonic()
            again_s.append(go_on(load))
            hosts.wait_for_another(master)
            # What an old master takes meanwhile is lost.
            time.sleep(max(0.0, begun_s + LATEST_S - time.monotonic()))
            hosts.heal()
            hosts.settle()
            go_on(load)
        row.add(load.ledger, load.ledger.read_back(service.url))
    tell(row, again_s)
    assert row.errors.keys() <= REFUSALS
    if durability == "replicated":
        assert (row.lost, row.duplicated) == (0, 0)
        assert max(again_s) < LATEST_S


@pytest.mark.chaos
@pytest.mark.parametrize("how", [(), ("COORDINATED",)], ids=["at once", "coordinated"])
def test_an_operator_has_another_one_promoted(
    start: StartService, hosts: Hosts, report: Begin, runs: Runs, how: tuple[str, ...]
) -> None:
    row = report(f"{' '.join(['SENTINEL FAILOVER', *how])}, replicated")
    service = start(REDIS_URL=hosts.url, ONBOARDING_DURABILITY="replicated")
    for _ in range(runs(10)):
        hosts.settle()
        with Load(service.url) as load:
            master = hosts.master()
            any_host = random.choice(hosts.hosts)
            any_host.sentinel.command("SENTINEL", "FAILOVER", SERVICE, *how)
            hosts.wait_for_another(master)
            hosts.settle()
            go_on(load)
        row.add(load.ledger, load.ledger.read_back(service.url))
        assert load.ledger.longest_gap_s < LATEST_S
    assert row.errors.keys() <= REFUSALS
    if how:
        assert (row.lost, row.duplicated) == (0, 0)


def at_any_moment(hosts: Hosts) -> None:
    """Have what follows begin anywhere between two looks of the sentinels."""
    time.sleep(random.uniform(0, hosts.pace.info_ms / 1000))


def go_on(load: Load) -> float:
    """Wait until writes go on; say after how many seconds."""
    # What is on its way already is none of those.
    on_its_way_s = 0.1
    after_s = load.wait_for_ack(time.monotonic() + on_its_way_s) + on_its_way_s
    load.wait_for_acks(load.ledger.acknowledged + AFTERWARDS)
    return after_s


def tell(row: Row, again_s: list[float]) -> None:
    row.beside["again after"] = f"{min(again_s):.1f} to {max(again_s):.1f} s"
