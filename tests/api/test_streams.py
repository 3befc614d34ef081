"""The live stream: how a session is, then all that happens, in order, nothing lost or twice."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.api.events import BEAT_S
from app.services.manager import make_manager
from app.settings import Settings
from app.store.connect import connect
from tests.api.conftest import Log
from tests.api.helpers import (
    DELETE_SESSION,
    DELETE_STEP,
    FINALIZE,
    GET_PROGRESS,
    GET_SESSION,
    REOPEN,
    SAVE,
    Answers,
    answer_of,
    ask,
    check_progress,
    create,
    is_time,
    problem_of,
    save,
    unknown_id,
)
from tests.conftest import QUICKLY, UNLIMITED, known_settings
from tests.events import Event, EventSource, StreamEndedError, following
from tests.faults.proxy import Loss, Proxy
from tests.faults.servers import Valkey
from tests.service import BASE, serving

Follow = Callable[..., Any]
"""`await follow()` opens a stream on the session of the test."""

STATUS = {
    *("session_id", "status", "progress", "stage", "message", "error_message", "eta_seconds"),
    "updated_at",
}
SNAPSHOT = {"type", *STATUS, "language", "finalized_at", "revision", "steps", "gap"}

UNREADABLE = [
    *("x", "-", "-1", "1-", "1-2-3", "1.5", "0x10", "1 2", "+1", "\u00b9-0", "null", "a" * 2000),
    *("9" * 40, f"{2**64}-0", f"1-{2**64}"),
]
"""What stands in Last-Event-ID and is no id."""


@pytest.fixture
async def follow(api: AsyncClient, session_id: str) -> AsyncIterator[Follow]:
    """Give a function that follows a session, that of the test if no other is named."""
    async with AsyncExitStack() as stack:

        async def open_stream(
            last_event_id: str | None = None, *, session: str = session_id
        ) -> EventSource:
            stream = following(api.base_url, session, last_event_id=last_event_id)
            return await stack.enter_async_context(stream)

        yield open_stream


async def report(api: AsyncClient, session_id: str, **event: Any) -> Answers:
    """Report progress and give the answer."""
    body = {"stage": "working", "progress": 1, **event}
    return answer_of(await api.post(f"{BASE}/{session_id}/events", json=body), 201)


async def set_status(api: AsyncClient, session_id: str, status: str) -> Answers:
    return answer_of(await api.put(f"{BASE}/{session_id}/status", json={"status": status}))


async def set_language(api: AsyncClient, session_id: str, language: str) -> None:
    body = {"language": language}
    answer_of(await api.put(f"{BASE}/{session_id}/language", json=body))


async def log_of(api: AsyncClient, session_id: str) -> list[Answers]:
    """Read the whole log."""
    page = answer_of(await api.get(f"{BASE}/{session_id}/events"))
    assert page["next"] is None
    events: list[Answers] = page["events"]
    return events


def place_of(event_id: str | None) -> tuple[int, ...]:
    """Give what orders an id."""
    assert event_id is not None
    return tuple(map(int, event_id.split("-")))


def check_event(event: Event) -> None:
    """Check the shape of an event of the log."""
    assert event.data["type"] == event.type
    assert event.data["id"] == event.id
    assert is_time(event.data["at"])


# --- The beginning --------------------------------------------------------------------------------


async def test_a_stream_begins_with_how_the_session_is(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    await save(api, session_id, 3)

    snapshot = await (await follow()).receive()

    assert snapshot.type == snapshot.data["type"] == "snapshot"
    assert snapshot.data.keys() == SNAPSHOT
    status = answer_of(await api.get(f"{BASE}/{session_id}/status"))
    assert {name: snapshot.data[name] for name in STATUS} == status
    assert snapshot.data["steps"] == answer_of(await GET_PROGRESS.send(api, session_id))["progress"]
    check_progress(snapshot.data["steps"], [3])
    assert snapshot.data["gap"] is False


async def test_the_snapshot_shows_every_change(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    before = (await (await follow()).receive()).data
    assert (before["status"], before["progress"], before["stage"]) == ("pending", 0, None)
    assert (before["language"], before["finalized_at"], before["revision"]) == ("en", None, 0)

    await save(api, session_id)
    await set_language(api, session_id, "de")
    answer_of(await FINALIZE.send(api, session_id))
    await set_status(api, session_id, "processing")
    await report(api, session_id, stage="visual_detection", progress=70, message="looking")

    after = (await (await follow()).receive()).data
    assert (after["status"], after["progress"], after["stage"]) == (
        *("processing", 70, "visual_detection"),
    )
    assert (after["message"], after["error_message"]) == ("looking", None)
    assert (after["language"], after["revision"]) == ("de", 1)
    session = answer_of(await GET_SESSION.send(api, session_id))
    assert after["finalized_at"] == session["finalized_at"]


async def test_the_head_of_a_stream_keeps_caches_and_proxies_from_holding_it(
    follow: Follow,
) -> None:
    headers = (await follow()).headers
    assert headers["content-type"].partition(";")[0] == "text/event-stream"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]
    assert "content-length" not in headers


async def test_a_fresh_snapshot_stands_at_the_newest_event(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    await save(api, session_id)
    snapshot = await (await follow()).receive()
    assert snapshot.id == (await log_of(api, session_id))[-1]["id"]


@pytest.mark.parametrize("last_event_id", [None, "", "1-0", "x"])
async def test_an_unknown_session_is_a_problem_and_no_stream(
    api: AsyncClient, last_event_id: str | None
) -> None:
    headers = {} if last_event_id is None else {"last-event-id": last_event_id}
    problem_of(
        await api.get(f"{BASE}/{unknown_id()}/events/stream", headers=headers), "session_not_found"
    )


async def test_a_log_that_cannot_be_read_is_a_problem_and_no_stream(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await raw.set(f"onboarding:{session_id}:events", "no stream", ex=60)
    problem_of(await api.get(f"{BASE}/{session_id}/events/stream"), "corrupt_record")


async def test_a_log_that_is_damaged_meanwhile_ends_the_stream(
    api: AsyncClient, raw: Redis, session_id: str, follow: Follow
) -> None:
    stream = await follow()
    await raw.set(f"onboarding:{session_id}:events", "no stream", ex=60)
    await raw.publish(f"onboarding:{session_id}:events", "recorded")

    assert [event.type for event in await stream.receive_all()] == ["snapshot"]
    assert stream.is_whole


@pytest.mark.parametrize("last_event_id", [None, "0"])
async def test_a_stream_that_cannot_be_sent_on_is_cut_off_so_that_nobody_waits_for_more(
    serve: Callable[..., Any],
    raw: Redis,
    session_id: str,
    log: Log,
    last_event_id: str | None,
) -> None:
    api: AsyncClient = await serve(max_streams=1)
    key = f"onboarding:{session_id}:events"
    # No number that JSON takes here.
    event = ("type", "progress", "at", 1, "stage", "x", "progress", 10**30)
    if last_event_id:
        await ask(raw, "XADD", key, "*", *event)
    async with following(api.base_url, session_id, last_event_id=last_event_id) as stream:
        if not last_event_id:
            await stream.receive()
            await ask(raw, "XADD", key, "*", *event)
            await raw.publish(key, "recorded")
        await stream.receive_all()
        assert not stream.is_whole
    # It has left no place behind.
    async with asyncio.timeout(5):
        while (await api.head(f"{BASE}/{session_id}/events/stream")).status_code != 200:
            await asyncio.sleep(0.005)
    assert [line["exception"] for line in log.lines() if line["event"] == "request_crashed"] == [
        "TypeError",
    ]


# --- What happens ---------------------------------------------------------------------------------


async def test_everything_that_happens_is_seen_as_the_log_has_it(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    stream = await follow()

    await save(api, session_id, 1)
    await save(api, session_id, 2)
    answer_of(await DELETE_STEP.send(api, session_id))
    await set_language(api, session_id, "fr")
    answer_of(await FINALIZE.send(api, session_id))
    await set_status(api, session_id, "processing")
    await report(api, session_id, event_id="one")
    await api.put(f"{BASE}/{session_id}/result", content=b"a manifest")
    await set_status(api, session_id, "complete")
    answer_of(await REOPEN.send(api, session_id))

    snapshot, *events = await stream.receive_until("reopened")
    log = await log_of(api, session_id)
    assert snapshot.id == log[0]["id"]
    assert [event.data for event in events] == log[1:]
    for event in events:
        check_event(event)
    assert [event.type for event in events] == [
        *("step_saved", "step_saved", "step_deleted", "language_changed", "finalized"),
        *("status_changed", "progress", "result_stored", "status_changed", "reopened"),
    ]
    by_type = {event.type: event.data for event in events}
    assert (by_type["step_saved"]["step_id"], by_type["step_saved"]["version"]) == (2, 1)
    assert by_type["step_deleted"]["step_id"] == 1
    assert by_type["language_changed"]["language"] == "fr"
    assert by_type["status_changed"]["status"] == "complete"
    assert (by_type["progress"]["stage"], by_type["progress"]["event_id"]) == ("working", "one")


async def test_the_deletion_is_the_last_event_of_every_stream(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    streams = [await follow() for _ in range(3)]
    answer_of(await DELETE_SESSION.send(api, session_id))

    for stream in streams:
        snapshot, deleted = await stream.receive_all()
        check_event(deleted)
        assert deleted.type == "deleted"
        assert place_of(deleted.id) > place_of(snapshot.id)
        assert stream.is_whole


async def test_a_connection_serves_on_when_its_stream_has_ended(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    stream = await follow()
    answer_of(await DELETE_SESSION.send(api, session_id))
    await stream.receive_all()
    assert await stream.status_of(f"{BASE}/steps") == 200


async def test_what_a_worker_does_without_http_is_seen(
    session_id: str, settings: Settings, follow: Follow
) -> None:
    stream = await follow()
    gateway = connect(settings)
    manager = make_manager(gateway, settings)

    await manager.set_metadata(session_id, "u9", "w9")
    await manager.save_step(session_id, 4, {"a": 1})
    await manager.delete_session(session_id)
    await gateway.aclose()

    types = [event.type for event in await stream.receive_all()]
    assert types in (
        ["snapshot", "metadata_changed", "step_saved", "deleted"],
        # Nobody can give what the log had when it was deleted before it was read.
        ["snapshot", "metadata_changed", "deleted"],
        ["snapshot", "deleted"],
    )


async def test_a_session_that_is_made_anew_under_its_id_is_another_one(
    session_id: str, settings: Settings, follow: Follow
) -> None:
    stream = await follow()
    gateway = connect(settings)
    manager = make_manager(gateway, settings)

    await manager.delete_session(session_id)
    await manager.set_metadata(session_id, "u9", "w9")
    await gateway.aclose()

    assert [event.type for event in await stream.receive_all()] == ["snapshot", "deleted"]
    snapshot = await (await follow()).receive()
    assert snapshot.data["status"] == "pending"


async def test_what_another_process_writes_is_seen(
    api: AsyncClient, serve: Callable[..., Any], session_id: str, follow: Follow
) -> None:
    other: AsyncClient = await serve()
    stream = await follow()

    await save(other, session_id)
    await report(other, session_id, stage="there")
    await report(api, session_id, stage="here")

    _, saved, there, here = await stream.receive_many(4)
    assert saved.type == "step_saved"
    assert (there.data["stage"], here.data["stage"]) == ("there", "here")


async def test_many_writers_and_many_followers_agree_on_one_order(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    streams = [await follow() for _ in range(5)]
    writers, each = 8, 25

    async def write(writer: int) -> None:
        for number in range(each):
            await report(api, session_id, stage=f"{writer}", progress=number)

    await asyncio.gather(*map(write, range(writers)))

    log = await log_of(api, session_id)
    assert len(log) == 1 + writers * each
    for stream in streams:
        _, *events = await stream.receive_many(len(log))
        assert [event.data for event in events] == log[1:]


async def test_a_stream_stays_open_after_complete(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    stream = await follow()
    await set_status(api, session_id, "processing")
    await set_status(api, session_id, "complete")
    await set_status(api, session_id, "processing")

    received = await stream.receive_many(4)

    assert [event.data["status"] for event in received] == [
        *("pending", "processing", "complete", "processing"),
    ]


async def test_drafts_and_repeats_are_no_events(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    stream = await follow()
    await api.put(f"{BASE}/{session_id}/steps/1/draft", json={"data": {"d": 1}})
    await report(api, session_id, event_id="one")
    again = {"stage": "other", "progress": 99, "event_id": "one"}
    answer_of(await api.post(f"{BASE}/{session_id}/events", json=again))
    await set_language(api, session_id, "en")
    await report(api, session_id, stage="last")

    assert [event.data["stage"] for event in (await stream.receive_many(3))[1:]] == [
        *("working", "last"),
    ]


async def test_streams_of_other_sessions_see_nothing_of_it(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    other_id = await create(api)
    other = await follow(session=other_id)
    await report(api, session_id, stage="here")
    await report(api, other_id, stage="there")
    assert [event.data.get("stage") for event in await other.receive_many(2)] == [None, "there"]


# --- Last-Event-ID --------------------------------------------------------------------------------


async def test_a_resumed_stream_replays_everything_after_the_last_event(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    for number in range(250):
        await report(api, session_id, progress=number % 101)
    log = await log_of(api, session_id)

    for place in (0, 1, 100, 249, 250):
        stream = await follow(log[place]["id"])
        snapshot, *events = await stream.receive_many(251 - place)
        assert snapshot.type == "snapshot"
        assert snapshot.id is None
        assert snapshot.data["gap"] is False
        assert [event.data for event in events] == log[place + 1 :]

    last = await report(api, session_id, stage="live")
    assert (await stream.receive()).id == last["id"]


async def test_the_snapshot_of_a_resumed_stream_moves_nobody_back_or_on(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    first = await report(api, session_id)
    second = await report(api, session_id)

    stream = await follow(first["id"])
    assert (await stream.receive()).type == "snapshot"
    stream.close()
    again = await follow(stream.last_event_id)

    assert [event.id for event in await again.receive_many(2)] == [None, second["id"]]


@pytest.mark.parametrize("place", ["0", "0-0", "1-1", "0000-0001"])
async def test_an_id_before_a_whole_log_replays_all_of_it(
    api: AsyncClient, session_id: str, follow: Follow, place: str
) -> None:
    await save(api, session_id)
    stream = await follow(place)

    snapshot, *events = await stream.receive_many(3)

    assert (snapshot.id, snapshot.data["gap"]) == (None, False)
    assert [event.type for event in events] == ["session_created", "step_saved"]


async def test_terminal_events_reach_those_who_come_late(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    await set_status(api, session_id, "processing")
    await api.put(f"{BASE}/{session_id}/result", content=b"a manifest")
    await set_status(api, session_id, "complete")

    fresh = await (await follow()).receive()
    _, *replayed = await (await follow("0")).receive_many(5)

    assert fresh.data["status"] == "complete"
    assert [event.type for event in replayed[-2:]] == ["result_stored", "status_changed"]
    assert replayed[-1].data["status"] == "complete"


async def test_an_empty_last_event_id_is_a_fresh_start(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    snapshot = await (await follow("")).receive()
    assert snapshot.id == (await log_of(api, session_id))[-1]["id"]
    assert snapshot.data["gap"] is False


async def test_an_id_that_cannot_be_read_is_a_gap_and_never_an_error(
    api: AsyncClient, session_id: str, follow: Follow
) -> None:
    # Sixteen are a session's most, so they go one by one.
    for unreadable in UNREADABLE:
        stream = await follow(unreadable)
        await check_gap(api, session_id, stream)
        stream.close()


@pytest.mark.parametrize(
    "ahead", ["{ms}-{next}", "{later}-0", f"{2**64 - 1}-{2**64 - 1}", str(2**63)]
)
async def test_an_id_that_the_log_has_not_reached_is_a_gap(
    api: AsyncClient, session_id: str, follow: Follow, ahead: str
) -> None:
    ms, sequence = place_of((await report(api, session_id))["id"])
    future = ahead.format(ms=ms, next=sequence + 1, later=ms + 1)
    await check_gap(api, session_id, await follow(future))


async def test_an_id_that_was_trimmed_is_a_gap(
    api: AsyncClient, raw: Redis, session_id: str, follow: Follow
) -> None:
    ids = [(await report(api, session_id))["id"] for _ in range(6)]
    await ask(raw, "XTRIM", f"onboarding:{session_id}:events", "MAXLEN", 3)

    await check_gap(api, session_id, await follow("0"))
    await check_gap(api, session_id, await follow(ids[1]))

    # The last three are there, so whoever saw the first of them has missed nothing.
    kept = await follow(ids[-3])
    snapshot, *events = await kept.receive_many(3)
    assert (snapshot.id, snapshot.data["gap"]) == (None, False)
    assert [event.id for event in events] == ids[-2:]


async def check_gap(api: AsyncClient, session_id: str, stream: EventSource) -> None:
    """Check that a stream begins with a gap, and that what happens next follows it."""
    snapshot = await stream.receive()
    assert snapshot.type == "snapshot"
    assert snapshot.data["gap"] is True
    assert snapshot.id == (await log_of(api, session_id))[-1]["id"]
    after = await report(api, session_id, stage="after the gap")
    assert (await stream.receive()).id == after["id"]


async def test_a_follower_whom_the_log_has_outrun_is_told_of_the_gap(
    api: AsyncClient, raw: Redis, session_id: str, follow: Follow
) -> None:
    log = f"onboarding:{session_id}:events"
    stream = await follow()
    await stream.receive()
    # Written and trimmed before the follower hears of it.
    for _ in range(3):
        await ask(raw, "XADD", log, "*", "type", "progress", "at", 1, "stage", "x", "progress", 1)
    await ask(raw, "XTRIM", log, "MAXLEN", 1)
    last = await report(api, session_id)

    snapshot = await stream.receive()
    assert (snapshot.type, snapshot.id, snapshot.data["gap"]) == ("snapshot", last["id"], True)
    after = await report(api, session_id)
    assert (await stream.receive()).id == after["id"]


# --- Reconnections, lost replies, lost connections ------------------------------------------------


async def test_a_hundred_reconnections_lose_nothing_and_repeat_nothing(
    api: AsyncClient, session_id: str
) -> None:
    chance = random.Random(20260731)
    written: Counter[str] = Counter()
    reported: list[str] = []
    # Nobody may fall a thousand events behind, which is what the log keeps at least.
    room = asyncio.Semaphore(100)
    done = asyncio.Event()

    async def has_room() -> bool:
        await room.acquire()
        return not done.is_set()

    async def report_on(writer: int) -> None:
        while await has_room():
            reported.append((await report(api, session_id, stage=f"{writer}"))["id"])
            written["progress"] += 1

    async def save_on() -> None:
        while await has_room():
            await save(api, session_id, chance.randint(1, 23))
            written["step_saved"] += 1

    async def change_language() -> None:
        languages = cycle(("de", "en"))
        while await has_room():
            await set_language(api, session_id, next(languages))
            written["language_changed"] += 1

    async def follow_on(source: EventSource) -> list[Event]:
        seen = [await source.receive()]
        for _ in range(100):
            some = await source.receive_many(chance.choice((0, 0, 1, 2, 5, 10, 20)))
            seen += some
            for _ in some:
                room.release()
            source.close()
            await source.open()
        done.set()
        for _ in range(5):
            room.release()
        return seen

    async with following(api.base_url, session_id) as source:
        writers = [*map(report_on, range(3)), save_on(), change_language()]
        seen, *_ = await asyncio.gather(follow_on(source), *writers)
        answer_of(await FINALIZE.send(api, session_id))
        seen += await source.receive_until("finalized")

    snapshots = [event for event in seen if event.type == "snapshot"]
    events = [event for event in seen if event.type != "snapshot"]
    assert not any(snapshot.data["gap"] for snapshot in snapshots)
    assert [snapshot.id for snapshot in snapshots[1:] if snapshot.id is not None] == []
    places = [place_of(event.id) for event in events]
    assert places == sorted(set(places))
    assert Counter(event.type for event in events[:-1]) == written
    assert {event.id for event in events if event.type == "progress"} == set(reported)


async def test_lost_replies_make_no_event_missing_or_double(
    settings: Settings, valkey: Valkey
) -> None:
    """Break the connection to the store in place of its replies to 30 % of 500 reports."""
    chance = random.Random(500)
    async with Proxy(valkey.port) as proxy:
        lossy = behind(settings, proxy, redis_timeout_s=0.1, retry_attempts=20)
        async with serving(lossy) as api:
            session_id = await create(api)
            numbers = iter(range(500))
            dropped = 0

            async def write() -> None:
                nonlocal dropped
                for number in numbers:
                    if chance.random() < 0.3:
                        proxy.lose_replies(Loss.RESET, 1, to="EVALSHA")
                        dropped += 1
                    await insist(api, session_id, number)

            async with following(api.base_url, session_id) as stream:
                await stream.receive()
                live = asyncio.create_task(stream.receive_many(500, 60))
                await asyncio.gather(*(write() for _ in range(20)))
                seen = await live
                await set_status(api, session_id, "processing")
                assert (await stream.receive()).type == "status_changed"

            log = (await log_of(api, session_id))[1:-1]
    assert 100 < dropped < 200
    assert len(log) == 500
    assert [event.data for event in seen] == log
    assert sorted(int(event["stage"]) for event in log) == list(range(500))


async def insist(api: AsyncClient, session_id: str, number: int) -> None:
    """Report until it is known to have arrived; the service itself sends again meanwhile."""
    body: Answers = {"stage": f"{number}", "progress": number % 101}
    if number % 2:
        body["event_id"] = f"event-{number}"
    for _ in range(5):
        response = await api.post(f"{BASE}/{session_id}/events", json=body)
        if response.status_code in (200, 201):
            return
        # Without an id of its own, only the service could send it again.
        assert number % 2
        problem_of(response, "store_unavailable")
    raise AssertionError("it never arrived")


async def test_a_killed_subscription_loses_nothing(
    api: AsyncClient, raw: Redis, session_id: str, follow: Follow
) -> None:
    streams = [await follow() for _ in range(3)]

    async def kill() -> int:
        killed = 0
        for _ in range(200):
            killed += await ask(raw, "CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(0.001)
        return killed

    async def write() -> None:
        for number in range(300):
            await report(api, session_id, progress=number % 101)

    killed, _ = await asyncio.gather(kill(), write())

    assert killed >= 2
    log = await log_of(api, session_id)
    for stream in streams:
        assert [event.data for event in (await stream.receive_many(len(log)))[1:]] == log[1:]


async def test_what_nobody_was_told_of_is_seen_with_the_next_comment(
    monkeypatch: pytest.MonkeyPatch, raw: Redis, session_id: str, follow: Follow
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.1)
    stream = await follow()
    await stream.receive()
    fields = ("type", "progress", "at", 1, "stage", "unheard", "progress", 1)
    await ask(raw, "XADD", f"onboarding:{session_id}:events", "*", *fields)
    assert (await stream.receive()).data["stage"] == "unheard"


def behind(settings: Settings, proxy: Proxy, **further: Any) -> Settings:
    """Change the settings so that a proxy stands before the store."""
    url = f"redis://{proxy.host}:{proxy.port}/0"
    changed = {"redis_url": url, "redis_timeout_s": 0.3, "retry_attempts": 2, **further}
    return known_settings(**{**settings.model_dump(exclude_unset=True), **changed})


async def test_an_unreachable_store_ends_no_stream_and_loses_nothing(
    settings: Settings, valkey: Valkey, api: AsyncClient, session_id: str
) -> None:
    async with (
        Proxy(valkey.port) as proxy,
        serving(behind(settings, proxy)) as cut_off,
        following(cut_off.base_url, session_id) as stream,
    ):
        await stream.receive()
        await report(cut_off, session_id, stage="before")
        assert (await stream.receive()).data["stage"] == "before"

        proxy.refuse()
        proxy.reset_all()
        problem_of(await cut_off.get(f"{BASE}/{session_id}"), "store_unavailable")
        for number in range(5):
            await report(api, session_id, stage=f"meanwhile {number}")
        proxy.accept()

        stages = [event.data["stage"] for event in await stream.receive_many(5)]
        assert stages == [f"meanwhile {number}" for number in range(5)]
        await report(api, session_id, stage="after")
        assert (await stream.receive()).data["stage"] == "after"


class StrandingProxy(Proxy):
    """A proxy that can forget connections: they stay open, and nothing comes through any more."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self._stranded: list[asyncio.Event] = []

    def strand(self) -> None:
        """Keep what was kept back since `hold()`, for ever, and let everything else go on."""
        self._stranded.append(self._flowing)
        self._flowing = asyncio.Event()
        self.release()

    async def __aexit__(self, *error: Any) -> None:
        for flowing in self._stranded:
            flowing.set()
        await super().__aexit__(*error)


