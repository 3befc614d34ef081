"""Questions while onboarding: what may be asked, who answers, what an answer looks like.

A deployer may bring an agent of their own: see `AgentFactory` and `Agent`.
"""

import math
import re
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Literal, NotRequired, Protocol, TypeAlias

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import Fault, InvalidRequestError
from app.onboarding.catalogue import Catalogue

MAX_QUESTION_LENGTH = 2000
"""Longest question, in characters."""

QUESTION_PATTERN = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
"""What a question looks like: no control character but newline and tab."""

MAX_ANSWER_LENGTH = 20_000
"""Longest answer of an agent, its chunks together, in characters: ten of them are kept."""

MAX_STAGE_LENGTH = 128
"""Longest name of a stage, in characters."""

MAX_SAID = 20_000
"""How often an agent may say something in one answer: what it says waits for a slow reader."""

MAX_HISTORY = 10
"""How many questions with their answers are kept of a session."""


@dataclass(frozen=True, slots=True)
class AgentContext:
    """What an agent is told of the session that asks.

    `language` is a tag as in BCP 47, `catalogue` the one that the session began with, `request_id`
    the name of the request in the log, None outside of one.
    """

    session_id: str
    language: str
    request_id: str | None
    catalogue: Catalogue


@dataclass(frozen=True, slots=True)
class Stage:
    """What an agent is doing now, 1 to 128 characters: `searching`, `writing`."""

    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the answer, for who reads along; the parts in their order make up the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Result:
    """The answer, None when the agent knows none, with the confidence (0 to 1) that was found.

    `step_id` is the step that the answer is about, if it is about one.
    """

    answer: str | None
    confidence: float
    step_id: int | None = None


Said: TypeAlias = Stage | Chunk | Result
"""What an agent says: any number of stages and chunks, and at the end one result."""


class Agent(Protocol):
    """Answers one question, and lives no longer than the request that asks it.

    It runs in the event loop of the service and must not block it. It is closed whatever happens:
    after the result, after an error, and when it is cancelled because the client has left, the time
    is over or the service stops. What it raises is logged by its type, and the caller is told only
    that there is no answer.
    """

    def ask(self, question: str) -> AsyncIterator[Said]:
        """Answer a question.

        Written as an async generator: `async def ask(self, question): yield Stage("searching")`.
        """

    def aclose(self) -> Awaitable[None]:
        """Give back what the agent holds, within 5 seconds."""


class AgentFactory(Protocol):
    """Makes agents. It is made once in a process and loads what they share, which never changes."""

    def make(self, context: AgentContext) -> Agent:
        """Make an agent for one question."""


class AnswerView(TypedDict):
    """An answer; null when nothing came close enough, with the confidence that was found."""

    answer: str | None
    confidence: float
    processing_stage: Literal["completed"]
    processing_time_ms: int
    step_id: NotRequired[int]


class AskedQuestion(TypedDict):
    """A question of the history, with its answer."""

    question: str
    answer: str | None
    confidence: float
    processing_time_ms: int
    at: str


class HistoryView(TypedDict):
    """The last questions of a session, 10 at most, oldest first."""

    history: list[AskedQuestion]


def check_question(question: object) -> None:
    """Raise `InvalidRequestError` unless this can be asked."""
    if not isinstance(question, str) or not 1 <= len(question) <= MAX_QUESTION_LENGTH:
        detail = f"1 to {MAX_QUESTION_LENGTH} characters"
    elif not _QUESTION.fullmatch(question):
        detail = "No control characters but newline and tab"
    elif not _is_unicode(question):
        detail = "Unicode text, without halves of surrogate pairs"
    else:
        return
    fault = Fault(pointer="/question", code="string", detail=detail)
    raise InvalidRequestError("Not acceptable: question", [fault])


def check_said(said: object, catalogue: Catalogue) -> Said:
    """Give what an agent said, if it may. Raises `ValueError` with a reason that quotes nothing."""
    match said:
        case Stage(name=str(name)):
            if not _is_text(name, MAX_STAGE_LENGTH):
                raise ValueError(f"a stage has a name of 1 to {MAX_STAGE_LENGTH} characters")
            return said
        case Chunk(text=str(text)):
            if text and not _is_text(text, MAX_ANSWER_LENGTH):
                raise ValueError(f"a chunk has at most {MAX_ANSWER_LENGTH} characters")
            return said
        case Result(answer=answer, confidence=confidence, step_id=step_id):
            if answer is not None and not _is_text(answer, MAX_ANSWER_LENGTH):
                raise ValueError(f"an answer has 1 to {MAX_ANSWER_LENGTH} characters")
            if not _is_confidence(confidence):
                raise ValueError("a confidence is a number from 0 to 1")
            if step_id is not None and (type(step_id) is not int or step_id not in catalogue):
                raise ValueError("a step_id is the number of a step of the session's catalogue")
            return said
        case _:
            raise ValueError("an agent says a Stage, a Chunk or a Result")


def view_answer(result: Result, took_ms: int) -> AnswerView:
    """Describe an answer to a client; `took_ms` is how long its agent took, in milliseconds."""
    view = AnswerView(
        answer=result.answer,
        confidence=round(float(result.confidence), 4),
        processing_stage="completed",
        processing_time_ms=took_ms,
    )
    if result.answer is not None and result.step_id is not None:
        view["step_id"] = result.step_id
    return view


def view_asked(question: str, answer: AnswerView, at_ms: int) -> AskedQuestion:
    """Describe a question with its answer as the history keeps it."""
    return AskedQuestion(
        question=question,
        answer=answer["answer"],
        confidence=answer["confidence"],
        processing_time_ms=answer["processing_time_ms"],
        at=rfc3339(at_ms),
    )


def parse_asked(value: object) -> AskedQuestion:
    """Read a question of the history. Raises `ValueError` for what is none."""
    match value:
        case {
            "question": str(question),
            "answer": str() | None as answer,
            "confidence": float() | int() as confidence,
            "processing_time_ms": int(took_ms),
            "at": str(at),
        } if _is_confidence(confidence):
            return AskedQuestion(
                question=question,
                answer=answer,
                confidence=confidence,
                processing_time_ms=took_ms,
                at=at,
            )
        case _:
            raise ValueError("no question with its answer")


def split_answer(answer: str) -> list[str]:
    """Take an answer apart by its sentences; put together they are the answer."""
    return _SENTENCE.findall(answer)


def _is_confidence(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= 1


def _is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= longest and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


_QUESTION = re.compile(QUESTION_PATTERN.removesuffix("$"))
_SENTENCE = re.compile(r"(?s).+?(?:[.!?]\s+|\Z)")
