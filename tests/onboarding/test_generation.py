import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequestError
from app.onboarding.generation import (
    MAY_FOLLOW,
    STAGES,
    Generation,
    ProgressEvent,
    add_up,
    check_progress_event,
    check_status_change,
    clean_message,
    estimate_eta_s,
    progress_of_stage,
    view_status,
)
from app.onboarding.sessions import SessionStatus

PENDING, PROCESSING = SessionStatus.PENDING, SessionStatus.PROCESSING
COMPLETE, ERROR = SessionStatus.COMPLETE, SessionStatus.ERROR

BEGAN_MS = 1_767_268_800_000


def at(
    percent: int, after_s: float, status: SessionStatus = PROCESSING, *, begun_at: int = 0
) -> Generation:
    """Give a run that was at `percent` when it was heard of last, `after_s` after it began."""
    return Generation(
        status=status,
        percent=percent,
        stage=None,
        message=None,
        error_message=None,
        updated_ms=BEGAN_MS + round(after_s * 1000),
        run_ms=BEGAN_MS,
        run_percent=begun_at,
    )


def eta_s(generation: Generation, later_s: float = 0.0) -> int | None:
    """Estimate so long after the last report."""
    return estimate_eta_s(generation, generation.updated_ms + round(later_s * 1000))


# --- What may follow ------------------------------------------------------------------------------


def test_a_status_may_follow_as_the_contract_says() -> None:
    allowed = {(before, after) for after, befores in MAY_FOLLOW.items() for before in befores}

    assert allowed == {
        (PENDING, PROCESSING),
        (PENDING, ERROR),
        (PROCESSING, COMPLETE),
        (PROCESSING, ERROR),
        (ERROR, PROCESSING),
        (COMPLETE, PROCESSING),
    }


def test_nothing_but_reopening_makes_a_session_pending() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_status_change(PENDING, None)
    assert [fault["pointer"] for fault in refused.value.faults] == ["/status"]


@pytest.mark.parametrize("status", [PROCESSING, COMPLETE])
def test_only_an_error_has_a_message(status: SessionStatus) -> None:
    check_status_change(ERROR, "It failed")
    check_status_change(status, None)
    with pytest.raises(InvalidRequestError) as refused:
        check_status_change(status, "It failed")
    assert [fault["pointer"] for fault in refused.value.faults] == ["/error_message"]


# --- How long it will take ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "after_s", "left_s"),
    [(10, 6, 54), (25, 10, 30), (50, 60, 60), (90, 90, 10), (99, 99, 1), (100, 60, 0), (1, 1, 99)],
)
def test_an_even_pace_is_gone_on_with(percent: int, after_s: float, left_s: int) -> None:
    assert eta_s(at(percent, after_s)) == left_s


def test_what_has_passed_since_the_last_report_is_taken_off() -> None:
    half = at(50, 60)
    assert [eta_s(half, later_s) for later_s in (0, 20, 59, 60, 61, 10_000)] == [60, 40, 1, 0, 0, 0]


def test_a_part_of_a_second_counts_as_a_whole_one() -> None:
    assert eta_s(at(50, 0.2)) == 1
    assert eta_s(at(50, 60), 0.5) == 60


def test_a_pace_is_that_of_the_run_and_not_of_what_was_there_before_it() -> None:
    assert eta_s(at(60, 10, begun_at=20)) == 10


@pytest.mark.parametrize(
    "unknown",
    [
        at(0, 0),
        at(0, 60),
        at(40, 60, begun_at=40),
        at(50, 0),
        at(50, -5),
        at(50, 60, ERROR),
        dataclasses.replace(at(50, 60), run_ms=None),
        dataclasses.replace(at(0, 0, PENDING), run_ms=None),
    ],
    ids=[
        *("just begun", "nothing done yet", "no further than at the beginning", "no time passed"),
        *("the clock went back", "failed", "begun nobody knows when", "not begun"),
    ],
)
def test_without_a_pace_nobody_knows_how_long_it_takes(unknown: Generation) -> None:
    assert eta_s(unknown) is None


def test_a_run_that_is_complete_takes_no_longer() -> None:
    assert eta_s(at(100, 60, COMPLETE)) == 0


def test_reports_of_a_run_that_nobody_set_to_processing_have_a_pace_too() -> None:
    assert eta_s(at(50, 30, PENDING, begun_at=10)) == 38


@given(
    status=st.sampled_from(SessionStatus),
    percent=st.integers(0, 100),
    begun_at=st.integers(0, 100),
    took_ms=st.integers(-(10**9), 10**12),
    since_ms=st.integers(-(10**9), 10**12),
    begun=st.booleans(),
)
def test_an_estimate_is_unknown_or_a_number_that_is_not_negative(
    status: SessionStatus, percent: int, begun_at: int, took_ms: int, since_ms: int, begun: bool
) -> None:
    generation = at(percent, took_ms / 1000, status, begun_at=begun_at)
    if not begun:
        generation = dataclasses.replace(generation, run_ms=None)

    left_s = estimate_eta_s(generation, generation.updated_ms + since_ms)

    assert left_s is None or (type(left_s) is int and left_s >= 0)


