"""Sessions listed and counted by the store: what is in a page, and what each call costs."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis

from app.errors import SessionCapacityError
from app.onboarding.cursors import write_cursor
from app.onboarding.sessions import SessionStatus
from app.services.manager import make_manager
from app.services.stats import StatsService, make_stats_service
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.scripts import load_script
from app.store.stats import StatsStore
from tests.api.helpers import ask
from tests.conftest import known_settings
from tests.store.conftest import MakePlace
from tests.store.sessions import store_time_ms

PAGE = 20
"""How many sessions a page has here; the hundredth one begins after 1,980."""


class Reader(NamedTuple):
    """What operators read, on one gateway, and the settings that it goes by."""

    stats: StatsService
    gateway: Gateway
    settings: Settings


@asynccontextmanager
async def reading(settings: Settings, **overrides: Any) -> AsyncIterator[Reader]:
    """Give a reader with settings of its own, connected already."""
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), **overrides})
    gateway = connect(chosen)
    try:
        await gateway.command("PING")
        yield Reader(make_stats_service(gateway, chosen), gateway, chosen)
    finally:
        await gateway.aclose()


async def load_sessions(
    raw: Redis, settings: Settings, count: int, *, spread_ms: int = 1, at_ms: int | None = None
) -> list[str]:
    """Make many sessions by the script that makes one; give their ids, the oldest first.

    Each is `spread_ms` younger than the one before it, the youngest is made at `at_ms` or now.
    """
    catalogue, script = settings.catalogue, load_script("create_session")
    seconds, microseconds = await ask(raw, "TIME")
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    newest_ms = at_ms or now_ms
    sha = await raw.script_load(script.text)
    names = [str(uuid.uuid4()) for _ in range(count)]
    for start in range(0, count, 1000):
        pipeline = raw.pipeline(transaction=False)
        for number, name in enumerate(names[start : start + 1000], start=start):
            keys = [f"onboarding:{name}:{key}" for key in ("metadata", "progress", "events", "ops")]
            created_ms = newest_ms - (count - 1 - number) * spread_ms
            arguments: list[Any] = [
                *(*keys, f"{now_ms} 60000"),
                *(name, settings.session_ttl_s * 1000, created_ms, "", name),
                *(catalogue.pin, catalogue.total, 0, "refuse", "", "", 0),
                *("language", "en", "custom", "{}", "workspace_id", f"w{number % 7}"),
            ]
            pipeline.evalsha(sha, 4, *arguments)
        await pipeline.execute()
    return names


# --- What is in a page ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
async def test_pages_hold_everything_once_the_newest_first(
    raw: Redis, settings: Settings, limit: int
) -> None:
    names = await load_sessions(raw, settings, 7)
    async with reading(settings) as reader:
        store = StatsStore(reader.gateway, max_sessions=0, interval_s=1)
        for number, status in enumerate(SessionStatus):
            # Each in a part of the index of its own: they are merged.
            key = reader.gateway.keys.session(names[number]).progress
            await reader.gateway.command("HSET", key, "status", status)
            await store.repair(names[number])
        found, place = [], ""
        while True:
            rows, place = await store.list_page(place, limit)
            assert len(rows) <= limit
            found += [row.facts.session_id for row in rows]
            if not place:
                break
            assert rows
        assert found == names[::-1]


async def test_sessions_of_one_millisecond_are_each_listed_once(
    raw: Redis, settings: Settings
) -> None:
    names = await load_sessions(raw, settings, 30, spread_ms=0)
    async with reading(settings) as reader:
        found: list[str] = []
        cursor = None
        while cursor is not None or not found:
            page = await reader.stats.list_sessions(cursor=cursor, limit=7)
            found += [row["session_id"] for row in page["sessions"]]
            cursor = page["next_cursor"]
        assert sorted(found) == sorted(names)


async def test_what_has_outlived_its_lifetime_is_neither_listed_nor_counted_nor_stuck(
    fake: MakePlace, clock: Any
) -> None:
    place = fake(session_ttl_s=60)
    stats = make_stats_service(place.gateway, known_settings())
    gone = await place.manager.create_session()
    await place.generation.update_session_status(gone, "processing")
    clock.shift(1900)
    left = await place.manager.create_session()

    assert [row["session_id"] for row in (await stats.list_sessions())["sessions"]] == [left]
    assert await stats.get_session_count() == 1
    health = await stats.get_health_status()
    assert health["session_count"] == 1
    assert health["stuck_sessions"] == 0
    assert health["stuck_session_ids"] == []
    assert (await stats.get_performance_stats())["total_sessions"] == 1


async def test_an_entry_of_the_index_that_points_at_nothing_is_taken_out_when_it_is_listed(
    raw: Redis, settings: Settings
) -> None:
    [gone, left] = await load_sessions(raw, settings, 2, at_ms=1_767_268_800_000)
    async with reading(settings) as reader:
        prefix = reader.gateway.keys.session(gone).prefix
        found = [key async for key in raw.scan_iter(f"{prefix}*")]
        await raw.delete(*found)
        page = await reader.stats.list_sessions()
        assert [row["session_id"] for row in page["sessions"]] == [left]
        assert await reader.stats.get_session_count() == 1
        assert (
            await reader.gateway.command("HEXISTS", reader.gateway.keys.index("entries"), gone) == 0
        )


# --- What it costs --------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a call costs the store: commands by name, those in scripts too, and bytes."""

    commands: dict[str, int]
    received: int
    sent: int


