"""The life of sessions by the Python names that operators call: all or none, or not at all."""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import structlog
import time_machine
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app import errors
from app.errors import (
    InvalidRequestError,
    InvalidTransitionError,
    OnboardingError,
    SessionCapacityError,
    SessionConflictError,
    SessionLockError,
    SessionManagerError,
    SessionNotFoundError,
    StoreUnavailableError,
)
from app.onboarding.tasks import TASK_RULES
from app.services import retention as module
from app.services.manager import OnboardingSessionManager, make_manager
from app.services.retention import (
    RetentionService,
    get_retention_service,
    make_retention_service,
)
from app.services.stats import make_stats_service
from app.services.tasks import TaskService
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.servers import HOST, Valkey, free_ports
from tests.store.sessions import Place, names_of_keys, watch_operation_ids
from tests.store.test_stats import load_sessions

BY_NAME = [
    *("atomic_session_update", "with_session", "bulk_update_sessions"),
    *("cleanup_failed_sessions", "cleanup_completed_sessions", "force_cleanup_all", "erase_user"),
    *("register_session_callback", "reconfigure", "recover_corrupted_session", "shutdown"),
]
"""What callers import from the module or call on the service."""


def make_service(gateway: Gateway, **overrides: Any) -> RetentionService:
    settings = known_settings(**overrides)
    return make_retention_service(gateway, TaskService(gateway, TASK_RULES), settings)


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    for name in ("app.services.retention", "app.services.manager", "app.services.sweeper"):
        monkeypatch.setattr(f"{name}.log", structlog.get_logger())


@pytest.fixture
def service(gateway: Gateway) -> RetentionService:
    """Give a service, on the fake store and on the real one in turn."""
    return make_service(gateway)


@pytest.fixture
def place(manager: OnboardingSessionManager, gateway: Gateway) -> Place:
    return Place(manager, gateway)


@pytest.fixture
async def session_id(manager: OnboardingSessionManager) -> str:
    return await manager.create_session(
        workspace_id="w1", user_id="ada", metadata={"count": 0, "kept": [1, 1.5, None]}
    )


async def types_of(place: Place, session_id: str) -> list[str]:
    """Give the types of the events of a session, in order."""
    key = place.gateway.keys.session(session_id).events
    entries = await place.gateway.command("XRANGE", key, "-", "+")
    found = []
    for _, told in entries:
        pairs = told.items() if isinstance(told, dict) else zip(told[::2], told[1::2], strict=True)
        found.append({name: value for name, value in pairs}[b"type"].decode())  # noqa: C416
    return found


# --- By name --------------------------------------------------------------------------------------


