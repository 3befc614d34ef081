import json
import random
from importlib.resources import files
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Fault, InvalidStepDataError, InvalidStepIdError
from app.onboarding.catalogue import MAX_STEPS, Catalogue, CatalogueError, parse_step_id
from app.onboarding.documents import MAX_FAULTS, Document
from tests.onboarding.json_texts import spell

CANARY = "canary-4711"
"""An answer of a user. Nothing that is said about it may repeat it."""

# The packaged steps as clients know them.
PACKAGED = (
    "1 Evidence Vault (1) · 2 Brand Synthesis (1) · 3 Strategic Integrity (1) ·"
    " 4 Truth Confirmation (1) · 5 The Offer (2) · 6 Market Intelligence (3) ·"
    " 7 Competitive Landscape (3) · 8 Comparative Angle (3) · 9 Market Category (4) ·"
    " 10 Product Capabilities (4) · 11 Perceptual Map (4) · 12 Position Grid (4) ·"
    " 13 Gap Analysis (4) · 14 Positioning Statements (5) · 15 Focus & Sacrifice (5) ·"
    " 16 ICP Personas (5) · 17 Market Education (5)* · 18 Messaging Rules (5) ·"
    " 19 Soundbites Library (5) · 20 Channel Strategy (6) · 21 Market Size (6)* ·"
    " 22 Validation Tasks (6)* · 23 Final Synthesis (6)"
)


def packaged() -> Catalogue:
    return Catalogue.parse(files("app.onboarding").joinpath("catalogue.json").read_bytes())


def step(number: int = 1, **members: Any) -> dict[str, Any]:
    fixed = {"id": number, "key": f"s{number}", "title": "T", "phase": 1, "required": True}
    return {**fixed, **members}


def file(*steps: Any, **members: Any) -> dict[str, Any]:
    return {"version": "1", "steps": list(steps) or [step()], **members}


def parse(content: object) -> Catalogue:
    return Catalogue.parse(json.dumps(content).encode())


def with_schema(schema: Any) -> Catalogue:
    return parse(file(step(schema=schema)))


def faults_of(catalogue: Catalogue, answers: dict[str, Any], at: str = "/data") -> list[Fault]:
    with pytest.raises(InvalidStepDataError) as refusal:
        catalogue.check_data(1, Document.of(answers), at)
    assert CANARY not in str(refusal.value)
    return refusal.value.faults


# --- The packaged one -----------------------------------------------------------------------------


def test_the_packaged_catalogue_is_the_contracts_word_by_word() -> None:
    lines = [
        f"{each.id} {each.title} ({each.phase}){'' if each.required else '*'}"
        for each in packaged().steps
    ]
    assert " · ".join(lines) == PACKAGED


def test_the_packaged_catalogue_has_23_steps_of_which_three_are_optional() -> None:
    catalogue = packaged()
    assert catalogue.total == 23
    assert set(range(1, 24)) - catalogue.required == {17, 21, 22}
    assert len({each.key for each in catalogue.steps}) == 23


def test_the_packaged_catalogue_ships_without_schemas_so_any_answers_are_taken() -> None:
    catalogue = packaged()
    assert all(each.json_schema is None for each in catalogue.steps)
    for number in range(1, 24):
        catalogue.check_data(number, Document.of({"": [None, {}]}), "/data")


# --- What is no catalogue -------------------------------------------------------------------------

