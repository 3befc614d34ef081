"""What a live stream may take: how many there are, how slow a reader is, how long it lasts."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.server import listen
from app.settings import Settings
from tests.api.helpers import GET_PROGRESS, PROBLEM, Answers, answer_of, ask, create, unknown_id
from tests.conftest import known_settings
from tests.events import EventSource, following
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.service import BASE, serving

Open = Callable[..., Any]
"""`await open_stream(api, session_id)` follows a session until the end of the test."""

MESSAGE = "\N{GRINNING FACE}" * 2000
"""The longest message, of 8,000 bytes."""


@pytest.fixture
async def open_stream() -> AsyncIterator[Open]:
    """Give a function that opens streams, which end with the test."""
    async with AsyncExitStack() as stack:

        async def open_one(
            api: AsyncClient,
            session_id: str,
            *,
            last_event_id: str | None = None,
            receive_buffer: int | None = None,
        ) -> EventSource:
            stream = following(
                api.base_url,
                session_id,
                last_event_id=last_event_id,
                receive_buffer=receive_buffer,
            )
            return await stack.enter_async_context(stream)

        yield open_one


def stream_path(session_id: str) -> str:
    return f"{BASE}/{session_id}/events/stream"


async def report(api: AsyncClient, session_id: str, **event: Any) -> Answers:
    """Report progress and give the answer."""
    body = {"stage": "working", "progress": 1, **event}
    return answer_of(await api.post(f"{BASE}/{session_id}/events", json=body), 201)


async def check_refused(api: AsyncClient, session_id: str) -> None:
    """Check that there are too many streams to open one on a session."""
    # A stream that is opened after all would say nothing for longer than this.
    response = await api.get(stream_path(session_id), timeout=5)
    assert response.status_code == 429, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1
    problem = response.json()
    assert problem.keys() >= PROBLEM
    assert problem["code"] == "too_many_streams"


async def wait_until_free(api: AsyncClient, session_id: str, limit_s: float = 2.0) -> None:
    """Wait until a stream could be opened."""
    async with asyncio.timeout(limit_s):
        while (await api.head(stream_path(session_id))).status_code != 200:
            await asyncio.sleep(0.005)


# --- How many -------------------------------------------------------------------------------------


async def test_a_session_has_sixteen_streams_and_no_more(
    api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    streams = [await open_stream(api, session_id) for _ in range(16)]

    await check_refused(api, session_id)

    # Another session has its own, and what is open goes on.
    await open_stream(api, await create(api))
    await report(api, session_id)
    for stream in streams:
        assert [event.type for event in await stream.receive_many(2)] == ["snapshot", "progress"]


async def test_a_process_has_as_many_streams_as_it_is_told(
    serve: Callable[..., Any], open_stream: Open
) -> None:
    api: AsyncClient = await serve(max_streams=3)
    sessions = [await create(api) for _ in range(4)]
    for session_id in sessions[:3]:
        await open_stream(api, session_id)

    for session_id in sessions:
        await check_refused(api, session_id)

    # Streams alone are refused.
    await report(api, sessions[3])


async def test_a_stream_that_is_closed_frees_its_place(
    serve: Callable[..., Any], open_stream: Open
) -> None:
    api: AsyncClient = await serve(max_streams=2, max_streams_per_session=1)
    session_id, other_id = await create(api), await create(api)
    for _ in range(5):
        stream = await open_stream(api, session_id)
        other = await open_stream(api, other_id)
        await check_refused(api, session_id)
        stream.close()
        await wait_until_free(api, session_id)
        stream = await open_stream(api, session_id)
        stream.close()
        other.close()
        await wait_until_free(api, session_id)
        await wait_until_free(api, other_id)


@pytest.mark.parametrize("limit", ["max_streams", "max_streams_per_session"])
async def test_an_opening_that_fails_keeps_no_place(
    serve: Callable[..., Any], open_stream: Open, raw: Redis, limit: str
) -> None:
    api: AsyncClient = await serve(**{limit: 1})
    session_id, unknown, damaged = await create(api), unknown_id(), await create(api)
    await raw.set(f"onboarding:{damaged}:events", "no stream", ex=60)
    for _ in range(3):
        assert (await api.get(stream_path(unknown))).status_code == 404
        assert (await api.get(stream_path(damaged))).status_code == 500
        assert (await api.head(stream_path(session_id))).status_code == 200

    await open_stream(api, session_id)
    for _ in range(3):
        await check_refused(api, session_id)


async def test_a_refusal_costs_the_store_nothing_and_takes_no_place(
    serve: Callable[..., Any], open_stream: Open
) -> None:
    api: AsyncClient = await serve(max_streams_per_session=1)
    session_id = await create(api)
    stream = await open_stream(api, session_id)
    for _ in range(20):
        await check_refused(api, session_id)
    stream.close()
    await wait_until_free(api, session_id)
    await open_stream(api, session_id)


async def test_a_client_that_leaves_before_its_stream_begins_keeps_no_place(
    settings: Settings, valkey: Valkey, raw: Redis
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        changed = {"redis_url": url, "max_streams": 1}
        async with serving(
            known_settings(**{**settings.model_dump(exclude_unset=True), **changed})
        ) as api:
            session_id = await create(api)
            await wait_until_free(api, session_id)
            async with asyncio.timeout(5):
                while await ask(raw, "PUBSUB", "CHANNELS", f"onboarding:{session_id}:*"):
                    await asyncio.sleep(0.001)
            subscribed = proxy.commands["SUBSCRIBE"]
            proxy.hold()
            source = EventSource(api.base_url, session_id)
            leaving = asyncio.create_task(source.open())
            async with asyncio.timeout(5):
                while proxy.commands["SUBSCRIBE"] == subscribed:
                    await asyncio.sleep(0.001)
            await check_refused(api, session_id)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            source.close()
            proxy.release()

            await wait_until_free(api, session_id)


async def test_head_says_what_get_would_and_ends(
    api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    head = await api.head(stream_path(session_id), timeout=5)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert head.headers["cache-control"] == "no-store"
    assert (await api.head(stream_path(unknown_id()))).status_code == 404

    # It leaves its connection as it should be, and keeps no place.
    for _ in range(20):
        assert (await api.head(stream_path(session_id))).status_code == 200
    for _ in range(16):
        await open_stream(api, session_id)


# --- How slow -------------------------------------------------------------------------------------


def listen_with_little_room(host: str, port: int) -> socket.socket:
    """Listen, with connections for which the kernel does not keep megabytes."""
    listener = listen(host, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    return listener


async def test_a_reader_that_stalls_is_cut_off_and_no_other_one_feels_it(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Any], open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.streaming.STALL_S", 0.5)
    monkeypatch.setattr("tests.service.listen", listen_with_little_room)
    api: AsyncClient = await serve(max_streams_per_session=2)
    session_id = await create(api)
    stalled = await open_stream(api, session_id, receive_buffer=4096)
    good = await open_stream(api, session_id)
    await check_refused(api, session_id)
    events = 200

    async def write() -> list[str]:
        return [(await report(api, session_id, message=MESSAGE))["id"] for _ in range(events)]

    written, received = await asyncio.gather(write(), good.receive_many(1 + events, 60))

    assert [event.id for event in received[1:]] == written
    await wait_until_free(api, session_id, 10)
    seen = await stalled.receive_all()
    assert not stalled.is_whole
    assert len(seen) < events
    # What it did get is the beginning, and it can go on from there.
    assert [event.id for event in seen[1:]] == written[: len(seen) - 1]
    again = await open_stream(api, session_id, last_event_id=stalled.last_event_id)
    _, *rest = await again.receive_many(2 + events - len(seen))
    assert [event.id for event in rest] == written[len(seen) - 1 :]
    # The good one is still there.
    last = await report(api, session_id)
    assert (await good.receive()).id == last["id"]


async def test_a_reader_that_is_slow_but_reads_is_not_cut_off(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.streaming.STALL_S", 1.0)
    for _ in range(150):
        await report(api, session_id, message=MESSAGE)
    slow = await open_stream(api, session_id, last_event_id="0", receive_buffer=4096)
    received = []
    for _ in range(152):
        received.append(await slow.receive())
        await asyncio.sleep(0.005)
    assert [event.type for event in received] == [
        *("snapshot", "session_created", *["progress"] * 150),
    ]


async def test_streams_that_wait_for_the_store_hold_nobody_else_up(
    settings: Settings, valkey: Valkey, raw: Redis
) -> None:
    """Many streams look at their logs at once, in a store that takes its time for each."""
    async with Proxy(valkey.port) as proxy, AsyncExitStack() as stack:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        slow = known_settings(**{**settings.model_dump(exclude_unset=True), "redis_url": url})
        api = await stack.enter_async_context(serving(slow))
        sessions = [await create(api) for _ in range(60)]
        for session_id in sessions:
            stream = await stack.enter_async_context(following(api.base_url, session_id))
            await stream.receive()
        proxy.delay(0.005)
        asked = proxy.commands["EVALSHA"]
        for session_id in sessions:
            await raw.publish(f"onboarding:{session_id}:events", "recorded")
        async with asyncio.timeout(5):
            while proxy.commands["EVALSHA"] == asked:
                await asyncio.sleep(0.001)

        try:
            async with asyncio.timeout(0.5):
                for session_id in sessions[:5]:
                    answer_of(await GET_PROGRESS.send(api, session_id))
        finally:
            proxy.delay(0)


# --- How long -------------------------------------------------------------------------------------


async def test_a_silent_session_sends_comments(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.05)
    stream = await open_stream(api, session_id)
    await stream.wait_for_comments(5)
    await report(api, session_id)
    await stream.wait_for_comments(10)
    assert [event.type for event in await stream.receive_many(2)] == ["snapshot", "progress"]


async def test_comments_come_though_the_store_says_again_and_again_what_is_not_new(
    monkeypatch: pytest.MonkeyPatch,
    api: AsyncClient,
    raw: Redis,
    session_id: str,
    open_stream: Open,
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.1)
    stream = await open_stream(api, session_id)
    waiting = asyncio.create_task(stream.wait_for_comments(3, limit_s=5))
    while not waiting.done():
        await raw.publish(f"onboarding:{session_id}:events", "recorded")
        await asyncio.sleep(0.01)
    await waiting


async def test_every_stream_has_comments_of_its_own_whoever_comes_and_goes(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.6)
    slow = await open_stream(api, await create(api))
    await slow.receive()
    monkeypatch.setattr("app.api.events.BEAT_S", 0.05)
    streams = []
    for number in range(12):
        streams.append(await open_stream(api, await create(api)))
        if number % 3 == 0:
            streams.pop(0).close()
    for stream in streams:
        await stream.wait_for_comments(2)
    for stream in streams:
        stream.close()
    # Its time came after theirs, and was not lost with them.
    await slow.wait_for_comments(2, limit_s=5)


async def test_a_stream_says_when_to_come_back_as_it_begins(
    api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    stream = await open_stream(api, session_id)
    await stream.receive()
    assert stream.retry_ms is not None
    assert 100 <= stream.retry_ms <= 10_000


async def test_an_old_stream_ends_with_a_hint_and_its_client_misses_nothing(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, session_id: str, open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.events.OLDEST_S", 0.2)
    stream = await open_stream(api, session_id)
    first = await report(api, session_id)
    snapshot, event = await stream.receive_many(2)
    assert (snapshot.type, event.id) == ("snapshot", first["id"])
    stream.retry_ms = None

    assert await stream.receive_all(5) == []

    assert stream.is_whole
    assert stream.retry_ms is not None
    second = await report(api, session_id)
    await stream.open()
    snapshot, event = await stream.receive_many(2)
    assert (snapshot.id, event.id) == (None, second["id"])
    await wait_until_free(api, session_id)


async def test_a_session_that_expires_ends_its_streams(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Any], raw: Redis, open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.05)
    api: AsyncClient = await serve(session_ttl_s=1)
    session_id = await create(api)
    streams = [await open_stream(api, session_id) for _ in range(2)]
    streams.append(await open_stream(api, session_id, last_event_id="0"))
    # A second is the shortest lifetime that can be set; nobody need wait it out.
    for key in ("metadata", "progress", "events", "ops"):
        await ask(raw, "PEXPIRE", f"onboarding:{session_id}:{key}", 100)

    for stream in streams:
        *_, deleted = await stream.receive_all(5)
        assert deleted.type == deleted.data["type"] == "deleted"
        assert stream.is_whole
    assert (await api.get(stream_path(session_id))).status_code == 404


async def test_a_stream_outlives_the_deadline_of_a_request(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Any], open_stream: Open
) -> None:
    monkeypatch.setattr("app.api.events.BEAT_S", 0.05)
    api: AsyncClient = await serve(request_deadline_s=0.6)
    session_id = await create(api)
    stream = await open_stream(api, session_id)
    await stream.wait_for_comments(16)
    last = await report(api, session_id)
    assert (await stream.receive_many(2))[1].id == last["id"]
