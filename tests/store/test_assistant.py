"""Questions in the store: kept once, the last ten, counted; and how many are let through."""

import asyncio
import json

import pytest
import time_machine
from redis.asyncio import Redis

from app.clock import now_ms
from app.errors import CorruptRecordError, SessionNotFoundError
from app.store.assistant import AssistantStore
from app.store.catalogue import CatalogueStore
from app.store.gateway import Gateway
from app.store.recovery import RecoveryStore
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Place,
    asked,
    count_events,
    deadlines_ms,
    names_of_keys,
    prepare,
    working_at,
)


async def stats_of(place: Place, session_id: str) -> tuple[int, int]:
    """Give how many questions a summary counts, and how long they took."""
    stats = (await place.manager.get_session_summary(session_id))["stats"]
    return stats["request_count"], stats["total_processing_ms"]


async def test_a_session_begins_without_questions(place: Place) -> None:
    session_id = await prepare(place.manager)
    assert await place.questions.list_asked(session_id) == []
    assert await stats_of(place, session_id) == (0, 0)
    assert "history" not in await names_of_keys(place.gateway, session_id)


async def test_the_last_ten_are_kept_oldest_first_and_all_are_counted(place: Place) -> None:
    session_id = await prepare(place.manager)
    for number in range(13):
        await place.add_answer(session_id, f"question {number}", took_ms=number)
    kept = await place.questions.list_asked(session_id)
    assert kept == [asked(f"question {number}", number) for number in range(3, 13)]
    assert await stats_of(place, session_id) == (13, sum(range(13)))


async def test_questions_asked_at_once_are_all_counted(place: Place) -> None:
    session_id = await prepare(place.manager)
    await asyncio.gather(*(place.add_answer(session_id, took_ms=2) for _ in range(30)))
    assert await stats_of(place, session_id) == (30, 60)
    assert len(await place.questions.list_asked(session_id)) == 10


async def test_a_question_is_no_event_no_change_and_no_progress(place: Place) -> None:
    session_id = await prepare(place.manager)
    before = await place.manager.view_progress(session_id)
    events = await count_events(place.gateway, session_id)
    changes = (await place.gateway.command("HGET", _progress(place, session_id), "changes"),)
    await place.add_answer(session_id)
    after = await place.manager.view_progress(session_id)
    assert {**after, "expires_at": ""} == {**before, "expires_at": ""}
    assert await count_events(place.gateway, session_id) == events
    # A finalize that was prepared meanwhile goes through.
    assert changes == (
        await place.gateway.command("HGET", _progress(place, session_id), "changes"),
    )


async def test_a_finalized_session_is_asked_about_too_and_its_export_stays(place: Place) -> None:
    session_id = await prepare(place.manager, finalized=True)
    export = await place.manager.get_export(session_id)
    await place.add_answer(session_id)
    assert export is not None
    again = await place.manager.get_export(session_id)
    assert again is not None
    assert again.text == export.text
    assert await stats_of(place, session_id) == (1, 5)
    await place.manager.reopen(session_id)
    assert await stats_of(place, session_id) == (1, 5)


async def test_an_unknown_session_has_no_history_and_gets_none(place: Place) -> None:
    with pytest.raises(SessionNotFoundError):
        await place.questions.list_asked("unknown")
    with pytest.raises(SessionNotFoundError):
        await place.add_answer("unknown")
    assert await names_of_keys(place.gateway, "unknown") == set()


async def test_the_history_goes_with_its_session(place: Place) -> None:
    session_id = await prepare(place.manager)
    await place.add_answer(session_id)
    assert "history" in await names_of_keys(place.gateway, session_id)
    await place.manager.delete_session(session_id)
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_a_question_after_which_only_reads_came_renews_the_life_of_everything(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await prepare(place.manager)
    await place.add_answer(session_id)
    for _ in range(3):
        clock.shift(900)
        await place.add_answer(session_id)
        deadlines = await deadlines_ms(place.gateway, session_id)
        drafts = {name for name in deadlines if name.startswith("draft")}
        assert {name: at for name, at in deadlines.items() if name not in drafts} == dict.fromkeys(
            deadlines.keys() - drafts, deadlines["progress"]
        )
    assert len(await place.questions.list_asked(session_id)) == 4


@pytest.mark.parametrize("lost", [1, 2])
async def test_an_answer_whose_reply_was_lost_is_kept_once(
    wired: Place, proxy: Proxy, lost: int
) -> None:
    session_id = await prepare(wired.manager)
    await wired.add_answer(session_id, "before")
    proxy.drop_replies(lost, to="EVALSHA")
    await wired.add_answer(session_id, "once")
    kept = await wired.questions.list_asked(session_id)
    assert [each["question"] for each in kept] == ["before", "once"]
    assert await stats_of(wired, session_id) == (2, 10)


async def test_it_works_with_hash_tags(raw: Redis, proxy: Proxy) -> None:
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with working_at(url, key_hash_tag="on") as place:
        session_id = await prepare(place.manager)
        await place.add_answer(session_id)
        assert len(await place.questions.list_asked(session_id)) == 1
        assert await place.questions.claim(1)
        assert not await place.questions.claim(1)


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [b"\xff", b"hello", b"[]", b'{"question":"a"}', b""])
async def test_a_damaged_entry_is_an_error_until_it_is_written_over(
    place: Place, entry: bytes
) -> None:
    session_id = await prepare(place.manager)
    key = place.gateway.keys.session(session_id).history
    await place.gateway.command("RPUSH", key, entry)
    await place.gateway.command("PEXPIRE", key, 60_000)
    with pytest.raises(CorruptRecordError) as damage:
        await place.questions.list_asked(session_id)
    assert damage.value.key == key
    assert "the history" in str(damage.value)
    for number in range(10):
        await place.add_answer(session_id, str(number))
    assert len(await place.questions.list_asked(session_id)) == 10


