import copy
import json
import time
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.errors import InvalidRequestError, InvalidStepDataError, MalformedJsonError, RequestError
from app.onboarding.documents import (
    MAX_DEPTH,
    MAX_FAULTS,
    MAX_INTEGER,
    Document,
    escape_pointer,
    json_pointer,
    merge_patch,
)
from tests.onboarding.json_texts import (
    admit,
    floats,
    integers,
    member_names,
    objects,
    same,
    spell,
    values,
)

seeds = st.integers(0, 2**32)


def nested(levels: int, *, opening: str = "[", closing: str = "]") -> str:
    return '{"a":' + opening * (levels - 1) + closing * (levels - 1) + "}"


def nested_value(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


# --- What is admitted -----------------------------------------------------------------------------


@given(objects, seeds)
def test_any_safe_object_in_any_spelling_is_admitted_and_kept_as_it_came(
    value: dict[str, Any], seed: int
) -> None:
    text = spell(value, seed).encode()
    document = Document.parse(text)
    assert document.text == text
    assert same(document.value, value)
    assert same(Document(text).value, value)


@given(st.dictionaries(member_names, objects, max_size=5), seeds)
def test_a_part_is_the_very_bytes_of_its_member(
    value: dict[str, dict[str, Any]], seed: int
) -> None:
    text = spell(value, seed).encode()
    document = Document.parse(text)
    parts = document.parts("/steps")
    assert list(parts) == list(value)
    place = 0
    for name, part in parts.items():
        place = text.index(part.text, place) + len(part.text)
        assert part.text[:1] + part.text[-1:] == b"{}"
        assert same(part.value, value[name])
        assert same(orjson.loads(part.text), value[name])
        assert document.part(name).text == part.text


@pytest.mark.parametrize("name", ["data", "", "é😀", 'quo"te', "back\\slash", "line\nfeed", "\x7f"])
@pytest.mark.parametrize("beside", [{}, {"x": [1]}])
def test_a_part_of_what_is_spelled_plainly_is_its_bytes_whatever_it_is_called(
    name: str, beside: dict[str, Any]
) -> None:
    member = {"a": {"b": "}"}, "c": 1.5}
    document = Document.parse(orjson.dumps({name: member, **beside}))
    assert document.part(name).text == orjson.dumps(member)
    assert document.part(name) == member


@given(objects, objects, seeds)
def test_a_part_of_a_part_keeps_its_bytes_too(
    inner: dict[str, Any], beside: dict[str, Any], seed: int
) -> None:
    text = spell({"x": beside, "steps": {"1": inner, "2": beside}}, seed).encode()
    part = Document.parse(text).part("steps").part("1")
    assert part.text in text
    assert same(orjson.loads(part.text), inner)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        " \t\r\n{ } \n",
        '{"a":null,"b":true,"c":false,"d":[],"e":{}}',
        '{"":""}',
        '{"a":9007199254740991,"b":-9007199254740991}',
        '{"a":-0,"b":-0.0,"c":0e0,"d":-0E-9,"e":0.000,"f":0e999999}',
        '{"a":1.7976931348623157e308,"b":5e-324,"c":-5E-324,"d":2.5e-324}',
        '{"a":1e20,"b":123456789012345678901234567890.0,"c":9007199254740993.0}',
        '{"a":"\\u0000\\u001f\\b\\f\\n\\r\\t\\"\\\\\\/"}',
        '{"a":"\\ud83d\\ude00","b":"😀","c":"\\uFFFF\uffff"}',
        '{"a":"\u2028\u2029\x7f\x80"}',
        '{"a":{"a":1},"b":{"a":1}}',
        '{"a":1,"A":2,"\\u00e4":3,"a\\u0308":4}',
        '{"a":"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}',
        nested(MAX_DEPTH),
        nested(MAX_DEPTH).replace("[", "[ "),
    ],
)
def test_what_every_parser_reads_alike_is_admitted(text: str) -> None:
    document = Document.parse(text.encode())
    assert document.text == text.encode()
    assert same(document.value, json.loads(text))


