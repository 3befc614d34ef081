"""The guide: the help texts of a catalogue and a file of questions and answers, searched by words.

The search is BM25 by SQLite's FTS5, over an index in memory that is built once and never changed.
Words are compared by their English stems; accents do not count.
"""

import math
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Annotated, NamedTuple
from weakref import finalize

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.errors import RequestError
from app.onboarding.catalogue import Catalogue, CatalogueStep
from app.onboarding.documents import Document, json_pointer

MAX_ENTRIES = 5000
"""Most entries of a file of questions and answers: so many are indexed in 40 ms, and a question of
32 words is looked up among them in 3 ms."""

MAX_WORDS = 32
"""How many different words of a question are looked up: each costs a query of about 10 us."""

CANDIDATES = 10
"""How many of the entries that BM25 finds best are judged."""

THRESHOLD = 0.25
"""Confidence below which an entry is no answer. Of the thirty questions about the packaged texts in
`tests/onboarding/test_assistant.py` two lie below, of those about anything else all do."""

HALF_SCORE = 3.0
"""The BM25 score that counts half. One rare word that an entry has once scores about as much."""

_TITLE_WEIGHT, _QUESTIONS_WEIGHT, _TEXT_WEIGHT = 3.0, 3.0, 1.0


class QuestionsError(ValueError):
    """A file of questions cannot be used; the message says where and why, in one line."""


class QuestionEntry(BaseModel):
    """An answer with questions to which it is one, and the key of the step that it is about."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    questions: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=500)]],
        Field(min_length=1, max_length=50),
    ]
    answer: Annotated[str, StringConstraints(min_length=1, max_length=4000)]
    step: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None


class Candidate(NamedTuple):
    """What may be an answer, and how likely it is one, 0 to 1."""

    answer: str
    confidence: float
    step_id: int | None


def parse_questions(text: bytes) -> tuple[QuestionEntry, ...]:
    """Read a file of questions and answers: JSON with `version` and `entries`.

    Raises `QuestionsError`.
    """
    try:
        file = _QuestionsFile.model_validate(Document.parse(text).value)
    except RequestError as unfit:
        place = unfit.faults[0]["pointer"] if unfit.faults else ""
        raise QuestionsError(f"{place or '/'}: {unfit.detail}") from None
    except ValidationError as unfit:
        first = unfit.errors(include_url=False, include_input=False)[0]
        raise QuestionsError(f"{json_pointer(first['loc']) or '/'}: {first['msg']}") from None
    return tuple(file.entries)


def words_of(question: str) -> tuple[str, ...]:
    """Give the words by which a question is looked up, each once, in their order.

    Two questions with the same words get the same answer.
    """
    words = (word for word in _WORD.findall(question.casefold()) if word not in _COMMON_WORDS)
    return tuple(dict.fromkeys(words))[:MAX_WORDS]


def confidence_of(score: float, share: float) -> float:
    """Turn a BM25 score (0 and more) into a confidence from 0 to 1.

    `share` is how much of the question an entry has: the weight of the words that it has out of
    that of all its words, a word weighing the more the fewer entries have it. The confidence rises
    with both: a high score alone may come from one word of a question about something else.
    """
    score = max(0.0, score)
    return min(1.0, share * score / (score + HALF_SCORE))


def is_search_there() -> bool:
    """Say whether this Python's SQLite has FTS5."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("CREATE VIRTUAL TABLE seen USING fts5(text)")
        except sqlite3.Error:
            return False
    return True


class Guide:
    """What can be looked up for sessions of one catalogue. May be asked from any thread."""

    def __init__(self, catalogue: Catalogue, questions: Iterable[QuestionEntry]) -> None:
        """Index the steps that have help texts, and the questions about these steps or none.

        Takes about 2 ms for the packaged texts.
        """
        keys = {step.key: step.id for step in catalogue.steps}
        self._answers: list[tuple[str, int | None]] = []
        # SQLite serializes what several threads ask.
        self._index = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        finalize(self, self._index.close)
        self._index.execute(
            "CREATE VIRTUAL TABLE entries USING fts5("
            "title, questions, text, tokenize='porter unicode61 remove_diacritics 2')"
        )
        self._index.execute("BEGIN")
        for step in catalogue.steps:
            if step.help is not None:
                self._add(_introduce(step), step.id, f"Step {step.id} {step.title}", "", step.help)
        for entry in questions:
            if entry.step is None or entry.step in keys:
                about = None if entry.step is None else keys[entry.step]
                self._add(entry.answer, about, "", "\n".join(entry.questions), entry.answer)
        self._index.execute("COMMIT")

    def find(self, words: Sequence[str]) -> list[Candidate]:
        """Find what may answer a question with these words, the likeliest first."""
        if not words:
            return []
        found = self._index.execute(
            "SELECT rowid, -bm25(entries, ?, ?, ?) AS score FROM entries WHERE entries MATCH ?"
            " ORDER BY score DESC, rowid LIMIT ?",
            (
                *(_TITLE_WEIGHT, _QUESTIONS_WEIGHT, _TEXT_WEIGHT),
                *(" OR ".join(map(_quote, words)), CANDIDATES),
            ),
        ).fetchall()
        having = {word: self._entries_with(word) for word in words}
        weights = {word: self._weigh(len(entries)) for word, entries in having.items()}
        whole = sum(weights.values())
        candidates = []
        for number, score in found:
            share = sum(weights[word] for word in words if number in having[word]) / whole
            answer, step_id = self._answers[number]
            candidates.append(Candidate(answer, confidence_of(score, share), step_id))
        return sorted(candidates, key=lambda each: -each.confidence)

    def _add(self, answer: str, step_id: int | None, *columns: str) -> None:
        self._index.execute(
            "INSERT INTO entries(rowid, title, questions, text) VALUES (?, ?, ?, ?)",
            (len(self._answers), *columns),
        )
        self._answers.append((answer, step_id))

    def _entries_with(self, word: str) -> set[int]:
        query = "SELECT rowid FROM entries WHERE entries MATCH ?"
        return {number for (number,) in self._index.execute(query, (_quote(word),))}

    def _weigh(self, entries: int) -> float:
        # The inverse document frequency of BM25, kept above 0; Robertson and Zaragoza, 2009.
        return math.log1p((len(self._answers) - entries + 0.5) / (entries + 0.5))


class _QuestionsFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    entries: Annotated[list[QuestionEntry], Field(max_length=MAX_ENTRIES)]


def _introduce(step: CatalogueStep) -> str:
    return f"Step {step.id}, {step.title}: {step.help}"


def _quote(word: str) -> str:
    # In quotes nothing is an operator of FTS5; a word holds none itself.
    return f'"{word}"'


_WORD = re.compile(r"\w+")
_COMMON_WORDS = frozenset(
    _WORD.findall(
        "a about all am an and any are as at be been but by can could d did do does don done else "
        "ever for from get go got had has have he help her here hers him his how i if in into is "
        "it its just like ll me mean more most must my need no not of on one or our ours out "
        "please put re s say see shall she should show so some t tell than thanks that the their "
        "them then there these they thing things this those time to too up us use ve very want "
        "was we were what when where which who whom whose why will with work would you your yours"
    )
)
"""Words that stand in questions about anything."""
