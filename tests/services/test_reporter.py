"""What a generator reports arrives: once, in order, and with how the run ended."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import NamedTuple

import pytest
from fakeredis import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequestError, SessionNotFoundError, StoreUnavailableError
from app.onboarding.generation import STAGES
from app.services.generation import GenerationService, ProgressEvent, ProgressReporter
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.services.test_generation import make_service


class Place(NamedTuple):
    """A store with a session in it, and what a generator works with."""

    service: GenerationService
    manager: OnboardingSessionManager
    session_id: str

    async def reports(self) -> list[tuple[str, int, str | None]]:
        """Give what was reported, in order."""
        events = await self.service.get_progress_events(self.session_id)
        return [(event.stage, event.progress, event.message) for event in events]

    async def status(self) -> tuple[str, str | None]:
        """Give the status and the message of an error."""
        status = await self.service.get_status(self.session_id)
        return status["status"], status["error_message"]

    async def reported(self, count: int) -> None:
        """Wait until so many reports have arrived."""
        async with asyncio.timeout(10):
            while len(await self.reports()) < count:
                await asyncio.sleep(0.005)


async def run(place: Place, work: Callable[[ProgressReporter], Awaitable[None]]) -> None:
    """Do what is reported on, as a run."""
    async with ProgressReporter(place.session_id, place.service) as report:
        await work(report)


async def place_on(gateway: Gateway) -> Place:
    manager = make_manager(gateway, known_settings())
    service = make_service(gateway, manager)
    return Place(service, manager, await manager.create_session())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.reporter.SEND_AGAIN_S", 0.01)


@pytest.fixture
async def place(gateway: Gateway) -> Place:
    return await place_on(gateway)


class Outage(NamedTuple):
    """A place whose store can be taken away."""

    place: Place
    server: FakeServer


@pytest.fixture
async def outage() -> AsyncIterator[Outage]:
    server = FakeServer()
    gateway = fake_gateway(server)
    yield Outage(await place_on(gateway), server)
    await gateway.aclose()


class TestARun:
    async def test_is_processing_inside_and_complete_outside(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service):
            assert await place.status() == ("processing", None)

        assert await place.status() == ("complete", None)
        assert await place.reports() == [("complete", 100, None)]

    async def test_delivers_every_report_in_order_before_it_is_over(self, place: Place) -> None:
        sent = [(f"stage {number}", number % 100, f"message {number}") for number in range(200)]

        async with ProgressReporter(place.session_id, place.service) as report:
            for stage, progress, message in sent:
                report(stage, progress, message)

        assert await place.reports() == [*sent, ("complete", 100, None)]

    async def test_is_seen_while_it_goes_on(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            report("halfway", 50, "Half of it")
            await place.reported(1)
            latest = await place.service.get_latest_progress(place.session_id)

        assert latest == {"progress": 50, "stage": "halfway", "status": "processing"}

    async def test_names_a_known_stage_and_need_not_say_how_far_that_is(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            for stage in STAGES:
                report(stage)

        assert await place.reports() == [(stage, done, None) for stage, done in STAGES.items()]

    async def test_that_reported_its_end_does_not_report_it_again(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            report("mine", 100, "All there")
            report("mine", 100, "Really")

        assert await place.reports() == [("mine", 100, "All there")]

    async def test_begins_anew_after_another(self, place: Place) -> None:
        for _ in range(2):
            async with ProgressReporter(place.session_id, place.service) as report:
                status = await place.service.get_status(place.session_id)
                assert (status["progress"], status["stage"]) == (0, None)
                report("halfway", 50)

        assert await place.reports() == [("halfway", 50, None), ("complete", 100, None)] * 2
        assert await place.status() == ("complete", None)

    async def test_of_one_session_does_not_touch_that_of_another(self, place: Place) -> None:
        other = place._replace(session_id=await place.manager.create_session())

        async def run(where: Place) -> None:
            async with ProgressReporter(where.session_id, where.service) as report:
                for progress in range(10):
                    report(where.session_id, progress)
                    await asyncio.sleep(0)

        await asyncio.gather(run(place), run(other))

        for each in (place, other):
            expected = [(each.session_id, progress, None) for progress in range(10)]
            assert await each.reports() == [*expected, ("complete", 100, None)]

    async def test_cannot_begin_in_a_session_that_is_not_there(self, place: Place) -> None:
        with pytest.raises(SessionNotFoundError):
            async with ProgressReporter("unknown", place.service):
                raise AssertionError("the block has begun")


class TestARunThatFails:
    async def test_ends_with_the_message_of_its_exception_which_goes_on(self, place: Place) -> None:
        failure = ValueError("no such file")

        async def work(report: ProgressReporter) -> None:
            report("halfway", 50)
            raise failure

        with pytest.raises(ValueError, match="no such file") as raised:
            await run(place, work)
        assert raised.value is failure
        assert await place.status() == ("error", "no such file")
        assert await place.reports() == [("halfway", 50, None)]

    @pytest.mark.parametrize(
        ("failure", "message"),
        [
            (ZeroDivisionError(), "ZeroDivisionError"),
            (ValueError(" \n"), "ValueError"),
            (ValueError("two\r\nlines\x00\u2028here"), "two lines here"),
            (ValueError("\ud800é"), "é"),
            (ValueError("m" * 5000), "m" * 2000),
            (SystemExit(3), "3"),
        ],
        ids=repr,
    )
    async def test_says_what_can_be_said_of_it(
        self, place: Place, failure: BaseException, message: str
    ) -> None:
        with pytest.raises(type(failure)):
            async with ProgressReporter(place.session_id, place.service):
                raise failure

        assert await place.status() == ("error", message)

    async def test_can_be_repeated(self, place: Place) -> None:
        with pytest.raises(ValueError, match="once"):
            async with ProgressReporter(place.session_id, place.service):
                raise ValueError("once")

        async with ProgressReporter(place.session_id, place.service):
            assert await place.status() == ("processing", None)
        assert await place.status() == ("complete", None)


class TestARunThatIsCancelled:
    async def test_stays_processing_for_whoever_takes_it_up(self, place: Place) -> None:
        begun = asyncio.Event()

        async def run() -> None:
            async with ProgressReporter(place.session_id, place.service) as report:
                report("halfway", 50)
                await place.reported(1)
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(run())
        await begun.wait()
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert await place.status() == ("processing", None)
        assert await place.reports() == [("halfway", 50, None)]

    async def test_leaves_nothing_running(self, outage: Outage) -> None:
        place, server = outage
        begun = asyncio.Event()

        async def run() -> None:
            async with ProgressReporter(place.session_id, place.service) as report:
                server.connected = False
                report("halfway", 50)
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(run())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async with asyncio.timeout(5):
            while any(each.get_name() == "progress-reports" for each in asyncio.all_tasks()):
                await asyncio.sleep(0.005)


class TestTheCallback:
    async def test_is_a_plain_one(self, place: Place) -> None:
        def generate(progress_callback: Callable[[str, int, str], None]) -> None:
            progress_callback("knowledge_search", 10, "Looking it up")
            progress_callback(stage="own", progress=55, message="é 中")  # type: ignore[call-arg]

        async with ProgressReporter(place.session_id, place.service) as report:
            generate(report)

        assert await place.reports() == [
            ("knowledge_search", 10, "Looking it up"),
            ("own", 55, "é 中"),
            ("complete", 100, None),
        ]

    async def test_may_be_called_from_another_thread(self, place: Place) -> None:
        def generate(report: ProgressReporter) -> None:
            for progress in range(100):
                report("working", progress, str(progress))

        async with ProgressReporter(place.session_id, place.service) as report:
            await asyncio.to_thread(generate, report)

        expected = [("working", progress, str(progress)) for progress in range(100)]
        assert await place.reports() == [*expected, ("complete", 100, None)]

    async def test_keeps_the_order_of_each_of_many_threads(self, place: Place) -> None:
        threads, rounds = 4, 50
        together = threading.Barrier(threads)

        def generate(report: ProgressReporter, name: str) -> None:
            together.wait(10)
            for progress in range(rounds):
                report(name, progress)

        async with ProgressReporter(place.session_id, place.service) as report:
            work = (asyncio.to_thread(generate, report, str(each)) for each in range(threads))
            await asyncio.gather(*work)

        reports = await place.reports()
        assert reports.pop() == ("complete", 100, None)
        assert len(reports) == threads * rounds
        for name in map(str, range(threads)):
            assert [progress for stage, progress, _ in reports if stage == name] == [*range(rounds)]

    @pytest.mark.parametrize(
        "bad",
        [
            *(("brewing",), ("",), ("s", -1), ("s", 101), ("s", True)),
            *(("s" * 129, 5), ("a\nb", 5), ("s", 101.5)),
        ],
        ids=repr,
    )
    async def test_refuses_at_once_what_is_no_report_and_the_run_goes_on(
        self, place: Place, bad: tuple[str, int, str]
    ) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            with pytest.raises(InvalidRequestError):
                report(*bad)
            with pytest.raises(InvalidRequestError):
                await asyncio.to_thread(report, *bad)
            report("good", 50)

        assert await place.reports() == [("good", 50, None), ("complete", 100, None)]

    async def test_takes_what_libraries_report_as_well_as_it_can(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            report("s", 33.9, "a\nb\x00 c")
            report("s", 34, "m" * 3000)

        assert await place.reports() == [
            ("s", 33, "a b c"),
            ("s", 34, "m" * 2000),
            ("complete", 100, None),
        ]

    async def test_says_when_the_run_has_ended(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service) as report:
            pass
        with pytest.raises(RuntimeError, match="ended"):
            report("late", 50)
        with pytest.raises(RuntimeError, match="ended"):
            await asyncio.to_thread(report, "late", 50)
        assert await place.reports() == [("complete", 100, None)]

    async def test_either_delivers_or_refuses_what_comes_at_the_very_end(
        self, outage: Outage
    ) -> None:
        place = outage.place
        accepted: list[int] = []

        def generate(report: ProgressReporter) -> None:
            for number in range(250):
                try:
                    report("working", number % 100, str(number))
                except RuntimeError:
                    return
                accepted.append(number)

        for _ in range(3):
            accepted.clear()
            before = len(await place.reports())
            async with ProgressReporter(place.session_id, place.service) as report:
                thread = threading.Thread(target=generate, args=[report])
                thread.start()
                await asyncio.sleep(0)
            await asyncio.to_thread(thread.join)
            reports = (await place.reports())[before:]
            delivered = [message for _, _, message in reports if message is not None]
            assert delivered == [str(number) for number in accepted]


class TestTheQuestionsOfARun:
    async def test_count_for_their_share(self, place: Place) -> None:
        async with ProgressReporter(place.session_id, place.service, questions=4) as report:
            first, last = report.question(0), report.question(3)
            first("knowledge_search")
            first("answer_generation", message="First")
            last("complete")
            first("own", 100)

        assert await place.reports() == [
            ("knowledge_search", 2, None),
            ("answer_generation", 10, "First"),
            ("complete", 35, None),
            ("own", 50, None),
            ("complete", 100, None),
        ]

    @pytest.mark.parametrize("number", [-1, 2, 100])
    async def test_are_as_many_as_were_said(self, place: Place, number: int) -> None:
        async with ProgressReporter(place.session_id, place.service, questions=2) as report:
            with pytest.raises(IndexError):
                report.question(number)

    async def test_may_be_answered_in_threads_of_their_own(self, place: Place) -> None:
        def answer(report: Callable[..., None]) -> None:
            for stage in STAGES:
                report(stage)

        async with ProgressReporter(place.session_id, place.service, questions=5) as report:
            answers = (asyncio.to_thread(answer, report.question(each)) for each in range(5))
            await asyncio.gather(*answers)

        progress = [each for _, each, _ in await place.reports()]
        assert progress == sorted(progress)
        assert progress.count(100) == 1


class TestAStoreThatIsAway:
    async def test_in_the_middle_is_waited_for(self, outage: Outage) -> None:
        place, server = outage
        async with ProgressReporter(place.session_id, place.service) as report:
            report("before", 10)
            await place.reported(1)
            server.connected = False
            for progress in range(20, 30):
                report("meanwhile", progress)
            # Longer than a call to the store is repeated by itself.
            for _ in range(3):
                with pytest.raises(StoreUnavailableError):
                    await place.reports()
            server.connected = True
            report("after", 90)
            await place.reported(12)

        assert await place.reports() == [
            ("before", 10, None),
            *(("meanwhile", progress, None) for progress in range(20, 30)),
            ("after", 90, None),
            ("complete", 100, None),
        ]
        assert await place.status() == ("complete", None)

    async def test_to_the_end_is_told(self, outage: Outage) -> None:
        place, server = outage

        async def work(report: ProgressReporter) -> None:
            server.connected = False
            report("lost", 50)

        with pytest.raises(StoreUnavailableError):
            await run(place, work)

        server.connected = True
        assert await place.status() == ("processing", None)
        assert await place.reports() == []

    async def test_to_the_end_does_not_hide_why_the_run_failed(self, outage: Outage) -> None:
        place, server = outage

        async def work(report: ProgressReporter) -> None:
            server.connected = False
            report("lost", 50)
            raise ValueError("worse")

        with pytest.raises(ValueError, match="worse"):
            await run(place, work)

        server.connected = True
        assert await place.status() == ("processing", None)

    async def test_whose_replies_are_lost_has_every_report_once(
        self, settings: Settings, valkey: Valkey
    ) -> None:
        async with Proxy(valkey.port) as proxy:
            changes = {"redis_url": f"redis://{proxy.host}:{proxy.port}/0", "redis_timeout_s": 0.1}
            gateway = connect(
                known_settings(**{**settings.model_dump(exclude_unset=True), **QUICKLY, **changes})
            )
            place = await place_on(gateway)
            async with ProgressReporter(place.session_id, place.service) as report:
                for progress in range(30):
                    if progress % 10 == 0:
                        proxy.drop_replies(1, to="EVALSHA")
                    report("working", progress)
                    await place.reported(progress + 1)
            reports = await place.reports()
            await gateway.aclose()

        expected = [("working", progress, None) for progress in range(30)]
        assert reports == [*expected, ("complete", 100, None)]


class TestASessionThatIsDeletedMeanwhile:
    async def test_is_told_at_the_end(self, place: Place) -> None:
        async def work(report: ProgressReporter) -> None:
            await place.manager.delete_session(place.session_id)
            report("too late", 50)
            await asyncio.sleep(0)
            report("later still", 60)

        with pytest.raises(SessionNotFoundError):
            await run(place, work)
        with pytest.raises(SessionNotFoundError):
            await place.status()

    async def test_is_told_though_nothing_was_reported(self, place: Place) -> None:
        with pytest.raises(SessionNotFoundError):
            async with ProgressReporter(place.session_id, place.service):
                await place.manager.delete_session(place.session_id)

    async def test_does_not_hide_why_the_run_failed(self, place: Place) -> None:
        async def work(report: ProgressReporter) -> None:
            await place.manager.delete_session(place.session_id)
            report("too late", 50)
            raise ValueError("worse")

        with pytest.raises(ValueError, match="worse"):
            await run(place, work)


# --- Properties -----------------------------------------------------------------------------------


class Bench(NamedTuple):
    """A service on the real store, and the loop that its connections belong to."""

    runner: asyncio.Runner
    service: GenerationService
    manager: OnboardingSessionManager


@pytest.fixture(scope="module")
def bench(valkey: Valkey) -> Iterator[Bench]:
    chosen = known_settings(redis_url=valkey.url)
    gateway = connect(chosen)
    manager = make_manager(gateway, chosen)
    service = make_service(gateway, manager)
    with asyncio.Runner() as runner:
        yield Bench(runner, service, manager)
        runner.run(service.aclose())


_answers = st.lists(st.integers(0, 99), max_size=4).map(lambda steps: [*sorted(steps), 100])
"""What one question reports: it gets on, and is done at the end."""


@settings(max_examples=40, deadline=None, derandomize="CI" in os.environ)
@given(answers=st.lists(_answers, min_size=1, max_size=6), data=st.data())
def test_progress_over_any_questions_rises_to_100_once_and_at_the_end(
    bench: Bench, answers: list[list[int]], data: st.DataObject
) -> None:
    turns = [number for number, steps in enumerate(answers) for _ in steps]
    order = data.draw(st.permutations(turns))

    async def run() -> list[ProgressEvent]:
        session_id = await bench.manager.create_session()
        waiting = [iter(steps) for steps in answers]
        async with ProgressReporter(session_id, bench.service, questions=len(answers)) as report:
            for number in order:
                report.question(number)("working", next(waiting[number]))
        events = await bench.service.get_progress_events(session_id)
        assert (await bench.service.get_status(session_id))["status"] == "complete"
        await bench.manager.delete_session(session_id)
        return events

    progress = [event.progress for event in bench.runner.run(run())]

    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert progress.count(100) == 1
