"""Sessions listed and counted by the Python names that operators call; the funnel of the steps."""

import asyncio
import importlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import time_machine
from redis.asyncio import Redis

from app.errors import InvalidRequestError
from app.onboarding.access import ANYONE, Kind, Principal
from app.onboarding.stats import median_of
from app.services.manager import OnboardingSessionManager, make_manager
from app.services.stats import StatsService, get_stats_service, make_stats_service
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import fake_gateway, known_settings
from tests.faults.servers import Valkey
from tests.onboarding.test_stats import bucket_of
from tests.store.sessions import Place

BY_NAME = [
    *("get_sessions_by_status", "get_session_count", "get_all_sessions_info"),
    *("get_performance_stats", "get_health_status"),
]
"""What callers import from the module or call on the service."""


@pytest.fixture
def service(gateway: Gateway) -> StatsService:
    """Give a service, on the fake store and on the real one in turn."""
    return make_stats_service(gateway, known_settings())


@pytest.fixture
def place(manager: OnboardingSessionManager, gateway: Gateway) -> Place:
    return Place(manager, gateway)


async def funnel(service: StatsService) -> dict[int, tuple[int, float | None]]:
    """Give the steps that were ever saved: how many saved each, and the median to the next."""
    steps = (await service.get_performance_stats())["funnel"]
    assert [step["step_id"] for step in steps] == [*range(1, 24)]
    return {
        step["step_id"]: (step["saved"], step["median_seconds_to_next"])
        for step in steps
        if step["saved"] or step["median_seconds_to_next"] is not None
    }


# --- By name --------------------------------------------------------------------------------------