def test_a_document_reads_as_a_mapping_in_the_order_of_its_text() -> None:
    document = Document.parse(b'{"b": 1, "a": {"c": []}}')
    assert isinstance(document, Mapping)
    assert list(document) == ["b", "a"]
    assert len(document) == 2
    assert document["a"] == {"c": []}
    assert document == {"a": {"c": []}, "b": 1}
    with pytest.raises(KeyError):
        document["c"]


def test_the_repr_of_a_document_tells_its_size_and_no_answer() -> None:
    assert repr(Document.parse(b'{"secret":"canary"}')) == "<Document of 19 bytes>"


# --- What is refused ------------------------------------------------------------------------------

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "only space": b" \n",
    "not UTF-8": b'{"a":"\xff"}',
    "Latin-1": '{"a":"ä"}'.encode("latin-1"),
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "an overlong encoding": b'{"a":"\xc0\xaf"}',
    "a surrogate encoded as UTF-8": b'{"a":"\xed\xa0\x80"}',
    "a byte order mark": b'\xef\xbb\xbf{"a":1}',
    "a byte order mark alone": b"\xef\xbb\xbf",
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":[-Infinity]}',
    "single quotes": b"{'a':1}",
    "a bare name": b"{a:1}",
    "a trailing comma in an object": b'{"a":1,}',
    "a trailing comma in a list": b'{"a":[1,]}',
    "a comment": b'{"a":1/**/}',
    "two documents": b'{"a":1}{"a":1}',
    "something behind": b'{"a":1}x',
    "a null byte behind": b'{"a":1}\x00',
    "an open object": b'{"a":1',
    "an open string": b'{"a":"',
    "a leading zero": b'{"a":01}',
    "a leading plus": b'{"a":+1}',
    "no digit before the point": b'{"a":.5}',
    "no digit behind the point": b'{"a":1.}',
    "no exponent": b'{"a":1e}',
    "hexadecimal": b'{"a":0x10}',
    "digits of another script": '{"a":\u0661}'.encode(),
    "a control character in a string": b'{"a":"\n"}',
    "an unknown escape": b'{"a":"\\x41"}',
    "a short escape": b'{"a":"\\u12"}',
    "an escape with a sign": b'{"a":"\\u+123"}',
    "a no-break space": '{"a":\u00a01}'.encode(),
    "a form feed": b'{"a":\x0c1}',
    "True": b'{"a":True}',
    "no colon": b'{"a" 1}',
    "a number as a name": b"{1:1}",
    "wrong closing": b'{"a":[1}',
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_not_json_in_utf_8_is_malformed(text: bytes) -> None:
    with pytest.raises(MalformedJsonError):
        Document.parse(text, InvalidStepDataError)
    # The same where a space sends the text past the fast path.
    if not text.startswith(b"\xef\xbb\xbf"):
        with pytest.raises(MalformedJsonError):
            Document.parse(b" " + text, InvalidStepDataError)


