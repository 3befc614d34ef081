"""The limit of sessions, raced for by processes that know nothing of each other."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.faults.servers import Valkey
from tests.process.store_worker import StoreWorker

LIMIT, RACING = 50, 200

TAGS = pytest.mark.parametrize("tag", ["off", "on"])


@pytest.fixture(scope="module")
def racers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreWorker]]:
    with ExitStack() as stack:
        racers = [
            stack.enter_context(StoreWorker(tmp_path_factory.mktemp(name))) for name in ("a", "b")
        ]
        yield [racer.wait_until_ready() for racer in racers]


def sessions(valkey: Valkey) -> set[str]:
    """Name every session that there is."""
    keys = valkey.command("KEYS", "onboarding:*:progress")
    return {key.split(":")[1].strip("{}") for key in keys}


def race(racers: list[StoreWorker], count: int, **settings: Any) -> list[str | None]:
    for racer in racers:
        racer.order(do="create", count=count // len(racers), settings=settings)
    return [session_id for racer in racers for session_id in racer.made()]


@TAGS
def test_of_200_racing_creates_of_2_processes_exactly_50_are_made(
    racers: list[StoreWorker], valkey: Valkey, tag: str
) -> None:
    valkey.command("FLUSHALL")
    made = race(racers, RACING, redis_url=valkey.url, max_sessions=LIMIT, key_hash_tag=tag)
    assert len(made) == RACING
    assert made.count(None) == RACING - LIMIT
    assert sessions(valkey) == {session_id for session_id in made if session_id}


@TAGS
def test_200_racing_creates_of_2_processes_that_evict_leave_50(
    racers: list[StoreWorker], valkey: Valkey, tag: str
) -> None:
    valkey.command("FLUSHALL")
    settings = {
        "redis_url": valkey.url,
        "max_sessions": LIMIT,
        "capacity_policy": "evict_oldest",
        "key_hash_tag": tag,
    }
    before = set(race(racers, LIMIT, **settings))
    assert sessions(valkey) == before
    for racer in racers:
        racer.order(do="create", count=RACING // 2, settings=settings)
    seen = [len(sessions(valkey)) for _ in range(30)]
    made = {session_id for racer in racers for session_id in racer.made()}
    assert max(seen) <= LIMIT
    left = sessions(valkey)
    assert len(left) == LIMIT
    assert left <= made | before
