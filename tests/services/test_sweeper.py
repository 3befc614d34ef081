"""The sweeper: what it removes and what it spares, one at a time, whatever goes wrong meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
import time_machine
from fakeredis import FakeAsyncRedis, FakeServer
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.errors import SessionNotFoundError, StoreUnavailableError
from app.onboarding.events import EventId
from app.services.manager import make_manager
from app.services.retention import RetentionService, make_retention_service
from app.services.stats import StatsService, make_stats_service
from app.services.sweeper import Sweeper
from app.services.tasks import TaskService
from app.settings import Settings
from app.store.connect import connect
from app.store.feed import FeedStore
from app.store.gateway import Gateway, RetryPolicy
from app.store.keys import Keys
from app.store.links import PooledLink
from app.store.retention import RetentionStore
from app.store.stats import StatsStore
from tests.conftest import NOON_S, QUICKLY, known_settings
from tests.faults.servers import Valkey
from tests.store.sessions import Manager, Place

DESCRIBED = """[
    {"status": "error", "older_than_hours": 1, "since": "ended"},
    {"status": "complete", "older_than_hours": 6, "since": "ended"},
    {"older_than_hours": 24}
]"""

EVERYTHING_AT_ONCE = '[{"older_than_hours": 0}]'

HOUR_S = 3600
DAY_S = 24 * HOUR_S

TAGS = pytest.mark.parametrize("tag", ["off", "on"])


class Process:
    """What one process has: a manager, a sweeper, the services of operators, all on one store."""

    def __init__(self, gateway: Gateway, settings: Settings, *, lease_s: float = 15.0) -> None:
        self.gateway = gateway
        self.place = Place(make_manager(gateway, settings), gateway)
        self.manager: Manager = self.place.manager
        tasks = TaskService(gateway, settings.task_rules)
        self.retention: RetentionService = make_retention_service(gateway, tasks, settings)
        self.stats: StatsService = make_stats_service(gateway, settings)
        self.store = RetentionStore(gateway)
        self.sweeper = Sweeper(
            self.store,
            StatsStore(gateway, max_sessions=0, interval_s=settings.cleanup_interval_s),
            tasks,
            rules=settings.expiry_rules,
            interval_s=settings.cleanup_interval_s,
            pin=settings.catalogue.pin,
            lease_s=lease_s,
        )

    async def sweep(self) -> None:
        """Sweep, with the index as far as the sessions."""
        await self.gateway.aclose()
        assert await self.sweeper.sweep()
        await self.gateway.aclose()

    async def survivors(self, sessions: dict[str, str]) -> set[str]:
        return {name for name, session_id in sessions.items() if await self.is_there(session_id)}

    async def is_there(self, session_id: str) -> bool:
        try:
            await self.manager.get_session(session_id)
        except SessionNotFoundError:
            prefix = self.gateway.keys.session(session_id).prefix
            assert await self.gateway.command("KEYS", f"{prefix}*") == []
            return False
        return True

    async def named_in_index(self) -> set[str]:
        """Every session that some key of the index names, what tells of the past aside."""
        named: set[str] = set()
        for key in await self.gateway.command("KEYS", self.gateway.keys.index("*")):
            match await self.gateway.command("TYPE", key):
                case b"zset":
                    found = await self.gateway.command("ZRANGE", key, 0, -1)
                    named |= {member.decode().split(":")[-1] for member in found}
                case b"hash" if key.endswith(b":entries"):
                    found = await self.gateway.command("HKEYS", key)
                    named |= {name.decode() for name in found if not name.startswith(b":")}
        return named

    async def ends(self) -> list[tuple[str, str, object]]:
        """List the ends of sessions that the feed tells of: session, type, reason."""
        events, _ = await FeedStore(self.gateway).list_after(EventId(0, 0))
        return [
            (session_id, str(event["type"]), event.get("reason"))
            for session_id, event in events
            if event["type"] in ("deleted", "expired", "evicted")
        ]

    async def cleanup_stats(self) -> dict[str, Any]:
        stats = await self.stats.get_performance_stats()
        return {**stats["cleanup"]}


MakeProcess = Callable[..., Process]


class TalkativeStore(FakeAsyncRedis):
    """A fake store that says how much memory it uses."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] == "INFO":
            return {"used_memory": 1_000_000}
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def talkative_gateway(server: FakeServer, settings: Settings) -> Gateway:
    return Gateway(
        lambda _: PooledLink(TalkativeStore(server=server, legacy_responses=False), send_s=1.5),
        keys=Keys(hash_tag=settings.hash_tag),
        lifetime_ms=settings.session_ttl_s * 1000,
        mode="standalone",
        policy=RetryPolicy(base_s=0.01, jitter_s=0.0),
    )