@pytest.fixture
def own_service(monkeypatch: pytest.MonkeyPatch, valkey: Valkey) -> Iterator[None]:
    """Let the process make its own service anew, on the real store, which is empty."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    valkey.command("FLUSHDB")
    get_stats_service.cache_clear()
    yield
    get_stats_service.cache_clear()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.usefixtures("own_service")
def test_a_name_of_the_module_is_a_method_of_the_service(name: str) -> None:
    assert callable(getattr(importlib.import_module("app.services.stats"), name))
    assert callable(getattr(StatsService, name))


@pytest.mark.parametrize("tag", ["off", "on"])
@pytest.mark.usefixtures("own_service")
def test_the_names_of_the_module_work_in_one_event_loop_after_another(
    monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    monkeypatch.setenv("ONBOARDING_KEY_HASH_TAG", tag)
    module = importlib.import_module("app.services.stats")
    chosen = known_settings()
    manager = make_manager(connect(chosen), chosen)

    async def use() -> tuple[Any, ...]:
        # More than are read at a time.
        made = await asyncio.gather(*(manager.create_session(user_id="ada") for _ in range(40)))
        await manager.aclose()
        try:
            return (
                await module.get_session_count(),
                len(await module.get_sessions_by_status("pending")),
                len(await module.get_all_sessions_info(user_id="ada")),
                (await module.get_performance_stats())["total_sessions"],
                (await module.get_health_status())["overall_health"],
            )
        finally:
            for session_id in made:
                await manager.delete_session(session_id)
            await manager.aclose()
            await module.get_stats_service().aclose()

    for _ in range(2):
        assert asyncio.run(use()) == (40, 40, 40, 40, "healthy")


# --- Lists ----------------------------------------------------------------------------------------


async def test_sessions_of_a_status_are_listed_by_it_or_its_word(
    service: StatsService, place: Place
) -> None:
    pending, failed = [await place.manager.create_session() for _ in range(2)]
    await place.generation.update_session_status(failed, "error")
    generation = importlib.import_module("app.services.generation")
    for status, expected in (
        ("pending", [pending]),
        ("error", [failed]),
        (generation.SessionStatus.ERROR, [failed]),
        ("complete", []),
    ):
        rows = await service.get_sessions_by_status(status)
        assert [row["session_id"] for row in rows] == expected
    assert len(await service.get_sessions_by_status("error", limit=1)) == 1


async def test_everything_is_listed_over_as_many_pages_as_it_takes(
    service: StatsService, place: Place
) -> None:
    made = {await place.manager.create_session(workspace_id=f"w{n % 2}") for n in range(9)}
    rows = await service.get_all_sessions_info(limit=2)
    assert {row["session_id"] for row in rows} == made
    assert len(rows) == 9
    times = [row["created_at"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert len(await service.get_all_sessions_info(limit=2, workspace_id="w1")) == 4


async def test_a_session_by_any_name_is_listed(service: StatsService, place: Place) -> None:
    names = ["a", "A.b_c-d", "0" * 40, "-", "index"]
    for name in names:
        await place.manager.set_metadata(name, "u" * 128, None)
        await place.manager.save_step(name, 1, {"a": 1})
    for limit in (1, 2, 50):
        rows = await service.get_all_sessions_info(limit=limit)
        assert sorted(row["session_id"] for row in rows) == sorted(names)
    assert rows[0]["user_id"] == "u" * 128
    assert rows[0]["workspace_id"] is None


async def test_what_cannot_be_listed_is_refused(service: StatsService) -> None:
    bad: list[dict[str, Any]] = [
        *({"status": status} for status in ("asleep", "", "PENDING")),
        *({"limit": limit} for limit in (0, 1001, -1)),
        *({"cursor": cursor} for cursor in ("", "x", "é", "\ud800")),
    ]
    for asked in bad:
        with pytest.raises(InvalidRequestError):
            await service.list_sessions(**asked)


# --- The funnel -----------------------------------------------------------------------------------


async def test_a_session_counts_once_for_a_step_however_often_it_saves_it(
    service: StatsService, place: Place
) -> None:
    manager = place.manager
    session_id = await manager.create_session()
    for _ in range(3):
        await manager.save_step(session_id, 1, {"a": 1})
    await manager.delete_step(session_id, 1)
    await manager.save_step(session_id, 1, {"a": 2})
    await manager.patch_step(session_id, 1, {"b": 2})
    await manager.save_draft(session_id, 2, {"a": 2})
    assert set(await funnel(service)) == {1}
    await manager.promote_draft_to_step(session_id, 2)
    await manager.finalize(session_id)
    await manager.reopen(session_id)
    await manager.save_steps(session_id, {1: {"a": 1}, 2: {"a": 2}, 5: {"a": 5}})
    await manager.set_metadata(session_id, "ada", "w2")
    counted = await funnel(service)
    assert {step: saved for step, (saved, _) in counted.items()} == {1: 1, 2: 1, 5: 1}


async def test_steps_of_a_batch_count_and_follow_one_another_at_once(
    service: StatsService, place: Place
) -> None:
    session_id = await place.manager.create_session()
    await place.manager.save_steps(session_id, {n: {"a": n} for n in (3, 1, 2)})
    counted = await funnel(service)
    assert {step: saved for step, (saved, _) in counted.items()} == {1: 1, 2: 1, 3: 1}
    at_once = median_of({0: 1})
    assert [counted[step][1] for step in (1, 2, 3)] == [at_once, at_once, None]


async def test_a_session_that_is_gone_still_counts_and_one_that_saved_nothing_does_not(
    service: StatsService, place: Place
) -> None:
    for step in (1, 2):
        session_id = await place.manager.create_session()
        await place.manager.save_steps(session_id, {n: {"a": n} for n in range(1, step + 1)})
        await place.manager.delete_session(session_id)
    await place.manager.create_session()
    counted = await funnel(service)
    assert {step: saved for step, (saved, _) in counted.items()} == {1: 2, 2: 1}


async def test_a_session_that_is_made_anew_under_its_name_counts_again(
    service: StatsService, place: Place
) -> None:
    for _ in range(2):
        await place.manager.set_metadata("test-session-001", "u1", "w1")
        await place.manager.save_step("test-session-001", 1, {"a": 1})
        await place.manager.delete_session("test-session-001")
    assert (await funnel(service))[1][0] == 2


async def test_the_median_is_that_of_the_times_between_a_step_and_the_next(
    service: StatsService, place: Place, clock: time_machine.Traveller
) -> None:
    waits = [5, 40, 600, 10, 90_000]
    for wait_s in waits:
        session_id = await place.manager.create_session()
        await place.manager.save_step(session_id, 1, {"a": 1})
        clock.shift(wait_s)
        await place.manager.save_step(session_id, 2, {"a": 2})
        clock.shift(3600)
        # Saved anew, and out of order: no time of these tells how long the next one took.
        await place.manager.save_step(session_id, 2, {"a": 3})
        await place.manager.save_step(session_id, 4, {"a": 4})
        clock.shift(3600)
        await place.manager.save_step(session_id, 3, {"a": 3})
    counted = await funnel(service)
    assert {saved for saved, _ in counted.values()} == {5}
    assert counted[1][1] == pytest.approx(40, rel=0.2)
    assert counted[2][1] == pytest.approx(3600, rel=0.2)
    assert counted[3][1] is None
    assert counted[4][1] is None


async def test_a_time_is_counted_in_the_bucket_that_its_reader_takes_it_from(
    place: Place, clock: time_machine.Traveller
) -> None:
    waits_ms = [0, 1, 188, 189, 190, 413, 414, 415, 681, 682, 999, 1000, 1001, 2999, 3000]
    waits_ms += [7000, 15_000, 31_000, 1_023_000, 3_600_000, 86_400_000, 500_000_000]
    session_id = await place.manager.create_session()
    await place.manager.save_step(session_id, 1, {"a": 1})
    for step, wait_ms in enumerate(waits_ms, start=2):
        clock.shift(wait_ms / 1000)
        await place.manager.save_step(session_id, step, {"a": 1})
    times = [
        int(await place.gateway.command("HGET", *_saved_at(place, session_id, step)))
        for step in range(1, len(waits_ms) + 2)
    ]
    key = place.gateway.keys.index(f"funnel:{place.manager.catalogue.pin}")
    flat = await place.gateway.command("HGETALL", key)
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    gaps = {name.decode() for name, _ in pairs if name.startswith(b"gap:")}
    assert gaps == {
        f"gap:{step}:{bucket_of((after - before) / 1000)}"
        for step, (before, after) in enumerate(pairwise(times), start=1)
    }


def _saved_at(place: Place, session_id: str, step: int) -> tuple[str, str]:
    return place.gateway.keys.session(session_id).progress, f"s{step}"


async def test_many_at_once_are_counted_exactly(service: StatsService, place: Place) -> None:
    async def fill(number: int) -> None:
        session_id = await place.manager.create_session()
        for _ in range(2):
            await asyncio.gather(
                *(place.manager.save_step(session_id, n, {"a": n}) for n in (1, 2, 3)[: number % 4])
            )

    await asyncio.gather(*(fill(number) for number in range(20)))
    counted = await funnel(service)
    assert {step: saved for step, (saved, _) in counted.items()} == {1: 15, 2: 10, 3: 5}


@pytest.mark.parametrize("store", ["fakeredis", "valkey"])
async def test_with_hash_tags_the_funnel_is_exact_once_the_index_has_followed(
    settings: Settings, raw: Redis, store: str
) -> None:
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), "key_hash_tag": "on"})
    gateway = fake_gateway(key_hash_tag="on") if store == "fakeredis" else connect(chosen)
    manager, service = make_manager(gateway, chosen), make_stats_service(gateway, chosen)
    try:
        for last in (1, 2, 3):
            session_id = await manager.create_session()
            await manager.save_step(session_id, 1, {"a": 1})
            await manager.save_steps(session_id, {n: {"a": n} for n in range(1, last + 1)})
            await manager.delete_step(session_id, 1)
            await manager.save_step(session_id, 1, {"a": 1})
        await gateway.aclose()
        assert {step: saved for step, (saved, _) in (await funnel(service)).items()} == {
            1: 3,
            2: 2,
            3: 1,
        }
        await manager.save_steps(session_id, {1: {"b": 1}, 4: {"a": 4}})
        await gateway.aclose()
        await manager.delete_session(session_id)
        await gateway.aclose()
        assert {step: saved for step, (saved, _) in (await funnel(service)).items()} == {
            1: 3,
            2: 2,
            3: 1,
            4: 1,
        }
        async with asyncio.timeout(2):
            late = await manager.create_session()
            await manager.save_step(late, 7, {"a": 1})
            while (await funnel(service)).get(7) is None:
                await asyncio.sleep(0.02)
    finally:
        await gateway.aclose()


# --- One's own ------------------------------------------------------------------------------------

ALICE = Principal(Kind.USER, "alice", "w1")


async def begin_for(place: Place, user_id: str | None, workspace_id: str | None) -> str:
    return await place.manager.create_session(user_id=user_id, workspace_id=workspace_id)


async def own_ids(service: StatsService, principal: Principal, **query: Any) -> set[str]:
    page = await service.list_own_sessions(principal, **query)
    assert page["next_cursor"] is None
    return {row["session_id"] for row in page["sessions"]}


async def test_a_user_sees_their_own_sessions_whoever_they_ask_for(
    service: StatsService, place: Place
) -> None:
    hers = {await begin_for(place, "alice", "w1") for _ in range(2)}
    elsewhere = await begin_for(place, "alice", "w2")
    for user_id, workspace_id in (("bob", "w1"), (None, "w1"), ("alice2", "w1")):
        await begin_for(place, user_id, workspace_id)
    for query in ({}, {"user_id": "bob"}, {"workspace_id": "w1"}):
        assert await own_ids(service, ALICE, **query) == hers
    assert await own_ids(service, ALICE, workspace_id="w2") == set()
    assert await own_ids(service, replace(ALICE, workspace_id="w2")) == {elsewhere}


async def test_a_user_of_no_workspace_sees_the_sessions_of_none(
    service: StatsService, place: Place
) -> None:
    await begin_for(place, "alice", "w1")
    own = await begin_for(place, "alice", None)
    nowhere = replace(ALICE, workspace_id=None)
    assert await own_ids(service, nowhere) == {own}
    assert await own_ids(service, nowhere, workspace_id="w1") == set()


async def test_where_nobody_says_who_they_are_the_question_says_whose(
    service: StatsService, place: Place
) -> None:
    own = await begin_for(place, "alice", "w1")
    other = await begin_for(place, "alice", None)
    assert await own_ids(service, ANYONE, user_id="alice") == {own, other}
    assert await own_ids(service, ANYONE, user_id="alice", workspace_id="w1") == {own}
    for user_id in (None, ""):
        with pytest.raises(InvalidRequestError):
            await service.list_own_sessions(ANYONE, user_id=user_id, workspace_id="w1")


@pytest.mark.parametrize("limit", [0, 101])
async def test_a_page_of_ones_own_is_of_1_to_100(service: StatsService, limit: int) -> None:
    with pytest.raises(InvalidRequestError):
        await service.list_own_sessions(ALICE, limit=limit)
