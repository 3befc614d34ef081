"""The queue of jobs: each is done at least once, by one worker as long as that one is heard of."""

import asyncio

import pytest
import time_machine

from app.errors import CorruptRecordError
from app.onboarding.jobs import Job
from app.store.gateway import Gateway
from app.store.jobs import GROUP, JobStore
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Place,
    count_events,
    keyed,
    names_of_keys,
    prepare,
    watch_operation_ids,
)

NEVER_MS = 3_600_000
"""When a job is taken over by nobody in a test."""

SOON_MS = 20
"""When a job is taken over without much of a wait."""

NO_WAIT_MS = 1


async def take(
    jobs: JobStore, worker: str = "w1", *, abandoned_ms: int = NEVER_MS, wait_ms: int = NO_WAIT_MS
) -> Job | None:
    return await jobs.take(worker, abandoned_ms=abandoned_ms, wait_ms=wait_ms)


async def take_any(jobs: JobStore, worker: str = "w1", *, abandoned_ms: int = NEVER_MS) -> Job:
    """Ask until there is a job."""
    async with asyncio.timeout(5):
        while (job := await take(jobs, worker, abandoned_ms=abandoned_ms)) is None:
            await asyncio.sleep(0.001)
    return job


async def waiting(gateway: Gateway) -> int:
    """Count the jobs in the queue, taken ones too."""
    return int(await gateway.command("XLEN", gateway.keys.jobs))


async def held(gateway: Gateway) -> int:
    """Count the jobs that somebody has taken."""
    return int((await gateway.command("XPENDING", gateway.keys.jobs, GROUP))["pending"])


async def until_somebody_waits(gateway: Gateway) -> None:
    async with asyncio.timeout(5):
        while not (await gateway.command("INFO", "clients"))["blocked_clients"]:
            await asyncio.sleep(0.001)


@pytest.fixture
def jobs(gateway: Gateway) -> JobStore:
    return JobStore(gateway)


async def add(jobs: JobStore, *sessions: str) -> None:
    for session_id in sessions:
        await jobs.add(session_id, 1)


