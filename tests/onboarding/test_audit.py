"""The record of who did what: how an event of it is described."""

import pytest

from app.errors import InvalidRequestError
from app.onboarding.audit import describe_audited
from app.onboarding.events import BEFORE_ALL, EventId, parse_after

KEPT = {"at": "1767268800123", "who": "user:ada", "action": "get_export", "outcome": "done"}


def test_an_event_says_who_did_what_when_and_how_that_ended() -> None:
    assert describe_audited(EventId(20, 1), KEPT) == {
        "id": "20-1",
        "at": "2026-01-01T12:00:00.123Z",
        "who": "user:ada",
        "action": "get_export",
        "outcome": "done",
    }


def test_it_names_the_session_where_there_was_one() -> None:
    assert describe_audited(EventId(20, 1), {**KEPT, "session_id": "s"})["session_id"] == "s"


@pytest.mark.parametrize("missing", KEPT)
def test_what_was_never_an_event_is_damage(missing: str) -> None:
    fields = {name: value for name, value in KEPT.items() if name != missing}
    with pytest.raises((KeyError, ValueError)):
        describe_audited(EventId(20, 1), fields)
    with pytest.raises(ValueError, match="yesterday"):
        describe_audited(EventId(20, 1), {**KEPT, "at": "yesterday"})


def test_whoever_names_no_id_reads_from_the_beginning() -> None:
    assert parse_after(None) == BEFORE_ALL
    assert parse_after("20") == EventId(20, 0)
    assert parse_after("20-1") == EventId(20, 1)


@pytest.mark.parametrize("text", ["", "x", "-1", "1-", "1-2-3", "1 ", "9" * 20, "٣"])
def test_an_id_that_nobody_was_given_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_after(text)