async def test_a_subscription_that_falls_silent_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    valkey: Valkey,
    api: AsyncClient,
    session_id: str,
) -> None:
    monkeypatch.setattr("app.store.subscription.QUIET_S", 0.1)
    async with (
        StrandingProxy(valkey.port) as proxy,
        serving(behind(settings, proxy)) as cut_off,
        following(cut_off.base_url, session_id) as stream,
    ):
        await stream.receive()
        proxy.hold()
        pinged = proxy.commands["PING"]
        await report(api, session_id, stage="meanwhile")
        async with asyncio.timeout(10):
            while proxy.commands["PING"] == pinged:
                await asyncio.sleep(0.001)
        proxy.strand()

        # Long before the next comment.
        assert (await stream.receive(5)).data["stage"] == "meanwhile"
        await report(api, session_id, stage="after")
        assert (await stream.receive(5)).data["stage"] == "after"


async def test_comments_go_on_while_the_store_hangs(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, valkey: Valkey, session_id: str
) -> None:
    """A balancer that sees nothing for long closes the connection, whatever the store does."""
    leeway_s = 15 - BEAT_S
    monkeypatch.setattr("app.api.events.BEAT_S", 0.1)
    async with (
        Proxy(valkey.port) as proxy,
        serving(behind(settings, proxy, redis_timeout_s=8)) as api,
        following(api.base_url, session_id) as stream,
    ):
        await stream.receive()
        await stream.wait_for_comments(2)
        proxy.hold()
        try:
            for _ in range(2):
                await stream.wait_for_comments(stream.comments + 1, limit_s=leeway_s)
        finally:
            proxy.release()


