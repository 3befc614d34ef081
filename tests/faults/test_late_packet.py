"""A packet of a write that timed out arrives late: what was acknowledged after it stands."""

from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.proxy import Held
from tests.faults.servers import Valkey
from tests.faults.test_store_away import Begin, Runs
from tests.faults.wire import Wired, wired
from tests.service import BASE

HASTY = {
    "ONBOARDING_REDIS_TIMEOUT_S": "0.1",
    "ONBOARDING_RETRY_BASE_S": "0.01",
    "ONBOARDING_RETRY_JITTER_S": "0",
}
"""Settings with which a client gives a packet up soon."""


class Case(NamedTuple):
    """A write whose packet is late, and the newer one after it.

    `read` shows what both are about. `{s}` stands for the session.
    """

    method: str
    target: str
    older: Any
    newer: Any
    read: str


STEP = "{s}/steps/1"
CASES = {
    "save": Case("PUT", STEP, {"data": {"a": "late"}}, {"data": {"a": "newer"}}, STEP),
    "patch": Case("PATCH", STEP, {"a": "late"}, {"a": "newer"}, STEP),
    "draft": Case(
        *("PUT", STEP + "/draft", {"data": {"a": "late"}}, {"data": {"a": "newer"}}),
        STEP + "/draft",
    ),
    "several steps": Case(
        *("POST", "{s}/steps"),
        {"steps": {"1": {"a": "late"}, "2": {"a": "late"}}},
        {"steps": {"1": {"a": "newer"}, "2": {"a": "newer"}}},
        "{s}/steps",
    ),
    "report": Case(
        *("POST", "{s}/events", {"stage": "late", "progress": 1}),
        *({"stage": "newer", "progress": 2}, "{s}/status"),
    ),
}


async def test_what_is_newer_stands(
    tmp_path: Path, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("late packet of a timed-out write: " + ", ".join(CASES))
    async with wired(tmp_path, store, **HASTY) as here:
        for _ in range(runs(20)):
            for case in CASES.values():
                before = await events_of(here)
                held, older = await send_late(here, case)
                newer = await send(here, case, case.newer)
                there = await read(here, case.read)
                new_events = (await events_of(here))[len(before) :]
                row.runs += 1
                row.acknowledged += 2

                reply = await held.deliver()

                assert b"ok" in reply
                row.lost += await read(here, case.read) != there
                row.duplicated += (await events_of(here))[len(before) :] != new_events
                if case.target == STEP:
                    assert newer["version"] == older["version"] + 1
    assert (row.lost, row.duplicated) == (0, 0)


async def send_late(here: Wired, case: Case) -> tuple[Held, Any]:
    """Have a packet kept back until its client has given it up, and its repeat was answered."""
    held = here.proxy.hold_back(b"late")
    older = await send(here, case, case.older)
    assert held.arrived.is_set()
    return held, older


async def send(here: Wired, case: Case, body: Any) -> Any:
    answer = await here.client.request(case.method, fill(here, case.target), json=body)
    assert answer.is_success, answer.text
    return answer.json()


async def read(here: Wired, target: str) -> Any:
    answer = await here.client.get(fill(here, target))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events_of(here: Wired) -> list[Any]:
    log: list[Any] = (await read(here, "{s}/events?limit=1000"))["events"]
    return log


def fill(here: Wired, target: str) -> str:
    return target.replace("{s}", f"{BASE}/{here.session_id}")