class TestFinalize:
    async def test_adds_one_job_with_the_revision_each_time(
        self, place: Place, jobs: JobStore
    ) -> None:
        session_id = await prepare(place.manager)
        assert await waiting(place.gateway) == 0
        for revision in (1, 2):
            await place.manager.finalize(session_id)
            await place.manager.finalize(session_id)
            await place.manager.finalize(session_id, request=keyed(f"k{revision}"))
            await place.manager.finalize(session_id, request=keyed(f"k{revision}"))
            job = await take_any(jobs)
            assert (job.session_id, job.revision) == (session_id, revision)
            await place.manager.reopen(session_id)
        assert await take(jobs) is None

    async def test_whose_reply_is_lost_adds_one_job(
        self, wired: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await prepare(wired.manager, finalized=True)
        session_id = await prepare(wired.manager)
        # Armed when the operation id is drawn, after the session was read.
        watch_operation_ids(monkeypatch, lambda: proxy.drop_replies(1, to="EVALSHA"))
        sent_before = proxy.commands["EVALSHA"]
        await wired.manager.finalize(session_id)
        assert proxy.commands["EVALSHA"] == sent_before + 3
        assert await waiting(wired.gateway) == 2

    async def test_by_20_at_once_adds_one_job(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)
        await asyncio.gather(*(place.manager.finalize(session_id) for _ in range(20)))
        assert await waiting(place.gateway) == 1

    async def test_that_is_refused_adds_none(self, place: Place) -> None:
        session_id = await place.manager.create_session()
        with pytest.raises(Exception, match="No step"):
            await place.manager.finalize(session_id)
        assert await waiting(place.gateway) == 0

    async def test_adds_a_job_where_the_queue_lies_in_another_slot(self, real: MakePlace) -> None:
        place = real(key_hash_tag="on")
        session_id = await prepare(place.manager, finalized=True)
        job = await take_any(JobStore(place.gateway))
        assert (job.session_id, job.revision) == (session_id, 1)

    async def test_changes_nothing_where_the_queue_is_something_else(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        await place.gateway.command("SET", place.gateway.keys.jobs, "x")
        with pytest.raises(CorruptRecordError) as raised:
            await place.manager.finalize(session_id)
        assert place.gateway.keys.jobs in raised.value.key.split()
        assert (await place.manager.get_session(session_id))["finalized_at"] is None
        assert "export" not in await names_of_keys(place.gateway, session_id)
        assert await count_events(place.gateway, session_id) == 3

    async def test_drops_the_jobs_that_are_older_than_a_session_lives(
        self, real: MakePlace
    ) -> None:
        place = real()
        key = place.gateway.keys.jobs
        for number in range(1, 301):
            await place.gateway.command(
                "XADD", key, f"{number}-1", "session_id", "s", "revision", 1
            )
        await prepare(place.manager, finalized=True)
        # They go by whole nodes of a hundred.
        assert await waiting(place.gateway) <= 101


class TestAJob:
    async def test_is_handed_out_though_nobody_asked_before_it_came(
        self, gateway: Gateway, jobs: JobStore
    ) -> None:
        await add(jobs, "a", "b", "c")
        assert [(await take_any(jobs)).session_id for _ in range(3)] == ["a", "b", "c"]
        assert await take(jobs) is None
        assert (await waiting(gateway), await held(gateway)) == (3, 3)

    async def test_begins_with_when_it_was_added(self, jobs: JobStore, gateway: Gateway) -> None:
        await add(jobs, "a")
        [seconds, _] = await gateway.command("TIME")
        assert abs((await take_any(jobs)).added_ms / 1000 - int(seconds)) < 5

    async def test_that_is_added_twice_within_a_moment_is_one(
        self, jobs: JobStore, gateway: Gateway
    ) -> None:
        await add(jobs, "a", "b", "a")
        job = await take_any(jobs)
        await add(jobs, "a")
        await jobs.add("a", 2)
        assert (job.session_id, await waiting(gateway)) == ("a", 3)
        assert await jobs.finish("w1", job)
        await add(jobs, "a")
        assert await waiting(gateway) == 3

    async def test_goes_to_one_of_those_who_ask(self, gateway: Gateway) -> None:
        await add(JobStore(gateway), *(f"s{number}" for number in range(40)))
        await take_any(JobStore(gateway), "first")
        taken: dict[str, list[str]] = {}

        async def work(worker: str) -> None:
            jobs = JobStore(gateway)
            while (job := await take(jobs, worker)) is not None:
                taken.setdefault(worker, []).append(job.session_id)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(f"w{number}") for number in range(4)))
        all_taken = [session_id for each in taken.values() for session_id in each]
        assert sorted(all_taken) == sorted(f"s{number}" for number in range(1, 40))
        assert len(taken) == 4

    async def test_that_is_finished_is_gone(self, gateway: Gateway, jobs: JobStore) -> None:
        await add(jobs, "a", "b")
        job = await take_any(jobs)
        await jobs.finish("w1", job)
        await jobs.finish("w1", job)
        assert (await waiting(gateway), await held(gateway)) == (1, 0)
        assert not await jobs.keep("w1", job)
        assert (await take_any(jobs, "w2", abandoned_ms=0)).session_id == "b"

    async def test_comes_while_somebody_waits_for_it(self, real: MakePlace) -> None:
        gateway = real().gateway
        jobs = JobStore(gateway)
        await take(jobs)
        asking = asyncio.create_task(take(jobs, wait_ms=900))
        await until_somebody_waits(gateway)
        await add(jobs, "a")
        job = await asking
        assert job is not None
        assert job.session_id == "a"

    async def test_whose_handing_out_is_not_heard_of_is_handed_out_again(
        self, wired: Place, proxy: Proxy
    ) -> None:
        jobs = JobStore(wired.gateway)
        await add(jobs, "a")
        await take(jobs)
        proxy.drop_replies(1, to="XREADGROUP")
        assert await take(jobs) is None
        assert await held(wired.gateway) == 1
        job = await take_any(jobs, "w2", abandoned_ms=SOON_MS)
        assert job.session_id == "a"


class TestAnEntryThatIsNoJob:
    @pytest.mark.parametrize(
        "fields",
        [("a", "b"), ("session_id", "s"), ("session_id", "s", "revision", "one")],
        ids=" ".join,
    )
    async def test_is_an_error_that_names_the_queue_and_keeps_nobody_from_the_next(
        self, gateway: Gateway, jobs: JobStore, fields: tuple[str, ...]
    ) -> None:
        await take(jobs)
        await gateway.command("XADD", gateway.keys.jobs, "*", *fields)
        await add(jobs, "a")
        with pytest.raises(CorruptRecordError) as raised:
            await take(jobs)
        assert raised.value.key == gateway.keys.jobs
        assert (await take_any(jobs)).session_id == "a"