UNFIT: dict[str, tuple[str, str, str]] = {
    "a duplicate member": ('{"a":1,"a":1}', "duplicate_member", ""),
    "a duplicate spelled otherwise": ('{"a":1,"\\u0061":2}', "duplicate_member", ""),
    "a duplicate deep inside": (
        '{"x":[0,{"y":{"b":1,"c":2,"b":3}}]}',
        "duplicate_member",
        "/x/1/y",
    ),
    "an empty name twice": ('{"":1,"":2}', "duplicate_member", ""),
    "three of a kind": ('{"a":{"b":1,"b":2,"b":3}}', "duplicate_member", "/a"),
    "a lone high surrogate": ('{"a":"\\ud800"}', "lone_surrogate", "/a"),
    "a lone low surrogate": ('{"a":["x\\udfffx"]}', "lone_surrogate", "/a/0"),
    "a swapped pair": ('{"a":"\\ude00\\ud83d"}', "lone_surrogate", "/a"),
    "a high surrogate before text": ('{"a":"\\ud83d0"}', "lone_surrogate", "/a"),
    "two high surrogates": ('{"a":"\\ud83d\\ud83d\\ude00"}', "lone_surrogate", "/a"),
    "a lone surrogate in a name": ('{"b":{"\\ud800":1}}', "lone_surrogate", "/b"),
    "2^53": ('{"a":9007199254740992}', "integer_range", "/a"),
    "-2^53": ('{"a":-9007199254740992}', "integer_range", "/a"),
    "2^63": ('{"a":[9223372036854775808]}', "integer_range", "/a/0"),
    "2^64": ('{"a":18446744073709551616}', "integer_range", "/a"),
    "5000 digits": ('{"a":' + "9" * 5000 + "}", "integer_range", "/a"),
    "minus 5000 digits": ('{"a":-' + "1" * 5000 + "}", "integer_range", "/a"),
    "an overflow": ('{"a":1e309}', "number_range", "/a"),
    "a negative overflow": ('{"a":-1.8E308}', "number_range", "/a"),
    "an exponent without end": ('{"a":1e' + "9" * 500 + "}", "number_range", "/a"),
    "an overflow without exponent": ('{"a":1' + "0" * 400 + ".5}", "number_range", "/a"),
    "an underflow": ('{"a":1e-400}', "number_range", "/a"),
    "a negative underflow": ('{"a":-0.1e-999}', "number_range", "/a"),
    "an underflow without exponent": ('{"a":0.' + "0" * 400 + "1}", "number_range", "/a"),
    "half of the smallest": ('{"a":2e-324}', "number_range", "/a"),
}


@pytest.mark.parametrize(("text", "code", "pointer"), UNFIT.values(), ids=UNFIT.keys())
@pytest.mark.parametrize("space", ["", " "])
def test_what_could_not_be_kept_exactly_is_refused_at_its_place(
    text: str, code: str, pointer: str, space: str
) -> None:
    with pytest.raises(InvalidStepDataError) as refusal:
        Document.parse((space + text).encode(), InvalidStepDataError)
    assert [(each["code"], each["pointer"]) for each in refusal.value.faults] == [(code, pointer)]


@pytest.mark.parametrize(
    "text",
    [
        nested(MAX_DEPTH + 1),
        nested(MAX_DEPTH + 1, opening='{"a":', closing="}").replace(":}", ":{}}"),
        nested(500),
        nested(5_000),
        nested(200_000),
        " " + nested(MAX_DEPTH + 1),
        " " + nested(200_000),
        orjson.dumps(nested_value(MAX_DEPTH + 1)).decode(),
    ],
    ids=len,
)
def test_more_than_64_levels_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        Document.parse(text.encode())


