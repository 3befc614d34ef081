"""The work of generators: who gets which finalized session, and what becomes of it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Self

import pytest
import structlog
import time_machine
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.generator import generate, work
from app.onboarding.jobs import UNCONFIRMED_MS, Job
from app.services.files import make_file_service
from app.services.generation import GenerationService, ProgressReporter
from app.services.jobs import JobService, get_job_service
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings
from app.store.connect import connect
from app.store.jobs import JobStore
from tests.api.helpers import ask
from tests.conftest import QUICKLY, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey

QUEUE = "onboarding:index:jobs"

SOON_S = 10.0
"""How long a test waits before it fails for what takes milliseconds."""

GONE_S = 0.2
"""How soon a generator counts as gone, where a test is about that."""


class Office:
    """A service and its generators, without HTTP and processes, on one store."""

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        gateway = connect(settings)
        self.settings = settings
        self.manager: OnboardingSessionManager = make_manager(gateway, settings)
        files = make_file_service(gateway, self.manager, settings)
        self.generation = GenerationService(gateway, files)
        self.queue = JobStore(gateway)
        self._stack = stack
        stack.push_async_callback(self.generation.aclose)

    def jobs(self, worker: str = "worker", *, abandoned_s: float = 30.0) -> JobService:
        """Give a generator's view of the queue."""
        service = JobService(connect(self.settings), worker, abandoned_s=abandoned_s)
        self._stack.push_async_callback(service.aclose)
        return service

    def employ(self, worker: str, **how: float) -> asyncio.Task[None]:
        """Let the reference generator work until the test ends."""
        task = asyncio.create_task(work(self.manager, self.generation, self.jobs(worker, **how)))
        self._stack.push_async_callback(_end, task)
        return task

    async def begin(self) -> str:
        """Make a session with an answer."""
        session_id = await self.manager.create_session(workspace_id="w1")
        await self.manager.save_step(session_id, 1, {"company": "Test Corp"})
        return session_id

    async def finalized(self) -> str:
        """Make a finalized session."""
        session_id = await self.begin()
        await self.manager.finalize(session_id)
        return session_id

    async def status(self, session_id: str) -> str:
        return (await self.generation.get_status(session_id))["status"]

    async def wait_for_status(self, session_id: str, status: str) -> None:
        async def is_so() -> bool:
            return await self.status(session_id) == status

        await until(is_so)

    async def result(self, session_id: str) -> dict[str, Any]:
        """Give the manifest of a session that has one."""
        result = await self.generation.get_result(session_id)
        assert isinstance(result, dict)
        return result


class Store:
    """Looks at the queue from outside."""

    def __init__(self, raw: Redis) -> None:
        self._raw = raw

    async def length(self) -> int:
        return int(await ask(self._raw, "XLEN", QUEUE))

    async def is_empty(self) -> bool:
        return await self.length() == 0

    async def is_made(self) -> bool:
        """Say whether the generators have begun to share the queue."""
        return bool(await self._raw.exists(QUEUE) and await self._raw.xinfo_groups(QUEUE))

    async def holders(self) -> dict[str, str]:
        """Say who has which job."""
        held: Any = await self._raw.xpending_range(QUEUE, "generators", "-", "+", 100)
        return {entry["message_id"].decode(): entry["consumer"].decode() for entry in held}

    async def give(self, job: Job, worker: str) -> None:
        """Give a job to somebody, whoever has it."""
        await ask(self._raw, "XCLAIM", QUEUE, "generators", worker, 0, job.job_id)

    async def events(self, session_id: str, *, tagged: bool = False) -> list[tuple[str, str]]:
        """Give what happened after the session was finalized, each with the status if it says."""
        name = f"{{{session_id}}}" if tagged else session_id
        entries: Any = await self._raw.xrange(f"onboarding:{name}:events")
        told = [
            (fields[b"type"].decode(), fields.get(b"status", b"").decode()) for _, fields in entries
        ]
        return told[told.index(("finalized", "")) + 1 :]


