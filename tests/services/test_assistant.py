"""Questions by the Python names that callers know: who answers, how many, what is closed."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from app.clock import monotonic_s
from app.context import RequestContext, reset_context, set_context
from app.errors import (
    AgentFailedError,
    DeadlineExceededError,
    InvalidRequestError,
    RateLimitedError,
    SessionNotFoundError,
    StoreUnavailableError,
)
from app.onboarding.assistant import Chunk, Result, Stage
from app.services import assistant as module
from app.services.assistant import (
    WAITING_PER_TURN,
    Answering,
    AskLimits,
    AssistantService,
    GuideFactory,
    Turns,
    get_assistant,
    make_assistant,
)
from app.services.manager import OnboardingSessionManager, make_manager
from app.store.connect import connect
from app.store.gateway import Gateway
from tests import agents
from tests.agents import AGENT, Book, RehearsedFactory
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.servers import HOST, Valkey, free_ports

Manager = OnboardingSessionManager
Make = Callable[..., AssistantService]


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    monkeypatch.setattr(module, "log", structlog.get_logger())


@pytest.fixture
def book() -> Book:
    return agents.new_book()


@pytest.fixture
def gateway() -> Gateway:
    return fake_gateway()


@pytest.fixture
def manager(gateway: Gateway) -> Manager:
    return make_manager(gateway, known_settings())


@pytest.fixture
async def session_id(manager: Manager) -> str:
    return await manager.create_session(workspace_id="w", language="pt-BR")


@pytest.fixture
def make(gateway: Gateway, manager: Manager, book: Book) -> Make:
    """Give a function that makes a service with agents that write into the book."""

    def make_one(
        at_once: int = 10, per_second: int = 1000, deadline_s: float = 5.0
    ) -> AssistantService:
        limits = AskLimits(at_once, per_second, deadline_s)
        return AssistantService(gateway, manager.catalogue, RehearsedFactory(), limits)

    return make_one


@pytest.fixture
def guide(gateway: Gateway) -> AssistantService:
    """Give a service with the built-in agent."""
    return make_assistant(gateway, known_settings())


async def hear_all(answering: Answering) -> list[Any]:
    """Give everything that is said up to the result."""
    said: list[Any] = []
    while not (said and isinstance(said[-1], Result)):
        said.append(await answering.hear(5))
    return said


# --- Asking ---------------------------------------------------------------------------------------


async def test_an_agent_is_made_for_one_question_and_told_who_asks(
    make: Make, manager: Manager, session_id: str, book: Book
) -> None:
    service = make()
    answer = await service.ask(session_id, "quick")
    assert answer["answer"] == "an answer"
    assert answer["confidence"] == 0.9
    assert answer["step_id"] == 4
    assert answer["processing_stage"] == "completed"
    assert answer["processing_time_ms"] in range(1, 1000)
    [context] = book.contexts
    assert (context.session_id, context.language) == (session_id, "pt-BR")
    assert context.catalogue is manager.catalogue
    assert context.request_id is None

    token = set_context(RequestContext("r1", monotonic_s() + 5))
    await service.ask(session_id, "quick")
    reset_context(token)
    assert book.contexts[1].request_id == "r1"
    assert (book.begun, book.closed, book.running) == (2, 2, 0)


async def test_what_was_asked_is_in_the_history_and_counted(
    make: Make, manager: Manager, session_id: str
) -> None:
    service = make()
    took = [(await service.ask(session_id, "quick"))["processing_time_ms"] for _ in range(12)]
    history = await service.get_history(session_id)
    assert len(history) == 10
    assert {each["question"] for each in history} == {"quick"}
    stats = (await manager.get_session_summary(session_id))["stats"]
    assert stats["request_count"] == 12
    assert stats["total_processing_ms"] == sum(took)


async def test_an_answer_that_is_not_known_is_none_and_counts_all_the_same(
    make: Make, session_id: str
) -> None:
    service = make()
    answer = await service.ask(session_id, "unknown")
    assert (answer["answer"], answer["confidence"]) == (None, 0.1)
    [asked] = await service.get_history(session_id)
    assert (asked["answer"], asked["confidence"]) == (None, 0.1)


async def test_a_line_of_the_log_tells_how_it_went_and_not_what_was_said(
    make: Make, session_id: str
) -> None:
    with capture_logs() as lines:
        await make().ask(session_id, "quick")
    [line] = [line for line in lines if line["event"] == "question_answered"]
    assert line.pop("duration_ms") > 0
    assert line == {
        "event": "question_answered",
        "log_level": "info",
        "session_id": session_id,
        "confidence": 0.9,
        "is_answered": True,
    }


@pytest.mark.parametrize("question", ["", "x" * 2001, "a\0", None])
async def test_what_is_no_question_makes_no_agent(
    make: Make, session_id: str, book: Book, question: Any
) -> None:
    with pytest.raises(InvalidRequestError):
        await make().ask(session_id, question)
    assert book.contexts == []


async def test_an_unknown_session_makes_no_agent_and_costs_no_turn(make: Make, book: Book) -> None:
    service = make(at_once=1, per_second=1)
    for _ in range(5):
        with pytest.raises(SessionNotFoundError):
            await service.ask("unknown", "quick")
        with pytest.raises(SessionNotFoundError):
            await service.get_history("unknown")
    assert book.contexts == []
    with pytest.raises(InvalidRequestError):
        await service.ask("a b", "quick")
    with pytest.raises(InvalidRequestError):
        await service.get_history("a b")


async def test_a_session_that_is_deleted_meanwhile_gets_no_history(
    make: Make, manager: Manager, gateway: Gateway, session_id: str, book: Book
) -> None:
    asking = asyncio.create_task(make().ask(session_id, "wait"))
    await book.wait_for(running=1)
    await manager.delete_session(session_id)
    book.gate.set()
    with pytest.raises(SessionNotFoundError):
        await asking
    assert await gateway.command("KEYS", f"*{session_id}*") == []


async def test_a_store_that_is_away_is_an_error_and_no_answer(
    valkey: Valkey, session_id: str, book: Book
) -> None:
    [port] = free_ports(1)
    settings = known_settings(redis_url=f"redis://{HOST}:{port}/0", retry_attempts=1, **QUICKLY)
    service = make_assistant(connect(settings), settings)
    with pytest.raises(StoreUnavailableError):
        await service.ask(session_id, "What is a draft?")
    await service.aclose()


# --- Agents that go wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "exception", "reason"),
    [
        ("fail", "RuntimeError", None),
        ("no result", "_AgentFaultError", "it ended without a result"),
        ("no confidence", "_AgentFaultError", "a confidence is a number from 0 to 1"),
        ("another step", "_AgentFaultError", "a step_id is the number of a step"),
        ("talk without end", "_AgentFaultError", "it says too much"),
        ("cancel yourself", "CancelledError", "it cancelled itself"),
    ],
)
async def test_an_agent_that_fails_is_closed_and_logged_and_nothing_is_kept(
    make: Make, session_id: str, book: Book, question: str, exception: str, reason: str | None
) -> None:
    service = make(at_once=1)
    with capture_logs() as lines, pytest.raises(AgentFailedError) as failure:
        await service.ask(session_id, question)
    assert failure.value.code == "internal_error"
    [line] = [line for line in lines if line["event"] == "agent_failed"]
    assert (line["log_level"], line["session_id"]) == ("error", session_id)
    assert line["exception"] == exception
    assert line.get("reason", "").startswith(reason or "")
    assert "secret" not in str(lines) + str(failure.value)
    assert (book.begun, book.closed, book.running) == (1, 1, 0)
    assert await service.get_history(session_id) == []
    # Its turn is free again.
    assert (await service.ask(session_id, "quick"))["answer"] == "an answer"


async def test_a_factory_that_fails_is_an_error_too(
    make: Make, manager: Manager, book: Book
) -> None:
    await manager.set_metadata("refused", "u", "w")
    service = make(at_once=1)
    for _ in range(2):
        with pytest.raises(AgentFailedError):
            await service.ask("refused", "quick")


async def test_an_agent_that_is_silent_for_too_long_is_ended(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=1, deadline_s=0.05)
    for _ in range(2):
        with pytest.raises(DeadlineExceededError):
            await service.ask(session_id, "silent")
    assert (book.begun, book.closed, book.running) == (2, 2, 0)


async def test_an_answer_takes_no_longer_than_what_is_left_of_its_request(
    make: Make, session_id: str, book: Book
) -> None:
    token = set_context(RequestContext("r1", monotonic_s() + 0.1))
    with pytest.raises(DeadlineExceededError):
        await make().ask(session_id, "silent")
    reset_context(token)
    assert (book.closed, book.running) == (1, 0)


async def test_an_agent_that_does_not_close_holds_nobody_up(
    make: Make, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.02)

    class Clinging(agents.Rehearsed):
        async def aclose(self) -> None:
            await asyncio.Event().wait()

    service = make(at_once=1)
    monkeypatch.setattr(RehearsedFactory, "make", lambda *_: Clinging(agents.book, "s"))
    with capture_logs() as lines:
        assert (await service.ask(session_id, "quick"))["answer"] == "an answer"
        assert (await service.ask(session_id, "quick"))["answer"] == "an answer"
    closing = [line for line in lines if line["event"] == "agent_not_closed"]
    assert [(line["log_level"], line["exception"]) for line in closing] == [
        ("warning", "TimeoutError")
    ] * 2


# --- Whoever asks goes away -----------------------------------------------------------------------


@pytest.mark.parametrize("question", ["wait", "talk, then wait", "silent"])
async def test_a_call_that_is_cancelled_closes_its_agent(
    make: Make, session_id: str, book: Book, question: str
) -> None:
    service = make(at_once=1)
    for count in (1, 2):
        asking = asyncio.create_task(service.ask(session_id, question))
        await book.wait_for(running=1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await book.wait_for(closed=count)
    assert book.running == 0
    assert (await service.ask(session_id, "quick"))["answer"] == "an answer"


async def test_a_call_that_is_cancelled_at_any_moment_leaves_no_agent_and_no_turn_behind(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=2)
    for turns in range(60):
        asking = asyncio.create_task(service.ask(session_id, "talk, then wait"))
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await book.wait_for(running=0)
    assert book.closed == len(book.contexts) > 10
    book.gate.set()
    answers = await asyncio.gather(*(service.ask(session_id, "wait") for _ in range(2)))
    assert len(answers) == 2


async def test_who_reads_along_hears_everything_and_may_leave(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=1)
    answering = await service.begin(session_id, "quick")
    assert await hear_all(answering) == [
        *(Stage("thinking"), Chunk("an "), Chunk("answer"), Result("an answer", 0.9, 4))
    ]
    await answering.aclose()

    answering = await service.begin(session_id, "wait")
    assert await answering.hear(5) == Stage("thinking")
    assert await answering.hear(0.01) is None
    answering.leave()
    assert await answering.hear(5) is None
    await answering.aclose()
    assert (book.begun, book.closed, book.running) == (2, 2, 0)


async def test_a_listener_who_reads_nothing_holds_no_turn(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=1)
    idle = [await service.begin(session_id, "quick") for _ in range(3)]
    assert (await service.ask(session_id, "quick"))["answer"] == "an answer"
    for answering in idle:
        assert (await hear_all(answering))[-1] == Result("an answer", 0.9, 4)
        await answering.aclose()


async def test_closing_the_service_ends_every_agent(
    make: Make, session_id: str, book: Book
) -> None:
    service = make()
    asking = [asyncio.create_task(service.ask(session_id, "wait")) for _ in range(3)]
    await book.wait_for(running=3)
    await service.aclose()
    assert (book.closed, book.running) == (3, 0)
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_stop_wakes_who_reads_along_and_lets_others_finish(
    make: Make, session_id: str, book: Book
) -> None:
    service = make()
    answering = await service.begin(session_id, "wait")
    asking = asyncio.create_task(service.ask(session_id, "wait"))
    await book.wait_for(running=2)
    assert await answering.hear(5) == Stage("thinking")
    service.stop_soon()
    assert await answering.hear(5) is None
    assert answering.is_stopping
    await answering.aclose()
    book.gate.set()
    assert (await asking)["answer"] == "an answer"


# --- How many -------------------------------------------------------------------------------------


async def test_so_many_run_at_once_some_wait_and_the_rest_are_refused(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=3)
    asking = [asyncio.create_task(service.ask(session_id, "wait")) for _ in range(50)]
    refused, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    # It has half of the queue.
    while len(refused) < 50 - 3 * WAITING_PER_TURN // 2:
        more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        refused |= more
    assert {type(each.exception()) for each in refused} == {RateLimitedError}
    await book.wait_for(running=3)

    book.gate.set()
    answers = await asyncio.gather(*waiting)
    assert len(answers) == 3 * WAITING_PER_TURN // 2
    assert book.most_running == 3
    assert (await service.ask(session_id, "quick"))["answer"] == "an answer"


async def test_a_wait_ends_within_half_of_the_requests_time(
    make: Make, session_id: str, book: Book
) -> None:
    service = make(at_once=1)
    first = asyncio.create_task(service.ask(session_id, "wait"))
    await book.wait_for(running=1)
    token = set_context(RequestContext("r1", monotonic_s() + 0.1))
    begun_s = monotonic_s()
    with pytest.raises(RateLimitedError):
        await service.ask(session_id, "quick")
    assert monotonic_s() - begun_s < 0.1
    reset_context(token)
    book.gate.set()
    await first
    assert (await service.ask(session_id, "quick"))["answer"] == "an answer"


async def test_who_waits_longest_comes_first_and_who_gives_up_holds_nobody_up() -> None:
    turns = Turns(1, 5)
    order: list[int] = []

    async def wait(number: int) -> None:
        with turns.queue("s" if number % 2 else "t"):
            await turns.take("s" if number % 2 else "t", 1)
        order.append(number)

    waiting = [asyncio.create_task(wait(0))]
    await waiting[0]
    for number in range(1, 5):
        waiting.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0)
    waiting[2].cancel()
    for _ in range(3):
        turns.give_back()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [0, 1, 4, 3]
    turns.give_back()
    await turns.take("s", 0)
    # One that comes in the moment in which it is given up goes to the next.
    last = asyncio.create_task(wait(5))
    given_up = asyncio.create_task(wait(6))
    await asyncio.sleep(0)
    turns.give_back()
    last.cancel()
    await given_up
    assert order[-1] == 6


async def test_a_flood_of_one_session_leaves_places_and_the_next_turn_to_others() -> None:
    turns = Turns(2, 8)
    order: list[str] = []

    async def wait(session_id: str) -> None:
        with turns.queue(session_id):
            await turns.take(session_id, 1)
        order.append(session_id)

    flood = [asyncio.create_task(wait("one")) for _ in range(9)]
    await asyncio.sleep(0)
    assert [type(each.exception()) for each in flood if each.done() and each.exception()] == [
        RateLimitedError
    ] * (9 - 2 - 4)
    others = [asyncio.create_task(wait(name)) for name in ("two", "three", "two")]
    await asyncio.sleep(0)
    for _ in range(7):
        turns.give_back()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*flood, *others, return_exceptions=True)
    assert order == ["one"] * 3 + ["two", "three", "one", "two", "one", "one"]


async def test_no_more_are_asked_within_a_second_than_may_be(
    make: Make, session_id: str, book: Book
) -> None:
    services = [make(per_second=4) for _ in range(3)]
    asking = (services[n % 3].ask(session_id, "quick") for n in range(12))
    answers = await asyncio.gather(*asking, return_exceptions=True)
    refused = [each for each in answers if isinstance(each, RateLimitedError)]
    assert len(refused) == 8
    assert book.begun == 4


async def test_a_limit_that_cannot_be_looked_up_stops_nobody(
    make: Make, gateway: Gateway, session_id: str
) -> None:
    await gateway.command("SET", gateway.keys.asks, "no list", "PX", 60_000)
    service = make(per_second=1)
    for _ in range(3):
        assert (await service.ask(session_id, "quick"))["answer"] == "an answer"


# --- The built-in agent ---------------------------------------------------------------------------


async def test_without_any_other_the_help_texts_answer(
    guide: AssistantService, session_id: str
) -> None:
    answer = await guide.ask(session_id, "Where do I enter our prices?")
    assert answer["step_id"] == 5
    assert answer["confidence"] > 0.25
    nothing = await guide.ask(session_id, "How do I bake sourdough bread?")
    assert nothing["answer"] is None
    assert nothing["confidence"] == 0
    assert "step_id" not in nothing
    assert len(await guide.get_history(session_id)) == 2


async def test_it_says_what_it_does_and_the_answer_sentence_by_sentence(
    guide: AssistantService, session_id: str
) -> None:
    answering = await guide.begin(session_id, "What is step 5 about?")
    stage, *chunks, result = await hear_all(answering)
    await answering.aclose()
    assert stage == Stage("searching")
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == result.answer
    assert result.answer.startswith("Step 5, The Offer: ")


async def test_a_session_is_answered_from_the_catalogue_that_it_began_with(
    gateway: Gateway, steps_file: Any, session_id: str
) -> None:
    step: dict[str, Any] = {"id": 1, "key": "a", "title": "Orchard", "phase": 1, "required": True}
    step["help"] = "Count your apple trees."
    file = steps_file(json.dumps({"version": "7", "steps": [step]}))
    settings = known_settings(steps_file=file)
    other = await make_manager(gateway, settings).create_session(workspace_id="w")
    service = make_assistant(gateway, known_settings())
    for _ in range(2):
        answer = await service.ask(other, "How many apple trees?")
        assert (answer["answer"], answer["step_id"]) == (
            "Step 1, Orchard: Count your apple trees.",
            1,
        )
        assert (await service.ask(session_id, "How many apple trees?"))["answer"] is None
    # The other way round as well.
    service = make_assistant(gateway, settings)
    assert (await service.ask(session_id, "What is step 5 about?"))["step_id"] == 5


async def test_a_question_that_is_asked_again_is_worked_once(
    session_id: str, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = GuideFactory(manager.catalogue, known_settings().questions)
    results = await asyncio.gather(
        *(factory.answer(manager.catalogue, text) for text in ("a draft?", "What is a DRAFT"))
    )
    assert results[0] is results[1]
    remembered: Any = factory._remembered.get().answer
    assert (remembered.cache_info().misses, remembered.cache_info().hits) == (1, 1)
    for number in range(module.CACHED_ANSWERS + 10):
        await factory.answer(manager.catalogue, f"w{number}")
    assert remembered.cache_info().currsize == module.CACHED_ANSWERS


# --- By name --------------------------------------------------------------------------------------


@pytest.fixture
def from_environment(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    get_assistant.cache_clear()
    yield monkeypatch
    get_assistant.cache_clear()


def test_it_can_be_had_by_name_in_one_event_loop_after_the_other(
    from_environment: pytest.MonkeyPatch,
) -> None:
    assert get_assistant() is get_assistant()

    async def use() -> tuple[int, int]:
        settings = known_settings()
        manager = make_manager(connect(settings), settings)
        session_id = await manager.create_session(workspace_id="w")
        questions = [module.ask(session_id, "What is a draft?") for _ in range(12)]
        answers = await asyncio.gather(*questions)
        history = await module.get_history(session_id)
        await manager.delete_session(session_id)
        await manager.aclose()
        await get_assistant().aclose()
        return len({answer["answer"] for answer in answers}), len(history)

    for _ in range(3):
        assert asyncio.run(use()) == (1, 10)


def test_the_factory_that_a_deployer_names_is_made_once(
    from_environment: pytest.MonkeyPatch,
) -> None:
    from_environment.setenv("ONBOARDING_AGENT", AGENT)
    made = len(agents.MADE)
    get_assistant()
    get_assistant.cache_clear()
    get_assistant()
    assert known_settings().load_agent_factory() is agents.MADE[-1]
    assert len(agents.MADE) in {made, 1}
