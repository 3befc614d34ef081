"""How often a refused write is sent, seen where it passes: counted and timed at the wire."""

import asyncio
from pathlib import Path

import pytest

from tests.faults.conftest import Begin, Runs
from tests.faults.report import Row
from tests.faults.servers import Valkey
from tests.faults.wire import Wired, wired

WINDOWS = ((0.0, 0.0), (1.0, 1.5), (3.0, 4.0), (7.0, 8.5))
"""When each sending of a refused write leaves, in seconds after the first."""

SLACK_S = 0.1
"""What a busy machine, and the answer to each sending, may add to these."""


def note(row: Row, what: str, sent: int) -> None:
    """Keep in the row the highest number of sendings that was seen."""
    row.beside[what] = str(max(sent, int(row.beside.get(what, "0"))))


@pytest.mark.chaos
async def test_a_write_that_is_refused_for_now_is_sent_four_times_with_these_waits(
    tmp_path: Path, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("write refused for now (NOREPLICAS): sendings")
    seen: list[list[float]] = []
    async with wired(tmp_path, store) as here:
        for run in range(runs(5)):
            row.runs += 1
            mark = f"refused-{run}"
            times = here.proxy.watch(mark.encode())
            store.command("CONFIG", "SET", "min-replicas-to-write", 1)
            answer = await here.save({"number": mark})
            store.command("CONFIG", "SET", "min-replicas-to-write", 0)
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert "Retry-After" in answer.headers
            note(row, "commands", len(times))
            seen.append([at - times[0] for at in times])
    row.beside["after"] = ", ".join(
        f"{min(at):.2f} to {max(at):.2f} s" for at in zip(*seen, strict=True)
    )
    for waits in seen:
        assert len(waits) == len(WINDOWS)
        for wait, (least, most) in zip(waits, WINDOWS, strict=True):
            assert least <= wait <= most + SLACK_S


async def test_a_write_that_would_be_refused_again_is_sent_once(
    tmp_path: Path, report: Begin, runs: Runs
) -> None:
    row = report("write refused for good: sendings, and tries to log in")
    with Valkey.start(tmp_path / "store", dbfilename="taken", save="3600 1") as store:
        # Saving fails where a directory stands in the place of its file.
        (tmp_path / "store" / "taken").mkdir()
        store.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        store.command("BGSAVE")
        async with wired(tmp_path, store) as here:
            await wait_for_failed_save(store)
            for run in range(runs(5)):
                row.runs += 1
                await assert_sent_once(here, row, f"invalid-{run}", "invalid_step_data", 0)

                store.command("CONFIG", "SET", "maxmemory", 1)
                await assert_sent_once(here, row, f"full-{run}", "store_full", 1)
                store.command("CONFIG", "SET", "maxmemory", 0)

                store.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "yes")
                await assert_sent_once(here, row, f"misconf-{run}", "store_readonly", 1)
                store.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")

            # What is connected stays so until it is broken.
            store.command("CONFIG", "SET", "requirepass", "another")
            here.proxy.reset_all()
            for run in range(row.runs):
                await assert_logged_in_once(here, row, f"locked-{run}")
        store.kill()  # it does not end in order as long as it cannot save


async def assert_logged_in_once(here: Wired, row: Row, mark: str) -> None:
    """Count the HELLOs of a write, between two of the one who asks how the store is."""
    sendings = here.proxy.watch(mark.encode())
    before = here.proxy.commands["HELLO"]
    async with asyncio.timeout(5):
        while here.proxy.commands["HELLO"] == before:
            await asyncio.sleep(0.001)
    before = here.proxy.commands["HELLO"]
    answer = await here.save({"number": mark})
    tries = here.proxy.commands["HELLO"] - before
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    note(row, "wrong password", tries)
    assert (tries, sendings) == (1, [])


async def assert_sent_once(here: Wired, row: Row, mark: str, code: str, sendings: int) -> None:
    times = here.proxy.watch(mark.encode())
    answer = await here.save([mark] if sendings == 0 else {"number": mark})
    assert answer.json()["code"] == code, answer.text
    note(row, code, len(times))
    assert len(times) == sendings


async def wait_for_failed_save(store: Valkey) -> None:
    async with asyncio.timeout(5):
        while "rdb_last_bgsave_status:err" not in persistence(store):
            await asyncio.sleep(0.01)


def persistence(store: Valkey) -> str:
    info = store.command("INFO", "persistence")
    return "".join(f"{name}:{value}\n" for name, value in info.items())
