"""Callbacks: told of what happens to any session, in order, whatever becomes of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import structlog
import time_machine
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.errors import InvalidRequestError, SessionCapacityError, StoreUnavailableError
from app.onboarding.events import FEED_TYPES
from app.onboarding.generation import ProgressEvent
from app.onboarding.tasks import TASK_RULES
from app.services import feed
from app.services.manager import OnboardingSessionManager, make_manager
from app.services.retention import RetentionService, make_retention_service
from app.services.tasks import TaskService
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import NOON_S, fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.store.sessions import Place, prepare, working_at

LIMIT_S = 5
"""How long anything may take to be told."""

Event = dict[str, Any]


@pytest.fixture(autouse=True)
def logs_and_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and soon again; forget loggers that a service of another test has bound."""
    monkeypatch.setattr(feed, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(feed, "TRY_AGAIN_S", 0.1)
    monkeypatch.setattr(feed, "log", structlog.get_logger())


def make_service(gateway: Gateway, **overrides: Any) -> RetentionService:
    settings = known_settings(**overrides)
    return make_retention_service(gateway, TaskService(gateway, TASK_RULES), settings)


@pytest.fixture
async def service(gateway: Gateway) -> AsyncIterator[RetentionService]:
    """Give a service, on the fake store and on the real one in turn."""
    service = make_service(gateway)
    yield service
    await service.aclose()


@pytest.fixture
def place(manager: OnboardingSessionManager, gateway: Gateway) -> Place:
    return Place(manager, gateway)


class Ear:
    """Hears events, and can be waited for."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.heard.append(event)

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.heard]

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not is_true():
                await asyncio.sleep(0.005)

    async def hears(self, count: int) -> list[Event]:
        """Wait for so many events; give them all, of which there must be no more."""
        await self.until(lambda: len(self.heard) >= count)
        assert len(self.heard) == count, self.types
        return self.heard


async def listen(service: RetentionService, *types: str) -> Ear:
    ear = Ear()
    for event_type in types or FEED_TYPES:
        await service.register_session_callback(event_type, ear)
    return ear


async def test_every_type_of_event_is_told_with_what_it_is_about(
    service: RetentionService, place: Place
) -> None:
    ear = await listen(service)
    manager, generation = place.manager, place.generation
    session_id = await manager.create_session(workspace_id="w1")
    await manager.save_step(session_id, 2, {"a": 1})
    await manager.delete_step(session_id, 2)
    await manager.set_metadata(session_id, "ada", "w2")
    await generation.set_language_preference(session_id, "de")
    await generation.add_progress_event(ProgressEvent(session_id, "s", 40, "m"))
    await manager.save_step(session_id, 1, {"a": 1})
    await manager.finalize(session_id)
    await manager.reopen(session_id)
    await generation.update_session_status(session_id, "error", "It broke")
    await generation.store_result(session_id, b"x")
    await service.recover_corrupted_session(session_id)
    await manager.delete_session(session_id)
    heard = await ear.hears(13)
    assert [event["type"] for event in heard] == [
        *("session_created", "step_saved", "step_deleted", "metadata_changed"),
        *("language_changed", "progress", "step_saved", "finalized", "reopened"),
        *("status_changed", "result_stored", "recovered", "deleted"),
    ]
    assert {event["session_id"] for event in heard} == {session_id}
    assert all(event["id"] and event["at"].endswith("Z") for event in heard)
    by_type = {event["type"]: event for event in heard}
    assert by_type["step_deleted"]["step_id"] == 2
    assert (by_type["step_saved"]["step_id"], by_type["step_saved"]["version"]) == (1, 1)
    assert by_type["progress"]["progress"] == 40
    assert by_type["status_changed"]["error_message"] == "It broke"
    assert by_type["recovered"]["lost"] == 0
    assert by_type["deleted"]["reason"] == "request"


async def test_the_end_of_a_session_is_told_by_what_ended_it() -> None:
    with time_machine.travel(NOON_S, tick=False) as clock:
        chosen = known_settings(
            max_sessions=2,
            capacity_policy="evict_oldest",
            expiry_rules='[{"status": "error", "older_than_hours": 1, "since": "ended"}]',
        )
        gateway = fake_gateway()
        place = Place(make_manager(gateway, chosen), gateway)
        service = make_retention_service(gateway, TaskService(gateway, TASK_RULES), chosen)
        ear = await listen(service, "deleted", "expired", "evicted")
        try:
            evicted = await place.manager.create_session()
            clock.shift(1)
            failed, made = [await place.manager.create_session() for _ in range(2)]
            [event] = await ear.hears(1)
            assert (event["type"], event["session_id"]) == ("evicted", evicted)
            assert event["reason"] == "capacity"

            await place.generation.update_session_status(failed, "error")
            clock.shift(3600)
            await service.reconfigure(max_sessions=1)  # sweeps at once
            event = (await ear.hears(2))[1]
            assert (event["type"], event["session_id"]) == ("expired", failed)
            assert event["reason"] == "rule"

            clock.shift(8 * 86_400)
            last = await place.manager.create_session()
            event = (await ear.hears(3))[2]
            assert (event["type"], event["session_id"]) == ("expired", made)
            assert event["reason"] == "lifetime"

            await service.force_cleanup_all()
            event = (await ear.hears(4))[3]
            assert (event["type"], event["session_id"]) == ("deleted", last)
            assert event["reason"] == "cleanup"
        finally:
            await service.shutdown()


async def test_what_was_before_the_registration_and_what_is_refused_is_not_told(
    service: RetentionService, place: Place
) -> None:
    before = await place.manager.create_session()
    ear = await listen(service)
    with pytest.raises(OSError, match="mine"):
        async with place.manager.session():
            raise OSError("mine")
    await place.manager.save_draft(before, 1, {"a": 1})
    await place.manager.update_progress(before, 4)
    await place.manager.save_step(before, 1, {"a": 1})
    assert [event["type"] for event in await ear.hears(3)] == [
        *("session_created", "deleted", "step_saved")
    ]


async def test_a_callback_is_told_of_its_type_alone_and_every_callback_in_turn(
    service: RetentionService, place: Place
) -> None:
    told: list[tuple[str, str]] = []
    done = Ear()

    async def slowly(event: Event) -> None:
        await asyncio.sleep(0.001)
        told.append(("slowly", event["session_id"]))

    await service.register_session_callback("step_saved", slowly)
    await service.register_session_callback(
        "step_saved", lambda e: told.append(("at once", e["session_id"]))
    )
    await service.register_session_callback("deleted", done)
    made = [await prepare(place.manager) for _ in range(3)]
    for session_id in made:
        await place.manager.delete_session(session_id)
    await done.hears(3)
    assert told == [
        (who, session_id) for session_id in made for _ in (1, 2) for who in ("slowly", "at once")
    ]


async def test_hundreds_of_events_at_once_are_each_told_once_in_the_order_of_each_session(
    service: RetentionService, place: Place
) -> None:
    ear = await listen(service, "step_saved")
    made = [await place.manager.create_session() for _ in range(10)]

    async def fill(session_id: str) -> None:
        for step in range(1, 24):
            await place.manager.save_step(session_id, step, {"a": step})

    await asyncio.gather(*map(fill, made))
    heard = await ear.hears(230)
    for session_id in made:
        steps = [event["step_id"] for event in heard if event["session_id"] == session_id]
        assert steps == [*range(1, 24)]


async def test_a_callback_that_fails_is_logged_and_the_others_are_told_all_the_same(
    service: RetentionService, place: Place
) -> None:
    ear = Ear()

    def fail(event: Event) -> None:
        event.clear()
        raise ZeroDivisionError("a secret of the callback")

    async def fail_slowly(event: Event) -> None:
        await asyncio.sleep(0)
        raise KeyError(event["session_id"])

    with capture_logs() as lines:
        for callback in (fail, fail_slowly, ear):
            await service.register_session_callback("session_created", callback)
        made = [await place.manager.create_session() for _ in range(2)]
        heard = await ear.hears(2)
    assert [event["session_id"] for event in heard] == made
    failures = [line for line in lines if line["event"] == "callback_failed"]
    assert [line["exception"] for line in failures] == ["ZeroDivisionError", "KeyError"] * 2
    assert [line["session_id"] for line in failures] == [each for each in made for _ in (1, 2)]
    assert all(line["log_level"] == "error" for line in failures)
    assert "secret" not in str(lines)


async def test_a_callback_that_waits_for_what_was_cancelled_stops_nobody(
    service: RetentionService, place: Place
) -> None:
    ear = Ear()

    async def wait_in_vain(_: Event) -> None:
        cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await cancelled

    await service.register_session_callback("session_created", wait_in_vain)
    await service.register_session_callback("session_created", ear)
    made = [await place.manager.create_session() for _ in range(2)]
    assert [event["session_id"] for event in await ear.hears(2)] == made


async def test_a_callback_may_use_the_sessions_and_register_another(
    service: RetentionService, place: Place
) -> None:
    ear = Ear()

    async def greet(event: Event) -> None:
        await service.atomic_session_update(event["session_id"], {"language": "de"})
        await service.register_session_callback("deleted", ear)
        await place.manager.delete_session(event["session_id"])

    await service.register_session_callback("session_created", greet)
    session_id = await place.manager.create_session()
    assert [event["session_id"] for event in await ear.hears(1)] == [session_id]


@pytest.mark.parametrize("event_type", ["", "created", "*", "Deleted", "snapshot", "bye"])
async def test_a_type_that_there_is_not_is_refused_at_once(
    service: RetentionService, event_type: str
) -> None:
    with pytest.raises(InvalidRequestError, match="session_created"):
        service.register_session_callback(event_type, print)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "feed"]


async def test_nobody_is_told_after_the_end_until_somebody_registers_again(
    service: RetentionService, place: Place
) -> None:
    ear = await listen(service, "session_created")
    await place.manager.create_session()
    await ear.hears(1)
    assert await service.shutdown(timeout=5) is True
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "feed"]
    await place.manager.create_session()
    again = await listen(service, "deleted")
    session_id = await place.manager.create_session()
    await place.manager.delete_session(session_id)
    assert [event["session_id"] for event in await again.hears(1)] == [session_id]
    assert [event["session_id"] for event in ear.heard[1:]] == [session_id]


async def test_what_others_write_into_the_feed_is_passed_over(
    service: RetentionService, place: Place
) -> None:
    ear = await listen(service)
    key = place.gateway.keys.index("feed")
    for fields in (
        ["x", "y"],
        ["type", "deleted", "session_id", "s"],
        ["type", "deleted", "at", "1"],
    ):
        await place.gateway.command("XADD", key, "*", *fields)
    await place.gateway.command("XADD", key, "*", "type", "nobody", "session_id", "s", "at", "1")
    session_id = await place.manager.create_session()
    assert [event["session_id"] for event in await ear.hears(1)] == [session_id]


async def test_an_outage_is_logged_and_what_happens_after_it_is_told(
    raw: Redis, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        async with (
            working_at(url, retry_attempts=1, redis_timeout_s=0.2) as heard_over,
            working_at(valkey.url) as place,
        ):
            service = make_service(heard_over.gateway)
            ear = await listen(service, "session_created")
            first = await place.manager.create_session()
            await ear.hears(1)
            with capture_logs() as lines:
                proxy.refuse()
                proxy.reset_all()
                await ear.until(lambda: any(line["event"] == "feed_unreachable" for line in lines))
                with pytest.raises(StoreUnavailableError):
                    await heard_over.manager.create_session()
                # Happens while nobody can hear it.
                meanwhile = await place.manager.create_session()
                proxy.accept()
                later = await place.manager.create_session()
                heard = await ear.hears(3)
            assert [event["session_id"] for event in heard] == [first, meanwhile, later]
            assert await service.shutdown(timeout=5) is True


async def test_a_registration_while_the_store_is_away_holds_once_it_is_back_or_ends(
    raw: Redis, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        async with working_at(url, retry_attempts=1, redis_timeout_s=0.2) as place:
            service = make_service(place.gateway)
            proxy.refuse()
            ear = Ear()
            begun = asyncio.ensure_future(service.register_session_callback("deleted", ear))
            with capture_logs() as lines:
                await ear.until(lambda: any(line["event"] == "feed_unreachable" for line in lines))
            assert not begun.done()
            proxy.accept()
            await asyncio.wait_for(begun, LIMIT_S)
            session_id = await place.manager.create_session()
            await place.manager.delete_session(session_id)
            assert [event["session_id"] for event in await ear.hears(1)] == [session_id]
            await service.shutdown(timeout=5)

            # Who waits for a registration that will not come is not left waiting.
            proxy.refuse()
            proxy.reset_all()
            waiting = asyncio.ensure_future(service.register_session_callback("deleted", ear))
            await asyncio.sleep(0)
            assert await service.shutdown(timeout=5) is True
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            waiting.cancel()
            assert done


async def test_with_hash_tags_everything_is_told_once_soon_after(
    settings: Settings, raw: Redis
) -> None:
    chosen = known_settings(
        **{**settings.model_dump(exclude_unset=True), "key_hash_tag": "on", "max_sessions": 2}
    )
    gateway = connect(chosen)
    service = make_service(gateway)
    place = Place(make_manager(gateway, chosen), gateway)
    try:
        ear = await listen(service)
        session_id = await place.manager.create_session()
        await place.manager.save_step(session_id, 1, {"a": 1})
        await ear.hears(2)
        await place.manager.save_step(session_id, 2, {"a": 1})
        await ear.hears(3)
        other = await place.manager.create_session()
        await ear.hears(4)
        with pytest.raises(SessionCapacityError):
            await place.manager.create_session()
        await place.manager.delete_session(session_id)
        heard = await ear.hears(5)
        assert [(event["type"], event["session_id"]) for event in heard] == [
            ("session_created", session_id),
            ("step_saved", session_id),
            ("step_saved", session_id),
            ("session_created", other),
            ("deleted", session_id),
        ]
    finally:
        await service.shutdown()