@pytest.mark.parametrize("text", ["[]", "[{}]", "1", '"a"', "null", "true", " 1.5 ", "-0"])
def test_a_body_that_is_no_object_is_refused_but_is_json(text: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        Document.parse(text.encode())
    assert type(refusal.value) is InvalidRequestError
    assert [each["pointer"] for each in refusal.value.faults] == [""]


def test_every_fault_is_named_up_to_a_limit() -> None:
    text = b'{"a":[' + b",".join([b"1e999"] * (MAX_FAULTS + 5)) + b"]}"
    with pytest.raises(InvalidRequestError) as refusal:
        Document.parse(text)
    assert len(refusal.value.faults) == MAX_FAULTS


@given(objects, seeds, st.sampled_from(sorted(UNFIT)), st.booleans())
def test_one_unfit_value_anywhere_is_refused(
    value: dict[str, Any], seed: int, which: str, listed: bool
) -> None:
    unfit = UNFIT[which][0]
    hook = "\x00hook\x00"
    surrounded = {"before": value, "hook": [hook] if listed else hook, "after": value}
    text, plain = spell(surrounded, seed), json.dumps(hook)
    if plain not in text:  # the hook itself is spelled oddly
        text = json.dumps(surrounded)
    with pytest.raises(InvalidRequestError) as refusal:
        Document.parse(text.replace(plain, unfit, 1).encode())
    assert refusal.value.faults[0]["pointer"].startswith("/hook")


def test_an_error_never_repeats_what_was_sent() -> None:
    for text in [*MALFORMED.values(), *(text.encode() for text, _, _ in UNFIT.values())]:
        marked = text.replace(b'"a"', b'"a":"canary","b"')
        with pytest.raises(RequestError) as refusal:
            Document.parse(marked)
        assert "canary" not in str(refusal.value)
        assert "canary" not in str([each["detail"] for each in refusal.value.faults])


# --- Against an independent reading ---------------------------------------------------------------

_NUMBERS = st.from_regex(r"\A-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?\Z")
_SCRAPS = st.sampled_from(
    [
        *(
            '{"a":',
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            '"',
            '"a"',
            '"b":',
            '"a":1',
            " ",
            "\n",
            "\\",
            "\ufeff",
        ),
        *(
            "\\ud83d",
            "\\ude00",
            "\\u00",
            "1",
            "-",
            "0",
            ".",
            "e",
            "E+5",
            "9007199254740993",
            "1e400",
        ),
        *("1e-400", "null", "true", "NaN", "Infinity", "\x00", "ä", "😀", "//", "'"),
    ]
)


def assert_agreement(text: bytes) -> None:
    expected = admit(text)
    if isinstance(expected, type):
        with pytest.raises(RequestError) as refusal:
            Document.parse(text)
        assert type(refusal.value) is expected
    else:
        document = Document.parse(text)
        assert document.text == text
        assert same(document.value, expected)
        assert same(Document(text).value, expected)


@given(_NUMBERS)
@example("-0")
@example("9007199254740991")
@example("9007199254740992")
@example("2.2250738585072011e-308")
@example("179769313486231580793e289")
def test_a_number_is_judged_as_the_stdlib_reads_it(number: str) -> None:
    assert_agreement(f'{{"a":{number}}}'.encode())
    assert_agreement(f'{{"a": [{number}]}}'.encode())


@given(st.lists(_SCRAPS | _NUMBERS, max_size=12).map("".join))
def test_scraps_of_json_are_judged_as_the_stdlib_reads_them(text: str) -> None:
    assert_agreement(text.encode())
    assert_agreement(b'{"a":' + text.encode() + b"}")


@given(objects, seeds, st.integers(0, 2**16), st.binary(max_size=3), st.integers(0, 3))
def test_a_document_with_a_few_bytes_exchanged_is_judged_as_the_stdlib_reads_it(
    value: dict[str, Any], seed: int, at: int, inserted: bytes, removed: int
) -> None:
    text = spell(value, seed).encode()
    at %= len(text) + 1
    assert_agreement(text[:at] + inserted + text[at + removed :])


@given(st.binary(max_size=64))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"-")
@example(b'"\\ud800"')
def test_no_bytes_raise_anything_but_an_error_of_the_request(text: bytes) -> None:
    for sent in (text, b'{"a":' + text + b"}", b" " + text):
        try:
            document = Document.parse(sent)
        except RequestError:
            continue
        assert document.text == sent
        orjson.loads(sent)


@given(objects, seeds)
def test_what_was_admitted_is_written_by_every_later_reader(
    value: dict[str, Any], seed: int
) -> None:
    document = Document.parse(spell(value, seed).encode())
    again = Document.parse(orjson.dumps(document.value))
    assert same(again.value, document.value)
    assert same(json.loads(document.text), orjson.loads(document.text))


# --- Parts ----------------------------------------------------------------------------------------


def test_a_missing_part_and_one_that_is_no_object_are_named() -> None:
    document = Document.parse(b'{"data": [], "x": null}')
    for name, code in (("absent", "required"), ("data", "type"), ("x", "type")):
        with pytest.raises(InvalidStepDataError) as refusal:
            document.part(name, InvalidStepDataError)
        assert [(each["pointer"], each["code"]) for each in refusal.value.faults] == [
            (f"/{name}", code)
        ]


