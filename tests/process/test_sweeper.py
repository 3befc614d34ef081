"""A sweeper that is killed with -9 at any moment leaves nothing half done."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import time_machine

from app.clock import monotonic_s, now_ms
from tests.faults.servers import Valkey
from tests.process.service_process import linux_only
from tests.process.store_worker import StoreWorker
from tests.store.sessions import Manager, working_at

pytestmark = linux_only

KILLS = 20
SESSIONS = 80
LEASE_S = 0.02
"""So soon the next one may sweep."""

RULES = [{"older_than_hours": 1}]

LOOK = """
    local whole, half = {}, {}
    for _, id in ipairs(ARGV) do
        local prefix, there = 'onboarding:' .. id .. ':', 0
        for _, name in ipairs({'metadata', 'progress', 'events', 'ops', 'export', 'step:1',
                'step:2', 'draft:3'}) do
            there = there + redis.call('EXISTS', prefix .. name)
        end
        if there == 8 then whole[#whole + 1] = id elseif there > 0 then half[#half + 1] = id end
    end
    return {whole, half}
"""
"""Look at all sessions at one moment: which are whole, which are not."""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StoreWorker]:
    with StoreWorker(tmp_path) as worker:
        yield worker.wait_until_ready()


async def make_expired(manager: Manager, count: int) -> list[str]:
    """Make sessions that a rule says are over, each with everything that a session may have."""

    async def make() -> str:
        session_id = await manager.create_session(workspace_id="w1", user_id="u1")
        await manager.save_steps(session_id, {1: {"a": 1}, 2: {"a": 2}})
        await manager.save_draft(session_id, 3, {"a": 3})
        await manager.finalize(session_id)
        return session_id

    return list(await asyncio.gather(*(make() for _ in range(count))))


def index_of(valkey: Valkey) -> set[str]:
    """Name every session that some key of the index names."""
    named: set[str] = set()
    for key in valkey.command("KEYS", "onboarding:index:*sessions*"):
        match valkey.command("TYPE", key):
            case "zset":
                named |= {each.split(":")[-1] for each in valkey.command("ZRANGE", key, 0, -1)}
            case "hash" if key.endswith(":entries"):
                named |= {each for each in valkey.command("HKEYS", key) if each[0] != ":"}
    return named


@pytest.mark.parametrize("tag", ["off", "on"])
async def test_a_sweeper_killed_20_times_leaves_no_session_half_removed_and_no_entry_without_one(
    worker: StoreWorker, valkey: Valkey, tag: str
) -> None:
    valkey.command("FLUSHALL")
    chance = random.Random(4)
    settings: dict[str, Any] = {
        "redis_url": valkey.url,
        "key_hash_tag": tag,
        "expiry_rules": RULES,
    }
    sessions: list[str] = []
    cut_short = 0
    async with working_at(valkey.url, key_hash_tag=tag) as place:
        for _ in range(KILLS):
            with time_machine.travel(now_ms() / 1000 - 2 * 3600):
                sessions += await make_expired(place.manager, SESSIONS - len(sessions))
                await place.gateway.aclose()
            pid = worker.start_sweep(LEASE_S, **settings)
            wait_for(valkey, tag, sessions, chance.randrange(SESSIONS * 7 // 8, SESSIONS))
            worker.kill_sweep(pid)
            left = look(valkey, tag, sessions)
            cut_short += len(left) > 0

            # The next one, which only mends.
            worker.start_sweep(LEASE_S, **{**settings, "expiry_rules": []})
            worker.wait_for_sweep()
            assert look(valkey, tag, sessions) == left
            assert index_of(valkey) == set(left)
            sessions = left
    assert cut_short >= KILLS / 4

    worker.start_sweep(LEASE_S, **settings)
    worker.wait_for_sweep()
    assert look(valkey, tag, sessions) == []
    assert index_of(valkey) == set()
    assert [key for key in valkey.command("KEYS", "*") if ":index:" not in key] == []


def wait_for(valkey: Valkey, tag: str, sessions: list[str], left: int) -> None:
    """Look on until so few sessions are left: without a pause, for a sweep takes 20 ms."""
    until_s = monotonic_s() + 10.0
    while len(look(valkey, tag, sessions)) > left:
        assert monotonic_s() < until_s, f"waited in vain until {left} are left"


def look(valkey: Valkey, tag: str, sessions: list[str]) -> list[str]:
    """Name the sessions that are there, all of which must be whole."""
    ids = [f"{{{each}}}" if tag == "on" else each for each in sessions]
    whole, half = valkey.command("EVAL", LOOK, 0, *ids)
    assert half == []
    return [each.strip("{}") for each in whole]
