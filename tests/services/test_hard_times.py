"""The life of sessions when the store is full, and when keys of it are damaged or lost."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.clock import now_ms
from app.errors import CorruptRecordError, InvalidTransitionError, SessionNotFoundError
from app.onboarding.events import BEFORE_ALL
from app.onboarding.retention import DeleteReason
from app.store.connect import connect
from app.store.feed import FeedStore
from app.store.index import SessionIndex
from app.testing import TryoutManager, create_mock_session
from tests.conftest import QUICKLY, known_settings
from tests.faults.servers import Valkey

RULES = '[{"older_than_hours": 1}]'
INDEX = "onboarding:index:sessions:"


@pytest.fixture(params=["off", "on"])
async def manager(
    request: pytest.FixtureRequest, raw: Redis, valkey: Valkey
) -> AsyncIterator[TryoutManager]:
    """Give a manager, without hash tags and with them, and everything that works beside it."""
    settings = known_settings(
        redis_url=valkey.url, key_hash_tag=request.param, expiry_rules=RULES, **QUICKLY
    )
    manager = TryoutManager(connect(settings), settings)
    yield manager
    # Those for large bodies too.
    await manager.generation.aclose()


async def listed(manager: TryoutManager) -> list[str]:
    return [row["session_id"] for row in await manager.stats.get_all_sessions_info()]


async def test_a_full_store_is_swept(manager: TryoutManager, raw: Redis) -> None:
    due = [await create_mock_session(manager, age_hours=2) for _ in range(3)]
    stays = await create_mock_session(manager)
    await raw.config_set("maxmemory", "1mb")
    try:
        assert await manager.retention.sweep()
        for session_id in due:
            with pytest.raises(SessionNotFoundError):
                await manager.get_session(session_id)
    finally:
        await raw.config_set("maxmemory", 0)
    assert (await manager.get_session(stays))["session_id"] == stays


async def test_sessions_that_the_index_has_lost_are_in_it_again_after_a_sweep(
    manager: TryoutManager, raw: Redis
) -> None:
    names = {await create_mock_session(manager, steps=number) for number in range(3)}
    await manager.gateway.aclose()
    entries = manager.gateway.keys.index("entries")
    for lost in ([entries], await raw.keys(manager.gateway.keys.index("*"))):
        await raw.delete(*lost)
        await manager.retention.sweep()
        assert set(await listed(manager)) == names
        stats = await manager.stats.get_performance_stats()
        assert stats["total_sessions"] == stats["age_distribution"]["under_1h"] == 3
        assert stats["average_age_hours"] == 0.0


async def test_the_feed_tells_nothing_twice_when_the_index_is_made_anew(
    manager: TryoutManager, raw: Redis
) -> None:
    await create_mock_session(manager, steps=2)
    await manager.gateway.aclose()
    feed = manager.gateway.keys.index("feed")
    before = await raw.xlen(feed)
    await raw.delete(manager.gateway.keys.index("entries"))
    await manager.retention.sweep()
    # With hash tags only the entry knows what was told; a second telling is better than none.
    assert await raw.xlen(feed) in {before, 2 * before if manager.settings.hash_tag else before}


async def test_a_body_that_says_to_have_endless_parts_is_removed_with_its_session(
    manager: TryoutManager, raw: Redis
) -> None:
    session_id = await manager.create_session()
    await manager.generation.store_result(session_id, b"made")
    prefix = manager.gateway.keys.session(session_id).prefix
    await raw.hset(f"{prefix}result", "parts", "99999999999999999999")
    await manager.delete_session(session_id)
    # Its part is found by nobody, and ends with its own lifetime.
    assert len(await raw.keys(f"{prefix}*")) <= 1
    assert await raw.keys(f"{prefix}progress") == []


async def test_a_session_that_is_gone_does_not_come_back_by_facts_that_were_read_before(
    raw: Redis, valkey: Valkey
) -> None:
    settings = known_settings(redis_url=valkey.url, key_hash_tag="on", **QUICKLY)
    manager = TryoutManager(connect(settings), settings)
    index = SessionIndex(manager.gateway)
    session_id = await manager.create_session(workspace_id="w1")
    await index.follow(session_id)
    keys = manager.gateway.keys.session(session_id)
    entries = manager.gateway.keys.index("entries")
    facts = await manager.gateway.evaluate("read_facts", keys[:3], ["-"])
    await index.remove(session_id, DeleteReason.REQUEST, at_ms=now_ms())
    placed = await manager.gateway.evaluate(
        "place_session", [entries], [session_id, "-", *facts.values]
    )
    assert placed.word == "superseded"
    assert not await raw.hexists(entries, session_id)
    await manager.generation.aclose()


@pytest.mark.parametrize("manager", ["off"], indirect=True)
async def test_a_damaged_index_fails_no_write(manager: TryoutManager, raw: Redis) -> None:
    session_id = await manager.create_session()
    for name in ("activity:pending:free", "entries", "deadlines", "feed"):
        await raw.delete(INDEX + name)
        await raw.set(INDEX + name, "nothing of ours")
    for version in (1, 2):
        assert (await manager.save_step(session_id, 1, {"a": 1}))["version"] == version
    await manager.delete_session(session_id)
    with pytest.raises(SessionNotFoundError):
        await manager.get_session(session_id)
    for name in ("activity:pending:free", "entries", "deadlines", "feed"):
        await raw.delete(INDEX + name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("status", "bogus"), ("changes", "inf"), ("highest", "1e3"), ("deadline", "0x10")],
)
async def test_a_write_to_a_session_whose_state_no_script_has_written_is_refused(
    manager: TryoutManager, raw: Redis, field: str, value: str
) -> None:
    session_id = await manager.create_session()
    progress = manager.gateway.keys.session(session_id).progress
    await raw.hset(progress, field, value)
    with pytest.raises(CorruptRecordError):
        await manager.save_step(session_id, 1, {"a": 1})
    told = await manager.retention.recover_corrupted_session(session_id)
    assert told["lost"] == ["progress"]
    assert (await manager.save_step(session_id, 1, {"a": 1}))["version"] == 1


@pytest.mark.parametrize("manager", ["off"], indirect=True)
async def test_a_limit_that_is_none_is_damage_until_operators_set_another_one(
    manager: TryoutManager, raw: Redis
) -> None:
    await raw.hset(INDEX + "config", "max_sessions", "abc")
    with pytest.raises(CorruptRecordError):
        await manager.retention.get_config()
    assert (await manager.retention.reconfigure(max_sessions=5))["max_sessions"] == 5


@pytest.mark.parametrize("manager", ["off"], indirect=True)
async def test_a_status_that_stays_is_not_told_of_and_its_message_can_be_corrected(
    manager: TryoutManager,
) -> None:
    session_id = await manager.create_session()

    async def update(**updates: Any) -> list[str]:
        with capture_logs() as logs:
            await manager.retention.atomic_session_update(session_id, updates)
        return [line["event"] for line in logs if line["event"] == "status_changed"]

    assert await update(status="error", error_message="one") == ["status_changed"]
    assert await update(status="error", error_message="two") == []
    assert await update(status="error") == []
    status = await manager.generation.get_status(session_id)
    assert status["error_message"] == "two"
    with pytest.raises(InvalidTransitionError):
        await update(status="complete")


async def test_a_clean_up_says_what_it_did_before_its_request_has_to_end(
    manager: TryoutManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(40):
        await manager.create_session()
    looks = iter([False, False, True])
    monkeypatch.setattr("app.services.retention._is_late", lambda: next(looks))
    done = await manager.retention.cleanup(everything=True)
    assert (done["removed"], done["more"]) == (32, True)
    assert len(done["session_ids"]) == 32


@pytest.mark.parametrize("manager", ["off"], indirect=True)
async def test_what_has_outlived_its_lifetime_is_told_once(
    manager: TryoutManager, raw: Redis
) -> None:
    session_id = await manager.create_session()
    prefix = manager.gateway.keys.session(session_id).prefix
    await raw.delete(*await raw.keys(f"{prefix}*"))
    await raw.zadd(INDEX + "deadlines", {session_id: 1})
    for _ in range(2):
        await manager.retention.sweep()
    told = await FeedStore(manager.gateway).list_after(BEFORE_ALL)
    assert [each.event["type"] for each in told[0]] == ["session_created", "expired"]


@pytest.mark.parametrize("manager", ["on"], indirect=True)
async def test_a_delete_that_was_half_done_is_told_as_a_delete_when_it_is_asked_for_again(
    manager: TryoutManager, raw: Redis
) -> None:
    session_id = await manager.create_session()
    await manager.gateway.aclose()
    prefix = manager.gateway.keys.session(session_id).prefix
    await raw.delete(*await raw.keys(f"{prefix}*"))
    with pytest.raises(SessionNotFoundError):
        await manager.delete_session(session_id)
    told = await FeedStore(manager.gateway).list_after(BEFORE_ALL)
    assert [each.event["type"] for each in told[0]] == ["session_created", "deleted"]
    assert await listed(manager) == []