def test_parts_name_every_member_that_is_no_object() -> None:
    document = Document.parse(b'{"1": {}, "a/b": 1, "m~n": [], "3": null}')
    with pytest.raises(InvalidStepDataError) as refusal:
        document.parts("/steps", InvalidStepDataError)
    assert [each["pointer"] for each in refusal.value.faults] == [
        "/steps/a~1b",
        "/steps/m~0n",
        "/steps/3",
    ]


def test_cutting_many_parts_takes_no_longer_than_reading_them_a_few_times() -> None:
    text = b" {" + b",".join(b'"%d": {}' % number for number in range(2_000)) + b"}"
    begun = time.perf_counter()
    for _ in range(10):
        document = Document.parse(text)
    parsed = time.perf_counter()
    parts = document.parts("/steps")
    cut = time.perf_counter()
    assert len(parts) == 2_000
    # One pass over the text takes about as long as one parse; one pass per member 2,000 times that.
    assert cut - parsed < 10 * (parsed - begun)


# --- From Python ----------------------------------------------------------------------------------


@given(objects)
def test_python_values_become_the_document_that_their_text_would(value: dict[str, Any]) -> None:
    document = Document.of(value)
    assert same(document.value, value)
    parsed = Document.parse(document.text)
    assert same(parsed.value, value)
    assert parsed.text == document.text


@given(st.dictionaries(member_names, objects, max_size=4))
def test_parts_of_python_values_are_slices_of_the_text(value: dict[str, dict[str, Any]]) -> None:
    document = Document.of(value)
    for name, part in document.parts("").items():
        assert part.text in document.text
        assert same(orjson.loads(part.text), value[name])


def test_a_document_and_any_mapping_are_taken() -> None:
    document = Document.parse(b'{"a": 1e3}')
    assert Document.of(document) is document
    for mapping in (MappingProxyType({"a": [1]}), UserDict({"a": [1]}), {"a": [1]}):
        assert Document.of(mapping).text == b'{"a":[1]}'


@dataclass
class Point:
    x: int = 1


class Words(str):
    __slots__ = ()


def _cycle() -> dict[str, Any]:
    cycle: dict[str, Any] = {}
    cycle["a"] = [cycle]
    return cycle


NOT_JSON: dict[str, Any] = {
    "NaN": {"a": float("nan")},
    "infinity": {"a": float("inf")},
    "minus infinity inside": {"a": [{"b": float("-inf")}]},
    "a tuple": {"a": (1, 2)},
    "an empty tuple inside": {"a": [()]},
    "a set": {"a": {1}},
    "bytes": {"a": b"x"},
    "a decimal": {"a": Decimal("1.5")},
    "a time": {"a": datetime(2026, 1, 1, tzinfo=UTC)},
    "a UUID": {"a": UUID(int=0)},
    "a dataclass": {"a": Point()},
    "a mapping inside": {"a": MappingProxyType({})},
    "an object": {"a": object()},
    "a number as a name": {1: "a"},
    "None as a name": {"a": {None: 1}},
    "True as a name": {True: 1},
    "bytes as a name": {b"a": 1},
    "2^53": {"a": MAX_INTEGER + 1},
    "-2^53 inside": {"a": [[-MAX_INTEGER - 1]]},
    "2^64": {"a": 2**64},
    "a lone surrogate": {"a": "\ud800"},
    "a lone surrogate in a name": {"\udc00": 1},
    "65 levels": nested_value(MAX_DEPTH + 1),
    "300 levels": nested_value(300),
    "no end": _cycle(),
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_python_values_that_json_cannot_carry_are_refused(value: dict[Any, Any]) -> None:
    with pytest.raises(InvalidStepDataError):
        Document.of(value, InvalidStepDataError)


def test_64_levels_of_python_values_are_taken() -> None:
    assert Document.of(nested_value(MAX_DEPTH)).value == nested_value(MAX_DEPTH)


def test_subclasses_of_str_are_not_silently_taken_for_something_else() -> None:
    try:
        document = Document.of({"a": Words("b")})
    except InvalidRequestError:
        return
    assert document.text == b'{"a":"b"}'


@given(st.dictionaries(member_names, integers | floats, max_size=4))
def test_numbers_of_python_keep_their_kind(value: dict[str, Any]) -> None:
    assert same(orjson.loads(Document.of(value).text), value)


# --- Merge patch ----------------------------------------------------------------------------------

RFC_7396_APPENDIX_A: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]

