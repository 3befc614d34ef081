"""A packet of a write that timed out arrives late: what was acknowledged after it stands."""

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

from app.store.keys import Keys
from tests.faults.conftest import Begin, Runs
from tests.faults.proxy import Held
from tests.faults.servers import Valkey
from tests.faults.wire import Wired, wired
from tests.service import BASE

HASTY = {
    "ONBOARDING_REDIS_TIMEOUT_S": "0.1",
    "ONBOARDING_RETRY_BASE_S": "0.01",
    "ONBOARDING_RETRY_JITTER_S": "0",
}
"""Settings with which a client gives a packet up soon."""

USELESS_S = 0.2
"""After how long nobody waits for a packet with these settings, in seconds."""


class Case(NamedTuple):
    """A write whose packet is late, and the newer one after it.

    `read` shows what both are about. `{s}` stands for the session.
    """

    method: str
    target: str
    older: Any
    newer: Any
    read: str


TASK, CONFIG = "/api/v1/sessions/task", "/api/v1/admin/config"
STEP = "{s}/steps/1"
LATE = b"$4\r\nlate\r\n"
"""What a script answers whom nobody waits for any more."""

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
                assert "newer" in json.dumps(there)
                new_events = (await events_of(here))[len(before) :]
                row.runs += 1
                row.acknowledged += 2

                reply = await held.deliver()

                # Done already, or of use to nobody any more.
                assert b"$2\r\nok\r\n" in reply or LATE in reply
                row.lost += await read(here, case.read) != there
                row.duplicated += (await events_of(here))[len(before) :] != new_events
                if case.target == STEP:
                    assert newer["version"] == older["version"] + 1
    assert (row.lost, row.duplicated) == (0, 0)


async def test_what_was_removed_or_set_since_stays_so_though_no_operation_is_remembered(
    tmp_path: Path, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("packet later than anybody waits: making, settings, and after the memory is gone")
    async with wired(tmp_path, store, **HASTY) as here:
        # Its script is learnt.
        await make_task(here, "another")
        for _ in range(runs(20)):
            row.runs += 1

            held = here.proxy.hold_back(b"late")
            made = await call(here, "POST", f"{BASE}/session", {"workspace_id": "late"})
            session = f"{BASE}/{made['session_id']}"
            await call(here, "DELETE", session)
            await deliver_too_late(held)
            row.duplicated += (await here.client.get(session)).status_code != 404
            row.duplicated += store.command("KEYS", f"*{made['session_id']}*") != []

            held = here.proxy.hold_back(b"late")
            await make_task(here, "late")
            await call(here, "DELETE", f"{TASK}/late")
            await deliver_too_late(held)
            row.duplicated += (await here.client.get(f"{TASK}/late")).status_code != 404

            held = here.proxy.hold_back(b"4321")
            await call(here, "PATCH", CONFIG, {"cleanup_interval_s": 4321})
            await call(here, "PATCH", CONFIG, {"cleanup_interval_s": 1234})
            await deliver_too_late(held)
            row.lost += (await call(here, "GET", CONFIG))["cleanup_interval_s"] != 1234
            row.acknowledged += 6

            for case in CASES.values():
                held, _ = await send_late(here, case)
                await send(here, case, case.newer)
                store.command("DEL", Keys(hash_tag=False).session(here.session_id).ops)
                there, events = await read(here, case.read), await events_of(here)
                assert "newer" in json.dumps(there)
                await deliver_too_late(held)
                row.acknowledged += 2
                row.lost += await read(here, case.read) != there
                row.duplicated += await events_of(here) != events
    assert (row.lost, row.duplicated) == (0, 0)


async def deliver_too_late(held: Held) -> None:
    """Deliver a packet when nobody waits for it any more."""
    assert held.arrived.is_set()
    await asyncio.sleep(USELESS_S)
    assert LATE in await held.deliver()


async def make_task(here: Wired, task_id: str) -> None:
    body = {"task_type": "image_analysis", "short_id": "s", "task_id": task_id}
    await call(here, "POST", TASK, body)


async def call(here: Wired, method: str, target: str, body: Any = None) -> Any:
    answer = await here.client.request(method, target, json=body)
    assert answer.is_success, answer.text
    return answer.json()


async def send_late(here: Wired, case: Case) -> tuple[Held, Any]:
    """Have a packet kept back until its client has given it up, and its repeat was answered."""
    held = here.proxy.hold_back(b"late")
    older = await send(here, case, case.older)
    assert held.arrived.is_set()
    return held, older


async def send(here: Wired, case: Case, body: Any) -> Any:
    return await call(here, case.method, fill(here, case.target), body)


async def read(here: Wired, target: str) -> Any:
    shown = await call(here, "GET", fill(here, target))
    # It counts down by itself.
    shown.pop("eta_seconds", None)
    return shown


async def events_of(here: Wired) -> list[Any]:
    log: list[Any] = (await read(here, "{s}/events?limit=1000"))["events"]
    return log


def fill(here: Wired, target: str) -> str:
    return target.replace("{s}", f"{BASE}/{here.session_id}")
