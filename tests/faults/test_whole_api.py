"""Every route on Sentinel and on a Cluster, before and right after a failover."""

import asyncio

import pytest
from httpx2 import AsyncClient

from app.api.routes import OPERATIONS
from app.onboarding.access import Scope, write_api_key
from app.settings import variable_of
from tests.access import AUTH, user
from tests.api.test_canaries import (
    KEYS,
    TELLING,
    C,
    Walk,
    generate,
    guess,
    live,
    operate,
    track,
)
from tests.faults.conftest import Begin, Runs, StartService
from tests.faults.hosts import AS_ADVISED, Hosts
from tests.faults.report import Row
from tests.faults.servers import wait_until
from tests.faults.shards import Shards
from tests.process.service_process import Line, ServiceProcess
from tests.service import BASE

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

CALLS = {(method, each.path) for each in OPERATIONS if not each.quiet for method in each.methods}
"""What is asked for, but for what the log says nothing of."""

ACCESS = {
    **{variable_of(name): str(value) for name, value in AUTH.items()},
    "ONBOARDING_API_KEYS": ",".join(
        write_api_key(f"{scope}-machine", [scope], KEYS[scope]) for scope in Scope
    ),
    "ONBOARDING_AGENT": "tests.api.test_canaries:Talkative",
}


def test_on_sentinel(
    start: StartService, tmp_path_factory: pytest.TempPathFactory, report: Begin, runs: Runs
) -> None:
    row = report("every route on Sentinel, before and right after a master's death")
    directory = tmp_path_factory.mktemp("hosts")
    with Hosts.start(directory, AS_ADVISED, appendonly=True) as hosts:
        service = start(REDIS_URL=hosts.url, ONBOARDING_DURABILITY="replicated", **ACCESS)
        ask_everything(service, row)
        for _ in range(runs(3)):
            dead = hosts.master()
            dead.die()
            ask_everything(service, row)
            dead.come_back()
            hosts.settle()


def test_on_a_cluster(
    start: StartService, tmp_path_factory: pytest.TempPathFactory, report: Begin, runs: Runs
) -> None:
    row = report("every route on a Cluster, before and right after a master's death")
    with Shards.start(tmp_path_factory.mktemp("shards")) as shards:
        service = start(REDIS_URL=shards.url, **ACCESS)
        ask_everything(service, row)
        for number in range(runs(3)):
            dead = list(shards.masters())[number % 3]
            dead.kill()
            ask_everything(service, row)
            dead.restart()
            shards.settle()


def ask_everything(service: ServiceProcess, row: Row) -> None:
    """Ask for every route once at least; a wrong answer ends it."""
    said = len(service.lines)
    try:
        asyncio.run(walk_through(service.url))
    except AssertionError as failure:
        # What the service had to say meanwhile.
        told = [each for each in service.lines[said:] if each["event"] != "request_served"]
        failure.add_note("\n".join(map(str, told)))
        raise

    def served() -> list[Line]:
        return [line for line in service.lines[said:] if line["event"] == "request_served"]

    def missing() -> set[tuple[str, str]]:
        return CALLS - {
            (each["method"], each["route"]) for each in served() if each["status"] < 300
        }

    # A line may come after its answer.
    wait_until(lambda: not missing(), 5.0, f"the log has {sorted(missing())}")
    row.runs += 1
    row.acknowledged += len(served())
    row.beside = {"routes": str(len(CALLS))}


async def walk_through(url: str) -> None:
    owner = user(C["user"], C["workspace"], jti=C["jwt id"])
    admin = {"x-api-key": KEYS[Scope.ADMIN]}
    async with AsyncClient(base_url=url, timeout=30, trust_env=False) as api:
        walk = Walk(api)
        session_id, _ = await live(walk, owner)
        await generate(walk, session_id, owner)
        await track(walk)
        await guess(walk, session_id, owner)
        await operate(walk, session_id, admin)
        await walk("DELETE", f"{BASE}/{session_id}", owner)
        await walk("DELETE", f"/api/v1/admin/users/{C['user']}", admin)
        # It says what is: until another is the master, that writes fail.
        async with asyncio.timeout(10):
            while (await api.get("/health")).status_code == 503:
                await asyncio.sleep(0.1)
        for path in (*TELLING, "/api/v1/admin/audit"):
            await walk("GET", path, admin)