@pytest.fixture
async def fake(clock: time_machine.Traveller) -> AsyncIterator[MakeProcess]:
    """Make processes on one fake store that goes by `clock`."""
    server = FakeServer()
    made: list[Process] = []

    def make(lease_s: float = 15.0, **overrides: Any) -> Process:
        settings = known_settings(**overrides)
        made.append(Process(talkative_gateway(server, settings), settings, lease_s=lease_s))
        return made[-1]

    yield make
    for each in made:
        await each.gateway.aclose()


@pytest.fixture
async def real(raw: Redis, valkey: Valkey) -> AsyncIterator[MakeProcess]:
    """Make processes on the empty real store."""
    made: list[Process] = []

    def make(lease_s: float = 15.0, **overrides: Any) -> Process:
        settings = known_settings(**{"redis_url": valkey.url, **QUICKLY, **overrides})
        made.append(Process(connect(settings), settings, lease_s=lease_s))
        return made[-1]

    yield make
    for each in made:
        await each.gateway.aclose()


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    for module in ("sweeper", "background", "retention", "manager", "tasks"):
        monkeypatch.setattr(f"app.services.{module}.log", structlog.get_logger())


async def export(process: Process, session_id: str) -> None:
    await process.manager.save_step(session_id, 1, {"a": 1})
    await process.manager.finalize(session_id)


async def set_status(process: Process, session_id: str, *statuses: str) -> None:
    for status in statuses:
        await process.place.generation.update_session_status(session_id, status)


# --- Which sessions go ----------------------------------------------------------------------------


@TAGS
async def test_the_described_rules_count_from_the_creation_or_from_the_end(
    fake: MakeProcess, clock: time_machine.Traveller, tag: str
) -> None:
    process = fake(expiry_rules=DESCRIBED, key_hash_tag=tag)
    sessions = {}
    for name in ("failed", "completed", "failed late", "untouched", "busy", "running again"):
        sessions[name] = await process.manager.create_session()
        await export(process, sessions[name])

    async def survive(hours: float) -> set[str]:
        """Sweep at so many hours after the beginning."""
        clock.move_to(NOON_S + hours * HOUR_S)
        await process.sweep()
        return await process.survivors(sessions)

    everybody = set(sessions)
    await set_status(process, sessions["failed"], "processing", "error")
    await set_status(process, sessions["completed"], "processing", "complete")
    await set_status(process, sessions["running again"], "processing", "error", "processing")
    assert await survive(0.999) == everybody
    assert await survive(1) == everybody - {"failed"}
    assert await survive(5.999) == everybody - {"failed"}
    # What is written after the end does not put the end off.
    await set_status(process, sessions["completed"], "complete")
    assert await survive(6) == everybody - {"failed", "completed"}
    clock.move_to(NOON_S + 10 * HOUR_S)
    await set_status(process, sessions["failed late"], "processing", "error")
    clock.move_to(NOON_S + 10.5 * HOUR_S)
    await set_status(process, sessions["failed late"], "processing", "error")
    left = {"untouched", "busy", "running again"}
    assert await survive(11.499) == {*left, "failed late"}
    assert await survive(11.5) == left
    clock.move_to(NOON_S + 23.9 * HOUR_S)
    await process.place.generation.set_language_preference(sessions["busy"], "de")
    assert await survive(23.999) == left
    # A day after the creation, however busy.
    assert await survive(24) == set()
    assert await process.named_in_index() == set()
    assert [(kind, why) for _, kind, why in await process.ends()] == [("expired", "rule")] * 6
    assert (await process.cleanup_stats())["removed"] == 6