async def test_a_restarted_store_ends_no_stream_and_loses_nothing(tmp_path: Path) -> None:
    with Valkey.start(tmp_path, appendonly=True, appendfsync="always") as store:
        settings = known_settings(redis_url=store.url, retry_attempts=8, **QUICKLY, **UNLIMITED)
        async with serving(settings) as api:
            session_id = await create(api)
            async with following(api.base_url, session_id) as stream:
                first = await stream.receive()
                before = await report(api, session_id)
                await asyncio.to_thread(store.restart)
                after = [await report(api, session_id) for _ in range(3)]

                received = await stream.receive_many(4)

                assert first.type == "snapshot"
                assert [event.id for event in received] == [
                    *(before["id"], *(event["id"] for event in after)),
                ]
                answer_of(await DELETE_SESSION.send(api, session_id))
                assert [event.type for event in await stream.receive_all()] == ["deleted"]


async def test_a_stream_that_is_opened_while_the_store_is_away_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, valkey: Valkey, session_id: str
) -> None:
    monkeypatch.setattr("app.store.subscription.CONFIRMED_WITHIN_S", 0.3)
    async with Proxy(valkey.port) as proxy, serving(behind(settings, proxy)) as api:
        path = f"{BASE}/{session_id}/events/stream"
        proxy.refuse()
        proxy.reset_all()
        response = await api.get(path)
        problem_of(response, "store_unavailable")
        assert response.headers["retry-after"]

        proxy.accept()
        async with asyncio.timeout(10):
            while (await api.head(path)).status_code != 200:
                await asyncio.sleep(0.01)