UNUSABLE: dict[str, tuple[object, str]] = {
    "no object": ([], "/"),
    "no version": ({"steps": [step()]}, "/version"),
    "a version that is a number": (file(version=1), "/version"),
    "an empty version": (file(version=""), "/version"),
    "a version with a space": (file(version="a b"), "/version"),
    "a version with a line end": (file(version="1\n"), "/version"),
    "a version with an @": (file(version="1@2"), "/version"),
    "a version of 65 characters": (file(version="1" * 65), "/version"),
    "no steps": ({"version": "1"}, "/steps"),
    "an empty list of steps": ({"version": "1", "steps": []}, "/steps"),
    "steps by name": ({"version": "1", "steps": {"1": step()}}, "/steps"),
    "more steps than are read at once": (
        file(*[step(number) for number in range(1, MAX_STEPS + 2)]),
        "/steps",
    ),
    "a step that is no object": (file(step(), 2), "/steps/1"),
    "step 0": (file(step(0)), "/steps/0/id"),
    "a negative number": (file(step(-1)), "/steps/0/id"),
    "a number as text": (file(step(id="1")), "/steps/0/id"),
    "a number as true": (file(step(id=True)), "/steps/0/id"),
    "a number with a fraction": (file(step(id=1.5)), "/steps/0/id"),
    "a gap": (file(step(1), step(3)), "/steps/1/id"),
    "the same number twice": (file(step(1), step(1, key="b")), "/steps/1/id"),
    "another order": (file(step(2), step(1)), "/steps/0/id"),
    "a start at 2": (file(step(2)), "/steps/0/id"),
    "no key": (file({name: x for name, x in step().items() if name != "key"}), "/steps/0/key"),
    "a key with capitals": (file(step(key="Offer")), "/steps/0/key"),
    "a key with a line end": (file(step(key="a\n")), "/steps/0/key"),
    "a key that begins with a digit": (file(step(key="1a")), "/steps/0/key"),
    "a key used twice": (file(step(1, key="a"), step(2, key="a")), "/steps"),
    "an empty title": (file(step(title="")), "/steps/0/title"),
    "a title of 201 characters": (file(step(title="x" * 201)), "/steps/0/title"),
    "phase 0": (file(step(phase=0)), "/steps/0/phase"),
    "required as text": (file(step(required="yes")), "/steps/0/required"),
    "an empty help": (file(step(help="")), "/steps/0/help"),
    "a misspelled member": (file(step(titel="T")), "/steps/0/titel"),
    "a schema that is a list": (file(step(schema=[])), "/steps/0/schema"),
    "a schema that is text": (file(step(1), step(2, schema="string")), "/steps/1/schema"),
    "a schema of an unknown type": (file(step(schema={"type": "strin"})), "/steps/0/schema"),
    "a schema with a broken pattern": (file(step(schema={"pattern": "("})), "/steps/0/schema"),
    "a schema with a negative length": (file(step(schema={"minLength": -1})), "/steps/0/schema"),
    "a $ref to nothing": (file(step(schema={"$ref": "#/$defs/no"})), "/steps/0/schema"),
    "an unknown dialect": (
        file(step(1), step(2, schema={"$schema": "https://example.com/dialect"})),
        "/steps/1/schema",
    ),
}


@pytest.mark.parametrize(("content", "pointer"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_file_is_refused_with_one_line_that_begins_with_its_place(
    content: object, pointer: str
) -> None:
    with pytest.raises(CatalogueError) as refusal:
        parse(content)
    message = str(refusal.value)
    assert "\n" not in message
    place, _, reason = message.partition(": ")
    assert place == pointer
    assert reason


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff", b'\xef\xbb\xbf{"version":"1","steps":[]}', b"nil", b"[" * 100_000],
    ids=repr,
)
def test_a_file_that_is_no_json_is_refused_with_one_line(text: bytes) -> None:
    with pytest.raises(CatalogueError) as refusal:
        Catalogue.parse(text)
    assert "\n" not in str(refusal.value)


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_no_bytes_raise_anything_but_a_catalogue_error(text: bytes) -> None:
    with pytest.raises(CatalogueError):
        Catalogue.parse(text)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "https://example.com/schema.json#/a"},
        {"$ref": "file:///etc/hostname"},
        {"$ref": "other.json"},
        {"$ref": "/other.json"},
        {"$ref": "//example.com/other.json"},
        {"$ref": "urn:example:schema"},
        {"$dynamicRef": "http://127.0.0.1:9/schema.json#a"},
        {"$id": "http://127.0.0.1:9/a.json", "$ref": "b.json"},
        {"properties": {"x": {"items": {"$ref": "http://127.0.0.1:9/x"}}}},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "file:///etc/hostname"}}},
        {"$defs": {"a": {"$id": "http://127.0.0.1:9/a"}}, "not": {"$ref": "http://127.0.0.1:9/b"}},
    ],
    ids=str,
)
def test_a_schema_that_points_outside_the_file_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(CatalogueError, match=r"^/steps/0/schema: "):
        with_schema(schema)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_file_with_a_constant_that_json_does_not_have_is_refused(constant: str) -> None:
    text = json.dumps(file(step(schema={"const": "x"}))).replace('"x"', constant)
    with pytest.raises(CatalogueError):
        Catalogue.parse(text.encode())