@TAGS
async def test_a_rule_may_count_from_the_last_write(
    fake: MakeProcess, clock: time_machine.Traveller, tag: str
) -> None:
    rules = '[{"status":"pending","older_than_hours":2,"since":"activity"}]'
    process = fake(expiry_rules=rules, key_hash_tag=tag)
    session_id = await process.manager.create_session()
    for write in (
        lambda: process.manager.update_progress(session_id, 3),
        lambda: process.place.generation.set_language_preference(session_id, "en"),
        lambda: process.manager.set_metadata(session_id, "u1", None),
    ):
        clock.shift(1.9 * HOUR_S)
        await process.sweep()
        await write()
    clock.shift(1.9 * HOUR_S)
    await process.manager.get_session_summary(session_id)
    await process.sweep()
    assert await process.is_there(session_id)
    clock.shift(0.1 * HOUR_S)
    await process.sweep()
    assert not await process.is_there(session_id)


@TAGS
async def test_out_of_the_box_only_the_lifetime_of_7_days_ends_a_session(
    fake: MakeProcess, clock: time_machine.Traveller, tag: str
) -> None:
    process = fake(key_hash_tag=tag)
    sessions = {}
    for name in ("empty", "failed", "completed", "held"):
        sessions[name] = await process.manager.create_session()
    await export(process, sessions["completed"])
    await set_status(process, sessions["completed"], "processing", "complete")
    await set_status(process, sessions["failed"], "error")
    await process.manager.save_step(sessions["held"], 1, {"a": 1})
    for _ in range(6):
        clock.shift(DAY_S)
        await process.sweep()
        assert await process.survivors(sessions) == set(sessions)
    await process.manager.save_draft(sessions["empty"], 1, {"a": 1})
    # A lifetime is at most a hundredth longer than 7 days.
    clock.shift(1.07 * DAY_S)
    await process.sweep()
    assert await process.survivors(sessions) == {"empty"}
    assert await process.named_in_index() == {sessions["empty"]}
    ends = await process.ends()
    assert {(kind, why) for _, kind, why in ends} == {("expired", "lifetime")}
    assert len(ends) == 3
    stats = await process.cleanup_stats()
    assert (stats["removed"], stats["expired"], stats["failures"]) == (0, 3, 0)


Prepare = Callable[[Process, str], Awaitable[object]]


async def save(process: Process, session_id: str) -> None:
    await process.manager.save_step(session_id, 1, {"a": 1})


async def draft(process: Process, session_id: str) -> None:
    await process.manager.save_draft(session_id, 1, {"a": 1})


async def export_and_end(process: Process, session_id: str) -> None:
    await export(process, session_id)
    await set_status(process, session_id, "processing", "complete")


async def reopen(process: Process, session_id: str) -> None:
    await export_and_end(process, session_id)
    await process.manager.reopen(session_id)


