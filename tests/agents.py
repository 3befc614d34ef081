"""Agents as deployers bring them, which tests name in ONBOARDING_AGENT.

What one does goes by the question: `quick` is answered at once, `wait` when the test opens the
gate, `silent` never, and so on (see `Rehearsed.ask`). The book tells what became of them.
"""

import asyncio
from collections.abc import AsyncIterator

from app.context import get_context
from app.onboarding.assistant import AgentContext, Chunk, Result, Said, Stage

NO_FUNCTION = 1

AGENT = "tests.agents:make_factory"


class Book:
    """What the agents of one test did."""

    def __init__(self) -> None:
        self.contexts: list[AgentContext] = []
        self.running = 0
        self.most_running = 0
        self.begun = 0
        self.closed = 0
        self.closed_at: list[float] = []
        self.gate = asyncio.Event()

    async def wait_for(self, *, running: int | None = None, closed: int | None = None) -> None:
        """Wait until so many run, or so many were closed."""
        async with asyncio.timeout(30):
            while running not in (None, self.running) or closed not in (None, self.closed):
                await asyncio.sleep(0.001)


book = Book()


def new_book() -> Book:
    """Begin a new book, for a test."""
    global book  # noqa: PLW0603 - the service makes the factory, and hands it to nobody
    book = Book()
    return book


class Rehearsed:
    """Does what the question says."""

    def __init__(self, kept: Book, session_id: str) -> None:
        self._book = kept
        self._session_id = session_id

    async def ask(self, question: str) -> AsyncIterator[Said]:
        self._book.begun += 1
        self._book.running += 1
        self._book.most_running = max(self._book.most_running, self._book.running)
        try:
            async for said in self._say(question):
                yield said
        finally:
            self._book.running -= 1

    async def aclose(self) -> None:
        self._book.closed += 1
        self._book.closed_at.append(asyncio.get_running_loop().time())

    async def _say(self, question: str) -> AsyncIterator[Said]:
        yield Stage("thinking")
        match question:
            case "wait":
                await self._book.gate.wait()
            case "talk, then wait":
                yield Chunk("begun ")
                await self._book.gate.wait()
            case "silent":
                await asyncio.Event().wait()
            case "fail":
                raise RuntimeError("a secret of the agent")
            case "cancel yourself":
                raise asyncio.CancelledError
            case "no result":
                return
            case "who asks":
                for _ in range(5):
                    await asyncio.sleep(0)
                context = get_context()
                assert context is not None
                is_own = context.agent is self and context.session_id == self._session_id
                yield Result(f"{context.principal} {context.request_id} {is_own}", 0.9)
                return
            case "unknown":
                yield Result(None, 0.1)
                return
            case "no confidence":
                yield Result("an answer", float("nan"))
            case "another step":
                yield Result("an answer", 0.5, 24)
            case "talk without end":
                while True:
                    yield Chunk("x" * 1000)
        yield Chunk("an ")
        yield Chunk("answer")
        yield Result("an answer", 0.9, 4)
        raise AssertionError("nobody asks on after a result")


class RehearsedFactory:
    """Makes agents that write into the book of the test that runs."""

    def make(self, context: AgentContext) -> Rehearsed:
        if context.session_id == "refused":
            raise RuntimeError("a secret of the factory")
        book.contexts.append(context)
        return Rehearsed(book, context.session_id)


MADE: list[RehearsedFactory] = []
"""The factories that were made in this process."""


def make_factory() -> RehearsedFactory:
    MADE.append(RehearsedFactory())
    return MADE[-1]


def make_nothing() -> None:
    """Give no factory."""


def fail() -> None:
    raise RuntimeError("a secret of the module")
