"""Two workers of one service: they share a store, see what the other does, and are replaced."""

import os
import signal
from contextlib import AsyncExitStack

import pytest
from httpx2 import AsyncClient

from tests.events import following
from tests.process.conftest import StartService
from tests.process.service_process import (
    ServiceProcess,
    begin_session,
    frozen,
    linux_only,
    save_step,
)
from tests.service import BASE

pytestmark = linux_only


@pytest.fixture(scope="module")
def pair(start_shared: StartService) -> ServiceProcess:
    """Give a service of two workers."""
    return start_shared(WEB_CONCURRENCY="2", ONBOARDING_DRAIN_S="0").wait_until_ready(2)


def test_two_workers_share_one_embedded_store(pair: ServiceProcess) -> None:
    first, second = pair.workers()
    assert len(pair.stores()) == 1

    # While one worker stands still, the other one takes every new connection.
    with frozen(second), pair.client() as client:
        session_id = begin_session(client)
        assert save_step(client, session_id, 1, a=1).status_code == 200
    with frozen(first), pair.client() as client:
        assert client.get(f"{BASE}/{session_id}/steps/1").json()["data"] == {"a": 1}
        assert save_step(client, session_id, 1, a=2).json()["version"] == 2
    with frozen(second), pair.client() as client:
        assert client.get(f"{BASE}/{session_id}/steps/1").json()["data"] == {"a": 2}


def test_a_session_is_read_through_every_connection(pair: ServiceProcess) -> None:
    with pair.client() as client:
        session_id = begin_session(client)

    found = [pair.get(f"{BASE}/{session_id}").status_code for _ in range(20)]

    assert found == [200] * 20


async def test_streams_of_two_workers_see_what_either_of_them_writes(pair: ServiceProcess) -> None:
    with pair.client() as client:
        session_id = begin_session(client)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(following(pair.url, session_id)) for _ in range(8)
        ]
        for number in range(20):
            # Each on a connection of its own, which either worker may take.
            async with AsyncClient(base_url=pair.url, trust_env=False) as api:
                body = {"stage": f"{number}", "progress": number}
                assert (await api.post(f"{BASE}/{session_id}/events", json=body)).status_code == 201
        for stream in streams:
            _, *events = await stream.receive_many(21)
            assert [event.data["progress"] for event in events] == list(range(20))


def test_a_worker_that_is_killed_is_replaced_and_no_session_is_lost(pair: ServiceProcess) -> None:
    stores, started = pair.stores(), pair.events.count("process_started")
    with pair.client() as client:
        session_id = begin_session(client)

    os.kill(pair.workers()[0], signal.SIGKILL)

    pair.wait_for_event("process_started", count=started + 1)
    assert len(pair.workers()) == 2
    assert pair.stores() == stores
    assert [pair.get(f"{BASE}/{session_id}").status_code for _ in range(8)] == [200] * 8
    assert pair.get("/health").json()["status"] == "ok"
