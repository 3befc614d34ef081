import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.onboarding.progress import describe_progress

_MARKS = st.text("01", min_size=1, max_size=40)
_TIMES = st.integers(0, 4 * 10**12)


@given(_MARKS, st.integers(0, 40), _TIMES, _TIMES)
@example("1" * 23, 23, 0, 0)
@example("0" * 23, 0, 0, 0)
@example("0" + "1" * 998, 999, 0, 0)
def test_progress_counts_what_is_there(
    saved: str, highest: int, created_ms: int, updated_ms: int
) -> None:
    progress = describe_progress(saved, highest, created_ms, updated_ms)
    there = [number for number in range(1, len(saved) + 1) if saved[number - 1] == "1"]
    absent = [number for number in range(1, len(saved) + 1) if number not in there]
    assert progress["completed"] == len(there)
    assert progress["total"] == len(saved)
    assert progress["completed_steps"] == there
    assert progress["next_step"] == (min(absent) if absent else None)
    assert progress["highest_step"] == highest


@given(_MARKS)
def test_the_percentage_is_of_the_total_with_two_decimals(saved: str) -> None:
    percentage = describe_progress(saved, 0, 0, 0)["percentage"]
    exact = Fraction(100 * saved.count("1"), len(saved))
    assert abs(Fraction(percentage) - exact) <= Fraction(5001, 1_000_000)
    assert re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,2}", repr(percentage))
    assert (percentage == 0) == ("1" not in saved)
    assert (percentage == 100) == ("0" not in saved)


@pytest.mark.parametrize(
    ("completed", "percentage"),
    [(0, 0.0), (1, 4.35), (2, 8.7), (7, 30.43), (12, 52.17), (22, 95.65), (23, 100.0)],
)
def test_the_percentage_of_the_packaged_catalogue(completed: int, percentage: float) -> None:
    saved = "1" * completed + "0" * (23 - completed)
    assert describe_progress(saved, completed, 0, 0)["percentage"] == percentage


@given(_TIMES, _TIMES)
def test_progress_tells_when_it_began_and_when_it_last_changed(created: int, updated: int) -> None:
    progress = describe_progress("0", 0, created, updated)
    form = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
    assert form.fullmatch(progress["started_at"])
    assert form.fullmatch(progress["last_updated"])
    assert (progress["started_at"] <= progress["last_updated"]) == (created <= updated)