@given(percents=st.lists(st.integers(1, 100), min_size=1), s_per_percent=st.integers(1, 1000))
def test_an_even_pace_promises_the_same_end_at_every_report(
    percents: Sequence[int], s_per_percent: int
) -> None:
    for percent in percents:
        after_s = percent * s_per_percent
        left_s = eta_s(at(percent, after_s))
        assert left_s is not None
        assert after_s + left_s == 100 * s_per_percent


def test_a_status_has_its_members_in_the_words_of_clients() -> None:
    generation = dataclasses.replace(
        at(50, 60), stage="answer_generation", message="Half", error_message=None
    )

    assert view_status("s1", generation, generation.updated_ms) == {
        "session_id": "s1",
        "status": "processing",
        "progress": 50,
        "stage": "answer_generation",
        "message": "Half",
        "error_message": None,
        "eta_seconds": 60,
        "updated_at": "2026-01-01T12:01:00.000Z",
    }


# --- Progress -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), min_size=1, max_size=50))
def test_a_run_is_at_100_when_all_its_questions_are_and_not_before(progress: list[int]) -> None:
    together = add_up(progress)

    assert min(progress) <= together <= max(progress)
    assert (together == 100) == all(each == 100 for each in progress)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=50), st.data())
def test_a_question_that_gets_on_never_takes_the_run_back(
    progress: list[int], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(progress) - 1))
    further = [*progress]
    further[number] = data.draw(st.integers(progress[number], 100))

    assert add_up(further) >= add_up(progress)


def test_the_known_stages_say_how_far_they_are() -> None:
    known = {
        "knowledge_search": 10,
        "context_building": 20,
        "answer_generation": 40,
        "visual_detection": 70,
        "citation_generation": 90,
        "complete": 100,
    }
    assert known == STAGES
    assert {stage: progress_of_stage(stage) for stage in known} == known


@pytest.mark.parametrize("stage", ["", "Complete", "complete ", "brewing"])
def test_an_unknown_stage_has_to_say_how_far_it_is(stage: str) -> None:
    with pytest.raises(InvalidRequestError, match="answer_generation"):
        progress_of_stage(stage)


# --- Reports --------------------------------------------------------------------------------------

GOOD: list[dict[str, Any]] = [
    {"progress": 0},
    {"progress": 100},
    {"stage": "s"},
    {"stage": "é" * 128},
    {"stage": " a stage, with: anything "},
    {"message": None},
    {"message": ""},
    {"message": "m" * 2000},
    {"event_id": None},
    {"event_id": "e" * 128},
    {"event_id": "turn"},
    {"event_id": "key:onboarding:x"},
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"progress": -1}, "/progress"),
    ({"progress": 101}, "/progress"),
    ({"progress": True}, "/progress"),
    ({"progress": 50.0}, "/progress"),
    ({"progress": "50"}, "/progress"),
    ({"progress": None}, "/progress"),
    ({"stage": ""}, "/stage"),
    ({"stage": "s" * 129}, "/stage"),
    ({"stage": "a\nb"}, "/stage"),
    ({"stage": "\ud800"}, "/stage"),
    ({"message": "m" * 2001}, "/message"),
    ({"message": "a\x00b"}, "/message"),
    ({"message": "\x7f"}, "/message"),
    ({"message": "\x85"}, "/message"),
    ({"event_id": ""}, "/event_id"),
    ({"event_id": "e" * 129}, "/event_id"),
    ({"event_id": "\t"}, "/event_id"),
]


def report(**members: Any) -> ProgressEvent:
    return ProgressEvent(**{"session_id": "s1", "stage": "s", "progress": 1, **members})


@pytest.mark.parametrize("members", GOOD, ids=repr)
def test_a_report_within_its_limits_is_taken(members: dict[str, Any]) -> None:
    check_progress_event(report(**members))


@pytest.mark.parametrize(("members", "pointer"), BAD, ids=repr)
def test_a_report_past_its_limits_is_refused_by_the_member(
    members: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_progress_event(report(**members))
    assert [fault["pointer"] for fault in refused.value.faults] == [pointer]


def test_every_fault_of_a_report_is_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_progress_event(report(stage="", progress=101, message="\n", event_id=""))
    named = {fault["pointer"] for fault in refused.value.faults}
    assert named == {"/stage", "/progress", "/message", "/event_id"}


# --- Messages -------------------------------------------------------------------------------------


@given(st.text(st.characters(), max_size=50) | st.text(" \n\r\t\x00a\x85\u2028", max_size=20))
def test_any_text_becomes_a_message_that_is_taken(text: str) -> None:
    message = clean_message(text)

    check_progress_event(report(message=message))
    check_status_change(ERROR, message)
    assert "\n" not in message
    assert message == message.strip()


def test_a_message_keeps_its_words_and_loses_its_lines() -> None:
    assert clean_message("It failed:\r\n\tno such  file\n") == "It failed: no such file"
    assert clean_message(" \n\t") == ""
    assert clean_message("é 中 \U0001f600") == "é 中 \U0001f600"
    assert len(clean_message("m" * 100_000)) == 2000