@pytest.mark.parametrize("damage", ["history", "request_count", "total_processing_ms"])
async def test_what_is_no_history_takes_no_answer_and_nothing_is_half_written(
    place: Place, damage: str
) -> None:
    session_id = await prepare(place.manager)
    keys = place.gateway.keys.session(session_id)
    if damage == "history":
        await place.gateway.command("SET", keys.history, "x", "PX", 60_000)
    else:
        await place.gateway.command("HSET", keys.progress, damage, "many")
    before = await place.gateway.command("HGETALL", keys.progress)
    with pytest.raises(CorruptRecordError):
        await place.add_answer(session_id)
    assert await place.gateway.command("HGETALL", keys.progress) == before
    # Of the rest, nothing is the matter.
    assert (await place.manager.get_progress(session_id))["completed"] == 2
    await place.manager.save_step(session_id, 5, {"a": 1})


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_recovered_session_keeps_its_history_if_it_can_be_read(
    place: Place, *, is_whole: bool
) -> None:
    session_id = await prepare(place.manager)
    keys = place.gateway.keys.session(session_id)
    await place.add_answer(session_id, "first", took_ms=7)
    if not is_whole:
        await place.gateway.command("RPUSH", keys.history, b"hello")
    await place.gateway.command("HSET", keys.progress, "saved", "damaged")
    recovery = RecoveryStore(place.gateway, CatalogueStore(place.gateway, place.manager.catalogue))
    remains = await recovery.recover(session_id, at_ms=now_ms())

    assert ("history" in remains.kept) is is_whole
    assert ("history" in remains.lost) is not is_whole
    kept = await place.questions.list_asked(session_id)
    assert [each["question"] for each in kept] == (["first"] if is_whole else [])
    assert await stats_of(place, session_id) == (1, 7)
    deadlines = await deadlines_ms(place.gateway, session_id)
    assert deadlines.get("history", deadlines["progress"]) == deadlines["progress"]


# --- How many are let through ---------------------------------------------------------------------


async def test_within_any_second_no_more_are_let_through_than_may_be(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    store = AssistantStore(fake().gateway)
    let_through: list[int] = []
    for tenth in range(50):
        let_through += [tenth for _ in range(3) if await store.claim(5)]
        clock.shift(0.1)
    for begin in range(41):
        assert sum(begin <= tenth < begin + 10 for tenth in let_through) == 5
    # Three and two of each ten.
    assert let_through[:7] == [0, 0, 0, 1, 1, 10, 10]


async def test_who_is_refused_takes_nobodys_place(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    store = AssistantStore(fake().gateway)
    assert [await store.claim(2) for _ in range(2)] == [True, True]
    for _ in range(9):
        clock.shift(0.1)
        assert not await store.claim(2)
    clock.shift(0.1)
    assert [await store.claim(2) for _ in range(3)] == [True, True, False]


async def test_a_clock_that_is_set_back_holds_nobody_up(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    store = AssistantStore(fake().gateway)
    assert await store.claim(1)
    clock.shift(-0.5)
    assert await store.claim(1)


async def test_all_processes_share_one_count_that_does_not_stay(
    raw: Redis, real: MakePlace
) -> None:
    stores = [AssistantStore(real().gateway) for _ in range(4)]
    claims = await asyncio.gather(*(stores[n % 4].claim(7) for n in range(40)))
    assert sum(claims) == 7
    assert 0 < await raw.pttl("onboarding:rate:asks") <= 1000
    assert await raw.llen("onboarding:rate:asks") == 7


def _progress(place: Place, session_id: str) -> str:
    return place.gateway.keys.session(session_id).progress


async def test_what_the_history_keeps_is_json_that_others_can_read(
    place: Place, gateway: Gateway
) -> None:
    session_id = await prepare(place.manager)
    await place.add_answer(session_id, 'é "quoted"\n')
    [entry] = await gateway.command("LRANGE", gateway.keys.session(session_id).history, 0, -1)
    assert json.loads(entry) == asked('é "quoted"\n')
