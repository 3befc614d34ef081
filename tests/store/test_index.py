"""The index of all sessions against the sessions themselves: after any calls it says the same."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import time_machine
from fakeredis import FakeServer
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.clock import now_ms
from app.errors import InvalidTransitionError, OnboardingError, StoreUnavailableError
from app.onboarding.catalogue import Catalogue
from app.onboarding.cursors import place_of
from app.onboarding.generation import ProgressEvent
from app.onboarding.retention import NO_LIMIT
from app.onboarding.sessions import SessionStatus
from app.onboarding.tasks import TASK_RULES
from app.services.manager import make_manager
from app.services.retention import make_retention_service
from app.services.sweeper import Sweeper
from app.services.tasks import TaskService
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.index import SessionIndex
from app.store.retention import RetentionStore
from app.store.scripts import load_script
from app.store.stats import StatsStore
from tests.conftest import NOON_S, QUICKLY, fake_gateway, known_settings
from tests.faults.proxy import Loss, Proxy
from tests.faults.servers import Valkey
from tests.store.conftest import MakePlace
from tests.store.sessions import Place, prepare, working_at

LIFETIME_S = 7200

EXAMPLES = 8

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
"""Making a failing example smaller would take minutes, and the last calls tell enough."""

STEPS = [1, 2, 3, 23]
CATALOGUE: Catalogue = known_settings().catalogue

own_ids = st.sampled_from(["a", "b.1", "a-2"])
"""Ids as Python callers choose them: made again after their end."""

owners = st.tuples(st.sampled_from([None, "u1", "u é"]), st.sampled_from([None, "w1", "w:{2}\\"]))


# --- What the index says --------------------------------------------------------------------------


@dataclass
class Index:
    """Everything that the index holds of sessions: its sorted sets, its entries, its counters."""

    sets: dict[str, dict[str, int]]
    entries: dict[str, dict[str, str]]
    created_sum_s: int
    funnel: dict[str, int]

    @property
    def named(self) -> set[str]:
        """Every session that some key of the index names."""
        members = {member for members in self.sets.values() for member in members}
        return {member.split(":")[-1] for member in members} | self.entries.keys()


async def read_index(gateway: Gateway) -> Index:
    """Read the index key by key, as nothing in the product does."""
    prefix = gateway.keys.index("")
    index = Index({}, {}, 0, {})
    for key in await gateway.command("KEYS", f"{prefix}*"):
        name = key.decode().removeprefix(prefix)
        kind = await gateway.command("TYPE", key)
        if name == "entries":
            for session_id, text in pairs(await gateway.command("HGETALL", key)):
                if session_id == ":adopted":
                    continue
                if session_id == ":created_s":
                    index.created_sum_s = int(text)
                else:
                    index.entries[session_id] = read_entry(text)
        elif name.startswith("funnel:"):
            index.funnel = {k: int(v) for k, v in pairs(await gateway.command("HGETALL", key))}
        elif kind == b"zset":
            found = await gateway.command("ZRANGE", key, 0, -1, "WITHSCORES")
            if found and isinstance(found[0], bytes):
                # Pairs, or a flat list, as the client gives it.
                found = zip(found[::2], found[1::2], strict=True)
            index.sets[name] = {member.decode(): int(float(score)) for member, score in found}
    return index


def read_entry(text: str) -> dict[str, str]:
    first, workspace, user = text.split("\n")
    created, class_, ended, ever, _, _ = first.split(" ")
    return {
        "created": created,
        "class": class_,
        "ended": ended,
        "ever": ever,
        "workspace": workspace,
        "user": user,
    }


def pairs(reply: Any) -> list[tuple[str, str]]:
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return [(name.decode(), value.decode()) for name, value in items]


# --- What the sessions say ------------------------------------------------------------------------


async def read_truth(gateway: Gateway, session_id: str) -> dict[str, str] | None:
    """Read what places a session from its own keys; None when it is gone."""
    keys = gateway.keys.session(session_id)
    progress = dict(pairs(await gateway.command("HGETALL", keys.progress)))
    if not progress:
        return None
    owner = dict(pairs(await gateway.command("HGETALL", keys.metadata)))
    assert abs(int(progress["deadline"]) - await gateway.command("PEXPIRETIME", keys.progress)) <= 1
    return {
        "created": progress["created_at"],
        "status": progress["status"],
        "ended": progress.get("ended_at", ""),
        "ever": progress.get("ever", ""),
        "activity": str(max(int(progress["updated_at"]), int(progress.get("active_at", 0)))),
        "deadline": progress["deadline"],
        "workspace": owner.get("workspace_id", ""),
        "user": owner.get("user_id", ""),
    }


@dataclass
class Model:
    """What a session must be by what was done to it."""

    workspace: str | None = None
    user: str | None = None
    status: str = "pending"
    saved: set[int] = field(default_factory=set)
    ever: set[int] = field(default_factory=set)
    finalized: bool = False
    unexported: bool = False
    is_placed: bool = True
    """Whether anything was written of it since the index was lost."""

    counted: set[int] = field(default_factory=set)
    """The steps that the funnel has counted of it."""

    @property
    def class_(self) -> str:
        is_held = self.unexported and self.saved
        return f"{self.status}:{'held' if is_held else 'free'}"


def expect(truths: dict[str, dict[str, str]], models: dict[str, Model]) -> Index:
    """Say what the index must hold of these sessions."""
    index = Index({}, {}, 0, {})
    for session_id, truth in truths.items():
        model = models[session_id]
        class_, created = model.class_, truth["created"]
        moment = place_of(int(created), session_id)
        wanted = {
            f"created:{class_}": (moment, 0),
            f"activity:{class_}": (session_id, int(truth["activity"])),
            "deadlines": (session_id, int(truth["deadline"])),
        }
        if truth["ended"]:
            wanted[f"ended:{class_}"] = (session_id, int(truth["ended"]))
        if model.workspace:
            wanted[f"workspace:{model.workspace}"] = (moment, 0)
        if model.user:
            wanted[f"user:{model.user}"] = (moment, 0)
        for name, (member, score) in wanted.items():
            index.sets.setdefault(name, {})[member] = score
        index.entries[session_id] = {
            "created": created,
            "class": class_,
            "ended": truth["ended"],
            "ever": truth["ever"],
            "workspace": model.workspace or "",
            "user": model.user or "",
        }
        index.created_sum_s += int(created) // 1000
    return index


# --- Any calls ------------------------------------------------------------------------------------


class IndexMachine(RuleBasedStateMachine):
    """The subclass made for a test has what it runs on."""

    runner: asyncio.Runner
    make_gateway: Callable[[], Gateway]
    clock: time_machine.Traveller | None
    """What fake stores go by."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Model] = {}
        self.funnel: dict[str, int] = {}
        self.gateway = self.make_gateway()
        chosen = known_settings()
        self.place = Place(make_manager(self.gateway, chosen), self.gateway)
        tasks = TaskService(self.gateway, TASK_RULES)
        self.retention = make_retention_service(self.gateway, tasks, chosen)
        self.stats = StatsStore(self.gateway, max_sessions=0, interval_s=3600)
        self.sweeper = Sweeper(
            RetentionStore(self.gateway),
            self.stats,
            tasks,
            rules=(),
            interval_s=3600,
            pin=CATALOGUE.pin,
        )

    def teardown(self) -> None:
        self.runner.run(self.gateway.aclose())

    def choose(self, number: int) -> tuple[str, Model]:
        session_id = sorted(self.models)[number % len(self.models)]
        return session_id, self.models[session_id]

    def run(self, work: Awaitable[Any]) -> Any:
        """Do something, let the index follow, and compare everything."""

        async def do() -> Any:
            try:
                return await work
            finally:
                await self.settle()

        return self.runner.run(do())

    async def settle(self) -> None:
        if self.gateway.keys.hash_tag:
            # What is refused is followed too.
            await self.gateway.aclose()

    def write(self, session_id: str, work: Awaitable[Any]) -> Any:
        """Do what a live session accepts."""
        result = self.run(work)
        self.models[session_id].is_placed = True
        self.compare()
        return result

    def compare(self) -> None:
        self.runner.run(self._compare())

    async def _compare(self) -> None:
        truths = {}
        for session_id in sorted(self.models):
            truth = await read_truth(self.gateway, session_id)
            if truth is not None:
                model = self.models[session_id]
                truths[session_id] = truth
                assert truth["status"] == model.status
                assert (truth["ended"] != "") == (model.status in ("complete", "error"))
                assert truth["workspace"] == (model.workspace or "")
                assert truth["user"] == (model.user or "")
        self.models = {each: self.models[each] for each in truths}

        rows, place = await self.stats.list_page("", 100)
        assert place == ""
        counts = await self.stats.count(CATALOGUE.pin, now_ms())
        index = await read_index(self.gateway)
        assert index.entries.keys() <= truths.keys()
        assert {each for each in truths if self.models[each].is_placed} <= index.entries.keys()
        listed = {each: truths[each] for each in index.entries}
        expected = expect(listed, self.models)
        assert index.sets == expected.sets
        assert index.entries == expected.entries
        assert index.created_sum_s == expected.created_sum_s
        assert index.named == expected.named

        # The readers say what the keys say.
        in_order = sorted(listed, key=lambda each: (int(listed[each]["created"]), each))
        assert [row.facts.session_id for row in rows] == in_order[::-1]
        for row in rows:
            facts, truth = row.facts, listed[row.facts.session_id]
            assert (facts.status, facts.is_held) == _class(self.models[facts.session_id].class_)
            assert facts.created_ms == int(truth["created"])
            assert facts.activity_ms == int(truth["activity"])
            assert str(facts.ended_ms or "") == truth["ended"]
            assert (row.workspace, row.user) == (truth["workspace"], truth["user"])
        await self._compare_pages(in_order[::-1])
        assert counts.total == len(listed)
        assert {status: n for status, n in counts.by_status.items() if n} == _tally(
            SessionStatus(self.models[each].status) for each in listed
        )
        assert counts.created_sum_s == expected.created_sum_s
        ages = [int(listed[each]["created"]) for each in in_order]
        assert (counts.oldest_ms, counts.newest_ms) == (
            (ages[0], ages[-1]) if ages else (None, None)
        )
        assert (await self.stats.occupancy(now_ms())).sessions == len(listed)
        self._compare_funnel(index)

    async def _compare_pages(self, newest_first: list[str]) -> None:
        """Pages of any filter are the same list, cut."""
        for filters in (
            {},
            {"status": SessionStatus.PENDING},
            {"workspace": "w1"},
            {"user": "u1"},
            {"user": "u1", "workspace": "w1", "status": SessionStatus.PENDING},
        ):
            wanted = []
            for each in newest_first:
                model = self.models[each]
                told = {
                    "status": model.status,
                    "workspace": model.workspace,
                    "user": model.user,
                }
                if all(told[name] == value for name, value in filters.items()):
                    wanted.append(each)
            found: list[str] = []
            after = ""
            for _ in range(len(newest_first) + 2):
                rows, after = await self.stats.list_page(after, 2, **filters)
                found += [row.facts.session_id for row in rows]
                if not after:
                    break
            assert found == wanted, filters

    def _count(self, model: "Model") -> None:
        for step in model.ever - model.counted:
            self.funnel[f"saved:{step}"] = self.funnel.get(f"saved:{step}", 0) + 1
        model.counted |= model.ever

    def _compare_funnel(self, index: Index) -> None:
        for session_id in index.entries:
            self._count(self.models[session_id])
        told = {name: count for name, count in index.funnel.items() if name.startswith("saved:")}
        assert told == self.funnel

    # --- What is done -----------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.runner.run(self._flush())
        self.compare()

    async def _flush(self) -> None:
        await self.gateway.command("FLUSHALL")

    @rule(owner=owners)
    def create(self, owner: tuple[str | None, str | None]) -> None:
        user, workspace = owner
        session_id = self.run(
            self.place.manager.create_session(user_id=user, workspace_id=workspace)
        )
        self.models[session_id] = Model(workspace, user)
        self.compare()

    @rule(session_id=own_ids, owner=owners)
    def set_metadata(self, session_id: str, owner: tuple[str | None, str | None]) -> None:
        user, workspace = owner
        model = self.models.setdefault(session_id, Model())
        model.workspace, model.user = workspace, user
        self.write(session_id, self.place.manager.set_metadata(session_id, user, workspace))

    def saved(self, model: Model, *numbers: int) -> None:
        model.saved |= {*numbers}
        model.ever |= {*numbers}
        model.unexported = True

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), steps=st.lists(st.sampled_from(STEPS), min_size=1, unique=True))
    def save(self, number: int, steps: list[int]) -> None:
        session_id, model = self.choose(number)
        if model.finalized:
            self.refuse(self.place.manager.save_step(session_id, steps[0], {"a": 1}))
            return
        self.saved(model, *steps)
        if len(steps) == 1:
            self.write(session_id, self.place.manager.save_step(session_id, steps[0], {"a": 1}))
        else:
            answers = {step: {"a": step} for step in steps}
            self.write(session_id, self.place.manager.save_steps(session_id, answers))

    def refuse(self, work: Awaitable[Any]) -> None:
        with pytest.raises(OnboardingError):
            self.run(work)
        self.compare()

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), step=st.sampled_from(STEPS))
    def delete_step(self, number: int, step: int) -> None:
        session_id, model = self.choose(number)
        work = self.place.manager.delete_step(session_id, step)
        if model.finalized or step not in model.saved:
            self.refuse(work)
            return
        model.saved.discard(step)
        self.write(session_id, work)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), step=st.sampled_from(STEPS))
    def save_draft(self, number: int, step: int) -> None:
        session_id, model = self.choose(number)
        work = self.place.manager.save_draft(session_id, step, {"a": 1})
        if model.finalized:
            self.refuse(work)
            return
        self.write(session_id, work)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9))
    def finalize(self, number: int) -> None:
        session_id, model = self.choose(number)
        work = self.place.manager.finalize(session_id)
        if not model.saved and not model.finalized:
            self.refuse(work)
            return
        if not model.finalized:
            model.finalized, model.unexported = True, False
            self.write(session_id, work)
            return
        # The first answer again, and no write.
        self.run(work)
        self.compare()

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9))
    def reopen(self, number: int) -> None:
        session_id, model = self.choose(number)
        work = self.place.manager.reopen(session_id)
        if not model.finalized or model.status == "processing":
            self.refuse(work)
            return
        model.finalized, model.status = False, "pending"
        self.write(session_id, work)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), status=st.sampled_from(["processing", "complete", "error"]))
    def set_status(self, number: int, status: str) -> None:
        session_id, model = self.choose(number)
        try:
            self.run(self.place.generation.update_session_status(session_id, status))
        except InvalidTransitionError:
            self.compare()
            return
        model.status, model.is_placed = status, True
        self.compare()

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), what=st.sampled_from(["language", "the same", "event", "mark"]))
    def touch(self, number: int, what: str) -> None:
        session_id, _ = self.choose(number)
        generation, manager = self.place.generation, self.place.manager
        match what:
            case "language":
                work: Any = generation.set_language_preference(session_id, "de")
            case "the same":
                work = generation.set_language_preference(session_id, "en")
            case "event":
                work = generation.add_progress_event(ProgressEvent(session_id, "a", 1))
            case _:
                work = manager.update_progress(session_id, 3)
        self.write(session_id, work)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9), owner=owners, status=st.none() | st.just("error"))
    def update(self, number: int, owner: tuple[str | None, str | None], status: str | None) -> None:
        session_id, model = self.choose(number)
        user, workspace = owner
        updates: dict[str, Any] = {"user_id": user, "workspace_id": workspace}
        if status is not None:
            updates["status"] = status
        work = self.retention.atomic_session_update(session_id, updates)
        if status is not None and model.status == "complete":
            self.refuse(work)
            return
        model.user, model.workspace = user, workspace
        model.status = status or model.status
        self.write(session_id, work)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9))
    def recover(self, number: int) -> None:
        session_id, model = self.choose(number)
        model.status = "error"
        model.unexported = model.unexported or not model.finalized
        self.write(session_id, self.retention.recover_corrupted_session(session_id))

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9))
    def delete(self, number: int) -> None:
        session_id, model = self.choose(number)
        if self.gateway.keys.hash_tag:
            # The index follows a session for the last time before it is deleted.
            self._count(model)
        self.run(self.place.manager.delete_session(session_id))
        self.compare()
        assert session_id not in self.models
        self.refuse(self.place.manager.delete_session(session_id))

    @precondition(lambda self: self.clock is not None)
    @rule(minutes=st.integers(1, 130))
    def wait(self, minutes: int) -> None:
        assert self.clock is not None
        self.clock.shift(60 * minutes)
        # A look at the index would take out of it what is over: what comes next finds it as it was.
        self.runner.run(self._forget())

    async def _forget(self) -> None:
        for session_id in sorted(self.models):
            if await read_truth(self.gateway, session_id) is None:
                del self.models[session_id]

    @rule(sure=st.integers(0, 2))
    def lose_the_index(self, sure: int) -> None:
        if sure:
            return
        self.runner.run(self._lose_the_index())
        self.funnel = {}
        for model in self.models.values():
            model.is_placed, model.counted = False, set()
        self.compare()

    async def _lose_the_index(self) -> None:
        keys = await self.gateway.command("KEYS", self.gateway.keys.index("*"))
        if keys:
            await self.gateway.command("DEL", *keys)

    @precondition(lambda self: self.models)
    @rule(number=st.integers(0, 9))
    def lose_a_session_and_sweep(self, number: int) -> None:
        session_id, _ = self.choose(number)
        self.runner.run(lose(self.gateway, session_id))
        assert self.run(self.sweeper.sweep())
        self.compare()


