import hashlib
import json
import re
from importlib.resources import files
from typing import Any

import orjson
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from app.clock import rfc3339
from app.onboarding.catalogue import Catalogue
from app.onboarding.documents import Document
from app.onboarding.exports import Export, FinalizeAnswer, build_export, compute_checksum
from app.onboarding.sessions import Owner, Session, State
from tests.onboarding.json_texts import integers, objects, same, spell, texts

CATALOGUE = Catalogue.parse(files("app.onboarding").joinpath("catalogue.json").read_bytes())
AT_MS = 1_769_847_300_250

# What clients are promised of an export, in this order.
MEMBERS = [
    *("version", "revision", "generated_at", "session_id", "catalogue_version", "metadata"),
    *("progress", "steps", "raw_step_data", "complete", "missing_steps", "checksum"),
]


def stored(number: int, data: bytes, version: int = 1) -> Document:
    text = b'{"step_id":%d,"version":%d,"saved_at":"2026-01-31T08:15:00.250Z","data":%s}'
    return Document(text % (number, version, data))


def session_of(
    numbers: set[int],
    *,
    owner: Owner | None = None,
    revision: int = 0,
) -> Session:
    saved = "".join("1" if number in numbers else "0" for number in range(1, 24))
    return Session(
        session_id="7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f",
        owner=owner or Owner("w1", None, "en"),
        state=State(
            status="pending",
            saved=saved,
            highest=max(numbers, default=0),
            created_ms=AT_MS - 60_000,
            updated_ms=AT_MS - 1_000,
            deadline_ms=AT_MS + 604_800_000,
            finalized_ms=None,
            revision=revision,
        ),
        pin=CATALOGUE.pin,
        changes=len(numbers),
        versions=["1"] * len(numbers),
        saved_ms=[AT_MS] * len(numbers),
    )


def export_of(answers: dict[int, bytes], **session: Any) -> Export:
    steps = {number: stored(number, data) for number, data in answers.items()}
    return build_export(session_of(set(answers), **session), steps, CATALOGUE, AT_MS)


def checksum_of(received: dict[str, Any]) -> str:
    content = {
        name: value for name, value in received.items() if name not in {"checksum", "generated_at"}
    }
    return "sha256:" + hashlib.sha256(rfc8785.dumps(content)).hexdigest()


_NASTY = st.sampled_from(
    [
        b'{"a":-0.0,"b":-0,"c":1E+2,"d":1e21,"e":1e-7,"f":5e-324,"g":1.7976931348623157e308}',
        b'{"a":9007199254740991,"b":-9007199254740991,"c":9007199254740993.0,"d":1.0,"e":100}',
        b'{"a":0.1,"b":0.30000000000000004,"c":1e16,"d":123456789012345680000.0,"e":4.35}',
        b'{ "\\u0061" : "\\ud83d\\ude00\\u0000\\/" , "\\ufb33":"\\u20ac$\\u000f\\n" }',
        '{"ü":"\u2028\x7f","\U0001f600":1,"\ufb33":2,"":{}}'.encode(),
        b'{"checksum":"sha256:' + b"0" * 64 + b'","generated_at":null}',
        b'{"a":[[],{},[{}],null,true,false,""]}',
    ]
)
_ANSWERS = _NASTY | st.builds(
    lambda value, seed: spell(value, seed).strip().encode(), objects, st.integers(0, 2**32)
)
_SESSIONS = st.dictionaries(st.integers(1, 23), _ANSWERS, max_size=4)
_OWNERS = st.builds(Owner, st.none() | texts, st.none() | texts, st.just("pt-BR"), _ANSWERS)


@given(_SESSIONS, _OWNERS, integers.map(abs))
def test_the_checksum_is_that_of_the_canonical_json_of_what_was_received(
    answers: dict[int, bytes], owner: Owner, revision: int
) -> None:
    export = export_of(answers, owner=owner, revision=revision % 1_000)
    received = orjson.loads(export.text)
    assert received["checksum"] == export.checksum == checksum_of(received)
    assert compute_checksum(received) == export.checksum
    # Whoever reads it with another parser computes the same.
    assert checksum_of(json.loads(export.text)) == export.checksum


@given(_SESSIONS)
def test_the_answers_stand_in_the_export_with_the_bytes_that_were_stored(
    answers: dict[int, bytes],
) -> None:
    text = export_of(answers).text
    for number, data in answers.items():
        assert b'"%d":%s' % (number, stored(number, data).text) in text
        assert b'"step_%d":{"data":%s}' % (number, data) in text


