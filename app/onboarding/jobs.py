"""The work of generators: what is to be done about a session that was finalized."""

from enum import Enum, auto
from typing import NamedTuple

from app.onboarding.sessions import SessionStatus, State

UNCONFIRMED_MS = 60_000
"""How long a job may be there before its session is finalized, in milliseconds.

Where the two cannot be written at once, the job comes first.
"""


class Job(NamedTuple):
    """A session that was finalized at a revision. `job_id` begins with when, in Unix ms."""

    job_id: str
    session_id: str
    revision: int

    @property
    def added_ms(self) -> int:
        """When it was added, in Unix milliseconds."""
        return int(self.job_id.partition("-")[0])


class Course(Enum):
    """What to do about a job."""

    WORK = auto()
    """The session waits for a generator."""

    LEAVE = auto()
    """Look again later."""

    DROP = auto()
    """There is nothing to do: done already, reopened since, or gone."""


def plan_job(job: Job, state: State | None, now_ms: int) -> Course:
    """Choose what to do about a job, by the state of its session (None: there is none)."""
    if state is None or state.revision > job.revision:
        return Course.DROP
    if state.revision < job.revision:
        is_new = now_ms - job.added_ms < UNCONFIRMED_MS
        return Course.LEAVE if is_new else Course.DROP
    is_done = state.status == SessionStatus.COMPLETE and state.run_revision == job.revision
    return Course.DROP if is_done or state.finalized_ms is None else Course.WORK
