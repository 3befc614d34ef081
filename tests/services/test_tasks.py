"""Tasks by the Python names that workers call: begun, ended, released, cleaned up."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import time_machine
from structlog.testing import capture_logs

from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    InvalidTransitionError,
    StoreUnavailableError,
    TaskExistsError,
    TaskNotFoundError,
)
from app.onboarding.tasks import MAX_TASKS, TASK_RULES, TaskRule, TaskStatus
from app.services import tasks as module
from app.services.tasks import CLEANED_AT_ONCE, TaskService, get_task_service
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.servers import HOST, Valkey, free_ports

DAY_S = 86_400

ORDINARY = [
    *("image_analysis", "video_generation", "finalize_short", "save_scenario"),
    *("content_analysis", "data_extraction", "bcm_generation"),
]
"""The types whose tasks are removed when they end."""

ENDS = {
    "completed": TaskService.complete_task,
    "failed": TaskService.fail_task,
    "cancelled": TaskService.cancel_task,
}
"""The ways to end, with what a worker calls."""


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    monkeypatch.setattr(module, "log", structlog.get_logger())


@pytest.fixture
def service(gateway: Gateway) -> TaskService:
    """Give a service, on the fake store and on the real one in turn."""
    return TaskService(gateway, TASK_RULES)


@pytest.fixture(params=["off", "on"])
def aging(clock: time_machine.Traveller, request: pytest.FixtureRequest) -> TaskService:
    """Give a service whose store goes by `clock`, without hash tags and with them."""
    return TaskService(fake_gateway(key_hash_tag=request.param), TASK_RULES)


@pytest.fixture
async def away() -> AsyncIterator[TaskService]:
    """Give a service whose store is not there."""
    [port] = free_ports(1)
    settings = known_settings(redis_url=f"redis://{HOST}:{port}/0", retry_attempts=1, **QUICKLY)
    service = TaskService(connect(settings), TASK_RULES)
    yield service
    await service.aclose()


async def keys_of(service: TaskService) -> list[bytes]:
    return [*await service._gateway.command("KEYS", "*")]


def ids_of(tasks: list[Any]) -> list[str]:
    return [task["task_id"] for task in tasks]


# --- The three lives of a task --------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ORDINARY)
@pytest.mark.parametrize("end", ENDS)
async def test_an_ordinary_task_is_seen_until_it_ends(
    service: TaskService, task_type: str, end: str
) -> None:
    task_id = await service.create_task(task_type, "short-1", user_id="ada")
    begun = await service.get_session(task_id)
    assert begun is not None
    assert begun == {
        **begun,
        "task_id": task_id,
        "task_type": task_type,
        "short_id": "short-1",
        "user_id": "ada",
        "session_id": None,
        "status": "active",
    }
    assert begun["created_at"] == begun["updated_at"]
    assert await service.get_sessions_by_short_id("short-1") == [begun]

    ended = await ENDS[end](service, task_id)
    assert ended is not None
    assert ended == {**begun, "status": end, "updated_at": ended["updated_at"]}
    assert ended["updated_at"] >= begun["updated_at"]
    assert await service.get_session(task_id) is None
    assert await service.get_sessions_by_short_id("short-1") == []
    assert await keys_of(service) == []
    assert await ENDS[end](service, task_id) is None


@pytest.mark.parametrize("end", ENDS)
async def test_a_scenario_stays_with_its_final_status_until_it_is_released(
    service: TaskService, end: str
) -> None:
    task_id = await service.create_task("scenario_generation", "short-1")
    running = await service.create_task("scenario_generation", "short-1")
    other = await service.create_task("image_analysis", "short-1")
    elsewhere = await service.create_task("scenario_generation", "short-2")
    ended = await ENDS[end](service, task_id)
    assert ended is not None
    assert ended["status"] == end
    assert await service.get_session(task_id) == ended
    assert (await service.list_short("short-1", status=end))["sessions"] == [ended]

    assert await service.release_scenarios("short-1") == 2
    assert await service.get_session(task_id) is None
    assert await service.get_session(running) is None
    assert ids_of(await service.get_sessions_by_short_id("short-1")) == [other]
    assert ids_of(await service.get_sessions_by_short_id("short-2")) == [elsewhere]
    assert await service.release_scenarios("short-1") == 0
    assert await service.release_scenarios("unknown") == 0


@pytest.mark.parametrize(
    ("task_type", "short_id"),
    [("scraping", "short-1"), ("scraping", None), *((each, None) for each in TASK_RULES)],
)
async def test_scraping_and_what_has_no_short_is_never_tracked(
    service: TaskService, task_type: str, short_id: str | None
) -> None:
    assert await service.create_task(task_type, short_id, task_id="t1") == "t1"
    assert await service.create_session(task_type, short_id=short_id) is None
    assert await service.get_session("t1") is None
    for end in ENDS.values():
        assert await end(service, "t1") is None
    assert await keys_of(service) == []


async def test_a_deployer_says_what_is_kept_of_a_type(gateway: Gateway) -> None:
    settings = known_settings(
        task_types='{"mine": {"kept_until_released": true}, "scraping": {}, '
        '"image_analysis": {"tracked": false}}'
    )
    service = TaskService(gateway, settings.task_rules)
    assert settings.task_rules["scenario_generation"] == TaskRule(kept_until_released=True)
    await service.create_task("mine", "s1", task_id="t1")
    await service.create_task("scraping", "s1", task_id="t2")
    await service.create_task("image_analysis", "s1", task_id="t3")
    for task_id in ("t1", "t2"):
        await service.complete_task(task_id)
    assert ids_of(await service.get_sessions_by_short_id("s1")) == ["t1"]
    assert await service.release_scenarios("s1") == 1


async def test_a_task_of_a_type_that_is_not_known_any_more_ends_like_any_other(
    gateway: Gateway,
) -> None:
    await TaskService(gateway, {"mine": TaskRule()}).create_task("mine", "s1", task_id="t1")
    service = TaskService(gateway, TASK_RULES)
    assert ids_of(await service.get_sessions_by_short_id("s1")) == ["t1"]
    assert await service.complete_task("t1") is not None
    assert await service.get_session("t1") is None


# --- Statuses -------------------------------------------------------------------------------------


async def test_a_status_may_come_again_and_an_end_is_final(service: TaskService) -> None:
    task_id = await service.create_task("scenario_generation", "s1")
    assert (await service.update_session_status(task_id, "active"))["status"] == "active"
    for _ in range(2):
        completed = await service.update_session_status(task_id, TaskStatus.COMPLETED)
        assert completed["status"] == "completed"
    for status in ("active", "failed", "cancelled"):
        with pytest.raises(InvalidTransitionError):
            await service.update_session_status(task_id, status)
    with pytest.raises(InvalidTransitionError):
        await service.fail_task(task_id)
    with pytest.raises(TaskNotFoundError):
        await service.update_session_status("unknown", "completed")


async def test_a_task_that_says_again_that_it_is_active_lives_on(
    aging: TaskService, clock: time_machine.Traveller
) -> None:
    task_id = await aging.create_task("video_generation", "s1")
    silent = await aging.create_task("video_generation", "s1")
    for _ in range(3):
        clock.shift(6 * DAY_S)
        await aging.update_session_status(task_id, "active")
    assert ids_of(await aging.get_sessions_by_short_id("s1")) == [task_id]
    assert await aging.get_session(silent) is None
    assert await aging.complete_task(silent) is None


# --- Ids ------------------------------------------------------------------------------------------


async def test_an_id_is_made_when_none_is_given(service: TaskService) -> None:
    made = {await service.create_task("image_analysis", "s1") for _ in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"[0-9a-f-]{36}", task_id) for task_id in made)
    assert set(ids_of(await service.get_sessions_by_short_id("s1"))) == made


async def test_a_worker_that_begins_again_finds_its_task_there(service: TaskService) -> None:
    assert await service.create_task("image_analysis", "s1", task_id="t1") == "t1"
    with capture_logs() as logs:
        assert await service.create_task("image_analysis", "s1", task_id="t1") == "t1"
    assert [(each["event"], each["code"]) for each in logs] == [("task_not_tracked", "task_exists")]
    with pytest.raises(TaskExistsError):
        await service.create_session("image_analysis", short_id="s1", task_id="t1")
    assert len(await service.get_sessions_by_short_id("s1")) == 1


async def test_what_can_be_no_task_is_the_callers_fault_everywhere(
    service: TaskService, away: TaskService
) -> None:
    for each in (service, away):
        calls = [
            lambda s: s.create_task("no_type", "s1"),
            lambda s: s.create_task("image_analysis", "a b"),
            lambda s: s.create_task("image_analysis", "s1", task_id=""),
            lambda s: s.create_task("scraping", "task"),
            lambda s: s.create_session("image_analysis", short_id="s1", user_id=""),
            lambda s: s.complete_task("a b"),
            lambda s: s.get_session("a:b"),
            lambda s: s.remove_session(""),
            lambda s: s.update_session_status("t1", "done"),
            lambda s: s.get_sessions_by_short_id("task"),
            lambda s: s.get_sessions_by_short_id("s1", task_type="no_type"),
            lambda s: s.get_sessions_by_short_id("s1", status="done"),
            lambda s: s.list_sessions(user_id=""),
            lambda s: s.list_sessions(limit=0),
            lambda s: s.list_sessions(limit=1001),
            lambda s: s.list_sessions(cursor="x"),
            lambda s: s.release_scenarios("{s}"),
            lambda s: s.cleanup_old_sessions(-1),
            lambda s: s.cleanup_old_sessions(float("nan")),
        ]
        for call in calls:
            with pytest.raises(InvalidRequestError):
                await call(each)  # type: ignore[no-untyped-call]


# --- Looks ----------------------------------------------------------------------------------------


async def test_a_short_lists_its_tasks_newest_first_and_by_what_they_are(
    aging: TaskService, clock: time_machine.Traveller
) -> None:
    for number, (task_type, user) in enumerate(
        [("image_analysis", "u1"), ("scenario_generation", "u1"), ("scenario_generation", None)]
    ):
        clock.shift(1)
        await aging.create_task(task_type, "s1", user_id=user, task_id=f"t{number}")
    await aging.fail_task("t1")

    async def ids(**wanted: Any) -> list[str]:
        found = await aging.list_short("s1", **wanted)
        assert found["total_sessions"] == len(found["sessions"])
        assert found["sessions"] == await aging.get_sessions_by_short_id("s1", **wanted)
        return ids_of(found["sessions"])

    assert await ids() == ["t2", "t1", "t0"]
    assert await ids(user_id="u1") == ["t1", "t0"]
    assert await ids(task_type="scenario_generation") == ["t2", "t1"]
    assert await ids(status="failed") == ["t1"]
    assert await ids(status=TaskStatus.ACTIVE, user_id="u1") == ["t0"]
    assert await ids(status="cancelled") == []


async def test_a_short_with_more_tasks_than_an_answer_holds_is_counted_whole() -> None:
    service = TaskService(fake_gateway(), TASK_RULES)
    keys = service._gateway.keys
    count = MAX_TASKS + 20
    for number in range(count):
        fields: dict[str, str | int] = {
            "task_type": "scenario_generation",
            "short_id": "s1",
            "operation": "0a",
            "created_at": number,
            "updated_at": number,
            "status": "active" if number % 2 else "completed",
        }
        flat = [part for pair in fields.items() for part in pair]
        await service._gateway.command("HSET", keys.task(f"t{number}"), *flat)
    places = [f"{number:016}:t{number}" for number in range(count)]
    unordered = [part for place in places for part in (0, place)]
    by_end = [part for place in places for part in (2**50, place)]
    await service._gateway.command("ZADD", keys.short("s1").entries, *unordered)
    await service._gateway.command("ZADD", keys.short("s1").ends, *by_end)

    whole = await service.list_short("s1")
    assert (len(whole["sessions"]), whole["total_sessions"]) == (MAX_TASKS, count)
    assert whole["sessions"][0]["task_id"] == f"t{count - 1}"
    active = await service.list_short("s1", status="active")
    assert (len(active["sessions"]), active["total_sessions"]) == (count // 2, count // 2)
    assert active["sessions"][-1]["task_id"] == "t1"


async def test_pages_of_all_tasks_hold_each_once(service: TaskService) -> None:
    made = [await service.create_task("image_analysis", f"s{n}", user_id="u1") for n in range(7)]
    for user_id in (None, "u1"):
        seen: list[str] = []
        cursor = None
        while True:
            page = await service.list_sessions(user_id=user_id, limit=3, cursor=cursor)
            assert page["total_sessions"] == 7
            seen += ids_of(page["sessions"])
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert sorted(seen) == sorted(made)
    assert (await service.list_sessions(user_id="u2"))["sessions"] == []


async def test_a_task_is_removed_in_any_status_and_once(service: TaskService) -> None:
    active = await service.create_task("image_analysis", "s1")
    ended = await service.create_task("scenario_generation", "s1", session_id="of-python")
    await service.complete_task(ended)
    for task_id in (active, ended):
        assert await service.remove_session(task_id)
        assert not await service.remove_session(task_id)
    assert await keys_of(service) == []


async def test_a_damaged_task_is_an_error_that_can_be_removed(service: TaskService) -> None:
    await service.create_task("image_analysis", "s1", task_id="t1")
    await service._gateway.command("HDEL", service._gateway.keys.task("t1"), "status")
    with pytest.raises(CorruptRecordError):
        await service.get_session("t1")
    with capture_logs() as logs:
        assert await service.complete_task("t1") is None
    assert {"event": "task_not_ended", "code": "corrupt_record"}.items() <= logs[-1].items()
    assert await service.remove_session("t1")
    assert await service.get_session("t1") is None
    assert await service.get_sessions_by_short_id("s1") == []


# --- The clean-up ---------------------------------------------------------------------------------


async def test_what_ended_and_was_never_released_goes_after_seven_days(
    aging: TaskService, clock: time_machine.Traveller
) -> None:
    for number in range(3):
        task_id = await aging.create_task("scenario_generation", f"s{number}", user_id="u1")
        await aging.complete_task(task_id)
    clock.shift(7 * DAY_S - 1)
    assert await aging.cleanup_old_sessions() == 0
    assert (await aging.list_sessions())["total_sessions"] == 3
    clock.shift(1.1)
    recent = await aging.create_task("scenario_generation", "s0", user_id="u1")
    await aging.complete_task(recent)

    assert await aging.cleanup_old_sessions(days=7) == 3
    assert await aging.cleanup_old_sessions(days=7) == 0
    assert ids_of((await aging.list_sessions())["sessions"]) == [recent]
    await aging.remove_session(recent)
    assert await keys_of(aging) == []


async def test_the_clean_up_of_fewer_days_takes_what_has_ended_and_leaves_what_is_active(
    aging: TaskService, clock: time_machine.Traveller
) -> None:
    active = await aging.create_task("scenario_generation", "s1")
    ended = await aging.create_task("scenario_generation", "s1")
    await aging.complete_task(ended)
    clock.shift(2 * DAY_S)
    young = await aging.create_task("scenario_generation", "s1")
    await aging.fail_task(young)
    assert await aging.cleanup_old_sessions(3) == 0
    with capture_logs() as logs:
        assert await aging.cleanup_old_sessions(1) == 1
    assert [(each["event"], each["removed"]) for each in logs] == [("tasks_cleaned", 1)]
    assert set(ids_of(await aging.get_sessions_by_short_id("s1"))) == {active, young}
    assert await aging.cleanup_old_sessions(0) == 1
    assert ids_of(await aging.get_sessions_by_short_id("s1")) == [active]


async def test_the_clean_up_goes_through_more_than_it_looks_at_at_once(
    aging: TaskService, clock: time_machine.Traveller
) -> None:
    command, keys = aging._gateway.command, aging._gateway.keys.tasks()
    count = CLEANED_AT_ONCE + 5
    stays = await aging.create_task("video_generation", "s1")
    expired = [f"{number:016}:t{number}" for number in range(count)]
    await command("ZADD", keys.entries, *(part for each in expired for part in (0, each)))
    await command("ZADD", keys.ends, *(part for each in expired for part in (1, each)))
    assert await aging.cleanup_old_sessions() == count
    assert ids_of((await aging.list_sessions())["sessions"]) == [stays]


# --- A store that is away -------------------------------------------------------------------------


async def test_a_store_that_is_away_does_not_stop_the_work(away: TaskService) -> None:
    with capture_logs() as logs:
        assert await away.create_task("image_analysis", "s1", task_id="t1") == "t1"
        assert await away.create_task("image_analysis", "s1")
        for end in ENDS.values():
            assert await end(away, "t1") is None
    told = [each for each in logs if each["event"].startswith("task_")]
    assert [each["event"] for each in told] == ["task_not_tracked"] * 2 + ["task_not_ended"] * 3
    assert {(each["code"], each["log_level"]) for each in told} == {
        ("store_unavailable", "warning")
    }
    assert told[0]["task_id"] == "t1"


async def test_a_store_that_is_away_is_an_error_to_everybody_else(away: TaskService) -> None:
    for call in (
        away.create_session("image_analysis", short_id="s1"),
        away.update_session_status("t1", "active"),
        away.remove_session("t1"),
        away.get_session("t1"),
        away.get_sessions_by_short_id("s1"),
        away.list_sessions(),
        away.release_scenarios("s1"),
        away.cleanup_old_sessions(),
    ):
        with pytest.raises(StoreUnavailableError):
            await call


async def test_what_is_not_tracked_asks_no_store(away: TaskService) -> None:
    with capture_logs() as logs:
        assert await away.create_task("scraping", "s1")
        assert await away.create_session("image_analysis") is None
    assert logs == []


# --- What is logged, and the service of the process -----------------------------------------------


async def test_what_happens_is_logged_without_who_it_was(service: TaskService) -> None:
    with capture_logs() as logs:
        await service.create_task(
            "scenario_generation", "s1", user_id="ada", task_id="t1", session_id="of-python"
        )
        await service.update_session_status("t1", "active")
        await service.complete_task("t1")
        await service.complete_task("t1")
        await service.release_scenarios("s1")
        await service.create_task("image_analysis", "s1", task_id="t2")
        await service.remove_session("t2")
    events = [each["event"] for each in logs]
    assert events == [
        "task_created",
        "task_ended",
        "tasks_released",
        "task_created",
        "task_removed",
    ]
    about = {"task_id": "t1", "task_type": "scenario_generation", "short_id": "s1"}
    assert {**about, "session_id": "of-python", "status": "completed"}.items() <= logs[1].items()
    assert "ada" not in str(logs)


def test_the_readme_shows_how_a_worker_tells_of_its_task(
    raw: Any, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = readme.split("\n## Tasks\n")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.setenv("REDIS_URL", valkey.url)
    get_task_service.cache_clear()
    lines = [*example.splitlines(), "await tasks.aclose()"]
    body = "".join(f"    {line}\n" for line in lines)
    names: dict[str, Any] = {}
    exec(f"async def example():\n{body}    return task_id", names)
    try:
        assert re.fullmatch(r"[0-9a-f-]{36}", asyncio.run(names["example"]()))
    finally:
        get_task_service.cache_clear()
