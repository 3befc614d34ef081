"""What the reference generator makes of an export: the same bytes for the same answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from app.generator import digest_section, facts_of, main, sort_into_sections
from app.settings import load_settings
from tests.onboarding.json_texts import objects

CATALOGUE = load_settings().catalogue
RUN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "wizard_run.json").read_text())
PHASES = {step.id: step.phase for step in CATALOGUE.steps}

Answers = dict[str, Any]


def export_of(steps: dict[int, Answers]) -> Answers:
    """Make what the generator reads of an export."""
    return {
        "steps": {
            str(number): {"step_id": number, "data": data, "version": 1, "saved_at": "t"}
            for number, data in steps.items()
        }
    }


def step(number: int, data: Any, *, title: str = "A title", version: int = 1) -> Answers:
    return {"step_id": number, "title": title, "version": version, "saved_at": "t", "data": data}


def value_at(answers: Any, pointer: str) -> Any:
    """Look up a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        answers = answers[int(name)] if isinstance(answers, list) else answers[name]
    return answers


def values_in(answers: Any) -> int:
    """Count the single values."""
    if isinstance(answers, dict):
        return sum(map(values_in, answers.values()))
    return sum(map(values_in, answers)) if isinstance(answers, list) else 1


# --- Sections -------------------------------------------------------------------------------------


def test_the_answers_are_sorted_by_the_phase_of_their_step() -> None:
    sections = sort_into_sections(
        export_of({int(number): data for number, data in RUN.items()}), CATALOGUE
    )

    assert list(sections) == sorted(set(PHASES.values()))
    for phase, steps in sections.items():
        assert [each["step_id"] for each in steps] == [n for n, p in PHASES.items() if p == phase]
    answered = {each["step_id"]: each["data"] for steps in sections.values() for each in steps}
    assert answered == {int(number): data for number, data in RUN.items()}


def test_a_section_exists_only_where_something_was_answered() -> None:
    sections = sort_into_sections(export_of({23: {"a": 1}, 2: {"b": 2}}), CATALOGUE)

    assert list(sections) == [PHASES[2], PHASES[23]]
    assert [each["title"] for each in sections[PHASES[2]]] == ["Brand Synthesis"]


def test_a_step_that_the_catalogue_does_not_know_is_kept_in_a_section_of_its_own() -> None:
    sections = sort_into_sections(export_of({1: {"a": 1}, 24: {"b": 2}}), CATALOGUE)

    assert list(sections) == [0, PHASES[1]]
    [unknown] = sections[0]
    assert (unknown["step_id"], unknown["title"], unknown["data"]) == (24, "Step 24", {"b": 2})


def test_nothing_answered_makes_no_section() -> None:
    assert sort_into_sections(export_of({}), CATALOGUE) == {}


# --- Facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "facts"),
    [
        ({"a": 1}, [("/a", 1)]),
        ({"a": {"b": "x"}, "c": None}, [("/a/b", "x"), ("/c", None)]),
        ({"a": [True, [2.5]]}, [("/a/0", True), ("/a/1/0", 2.5)]),
        ({"a/b": 1, "c~d": 2, "": 3}, [("/a~1b", 1), ("/c~0d", 2), ("/", 3)]),
        ({"z": 1, "a": 2}, [("/z", 1), ("/a", 2)]),
        ({"10": 1, "9": 2}, [("/10", 1), ("/9", 2)]),
        ({"a": {}, "b": []}, []),
    ],
    ids=["one", "nested", "lists", "escaped", "in-their-order", "numbers-too", "nothing-in-them"],
)
def test_the_facts_are_the_single_values_with_their_json_pointers(
    answers: Answers, facts: list[tuple[str, Any]]
) -> None:
    assert list(facts_of(answers)) == facts


@given(objects)
def test_every_single_value_is_a_fact_and_stands_where_its_pointer_says(answers: Answers) -> None:
    facts = list(facts_of(answers))

    assert len(facts) == values_in(answers)
    assert len({at for at, _ in facts}) == len(facts)
    assert all(value_at(answers, at) is value for at, value in facts)


# --- Digests --------------------------------------------------------------------------------------


def test_a_digested_section_holds_its_steps_with_their_facts() -> None:
    digested = digest_section(
        4, [step(9, {"a": "x"}, title="Market Category", version=3), step(10, {"b": [1]})]
    )

    assert digested["phase"] == 4
    assert digested["steps"] == [
        {
            "step_id": 9,
            "title": "Market Category",
            "version": 3,
            "facts": [{"at": "/a", "value": "x"}],
        },
        {
            "step_id": 10,
            "title": "A title",
            "version": 1,
            "facts": [{"at": "/b/0", "value": 1}],
        },
    ]
    answers = rfc8785.dumps({"9": {"a": "x"}, "10": {"b": [1]}})
    assert digested["digest"] == f"sha256:{hashlib.sha256(answers).hexdigest()}"


@given(objects, st.randoms())
def test_the_digest_is_the_same_for_equal_answers_however_they_are_ordered(
    answers: Answers, random: Any
) -> None:
    shuffled = list(answers.items())
    random.shuffle(shuffled)

    assert (
        digest_section(1, [step(1, answers), step(2, {"a": 1})])["digest"]
        == digest_section(1, [step(2, {"a": 1}), step(1, dict(shuffled))])["digest"]
    )


@pytest.mark.parametrize(
    "other",
    [
        [step(1, {"a": 2})],
        [step(2, {"a": 1})],
        [step(1, {"a": "1"})],
        [step(1, {"b": 1})],
        [step(1, {"a": 1}), step(2, {"a": 1})],
    ],
    ids=["value", "step", "type", "name", "one-more"],
)
def test_the_digest_is_another_for_other_answers(other: list[Answers]) -> None:
    assert digest_section(1, other)["digest"] != digest_section(1, [step(1, {"a": 1})])["digest"]


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["soon", "nan", "1e30", "0"])
def test_a_time_to_take_over_that_is_none_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generator", f"--take-over-after={wrong}"])

    with pytest.raises(SystemExit) as refused:
        main()

    assert refused.value.code == 2
    assert "--take-over-after" in capsys.readouterr().err.splitlines()[-1]


def test_settings_that_cannot_be_used_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generator"])
    monkeypatch.setenv("REDIS_URL", "http://example.com")
    monkeypatch.setenv("ONBOARDING_RETRY_ATTEMPTS", "0")

    assert main() == 2

    [line] = capsys.readouterr().err.splitlines()
    assert "REDIS_URL" in line
    assert "ONBOARDING_RETRY_ATTEMPTS" in line