async def lose(gateway: Gateway, session_id: str) -> None:
    """Delete every key of a session behind everybody's back."""
    keys = await gateway.command("KEYS", gateway.keys.session(session_id).prefix + "*")
    for key in keys:
        await gateway.command("DEL", key)


def _class(class_: str) -> tuple[SessionStatus, bool]:
    status, _, kind = class_.partition(":")
    return SessionStatus(status), kind == "held"


def _tally(statuses: Iterable[SessionStatus]) -> dict[SessionStatus, int]:
    found: dict[SessionStatus, int] = {}
    for status in statuses:
        found[status] = found.get(status, 0) + 1
    return found


def run_machine(make_gateway: Callable[[], Gateway], clock: time_machine.Traveller | None) -> None:
    with asyncio.Runner() as runner:
        machine = type(
            "Machine",
            (IndexMachine,),
            {"runner": runner, "make_gateway": staticmethod(make_gateway), "clock": clock},
        )
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=20,
                deadline=None,
                phases=PHASES,
                derandomize="CI" in os.environ,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )


@pytest.mark.parametrize("tag", ["off", "on"])
def test_the_index_says_what_the_sessions_say_after_any_calls(valkey: Valkey, tag: str) -> None:
    chosen = known_settings(
        redis_url=valkey.url, key_hash_tag=tag, session_ttl_s=LIFETIME_S, **QUICKLY
    )
    run_machine(lambda: connect(chosen), None)


