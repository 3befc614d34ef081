"""Live streams of the service as an operator starts it: what each of them sees of its end."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from httpx2 import AsyncClient

from tests.events import Event, EventSource, following
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.process.conftest import StartService
from tests.process.service_process import ServiceProcess, begin_session, linux_only
from tests.service import BASE

pytestmark = linux_only

STREAMS = 50


@asynccontextmanager
async def followers(service: ServiceProcess, count: int) -> AsyncIterator[list[EventSource]]:
    """Follow ten sessions, `count` streams in all, each of which has begun."""
    with service.client() as client:
        sessions = [begin_session(client) for _ in range(10)]
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(following(service.url, sessions[number % 10]))
            for number in range(count)
        ]
        for stream in streams:
            assert (await stream.receive()).type == "snapshot"
        yield streams


async def see_the_end(streams: list[EventSource], limit_s: float) -> None:
    """Check that each stream is ended by `bye`, in time and in order."""
    async with asyncio.timeout(limit_s):
        ends = await asyncio.gather(*(stream.receive_all() for stream in streams))
    for events, stream in zip(ends, streams, strict=True):
        check_bye(events)
        assert stream.is_whole


def check_bye(events: list[Event]) -> None:
    (bye,) = events
    # Without an id: whoever comes back goes on after the last event.
    assert (bye.type, bye.id) == ("bye", None)
    assert bye.data["type"] == "bye"


def check_ended(service: ServiceProcess) -> None:
    """Check that it ended in order."""
    assert service.wait_for_exit(0) == 0
    assert service.leaves_nothing_running()
    assert service.stderr == ""


def check_uncomplaining(service: ServiceProcess) -> None:
    """Check that it saw nothing wrong."""
    assert [line for line in service.lines if line["level"] not in ("info", "debug")] == []


@pytest.mark.parametrize("workers", [1, 2])
async def test_every_stream_sees_bye_when_the_service_ends_without_a_drain(
    start: StartService, workers: int
) -> None:
    service = start(WEB_CONCURRENCY=str(workers), ONBOARDING_DRAIN_S="0")
    service.wait_until_ready(workers)
    async with followers(service, STREAMS) as streams:
        service.send(signal.SIGTERM)
        begun_s = time.monotonic()
        exited = asyncio.create_task(asyncio.to_thread(service.wait_for_exit, 5.0))

        await see_the_end(streams, 3.0)
        assert await exited == 0
        assert time.monotonic() - begun_s < 3.0
    check_ended(service)
    check_uncomplaining(service)


@pytest.mark.parametrize("to", ["process", "group"])
@pytest.mark.parametrize("workers", [1, 2])
async def test_sigint_ends_it_without_the_drain_and_every_stream_sees_bye(
    start: StartService, workers: int, to: str
) -> None:
    service = start(WEB_CONCURRENCY=str(workers), ONBOARDING_DRAIN_S="5")
    service.wait_until_ready(workers)
    assert len(service.stores()) == 1
    async with followers(service, 10) as streams:
        (service.send if to == "process" else service.send_to_group)(signal.SIGINT)
        exited = asyncio.create_task(asyncio.to_thread(service.wait_for_exit, 3.0))

        await see_the_end(streams, 3.0)
        assert await exited == 0
    check_ended(service)
    assert service.events.count("process_stopped") == workers
    assert service.events[-1] == "service_stopped"


@pytest.mark.parametrize("workers", [1, 2])
async def test_bye_comes_as_the_drain_begins_and_requests_are_served_on_whatever_is_sent_again(
    start: StartService, workers: int
) -> None:
    service = start(WEB_CONCURRENCY=str(workers), ONBOARDING_DRAIN_S="2")
    service.wait_until_ready(workers)
    with service.client() as client:
        session_id = begin_session(client)
    async with followers(service, STREAMS) as streams:
        service.send(signal.SIGTERM)
        await see_the_end(streams, 1.5)
    # Whoever is impatient sends it twice.
    service.send(signal.SIGTERM)

    async with AsyncClient(base_url=service.url, trust_env=False) as api:
        body = {"stage": "during the drain", "progress": 1}
        assert (await api.post(f"{BASE}/{session_id}/events", json=body)).status_code == 201
        # Who comes during the drain learns how the session is, and to go elsewhere.
        for last_event_id in (None, "0"):
            stream = following(service.url, session_id, last_event_id=last_event_id)
            async with stream as late:
                snapshot, *events = await late.receive_all(1.0)
                assert snapshot.type == "snapshot"
                check_bye(events)
        assert (await api.get(f"{BASE}/{session_id}")).status_code == 200
    assert not service.has_ended()
    assert await asyncio.to_thread(service.wait_for_exit, 5.0) == 0
    check_ended(service)
    check_uncomplaining(service)


async def test_bye_does_not_wait_for_a_store_that_hangs(
    start: StartService, tmp_path: Path
) -> None:
    with Valkey.start(tmp_path / "store") as store:
        async with Proxy(store.port) as proxy:
            service = start(
                REDIS_URL=f"redis://{proxy.host}:{proxy.port}/0",
                ONBOARDING_REDIS_TIMEOUT_S="8",
                ONBOARDING_DRAIN_S="0",
            )
            await asyncio.to_thread(service.wait_until_ready)
            async with AsyncClient(base_url=service.url, trust_env=False) as api:
                created = await api.post(f"{BASE}/session", json={"workspace_id": "w1"})
                session_id = created.json()["session_id"]
            async with following(service.url, session_id) as stream:
                await stream.receive()
                # The stream is told to look at its log, and its look is not answered.
                proxy.drop_replies(1000, to="EVALSHA")
                asked = proxy.commands["EVALSHA"]
                store.command("PUBLISH", f"onboarding:{session_id}:events", "recorded")
                async with asyncio.timeout(5):
                    while proxy.commands["EVALSHA"] == asked:
                        await asyncio.sleep(0.001)

                service.send(signal.SIGTERM)

                await see_the_end([stream], 3.0)
            assert await asyncio.to_thread(service.wait_for_exit, 5.0) == 0


async def test_an_idle_stream_takes_twenty_kilobytes_at_most(start: StartService) -> None:
    service = start(ONBOARDING_DRAIN_S="0").wait_until_it_answers()
    url, count = service.url, 300
    with service.client() as client:
        sessions = [begin_session(client) for _ in range(2 * count)]

    async def follow(stack: AsyncExitStack, some: list[str]) -> None:
        for session_id in some:
            stream = await stack.enter_async_context(following(url, session_id))
            assert (await stream.receive()).type == "snapshot"

    async with AsyncExitStack() as stack:
        # The first ones pay for what all of them share.
        await follow(stack, sessions[:count])
        before = resident_bytes(service.pid)
        await follow(stack, sessions[count:])
        each = (resident_bytes(service.pid) - before) / count

    assert each <= 20_000


def resident_bytes(pid: int) -> int:
    """Read how much memory a process has."""
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024
