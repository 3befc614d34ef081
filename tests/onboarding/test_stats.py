"""Sessions in numbers: ages, shares, medians from buckets, cursors; and what may change of one."""

import base64
import math
from statistics import median_low
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.errors import InvalidRequestError
from app.onboarding.cursors import parse_cursor, write_cursor
from app.onboarding.retention import HOUR_MS
from app.onboarding.sessions import SessionStatus, parse_changes, plan_changes
from app.onboarding.stats import (
    Counts,
    describe_cleanup,
    describe_step,
    median_of,
    utilization,
    view_health,
    view_stats,
)

NOW_MS = 1_767_268_800_000

ID = "0b0cba0f-9f1f-4d1c-8a57-7d0f6f8b7a10"

durations = st.floats(0, 10**9) | st.integers(0, 10**6).map(float) | st.sampled_from([0.0, 1.0])


def bucket_of(seconds: float) -> int:
    """Give the bucket of a duration, as `lua/index.lua` does."""
    return math.floor(4 * math.log2(seconds + 1))


def counts(**changes: Any) -> Counts:
    """Count nothing, but for what is given."""
    nothing = Counts(
        by_status=dict.fromkeys(SessionStatus, 0),
        ages=(0, 0, 0),
        created_sum_s=0,
        oldest_ms=None,
        newest_ms=None,
        max_sessions=0,
        cleanup={},
        funnel={},
    )
    return nothing._replace(**changes)


# --- The median -----------------------------------------------------------------------------------


def in_buckets(seconds: list[float]) -> dict[int, int]:
    buckets: dict[int, int] = {}
    for each in seconds:
        buckets[bucket_of(each)] = buckets.get(bucket_of(each), 0) + 1
    return buckets


@given(seconds=durations)
def test_a_bucket_reaches_over_the_duration_that_is_counted_in_it(seconds: float) -> None:
    bucket = bucket_of(seconds)
    low, high = (2 ** (edge / 4) - 1 for edge in (bucket, bucket + 1))
    assert low <= seconds or math.isclose(low, seconds, rel_tol=1e-9)
    assert seconds < high or math.isclose(high, seconds, rel_tol=1e-9)


@given(one=durations, other=durations)
def test_a_longer_duration_is_in_no_lower_bucket(one: float, other: float) -> None:
    assert bucket_of(min(one, other)) <= bucket_of(max(one, other))


@given(seconds=st.lists(durations, min_size=1, max_size=50))
@example([0.0])
@example([0.0, 1e9])
@example([3600.0] * 7)
def test_the_median_of_buckets_is_off_by_a_fifth_at_most(seconds: list[float]) -> None:
    true = median_low(seconds)
    median = median_of(in_buckets(seconds))
    assert median is not None
    # A fifth of one second more, and what rounding to two decimals takes.
    assert abs(median - true) <= (true + 1) / 5 + 0.005


def test_there_is_no_median_of_nothing() -> None:
    assert median_of({}) is None


def test_a_step_of_the_funnel_is_described_by_its_own_counters_alone() -> None:
    funnel = {
        "saved:1": 7,
        "saved:11": 9,
        "gap:1:0": 1,
        "gap:11:24": 5,
        "gap:1:20": 3,
        "saved:2": 2,
    }
    first = describe_step(funnel, 1)
    assert (first["step_id"], first["saved"]) == (1, 7)
    assert first["median_seconds_to_next"] == median_of({0: 1, 20: 3})
    assert describe_step(funnel, 2) == {"step_id": 2, "saved": 2, "median_seconds_to_next": None}
    assert describe_step(funnel, 23) == {"step_id": 23, "saved": 0, "median_seconds_to_next": None}


# --- How full -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limit", "health"),
    [
        (0, 10_000, "healthy"),
        (6999, 10_000, "healthy"),
        (7000, 10_000, "warning"),
        (8999, 10_000, "warning"),
        (9000, 10_000, "critical"),
        (10_000, 10_000, "critical"),
        (10_001, 10_000, "critical"),
        (699_999, 1_000_000, "healthy"),
        (899_999, 1_000_000, "warning"),
        (1, 1, "critical"),
        (0, 0, "healthy"),
        (10**9, 0, "healthy"),
    ],
)
def test_the_health_turns_at_70_and_at_90_percent_of_a_limit(
    count: int, limit: int, health: str
) -> None:
    view = view_health(count, limit, 0, [], cleanup=True)
    assert view["overall_health"] == health
    assert view["session_count"] == count
    assert view["utilization_percent"] == utilization(count, limit)


def test_the_share_of_a_limit_has_two_decimals_and_is_nothing_without_one() -> None:
    assert utilization(1, 3) == 33.33
    assert utilization(3, 2) == 150.0
    assert utilization(5, 0) == 0.0


def test_the_health_names_what_is_stuck_and_says_whether_somebody_cleans_up() -> None:
    view = view_health(3, 0, 2, ["a", "b"], cleanup=False)
    assert view["stuck_sessions"] == 2
    assert view["stuck_session_ids"] == ["a", "b"]
    assert view["cleanup_active"] is False