@pytest.mark.parametrize("number", [2**63, 2**64, 10**30, -(10**30)])
def test_a_schema_with_a_huge_integer_is_refused_or_can_be_pinned(number: int) -> None:
    try:
        catalogue = with_schema({"properties": {"x": {"maximum": number}}})
    except CatalogueError:
        return
    assert Catalogue.parse(catalogue.text).pin == catalogue.pin


# --- What answers must be -------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [None, True, {}, False, {"minProperties": 0}])
def test_no_answers_at_all_are_refused_whatever_the_schema(schema: Any) -> None:
    [fault] = faults_of(parse(file(step(schema=schema))), {}, "/steps/1")
    assert (fault["pointer"], fault["code"]) == ("/steps/1", "min_properties")


_TEXT = {"type": "string"}

# What is wrong with answers that hold the canary: schema, answers, pointers and keywords.
WRONG: dict[str, tuple[Any, dict[str, Any], list[tuple[str, str]]]] = {
    "type": ({"properties": {"x": {"type": "integer"}}}, {"x": CANARY}, [("/x", "type")]),
    "types": ({"properties": {"x": {"type": ["null", "array"]}}}, {"x": CANARY}, [("/x", "type")]),
    "type of an object": ({"properties": {"x": _TEXT}}, {"x": {CANARY: CANARY}}, [("/x", "type")]),
    "enum": ({"properties": {"x": {"enum": ["a", "b"]}}}, {"x": CANARY}, [("/x", "enum")]),
    "const": ({"properties": {"x": {"const": "a"}}}, {"x": CANARY}, [("/x", "const")]),
    "pattern": ({"properties": {"x": {"pattern": "^[A-Z]+$"}}}, {"x": CANARY}, [("/x", "pattern")]),
    "minLength": ({"properties": {"x": {"minLength": 99}}}, {"x": CANARY}, [("/x", "minLength")]),
    "maxLength": ({"properties": {"x": {"maxLength": 1}}}, {"x": CANARY}, [("/x", "maxLength")]),
    "format email": ({"properties": {"x": {"format": "email"}}}, {"x": CANARY}, [("/x", "format")]),
    "format uri": ({"properties": {"x": {"format": "uri"}}}, {"x": CANARY}, [("/x", "format")]),
    "format date": ({"properties": {"x": {"format": "date"}}}, {"x": CANARY}, [("/x", "format")]),
    "minimum": ({"properties": {"x": {"minimum": 9e9}}}, {"x": 4711}, [("/x", "minimum")]),
    "maximum": ({"properties": {"x": {"maximum": 1}}}, {"x": 4711}, [("/x", "maximum")]),
    "multipleOf": ({"properties": {"x": {"multipleOf": 5}}}, {"x": 4711}, [("/x", "multipleOf")]),
    "required": ({"required": ["y"]}, {CANARY: CANARY}, [("", "required")]),
    "required twice": ({"required": ["y", "z"]}, {CANARY: 1}, [("", "required"), ("", "required")]),
    "required inside": (
        {"properties": {"x": {"items": {"required": ["y"]}}}},
        {"x": [{"y": 1}, {CANARY: CANARY}]},
        [("/x/1", "required")],
    ),
    "additionalProperties": (
        {"properties": {"x": {}}, "additionalProperties": False},
        {CANARY: CANARY},
        [("", "additionalProperties")],
    ),
    "additionalProperties inside": (
        {"properties": {"x": {"additionalProperties": False}}},
        {"x": {CANARY: CANARY}},
        [("/x", "additionalProperties")],
    ),
    "unevaluatedProperties": (
        {"allOf": [{"properties": {"x": {}}}], "unevaluatedProperties": False},
        {CANARY: CANARY},
        [("", "unevaluatedProperties")],
    ),
    "propertyNames by pattern": (
        {"propertyNames": {"pattern": "^[A-Z]+$"}},
        {CANARY: 1},
        [("", "propertyNames|pattern")],
    ),
    "propertyNames by length": (
        {"propertyNames": {"maxLength": 2}},
        {CANARY: 1},
        [("", "propertyNames|maxLength")],
    ),
    "propertyNames by enum": (
        {"propertyNames": {"enum": ["a"]}},
        {CANARY: 1},
        [("", "propertyNames|enum")],
    ),
    "propertyNames by format": (
        {"propertyNames": {"format": "email"}},
        {CANARY: 1},
        [("", "propertyNames|format")],
    ),
    "propertyNames by $ref": (
        {"propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": {"maxLength": 1}}},
        {CANARY: 1},
        [("", "propertyNames|maxLength")],
    ),
    "propertyNames by anyOf": (
        {"properties": {"x": {"propertyNames": {"anyOf": [{"const": "a"}, {"const": "b"}]}}}},
        {"x": {CANARY: 1}},
        [("/x", "propertyNames|anyOf")],
    ),
    "dependentRequired": (
        {"dependentRequired": {"x": ["y"]}},
        {"x": CANARY},
        [("", "dependentRequired")],
    ),
    "dependentSchemas": (
        {"dependentSchemas": {"x": {"properties": {"y": _TEXT}}}},
        {"x": CANARY, "y": [CANARY]},
        [("/y", "type")],
    ),
    "uniqueItems": (
        {"properties": {"x": {"uniqueItems": True}}},
        {"x": [CANARY, 1, CANARY]},
        [("/x", "uniqueItems")],
    ),
    "contains": (
        {"properties": {"x": {"contains": {"type": "integer"}}}},
        {"x": [CANARY]},
        [("/x", "contains")],
    ),
    "minItems": ({"properties": {"x": {"minItems": 2}}}, {"x": [CANARY]}, [("/x", "minItems")]),
    "prefixItems": (
        {"properties": {"x": {"prefixItems": [{"type": "integer"}]}}},
        {"x": [CANARY]},
        [("/x/0", "type")],
    ),
    "oneOf none": (
        {"properties": {"x": {"oneOf": [{"type": "integer"}, {"maxLength": 1}]}}},
        {"x": CANARY},
        [("/x", "oneOf")],
    ),
    "oneOf both": (
        {"properties": {"x": {"oneOf": [_TEXT, {"minLength": 1}]}}},
        {"x": CANARY},
        [("/x", "oneOf")],
    ),
    "anyOf": (
        {"properties": {"x": {"anyOf": [{"type": "integer"}, {"maxLength": 1}]}}},
        {"x": CANARY},
        [("/x", "anyOf")],
    ),
    "allOf": (
        {"allOf": [{"properties": {"x": {"type": "integer"}}}, {"required": ["y"]}]},
        {"x": CANARY},
        [("", "required"), ("/x", "type")],
    ),
    "not": ({"properties": {"x": {"not": _TEXT}}}, {"x": CANARY}, [("/x", "not")]),
    "then": (
        {"if": {"required": ["x"]}, "then": {"properties": {"x": {"type": "integer"}}}},
        {"x": CANARY},
        [("/x", "type")],
    ),
    "else": (
        {"if": {"required": ["y"]}, "else": {"required": ["z"]}},
        {"x": CANARY},
        [("", "required")],
    ),
    "$ref": (
        {"properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
        {"x": CANARY},
        [("/x", "type")],
    ),
    "$ref to itself": (
        {"properties": {"x": {"$ref": "#"}, "y": {"type": "integer"}}},
        {"x": {"x": {"y": CANARY}}},
        [("/x/x/y", "type")],
    ),
    "patternProperties": (
        {"patternProperties": {"^c": {"type": "integer"}}},
        {"c/~": CANARY},
        [("/c~1~0", "type")],
    ),
    "a schema for further members": (
        {"additionalProperties": {"type": "integer"}},
        {"x": CANARY},
        [("/x", "type")],
    ),
    "several at once": (
        {"properties": {"x": {"type": "integer"}, "y": {"maxLength": 1}}, "required": ["z"]},
        {"x": CANARY, "y": CANARY},
        [("", "required"), ("/x", "type"), ("/y", "maxLength")],
    ),
}


