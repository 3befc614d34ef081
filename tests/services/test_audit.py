"""The record: noted without waiting, written in order, kept through an outage, read at once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
from fakeredis import FakeServer
from structlog.testing import capture_logs

from app.clock import monotonic_s
from app.errors import InvalidRequestError, StoreUnavailableError
from app.onboarding.audit import Lane
from app.services import audit as module
from app.services.audit import AT_ONCE, MAX_WAITING, AuditTrail
from app.store.gateway import Gateway
from tests.conftest import fake_gateway
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.store.sessions import working_at

LIMIT_S = 5


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again soon; forget loggers that a service of another test has bound."""
    monkeypatch.setattr(module, "TRY_AGAIN_S", 0.01)
    monkeypatch.setattr(module, "log", structlog.get_logger())


@asynccontextmanager
async def trailing(gateway: Gateway) -> AsyncIterator[AuditTrail]:
    """Give a record that is written for the length of a block."""
    trail = AuditTrail(gateway)
    trail.start()
    try:
        yield trail
    finally:
        await trail.aclose()


@pytest.fixture
async def trail(gateway: Gateway) -> AsyncIterator[AuditTrail]:
    """Give a record, on the fake store and on the real one in turn."""
    async with trailing(gateway) as trail:
        yield trail


def note(trail: AuditTrail, action: str, *, refused: bool = False) -> None:
    outcome, lane = ("forbidden", Lane.REFUSED) if refused else ("done", Lane.DONE)
    trail.record("user:ada", action, "s", outcome, lane)


async def read_all(trail: AuditTrail, limit: int = 1000) -> list[str]:
    """Give every action of the record, page by page."""
    found: list[str] = []
    after = None
    while True:
        page = await trail.list_events(after, limit)
        found += [event["action"] for event in page["events"]]
        after = page["next"]
        if after is None:
            return found
        assert len(page["events"]) == limit


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not is_true():
            await asyncio.sleep(0.005)


def counted(logs: list[Any], event: str) -> list[int]:
    return [line["count"] for line in logs if line["event"] == event]


async def test_what_was_noted_is_read_at_once_with_who_and_how_it_ended(trail: AuditTrail) -> None:
    trail.record("machine:ops", "erase_user", None, "done", Lane.OPERATED)
    trail.record("wizard:s", "get_session", "s2", "session_not_found", Lane.REFUSED)
    page = await trail.list_events()
    erased, refused = page["events"]
    assert page["next"] is None
    assert (erased["who"], erased["action"], erased["outcome"]) == (
        *("machine:ops", "erase_user", "done"),
    )
    assert "session_id" not in erased
    assert (refused["session_id"], refused["outcome"]) == ("s2", "session_not_found")


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_everything_is_kept_once_in_its_order(trail: AuditTrail, limit: int) -> None:
    for number in range(30):
        note(trail, str(number), refused=number % 2 == 0)
        if number % 10 == 0:
            await asyncio.sleep(0)
    assert await read_all(trail, limit) == [str(number) for number in range(30)]


async def test_a_page_that_ends_with_the_record_has_no_next(trail: AuditTrail) -> None:
    note(trail, "a")
    note(trail, "b")
    page = await trail.list_events(limit=2)
    assert len(page["events"]) == 2
    assert page["next"] is None
    assert (await trail.list_events(page["events"][-1]["id"]))["events"] == []


async def test_what_many_do_at_once_comes_in_batches(trail: AuditTrail) -> None:
    count = 2 * AT_ONCE + 1
    for number in range(count):
        note(trail, str(number), refused=number % 3 == 0)
    assert await read_all(trail) == [str(number) for number in range(count)]


