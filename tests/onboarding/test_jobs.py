"""What is to be done about a finalized session, as a table."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.onboarding.jobs import UNCONFIRMED_MS, Course, Job, plan_job
from app.onboarding.sessions import SessionStatus, State

ADDED_MS = 1_769_847_300_250
JOB = Job(f"{ADDED_MS}-0", "s1", revision=2)
FINALIZED = State(
    status="pending",
    saved="1" * 23,
    highest=23,
    created_ms=ADDED_MS - 60_000,
    updated_ms=ADDED_MS,
    deadline_ms=ADDED_MS + 604_800_000,
    finalized_ms=ADDED_MS,
    revision=2,
    run_revision=2,
)
REOPENED = replace(FINALIZED, finalized_ms=None)
NOT_YET = replace(FINALIZED, finalized_ms=None, revision=1)
FIRST_REVISION = replace(FINALIZED, revision=1)
LATER_REVISION = replace(FINALIZED, revision=3)
LATER_REOPENED = replace(FINALIZED, finalized_ms=None, revision=3)


def states() -> st.SearchStrategy[State]:
    return st.builds(
        replace,
        st.just(FINALIZED),
        status=st.sampled_from(SessionStatus),
        finalized_ms=st.none() | st.just(ADDED_MS),
        revision=st.integers(0, 4),
    )


def in_status(state: State, status: str) -> State:
    return replace(state, status=status)


AT_ONCE, JUST_BEFORE, IN_TIME, LATER = 0, UNCONFIRMED_MS - 1, UNCONFIRMED_MS, 7 * 86_400_000

TABLE = [
    # Nobody has done it, or somebody who did not come to an end.
    ("pending", FINALIZED, AT_ONCE, Course.WORK),
    ("pending-for-days", FINALIZED, LATER, Course.WORK),
    ("left-by-a-dead-one", in_status(FINALIZED, "processing"), LATER, Course.WORK),
    ("failed-before", in_status(FINALIZED, "error"), AT_ONCE, Course.WORK),
    # There is nothing to do.
    ("done", in_status(FINALIZED, "complete"), AT_ONCE, Course.DROP),
    ("gone", None, AT_ONCE, Course.DROP),
    ("reopened", REOPENED, AT_ONCE, Course.DROP),
    ("finalized-again", LATER_REVISION, AT_ONCE, Course.DROP),
    ("done-again", in_status(LATER_REVISION, "complete"), LATER, Course.DROP),
    ("finalized-again-and-reopened", LATER_REOPENED, AT_ONCE, Course.DROP),
    # The job is there before its session is finalized, for a minute.
    ("not-finalized-yet", NOT_YET, AT_ONCE, Course.LEAVE),
    ("not-finalized-for-almost-a-minute", NOT_YET, JUST_BEFORE, Course.LEAVE),
    ("not-finalized-for-a-minute", NOT_YET, IN_TIME, Course.DROP),
    ("never-finalized", NOT_YET, LATER, Course.DROP),
    ("not-finalized-yet-and-done-before", in_status(NOT_YET, "complete"), AT_ONCE, Course.LEAVE),
    ("not-reopened-yet", FIRST_REVISION, AT_ONCE, Course.LEAVE),
    ("by-a-clock-that-is-behind", NOT_YET, -5_000, Course.LEAVE),
]


@pytest.mark.parametrize(
    ("state", "age_ms", "course"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_what_is_done_about_a_job_follows_from_its_session(
    state: State | None, age_ms: int, course: Course
) -> None:
    assert plan_job(JOB, state, ADDED_MS + age_ms) is course


@given(st.none() | states(), st.integers(UNCONFIRMED_MS, 10 * UNCONFIRMED_MS))
def test_no_job_is_left_for_longer_than_a_minute(state: State | None, age_ms: int) -> None:
    assert plan_job(JOB, state, ADDED_MS + age_ms) is not Course.LEAVE


@given(st.none() | states(), st.integers(0, 10 * UNCONFIRMED_MS))
def test_only_a_finalized_session_at_the_revision_of_the_job_is_worked_on(
    state: State | None, age_ms: int
) -> None:
    if plan_job(JOB, state, ADDED_MS + age_ms) is Course.WORK:
        assert state is not None
        assert state.finalized_ms is not None
        assert state.revision == JOB.revision


@given(st.integers(0, 2**53), st.integers(0, 2**53))
def test_a_job_knows_by_its_id_when_it_was_added(added_ms: int, sequence: int) -> None:
    assert Job(f"{added_ms}-{sequence}", "s1", 1).added_ms == added_ms