@pytest.mark.parametrize(("schema", "answers", "places"), WRONG.values(), ids=WRONG.keys())
def test_every_fault_is_named_by_pointer_and_keyword_and_never_repeats_an_answer(
    schema: Any, answers: dict[str, Any], places: list[tuple[str, str]]
) -> None:
    faults = faults_of(with_schema(schema), answers)
    assert sorted(each["pointer"] for each in faults) == sorted(f"/data{at}" for at, _ in places)
    for code, keyword in zip(
        sorted(each["code"] for each in faults),
        sorted(keyword for _, keyword in places),
        strict=True,
    ):
        assert code in keyword.split("|")
    for fault in faults:
        assert fault["detail"]
        assert CANARY not in fault["detail"]
        assert "4711" not in fault["detail"]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": False}},
        {"patternProperties": {"^x$": False}},
        {"$defs": {"no": False}, "properties": {"x": {"$ref": "#/$defs/no"}}},
        {"dependentSchemas": {"x": False}},
    ],
    ids=str,
)
def test_a_member_that_is_forbidden_by_false_is_named_by_a_keyword(schema: dict[str, Any]) -> None:
    [fault] = faults_of(with_schema(schema), {"x": CANARY})
    keywords = {"false", "properties", "patternProperties", "$ref", "dependentSchemas"}
    assert fault["code"] in keywords
    assert CANARY not in fault["detail"]


