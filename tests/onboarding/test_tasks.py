"""The rules of tasks, as tables: which are kept, what a status may follow, what a name may be."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequestError, InvalidTransitionError
from app.onboarding.cursors import parse_cursor, write_cursor
from app.onboarding.tasks import (
    ID_PATTERN,
    TASK_LIFE_MS,
    TASK_RULES,
    Task,
    TaskRule,
    TaskStatus,
    check_new_task,
    check_short_id,
    check_task_change,
    check_task_filter,
    check_task_id,
    is_kept_until_released,
    is_tracked,
    parse_task_rules,
    parse_task_status,
    stays,
    view_task,
)

ACTIVE, COMPLETED = TaskStatus.ACTIVE, TaskStatus.COMPLETED
FAILED, CANCELLED = TaskStatus.FAILED, TaskStatus.CANCELLED

ENDS = [COMPLETED, FAILED, CANCELLED]

AT_MS = 1_769_847_300_250
TASK = Task(
    task_id="t1",
    short_id="s1",
    task_type="image_analysis",
    user_id="u1",
    session_id=None,
    status=ACTIVE,
    created_ms=AT_MS,
    updated_ms=AT_MS + 1_000,
    operation="0a",
)

GOOD_IDS = ["a", "A.b_c-9", ".", "..", "-", "x" * 128, "tasks", "Task"]
BAD_IDS = ["", " ", "a b", "a\n", "a:b", "a/b", "{a}", "*", "ä", "a\x00", "\u0661", "x" * 129]


def check_new(**fields: Any) -> None:
    wanted = {"short_id": None, "user_id": None, "task_id": None, "session_id": None, **fields}
    check_new_task(TASK_RULES, wanted.pop("task_type", "image_analysis"), **wanted)


def pointers_of_refusal(**fields: Any) -> list[str]:
    with pytest.raises(InvalidRequestError) as refused:
        check_new(**fields)
    return [fault["pointer"] for fault in refused.value.faults]


# --- What is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_type", "tracked", "kept"),
    [
        ("image_analysis", True, False),
        ("scenario_generation", True, True),
        ("video_generation", True, False),
        ("finalize_short", True, False),
        ("save_scenario", True, False),
        ("content_analysis", True, False),
        ("data_extraction", True, False),
        ("bcm_generation", True, False),
        ("scraping", False, False),
    ],
)
def test_the_rule_of(task_type: str, tracked: bool, kept: bool) -> None:
    assert is_tracked(TASK_RULES, task_type, "s1") == tracked
    assert is_kept_until_released(TASK_RULES, task_type) == kept
    for status in TaskStatus:
        assert stays(TASK_RULES, task_type, status) == (kept or status == "active")


def test_these_are_all_types() -> None:
    assert len(TASK_RULES) == 9


@pytest.mark.parametrize("task_type", TASK_RULES)
def test_a_task_without_a_short_is_not_tracked(task_type: str) -> None:
    assert not is_tracked(TASK_RULES, task_type, None)


def test_a_type_that_is_not_known_any_more_is_an_ordinary_one() -> None:
    assert not is_kept_until_released(TASK_RULES, "of_yesterday")
    assert stays(TASK_RULES, "of_yesterday", ACTIVE)
    assert not stays(TASK_RULES, "of_yesterday", COMPLETED)


def test_a_task_is_kept_for_seven_days() -> None:
    assert TASK_LIFE_MS == 604_800_000


# --- Statuses -------------------------------------------------------------------------------------


def test_the_words_of_a_status() -> None:
    assert [*TaskStatus] == ["active", "completed", "failed", "cancelled"]


@pytest.mark.parametrize("before", TaskStatus)
@pytest.mark.parametrize("after", TaskStatus)
def test_an_active_task_may_end_and_any_status_may_come_again(
    before: TaskStatus, after: TaskStatus
) -> None:
    if before == after or before is ACTIVE:
        check_task_change(before, after)
        return
    with pytest.raises(InvalidTransitionError) as refused:
        check_task_change(before, after)
    assert refused.value.current == before
    assert refused.value.detail == f"A task that is {before} cannot become {after}"


@pytest.mark.parametrize("status", TaskStatus)
def test_a_status_is_read_by_its_word(status: TaskStatus) -> None:
    assert parse_task_status(status.value) is status


@pytest.mark.parametrize("status", ["", "ACTIVE", "done", "active ", "pending"])
def test_another_word_is_no_status_and_those_that_there_are_are_told(status: str) -> None:
    with pytest.raises(InvalidRequestError, match="active, completed, failed, cancelled"):
        parse_task_status(status)


# --- What a task is made with ---------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD_IDS)
def test_a_good_id_is_taken(name: str) -> None:
    check_task_id(name)
    check_short_id(name)
    check_new(task_id=name, short_id=name)


@pytest.mark.parametrize("name", BAD_IDS, ids=ascii)
def test_a_bad_id_is_refused(name: str) -> None:
    for check in (check_task_id, check_short_id):
        with pytest.raises(InvalidRequestError, match="1 to 128 of A-Z a-z 0-9"):
            check(name)
    assert pointers_of_refusal(task_id=name, short_id=name) == ["/short_id", "/task_id"]


def test_the_word_task_is_a_task_and_no_short() -> None:
    check_task_id("task")
    with pytest.raises(InvalidRequestError, match="not task"):
        check_short_id("task")
    assert pointers_of_refusal(short_id="task") == ["/short_id"]


def test_every_field_at_fault_is_named_with_what_would_be_right() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_new(task_type="x", short_id="", user_id="a\n", task_id="ä", session_id="short")
    told = {fault["pointer"]: fault["detail"] for fault in refused.value.faults}
    assert [*told] == ["/task_type", "/short_id", "/task_id", "/user_id", "/session_id"]
    assert all(task_type in told["/task_type"] for task_type in TASK_RULES)
    assert "control character" in told["/user_id"]
    assert "reserved" in told["/session_id"]
    assert all(detail in refused.value.detail for detail in told.values())


@pytest.mark.parametrize("user_id", ["", "u" * 129, "a\x00", "a\x7f", "\ud800"], ids=ascii)
def test_a_user_is_named_as_elsewhere(user_id: str) -> None:
    assert pointers_of_refusal(user_id=user_id) == ["/user_id"]
    with pytest.raises(InvalidRequestError, match="user_id"):
        check_task_filter(TASK_RULES, user_id=user_id)


def test_a_user_may_have_any_name_that_can_be_read() -> None:
    for user_id in ("u", "ends:u", "ä {x} : /", "u" * 128):
        check_new(user_id=user_id)
        check_task_filter(TASK_RULES, user_id=user_id)


def test_a_session_has_the_form_of_one() -> None:
    check_new(session_id="7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f")
    check_new(session_id="of-python")
    assert pointers_of_refusal(session_id="a b") == ["/session_id"]


def test_a_filter_by_a_type_that_is_none_is_refused() -> None:
    check_task_filter(TASK_RULES, task_type="scraping")
    with pytest.raises(InvalidRequestError, match="image_analysis"):
        check_task_filter(TASK_RULES, task_type="x")


# --- What it looks like ---------------------------------------------------------------------------


def test_a_task_shows_its_times_as_text_and_not_what_made_it() -> None:
    assert view_task(TASK) == {
        "short_id": "s1",
        "task_type": "image_analysis",
        "task_id": "t1",
        "user_id": "u1",
        "session_id": None,
        "status": "active",
        "created_at": "2026-01-31T08:15:00.250Z",
        "updated_at": "2026-01-31T08:15:01.250Z",
    }


times = st.integers(0, 10**15)
ids = st.from_regex(ID_PATTERN, fullmatch=True)


@given(st.lists(st.tuples(times, ids), min_size=2, max_size=5))
def test_places_have_the_order_of_the_times(made: list[tuple[int, str]]) -> None:
    tasks = [replace(TASK, created_ms=at_ms, task_id=task_id) for at_ms, task_id in made]
    by_place = sorted(tasks, key=lambda task: task.place)
    assert [task.created_ms for task in by_place] == sorted(at_ms for at_ms, _ in made)


@given(times, ids)
def test_a_cursor_comes_back_as_the_place_that_it_was(at_ms: int, task_id: str) -> None:
    place = replace(TASK, created_ms=at_ms, task_id=task_id).place
    assert parse_cursor(write_cursor(place)) == place


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", "ä", "-", "a" * 10_000, "\n", "===="),
        *(
            write_cursor(place)
            for place in ("", "1:a", "1" * 16, "1" * 16 + ":", "1" * 16 + ":a b")
        ),
        *(write_cursor(place) for place in ("(" + TASK.place, "+", TASK.place + "\n")),
    ],
    ids=lambda cursor: ascii(cursor[:20]),
)
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidRequestError, match="next_cursor"):
        parse_cursor(cursor)


@given(st.text())
def test_no_text_raises_anything_else_as_a_cursor(text: str) -> None:
    try:
        parse_cursor(text)
    except InvalidRequestError:
        return
    raise AssertionError("a text at random was taken")


# --- Rules of a deployer --------------------------------------------------------------------------


def test_rules_are_read_from_text_and_from_what_was_read_before() -> None:
    rules = parse_task_rules('{"mine": {"kept_until_released": true}, "other": {}}')
    assert rules == {"mine": TaskRule(kept_until_released=True), "other": TaskRule()}
    assert parse_task_rules(rules) == rules


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "an object by task type"),
        ('{"a b": {}}', "'a b'"),
        ('{"mine": {"tracked": 1}}', "rule of mine"),
        ('{"mine": {"kept": true}}', "rule of mine"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_rule_is_refused_with_what_would_be_one(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        parse_task_rules(text)
    assert "\n" not in str(refused.value)