# --- Ages -----------------------------------------------------------------------------------------


def test_nothing_has_no_ages() -> None:
    view = view_stats(counts(), 2, NOW_MS)
    assert view["total_sessions"] == 0
    assert view["average_age_hours"] is None
    assert view["oldest_session_hours"] is None
    assert view["newest_session_hours"] is None
    assert view["age_distribution"] == {"under_1h": 0, "1h_to_6h": 0, "6h_to_24h": 0, "over_24h": 0}
    assert view["status_breakdown"] == {"pending": 0, "processing": 0, "complete": 0, "error": 0}
    assert [step["step_id"] for step in view["funnel"]] == [1, 2]
    assert view["cleanup"] == describe_cleanup({})
    assert view["cleanup"]["last_run"] is None


@given(ages_h=st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_every_session_is_in_the_bucket_of_its_age(ages_h: list[int]) -> None:
    within = tuple(sum(age < bound for age in ages_h) for bound in (1, 6, 24))
    made_s = [NOW_MS // 1000 - 3600 * age for age in ages_h]
    view = view_stats(
        counts(
            by_status={**dict.fromkeys(SessionStatus, 0), SessionStatus.ERROR: len(ages_h)},
            ages=within,
            created_sum_s=sum(made_s),
            oldest_ms=1000 * min(made_s),
            newest_ms=1000 * max(made_s),
        ),
        23,
        NOW_MS,
    )
    assert view["age_distribution"] == {
        "under_1h": sum(age < 1 for age in ages_h),
        "1h_to_6h": sum(1 <= age < 6 for age in ages_h),
        "6h_to_24h": sum(6 <= age < 24 for age in ages_h),
        "over_24h": sum(age >= 24 for age in ages_h),
    }
    assert view["total_sessions"] == view["status_breakdown"]["error"] == len(ages_h)
    assert view["average_age_hours"] == pytest.approx(sum(ages_h) / len(ages_h), abs=0.006)
    assert view["oldest_session_hours"] == max(ages_h)
    assert view["newest_session_hours"] == min(ages_h)


def test_a_session_that_another_clock_made_ahead_of_us_is_no_younger_than_nothing() -> None:
    one = {**dict.fromkeys(SessionStatus, 0), SessionStatus.PENDING: 1}
    ahead_ms = NOW_MS + HOUR_MS
    view = view_stats(
        counts(by_status=one, created_sum_s=ahead_ms // 1000, newest_ms=ahead_ms), 1, NOW_MS
    )
    assert view["average_age_hours"] == view["newest_session_hours"] == 0.0


def test_what_was_cleaned_up_is_told_by_its_counters() -> None:
    view = describe_cleanup({"last_run": NOW_MS, "removed": 3, "failures": 1, "expired": 2})
    assert view == {
        "last_run": "2026-01-01T12:00:00.000Z",
        "removed": 3,
        "failures": 1,
        "expired": 2,
        "evicted": 0,
        "tasks_removed": 0,
    }


# --- Cursors --------------------------------------------------------------------------------------


@given(
    created_ms=st.integers(0, 10**14 - 1),
    session_id=st.text("abcXYZ019._-", min_size=1, max_size=130),
)
def test_a_cursor_reads_back_and_may_stand_in_a_query_as_it_is(
    created_ms: int, session_id: str
) -> None:
    moment = f"{created_ms:016}:{session_id}"
    cursor = write_cursor(moment)
    assert cursor.replace("-", "").replace("_", "").isalnum()
    assert parse_cursor(cursor) == moment


def of_text(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@given(garbage=st.text() | st.binary().map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
@example("")
@example("=")
@example("A")
@example("é")
@example("\ud800")
@example("٣")
@example(write_cursor(f"{NOW_MS:016}:{ID}") + "A")
@example(write_cursor(f"{NOW_MS:016}:{ID}") + "=A")
@example(write_cursor(f"{NOW_MS:016}:{ID}") + "\n")
@example(of_text(f"{NOW_MS}:{ID}"))
@example(of_text(f"{NOW_MS:015}:{ID}"))
@example(of_text(f"{NOW_MS:016}:"))
@example(of_text(f"{NOW_MS:016}:a b"))
@example(of_text(f"{NOW_MS:016}:{ID}\n"))
@example(of_text("\u0660" * 14 + ":a"))
@example(of_text("(:a"))
def test_any_garbage_is_refused_as_a_cursor(garbage: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_cursor(garbage)


# --- What may change of a session -----------------------------------------------------------------

BEFORE: dict[str, Any] = {
    "session_id": ID,
    "workspace_id": "w1",
    "user_id": None,
    "language": "en",
    "status": "pending",
    "progress": {"completed": 0},
    "metadata": {"a": 1},
    "created_at": "2026-01-01T12:00:00.000Z",
    "expires_at": "2026-01-08T12:00:00.000Z",
    "finalized_at": None,
    "revision": 0,
}
"""The description of a session, as far as it matters here."""


class TestParseChanges:
    def test_takes_every_field_that_can_be_changed(self) -> None:
        changes = parse_changes(
            {
                "status": "error",
                "error_message": "It broke",
                "language": "pt-BR",
                "metadata": {"a": [1, {"b": None}]},
                "user_id": None,
                "workspace_id": "w2",
            }
        )
        assert changes.status is SessionStatus.ERROR
        assert changes.error_message == "It broke"
        assert changes.owner == {
            "language": "pt-BR",
            "custom": b'{"a":[1,{"b":null}]}',
            "user_id": None,
            "workspace_id": "w2",
        }

    @pytest.mark.parametrize(
        ("updates", "pointer"),
        [
            ({"progress": 1}, "/progress"),
            ({"session_id": "x"}, "/session_id"),
            ({"revision": 2, "language": "de"}, "/revision"),
            ({"metadata ": {}}, "/metadata "),
            ({"status": None}, "/status"),
            ({"status": 1}, "/status"),
            ({"status": "Pending"}, "/status"),
            ({"status": "done"}, "/status"),
            ({"status": ""}, "/status"),
            ({"language": None}, "/language"),
            ({"language": "a_b"}, "/language"),
            ({"language": 1}, "/language"),
            ({"metadata": None}, "/metadata"),
            ({"metadata": [1]}, "/metadata"),
            ({"metadata": "{}"}, "/metadata"),
            ({"user_id": ""}, "/user_id"),
            ({"user_id": "a\nb"}, "/user_id"),
            ({"user_id": "x" * 129}, "/user_id"),
            ({"user_id": 7}, "/user_id"),
            ({"workspace_id": "\x7f"}, "/workspace_id"),
            ({"workspace_id": "\ud800"}, "/workspace_id"),
            ({"workspace_id": b"w"}, "/workspace_id"),
            ({"error_message": "x"}, "/error_message"),
            ({"error_message": "x", "status": "complete"}, "/error_message"),
            ({"error_message": "x\x00", "status": "error"}, "/error_message"),
            ({"error_message": "x" * 2001, "status": "error"}, "/error_message"),
            ({"error_message": 5, "status": "error"}, "/error_message"),
        ],
        ids=ascii,
    )
    def test_refuses_any_other_and_names_the_field(
        self, updates: dict[str, Any], pointer: str
    ) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            parse_changes(updates)
        assert [fault["pointer"] for fault in refused.value.faults] == [pointer]

    @pytest.mark.parametrize(
        "updates", [{}, {"metadata": {"a": float("nan")}}, {"metadata": {1: 2}}], ids=str
    )
    def test_refuses_what_changes_nothing_or_cannot_be_kept(self, updates: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError):
            parse_changes(updates)

    @given(updates=st.dictionaries(st.text(max_size=12), st.none() | st.text() | st.integers()))
    def test_takes_or_refuses_anything(self, updates: dict[str, Any]) -> None:
        try:
            changes = parse_changes(updates)
        except InvalidRequestError:
            return
        assert changes.owner or changes.status or "error_message" in updates


class TestPlanChanges:
    def test_says_nothing_of_what_is_as_it_was(self) -> None:
        assert plan_changes(BEFORE, {**BEFORE}) is None
        assert plan_changes(BEFORE, {**BEFORE, "metadata": {"a": 1}}) is None

    def test_says_what_is_not_as_it_was_and_nothing_else(self) -> None:
        after = {**BEFORE, "metadata": {"a": 2}, "user_id": "ada", "status": "processing"}
        changes = plan_changes(BEFORE, after)
        assert changes is not None
        assert changes.owner == {"custom": b'{"a":2}', "user_id": "ada"}
        assert changes.status is SessionStatus.PROCESSING

    def test_takes_a_member_that_was_removed_for_one_that_is_none(self) -> None:
        after = {name: value for name, value in BEFORE.items() if name != "workspace_id"}
        changes = plan_changes(BEFORE, after)
        assert changes is not None
        assert changes.owner == {"workspace_id": None}

    @pytest.mark.parametrize("name", [name for name in BEFORE if name != "user_id"])
    def test_refuses_a_member_that_cannot_be_changed_or_not_to_this(self, name: str) -> None:
        after = {**BEFORE, name: object()}
        with pytest.raises(InvalidRequestError):
            plan_changes(BEFORE, after)

    def test_refuses_a_member_that_there_is_not(self) -> None:
        with pytest.raises(InvalidRequestError, match="finalised"):
            plan_changes(BEFORE, {**BEFORE, "finalised": True, "language": "de"})

    @pytest.mark.parametrize(
        ("one", "other"),
        [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ([1], [True]), ({"b": 1}, {"b": 1.0})],
        ids=str,
    )
    def test_tells_json_values_apart_that_python_takes_for_equal(
        self, one: object, other: object
    ) -> None:
        before, after = ({**BEFORE, "metadata": {"a": value}} for value in (one, other))
        changes = plan_changes(before, after)
        assert changes is not None
        assert changes.owner.keys() == {"custom"}