@given(_SESSIONS, _OWNERS)
def test_an_export_holds_the_session_and_every_answer_twice(
    answers: dict[int, bytes], owner: Owner
) -> None:
    received = orjson.loads(export_of(answers, owner=owner, revision=2).text)
    values = {number: orjson.loads(data) for number, data in answers.items()}
    session = session_of(set(answers), owner=owner)
    assert set(received) == set(MEMBERS)
    assert received["version"] == "2.0"
    assert received["revision"] == 3
    assert received["generated_at"] == rfc3339(AT_MS)
    assert received["session_id"] == session.session_id
    assert received["catalogue_version"] == CATALOGUE.version
    assert received["progress"] == session.state.progress
    assert same(
        received["metadata"],
        {
            "user_id": owner.user_id,
            "workspace_id": owner.workspace_id,
            "language": "pt-BR",
            "started_at": rfc3339(AT_MS - 60_000),
            "custom": orjson.loads(owner.custom),
        },
    )
    assert list(received["steps"]) == [str(number) for number in sorted(answers)]
    for number, value in values.items():
        step = received["steps"][str(number)]
        assert set(step) == {"step_id", "data", "version", "saved_at"}
        assert step["step_id"] == number
        assert same(step["data"], value)
        assert same(received["raw_step_data"][f"step_{number}"], {"data": value})
    assert received["raw_step_data"]["metadata"] == {
        "workspace_id": owner.workspace_id,
        "user_id": owner.user_id,
    }
    assert len(received["raw_step_data"]) == len(answers) + 1


@given(st.sets(st.integers(1, 23)))
def test_missing_are_all_unsaved_steps_and_complete_asks_only_for_the_required(
    numbers: set[int],
) -> None:
    received = orjson.loads(export_of(dict.fromkeys(numbers, b'{"a":1}')).text)
    missing = [number for number in range(1, 24) if number not in numbers]
    assert received["missing_steps"] == missing
    assert received["complete"] == (not set(missing) - {17, 21, 22})


def test_an_export_without_the_optional_steps_is_complete() -> None:
    answers = {number: b'{"a":1}' for number in range(1, 24) if number not in {17, 21, 22}}
    received = orjson.loads(export_of(answers).text)
    assert received["complete"] is True
    assert received["missing_steps"] == [17, 21, 22]


def test_the_checksum_changes_with_the_answers_and_not_with_their_spelling_or_the_time() -> None:
    first = export_of({1: b'{"a":1.0,"b":"x"}'})
    respelled = export_of({1: b'{ "b" : "\\u0078", "a" : 1e0 }'})
    assert respelled.checksum == first.checksum
    later = build_export(session_of({1}), {1: stored(1, b'{"a":1}')}, CATALOGUE, AT_MS + 5_000)
    assert later.checksum == export_of({1: b'{"a":1}'}).checksum
    others = [
        export_of({1: b'{"a":1.5,"b":"x"}'}),
        export_of({2: b'{"a":1.0,"b":"x"}'}),
        export_of({1: b'{"a":1.0,"b":"x"}'}, revision=1),
        export_of({1: b'{"a":1.0,"b":"x"}'}, owner=Owner("w2", None, "en")),
    ]
    assert len({each.checksum for each in [first, *others]}) == 5


def test_the_same_session_makes_the_same_bytes() -> None:
    assert export_of({1: b'{"a":1}'}).text == export_of({1: b'{"a":1}'}).text


# --- Read back ------------------------------------------------------------------------------------


@given(_SESSIONS, _OWNERS)
def test_an_export_is_recognised_when_it_is_read_back(
    answers: dict[int, bytes], owner: Owner
) -> None:
    export = export_of(answers, owner=owner)
    again = Export.read(export.text)
    assert again is not None
    assert again.text == export.text
    assert again.checksum == export.checksum
    assert same(again.value, orjson.loads(export.text))


def test_no_beginning_and_no_end_of_an_export_is_taken_for_one() -> None:
    text = export_of({1: b'{"a":"b"}', 23: b'{"x":[1]}'}).text
    for at in range(len(text)):
        assert Export.read(text[:at]) is None
    for at in range(1, len(text)):
        assert Export.read(text[at:]) is None


_TEXT = export_of({1: b'{"a":"b"}'}).text


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"null",
        _TEXT + b"\n",
        _TEXT + b"}",
        b" " + _TEXT,
        _TEXT.replace(b"sha256:", b"sha512:"),
        re.sub(rb"sha256:[0-9a-f]{64}", lambda found: found[0].upper(), _TEXT),
        re.sub(rb"sha256:[0-9a-f]", b"sha256:", _TEXT),
        _TEXT.replace(b"sha256:", b"sha256:0"),
        stored(1, b'{"a":1}').text,
        b'{"step_id":1,"checksum":"sha256:' + b"0" * 64 + b'"}',
        b'"checksum":"sha256:' + b"0" * 64 + b'"}',
    ],
    ids=range(13),
)
def test_other_bytes_are_not_taken_for_an_export(text: bytes) -> None:
    assert Export.read(text) is None


@given(st.binary(max_size=200))
def test_no_bytes_raise_when_they_are_looked_at(text: bytes) -> None:
    assert Export.read(text) is None


# --- The answer to finalize -----------------------------------------------------------------------


def test_finalize_answers_with_the_export_as_it_is_and_always_alike() -> None:
    export = export_of({1: b'{ "a" : 1e3 }'})
    first, second = (
        FinalizeAnswer.compose(
            session_id="s1", export=export.text, completed=1, total=23, finalized_ms=AT_MS
        )
        for _ in range(2)
    )
    assert first.text == second.text
    assert export.text in first.text
    assert orjson.loads(first.text) == {
        "success": True,
        "session_id": "s1",
        "business_context": orjson.loads(export.text),
        "completed_steps": 1,
        "total_steps": 23,
        "finalized_at": "2026-01-31T08:15:00.250Z",
    }