@pytest.fixture
def own_service(monkeypatch: pytest.MonkeyPatch, valkey: Valkey) -> Iterator[None]:
    """Let the process make its own service anew, on the real store, which is empty."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    valkey.command("FLUSHDB")
    get_retention_service.cache_clear()
    yield
    get_retention_service.cache_clear()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.usefixtures("own_service")
def test_a_name_of_the_module_is_a_method_of_the_service(name: str) -> None:
    assert callable(getattr(importlib.import_module("app.services.retention"), name))
    assert callable(getattr(RetentionService, name))


@pytest.mark.usefixtures("own_service")
def test_the_names_of_the_module_work_in_one_event_loop_after_another() -> None:
    chosen = known_settings()
    manager = make_manager(connect(chosen), chosen)

    async def use() -> list[Any]:
        heard: list[str] = []
        await module.register_session_callback("deleted", lambda e: heard.append(e["session_id"]))
        one, other = [await manager.create_session() for _ in range(2)]
        updated = await module.atomic_session_update(one, {"status": "error", "user_id": "eve"})
        count = await module.with_session(other, lambda s: s["metadata"].setdefault("count", 7))
        bulk = await module.bulk_update_sessions([one, other], {"language": "de"})
        told = await module.recover_corrupted_session(other)
        config = await module.reconfigure(max_sessions=100)
        await module.reconfigure(max_sessions=None)
        failed = await module.cleanup_failed_sessions()
        completed = await module.cleanup_completed_sessions(max_age_hours=0)
        await manager.create_session()
        removed = await module.force_cleanup_all()
        async with asyncio.timeout(5):
            while len(heard) < 3:
                await asyncio.sleep(0.01)
        await manager.aclose()
        assert {one, other} <= set(heard)
        return [
            *(updated["status"], updated["user_id"], count, bulk["updated"], told["status"]),
            *(config["max_sessions"], failed, completed, removed),
            await module.shutdown(timeout=5),
        ]

    for _ in range(2):
        assert asyncio.run(use()) == ["error", "eve", 7, 2, "error", 100, 2, 0, 1, True]


def test_the_errors_of_sessions_are_one_family() -> None:
    assert issubclass(SessionManagerError, OnboardingError)
    for each in (SessionNotFoundError, SessionCapacityError, SessionConflictError):
        assert issubclass(each, SessionManagerError)
    assert SessionLockError is SessionConflictError is errors.SessionLockError
    with pytest.raises(SessionManagerError):
        raise SessionLockError


# --- atomic_session_update ------------------------------------------------------------------------


async def test_several_fields_are_changed_at_once(
    service: RetentionService, place: Place, session_id: str
) -> None:
    before = await place.manager.get_session(session_id)
    after = await service.atomic_session_update(
        session_id,
        {
            "status": "error",
            "error_message": "It broke",
            "language": "pt-BR",
            "metadata": {"b": "é"},
            "user_id": None,
            "workspace_id": "w2",
        },
    )
    assert after == await place.manager.get_session(session_id)
    changed = {"status", "language", "metadata", "user_id", "workspace_id", "progress"}
    assert {name for name in after if dict(after)[name] != dict(before)[name]} <= changed | {
        "expires_at"
    }
    assert (after["status"], after["language"], after["metadata"]) == ("error", "pt-BR", {"b": "é"})
    assert (after["user_id"], after["workspace_id"]) == (None, "w2")
    assert (await place.generation.get_status(session_id))["error_message"] == "It broke"
    assert sorted(await types_of(place, session_id)) == [
        *("language_changed", "metadata_changed", "session_created", "status_changed")
    ]


@pytest.mark.parametrize(
    ("updates", "error"),
    [
        ({"language": "de", "revision": 2}, InvalidRequestError),
        ({"language": "de", "progress": {}}, InvalidRequestError),
        ({"language": "de", "nickname": "x"}, InvalidRequestError),
        ({"language": "de", "user_id": "a\x00"}, InvalidRequestError),
        ({"language": "de", "metadata": {"a": float("inf")}}, InvalidRequestError),
        ({"language": "de", "status": "complete"}, InvalidTransitionError),
        ({"metadata": {}, "status": "asleep"}, InvalidRequestError),
        ({}, InvalidRequestError),
    ],
    ids=str,
)
async def test_a_change_that_cannot_be_made_whole_is_not_made(
    service: RetentionService,
    place: Place,
    session_id: str,
    updates: dict[str, Any],
    error: type[Exception],
) -> None:
    before = await place.manager.get_session(session_id)
    with pytest.raises(error):
        await service.atomic_session_update(session_id, updates)
    assert await place.manager.get_session(session_id) == before
    assert await types_of(place, session_id) == ["session_created"]


async def test_a_status_that_may_not_follow_is_refused_even_back_to_pending(
    service: RetentionService, place: Place, session_id: str
) -> None:
    await service.atomic_session_update(session_id, {"status": "pending"})
    await service.atomic_session_update(session_id, {"status": "processing"})
    with pytest.raises(InvalidTransitionError) as refused:
        await service.atomic_session_update(session_id, {"status": "pending"})
    assert refused.value.current == "processing"
    assert await types_of(place, session_id) == ["session_created", "status_changed"]


async def test_what_is_so_already_makes_no_event(
    service: RetentionService, place: Place, session_id: str
) -> None:
    updates = {"status": "pending", "language": "en"}
    await service.atomic_session_update(session_id, updates)
    assert await types_of(place, session_id) == ["session_created"]


async def test_a_session_that_there_is_not_is_told_by_every_name(service: RetentionService) -> None:
    for call in (
        service.atomic_session_update("unknown", {"language": "de"}),
        service.with_session("unknown", dict),
        service.recover_corrupted_session("unknown"),
    ):
        with pytest.raises(SessionNotFoundError):
            await call
    for bad_id in ("", "a:b", "{x}", "*", "task", "x\n"):
        for call in (
            service.atomic_session_update(bad_id, {"language": "de"}),
            service.with_session(bad_id, dict),
            service.recover_corrupted_session(bad_id),
        ):
            with pytest.raises(InvalidRequestError):
                await call


# --- with_session ---------------------------------------------------------------------------------


def add_one(session: dict[str, Any]) -> int:
    session["metadata"]["count"] += 1
    return int(session["metadata"]["count"])


async def add_one_slowly(session: dict[str, Any]) -> int:
    seen = session["metadata"]["count"]
    await asyncio.sleep(0)
    session["metadata"]["count"] = seen + 1
    return int(seen) + 1


@pytest.mark.parametrize("operation", [add_one, add_one_slowly])
async def test_increments_by_20_at_once_are_all_counted_or_refused(
    service: RetentionService, place: Place, session_id: str, operation: Callable[..., Any]
) -> None:
    outcomes = await asyncio.gather(
        *(service.with_session(session_id, operation) for _ in range(20)), return_exceptions=True
    )
    counted = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert all(isinstance(each, int | SessionConflictError) for each in outcomes), outcomes
    session = await place.manager.get_session(session_id)
    assert session["metadata"] == {"count": len(counted), "kept": [1, 1.5, None]}
    assert sorted(counted) == [*range(1, len(counted) + 1)]
    assert (await types_of(place, session_id)).count("metadata_changed") == len(counted)
    assert counted


async def test_an_operation_is_given_what_others_made_of_the_session_meanwhile(
    service: RetentionService, place: Place, session_id: str
) -> None:
    seen = []

    async def operation(session: dict[str, Any]) -> str:
        seen.append((session["language"], session["progress"]["completed"]))
        if len(seen) == 1:
            await place.manager.save_step(session_id, 1, {"a": 1})
        elif len(seen) == 2:
            await place.generation.set_language_preference(session_id, "de")
        session["metadata"] = {"seen": len(seen)}
        session["status"] = "processing"
        return "done"

    outcome: str = await service.with_session(session_id, operation)
    assert outcome == "done"
    assert seen == [("en", 0), ("en", 1), ("de", 1)]
    session = await place.manager.get_session(session_id)
    assert (session["metadata"], session["language"]) == ({"seen": 3}, "de")
    assert (session["status"], session["progress"]["completed"]) == ("processing", 1)


async def test_an_operation_that_others_are_always_faster_than_gives_up_with_nothing_changed(
    service: RetentionService, place: Place, session_id: str
) -> None:
    calls = 0

    async def operation(session: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        await place.manager.save_step(session_id, 1, {"n": calls})
        session["metadata"]["count"] = -1

    with pytest.raises(SessionLockError):
        await service.with_session(session_id, operation)
    assert 1 < calls <= 20
    assert (await place.manager.get_session(session_id))["metadata"]["count"] == 0


async def test_an_operation_that_raises_changes_nothing(
    service: RetentionService, place: Place, session_id: str
) -> None:
    def operation(session: dict[str, Any]) -> None:
        session["metadata"]["count"] = 5
        session["language"] = "de"
        raise ZeroDivisionError

    async def slowly(session: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        operation(session)

    before = await place.manager.get_session(session_id)
    for each in (operation, slowly):
        with pytest.raises(ZeroDivisionError):
            await service.with_session(session_id, each)
    assert await place.manager.get_session(session_id) == before
    assert await types_of(place, session_id) == ["session_created"]


@pytest.mark.parametrize(
    "member",
    [
        *("session_id", "progress", "created_at", "expires_at", "finalized_at", "revision"),
        "nickname",
    ],
)
async def test_a_member_that_may_only_be_read_cannot_be_changed(
    service: RetentionService, place: Place, session_id: str, member: str
) -> None:
    def operation(session: dict[str, Any]) -> None:
        session["language"] = "de"
        if member == "progress":
            session["progress"]["completed"] = 23
        else:
            session[member] = "x"

    before = await place.manager.get_session(session_id)
    with pytest.raises(InvalidRequestError, match=member):
        await service.with_session(session_id, operation)
    assert await place.manager.get_session(session_id) == before


async def test_an_operation_that_changes_nothing_writes_nothing(
    service: RetentionService, place: Place, session_id: str
) -> None:
    before = await place.gateway.command("DUMP", place.gateway.keys.session(session_id).progress)
    assert await service.with_session(session_id, lambda session: session["user_id"]) == "ada"
    after = await place.gateway.command("DUMP", place.gateway.keys.session(session_id).progress)
    assert after == before


async def test_a_value_that_python_takes_for_equal_is_changed_all_the_same(
    service: RetentionService, place: Place, session_id: str
) -> None:
    await service.with_session(session_id, lambda session: session["metadata"].update(count=False))
    session = await place.manager.get_session(session_id)
    assert session["metadata"]["count"] is False


async def test_a_member_that_is_removed_is_none(
    service: RetentionService, place: Place, session_id: str
) -> None:
    await service.with_session(session_id, lambda session: session.pop("user_id"))
    assert (await place.manager.get_session(session_id))["user_id"] is None
    assert await _in_list(place, user_id="ada") == []
    assert await _in_list(place, workspace_id="w1") == [session_id]


async def _in_list(place: Place, **query: Any) -> list[str]:
    rows = await make_stats_service(place.gateway, known_settings()).get_all_sessions_info(**query)
    return [row["session_id"] for row in rows]


# --- In bulk --------------------------------------------------------------------------------------


async def test_a_bulk_change_names_each_failure_and_makes_all_the_others(
    service: RetentionService, place: Place
) -> None:
    made = [await place.manager.create_session() for _ in range(5)]
    await place.generation.update_session_status(made[3], "processing")
    await place.generation.update_session_status(made[3], "complete")
    with capture_logs() as lines:
        told = await service.bulk_update_sessions(
            [*made, "gone", "a b", made[0]], {"status": "error", "metadata": {"by": "operator"}}
        )
    assert told == {
        "updated": 4,
        "failed": [
            {"session_id": made[3], "code": "invalid_transition"},
            {"session_id": "gone", "code": "session_not_found"},
            {"session_id": "a b", "code": "session_not_found"},
        ],
    }
    [line] = [line for line in lines if line["event"] == "sessions_updated"]
    assert (line["updated"], line["failed"]) == (4, 3)
    for session_id in made:
        session = await place.manager.get_session(session_id)
        is_changed = session_id != made[3]
        assert session["metadata"] == ({"by": "operator"} if is_changed else {})
        assert session["status"] == ("error" if is_changed else "complete")


async def test_a_bulk_change_of_too_many_none_or_to_nothing_is_refused(
    service: RetentionService, session_id: str
) -> None:
    for session_ids, updates in (
        ([], {"language": "de"}),
        (["x"] * 1001, {"language": "de"}),
        ([session_id], {}),
        ([session_id], {"language": "de", "nickname": "x"}),
    ):
        with pytest.raises(InvalidRequestError):
            await service.bulk_update_sessions(session_ids, updates)


# --- Clean-ups ------------------------------------------------------------------------------------


async def end(place: Place, status: str, *, held: bool = False) -> str:
    """Make a session whose generation ended."""
    session_id = await place.manager.create_session()
    if held:
        await place.manager.save_step(session_id, 1, {"a": 1})
    await place.generation.update_session_status(session_id, "processing")
    await place.generation.update_session_status(session_id, status)
    return session_id


@pytest.mark.parametrize("status", ["error", "complete"])
async def test_sessions_that_ended_are_cleaned_up_from_an_age_on_counted_from_their_end(
    service: RetentionService, place: Place, clock: time_machine.Traveller, status: str
) -> None:
    clean = {
        "error": service.cleanup_failed_sessions,
        "complete": service.cleanup_completed_sessions,
    }[status]
    young = await place.manager.create_session()
    await place.generation.update_session_status(young, "processing")
    old, held = await end(place, status), await end(place, status, held=True)
    other = await end(place, "complete" if status == "error" else "error")
    clock.shift(7 * 3600)
    await place.generation.update_session_status(young, status)
    clock.shift(3600)

    assert await clean(max_age_hours=8.5) == 0
    assert await clean(max_age_hours=6) == 1
    assert set(await _in_list(place)) == {young, held, other}
    assert await names_of_keys(place.gateway, old) == set()
    assert await clean(max_age_hours=0) == 1
    assert set(await _in_list(place)) == {held, other}
    with pytest.raises(InvalidRequestError):
        await clean(max_age_hours=-1)


async def test_completed_sessions_are_cleaned_up_six_hours_after_their_end(
    service: RetentionService, place: Place, clock: time_machine.Traveller
) -> None:
    session_id = await end(place, "complete")
    clock.shift(6 * 3600 - 1)
    assert await service.cleanup_completed_sessions() == 0
    clock.shift(1)
    assert await service.cleanup_completed_sessions() == 1
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_a_forced_clean_up_removes_everything(
    service: RetentionService, place: Place
) -> None:
    made = [
        await end(place, "error", held=True),
        await end(place, "complete"),
        await place.manager.create_session(),
    ]
    await place.manager.save_draft(made[2], 1, {"a": 1})
    with capture_logs() as lines:
        assert await service.force_cleanup_all() == 3
    assert [line["removed"] for line in lines if line["event"] == "sessions_removed"] == [3]
    for session_id in made:
        assert await names_of_keys(place.gateway, session_id) == set()
    assert await service.force_cleanup_all() == 0


async def test_a_clean_up_that_leaves_more_tells_the_log_what_it_removed(
    settings: Settings, raw: Redis
) -> None:
    gateway = connect(settings)
    try:
        await load_sessions(raw, settings, 1001)
        with capture_logs() as lines:
            done = await make_service(gateway).cleanup(everything=True)
        assert (done["removed"], done["more"]) == (1000, True)
        assert [line["removed"] for line in lines if line["event"] == "sessions_removed"] == [1000]
    finally:
        await gateway.aclose()


async def test_a_clean_up_passes_over_what_is_gone_already_and_leaves_nothing_behind(
    settings: Settings, raw: Redis
) -> None:
    names = await load_sessions(raw, settings, 500)
    # The index still names those; the oldest come first.
    parts = ("metadata", "progress", "events", "ops")
    await raw.delete(*(f"onboarding:{name}:{part}" for name in names[:250] for part in parts))
    gateway = connect(settings)
    try:
        done = await make_service(gateway).cleanup(everything=True)
        assert done == {"removed": 250, "session_ids": names[250:], "more": False}
        stats = await make_stats_service(gateway, settings).get_performance_stats()
        assert stats["total_sessions"] == 0
    finally:
        await gateway.aclose()


async def test_two_clean_ups_at_once_remove_every_session_and_each_of_them_once(
    settings: Settings, raw: Redis
) -> None:
    names = await load_sessions(raw, settings, 450)
    gateway = connect(settings)
    try:
        service = make_service(gateway)
        done = await asyncio.gather(*(service.cleanup(everything=True) for _ in range(2)))
        assert sorted(done[0]["session_ids"] + done[1]["session_ids"]) == sorted(names)
        assert [each["more"] for each in done] == [False, False]
        assert (await make_stats_service(gateway, settings).get_session_count()) == 0
        assert [key async for key in raw.scan_iter("onboarding:*-*")] == []
    finally:
        await gateway.aclose()


@pytest.mark.parametrize("kind", ["fakeredis", "valkey"])
async def test_with_hash_tags_a_clean_up_leaves_no_key_and_no_entry(
    settings: Settings, raw: Redis, kind: str
) -> None:
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), "key_hash_tag": "on"})
    gateway = fake_gateway(key_hash_tag="on") if kind == "fakeredis" else connect(chosen)
    place, service = Place(make_manager(gateway, chosen), gateway), make_service(gateway)
    try:
        made = [await end(place, "error", held=True), await end(place, "complete")]
        await gateway.aclose()  # the index has followed
        assert await service.cleanup_failed_sessions() == 0
        assert await service.cleanup_completed_sessions(max_age_hours=0) == 1
        assert await service.force_cleanup_all() == 1
        for session_id in made:
            assert await names_of_keys(gateway, session_id) == set()
        assert await _in_list(place) == []
    finally:
        await gateway.aclose()


# --- What all processes share ---------------------------------------------------------------------


async def test_what_is_set_holds_for_every_service_on_the_store_and_null_goes_back(
    gateway: Gateway,
) -> None:
    one = make_service(gateway, max_sessions=5, cleanup_interval_s=60)
    other = make_service(gateway, max_sessions=9)
    assert await one.get_config() == {"max_sessions": 5, "cleanup_interval_s": 60}
    told = await one.reconfigure(max_sessions=3, cleanup_interval_s=0.5)
    assert told == await other.get_config() == {"max_sessions": 3, "cleanup_interval_s": 0.5}
    await other.reconfigure(max_sessions=None)
    assert (await one.get_config())["max_sessions"] == 5
    assert (await other.get_config())["max_sessions"] == 9
    assert (await one.get_config())["cleanup_interval_s"] == 0.5
    assert await one.reconfigure() == await one.get_config()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_sessions": -1},
        {"max_sessions": 1.0},
        {"max_sessions": "1"},
        {"max_sessions": True},
        {"cleanup_interval_s": 0},
        {"cleanup_interval_s": float("nan")},
        {"cleanup_interval_s": float("inf")},
        {"max_sessions": 1, "policy": "refuse"},
    ],
    ids=str,
)
async def test_what_cannot_be_set_is_refused_and_nothing_is_set(
    service: RetentionService, changes: dict[str, Any]
) -> None:
    before = await service.get_config()
    with pytest.raises(InvalidRequestError):
        await service.reconfigure(**changes)
    assert await service.get_config() == before


async def test_a_lower_limit_loses_no_live_session_and_lets_nobody_in(
    gateway: Gateway, place: Place, service: RetentionService
) -> None:
    made = {await place.manager.create_session() for _ in range(3)}
    stats = make_stats_service(gateway, known_settings())
    assert (await stats.get_performance_stats())["cleanup"]["last_run"] is None
    await service.reconfigure(max_sessions=2)
    assert (await stats.get_performance_stats())["cleanup"]["last_run"] is not None
    assert set(await _in_list(place)) == made
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    await service.reconfigure(max_sessions=4)
    await place.manager.create_session()


# --- An outage, and the end -----------------------------------------------------------------------


@pytest.fixture
async def away() -> AsyncIterator[RetentionService]:
    """Give a service whose store is not there."""
    [port] = free_ports(1)
    settings = known_settings(redis_url=f"redis://{HOST}:{port}/0", retry_attempts=1, **QUICKLY)
    gateway = connect(settings)
    yield make_retention_service(gateway, TaskService(gateway, TASK_RULES), settings)
    await gateway.aclose()


async def test_an_outage_is_told_by_every_name_and_passes_for_nothing_else(
    away: RetentionService,
) -> None:
    for call in (
        away.atomic_session_update("s", {"language": "de"}),
        away.with_session("s", dict),
        away.recover_corrupted_session("s"),
        away.cleanup(everything=True),
        away.cleanup_failed_sessions(),
        away.cleanup_completed_sessions(),
        away.force_cleanup_all(),
        away.get_config(),
        away.reconfigure(max_sessions=1),
        away.bulk_update_sessions(["s", "t"], {"language": "de"}),
    ):
        with pytest.raises(StoreUnavailableError):
            await call


async def test_a_service_that_is_shut_down_says_so_and_works_again_when_it_is_asked(
    service: RetentionService, place: Place, session_id: str
) -> None:
    assert await service.shutdown() is True
    await service.start()
    await service.register_session_callback("deleted", lambda _: None)
    assert await service.shutdown(timeout=5) is True
    assert await service.shutdown(timeout=5) is True
    await service.atomic_session_update(session_id, {"language": "de"})
    assert await service.shutdown(timeout=5) is True


async def test_a_shutdown_that_takes_too_long_says_so(
    service: RetentionService, place: Place
) -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def hold_on(_: dict[str, Any]) -> None:
        begun.set()
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    await service.register_session_callback("session_created", hold_on)
    await place.manager.create_session()
    await asyncio.wait_for(begun.wait(), 5)
    assert await service.shutdown(timeout=0.05) is False
    over.set()
    assert await service.shutdown(timeout=5) is True
    async with asyncio.timeout(5):
        while [task for task in asyncio.all_tasks() if task.get_name() == "shutdown"]:
            await asyncio.sleep(0.01)


async def test_a_repeat_of_a_change_that_was_made_changes_nothing_more(
    service: RetentionService,
    place: Place,
    session_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the store sees a sending whose first answer was lost.
    watch_operation_ids(monkeypatch, lambda: b"\x01" * 12)
    first = await service.with_session(session_id, add_one)
    again = await service.atomic_session_update(session_id, {"language": "de"})
    assert first == 1
    assert again["language"] == "en"
    assert (await place.manager.get_session(session_id))["metadata"]["count"] == 1
    assert await types_of(place, session_id) == ["session_created", "metadata_changed"]
