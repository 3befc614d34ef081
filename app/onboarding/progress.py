"""How far a session is."""

from functools import lru_cache
from typing import NamedTuple

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
    counted = count_saved(saved)
    return {
        "completed": len(counted.steps),
        "total": len(saved),
        "percentage": counted.percentage,
        "highest_step": highest,
        "next_step": counted.next_step,
        "completed_steps": [*counted.steps],
        "started_at": rfc3339(created_ms),
        "last_updated": rfc3339(updated_ms),
    }


class Counted(NamedTuple):
    """What the marks of the saved steps come to; `steps` are the numbers of those."""

    steps: tuple[int, ...]
    percentage: float
    next_step: int | None


@lru_cache(maxsize=4096)
def count_saved(saved: str) -> Counted:
    """Count the marks. Most sessions have the same few, and to count 23 anew takes 3 us."""
    steps = tuple(step for step, mark in enumerate(saved, start=1) if mark == "1")
    gap = saved.find("0")
    return Counted(steps, round(100 * len(steps) / len(saved), 2), None if gap < 0 else gap + 1)