async def test_what_is_noted_soon_after_one_another_is_written_together(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GATHER_S", 0.1)
    async with trailing(gateway) as trail:
        for number in range(30):
            note(trail, str(number))
            # Long enough for a batch of its own.
            await gateway.command("PING")
        assert len(await read_all(trail)) == 30
        [written] = await gateway.command("KEYS", gateway.keys.audit("batch:*"))
        assert 1 < int(await gateway.command("GET", written)) < 10


async def test_all_processes_write_one_record(gateway: Gateway) -> None:
    async with trailing(gateway) as one, trailing(gateway) as other:
        note(one, "a")
        await one.list_events()
        note(other, "b")
        await other.list_events()
        note(one, "c")
        assert await read_all(one) == ["a", "b", "c"]
        assert await read_all(other) == ["a", "b", "c"]


@pytest.mark.parametrize("limit", [0, 1001])
async def test_a_page_is_one_to_a_thousand(trail: AuditTrail, limit: int) -> None:
    with pytest.raises(InvalidRequestError):
        await trail.list_events(limit=limit)


async def test_an_id_that_cannot_be_read_is_refused(trail: AuditTrail) -> None:
    with pytest.raises(InvalidRequestError):
        await trail.list_events("x")


# --- Hard times -----------------------------------------------------------------------------------


async def test_what_waited_through_an_outage_is_written_when_the_store_is_back() -> None:
    server = FakeServer()
    async with trailing(fake_gateway(server)) as trail:
        note(trail, "before")
        await trail.list_events()
        server.connected = False
        for number in range(3 * AT_ONCE):
            note(trail, str(number), refused=number % 2 == 0)
        with capture_logs() as logs:
            await until(lambda: any(line["event"] == "audit_unreachable" for line in logs))
        server.connected = True
        async with asyncio.timeout(LIMIT_S):
            while len(found := await read_all(trail)) < 3 * AT_ONCE + 1:
                await asyncio.sleep(0.01)
        assert found == ["before", *map(str, range(3 * AT_ONCE))]


async def test_a_batch_whose_reply_is_lost_again_and_again_appears_once(
    raw: Any, valkey: Valkey
) -> None:
    async with (
        Proxy(valkey.port) as proxy,
        working_at(
            f"redis://{proxy.host}:{proxy.port}/0", redis_timeout_s=0.15, retry_attempts=2
        ) as place,
        trailing(place.gateway) as trail,
    ):
        note(trail, "before")
        await trail.list_events()
        # More than the gateway sends for one call: the record sends the batch itself once more.
        proxy.drop_replies(3, to="EVALSHA")
        with capture_logs() as logs:
            note(trail, "once")
            note(trail, "too", refused=True)
            await until(lambda: any(line["event"] == "audit_unreachable" for line in logs))
        assert await read_all(trail) == ["before", "once", "too"]
        assert await raw.xlen("onboarding:index:audit:done") == 2


async def test_of_too_many_the_oldest_are_lost_and_refusals_push_out_only_refusals() -> None:
    server = FakeServer()
    server.connected = False
    trail = AuditTrail(fake_gateway(server))
    note(trail, "done")
    for number in range(MAX_WAITING + 3):
        note(trail, str(number), refused=True)
    server.connected = True
    with capture_logs() as logs:
        trail.start()
        found = await read_all(trail)
        await trail.aclose()
    assert found == ["done", *map(str, range(3, MAX_WAITING + 3))]
    assert counted(logs, "audit_events_dropped") == [3]
    assert counted(logs, "audit_events_lost") == []


async def test_an_end_writes_what_still_waits(gateway: Gateway) -> None:
    async with trailing(gateway) as trail:
        note(trail, "last")
    assert await read_all(AuditTrail(gateway)) == ["last"]


async def test_an_end_without_the_store_is_not_held_up_and_says_what_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 0.05)
    server = FakeServer()
    async with trailing(fake_gateway(server)) as trail:
        server.connected = False
        note(trail, "a")
        note(trail, "b", refused=True)
        begun_s = monotonic_s()
        with capture_logs() as logs:
            await trail.aclose()
        assert monotonic_s() - begun_s < 1
        assert counted(logs, "audit_events_lost") == [2]


async def test_a_reader_without_the_store_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEN_WITHIN_S", 0.05)
    monkeypatch.setattr(module, "LEAVE_S", 0.05)
    server = FakeServer()
    async with trailing(fake_gateway(server)) as trail:
        server.connected = False
        note(trail, "a")
        with pytest.raises(StoreUnavailableError):
            await trail.list_events()


async def test_damage_of_the_record_holds_it_up_and_does_not_end_it(
    gateway: Gateway, trail: AuditTrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.faults.log", structlog.get_logger())
    key = gateway.keys.audit("done")
    await gateway.command("SET", key, "x")
    with capture_logs() as logs:
        note(trail, "a")
        await until(lambda: any(line["event"] == "audit_unreachable" for line in logs))
    await gateway.command("DEL", key)
    async with asyncio.timeout(LIMIT_S):
        while await read_all(trail) != ["a"]:
            await asyncio.sleep(0.01)