def test_a_schema_that_is_false_refuses_every_answer() -> None:
    [fault] = faults_of(with_schema(False), {"x": CANARY})
    assert (fault["pointer"], fault["code"]) == ("/data", "false")


def assert_that_pointers_lead_to(answers: dict[str, Any]) -> None:
    faults = faults_of(with_schema({"additionalProperties": {"type": "integer"}}), answers)
    assert {each["pointer"] for each in faults} == {
        f"/data/{name.replace('~', '~0').replace('/', '~1')}"
        for name, value in answers.items()
        if not isinstance(value, int)
    }


_NAMES = st.text(min_size=1, max_size=4).filter(lambda name: not name.isdecimal())


@given(st.dictionaries(_NAMES, st.text("ab", max_size=3), min_size=1, max_size=4))
def test_a_pointer_leads_to_the_fault_whatever_the_members_are_called(
    answers: dict[str, str],
) -> None:
    assert_that_pointers_lead_to(answers)


@pytest.mark.parametrize(
    "name",
    ["", "0", "12", "00", "007", "+0", "+7", "++7", "+", "-1", "\u0663", "9" * 30, "1" * 5000],
    ids=lambda name: ascii(name[:9]),
)
def test_a_pointer_leads_to_the_fault_though_the_member_is_called_like_an_index(name: str) -> None:
    assert_that_pointers_lead_to({name: CANARY})
    assert_that_pointers_lead_to({"a": 1, name: CANARY})


def test_members_that_are_called_alike_are_told_apart() -> None:
    assert_that_pointers_lead_to(dict.fromkeys(["", "7", "07", "007", "+7", "+07"], CANARY))


def test_a_fault_of_the_whole_is_not_taken_for_one_of_its_nameless_member() -> None:
    schema = {"additionalProperties": {"type": "integer"}, "required": ["x"]}
    faults = faults_of(with_schema(schema), {"": CANARY})
    assert {(each["pointer"], each["code"]) for each in faults} == {
        ("/data", "required"),
        ("/data/", "type"),
    }


def test_the_faults_of_one_answer_are_limited() -> None:
    answers = {"x": [CANARY] * (MAX_FAULTS + 5)}
    catalogue = with_schema({"properties": {"x": {"items": {"type": "integer"}}}})
    assert len(faults_of(catalogue, answers)) == MAX_FAULTS


def test_answers_that_meet_the_schema_are_taken() -> None:
    catalogue = with_schema(
        {
            "type": "object",
            "properties": {"mail": {"format": "email"}, "n": {"type": "integer"}},
            "required": ["mail"],
            "additionalProperties": False,
        }
    )
    catalogue.check_data(1, Document.of({"mail": "a@example.com", "n": 1.0}), "/data")


def test_a_pattern_cannot_be_made_to_run_for_long() -> None:
    catalogue = with_schema({"properties": {"x": {"pattern": "^(a+)+$"}}})
    [fault] = faults_of(catalogue, {"x": "a" * 100_000 + "!"})
    assert fault["code"] == "pattern"


def test_a_step_without_a_schema_is_not_checked_by_the_schema_of_another() -> None:
    catalogue = parse(file(step(1, schema=False), step(2)))
    catalogue.check_data(2, Document.of({"x": 1}), "/data")


# --- Content and spelling -------------------------------------------------------------------------


