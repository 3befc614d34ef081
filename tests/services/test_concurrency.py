"""Many at once on one session of the real store: nobody sees half a write, nothing is lost."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from app.errors import (
    DraftNotFoundError,
    NothingToFinalizeError,
    OnboardingError,
    SessionConflictError,
    SessionFinalizedError,
    SessionNotFoundError,
    StepNotFoundError,
    VersionConflictError,
)
from app.onboarding.exports import compute_checksum
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.steps import Precondition, Tags
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings
from app.store.connect import connect

TOTAL = 23

LOOK = """
local p = ARGV[1]
local stored = {}
for step = 1, tonumber(ARGV[2]) do
  stored[step] = tostring(redis.call('EXISTS', p .. 'step:' .. step))
end
local progress = redis.call('HMGET', p .. 'progress', 'saved', 'finalized_at', 'changes')
return {table.concat(stored), progress[1], redis.call('XLEN', p .. 'events'), progress[3]}
"""
"""Look at the step keys, the progress and the events at one instant."""


@pytest.fixture
async def manager(settings: Settings) -> AsyncIterator[OnboardingSessionManager]:
    """Give a manager on the real store, whose connections are enough for everybody here."""
    gateway = connect(settings)
    yield make_manager(gateway, settings)
    await gateway.aclose()


async def look(raw: Redis, session_id: str) -> list[Any]:
    prefix = f"onboarding:{session_id}:"
    return await cast("Awaitable[list[Any]]", raw.eval(LOOK, 0, prefix, str(TOTAL)))


async def events_of(raw: Redis, session_id: str) -> list[tuple[str, str, str]]:
    """Give type, step and version of every event, in order."""
    entries: Any = await raw.xrange(f"onboarding:{session_id}:events")
    return [
        (
            fields[b"type"].decode(),
            fields.get(b"step_id", b"").decode(),
            fields.get(b"version", b"").decode(),
        )
        for _, fields in entries
    ]


async def together(*work: Awaitable[Any]) -> list[Any]:
    """Run all, and raise what any of them raises."""
    return list(await asyncio.gather(*work))


class Writers:
    """Writers on one session that count what was accepted."""

    def __init__(self, manager: OnboardingSessionManager, session_id: str) -> None:
        self.manager = manager
        self.session_id = session_id
        self.versions: Counter[int] = Counter()
        self.answers: dict[int, list[int]] = {}
        self.deleted = 0
        self.conflicts = 0

    def accept(self, number: int, version: int) -> None:
        self.versions[number] += 1
        self.answers.setdefault(number, []).append(version)

    async def write(self, seed: int, rounds: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            number = chance.randint(1, 8)
            kind = chance.choice(
                ["save", "save", "save", "match", "batch", "delete", "delete", "draft", "patch"]
            )
            try:
                await self._write(kind, number, seed)
            except (StepNotFoundError, DraftNotFoundError):
                pass
            except (VersionConflictError, SessionConflictError):
                self.conflicts += 1

    async def _write(self, kind: str, number: int, seed: int) -> None:
        manager, session_id = self.manager, self.session_id
        match kind:
            case "save":
                saved = await manager.save_step(session_id, number, {"by": seed})
                self.accept(number, saved["version"])
            case "match":
                condition = Precondition(if_none_match=Tags(any_version=True))
                saved = await manager.save_step(
                    session_id, number, {"by": seed}, precondition=condition
                )
                self.accept(number, saved["version"])
            case "batch":
                batch = await manager.save_steps(
                    session_id, {number: {"by": seed}, number + 9: {"by": seed}}
                )
                for each in batch["saved"]:
                    self.accept(each["step_id"], each["version"])
            case "delete":
                await manager.delete_step(session_id, number)
                self.deleted += 1
            case "draft":
                await manager.save_draft(session_id, number, {"by": seed})
                promoted = await manager.promote_draft_to_step(session_id, number)
                self.accept(number, promoted["version"])
            case "patch":
                patched = await manager.patch_step(session_id, number, {f"p{seed}": seed})
                self.accept(number, patched["version"])


class Readers:
    """Readers who look until they are told to stop."""

    def __init__(self, manager: OnboardingSessionManager, raw: Redis, session_id: str) -> None:
        self.manager = manager
        self.raw = raw
        self.session_id = session_id
        self.looks = 0
        self._done = False

    async def __aenter__(self) -> "Readers":
        checks = (
            self.at_the_keys,
            self.at_the_keys,
            self.at_steps,
            self.at_summary,
            self.at_progress,
        )
        self._tasks = [asyncio.create_task(self._go_on(check)) for check in checks]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._done = True
        await together(*self._tasks)

    async def _go_on(self, check: Callable[[], Awaitable[None]]) -> None:
        while not self._done:
            await check()
            self.looks += 1

    async def at_the_keys(self) -> None:
        stored, saved, _, _ = await look(self.raw, self.session_id)
        assert stored == saved

    async def at_steps(self) -> None:
        steps = await self.manager.get_all_steps(self.session_id)
        assert sorted([*steps, *steps.missing]) == list(range(1, TOTAL + 1))

    async def at_summary(self) -> None:
        summary = await self.manager.get_session_summary(self.session_id)
        with_version = [each["step_id"] for each in summary["steps"] if "version" in each]
        assert summary["progress"]["completed_steps"] == with_version
        assert summary["progress"]["completed"] == len(with_version)
        assert summary["stats"]["completed_steps"] == len(with_version)

    async def at_progress(self) -> None:
        progress = await self.manager.get_progress(self.session_id)
        assert progress["completed"] == len(progress["completed_steps"])
        assert progress["highest_step"] >= max(progress["completed_steps"], default=0)


async def test_50_writers_and_at_every_instant_progress_counts_the_stored_steps(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    writers = Writers(manager, session_id)
    async with Readers(manager, raw, session_id) as readers:
        await together(*(writers.write(seed, 15) for seed in range(50)))
    assert readers.looks > 20

    steps = await manager.get_all_steps(session_id)
    for number, step in steps.items():
        assert step.version == writers.versions[number]
    # Every accepted write got a version of its own, and none was left out.
    for number, versions in writers.answers.items():
        assert sorted(versions) == list(range(1, writers.versions[number] + 1))
    events = await events_of(raw, session_id)
    assert len(events) == 1 + writers.versions.total() + writers.deleted
    for number in writers.versions:
        saved = [int(v) for kind, step, v in events if kind == "step_saved" and int(step) == number]
        assert saved == list(range(1, writers.versions[number] + 1))
    alive = {number for number in writers.versions if events_say_stored(events, number)}
    assert set(steps) == alive


def events_say_stored(events: list[tuple[str, str, str]], number: int) -> bool:
    kinds = [kind for kind, step, _ in events if step == str(number)]
    return bool(kinds) and kinds[-1] == "step_saved"


async def test_50_finalizers_make_one_export_one_event_and_one_answer(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    await manager.save_steps(session_id, {number: {"n": number} for number in range(1, 24)})
    found = await together(*(manager.finalize(session_id) for _ in range(50)))
    assert len({answer.text for answer in found}) == 1
    export = await manager.get_export(session_id)
    assert export is not None
    assert {answer["business_context"]["checksum"] for answer in found} == {export.checksum}
    assert export.checksum == compute_checksum(export.value)
    kinds = [kind for kind, _, _ in await events_of(raw, session_id)]
    assert kinds.count("finalized") == 1
    assert (await manager.get_session(session_id))["revision"] == 1


async def test_finalizers_with_and_without_idempotency_keys_get_one_answer(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    await manager.save_step(session_id, 1, {"a": 1})

    def request(number: int) -> IdempotentRequest | None:
        if number % 2:
            return None
        key = f"k{number % 5}"
        return IdempotentRequest.of(
            caller="", method="POST", path="/finalize", key=key, query=b"", body=b""
        )

    found = await together(
        *(manager.finalize(session_id, request=request(number)) for number in range(30))
    )
    assert len({answer.text for answer in found}) == 1
    await manager.reopen(session_id)
    await manager.save_step(session_id, 1, {"a": 2})
    # A key answers what it came to, whatever was finalized since.
    await manager.finalize(session_id)
    again = await manager.finalize(session_id, request=request(0))
    assert again.text == found[0].text


async def test_finalize_freezes_what_was_saved_before_it_and_refuses_what_comes_after(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    for _ in range(5):
        session_id = await manager.create_session(workspace_id="w")
        await manager.save_step(session_id, 1, {"count": 0})
        accepted: Counter[int] = Counter({1: 1})

        async def write(
            number: int, session_id: str = session_id, accepted: Counter[int] = accepted
        ) -> None:
            for round_ in range(20):
                try:
                    await manager.save_step(session_id, number, {"count": round_})
                except SessionFinalizedError:
                    return
                accepted[number] += 1

        async def finalize(session_id: str = session_id) -> Any:
            while True:
                try:
                    return await manager.finalize(session_id)
                except SessionConflictError:
                    await asyncio.sleep(0)

        async with Readers(manager, raw, session_id):
            answer, *_ = await together(finalize(), *(write(number) for number in range(1, 6)))
        export = answer["business_context"]
        frozen = {int(number): step["version"] for number, step in export["steps"].items()}
        assert frozen == dict(accepted)
        assert export["progress"]["completed"] == len(frozen)
        steps = await manager.get_all_steps(session_id)
        assert {number: step.version for number, step in steps.items()} == frozen


async def test_50_patches_of_different_members_lose_none(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    await manager.save_step(session_id, 1, {"first": 0})
    refused = 0

    async def patch(number: int) -> None:
        nonlocal refused
        while True:
            try:
                await manager.patch_step(session_id, 1, {f"m{number}": number})
            except SessionConflictError:
                refused += 1
            else:
                return

    async with Readers(manager, raw, session_id):
        await together(*(patch(number) for number in range(50)))
    step = await manager.get_step(session_id, 1)
    assert step is not None
    assert step["data"] == {"first": 0, **{f"m{number}": number for number in range(50)}}
    assert step.version == 51
    # A conflict tells that nothing was done; somebody else's patch was, each time.
    assert refused <= 50 * 49 / 8


async def test_20_writers_that_compare_versions_count_to_the_sum_of_their_work(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    await manager.save_step(session_id, 1, {"count": 0})

    async def increment() -> None:
        for _ in range(5):
            while True:
                step = await manager.get_step(session_id, 1)
                assert step is not None
                assert step.version is not None
                condition = Precondition(Tags(versions=frozenset({step.version})))
                data = {"count": step["data"]["count"] + 1}
                try:
                    await manager.save_step(session_id, 1, data, precondition=condition)
                except VersionConflictError:
                    continue
                break

    await together(*(increment() for _ in range(20)))
    step = await manager.get_step(session_id, 1)
    assert step is not None
    assert step["data"] == {"count": 100}
    assert step.version == 101


async def test_50_first_writers_of_a_step_are_one_winner(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    condition = Precondition(if_none_match=Tags(any_version=True))
    found = await asyncio.gather(
        *(
            manager.save_step(session_id, 1, {"by": number}, precondition=condition)
            for number in range(50)
        ),
        return_exceptions=True,
    )
    winners = [each for each in found if not isinstance(each, BaseException)]
    assert len(winners) == 1
    losers = [each for each in found if isinstance(each, VersionConflictError)]
    assert len(losers) == 49
    assert {loser.current_version for loser in losers} == {1}


async def test_50_requests_with_one_idempotency_key_are_one_write(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")

    def request() -> IdempotentRequest:
        return IdempotentRequest.of(
            caller="", method="POST", path="/s", key="k", query=b"", body=b"{}"
        )

    found = await together(
        *(manager.save_step(session_id, 1, {"a": 1}, request=request()) for _ in range(50))
    )
    assert all(each == found[0] for each in found)
    assert found[0]["version"] == 1
    assert len(await events_of(raw, session_id)) == 2


@pytest.mark.parametrize("seed", range(6))
async def test_writes_that_race_a_delete_leave_no_key(
    manager: OnboardingSessionManager, raw: Redis, seed: int
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    await manager.save_step(session_id, 1, {"a": 1})
    chance = random.Random(seed)
    writes: list[Callable[[int], Awaitable[Any]]] = [
        lambda n: manager.save_step(session_id, n, {"n": n}),
        lambda n: manager.save_steps(session_id, {n: {"n": n}, 23: {"n": n}}),
        lambda n: manager.save_draft(session_id, n, {"n": n}),
        lambda n: manager.patch_step(session_id, 1, {f"m{n}": n}),
        lambda n: manager.update_progress(session_id, n),
        lambda _: manager.delete_step(session_id, 1),
        lambda _: manager.finalize(session_id),
    ]
    refusals = (
        SessionNotFoundError,
        StepNotFoundError,
        SessionFinalizedError,
        SessionConflictError,
        NothingToFinalizeError,  # when the only step was deleted just before
    )

    async def write(number: int) -> None:
        for _ in range(10):
            with suppress(*refusals):
                await chance.choice(writes)(number)

    async def delete() -> None:
        for _ in range(chance.randint(0, 30)):
            await asyncio.sleep(0)
        await manager.delete_session(session_id)
        assert await raw.keys(f"onboarding:*{session_id}*") == []

    await together(delete(), *(write(number) for number in range(1, 21)))
    assert await raw.keys(f"onboarding:*{session_id}*") == []
    for late in writes:
        with pytest.raises(SessionNotFoundError):
            await late(2)
    assert await raw.keys(f"onboarding:*{session_id}*") == []


async def test_of_20_deletes_one_succeeds(manager: OnboardingSessionManager, raw: Redis) -> None:
    session_id = await manager.create_session(workspace_id="w")
    found = await asyncio.gather(
        *(manager.delete_session(session_id) for _ in range(20)), return_exceptions=True
    )
    assert Counter(type(each) for each in found) == {dict: 1, SessionNotFoundError: 19}


async def test_of_20_makers_of_one_id_all_set_their_metadata_and_one_makes_it(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    await together(*(manager.set_metadata("shared", f"u{n}", "w") for n in range(20)))
    kinds = [kind for kind, _, _ in await events_of(raw, "shared")]
    assert Counter(kinds) == {"session_created": 1, "metadata_changed": 19}
    assert kinds[0] == "session_created"
    owner = (await manager.get_session("shared"))["user_id"]
    assert owner in {f"u{n}" for n in range(20)}


async def test_a_draft_that_is_typed_on_while_it_is_promoted_is_promoted_whole(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    outcomes: list[int] = []

    async def type_on() -> None:
        for number in range(60):
            await manager.save_draft(session_id, 1, {"left": number, "right": number})

    async def promote() -> None:
        for _ in range(30):
            try:
                saved = await manager.promote_draft_to_step(session_id, 1)
            except (DraftNotFoundError, SessionConflictError):
                await asyncio.sleep(0)
                continue
            outcomes.append(saved["version"])
            step = await manager.get_step(session_id, 1)
            assert step is not None
            assert step["data"]["left"] == step["data"]["right"]

    await together(type_on(), promote(), promote())
    assert sorted(outcomes) == list(range(1, len(outcomes) + 1))
    assert outcomes


async def test_requests_that_are_given_up_leave_the_session_whole(
    manager: OnboardingSessionManager, raw: Redis
) -> None:
    session_id = await manager.create_session(workspace_id="w")
    chance = random.Random(1)

    async def write(number: int) -> None:
        saving = asyncio.create_task(manager.save_step(session_id, number, {"n": number}))
        for _ in range(chance.randint(0, 6)):
            await asyncio.sleep(0)
        saving.cancel()
        with suppress(asyncio.CancelledError, OnboardingError):
            await saving

    async with Readers(manager, raw, session_id):
        for _ in range(10):
            await together(*(write(number) for number in range(1, 21)))
    stored, saved, events, _ = await look(raw, session_id)
    assert stored == saved
    steps = await manager.get_all_steps(session_id)
    assert sum(step.version or 0 for step in steps.values()) == events - 1