class TestAJobWhoseWorkerIsNotHeardOf:
    async def test_is_taken_over_only_after_the_time(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        jobs = JobStore(fake().gateway)
        await add(jobs, "a")
        job = await take_any(jobs, "w1")
        clock.shift(29.9)
        assert await take(jobs, "w2", abandoned_ms=30_000) is None
        clock.shift(0.2)
        assert await take(jobs, "w2", abandoned_ms=30_000) == job

    async def test_is_kept_as_long_as_the_worker_says_so(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        jobs = JobStore(fake().gateway)
        await add(jobs, "a")
        job = await take_any(jobs, "w1")
        for _ in range(5):
            clock.shift(20)
            assert await jobs.keep("w1", job)
            assert await take(jobs, "w2", abandoned_ms=30_000) is None
        clock.shift(31)
        assert await take(jobs, "w2", abandoned_ms=30_000) == job

    async def test_is_the_others_from_then_on(self, jobs: JobStore, gateway: Gateway) -> None:
        await add(jobs, "a")
        job = await take_any(jobs, "w1")
        assert await take_any(jobs, "w2", abandoned_ms=SOON_MS) == job
        assert not await jobs.keep("w1", job)
        assert await jobs.keep("w2", job)
        assert await held(gateway) == 1

    async def test_is_taken_over_by_one_of_many(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        gateway = fake().gateway
        await add(JobStore(gateway), "a")
        job = await take_any(JobStore(gateway), "w0")
        clock.shift(31)

        async def ask(worker: str) -> Job | None:
            return await take(JobStore(gateway), worker, abandoned_ms=30_000)

        asked = await asyncio.gather(*(ask(f"w{number}") for number in range(1, 11)))
        assert [each for each in asked if each is not None] == [job]

    async def test_comes_before_a_new_one_and_none_is_passed_over(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        jobs = JobStore(fake().gateway)
        sessions = [f"s{number}" for number in range(5)]
        await add(jobs, *sessions)
        for _ in sessions:
            await take_any(jobs, "dead")
        await add(jobs, "new")
        clock.shift(31)
        taken = []
        for _ in range(20):
            job = await take(jobs, "w2", abandoned_ms=30_000)
            taken += [job.session_id] if job else []
        assert sorted(taken) == sorted([*sessions, "new"])
        assert taken[0] != "new"

    async def test_that_was_finished_meanwhile_is_not_taken_over(
        self, jobs: JobStore, gateway: Gateway
    ) -> None:
        await add(jobs, "a")
        job = await take_any(jobs, "w1")
        await gateway.command("XDEL", gateway.keys.jobs, job.job_id)
        assert await take(jobs, "w2", abandoned_ms=0) is None
        assert await take(jobs, "w2", abandoned_ms=0) is None


class TestAStoreThatForgotEverything:
    async def test_is_gone_on_with(self, place: Place, jobs: JobStore) -> None:
        await prepare(place.manager, finalized=True)
        job = await take_any(jobs)
        await place.gateway.command("FLUSHALL")

        assert not await jobs.keep("w1", job)
        await jobs.finish("w1", job)
        assert await take(jobs) is None

        session_id = await prepare(place.manager, finalized=True)
        later = await take_any(jobs)
        assert later.session_id == session_id
        assert await jobs.keep("w1", later)
        await jobs.finish("w1", later)
        assert (await waiting(place.gateway), await held(place.gateway)) == (0, 0)

    async def test_between_two_looks_loses_no_job_that_came_later(
        self, place: Place, jobs: JobStore
    ) -> None:
        assert await take(jobs) is None
        await place.gateway.command("FLUSHALL")
        session_id = await prepare(place.manager, finalized=True)
        assert (await take_any(jobs)).session_id == session_id

    async def test_while_somebody_waits_is_no_error(self, real: MakePlace) -> None:
        gateway = real().gateway
        jobs = JobStore(gateway)
        await take(jobs)
        asking = asyncio.create_task(take(jobs, wait_ms=500))
        await until_somebody_waits(gateway)
        await gateway.command("FLUSHALL")
        assert await asking is None
        await add(jobs, "a")
        assert (await take_any(jobs)).session_id == "a"