HELD: dict[str, list[Prepare]] = {
    "a saved step": [save],
    "a step saved after a failure": [lambda p, s: set_status(p, s, "error"), save],
    "a failure after a saved step": [save, lambda p, s: set_status(p, s, "error")],
    "a completion without an export": [
        save,
        lambda p, s: set_status(p, s, "processing", "complete"),
    ],
    "a draft": [draft],
    "a draft in a failed session": [lambda p, s: set_status(p, s, "error"), draft],
    "a draft after reopen": [reopen, draft],
    "a step saved again after reopen": [reopen, save],
    "another step saved after reopen": [
        reopen,
        lambda p, s: p.manager.save_step(s, 2, {"a": 2}),
    ],
    "a patch after reopen": [reopen, lambda p, s: p.manager.patch_step(s, 1, {"b": 2})],
    "a promoted draft after reopen": [
        reopen,
        draft,
        lambda p, s: p.manager.promote_draft_to_step(s, 1),
    ],
    "a step saved after reopen, and a failure": [
        reopen,
        save,
        lambda p, s: set_status(p, s, "processing", "error"),
    ],
    "a recovery of an open session": [
        save,
        lambda p, s: p.retention.recover_corrupted_session(s),
    ],
    "a recovery after reopen": [reopen, lambda p, s: p.retention.recover_corrupted_session(s)],
    "several steps, one deleted": [
        lambda p, s: p.manager.save_steps(s, {1: {"a": 1}, 2: {"a": 2}}),
        lambda p, s: p.manager.delete_step(s, 1),
    ],
}
"""How a session comes to hold answers that were never exported."""

FREE: dict[str, list[Prepare]] = {
    "nothing": [],
    "an export": [export],
    "an export, and its end": [export_and_end],
    "a failure with nothing saved": [lambda p, s: set_status(p, s, "error")],
    "an export, reopened": [reopen],
    "an export again after reopen": [reopen, save, lambda p, s: p.manager.finalize(s)],
    "a draft that was locked in": [
        draft,
        lambda p, s: p.manager.save_step(s, 2, {"a": 2}),
        lambda p, s: p.manager.finalize(s),
    ],
    "a step that was deleted": [save, lambda p, s: p.manager.delete_step(s, 1)],
    "a draft that was deleted": [draft, lambda p, s: p.manager.delete_draft(s, 1)],
    "a recovery after an export": [
        export,
        lambda p, s: p.retention.recover_corrupted_session(s),
    ],
}
"""How a session comes to hold none."""

ALL_RULES = """[
    {"older_than_hours": 0, "since": "activity"}, {"older_than_hours": 0, "since": "ended"},
    {"older_than_hours": 0}, {"status": "pending", "older_than_hours": 0},
    {"status": "error", "older_than_hours": 0, "since": "ended"},
    {"status": "complete", "older_than_hours": 0, "since": "ended"}
]"""


@TAGS
async def test_no_rule_removes_answers_that_were_never_exported_and_all_remove_the_others(
    real: MakeProcess, tag: str
) -> None:
    process = real(expiry_rules=ALL_RULES, key_hash_tag=tag)
    sessions = {}
    for name, steps in {**HELD, **FREE}.items():
        sessions[name] = await process.manager.create_session()
        for do in steps:
            await do(process, sessions[name])
    for _ in range(2):
        await process.sweep()
        assert await process.survivors(sessions) == set(HELD)
    assert await process.named_in_index() == {sessions[name] for name in HELD}
    await process.retention.cleanup_failed_sessions()
    await process.retention.cleanup_completed_sessions(0)
    assert await process.survivors(sessions) == set(HELD)
    # Whoever says so in so many words gets it.
    assert (await process.retention.cleanup(everything=True))["removed"] == len(HELD)
    assert await process.survivors(sessions) == set()
    assert await process.named_in_index() == set()


