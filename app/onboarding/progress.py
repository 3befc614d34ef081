"""How far a session is."""

from typing_extensions import TypedDict

from app.clock import rfc3339


class Progress(TypedDict):
    """How far a session is; `percentage` is of `total`, with two decimals."""

    completed: int
    total: int
    percentage: float
    highest_step: int
    next_step: int | None
    completed_steps: list[int]
    started_at: str
    last_updated: str


def describe_progress(saved: str, highest: int, created_ms: int, updated_ms: int) -> Progress:
    """Describe a session's progress.

    `saved` has one character per step of the catalogue, "1" where the step is stored: the store
    changes it together with the step, so what is counted here is what is there.
    """
    completed = saved.count("1")
    gap = saved.find("0")
    return Progress(
        completed=completed,
        total=len(saved),
        percentage=round(100 * completed / len(saved), 2),
        highest_step=highest,
        next_step=None if gap < 0 else gap + 1,
        completed_steps=[step for step, mark in enumerate(saved, start=1) if mark == "1"],
        started_at=rfc3339(created_ms),
        last_updated=rfc3339(updated_ms),
    )