async def measure(raw: Redis, call: Any) -> Cost:
    """Run a call and say what it cost."""
    await ask(raw, "CONFIG", "RESETSTAT")
    begun = await raw.info("stats")
    await call
    ended = await raw.info("stats")
    commands = await raw.info("commandstats")
    return Cost(
        {
            name.removeprefix("cmdstat_"): int(each["calls"])
            for name, each in commands.items()
            if name not in {"cmdstat_info", "cmdstat_config|resetstat"}
        },
        int(ended["total_net_input_bytes"]) - int(begun["total_net_input_bytes"]),
        int(ended["total_net_output_bytes"]) - int(begun["total_net_output_bytes"]),
    )


async def refuse_one(settings: Settings, limit: int) -> Any:
    """Make a session where there are as many as there may be."""
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), "max_sessions": limit})
    gateway = connect(chosen)
    try:
        manager = make_manager(gateway, chosen)
        with pytest.raises(SessionCapacityError):
            await manager.create_session()
    finally:
        await gateway.aclose()


async def costs_with(raw: Redis, settings: Settings, count: int) -> dict[str, Cost]:
    """Say what operators' calls cost with so many sessions."""
    await raw.flushdb()
    names = await load_sessions(raw, settings, count)
    async with reading(settings, max_sessions=10**6) as reader:
        stats = reader.stats
        after = max(PAGE, len(names) - 99 * PAGE) if count > 100 * PAGE else count // 2
        created_ms = int(await reader.gateway.command("HGET", *_made(reader, names[after])))
        later = write_cursor(f"{created_ms:016}:{names[after]}")
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "stats": stats.get_performance_stats,
            "health": stats.get_health_status,
            "count": stats.get_session_count,
            "first page": lambda: stats.list_sessions(limit=PAGE),
            "hundredth page": lambda: stats.list_sessions(limit=PAGE, cursor=later),
            "page of a workspace": lambda: stats.list_sessions(limit=PAGE // 2, workspace_id="w3"),
            "capacity check": lambda: refuse_one(settings, count),
        }
        for call in calls.values():
            await call()  # keeps the scripts, opens the connections
        return {name: await measure(raw, call()) for name, call in calls.items()}


def _made(reader: Reader, session_id: str) -> tuple[str, str]:
    return reader.gateway.keys.session(session_id).progress, "created_at"


async def test_no_call_costs_more_with_3000_sessions_than_with_100(
    raw: Redis, settings: Settings
) -> None:
    few = await costs_with(raw, settings, 100)
    many = await costs_with(raw, settings, 3000)
    await raw.flushdb()  # sooner than every key's lifetime is looked at
    for name, cost in few.items():
        assert cost.commands == many[name].commands, name
        # A number may have a digit or two more.
        assert abs(cost.received - many[name].received) <= 64, name
        assert abs(cost.sent - many[name].sent) <= 128, name
    assert many["hundredth page"].commands == many["first page"].commands
    assert "scan" not in {command for cost in many.values() for command in cost.commands}
    assert sum(many["stats"].commands.values()) < 100
    assert sum(many["capacity check"].commands.values()) < 20


async def test_ages_are_counted_by_when_a_session_was_made(raw: Redis, settings: Settings) -> None:
    async with reading(settings) as reader:
        now_ms = await store_time_ms(reader.gateway)
        hour_ms = 3_600_000
        for age_ms in (0, hour_ms - 5000, hour_ms + 5000, 6 * hour_ms - 5000, 7 * hour_ms):
            await load_sessions(raw, settings, 1, at_ms=now_ms - age_ms)
        for age_ms in (24 * hour_ms - 5000, 24 * hour_ms + 5000, 100 * hour_ms):
            await load_sessions(raw, settings, 1, at_ms=now_ms - age_ms)
        view = await reader.stats.get_performance_stats()
        assert view["age_distribution"] == {
            "under_1h": 2,
            "1h_to_6h": 2,
            "6h_to_24h": 2,
            "over_24h": 2,
        }
        assert view["oldest_session_hours"] == pytest.approx(100, abs=0.02)
        assert view["newest_session_hours"] == pytest.approx(0, abs=0.02)
        assert view["average_age_hours"] == pytest.approx(163 / 8, abs=0.02)
