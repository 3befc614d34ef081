"""The log of a session and what is reported into it: once, in order, and not forgotten too soon."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import time_machine

from app.clock import now_ms
from app.errors import SessionNotFoundError, StoreUnavailableError
from app.onboarding.events import BEFORE_ALL, EventView
from app.onboarding.generation import ProgressEvent
from app.store.generation import GenerationStore, Taken
from app.store.sessions import SessionStore
from tests.faults.servers import Valkey
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    WRITES,
    Place,
    count_events,
    names_of_keys,
    prepare,
    working_at,
)

KEPT = 1000
"""How many events the log keeps at least."""

TURN_S = 120
"""How often the memory of a session is looked through, in seconds."""


async def report(
    place: Place, session_id: str, event_id: str | None = None, *, progress: int = 10, **more: Any
) -> Taken:
    """Send a report of progress."""
    store = GenerationStore(place.gateway, SessionStore(place.gateway))
    fields = {"stage": "a stage", "message": "a message", **more}
    event = ProgressEvent(session_id, progress=progress, event_id=event_id, **fields)
    return await store.add_event(event, at_ms=now_ms())


async def log_of(place: Place, session_id: str) -> list[EventView]:
    events, _ = await place.events.list_after(session_id, BEFORE_ALL, None)
    return events


class TestAReportWhoseIdWasTakenBefore:
    async def test_adds_nothing_and_is_answered_with_the_first(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        first = await report(place, session_id, "e1", progress=40, message="é/\\'\"")
        await report(place, session_id, "e2", progress=50)
        status = await place.generation.get_latest_progress(session_id)
        events = await log_of(place, session_id)

        again = await report(place, session_id, "e1", stage="another", progress=1, message=None)

        assert not first.repeated
        assert again == first._replace(repeated=True)
        assert await log_of(place, session_id) == events
        assert await place.generation.get_latest_progress(session_id) == status

    async def test_by_50_senders_at_once_is_one(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)
        taken = await asyncio.gather(
            *(report(place, session_id, "e1", progress=sender) for sender in range(50))
        )
        assert sorted(each.repeated for each in taken) == [False] + [True] * 49
        assert len({each._replace(repeated=False) for each in taken}) == 1
        [event] = [each for each in await log_of(place, session_id) if each["type"] == "progress"]
        assert (event["id"], event["progress"]) == (taken[0].event_id, taken[0].progress)

    async def test_in_another_session_is_another_report(self, place: Place) -> None:
        one, two = await prepare(place.manager), await prepare(place.manager)
        assert not (await report(place, one, "e1")).repeated
        assert not (await report(place, two, "e1")).repeated

    @pytest.mark.parametrize(
        "event_id",
        [
            *("1", "1:2", "event:1", "key:onboarding:other", "part:onboarding:other", "turn"),
            *("é😀", '"', "\\", "a b", "%s", "x" * 128),
        ],
    )
    async def test_may_be_any_text_and_touches_no_other_memory(
        self, place: Place, event_id: str
    ) -> None:
        await place.gateway.command("SET", "onboarding:other", "x", "EX", 60)
        session_id = await prepare(place.manager)
        assert not (await report(place, session_id, event_id)).repeated
        assert (await report(place, session_id, event_id)).repeated
        event = (await log_of(place, session_id))[-1]
        assert event["event_id"] == event_id
        await place.manager.save_step(session_id, 5, {"a": 1})
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()
        assert await place.gateway.command("EXISTS", "onboarding:other") == 1

    async def test_of_a_session_that_is_not_there_is_not_remembered(self, place: Place) -> None:
        with pytest.raises(SessionNotFoundError):
            await report(place, "s", "e1")
        await place.manager.set_metadata("s", "u", "w")
        assert not (await report(place, "s", "e1")).repeated


class TestTheIdOfAReport:
    async def test_is_remembered_as_long_as_the_report_is_in_the_log(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        session_id = await prepare(place.manager)
        first = await report(place, session_id, "e1")
        for _ in range(5):
            clock.shift(20 * TURN_S)
            await report(place, session_id)
            assert await report(place, session_id, "e1") == first._replace(repeated=True)
        assert await count_events(place.gateway, session_id) == 3 + 1 + 5

    async def test_is_forgotten_once_the_report_has_left_the_log(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        session_id = await prepare(place.manager)
        keys = place.gateway.keys.session(session_id)
        for number in range(5):
            await report(place, session_id, f"e{number}")
            clock.shift(0.001)
        await place.gateway.command("XTRIM", keys.events, "MAXLEN", "=", 2)

        clock.shift(TURN_S)
        await place.manager.update_progress(session_id, 1)

        names = [name.decode() for name in await place.gateway.command("HKEYS", keys.ops)]
        kept = {name.removeprefix("event:") for name in names if name.startswith("event:")}
        assert kept == {"e3", "e4"}
        assert not (await report(place, session_id, "e2")).repeated
        assert (await report(place, session_id, "e3")).repeated

    async def test_of_one_millisecond_with_the_oldest_event_is_remembered(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        # All of them have the same time and differ by their count.
        place = fake()
        session_id = await prepare(place.manager)
        for number in range(5):
            await report(place, session_id, f"e{number}")
        events = place.gateway.keys.session(session_id).events
        await place.gateway.command("XTRIM", events, "MAXLEN", "=", 2)
        clock.shift(TURN_S)
        await place.manager.update_progress(session_id, 1)
        assert (await report(place, session_id, "e3")).repeated


class TestTheLog:
    async def test_keeps_at_least_the_last_1000_events_and_not_all(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)
        taken: list[Taken] = []
        for _ in range(30):
            taken += await asyncio.gather(*(report(place, session_id) for _ in range(50)))
        ids = sorted(tuple(map(int, each.event_id.split("-"))) for each in taken)

        events, extent = await place.events.list_after(session_id, BEFORE_ALL, None)

        assert KEPT <= len(events) <= 1.2 * KEPT
        assert [tuple(map(int, each["id"].split("-"))) for each in events] == ids[-len(events) :]
        assert not extent.whole
        assert (extent.first, extent.newest) == (ids[-len(events)], ids[-1])

    async def test_has_the_reports_of_every_sender_once_and_in_their_order(
        self, real: MakePlace
    ) -> None:
        place = real()
        session_id = await prepare(place.manager)

        async def send(sender: int) -> None:
            for progress in range(20):
                await report(place, session_id, stage=f"s{sender}", progress=progress)

        await asyncio.gather(*(send(sender) for sender in range(20)))
        by_sender: dict[str, list[int]] = {}
        for event in await log_of(place, session_id):
            if event["type"] == "progress":
                by_sender.setdefault(event["stage"], []).append(event["progress"])
        assert by_sender == {f"s{sender}": list(range(20)) for sender in range(20)}

    async def test_is_read_on_from_any_event_without_a_repeat(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        for progress in range(7):
            await report(place, session_id, progress=progress)
        events, extent = await place.events.list_after(session_id, BEFORE_ALL, None)
        assert extent.whole
        assert [str(extent.first), str(extent.newest)] == [events[0]["id"], events[-1]["id"]]

        place_in_log, read = BEFORE_ALL, list[EventView]()
        while True:
            page, page_extent = await place.events.list_after(session_id, place_in_log, 2)
            assert page_extent == extent
            if not page:
                break
            assert len(page) <= 2
            read += page
            place_in_log = type(place_in_log)(*map(int, page[-1]["id"].split("-")))
        assert read == events

    async def test_is_read_together_with_how_the_session_is_at_that_instant(
        self, real: MakePlace
    ) -> None:
        place = real()
        session_id = await prepare(place.manager)
        made = {str((await place.events.get_scene(session_id)).extent.newest): 0}

        async def send(numbers: range) -> None:
            for progress in numbers:
                taken = await report(place, session_id, progress=progress)
                made[taken.event_id] = progress

        sending = asyncio.gather(send(range(1, 50)), send(range(50, 99)))
        seen = []
        while not sending.done():
            scene = await place.events.get_scene(session_id)
            seen.append((str(scene.extent.newest), scene.generation.percent))
        await sending
        assert len({newest for newest, _ in seen}) > 5
        assert [made[newest] for newest, _ in seen] == [percent for _, percent in seen]


@pytest.mark.usefixtures("raw")
class TestAStoreWhoseUserMayNotPublish:
    @pytest.fixture(params=["+@all", "+@all -publish"])
    async def mute(self, request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Place]:
        # Without a channel that it may use, or without the command.
        rules = ("on", ">p", "~*", *request.param.split(), "resetchannels")
        valkey.command("ACL", "SETUSER", "mute", *rules)
        async with working_at(f"redis://mute:p@{valkey.host}:{valkey.port}/0") as place:
            with pytest.raises(StoreUnavailableError):
                await place.gateway.command("PUBLISH", "c", "x")
            yield place
        valkey.command("ACL", "DELUSER", "mute")

    async def test_takes_every_write_and_its_event(self, mute: Place) -> None:
        for name, write in WRITES.items():
            session_id = await prepare(mute.manager, finalized=write.finalized)
            before = await count_events(mute.gateway, session_id)
            await write.do(mute, session_id)
            assert await count_events(mute.gateway, session_id) == before + write.events, name
            await mute.manager.delete_session(session_id)
            assert await names_of_keys(mute.gateway, session_id) == set()
