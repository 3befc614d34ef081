import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.onboarding.events import (
    BEFORE_ALL,
    EVENT_TYPES,
    EventId,
    Extent,
    describe_event,
    is_gap,
    parse_event_id,
)

HIGHEST = 10**19 - 1

ids = st.builds(EventId, st.integers(0, HIGHEST), st.integers(0, HIGHEST))


# --- Ids ------------------------------------------------------------------------------------------


@given(ids)
def test_an_id_reads_as_it_is_written(event_id: EventId) -> None:
    assert parse_event_id(str(event_id)) == event_id


@given(ids, ids)
def test_ids_are_ordered_by_their_time_and_then_by_their_count(
    one: EventId, other: EventId
) -> None:
    assert (one < other) == ((one.ms, one.sequence) < (other.ms, other.sequence))


def test_a_time_alone_is_the_first_id_of_its_millisecond() -> None:
    assert parse_event_id("1767268800000") == EventId(1767268800000, 0)
    assert parse_event_id("0") == BEFORE_ALL


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-",
            "x",
            "1-",
            "-1",
            "1-2-3",
            "1.5",
            "1e3",
            "+1",
            " 1",
            "1 ",
            "1-1\n",
            "$",
            "*",
            ">",
        ),
        *("1_0", "١", "１-１", "0x1", "None", f"{2**64}-0", f"0-{2**64}", "9" * 5000),  # noqa: RUF001
    ],
)
def test_what_is_no_id_reads_as_none(text: str) -> None:
    assert parse_event_id(text) is None


# --- Gaps -----------------------------------------------------------------------------------------

FIRST, MIDDLE, NEWEST = EventId(10, 0), EventId(20, 0), EventId(30, 5)
WHOLE = Extent(FIRST, NEWEST, whole=True)
TRIMMED = Extent(FIRST, NEWEST, whole=False)
EMPTY = Extent(None, None, whole=False)


@pytest.mark.parametrize("after", [FIRST, MIDDLE, EventId(30, 4), NEWEST])
@pytest.mark.parametrize("extent", [WHOLE, TRIMMED])
def test_within_the_log_nothing_is_missing(after: EventId, extent: Extent) -> None:
    assert not is_gap(after, extent)


@pytest.mark.parametrize("after", [BEFORE_ALL, EventId(9, 99)])
def test_before_the_log_something_is_missing_if_its_beginning_is_gone(after: EventId) -> None:
    assert is_gap(after, TRIMMED)
    assert not is_gap(after, WHOLE)


@pytest.mark.parametrize("after", [EventId(30, 6), EventId(31, 0), EventId(HIGHEST, HIGHEST)])
@pytest.mark.parametrize("extent", [WHOLE, TRIMMED])
def test_an_id_that_the_log_has_not_reached_is_from_another_log(
    after: EventId, extent: Extent
) -> None:
    assert is_gap(after, extent)


def test_of_an_empty_log_nothing_is_known() -> None:
    assert is_gap(EventId(0, 1), EMPTY)
    assert not is_gap(BEFORE_ALL, EMPTY)


# --- Descriptions ---------------------------------------------------------------------------------

AT = {"at": "1767268800123"}


def test_an_event_has_an_id_a_type_a_time_and_its_own_members() -> None:
    event = describe_event(MIDDLE, {"type": "step_saved", **AT, "step_id": "4", "version": "2"})

    assert event == {
        "id": "20-0",
        "type": "step_saved",
        "at": "2026-01-01T12:00:00.123Z",
        "step_id": 4,
        "version": 2,
    }


def test_a_report_without_a_message_says_so() -> None:
    event = describe_event(MIDDLE, {"type": "progress", **AT, "stage": "7", "progress": "70"})

    assert (event["stage"], event["progress"], event["message"]) == ("7", 70, None)


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_every_type_is_described(event_type: str) -> None:
    assert describe_event(MIDDLE, {"type": event_type, **AT})["type"] == event_type


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"type": "finalized"},
        AT,
        {"type": "finalized", "at": "yesterday"},
        {"type": "finalized", **AT, "revision": ""},
    ],
    ids=repr,
)
def test_what_was_never_an_event_is_damage(fields: dict[str, str]) -> None:
    with pytest.raises((KeyError, ValueError)):
        describe_event(MIDDLE, fields)


def test_the_types_are_those_of_the_contract() -> None:
    assert sorted(EVENT_TYPES) == sorted(
        [
            *("session_created", "step_saved", "step_deleted", "metadata_changed"),
            *("language_changed", "progress", "status_changed", "finalized", "reopened"),
            *("result_stored", "recovered", "deleted"),
        ]
    )
