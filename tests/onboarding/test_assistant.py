"""Questions: what may be asked, what an agent may say, and what the guide finds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequestError
from app.onboarding.assistant import (
    MAX_ANSWER_LENGTH,
    MAX_QUESTION_LENGTH,
    Chunk,
    Result,
    Stage,
    check_question,
    check_said,
    parse_asked,
    split_answer,
    view_answer,
    view_asked,
)
from app.onboarding.catalogue import Catalogue
from app.onboarding.guide import (
    MAX_WORDS,
    THRESHOLD,
    Candidate,
    Guide,
    QuestionsError,
    confidence_of,
    is_search_there,
    parse_questions,
    words_of,
)

PACKAGED = Path(__file__).parents[2] / "app" / "onboarding"
CATALOGUE = Catalogue.parse((PACKAGED / "catalogue.json").read_bytes())
QUESTIONS = parse_questions((PACKAGED / "questions.json").read_bytes())
GUIDE = Guide(CATALOGUE, QUESTIONS)

NATURAL = [
    ("Which sources should I gather before we start?", 1),
    ("Can I add support tickets as evidence?", 1),
    ("How would you sum up a company's personality?", 2),
    ("What do I do with claims we cannot prove?", 3),
    ("How do I mark a fact that may be out of date?", 4),
    ("Do I put the money-back guarantee here?", 5),
    ("Is a price range okay if we negotiate?", 5),
    ("Where can I read about current demand and trends?", 6),
    ("Is a spreadsheet a competitor?", 7),
    ("What should I note about rival products?", 7),
    ("How do I prove that our difference matters?", 8),
    ("Is it better to invent a new category?", 9),
    ("Do planned features belong in the list of capabilities?", 10),
    ("Which axes make a good map?", 11),
    ("How many points do I give each position?", 12),
    ("How do I find the needs that nobody meets?", 13),
    ("What is the template for a positioning statement?", 14),
    ("Which markets should we give up?", 15),
    ("What is the difference between an ICP and a persona?", 16),
    ("What belongs in a buyer persona?", 16),
    ("Our buyers believe myths, what can we teach them?", 17),
    ("May we use jargon in our texts?", 18),
    ("What does tone of voice mean?", 18),
    ("How long should an elevator pitch be?", 19),
    ("I need a catchy slogan", 19),
    ("Is email a good channel for us?", 20),
    ("How do I calculate SOM?", 21),
    ("How do I run a survey to test an assumption?", 22),
    ("What should the final summary contain?", 23),
    ("What is step 12?", 12),
]
"""Questions as people ask them, with the step that each one is about."""

ABOUT_THE_WIZARD = {
    "Is my work saved automatically?": "Each step is saved on its own",
    "Can I continue tomorrow on my phone?": "every saved step is there",
    "What is a draft?": "A draft keeps what you have typed",
    "Where can I download the export?": "The export holds all your answers",
    "How do I unlock my session after finalizing?": "Reopen the session to unlock",
    "What happens when I finalize?": "Finalize locks the steps",
    "Can I skip a step?": "Steps can be answered in any order",
    "When does my session expire?": "kept for seven days",
}

NONSENSE = [
    *(
        "",
        "???",
        "asdf qwer zxcv",
        "qwertz uiop asdfgh",
        "zzzz",
        "12345 67890",
        "lorem ipsum dolor",
    ),
    *("What is the weather in Paris tomorrow?", "How do I bake sourdough bread?", "tell me a joke"),
    *("What is the boiling point of water?", "Who painted the Mona Lisa?", "Why is the sky blue?"),
    *(
        "How do I train my dog to sit?",
        "Where can I buy cheap flights to Rome?",
        "What time is it?",
    ),
    *("Who won the football world cup in 1998?", "SELECT * FROM users; DROP TABLE users", "help"),
    *("Wie wird das Wetter morgen in Berlin?", "¿Dónde está la biblioteca?", "今日の天気は?"),
]
"""What nothing here is an answer to."""


def first_answer(question: str) -> Candidate | None:
    """Give what the guide would answer."""
    candidates = GUIDE.find(words_of(question))
    return candidates[0] if candidates and candidates[0].confidence >= THRESHOLD else None


# --- The guide ------------------------------------------------------------------------------------


def test_every_packaged_step_has_a_help_text_and_a_question() -> None:
    assert [step.id for step in CATALOGUE.steps if step.help] == list(range(1, 24))
    assert {each.step for each in QUESTIONS} >= {step.key for step in CATALOGUE.steps}


def test_a_natural_question_is_answered_with_the_right_step() -> None:
    found = [[each.step_id for each in GUIDE.find(words_of(text))[:3]] for text, _ in NATURAL]
    wanted = [step_id for _, step_id in NATURAL]
    missed = [
        text
        for (text, step_id), candidates in zip(NATURAL, found, strict=True)
        if step_id not in candidates
    ]
    assert len(NATURAL) == 30
    assert len(missed) <= 3, missed
    first = sum(each[:1] == [step_id] for each, step_id in zip(found, wanted, strict=True))
    assert first >= 26


@pytest.mark.parametrize("question", ABOUT_THE_WIZARD)
def test_a_question_about_the_wizard_itself_is_answered(question: str) -> None:
    answer = first_answer(question)
    assert answer is not None
    assert ABOUT_THE_WIZARD[question] in answer.answer


@pytest.mark.parametrize("question", NONSENSE, ids=ascii)
def test_nonsense_has_no_answer(question: str) -> None:
    assert first_answer(question) is None


def test_an_answer_from_the_help_texts_says_which_step_it_is_about() -> None:
    answer = first_answer("step 7")
    assert answer is not None
    assert answer.step_id == 7
    assert answer.answer.startswith("Step 7, Competitive Landscape: ")


def test_a_step_without_a_help_text_and_an_entry_about_no_step_of_the_catalogue_are_left_out() -> (
    None
):
    steps = [
        {"id": 1, "key": "a", "title": "Apples", "phase": 1, "required": True},
        {"id": 2, "key": "b", "title": "Pears", "phase": 1, "required": True, "help": "Ripe pears"},
    ]
    catalogue = Catalogue.parse(json.dumps({"version": "7", "steps": steps}).encode())
    guide = Guide(catalogue, QUESTIONS)
    assert guide.find(["apples"]) == []
    assert [each.step_id for each in guide.find(["pear"])] == [2]
    assert {each.step_id for each in guide.find(["pitch", "draft", "persona"])} == {None}


def test_an_index_without_entries_finds_nothing() -> None:
    step = {"id": 1, "key": "a", "title": "Apples", "phase": 1, "required": True}
    catalogue = Catalogue.parse(json.dumps({"version": "7", "steps": [step]}).encode())
    assert Guide(catalogue, []).find(["apples"]) == []


@given(st.text(max_size=200))
def test_no_question_is_taken_for_a_query_language(question: str) -> None:
    found = GUIDE.find(words_of(question))
    assert all(0 <= each.confidence <= 1 for each in found)
    assert found == sorted(found, key=lambda each: -each.confidence)


@pytest.mark.parametrize(
    "question",
    ['"', "'", "a OR", "NEAR(a b)", "title:a", "a*", "^a", "-a", "a + b", "²", "x" * 2000],
)
def test_an_operator_of_the_search_is_a_word_or_nothing(question: str) -> None:
    GUIDE.find(words_of(question))


def test_words_are_looked_up_once_without_case_and_without_the_common_ones() -> None:
    assert words_of("What is a DRAFT, and why a draft?") == ("draft",)
    assert words_of("How do I do it?") == ()
    assert len(words_of(" ".join(f"w{n}" for n in range(100)))) == MAX_WORDS


@given(st.floats(-10, 1000), st.floats(0, 100), st.floats(0, 1), st.floats(0, 1, exclude_min=True))
def test_the_confidence_rises_with_the_score_and_with_the_share(
    score: float, more: float, share: float, larger: float
) -> None:
    confidence = confidence_of(score, share)
    assert 0 <= confidence <= 1
    assert confidence_of(score + more, share) >= confidence
    assert confidence_of(score, max(share, larger)) >= confidence


def test_this_python_can_search() -> None:
    assert is_search_there()


# --- The file of questions ------------------------------------------------------------------------

ENTRY = {"questions": ["a?"], "answer": "b"}


def test_a_file_of_questions_is_read() -> None:
    text = json.dumps({"version": "1", "entries": [ENTRY, {**ENTRY, "step": "the_offer"}]})
    first, second = parse_questions(text.encode())
    assert (first.questions, first.answer, first.step) == (["a?"], "b", None)
    assert second.step == "the_offer"
    assert parse_questions(b'{"version": "1", "entries": []}') == ()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "/: "),
        ("[]", "/: "),
        ('{"entries": []}', "/version: "),
        ('{"version": "1"}', "/entries: "),
        ('{"version": "1", "entries": {}}', "/entries: "),
        ('{"version": "1", "version": "1", "entries": []}', "/"),
        (json.dumps({"version": "1", "entries": [{**ENTRY, "answer": ""}]}), "/entries/0/answer: "),
        (json.dumps({"version": "1", "entries": [ENTRY, {"answer": "b"}]}), "/entries/1/questions"),
        (json.dumps({"version": "1", "entries": [{**ENTRY, "step": 5}]}), "/entries/0/step: "),
        (json.dumps({"version": "1", "entries": [{**ENTRY, "more": 5}]}), "/entries/0/more: "),
    ],
)
def test_an_unfit_file_of_questions_is_refused_in_one_line(text: str, place: str) -> None:
    with pytest.raises(QuestionsError, match=f"^{place}") as refusal:
        parse_questions(text.encode())
    assert str(refusal.value).isprintable()


# --- Questions and answers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    ["?", "a\nb\tc", " ", "é 😀", "x" * MAX_QUESTION_LENGTH, "\u2028", "\xa0"],
    ids=ascii,
)
def test_this_may_be_asked(question: str) -> None:
    check_question(question)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "x" * (MAX_QUESTION_LENGTH + 1),
        "\0",
        "a\rb",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\ud800",
        5,
        None,
    ],
    ids=ascii,
)
def test_this_may_not_be_asked(question: Any) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        check_question(question)
    assert [fault["pointer"] for fault in refusal.value.faults] == ["/question"]


@pytest.mark.parametrize(
    "said",
    [
        *(Stage("s"), Stage("s" * 128), Chunk(""), Chunk("c"), Result(None, 0), Result("a", 1)),
        *(Result("a" * MAX_ANSWER_LENGTH, 0.5, 23), Result(None, 0.5, 1), Result("a\r\n", 0.5)),
    ],
    ids=lambda said: ascii(said)[:40],
)
def test_an_agent_may_say_this(said: Any) -> None:
    assert check_said(said, CATALOGUE) is said


@pytest.mark.parametrize(
    "said",
    [
        *(
            None,
            "text",
            {"answer": "a"},
            Stage(""),
            Stage("s" * 129),
            Chunk("\ud800"),
            Stage("\udfff"),
        ),
        *(Chunk("c" * (MAX_ANSWER_LENGTH + 1)), Result("a" * (MAX_ANSWER_LENGTH + 1), 0.5)),
        *(Result("", 0.5), Result("\ud800", 0.5), Result("a", -0.1), Result("a", 1.1)),
        *(Result("a", float("nan")), Result("a", True), Result("a", 0.5, 0), Result("a", 0.5, 24)),
        *(Result("a", 0.5, True), Result("a", "0.5"), Result(5, 0.5), Result("a", 0.5, "1")),  # type: ignore[arg-type]
        *(Stage(5), Chunk(b"c")),  # type: ignore[arg-type]
    ],
    ids=lambda said: ascii(said)[:40],
)
def test_an_agent_may_not_say_this_and_the_reason_quotes_nothing(said: Any) -> None:
    with pytest.raises(ValueError, match=r"^an? ") as refusal:
        check_said(said, CATALOGUE)
    assert "text" not in str(refusal.value)


def test_an_answer_is_described_with_its_step_if_it_has_one() -> None:
    assert view_answer(Result("a", 0.123456, 3), 7) == {
        "answer": "a",
        "confidence": 0.1235,
        "processing_stage": "completed",
        "processing_time_ms": 7,
        "step_id": 3,
    }
    assert "step_id" not in view_answer(Result("a", 1), 7)
    assert "step_id" not in view_answer(Result(None, 0.1, 3), 7)


def test_what_the_history_keeps_is_read_as_it_was_written() -> None:
    kept = view_asked("q", view_answer(Result("a", 1, 3), 7), 1_767_268_800_000)
    assert kept == {
        "question": "q",
        "answer": "a",
        "confidence": 1.0,
        "processing_time_ms": 7,
        "at": "2026-01-01T12:00:00.000Z",
    }
    assert parse_asked(json.loads(json.dumps(kept))) == kept
    assert parse_asked({**kept, "answer": None, "more": 1})["answer"] is None
    for name in kept:
        with pytest.raises(ValueError, match=r"^no question"):
            parse_asked({**kept, name: []})
        with pytest.raises(ValueError, match=r"^no question"):
            parse_asked({other: value for other, value in kept.items() if other != name})


@given(st.text())
def test_the_sentences_of_an_answer_make_it_up(answer: str) -> None:
    sentences = split_answer(answer)
    assert "".join(sentences) == answer
    assert all(sentences)


def test_an_answer_is_split_behind_each_sentence() -> None:
    assert split_answer("One. Two? 3.5 is three!\nEnd") == [
        "One. ",
        "Two? ",
        "3.5 is three!\n",
        "End",
    ]
