import copy
import pickle
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.onboarding.documents import Document
from app.onboarding.steps import NO_PRECONDITION, Precondition, Step, StepMap, Tags
from tests.onboarding.json_texts import objects, same, spell

ANY = Tags(any_version=True)
NONE_OF_OURS = Tags()
THREE = Tags(versions=frozenset({3}))
FOUR = Tags(versions=frozenset({4}))
THREE_OR_FOUR = Tags(versions=frozenset({3, 4}))

# RFC 9110 section 13.1.1: `*` holds when there is a current representation, a list when one of its
# tags is that of the current one. An absent step has neither.
IF_MATCH: list[tuple[Tags, int | None, bool]] = [
    (ANY, 3, True),
    (ANY, None, False),
    (THREE, 3, True),
    (THREE, 4, False),
    (THREE, None, False),
    (FOUR, 3, False),
    (THREE_OR_FOUR, 3, True),
    (THREE_OR_FOUR, 4, True),
    (THREE_OR_FOUR, 5, False),
    (THREE_OR_FOUR, None, False),
    (NONE_OF_OURS, 3, False),
    (NONE_OF_OURS, None, False),
]


@pytest.mark.parametrize(("tags", "version", "holds"), IF_MATCH)
def test_if_match_holds_as_rfc_9110_says(tags: Tags, version: int | None, holds: bool) -> None:
    assert Precondition(if_match=tags).holds(version) == holds
    assert tags.match(version) == holds


@pytest.mark.parametrize(("tags", "version", "matches"), IF_MATCH)
def test_if_none_match_holds_where_if_match_would_not(
    tags: Tags, version: int | None, matches: bool
) -> None:
    # RFC 9110 section 13.1.2: the same comparison, the other outcome.
    assert Precondition(if_none_match=tags).holds(version) == (not matches)


_VERSIONS = st.none() | st.integers(1, 4)
_TAGS = st.none() | st.builds(
    Tags, any_version=st.booleans(), versions=st.frozensets(st.integers(1, 4), max_size=2)
)


@given(_TAGS, _TAGS, _VERSIONS)
def test_both_preconditions_must_hold_and_one_that_was_not_sent_does(
    if_match: Tags | None, if_none_match: Tags | None, version: int | None
) -> None:
    alone = Precondition(if_match=if_match).holds(version)
    other = Precondition(if_none_match=if_none_match).holds(version)
    assert Precondition(if_match, if_none_match).holds(version) == (alone and other)
    assert NO_PRECONDITION.holds(version)


AT = "2026-01-31T08:15:00.250Z"


@given(objects, st.integers(0, 2**32), st.integers(1, 4))
def test_a_saved_step_is_put_together_around_the_bytes_of_its_record(
    answers: dict[str, Any], seed: int, version: int
) -> None:
    data = spell(answers, seed).encode()
    stored = b'{"step_id":7,"version":%d,"saved_at":"%b","data":%b}' % (version, AT.encode(), data)
    step = Step.of_record("s.1_-", stored, version)
    assert_put_together(step, answers, data, version, is_draft=False)


@given(objects, st.integers(0, 2**32), _VERSIONS)
def test_a_draft_is_put_together_around_the_bytes_of_its_answers(
    answers: dict[str, Any], seed: int, version: int | None
) -> None:
    data = spell(answers, seed).encode()
    step = Step.of_draft("s.1_-", 7, data, version, AT)
    assert_put_together(step, answers, data, version, is_draft=True)


def assert_put_together(
    step: Step, answers: dict[str, Any], data: bytes, version: int | None, *, is_draft: bool
) -> None:
    assert data in step.text
    assert step.version == version
    assert same(
        orjson.loads(step.text),
        {
            "session_id": "s.1_-",
            "step_id": 7,
            "version": version,
            "saved_at": AT,
            "data": answers,
            "is_draft": is_draft,
        },
    )
    assert same(step["data"], answers)
    assert step.part("data").text == data.strip(b" \t\r\n")


def test_a_step_is_a_document_that_does_not_show_its_answers() -> None:
    step = Step.of_draft("s", 1, b'{"a":"canary"}', 1, AT)
    assert isinstance(step, Document)
    assert "canary" not in repr(step)


def test_saved_steps_come_by_number_and_survive_a_copy() -> None:
    steps = StepMap({}, [1, 2])
    assert steps == {}
    for same_steps in (steps, copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert same_steps.missing == [1, 2]