_few_names = st.sampled_from(["a", "b", "c"])
_trees = st.recursive(
    st.none() | st.integers(0, 3) | st.text("xy", max_size=1) | st.lists(st.none(), max_size=2),
    lambda inner: st.dictionaries(_few_names, inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(("target", "patch", "outcome"), RFC_7396_APPENDIX_A)
def test_a_merge_patch_does_what_the_appendix_of_rfc_7396_shows(
    target: Any, patch: Any, outcome: Any
) -> None:
    assert same(merge_patch(target, patch), outcome)


@given(_trees, _trees)
def test_a_merge_patch_applied_twice_is_applied_once(target: Any, patch: Any) -> None:
    once = merge_patch(target, patch)
    assert same(merge_patch(once, patch), once)


@given(_trees, _trees)
def test_a_merge_patch_changes_neither_of_its_arguments(target: Any, patch: Any) -> None:
    before = copy.deepcopy((target, patch))
    merge_patch(target, patch)
    assert same([target, patch], list(before))


@given(st.dictionaries(_few_names, _trees, max_size=3), _trees)
def test_an_empty_merge_patch_changes_nothing_and_one_of_an_absent_target_has_no_nulls(
    target: dict[str, Any], patch: Any
) -> None:
    assert same(merge_patch(target, {}), target)

    def has_null_member(value: Any) -> bool:
        return isinstance(value, dict) and any(
            each is None or has_null_member(each) for each in value.values()
        )

    assert not has_null_member(merge_patch(None, patch))


@given(values(), values())
def test_a_merge_patch_follows_the_pseudocode_of_rfc_7396(target: Any, patch: Any) -> None:
    def apply(target: Any, patch: Any) -> Any:
        if not isinstance(patch, dict):
            return patch
        if not isinstance(target, dict):
            target = {}
        for name, value in patch.items():
            if value is None:
                target.pop(name, None)
            else:
                target[name] = apply(target.get(name), value)
        return target

    assert merge_patch(target, patch) == apply(copy.deepcopy(target), patch)


# --- JSON pointers --------------------------------------------------------------------------------

RFC_6901_SECTION_5: dict[str, str] = {
    "foo": "/foo",
    "": "/",
    "a/b": "/a~1b",
    "c%d": "/c%d",
    "e^f": "/e^f",
    "g|h": "/g|h",
    "i\\j": "/i\\j",
    'k"l': '/k"l',
    " ": "/ ",
    "m~n": "/m~0n",
    "~1": "/~01",
    "/~": "/~1~0",
}


@pytest.mark.parametrize(("name", "pointer"), RFC_6901_SECTION_5.items())
def test_a_name_is_written_as_rfc_6901_shows(name: str, pointer: str) -> None:
    assert json_pointer([name]) == pointer
    assert "/" + escape_pointer(name) == pointer


def test_the_whole_document_has_the_empty_pointer_and_indexes_are_decimal() -> None:
    assert json_pointer([]) == ""
    assert json_pointer(["a", 0, 10, ""]) == "/a/0/10/"


@given(st.lists(member_names | st.integers(0, 99), max_size=5))
def test_a_pointer_leads_to_one_place(path: list[str | int]) -> None:
    pointer = json_pointer(path)
    tokens = [token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:]]
    assert tokens == [str(token) for token in path]