@TAGS
async def test_a_session_that_is_written_between_the_look_and_the_removal_stays(
    fake: MakeProcess, clock: time_machine.Traveller, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = '[{"older_than_hours":1,"since":"activity"}]'
    process, other = (fake(expiry_rules=rules, key_hash_tag=tag) for _ in range(2))
    session_id = await process.manager.create_session()
    await process.gateway.aclose()
    clock.shift(2 * HOUR_S)
    listed = process.store.list_due

    async def list_due(*args: Any) -> Any:
        due = await listed(*args)
        await other.manager.save_step(session_id, 1, {"a": 1})
        return due

    monkeypatch.setattr(process.store, "list_due", list_due)
    await process.sweep()
    assert await process.is_there(session_id)
    assert await process.ends() == []


@TAGS
async def test_more_sessions_than_are_looked_up_at_a_time_go_in_one_sweep(
    real: MakeProcess, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.retention.LISTED_AT_ONCE", 7)
    process = real(expiry_rules=EVERYTHING_AT_ONCE, key_hash_tag=tag)
    made = [await process.manager.create_session() for _ in range(40)]
    drafts = set(made[::3])
    for session_id in drafts:
        # These are looked at, and spared.
        await draft(process, session_id)
    await process.sweep()
    sessions = {each: each for each in made}
    assert await process.survivors(sessions) == drafts
    assert await process.named_in_index() == drafts


# --- Damage ---------------------------------------------------------------------------------------


@TAGS
async def test_what_was_deleted_behind_its_back_is_in_the_index_no_more_after_a_sweep(
    real: MakeProcess, tag: str
) -> None:
    process = real(key_hash_tag=tag)
    lost = []
    for number in range(5):
        lost.append(await process.manager.create_session(user_id="u1", workspace_id="w1"))
        await process.manager.save_step(lost[-1], 1 + number, {"a": 1})
    await set_status(process, lost[0], "processing")
    await set_status(process, lost[1], "error")
    await export_and_end(process, lost[2])
    kept = await process.manager.create_session(user_id="u1")
    await process.gateway.aclose()
    for session_id in lost:
        for key in await process.gateway.command(
            "KEYS", process.gateway.keys.session(session_id).prefix + "*"
        ):
            await process.gateway.command("DEL", key)

    with capture_logs() as logs:
        await process.sweep()

    assert await process.named_in_index() == {kept}
    stats = await process.stats.get_performance_stats()
    assert stats["total_sessions"] == 1
    (told,) = [line for line in logs if line["event"] == "sweep_finished"]
    assert (told["sessions"], told["failures"]) == (1, 0)
    if tag == "off":
        assert told["repaired"] == 5
    assert sorted(session_id for session_id, _, _ in await process.ends()) == sorted(lost)


@TAGS
async def test_a_session_that_cannot_be_read_is_spared_by_rules_and_holds_nobody_up(
    real: MakeProcess, tag: str
) -> None:
    process = real(expiry_rules=EVERYTHING_AT_ONCE, key_hash_tag=tag)
    damaged = [await process.manager.create_session() for _ in range(2)]
    sound = await process.manager.create_session()
    await process.gateway.aclose()
    keys = [process.gateway.keys.session(each).progress for each in damaged]
    await process.gateway.command("HDEL", keys[0], "saved")
    await process.gateway.command("DEL", keys[1])
    await process.gateway.command("SET", keys[1], "foreign", "PX", 60_000)

    await process.sweep()

    assert not await process.is_there(sound)
    for key in keys:
        assert await process.gateway.command("EXISTS", key) == 1
    assert {*damaged} <= await process.named_in_index()


@TAGS
async def test_a_clean_up_of_everything_leaves_no_key_of_a_damaged_session(
    real: MakeProcess, tag: str
) -> None:
    process = real(key_hash_tag=tag)
    session_id = await process.manager.create_session()
    await process.manager.save_steps(session_id, {1: {"a": 1}, 23: {"a": 1}})
    await draft(process, session_id)
    await process.gateway.aclose()
    await process.gateway.command(
        "HDEL", process.gateway.keys.session(session_id).progress, "saved"
    )

    assert await process.retention.force_cleanup_all() == 1

    assert not await process.is_there(session_id)
    assert await process.named_in_index() == set()


# --- One at a time --------------------------------------------------------------------------------


@dataclass
class Held:
    """Holds a sweep where it looks for what is due, until it is let go on."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


def hold(process: Process, monkeypatch: pytest.MonkeyPatch) -> Held:
    held, reclaim = Held(), process.store.reclaim

    async def wait() -> None:
        held.arrived.set()
        await held.go_on.wait()
        await reclaim()

    monkeypatch.setattr(process.store, "reclaim", wait)
    return held


@TAGS
async def test_one_sweeps_at_a_time_and_the_next_one_when_it_is_due_again(
    fake: MakeProcess,
    clock: time_machine.Traveller,
    tag: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = (fake(cleanup_interval_s=60, key_hash_tag=tag) for _ in range(2))
    held = hold(one, monkeypatch)
    sweeping = asyncio.create_task(one.sweeper.sweep_if_due())
    await held.arrived.wait()
    assert not await other.sweeper.sweep_if_due()
    assert not await other.sweeper.sweep()
    held.go_on.set()
    assert await sweeping

    for each in (one, other):
        assert not await each.sweeper.sweep_if_due()
    clock.shift(59)
    assert not await other.sweeper.sweep_if_due()
    clock.shift(1)
    assert await other.sweeper.sweep_if_due()
    assert not await one.sweeper.sweep_if_due()
    assert await one.sweeper.sweep()


async def test_the_lease_of_one_that_is_not_heard_of_any_more_is_taken_up(
    fake: MakeProcess, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (fake(lease_s=5, expiry_rules=EVERYTHING_AT_ONCE) for _ in range(2))
    session_id = await one.manager.create_session()
    held = hold(one, monkeypatch)
    sweeping = asyncio.create_task(one.sweeper.sweep())
    await held.arrived.wait()
    clock.shift(4.9)
    assert not await other.sweeper.sweep()
    clock.shift(0.2)
    with capture_logs() as logs:
        assert await other.sweeper.sweep()
        assert not await one.is_there(session_id)
        # The first one comes to itself again, and does no harm.
        held.go_on.set()
        await sweeping
    assert [line["event"] for line in logs].count("sweep_finished") >= 1
    assert (await one.cleanup_stats())["removed"] == 1
    assert await other.sweeper.sweep()


async def test_one_that_finds_its_lease_lost_stops(
    fake: MakeProcess, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fake(lease_s=5, expiry_rules=EVERYTHING_AT_ONCE)
    other = fake(lease_s=500)
    monkeypatch.setattr("app.store.retention.LISTED_AT_ONCE", 1)
    # Past every third of a lease, so that it looks after each one.
    monkeypatch.setattr("app.services.sweeper.monotonic_s", iter(range(0, 10_000, 100)).__next__)
    sessions = [await one.manager.create_session() for _ in range(3)]
    removed = one.store.remove

    async def remove(*args: Any, **named: Any) -> bool:
        gone = await removed(*args, **named)
        clock.shift(6)
        # Somebody else begins, and is not done for long.
        assert await other.store.claim_sweep("other", lease_s=500, interval_s=0.1, now=True)
        return gone

    monkeypatch.setattr(one.store, "remove", remove)
    with capture_logs() as logs:
        assert not await one.sweeper.sweep()
    assert [line["event"] for line in logs][-1] == "sweep_lost"
    assert len([each for each in sessions if await one.is_there(each)]) == 2
    # It has not given back what is not its own.
    assert not await one.sweeper.sweep()


async def test_a_long_sweep_keeps_its_lease(
    fake: MakeProcess, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (fake(lease_s=5, expiry_rules=EVERYTHING_AT_ONCE) for _ in range(2))
    monkeypatch.setattr("app.store.retention.LISTED_AT_ONCE", 1)
    monkeypatch.setattr("app.services.sweeper.monotonic_s", iter(range(0, 10_000, 100)).__next__)
    sessions = [await one.manager.create_session() for _ in range(5)]
    removed = one.store.remove

    async def remove(*args: Any, **named: Any) -> bool:
        clock.shift(2)
        assert not await other.sweeper.sweep()
        return await removed(*args, **named)

    monkeypatch.setattr(one.store, "remove", remove)
    assert await one.sweeper.sweep()
    assert [each for each in sessions if await one.is_there(each)] == []


async def test_the_interval_that_another_process_sets_holds_at_once(
    fake: MakeProcess, clock: time_machine.Traveller
) -> None:
    one, other = (fake(cleanup_interval_s=3600) for _ in range(2))
    assert await one.sweeper.sweep_if_due()
    clock.shift(30)
    assert not await one.sweeper.sweep_if_due()
    await other.retention.reconfigure(cleanup_interval_s=30)
    assert await one.sweeper.sweep_if_due()
    clock.shift(29.9)
    assert not await one.sweeper.sweep_if_due()
    await other.retention.reconfigure(cleanup_interval_s=7200)
    clock.shift(3600)
    assert not await one.sweeper.sweep_if_due()
    await other.retention.reconfigure(cleanup_interval_s=None)
    assert await one.sweeper.sweep_if_due()


async def test_in_the_background_it_looks_often_enough_to_take_up_a_new_interval(
    real: MakeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.sweeper.LOOK_EVERY_S", 0.01)
    one, other = (real(cleanup_interval_s=3600, expiry_rules=EVERYTHING_AT_ONCE) for _ in range(2))
    assert await one.sweeper.sweep()
    session_id = await one.manager.create_session()
    await one.retention.start()
    try:
        await other.retention.reconfigure(cleanup_interval_s=0.1)
        async with asyncio.timeout(5):
            while await one.is_there(session_id):
                await asyncio.sleep(0.01)
    finally:
        assert await one.retention.shutdown(5)


# --- Failures -------------------------------------------------------------------------------------


@TAGS
async def test_a_sweep_that_crashes_is_logged_and_counted_and_the_next_one_goes_on(
    fake: MakeProcess, clock: time_machine.Traveller, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = fake(expiry_rules=EVERYTHING_AT_ONCE, cleanup_interval_s=60, key_hash_tag=tag)
    session_id = await process.manager.create_session()
    await process.gateway.aclose()

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as broken, capture_logs() as logs:
        broken.setattr(process.store, "list_due", fail)
        assert await process.sweeper.sweep_if_due()
    assert [(line["event"], line["exception"]) for line in logs] == [
        ("sweep_failed", "ZeroDivisionError")
    ]
    assert await process.is_there(session_id)
    assert (await process.cleanup_stats())["failures"] == 1

    clock.shift(60)
    assert await process.sweeper.sweep_if_due()
    assert not await process.is_there(session_id)
    stats = await process.cleanup_stats()
    assert (stats["removed"], stats["failures"]) == (1, 1)


@TAGS
async def test_a_removal_that_fails_is_logged_and_counted_and_the_others_go_on(
    fake: MakeProcess, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = fake(expiry_rules=EVERYTHING_AT_ONCE, key_hash_tag=tag)
    made = [await process.manager.create_session() for _ in range(3)]
    remove = process.store.remove

    async def fail_for_one(session_id: str, *args: Any, **named: Any) -> bool:
        if session_id == made[1]:
            raise StoreUnavailableError
        return await remove(session_id, *args, **named)

    with monkeypatch.context() as broken, capture_logs() as logs:
        broken.setattr(process.store, "remove", fail_for_one)
        await process.sweep()
    told = {line["event"]: line for line in logs}
    assert told["session_not_removed"]["session_id"] == made[1]
    assert told["session_not_removed"]["code"] == "store_unavailable"
    assert (told["sweep_finished"]["removed"], told["sweep_finished"]["failures"]) == (2, 1)
    assert [each for each in made if await process.is_there(each)] == [made[1]]
    await process.sweep()
    assert not await process.is_there(made[1])
    stats = await process.cleanup_stats()
    assert (stats["removed"], stats["failures"]) == (3, 1)


async def test_an_outage_of_the_store_is_waited_out(
    clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.sweeper.LOOK_EVERY_S", 0.001)
    server = FakeServer()
    settings = known_settings(expiry_rules=EVERYTHING_AT_ONCE)
    process = Process(talkative_gateway(server, settings), settings)
    process.sweeper._looking._pause_s = 0.001
    session_id = await process.manager.create_session()
    server.connected = False
    process.sweeper.start()
    try:
        with capture_logs() as logs:
            async with asyncio.timeout(5):
                while "job_failed" not in [line["event"] for line in logs]:
                    await asyncio.sleep(0.001)
        server.connected = True
        async with asyncio.timeout(5):
            while await process.is_there(session_id):
                await asyncio.sleep(0.001)
    finally:
        await process.sweeper.aclose()
        await process.gateway.aclose()


# --- What it tells --------------------------------------------------------------------------------


@TAGS
async def test_each_sweep_tells_how_many_sessions_there_are_how_old_and_how_much_memory(
    real: MakeProcess, tag: str
) -> None:
    process = real(expiry_rules='[{"status":"error","older_than_hours":0}]', key_hash_tag=tag)
    with time_machine.travel(time.time() - 10 * HOUR_S):
        old = await process.manager.create_session()
        await set_status(process, old, "processing")
        await process.gateway.aclose()
    young = await process.manager.create_session()
    failed = await process.manager.create_session()
    await set_status(process, failed, "error")
    with capture_logs() as logs:
        await process.sweep()
    (told,) = [line for line in logs if line["event"] == "sweep_finished"]
    assert told["log_level"] == "info"
    assert told["by_status"] == {"pending": 1, "processing": 1, "complete": 0, "error": 0}
    assert told["sessions"] == 2
    assert told["average_age_hours"] == pytest.approx(5, abs=0.02)
    assert told["removed"] == 1
    assert (told["repaired"], told["tasks_removed"], told["failures"]) == (0, 0, 0)
    assert told["store_memory_bytes"] > 100_000
    (gone,) = [line for line in logs if line["event"] == "session_expired"]
    assert gone["session_id"] == failed

    stats = await process.stats.get_performance_stats()
    assert stats["cleanup"]["removed"] == 1
    assert stats["cleanup"]["failures"] == 0
    assert stats["cleanup"]["last_run"] is not None
    assert await process.survivors({"old": old, "young": young}) == {"old", "young"}
    assert (await process.stats.get_health_status())["cleanup_active"]


@TAGS
async def test_without_a_session_there_is_no_average_age(real: MakeProcess, tag: str) -> None:
    process = real(key_hash_tag=tag)
    assert (await process.cleanup_stats())["last_run"] is None
    with capture_logs() as logs:
        await process.sweep()
    (told,) = [line for line in logs if line["event"] == "sweep_finished"]
    assert told["average_age_hours"] is None
    assert told["sessions"] == 0


async def test_a_store_that_tells_nothing_of_its_memory_is_swept_all_the_same(
    real: MakeProcess, raw: Redis, valkey: Valkey
) -> None:
    user = ("ACL", "SETUSER", "reserved", "on", ">secret", "~*", "&*", "+@all", "-info")
    await raw.execute_command(*user)  # type: ignore[no-untyped-call]
    url = valkey.url.replace("redis://", "redis://reserved:secret@")
    try:
        process = real(redis_url=url, expiry_rules=EVERYTHING_AT_ONCE)
        session_id = await process.manager.create_session()
        with capture_logs() as logs:
            await process.sweep()
        assert not await process.is_there(session_id)
        (told,) = [line for line in logs if line["event"] == "sweep_finished"]
        assert told["store_memory_bytes"] is None
        assert (await process.cleanup_stats())["failures"] == 0
        await process.gateway.aclose()
    finally:
        await raw.execute_command("ACL", "DELUSER", "reserved")  # type: ignore[no-untyped-call]


async def test_health_says_when_nobody_sweeps(
    fake: MakeProcess, clock: time_machine.Traveller
) -> None:
    process = fake(cleanup_interval_s=60)
    assert not (await process.stats.get_health_status())["cleanup_active"]
    await process.sweep()
    assert (await process.stats.get_health_status())["cleanup_active"]
    clock.shift(129)
    assert (await process.stats.get_health_status())["cleanup_active"]
    clock.shift(2)
    assert not (await process.stats.get_health_status())["cleanup_active"]
