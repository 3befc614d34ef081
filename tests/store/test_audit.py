"""The record in the store: kept once, in one order, bounded, and never pushed out by refusals."""

from itertools import pairwise

import pytest
import time_machine
from fakeredis import FakeServer
from redis.asyncio import Redis
from redis.crc import key_slot

from app.errors import CorruptRecordError
from app.onboarding.audit import AuditEvent, AuditView, Lane
from app.onboarding.events import BEFORE_ALL, EventId, parse_after
from app.store.audit import KEPT, REMEMBERED_MS, AuditStore
from app.store.gateway import Gateway
from tests.conftest import fake_gateway
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import Place

AT_MS = 1_767_268_800_123


def done(action: str = "finalize", session_id: str | None = "s") -> AuditEvent:
    return AuditEvent(AT_MS, "user:ada", action, session_id, "done", Lane.DONE)


def refused(action: str = "get_session") -> AuditEvent:
    return AuditEvent(AT_MS, "anyone", action, None, "unauthenticated", Lane.REFUSED)


async def read_all(store: AuditStore, *, limit: int = 1000) -> list[AuditView]:
    """Read the record from its beginning, page by page."""
    found: list[AuditView] = []
    place = BEFORE_ALL
    while page := await store.list_after(place, limit):
        assert len(page) <= limit
        found += page
        place = parse_after(page[-1]["id"])
    return found


def actions_of(events: list[AuditView]) -> list[str]:
    return [event["action"] for event in events]


def order_of(event: AuditView) -> EventId:
    return parse_after(event["id"])


@pytest.fixture
def store(gateway: Gateway) -> AuditStore:
    return AuditStore(gateway)


async def test_a_record_begins_empty(store: AuditStore) -> None:
    assert await store.list_after(BEFORE_ALL, 10) == []


async def test_what_was_done_and_what_was_refused_is_read_in_one_order(store: AuditStore) -> None:
    batch = [done("one"), refused("two"), done("three", None), refused("four")]
    await store.add(batch, writer="w", number=1)
    await store.add([refused("five"), done("six")], writer="v", number=1)

    events = await read_all(store)
    assert actions_of(events) == ["one", "two", "three", "four", "five", "six"]
    assert all(order_of(one) < order_of(other) for one, other in pairwise(events))
    first, second = events[:2]
    assert first == {
        "id": first["id"],
        "at": "2026-01-01T12:00:00.123Z",
        "who": "user:ada",
        "action": "one",
        "session_id": "s",
        "outcome": "done",
    }
    assert "session_id" not in second
    assert (second["who"], second["outcome"]) == ("anyone", "unauthenticated")


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_page_after_page_gives_every_event_once(store: AuditStore, limit: int) -> None:
    batch = [done(str(n)) if n % 3 else refused(str(n)) for n in range(20)]
    await store.add(batch, writer="w", number=1)
    events = await read_all(store, limit=limit)
    assert actions_of(events) == [str(n) for n in range(20)]


async def test_ids_rise_over_both_streams_when_the_clock_is_set_back(
    clock: time_machine.Traveller,
) -> None:
    store = AuditStore(fake_gateway(FakeServer()))
    for number, shift in enumerate([0, -60, -60, 0, 100, 0, 61], start=1):
        clock.shift(shift)
        batch = [done(f"{number}a"), refused(f"{number}b")]
        await store.add(batch if number % 2 else batch[1:], writer="w", number=number)

    events = await read_all(store, limit=2)
    expected = [f"{n}{x}" for n in range(1, 8) for x in ("ab" if n % 2 else "b")]
    assert actions_of(events) == expected
    assert all(order_of(one) < order_of(other) for one, other in pairwise(events))


async def test_no_flood_of_refusals_pushes_out_what_was_done(raw: Redis, real: MakePlace) -> None:
    store = AuditStore(real().gateway)
    await store.add([done("erase_user")], writer="w", number=1)
    flood = [refused()] * 500
    for number in range(2, 102):
        await store.add(flood, writer="w", number=number)

    [first] = await store.list_after(BEFORE_ALL, 1)
    assert first["action"] == "erase_user"
    assert KEPT <= await raw.xlen("onboarding:index:audit:refused") <= KEPT + 200
    assert await raw.xlen("onboarding:index:audit:done") == 1


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_batch_whose_reply_was_lost_is_kept_once(
    wired: Place, proxy: Proxy, lost: int
) -> None:
    store = AuditStore(wired.gateway)
    await store.add([done("before")], writer="w", number=1)
    proxy.drop_replies(lost, to="EVALSHA")
    await store.add([done("once"), refused("too")], writer="w", number=2)
    assert actions_of(await read_all(store)) == ["before", "once", "too"]


async def test_a_batch_that_comes_late_is_not_kept_again(store: AuditStore) -> None:
    for number in (1, 2, 1, 2):
        await store.add([done(str(number))], writer="w", number=number)
    await store.add([done("another's")], writer="v", number=1)
    assert actions_of(await read_all(store)) == ["1", "2", "another's"]


async def test_what_a_writer_is_known_by_does_not_stay(raw: Redis, real: MakePlace) -> None:
    await AuditStore(real().gateway).add([done()], writer="w", number=1)
    left_ms = await raw.pttl("onboarding:index:audit:batch:w")
    assert REMEMBERED_MS - 5000 < left_ms <= REMEMBERED_MS


async def test_with_hash_tags_all_of_it_lies_in_one_slot(raw: Redis, real: MakePlace) -> None:
    store = AuditStore(real(key_hash_tag="on").gateway)
    await store.add([done("one"), refused("two")], writer="w", number=1)
    assert actions_of(await read_all(store)) == ["one", "two"]
    keys = {key async for key in raw.scan_iter("*audit*")}
    assert len(keys) == 3
    assert len({key_slot(key) for key in keys}) == 1


async def test_what_cannot_be_written_as_utf_8_does_not_keep_the_rest_out(
    store: AuditStore,
) -> None:
    odd = done()._replace(who="user:\ud800", session_id="é\n")
    await store.add([odd, done("next")], writer="w", number=1)
    first, second = await read_all(store)
    assert (first["who"], first["session_id"]) == ("user:?", "é\n")
    assert second["action"] == "next"


@pytest.mark.parametrize("part", ["done", "refused"])
async def test_damage_is_an_error_that_names_its_key(
    gateway: Gateway, store: AuditStore, part: str
) -> None:
    key = gateway.keys.audit(part)
    await gateway.command("XADD", key, "1-1", "at", "yesterday")
    with pytest.raises(CorruptRecordError) as damage:
        await store.list_after(BEFORE_ALL, 10)
    assert damage.value.key == key
    # What comes after it can be read all the same.
    await store.add([done("after")], writer="w", number=1)
    assert actions_of(await store.list_after(EventId(1, 1), 10)) == ["after"]

    await gateway.command("DEL", key)
    await gateway.command("SET", key, "x")
    with pytest.raises(CorruptRecordError):
        await store.list_after(BEFORE_ALL, 10)
    with pytest.raises(CorruptRecordError):
        await store.add([done()], writer="w", number=2)
