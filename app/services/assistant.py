"""Questions while onboarding: let in so many at a time, answered by an agent, kept with the answer.

An agent runs in a task of its own, to which whoever asks listens: so it is closed in order whatever
becomes of the listener, and a slow one holds up no other question. What an agent may say is
bounded, so nothing that waits for a listener can pile up.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
from async_lru import alru_cache

from app.clock import monotonic_s, now_ms
from app.context import get_context, learn
from app.errors import AgentFailedError, DeadlineExceededError, RateLimitedError, StoreError
from app.onboarding.assistant import (
    MAX_ANSWER_LENGTH,
    MAX_SAID,
    Agent,
    AgentContext,
    AgentFactory,
    AnswerView,
    AskedQuestion,
    Chunk,
    Result,
    Said,
    Stage,
    check_question,
    check_said,
    split_answer,
    view_answer,
    view_asked,
)
from app.onboarding.catalogue import Catalogue
from app.onboarding.guide import THRESHOLD, Guide, QuestionEntry, words_of
from app.onboarding.sessions import check_session_id
from app.services.standin import stand_in
from app.settings import Settings, load_settings
from app.store.assistant import AssistantStore
from app.store.catalogue import CatalogueStore
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.sessions import SessionStore

__all__ = [
    "Answering",
    "AskLimits",
    "AssistantService",
    "GuideFactory",
    "ask",
    "get_assistant",
    "get_history",
    "make_assistant",
]

log = structlog.get_logger()

T = TypeVar("T")

WAITING_PER_TURN = 10
"""How many questions may wait for each one that is answered at once; one more is refused. As long
as an answer takes 0.5 s or less, the last one gets its turn in time."""

WAIT_S = 5.0
"""Longest wait for a turn, in seconds; never more than half of what is left of the request's time,
so that the other half is there for the answer."""

LONGEST_ANSWER_S = 300.0
"""How long an answer may take that somebody reads along, in seconds. An agent that says nothing for
as long as a request may take is ended before."""

CLOSE_S = 5.0
"""How long an agent may take to close, in seconds."""

CANCEL_AGAIN_S = 0.1
"""Pause before an agent that goes on although it was cancelled is cancelled again, in seconds."""

CACHED_ANSWERS = 1024
"""How many answers of the guide are remembered: some 10 MB, were every question as long as it may
be."""

CACHED_S = 3600.0
"""How long an answer is remembered, in seconds: what somebody asked stays in no memory for good."""

CACHED_GUIDES = 8
"""How many guides are remembered, one for each catalogue that sessions began with."""


class AskLimits(NamedTuple):
    """How many questions may be asked, and how long an answer may take.

    `at_once` counts those of this process, `per_second` those of all processes together;
    `deadline_s` is where no request sets a limit, and the longest silence of an agent, in seconds.
    """

    at_once: int
    per_second: int
    deadline_s: float


class Turns:
    """Lets so many in at once; of the others some wait.

    A turn that ends goes to the session that had none for longest, to whoever waits longest there,
    and no session has more than half of the places in the queue: a flood of one session holds up
    others for as long as one turn lasts.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._free = at_once
        self._places = waiting
        self._taken: Counter[str] = Counter()
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def check(self, session_id: str) -> None:
        """Raise `RateLimitedError` when there is no place in the queue."""
        share = max(1, self._places // 2)
        if self._taken.total() >= self._places or self._taken[session_id] >= share:
            raise RateLimitedError

    @contextmanager
    def queue(self, session_id: str) -> Iterator[None]:
        """Stand in the queue for the length of a block. Raises `RateLimitedError` when it is full.

        What a question asks of the store before it has its turn is asked from here, so that a flood
        of questions is none for the store.
        """
        self.check(session_id)
        self._taken[session_id] += 1
        try:
            yield
        finally:
            self._taken -= Counter([session_id])

    @property
    def waiting(self) -> int:
        """How many stand in the queue."""
        return self._taken.total()

    async def take(self, session_id: str, limit_s: float) -> None:
        """Wait for a turn. Raises `RateLimitedError` when none comes in so many seconds."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(session_id, deque()).append(turn)
        try:
            async with asyncio.timeout(limit_s):
                await turn
        except BaseException as ended:
            if turn.cancelled():
                self._leave(session_id, turn)
            else:
                # It came just as it was given up.
                self.give_back()
            if isinstance(ended, TimeoutError):
                raise RateLimitedError from None
            raise

    def _leave(self, session_id: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(session_id, deque())
        if turn in line:
            line.remove(turn)
            if not line:
                del self._lines[session_id]

    def give_back(self) -> None:
        """End a turn."""
        while self._lines:
            session_id, line = next(iter(self._lines.items()))
            turn = line.popleft()
            if not line:
                del self._lines[session_id]
            if not turn.done():
                if line:
                    self._lines.move_to_end(session_id)
                turn.set_result(None)
                return
        self._free += 1


class PerLoop(Generic[T]):
    """Something that belongs to an event loop: made anew for each one that asks."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """Give that of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            # What belongs to loops that are closed is of no use any more.
            self._made = {each: made for each, made in self._made.items() if not each.is_closed()}
            self._made[loop] = self._make()
        return self._made[loop]


class AssistantService:
    """Answers questions about the wizard.

    Raises `SessionNotFoundError`, `InvalidRequestError` for what is no question, and a `StoreError`
    where the store cannot do its part: an answer that cannot be kept is none.
    """

    def __init__(
        self, gateway: Gateway, catalogue: Catalogue, factory: AgentFactory, limits: AskLimits
    ) -> None:
        self._gateway = gateway
        self._catalogues = CatalogueStore(gateway, catalogue)
        self._sessions = SessionStore(gateway)
        self._asked = AssistantStore(gateway)
        self._factory = factory
        self._limits = limits
        self._turns = PerLoop(lambda: Turns(limits.at_once, WAITING_PER_TURN * limits.at_once))
        self._answering: set[Answering] = set()
        self.stopping = False

    def check_place(self, session_id: str) -> None:
        """Raise `RateLimitedError` when a question would find no place in the queue."""
        self._turns.get().check(session_id)

    async def ask(self, session_id: str, question: str) -> AnswerView:
        """Ask a question, 1 to 2,000 characters, and give the answer.

        Raises `RateLimitedError` when too many are asked, `AgentFailedError`, and
        `DeadlineExceededError` when the answer takes longer than the request may. Three round
        trips.
        """
        answering = await self.begin(session_id, question)
        try:
            async with asyncio.timeout(self._left_s()):
                result = None
                while not isinstance(result, Result):
                    result = await answering.hear(self._limits.deadline_s)
        except TimeoutError:
            raise DeadlineExceededError from None
        finally:
            await answering.aclose()
        return await self.keep(answering, result)

    async def get_history(self, session_id: str) -> list[AskedQuestion]:
        """Read the last questions with their answers, 10 at most, oldest first. One round trip."""
        check_session_id(session_id)
        return await self._asked.list_asked(session_id)

    async def begin(self, session_id: str, question: str) -> "Answering":
        """Begin to answer a question, for whoever reads along.

        What is returned must be closed. Raises what `ask` raises before an agent is made.
        """
        check_session_id(session_id)
        check_question(question)
        turns = self._turns.get()
        with turns.queue(session_id):
            session = await self._sessions.get(session_id)
            catalogue = await self._catalogues.get(session.pin)
            await self._claim()
            await turns.take(session_id, min(WAIT_S, self._left_s() / 2))
        context = get_context()
        answering = Answering(
            self._factory,
            AgentContext(
                session_id=session_id,
                language=session.owner.language,
                request_id=None if context is None else context.request_id,
                catalogue=catalogue,
            ),
            question,
            self._limits.deadline_s,
            self,
        )
        self._answering.add(answering)

        def end(_: object) -> None:
            self._answering.discard(answering)
            turns.give_back()
            answering.end()

        # Not in the agent's task: one that is cancelled before it begins runs none of its code.
        answering.task.add_done_callback(end)
        return answering

    async def keep(self, answering: "Answering", result: Result) -> AnswerView:
        """Keep a question with its answer in the session's history, and describe the answer."""
        session_id = answering.context.session_id
        answer = view_answer(result, ceil(answering.took_s * 1000))
        at_ms = now_ms()
        await self._asked.add(
            session_id, view_asked(answering.question, answer, at_ms), at_ms=at_ms
        )
        log.info(
            "question_answered",
            session_id=session_id,
            duration_ms=round(answering.took_s * 1000, 2),
            confidence=answer["confidence"],
            is_answered=answer["answer"] is not None,
        )
        return answer

    @property
    def running(self) -> int:
        """How many questions are being answered."""
        return len(self._answering)

    @property
    def waiting(self) -> int:
        """How many questions of this event loop wait for their turn."""
        return self._turns.get().waiting

    def stop_soon(self) -> None:
        """Tell everybody who reads along that it is over."""
        self.stopping = True
        for answering in self._answering:
            answering.wake()

    async def aclose(self) -> None:
        """End the agents, and close the connections of this event loop."""
        for answering in list(self._answering):
            await answering.aclose()
        await self._gateway.aclose()

    async def _claim(self) -> None:
        try:
            is_free = await self._asked.claim(self._limits.per_second)
        except StoreError:
            # A limit that cannot be looked up must not be what stops people.
            return
        if not is_free:
            raise RateLimitedError

    def _left_s(self) -> float:
        context = get_context()
        if context is None:
            return self._limits.deadline_s
        return max(0.0, context.deadline_s - monotonic_s())


class Answering:
    """A question that is being answered: listen with `hear`, and close it in any case.

    `took_s` is how long the agent took, in seconds, once its result was heard.
    """

    def __init__(
        self,
        factory: AgentFactory,
        context: AgentContext,
        question: str,
        silence_s: float,
        service: AssistantService,
    ) -> None:
        """Let an agent begin. It may say nothing for `silence_s` seconds at most."""
        self.context = context
        self.question = question
        self.took_s = 0.0
        self._has_left = False
        self._factory = factory
        self._silence_s = silence_s
        self._service = service
        self._said: asyncio.Queue[Said | Exception | None] = asyncio.Queue()
        self._is_closing = False
        self._is_given_up = False
        self.task = asyncio.create_task(self._run(), name="agent")

    async def hear(self, limit_s: float) -> Said | None:
        """Wait for what the agent says next; None when it was silent for `limit_s` seconds.

        None too when the listener was woken. Raises `AgentFailedError`, and
        `DeadlineExceededError` when the agent took too long.
        """
        try:
            async with asyncio.timeout(limit_s):
                said = await self._said.get()
        except TimeoutError:
            return None
        if isinstance(said, Exception):
            raise said
        return said

    @property
    def is_over(self) -> bool:
        """Whether nobody listens any more, or the service is about to end."""
        return self._has_left or self._service.stopping

    @property
    def is_stopping(self) -> bool:
        """Whether the service is about to end."""
        return self._service.stopping

    def wake(self) -> None:
        """End a wait."""
        self._said.put_nowait(None)

    def end(self) -> None:
        """Take note that the agent's task is over: whoever listens need not wait any longer."""
        if self.task.cancelled() and not self._is_given_up:
            self._fail(AgentFailedError(), asyncio.CancelledError(), "it cancelled itself")

    def leave(self) -> None:
        """Say that nobody listens any more; the agent is ended."""
        self._has_left = True
        self._cancel()
        self.wake()

    async def aclose(self) -> None:
        """End the agent, if it has not ended, and wait until it is closed."""
        while not self.task.done():
            self._cancel()
            await asyncio.wait([self.task], timeout=CANCEL_AGAIN_S)

    def _cancel(self) -> None:
        self._is_given_up = True
        # What closes an agent is not cut short; it has a limit of its own.
        if not self._is_closing:
            self.task.cancel()

    async def _run(self) -> None:
        try:
            agent = self._factory.make(self.context)
            # As this task alone sees it.
            learn(agent=agent)
            try:
                await self._listen(agent.ask(self.question))
            finally:
                self._is_closing = True
                await self._close(agent)
        except DeadlineExceededError as late:
            self._fail(late, TimeoutError(), "it took too long")
        except Exception as failure:  # noqa: BLE001 - nobody knows what an agent may raise
            reason = str(failure) if isinstance(failure, _AgentFaultError) else None
            self._fail(AgentFailedError(), failure, reason)

    async def _listen(self, saying: AsyncIterator[Said]) -> None:
        """Pass on what an agent says, up to its result."""
        loop = asyncio.get_running_loop()
        begun_s, count, length = monotonic_s(), 0, 0
        end_s = loop.time() + LONGEST_ANSWER_S
        try:
            async with asyncio.timeout(self._silence_s) as limit:
                async for each in saying:
                    said = _checked(each, self.context.catalogue)
                    count += 1
                    length += len(said.text) if isinstance(said, Chunk) else 0
                    if count > MAX_SAID or length > MAX_ANSWER_LENGTH:
                        raise _AgentFaultError("it says too much")
                    self.took_s = monotonic_s() - begun_s
                    self._said.put_nowait(said)
                    if isinstance(said, Result):
                        return
                    limit.reschedule(min(loop.time() + self._silence_s, end_s))
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError from None
        finally:
            # A generator that was not read to its end still holds what it opened.
            aclose = getattr(saying, "aclose", None)
            if aclose is not None:
                await aclose()
        raise _AgentFaultError("it ended without a result")

    async def _close(self, agent: Agent) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await agent.aclose()
        except Exception as failure:  # noqa: BLE001 - the answer is there all the same
            log.warning(
                "agent_not_closed",
                session_id=self.context.session_id,
                exception=type(failure).__name__,
            )

    def _fail(
        self,
        told: AgentFailedError | DeadlineExceededError,
        failure: BaseException,
        reason: str | None,
    ) -> None:
        log.error(
            "agent_failed",
            session_id=self.context.session_id,
            exception=type(failure).__name__,
            **({} if reason is None else {"reason": reason}),
        )
        self._said.put_nowait(told)


class _AgentFaultError(ValueError):
    """An agent did what none may; the message quotes nothing of what it said."""


def _checked(said: object, catalogue: Catalogue) -> Said:
    try:
        return check_said(said, catalogue)
    except ValueError as unfit:
        raise _AgentFaultError(str(unfit)) from None


# --- The built-in agent ---------------------------------------------------------------------------


class _Remembered(NamedTuple):
    """What is worked out once, and shared by those who ask for it meanwhile."""

    guide: Callable[[Catalogue], Coroutine[Any, Any, Guide]]
    answer: Callable[[Catalogue, tuple[str, ...]], Coroutine[Any, Any, Result]]


class GuideFactory:
    """Makes agents that look an answer up: in the help texts, and in a file of questions."""

    def __init__(self, catalogue: Catalogue, questions: tuple[QuestionEntry, ...]) -> None:
        self._questions = questions
        self._current = catalogue.pin, Guide(catalogue, questions)
        self._remembered = PerLoop(self._remember)

    def make(self, context: AgentContext) -> "GuideAgent":
        """Make an agent for one question."""
        return GuideAgent(self, context.catalogue)

    async def answer(self, catalogue: Catalogue, question: str) -> Result:
        """Look up the answer that comes closest, None when none comes close enough."""
        return await self._remembered.get().answer(catalogue, words_of(question))

    def _remember(self) -> _Remembered:
        async def read_guide(catalogue: Catalogue) -> Guide:
            pin, guide = self._current
            if catalogue.pin == pin:
                return guide
            # 999 steps with long texts take 60 ms: too long for the event loop.
            return await asyncio.to_thread(Guide, catalogue, self._questions)

        guides = alru_cache(maxsize=CACHED_GUIDES, key=lambda catalogue: catalogue.pin)(read_guide)

        async def look_up(catalogue: Catalogue, words: tuple[str, ...]) -> Result:
            candidates = (await guides(catalogue)).find(words)
            if not candidates:
                return Result(None, 0.0)
            answer, confidence, step_id = candidates[0]
            if confidence < THRESHOLD:
                return Result(None, confidence)
            return Result(answer, confidence, step_id)

        # A look-up takes some 70 us, so that little is won by it: a question that everybody asks
        # at the same moment is looked up once.
        answers = alru_cache(
            maxsize=CACHED_ANSWERS,
            ttl=CACHED_S,
            key=lambda catalogue, words: (catalogue.pin, words),
        )(look_up)
        return _Remembered(guides, answers)


class GuideAgent:
    """Looks one answer up."""

    def __init__(self, factory: GuideFactory, catalogue: Catalogue) -> None:
        self._factory = factory
        self._catalogue = catalogue

    async def ask(self, question: str) -> AsyncIterator[Said]:
        """Say the answer, sentence by sentence and then as a whole."""
        yield Stage("searching")
        result = await self._factory.answer(self._catalogue, question)
        for sentence in split_answer(result.answer or ""):
            yield Chunk(sentence)
        yield result

    async def aclose(self) -> None:
        """Nothing is held."""


def make_assistant(gateway: Gateway, settings: Settings) -> AssistantService:
    """Make a service over a gateway, by the settings. Raises `SettingsError` for a bad agent."""
    factory = settings.load_agent_factory()
    if factory is None:
        factory = GuideFactory(settings.catalogue, settings.questions)
    limits = AskLimits(
        at_once=settings.max_concurrent_asks,
        per_second=settings.asks_per_second,
        deadline_s=settings.request_deadline_s,
    )
    return AssistantService(gateway, settings.catalogue, factory, limits)


@cache
def get_assistant() -> AssistantService:
    """Return this process's service, made from the environment; it connects when it is first used.

    It finds the store as `get_onboarding_session_manager` does, and raises the same.
    """
    settings = load_settings()
    return make_assistant(connect(settings), settings)


# What callers import from here by name, for a worker or a REPL.
_service = stand_in(AssistantService, get_assistant)
ask = _service.ask
get_history = _service.get_history