class Taker:
    """Takes the jobs that one generator gets, one after the other."""

    def __init__(self, jobs: JobService) -> None:
        self._jobs = jobs.jobs()
        self._taking: list[asyncio.Task[Job]] = []
        self._asked: list[asyncio.Future[Job]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Both: who waits may be gone before what they wait for.
        for waiting in (*self._taking, *self._asked):
            await _end(waiting)
        await self._jobs.aclose()

    def soon(self) -> asyncio.Task[Job]:
        """Begin to wait for the next one."""
        self._taking.append(asyncio.create_task(self._next()))
        return self._taking[-1]

    async def next(self) -> Job:
        return await self.soon()

    async def _next(self) -> Job:
        taking = asyncio.ensure_future(anext(self._jobs))
        self._asked.append(taking)
        try:
            await asyncio.wait([taking], timeout=SOON_S)
            if not taking.done():
                raise TimeoutError
            return taking.result()
        finally:
            await _end(taking)


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask soon again for the queue where the store was away."""
    monkeypatch.setattr("app.services.jobs.TRY_AGAIN_S", 0.1)


@pytest.fixture
async def open_office(raw: Redis, valkey: Valkey) -> AsyncIterator[Callable[..., Office]]:
    """Give a function that opens an office on the empty real store, with settings of its own."""
    async with AsyncExitStack() as stack:

        def make(**overrides: Any) -> Office:
            settings = {"redis_url": valkey.url, **QUICKLY, **overrides}
            return Office(known_settings(**settings), stack)

        yield make


@pytest.fixture(params=["off", "on"], ids=["beside", "hash-tag"])
def office(request: pytest.FixtureRequest, open_office: Callable[..., Office]) -> Office:
    """Give an office whose queue lies beside the sessions, and one where it cannot."""
    return open_office(key_hash_tag=request.param)


@pytest.fixture
def plain(open_office: Callable[..., Office]) -> Office:
    """Give an office for what does not depend on where the queue lies."""
    return open_office()


@pytest.fixture
def store(raw: Redis) -> Store:
    return Store(raw)


async def until(is_true: Callable[[], Awaitable[bool]]) -> None:
    """Ask every 10 ms until it is true."""
    until_s = time.monotonic() + SOON_S
    while not await is_true():
        if time.monotonic() > until_s:
            raise TimeoutError
        await asyncio.sleep(0.01)


async def _end(task: asyncio.Future[Any]) -> None:
    # Once is not enough: the client may lose a cancellation that meets a command as it is sent.
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)


# --- From finalize to the result ------------------------------------------------------------------


async def test_a_finalized_session_is_a_job_until_it_is_done(office: Office, store: Store) -> None:
    session_id = await office.finalized()
    jobs = office.jobs("a")

    async with Taker(jobs) as taker:
        job = await taker.next()
        async with jobs.hold(job):
            assert await store.holders() == {job.job_id: "a"}

    assert (job.session_id, job.revision) == (session_id, 1)
    assert (await store.length(), await store.holders()) == (0, {})


async def test_a_generator_makes_a_manifest_of_every_finalized_session(
    office: Office, store: Store
) -> None:
    before = await office.finalized()
    office.employ("a")
    await office.wait_for_status(before, "complete")
    while_it_waits = await office.finalized()
    await office.wait_for_status(while_it_waits, "complete")

    for session_id in (before, while_it_waits):
        manifest = await office.result(session_id)
        assert (manifest["session_id"], manifest["revision"]) == (session_id, 1)
        assert (await office.generation.get_status(session_id))["progress"] == 100
    await until(store.is_empty)


async def test_two_generators_share_20_sessions_and_each_is_done_once(
    office: Office, store: Store
) -> None:
    sessions = [await office.finalized() for _ in range(20)]
    tagged = office.settings.hash_tag
    office.employ("a")
    office.employ("b")

    for session_id in sessions:
        await office.wait_for_status(session_id, "complete")
    await until(store.is_empty)

    for session_id in sessions:
        happened = Counter(await store.events(session_id, tagged=tagged))
        assert happened["status_changed", "processing"] == 1
        assert happened["status_changed", "complete"] == 1
        assert happened["result_stored", ""] == 1
    assert await store.holders() == {}


async def test_a_session_generated_twice_has_the_same_result_byte_for_byte(plain: Office) -> None:
    session_id = await plain.finalized()
    results = []
    for _ in range(2):
        await generate(plain.manager, plain.generation, session_id)
        results.append(await plain.result(session_id))

    assert results[0] == results[1]
    assert list(results[0]) == list(results[1])
    assert await plain.status(session_id) == "complete"


async def test_the_jobs_come_in_the_order_of_the_finalizes(office: Office) -> None:
    sessions = [await office.finalized() for _ in range(5)]
    jobs = office.jobs()

    async with Taker(jobs) as taker:
        assert [(await taker.next()).session_id for _ in sessions] == sessions


async def test_a_finalize_that_is_asked_for_again_adds_no_job(plain: Office, store: Store) -> None:
    session_id = await plain.finalized()
    await plain.manager.finalize(session_id)

    assert await store.length() == 1


# --- What is not worked on ------------------------------------------------------------------------


async def test_a_session_that_is_finalized_again_is_generated_in_its_newest_revision_alone(
    office: Office, store: Store
) -> None:
    session_id = await office.finalized()
    await office.manager.reopen(session_id)
    await office.manager.save_step(session_id, 1, {"company": "Other Corp"})
    await office.manager.finalize(session_id)

    office.employ("a")
    await office.wait_for_status(session_id, "complete")
    await until(store.is_empty)

    manifest = await office.result(session_id)
    assert manifest["revision"] == 2
    assert manifest["sections"][0]["steps"][0]["facts"][0]["value"] == "Other Corp"
    happened = Counter(await store.events(session_id, tagged=office.settings.hash_tag))
    assert happened["result_stored", ""] == 1


async def reopen(office: Office, session_id: str) -> None:
    await office.manager.reopen(session_id)


async def delete(office: Office, session_id: str) -> None:
    await office.manager.delete_session(session_id)


async def complete(office: Office, session_id: str) -> None:
    await generate(office.manager, office.generation, session_id)


@pytest.mark.parametrize("end", [reopen, delete, complete])
async def test_a_session_that_waits_no_more_is_passed_over(
    office: Office, store: Store, raw: Redis, end: Callable[[Office, str], Awaitable[None]]
) -> None:
    over, waiting = await office.finalized(), await office.finalized()
    await end(office, over)
    before = await raw.keys(f"*{over}*"), await raw.hgetall(f"onboarding:{over}:progress")

    jobs = office.jobs()
    async with Taker(jobs) as taker:
        job = await taker.next()

    assert job.session_id == waiting
    assert list(await store.holders()) == [job.job_id]
    assert await store.length() == 1
    after = await raw.keys(f"*{over}*"), await raw.hgetall(f"onboarding:{over}:progress")
    assert sorted(after[0]) == sorted(before[0])
    assert after[1] == before[1]


async def test_a_session_that_was_complete_before_its_finalize_is_generated_all_the_same(
    office: Office,
) -> None:
    # Only finalize locks the steps: a question may have been answered before, by another generator.
    session_id = await office.begin()
    async with ProgressReporter(session_id, office.generation):
        pass
    await office.manager.finalize(session_id)
    assert await office.status(session_id) == "complete"

    jobs = office.jobs()
    async with Taker(jobs) as taker:
        assert (await taker.next()).session_id == session_id


async def test_a_session_that_is_deleted_under_its_generator_leaves_no_key(
    plain: Office, store: Store, raw: Redis
) -> None:
    gone, waiting = await plain.finalized(), await plain.finalized()
    jobs = plain.jobs()

    async with Taker(jobs) as taker:
        job = await taker.next()
        async with jobs.hold(job), ProgressReporter(gone, plain.generation) as report:
            await plain.manager.delete_session(gone)
            report("answer_generation")
            await plain.generation.store_result(gone, b"made of nothing")
        after = await taker.next()

    assert (job.session_id, after.session_id) == (gone, waiting)
    assert await raw.keys(f"*{gone}*") == []
    assert list(await store.holders()) == [after.job_id]


# --- The hash tag: the job comes before its session is finalized ----------------------------------


async def test_a_generator_that_waits_has_a_session_as_soon_as_it_is_finalized(
    open_office: Callable[..., Office],
) -> None:
    office = open_office(key_hash_tag="on")
    jobs = office.jobs()
    async with Taker(jobs) as taker:
        for _ in range(5):
            taking = taker.soon()
            session_id = await office.finalized()
            # Well before the 30 s after which somebody else's job is taken over.
            job = await taking
            assert job.session_id == session_id
            await office.queue.finish("worker", job)


async def test_a_job_whose_session_was_not_finalized_after_all_is_dropped_after_a_minute(
    open_office: Callable[..., Office], store: Store
) -> None:
    office = open_office(key_hash_tag="on")
    never, waiting = await office.begin(), await office.finalized()
    await office.queue.add(never, 1)
    jobs = office.jobs(abandoned_s=GONE_S)

    async with Taker(jobs) as taker:
        job = await taker.next()
        taker.soon()

        async def is_left() -> bool:
            return len(await store.holders()) == 2

        await until(is_left)
        assert await store.length() == 2
        await office.queue.finish("worker", job)
        assert job.session_id == waiting

        with time_machine.travel(time.time() + UNCONFIRMED_MS / 1000 + 1):
            await until(store.is_empty)

    assert await office.status(never) == "pending"


# --- Failures -------------------------------------------------------------------------------------


class ModelError(Exception):
    """What a generator stumbles over."""


async def test_a_generator_that_fails_says_why_and_goes_on_with_the_next_job(
    office: Office, store: Store
) -> None:
    bad, good = await office.finalized(), await office.finalized()
    jobs = office.jobs(abandoned_s=GONE_S)
    taken = []
    async with Taker(jobs) as taker:
        for _ in range(2):
            job = await taker.next()
            taken.append(job.session_id)
            async with jobs.hold(job), ProgressReporter(job.session_id, office.generation):
                if job.session_id == bad:
                    raise ModelError("the model\nis out of tokens")

    assert taken == [bad, good]
    assert (await store.length(), await store.holders()) == (0, {})
    status = await office.generation.get_status(bad)
    assert (status["status"], status["error_message"]) == ("error", "the model is out of tokens")
    assert await office.status(good) == "complete"


async def test_a_session_that_failed_is_generated_when_it_is_finalized_again(
    office: Office,
) -> None:
    session_id = await office.finalized()
    jobs = office.jobs()
    async with Taker(jobs) as taker:
        job = await taker.next()
        async with jobs.hold(job), ProgressReporter(session_id, office.generation):
            raise ModelError
    assert (await office.generation.get_status(session_id))["error_message"] == "ModelError"

    await office.manager.reopen(session_id)
    await office.manager.finalize(session_id)
    office.employ("b")

    await office.wait_for_status(session_id, "complete")
    assert (await office.generation.get_status(session_id))["error_message"] is None


async def test_a_generator_that_is_cancelled_leaves_its_job_to_another(
    plain: Office, store: Store
) -> None:
    session_id = await plain.finalized()
    jobs = plain.jobs("a")
    begun = asyncio.Event()

    async def work_for_ever(job: Job) -> None:
        async with jobs.hold(job), ProgressReporter(session_id, plain.generation):
            begun.set()
            await asyncio.Event().wait()

    async with Taker(jobs) as taker:
        job = await taker.next()
        working = asyncio.create_task(work_for_ever(job))
        await begun.wait()
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    assert await store.holders() == {job.job_id: "a"}
    assert await plain.status(session_id) == "processing"

    plain.employ("b", abandoned_s=GONE_S)
    await plain.wait_for_status(session_id, "complete")
    await until(store.is_empty)


async def test_a_generator_that_is_told_to_stop_does_so_although_it_loses_its_job_meanwhile(
    plain: Office, store: Store
) -> None:
    await plain.finalized()
    jobs = plain.jobs("a", abandoned_s=GONE_S)
    begun = asyncio.Event()

    async def work_for_ever(job: Job) -> None:
        async with jobs.hold(job):
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await store.give(job, "b")
                await asyncio.wait_for(asyncio.Event().wait(), SOON_S)

    async with Taker(jobs) as taker:
        job = await taker.next()
        working = asyncio.create_task(work_for_ever(job))
        await begun.wait()
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    assert await store.holders() == {job.job_id: "b"}


# --- Generators that are gone, or seem to be ------------------------------------------------------


async def test_a_job_of_a_generator_that_is_not_heard_of_goes_to_another(
    plain: Office, store: Store
) -> None:
    session_id = await plain.finalized()
    async with Taker(plain.jobs("a")) as dead, Taker(plain.jobs("b", abandoned_s=GONE_S)) as heir:
        job = await dead.next()

        assert await heir.next() == job

    assert job.session_id == session_id
    assert await store.holders() == {job.job_id: "b"}


async def test_a_job_that_is_held_is_nobody_elses_however_long_it_takes(
    plain: Office, store: Store, raw: Redis
) -> None:
    await plain.finalized()
    jobs = plain.jobs("a", abandoned_s=0.6)
    held = []

    async def has_beaten_often() -> bool:
        claims = (await raw.info("commandstats")).get("cmdstat_xclaim", {"calls": 0})
        return int(claims["calls"]) >= 5

    await ask(raw, "CONFIG", "RESETSTAT")
    async with Taker(jobs) as taker, Taker(plain.jobs("b", abandoned_s=0.6)) as other:
        job = await taker.next()
        other.soon()
        async with jobs.hold(job):
            await until(has_beaten_often)
            held.append(await store.holders())

    assert held == [{job.job_id: "a"}]
    assert await store.is_empty()


async def taken_over(store: Store, plain: Office, job: Job) -> None:
    await store.give(job, "b")


async def taken_over_and_done(store: Store, plain: Office, job: Job) -> None:
    await store.give(job, "b")
    await plain.queue.finish("b", job)


@pytest.mark.parametrize("lose", [taken_over, taken_over_and_done])
async def test_a_generator_that_has_lost_its_job_stops_working_on_it_and_takes_the_next(
    plain: Office, store: Store, lose: Callable[..., Awaitable[None]]
) -> None:
    lost, following = await plain.finalized(), await plain.finalized()
    jobs = plain.jobs("a", abandoned_s=GONE_S)
    reached_the_end = False

    async with Taker(jobs) as taker:
        job = await taker.next()
        async with jobs.hold(job), ProgressReporter(lost, plain.generation):
            await lose(store, plain, job)
            async with asyncio.timeout(SOON_S):
                await asyncio.Event().wait()
            reached_the_end = True
        after = await store.holders()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        following_job = await taker.next()

    assert not reached_the_end
    assert after == ({job.job_id: "b"} if lose is taken_over else {})
    assert following_job.session_id == following
    # It says nothing about a session that is somebody else's.
    assert await plain.status(lost) == "processing"


async def test_a_generator_that_has_lost_its_job_stops_whatever_it_is_waiting_for(
    plain: Office, store: Store
) -> None:
    # A cancellation that meets a command as it is sent may be lost on its way through the client.
    jobs = plain.jobs("a", abandoned_s=0.01)
    async with Taker(jobs) as taker:
        for _ in range(20):
            session_id = await plain.finalized()
            job = await taker.next()
            ended_itself = False
            async with jobs.hold(job):
                await taken_over_and_done(store, plain, job)
                until_s = time.monotonic() + SOON_S
                while time.monotonic() < until_s:
                    await plain.generation.get_status(session_id)
                ended_itself = True
            assert not ended_itself


async def test_nothing_of_a_job_is_left_running_when_it_is_over(plain: Office) -> None:
    jobs = plain.jobs("a", abandoned_s=0.003)
    async with Taker(jobs) as taker:
        for number in range(50):
            await plain.finalized()
            job = await taker.next()
            async with jobs.hold(job):
                await asyncio.sleep(number / 10_000)

    async def is_quiet() -> bool:
        return not any(task.get_name() == "heartbeat" for task in asyncio.all_tasks())

    await until(is_quiet)


# --- The store away -------------------------------------------------------------------------------


@pytest.fixture
async def proxy(raw: Redis, valkey: Valkey) -> AsyncIterator[Proxy]:
    """Stand before the empty real store."""
    async with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def distant(open_office: Callable[..., Office], proxy: Proxy) -> Office:
    """Give an office whose way to the store can break."""
    return open_office(redis_url=f"redis://{proxy.host}:{proxy.port}/0")


@pytest.fixture
def gave_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Awaitable[bool]]]:
    """Give a function that says whether a generator has asked for a job in vain."""
    # A service of another test may have bound the logger to its own configuration.
    monkeypatch.setattr("app.services.jobs.log", structlog.get_logger())
    with capture_logs() as lines:

        async def is_so() -> bool:
            return any(line["event"] == "queue_unreachable" for line in lines)

        yield is_so


async def test_an_outage_while_a_generator_waits_is_survived(
    plain: Office, distant: Office, proxy: Proxy, gave_up: Callable[[], Awaitable[bool]]
) -> None:
    working = distant.employ("a")

    async def waits() -> bool:
        return proxy.commands["XREADGROUP"] > 0

    await until(waits)
    proxy.refuse()
    proxy.reset_all()
    session_id = await plain.finalized()
    await until(gave_up)
    proxy.accept()

    await plain.wait_for_status(session_id, "complete")
    assert not working.done()


async def test_an_outage_under_a_generator_that_works_is_survived(
    plain: Office, distant: Office, proxy: Proxy, gave_up: Callable[[], Awaitable[bool]]
) -> None:
    working = distant.employ("a", abandoned_s=GONE_S)
    session_id = await plain.finalized()
    async with asyncio.timeout(SOON_S):
        while not proxy.commands["GET"]:  # of the export
            await asyncio.sleep(0)
    proxy.refuse()
    proxy.reset_all()

    await until(gave_up)
    proxy.accept()

    await plain.wait_for_status(session_id, "complete")
    assert not working.done()


async def test_a_job_that_was_lost_on_its_way_to_a_generator_is_handed_out_again(
    plain: Office, distant: Office, proxy: Proxy, store: Store
) -> None:
    session_id = await plain.finalized()
    jobs = distant.jobs("a", abandoned_s=GONE_S)
    proxy.drop_replies(1, to="XREADGROUP")

    async with Taker(jobs) as taker:
        job = await taker.next()

    assert job.session_id == session_id
    assert await store.holders() == {job.job_id: "a"}


async def test_a_queue_that_was_lost_is_begun_anew(plain: Office, raw: Redis) -> None:
    first = await plain.finalized()
    working = plain.employ("a")
    await plain.wait_for_status(first, "complete")

    await raw.flushdb()
    session_id = await plain.finalized()

    await plain.wait_for_status(session_id, "complete")
    assert not working.done()


async def test_waiting_for_a_job_is_no_failure_however_short_a_command_may_take(
    open_office: Callable[..., Office], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = open_office()
    monkeypatch.setenv("REDIS_URL", f"redis://{proxy.host}:{proxy.port}/0")
    monkeypatch.setenv("ONBOARDING_REDIS_TIMEOUT_S", "0.5")
    jobs = get_job_service("a")

    async def has_looked_twice() -> bool:
        return proxy.commands["XAUTOCLAIM"] >= 4  # the first one finds no queue

    async with Taker(jobs) as taker:
        taking = taker.soon()
        await until(has_looked_twice)
        failures = jobs._gateway.failures_last_minute
        session_id = await office.finalized()
        job = await taking
    await jobs.aclose()

    assert job.session_id == session_id
    assert failures == 0
