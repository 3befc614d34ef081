"""The generation: what a generator makes of a finalized session, and how far it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from app.clock import rfc3339
from app.errors import Fault, InvalidRequestError
from app.onboarding.sessions import SessionStatus, is_own_string

MAY_FOLLOW: Mapping[SessionStatus, frozenset[SessionStatus]] = {
    SessionStatus.PROCESSING: frozenset(
        {SessionStatus.PENDING, SessionStatus.ERROR, SessionStatus.COMPLETE}
    ),
    SessionStatus.COMPLETE: frozenset({SessionStatus.PROCESSING}),
    SessionStatus.ERROR: frozenset({SessionStatus.PENDING, SessionStatus.PROCESSING}),
}
"""Each status that can be set, with those that it may follow. Only reopening leads to `pending`."""

STAGES: Mapping[str, int] = {
    "knowledge_search": 10,
    "context_building": 20,
    "answer_generation": 40,
    "visual_detection": 70,
    "citation_generation": 90,
    "complete": 100,
}
"""The known stages of a generator, with the progress in percent that each one stands for."""

MAX_STAGE_LENGTH = 128
"""Longest name of a stage or a run, and longest `event_id`, in characters."""

MAX_MESSAGE_LENGTH = 2000
"""Longest message of an event and of an error, in characters."""


class StatusView(TypedDict):
    """How far the generation is; `progress` in percent, `eta_seconds` null when unknown."""

    session_id: str
    status: str
    progress: int
    stage: str | None
    message: str | None
    error_message: str | None
    eta_seconds: int | None
    updated_at: str


class ShortStatusView(TypedDict):
    """The same, as the question-answer system says it."""

    status: str
    progress: int
    stage: str | None
    message: str | None


class LanguageView(TypedDict):
    """The language that a session is answered in, a tag as in BCP 47."""

    session_id: str
    language: str


class ProgressEventView(TypedDict):
    """A report of progress, as it was taken."""

    id: str
    type: str
    stage: str
    progress: int
    message: str | None
    at: str
    event_id: NotRequired[str]


class LatestProgress(TypedDict):
    """The last report of progress; `stage` is None while there is none."""

    progress: int
    stage: str | None
    status: str


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """A report of progress: `progress` in percent, 0 to 100.

    An event with an `event_id` is taken once, however often it is sent. One that names its `run` is
    refused when another run has begun since.
    """

    session_id: str
    stage: str
    progress: int
    message: str | None = None
    event_id: str | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What is stored of a generation; times in Unix milliseconds.

    The pace is measured since `run_ms`, when the progress was `run_percent`: the beginning of the
    run, or the report that began it anew. `run_ms` is None before.
    """

    status: SessionStatus
    percent: int
    stage: str | None
    message: str | None
    error_message: str | None
    updated_ms: int
    run_ms: int | None
    run_percent: int


def view_status(session_id: str, generation: Generation, now_ms: int) -> StatusView:
    """Describe how far a generation is to a client."""
    return StatusView(
        session_id=session_id,
        status=generation.status,
        progress=generation.percent,
        stage=generation.stage,
        message=generation.message,
        error_message=generation.error_message,
        eta_seconds=estimate_eta_s(generation, now_ms),
        updated_at=rfc3339(generation.updated_ms),
    )


def estimate_eta_s(generation: Generation, now_ms: int) -> int | None:
    """Estimate how many seconds are left, from the pace since the run began; None when unknown.

    What has passed since the last report is taken off, down to 0.
    """
    if generation.status is SessionStatus.COMPLETE:
        return 0
    if generation.status is SessionStatus.ERROR or generation.run_ms is None:
        return None
    gained = generation.percent - generation.run_percent
    took_ms = generation.updated_ms - generation.run_ms
    if gained <= 0 or took_ms <= 0:
        return None
    left_ms = took_ms * (100 - generation.percent) / gained
    return max(0, math.ceil((left_ms - max(0, now_ms - generation.updated_ms)) / 1000))


def add_up(progress: Sequence[int]) -> int:
    """Give the progress of a run in percent, from that of each of its questions.

    Rounded down, so that the run is at 100 when all of them are, and not before.
    """
    return sum(progress) // len(progress)


def progress_of_stage(stage: str) -> int:
    """Give the progress that a known stage stands for. Raises `InvalidRequestError`."""
    if stage not in STAGES:
        known = ", ".join(STAGES)
        raise InvalidRequestError(f"Say how far the stage is; only these are known: {known}")
    return STAGES[stage]


def whole_percent(progress: float) -> int:
    """Round a progress in percent down. Raises `InvalidRequestError` for what is no number."""
    if isinstance(progress, bool) or not math.isfinite(progress):
        raise InvalidRequestError("progress is a number from 0 to 100")
    return int(progress)


def clean_message(text: str) -> str:
    """Make a message out of any text: one line, no longer than a message may be."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line[:MAX_MESSAGE_LENGTH]


def check_progress_event(event: ProgressEvent) -> None:
    """Raise `InvalidRequestError`, naming every field at fault."""
    faults = []
    # A bool is an int to Python, and none to whoever reads the events.
    if type(event.progress) is not int or not 0 <= event.progress <= 100:
        detail = "An integer from 0 to 100"
        faults.append(Fault(pointer="/progress", code="integer_range", detail=detail))
    faults += _name_faults(stage=event.stage, event_id=event.event_id, run=event.run)
    faults += _message_faults("message", event.message)
    _refuse(faults)


def check_status_change(
    status: SessionStatus, error_message: str | None, run: str | None = None
) -> None:
    """Raise `InvalidRequestError` for what can never be set, whatever the session's status is."""
    faults = _name_faults(run=run)
    if status not in MAY_FOLLOW:
        detail = "processing, complete or error; a session is pending again when it is reopened"
        faults.append(Fault(pointer="/status", code="enum", detail=detail))
    elif error_message and status is not SessionStatus.ERROR:
        detail = "Only the status error has a message"
        faults.append(Fault(pointer="/error_message", code="unexpected", detail=detail))
    faults += _message_faults("error_message", error_message)
    _refuse(faults)


def check_run(run: str | None) -> None:
    """Raise `InvalidRequestError` unless this can name a run, or is None."""
    _refuse(_name_faults(run=run))


def _name_faults(**names: str | None) -> list[Fault]:
    detail = f"1 to {MAX_STAGE_LENGTH} characters, none of them a control character"
    return [
        Fault(pointer=f"/{field}", code="string", detail=detail)
        for field, name in names.items()
        if name is not None and not is_own_string(name, MAX_STAGE_LENGTH)
    ]


def _message_faults(name: str, message: str | None) -> list[Fault]:
    if not message or is_own_string(message, MAX_MESSAGE_LENGTH):
        return []
    detail = f"At most {MAX_MESSAGE_LENGTH} characters, none of them a control character"
    return [Fault(pointer=f"/{name}", code="string", detail=detail)]


def _refuse(faults: list[Fault]) -> None:
    if faults:
        names = ", ".join(fault["pointer"][1:] for fault in faults)
        raise InvalidRequestError(f"Not acceptable: {names}", faults)