# --- One connection for all -----------------------------------------------------------------------


async def test_all_streams_share_one_connection_to_the_store(api: AsyncClient, raw: Redis) -> None:
    async with AsyncExitStack() as stack:
        sessions = await asyncio.gather(*(create(api) for _ in range(200)))
        streams = [
            await stack.enter_async_context(following(api.base_url, session_id))
            for session_id in sessions
        ]
        for stream in streams:
            assert (await stream.receive()).type == "snapshot"

        (ours,) = await our_connections(raw)
        assert int(ours["sub"]) >= 200

        await asyncio.gather(*(SAVE.send(api, session_id) for session_id in sessions))
        for stream in streams:
            assert (await stream.receive()).type == "step_saved"


async def test_streams_that_leave_a_lost_connection_leave_none_behind(
    settings: Settings, valkey: Valkey, raw: Redis
) -> None:
    async with (
        Proxy(valkey.port) as proxy,
        serving(behind(settings, proxy)) as api,
        AsyncExitStack() as stack,
    ):
        sessions = [await create(api) for _ in range(30)]
        for _ in range(3):
            streams = [
                await stack.enter_async_context(following(api.base_url, session_id))
                for session_id in sessions
            ]
            proxy.reset_all()
            for stream in streams:
                stream.close()
            async with following(api.base_url, sessions[0]) as stream:
                await stream.receive()
                await report(api, sessions[0])
                assert (await stream.receive()).type == "progress"
                async with asyncio.timeout(3):
                    while len(await our_connections(raw)) != 1:
                        await asyncio.sleep(0.01)


async def our_connections(raw: Redis) -> list[dict[str, Any]]:
    """List the connections of subscriptions."""
    clients: list[dict[str, Any]] = await raw.client_list()
    return [client for client in clients if client["name"] == "onboarding-streams"]


async def test_a_channel_is_given_up_with_its_last_stream(
    api: AsyncClient, raw: Redis, session_id: str, follow: Follow
) -> None:
    async def channels() -> list[bytes]:
        found: list[bytes] = await ask(raw, "PUBSUB", "CHANNELS", f"onboarding:{session_id}:*")
        return found

    first, second = await follow(), await follow()
    assert len(await channels()) == 1
    first.close()
    await report(api, session_id)
    assert [event.type for event in await second.receive_many(2)] == ["snapshot", "progress"]
    second.close()
    async with asyncio.timeout(10):
        while await channels():
            await asyncio.sleep(0.005)
    again = await follow()
    await report(api, session_id)
    assert [event.type for event in await again.receive_many(2)] == ["snapshot", "progress"]
    with pytest.raises(StreamEndedError):
        await first.receive_many(10)