@pytest.mark.parametrize("tag", ["off", "on"])
def test_the_index_says_what_the_sessions_say_after_any_time(tag: str) -> None:
    with time_machine.travel(NOON_S, tick=False) as clock:
        run_machine(
            lambda: fake_gateway(FakeServer(), key_hash_tag=tag, session_ttl_s=LIFETIME_S), clock
        )


# --- What the calls above meet too seldom ---------------------------------------------------------

TAGS = pytest.mark.parametrize("tag", ["off", "on"])


@TAGS
async def test_a_session_that_is_made_again_after_its_lifetime_is_another_one(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    manager, gateway = fake(key_hash_tag=tag, session_ttl_s=LIFETIME_S)
    await manager.set_metadata("a", "u1", "w1")
    await manager.save_draft("a", 1, {"a": 1})
    await manager.set_metadata("b", "u1", "w1")
    for _ in range(5):
        await manager.save_step("b", 1, {"a": 1})
    await gateway.aclose()
    clock.shift(LIFETIME_S + 60)

    await manager.set_metadata("a", "u2", None)
    await manager.set_metadata("b", "u2", None)
    await manager.save_step("b", 1, {"a": 1})
    await gateway.aclose()

    models = {
        "a": Model(None, "u2"),
        "b": Model(None, "u2", saved={1}, ever={1}, unexported=True),
    }
    truths = {name: await read_truth(gateway, name) for name in models}
    expected = expect({name: truth for name, truth in truths.items() if truth}, models)
    index = await read_index(gateway)
    assert index.sets == expected.sets
    assert index.entries == expected.entries
    assert index.created_sum_s == expected.created_sum_s
    assert index.funnel["saved:1"] == 2
    assert await ends_in_feed(gateway) == [("a", "expired"), ("b", "expired")]


async def test_the_feed_keeps_the_last_10000_events_about(real: MakePlace) -> None:
    manager, gateway = real()
    session_id = await prepare(manager)
    fill = """for i = 1, 12000 do
  redis.call('XADD', KEYS[1], '*', 'type', 'x', 'session_id', 'a', 'at', '1')
end
return {'ok'}"""
    feed = gateway.keys.index("feed")
    await gateway.command("EVAL", fill, 1, feed)
    # Not every write cuts it; that none of these does is less likely than 1 in 10 to the 9th.
    async with asyncio.timeout(10):
        for number in range(330):
            await manager.save_step(session_id, 1, {"a": number})
            if await gateway.command("XLEN", feed) < 12_000:
                break
    assert 10_000 <= await gateway.command("XLEN", feed) <= 10_100
    [(_, newest)] = await gateway.command("XREVRANGE", feed, "+", "-", "COUNT", 1)
    assert dict(pairs(newest))["session_id"] == session_id


async def ends_in_feed(gateway: Gateway) -> list[tuple[str, str]]:
    """List the ends of sessions that the feed tells of."""
    found = []
    for _, fields in await gateway.command("XRANGE", gateway.keys.index("feed"), "-", "+"):
        told = dict(pairs(fields))
        if told["type"] in ("deleted", "expired", "evicted"):
            found.append((told["session_id"], told["type"]))
    return sorted(found)


@TAGS
async def test_what_has_expired_is_counted_no_more_however_short_it_lived(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    manager, gateway = fake(key_hash_tag=tag, session_ttl_s=5)
    session_id = await manager.create_session(user_id="u1")
    await manager.save_step(session_id, 1, {"a": 1})
    await gateway.aclose()
    clock.shift(7)
    stats = StatsStore(gateway, max_sessions=0, interval_s=3600)
    assert (await stats.list_page("", 10))[0] == []
    assert (await stats.occupancy(now_ms())).sessions == 0
    assert (await stats.count(CATALOGUE.pin, now_ms())).total == 0
    assert (await read_index(gateway)).named == set()
    assert await ends_in_feed(gateway) == [(session_id, "expired")]


async def test_closing_waits_for_the_index_that_is_following_already(
    real: MakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, gateway = real(key_hash_tag="on")
    monkeypatch.setattr("app.store.index.FOLLOW_S", 0)
    await manager.set_metadata("a", "u1", "w1")
    await manager.save_step("a", 1, {"a": 1})
    # Now the last one has begun.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    following = [task for task in asyncio.all_tasks() if task.get_name() == "index"]
    assert following

    await gateway.aclose()

    assert all(task.done() for task in following)
    assert (await read_index(gateway)).entries["a"]["class"] == "pending:held"


async def test_with_hash_tags_the_index_follows_within_a_second(real: MakePlace) -> None:
    manager, gateway = real(key_hash_tag="on")
    await manager.set_metadata("a", "u1", "w1")
    await manager.save_step("a", 1, {"a": 1})
    async with asyncio.timeout(1):
        while (await read_index(gateway)).entries["a"]["class"] != "pending:held":
            await asyncio.sleep(0.01)


async def test_room_that_was_reserved_for_nothing_is_free_again_after_a_minute(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    _, gateway = fake(key_hash_tag="on")
    index, retention = SessionIndex(gateway), RetentionStore(gateway)
    await index.reserve("a", NO_LIMIT, pin=CATALOGUE.pin, at_ms=now_ms())
    await retention.repair("0")
    assert (await read_index(gateway)).named == {"a"}
    clock.shift(61)
    await retention.repair("0")
    assert (await read_index(gateway)).named == set()


async def test_the_index_follows_a_write_of_which_nobody_was_told(proxy: Proxy) -> None:
    url, saving = f"redis://{proxy.host}:{proxy.port}/0", load_script("save_steps").sha.encode()
    async with working_at(url, key_hash_tag="on", retry_attempts=1) as place:
        session_id = await prepare(place.manager)
        # What has changed so far is followed now.
        await place.gateway.aclose()
        proxy.lose(lambda command: Loss.RESET if saving in command else None)
        with pytest.raises(StoreUnavailableError):
            await place.manager.save_step(session_id, 9, {"a": 9})
        await place.gateway.aclose()
        funnel = place.gateway.keys.index(f"funnel:{CATALOGUE.pin}")
        assert await place.gateway.command("HGET", funnel, "saved:9") == b"1"


async def test_a_process_that_ends_waits_for_no_store_that_is_away(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.index.LEAVE_S", 0.1)
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with working_at(url, key_hash_tag="on", redis_timeout_s=20.0) as place:
        await prepare(place.manager)
        proxy.hold()
        async with asyncio.timeout(5):
            await place.gateway.aclose()
        proxy.release()