def test_a_pin_names_the_version_and_the_content() -> None:
    version, _, digest = parse(file(version="2026-01")).pin.partition("@")
    assert version == "2026-01"
    assert len(digest) == 16
    assert int(digest, 16) >= 0


@pytest.mark.parametrize(
    "changed",
    [
        file(version="2"),
        file(step(title="U")),
        file(step(key="other")),
        file(step(phase=2)),
        file(step(required=False)),
        file(step(help="Think")),
        file(step(schema=True)),
        file(step(schema={})),
        file(step(schema={"type": "object"})),
        file(step(), step(2)),
    ],
    ids=str,
)
def test_a_pin_changes_with_the_content(changed: dict[str, Any]) -> None:
    assert parse(changed).pin != parse(file()).pin


SPELLED = file(
    step(1, title="Größe & \U0001f600", schema={"type": "object", "required": ["a", "b"]}),
    step(2, help='"quoted" \\ / text', schema={"properties": {"x": {"enum": [1.5, None, "ä"]}}}),
)


@given(st.integers(0, 2**32))
def test_a_pin_does_not_change_with_the_spelling(seed: int) -> None:
    text = spell(SPELLED, seed).encode()
    assert Catalogue.parse(text).pin == parse(SPELLED).pin


def shuffled(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict):
        names = sorted(value)
        chance.shuffle(names)
        return {name: shuffled(value[name], chance) for name in names}
    return [shuffled(each, chance) for each in value] if isinstance(value, list) else value


@given(st.integers(0, 2**32))
def test_a_pin_does_not_change_with_the_order_of_members(seed: int) -> None:
    # The order of members means nothing in JSON (RFC 8259 section 4), in a schema as elsewhere.
    assert parse(shuffled(SPELLED, random.Random(seed))).pin == parse(SPELLED).pin


def test_a_pin_does_not_change_with_members_that_nobody_reads() -> None:
    assert parse(file(comment="draft")).pin == parse(file()).pin


@pytest.mark.parametrize("content", [SPELLED, file(), file(step(schema=False), step(2))])
def test_a_catalogue_read_back_from_its_own_text_is_the_same(content: dict[str, Any]) -> None:
    catalogue = parse(content)
    again = Catalogue.parse(catalogue.text)
    assert (again.pin, again.text, again.steps) == (catalogue.pin, catalogue.text, catalogue.steps)


def test_the_text_of_a_catalogue_has_what_the_file_had_and_the_number_of_steps() -> None:
    assert orjson.loads(parse(SPELLED).text) == {**SPELLED, "total": 2}


# --- Step numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 9, 10, 23, 99, 100, 999])
def test_a_step_is_named_by_its_canonical_decimal_number(number: int) -> None:
    assert parse_step_id(str(number)) == number


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "00", "01", "007", "+1", "-1", "1.0", "1e0", "0x1", " 1", "1 ", "1\n", "\n1"),
        *("1_0", "\uff11", "\u0661", "²", "a", "1a", "1,2", "1000", "9" * 5000, "true", "null"),
    ],
    ids=lambda text: ascii(text[:9]),
)
def test_nothing_else_names_a_step(text: str) -> None:
    with pytest.raises(InvalidStepIdError):
        parse_step_id(text)


@given(st.text(max_size=5) | st.text("0123456789 +-\n", max_size=4))
def test_a_name_of_a_step_has_one_spelling(text: str) -> None:
    try:
        number = parse_step_id(text)
    except InvalidStepIdError:
        assert not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 999) or text[0] == "0"
    else:
        assert str(number) == text


@pytest.mark.parametrize(("number", "known"), [(0, 0), (1, 1), (23, 1), (24, 0), (-1, 0), (999, 0)])
def test_a_catalogue_knows_its_own_steps(number: int, known: bool) -> None:
    catalogue = packaged()
    assert (number in catalogue) == known
    if known:
        catalogue.check_step_id(number)
    else:
        with pytest.raises(InvalidStepIdError):
            catalogue.check_step_id(number)


@given(st.sets(st.integers(1, 23)))
def test_missing_are_the_steps_that_are_not_saved_in_order(saved: set[int]) -> None:
    missing = packaged().missing(saved)
    assert missing == sorted(missing)
    assert saved.isdisjoint(missing)
    assert saved.union(missing) == set(range(1, 24))
