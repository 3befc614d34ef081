import datetime as dt
import json
import unicodedata
import uuid
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.clock import LAST_MS, rfc3339, rfc3339_each
from app.errors import InvalidRequestError
from app.onboarding.catalogue import Catalogue
from app.onboarding.sessions import (
    MAX_OWNER_LENGTH,
    Owner,
    Session,
    SessionStatus,
    State,
    check_owner,
    check_session_id,
    describe_owner,
    is_language_tag,
    is_own_string,
    is_public_id,
    view_progress,
    view_session,
    view_summary,
)
from tests.onboarding.json_texts import objects, same, spell

CATALOGUE = Catalogue.parse(files("app.onboarding").joinpath("catalogue.json").read_bytes())
CREATED_MS = 1_769_847_300_250
STATE = State(
    status="pending",
    saved="1010" + "0" * 19,
    highest=5,
    created_ms=CREATED_MS,
    updated_ms=CREATED_MS + 1_000,
    deadline_ms=CREATED_MS + 604_800_000,
    finalized_ms=None,
    revision=0,
)
OWNER = Owner("w1", "u1", "pt-BR", b'{"plan": "pro", "n": 1e3}')
SESSION = Session(
    session_id="s1",
    owner=OWNER,
    state=STATE,
    pin=CATALOGUE.pin,
    changes=2,
    versions=["4", "1"],
    saved_ms=[CREATED_MS + 500, CREATED_MS + 1_000],
)


def faulty_fields(workspace_id: str | None, user_id: str | None, language: str) -> list[str]:
    with pytest.raises(InvalidRequestError) as refusal:
        check_owner(workspace_id, user_id, language, workspace_required=True)
    assert all(each["detail"] for each in refusal.value.faults)
    return [each["pointer"] for each in refusal.value.faults]


# --- Owners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a",
        " ",
        "x" * MAX_OWNER_LENGTH,
        "😀" * MAX_OWNER_LENGTH,
        "a/b:c*{}",
        "\u00a0",
        "\u2028",
        "\uff10",
    ],
)
def test_an_owner_is_1_to_128_characters_of_any_script(text: str) -> None:
    assert is_own_string(text, MAX_OWNER_LENGTH)
    check_owner(text, text, "en", workspace_required=True)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x" * (MAX_OWNER_LENGTH + 1), "\ud800", "a\udfff"),
        *("\x00", "a\nb", "a\n", "\t", "\x1f", "\x7f", "\x80", "\x9f"),
    ],
    ids=ascii,
)
def test_an_owner_holds_no_control_character_and_no_half_character(text: str) -> None:
    assert not is_own_string(text, MAX_OWNER_LENGTH)
    assert faulty_fields(text, "u", "en") == ["/workspace_id"]
    assert faulty_fields("w", text, "en") == ["/user_id"]


@given(st.text(st.characters(exclude_categories=()), max_size=140))
def test_a_string_of_ours_is_judged_by_length_and_characters_alone(text: str) -> None:
    fits = 1 <= len(text) <= MAX_OWNER_LENGTH
    unsafe = {"Cc", "Cs"}.intersection(map(unicodedata.category, text))
    assert is_own_string(text, MAX_OWNER_LENGTH) == (fits and not unsafe)


def test_every_field_at_fault_is_named_and_no_value_is_repeated() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        check_owner("canary\n", "canary\x00", "canary!", workspace_required=True)
    assert [each["pointer"] for each in refusal.value.faults] == [
        "/workspace_id",
        "/user_id",
        "/language",
    ]
    assert "canary" not in str(refusal.value)
    assert "canary" not in str(refusal.value.faults)
    for name in ("workspace_id", "user_id", "language"):
        assert name in refusal.value.detail


def test_a_workspace_is_needed_over_http_only() -> None:
    assert faulty_fields(None, None, "en") == ["/workspace_id"]
    check_owner(None, None, "en", workspace_required=False)


# --- Languages ------------------------------------------------------------------------------------

RFC_5646_APPENDIX_A = [
    *("de", "fr", "ja"),
    *("zh-Hant", "zh-Hans", "sr-Cyrl", "sr-Latn"),
    *("zh-cmn-Hans-CN", "cmn-Hans-CN", "zh-yue-HK", "yue-HK"),
    *("zh-Hans-CN", "sr-Latn-RS"),
    *("sl-rozaj", "sl-rozaj-biske", "sl-nedis"),
    *("de-CH-1901", "sl-IT-nedis"),
    "hy-Latn-IT-arevela",
    *("de-DE", "en-US", "es-419"),
    *("de-CH-x-phonebk", "az-Arab-x-AZE-derbend"),
    *("x-whatever", "qaa-Qaaa-QM-x-southern", "de-Qaaa", "sr-Latn-QM", "sr-Qaaa-RS"),
    *("en-US-u-islamcal", "zh-CN-a-myext-x-private", "en-a-myext-b-another"),
]


@pytest.mark.parametrize("tag", RFC_5646_APPENDIX_A)
def test_the_examples_of_rfc_5646_are_language_tags_in_any_case(tag: str) -> None:
    assert is_language_tag(tag)
    assert is_language_tag(tag.upper())
    assert is_language_tag(tag.lower())
    check_owner("w", None, tag, workspace_required=True)


def test_the_grandfathered_tags_of_rfc_5646_are_language_tags() -> None:
    # Section 2.1: registered before the syntax was as it is. Appendix A shows i-enochian.
    irregular = {
        *("en-GB-oed", "i-ami", "i-bnn", "i-default", "i-enochian", "i-hak", "i-klingon", "i-lux"),
        *("i-mingo", "i-navajo", "i-pwn", "i-tao", "i-tay", "i-tsu", "sgn-BE-FR", "sgn-BE-NL"),
        "sgn-CH-DE",
    }
    regular = {
        *("art-lojban", "cel-gaulish", "no-bok", "no-nyn", "zh-guoyu", "zh-hakka", "zh-min"),
        *("zh-min-nan", "zh-xiang"),
    }
    assert {tag for tag in irregular | regular if not is_language_tag(tag)} == set()


@pytest.mark.parametrize("tag", ["abcd", "abcdefgh", "en-1abc", "en-x-1", "x-a-b-c", "en-0-ab"])
def test_what_the_syntax_allows_is_a_language_tag_though_nobody_registered_it(tag: str) -> None:
    assert is_language_tag(tag)


@pytest.mark.parametrize(
    "tag",
    [
        *("de-419-DE", "a-DE"),  # from appendix A
        *("", "-", "e", "1", "12", "abcdefghi", "en-", "-en", "en--US", "en-US-", "en_US", "en US"),
        *(
            "en\n",
            "\nen",
            " en",
            "en ",
            "ä",
            "dé",
            "\u212aa",
            "en-\u017fh",
            "en-\uff35S",
            "e1",
            "en-1",
        ),
        *("en-u", "en-a-b", "en-x", "x", "x-", "en-x-abcdefghi", "en-abcdefghi", "en-Latn-Cyrl"),
        *("en-US-GB", "zh-Hans-cmn", "zh-aaa-bbb-ccc-ddd", "en-12a", "en,de", "*", "en;q=1", "C"),
        *("en.UTF-8", "en\x00", "i-unregistered"),
    ],
    ids=ascii,
)
def test_what_the_syntax_does_not_allow_is_no_language_tag(tag: str) -> None:
    assert not is_language_tag(tag)
    assert faulty_fields("w", None, tag) == ["/language"]


_letters = "abcdefghijklmnopqrstuvwxyz"
_alphanumerics = _letters + "0123456789"


def _subtags(alphabet: str, shortest: int, longest: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=shortest, max_size=longest)


@st.composite
def _tags(draw: st.DrawFn) -> str:
    parts = [draw(_subtags(_letters, 2, 3))]
    parts += draw(st.lists(_subtags(_letters, 3, 3), max_size=3))
    parts += draw(st.lists(_subtags(_letters, 4, 4), max_size=1))
    parts += draw(st.lists(_subtags(_letters, 2, 2) | _subtags("0123456789", 3, 3), max_size=1))
    parts += draw(st.lists(_subtags(_alphanumerics, 5, 8), max_size=2))
    for singleton in draw(st.lists(st.sampled_from("0abuwyz"), unique=True, max_size=2)):
        parts += [
            singleton,
            *draw(st.lists(_subtags(_alphanumerics, 2, 8), min_size=1, max_size=2)),
        ]
    if draw(st.booleans()):
        parts += ["x", *draw(st.lists(_subtags(_alphanumerics, 1, 8), min_size=1, max_size=2))]
    return "-".join(parts)


@given(_tags().filter(lambda tag: len(tag) <= 35))
def test_every_tag_that_the_syntax_makes_is_one_up_to_the_35_characters_all_must_take(
    tag: str,
) -> None:
    # RFC 5646 section 4.4.1: a limit must allow for at least 35 characters.
    assert is_language_tag(tag)


@given(st.text(max_size=12) | st.text(_alphanumerics + "-", max_size=35))
def test_a_language_tag_is_ascii_in_subtags_of_1_to_8_characters(tag: str) -> None:
    if is_language_tag(tag):
        assert tag.isascii()
        assert all(1 <= len(part) <= 8 and part.isalnum() for part in tag.split("-"))


# --- Ids ------------------------------------------------------------------------------------------


@given(st.uuids(version=4))
def test_a_canonical_uuid4_can_be_the_id_of_a_session(value: uuid.UUID) -> None:
    assert is_public_id(str(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f\n",
        " 7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f",
        "7B4F3C1E-9D2A-4B6C-8E1F-0A2B3C4D5E6F",
        "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6F",
        "7b4f3c1e9d2a4b6c8e1f0a2b3c4d5e6f",
        "{7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f}",
        "urn:uuid:7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f",
        "7b4f3c1e-9d2a-1b6c-8e1f-0a2b3c4d5e6f",
        "7b4f3c1e-9d2a-7b6c-8e1f-0a2b3c4d5e6f",
        "7b4f3c1e-9d2a-4b6c-ce1f-0a2b3c4d5e6f",
        "7b4f3c1e-9d2a-4b6c-7e1f-0a2b3c4d5e6f",
        "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6",
        "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6ff",
        "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6g",
        "7b4f3c1e_9d2a_4b6c_8e1f_0a2b3c4d5e6f",
        "00000000-0000-0000-0000-000000000000",
        "\uff17b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f",
        "steps",
        "session",
    ],
    ids=ascii,
)
def test_nothing_else_can_be_the_id_of_a_session_over_http(text: str) -> None:
    assert not is_public_id(text)


@given(st.uuids() | st.uuids(version=4), st.sampled_from([str, lambda each: str(each).upper()]))
def test_an_id_is_public_when_it_is_the_one_spelling_of_a_uuid4(
    value: uuid.UUID, spell: Any
) -> None:
    text = spell(value)
    canonical = value.version == 4 and value.variant == uuid.RFC_4122 and text == str(value)
    assert is_public_id(text) == canonical


@pytest.mark.parametrize("session_id", ["a", "A.b_c-9", ".", "-", "x" * 1000])
def test_an_id_in_python_is_any_word_that_may_stand_in_a_key(session_id: str) -> None:
    check_session_id(session_id)


@pytest.mark.parametrize(
    "session_id",
    ["", " ", "a b", "a\n", "\na", "a:b", "a*", "{a}", "a/b", "ä", "a\x00", "\u0661", "a\udc80"],
    ids=ascii,
)
def test_an_id_that_could_change_the_meaning_of_a_key_is_refused(session_id: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_session_id(session_id)


@pytest.mark.parametrize("session_id", ["short", "task", "token"])
def test_an_id_that_other_keys_begin_with_is_reserved(session_id: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"reserved.*{session_id}"):
        check_session_id(session_id)
    check_session_id(session_id.upper())
    check_session_id(f"{session_id}s")


# --- Views ----------------------------------------------------------------------------------------


def test_a_session_shows_what_the_contract_calls_s() -> None:
    assert view_session("s1", OWNER, STATE) == {
        "session_id": "s1",
        "workspace_id": "w1",
        "user_id": "u1",
        "language": "pt-BR",
        "status": "pending",
        "progress": STATE.progress,
        "metadata": {"plan": "pro", "n": 1000.0},
        "created_at": "2026-01-31T08:15:00.250Z",
        "expires_at": "2026-02-07T08:15:00.250Z",
        "finalized_at": None,
        "revision": 0,
    }


def test_a_finalized_session_tells_since_when_and_which_revision() -> None:
    state = replace(STATE, finalized_ms=CREATED_MS + 2_000, revision=2, status="complete")
    for view in (view_session("s1", OWNER, state), view_progress("s1", state)):
        assert view["finalized_at"] == "2026-01-31T08:15:02.250Z"
        assert view["revision"] == 2
        assert view["status"] == "complete"


def test_progress_shows_status_and_deadline_beside_the_numbers() -> None:
    assert view_progress("s1", STATE) == {
        "session_id": "s1",
        "status": "pending",
        "progress": STATE.progress,
        "finalized_at": None,
        "revision": 0,
        "expires_at": "2026-02-07T08:15:00.250Z",
    }


def test_a_summary_shows_numbers_and_every_step_but_no_answers() -> None:
    summary = view_summary(SESSION, CATALOGUE, frozenset({2, 3}), CREATED_MS + 3_999)
    steps = summary["steps"]
    assert {name: value for name, value in summary.items() if name != "steps"} == {
        "session_id": "s1",
        "status": "pending",
        "language": "pt-BR",
        "finalized_at": None,
        "revision": 0,
        "progress": STATE.progress,
        "metadata": {
            "user_id": "u1",
            "workspace_id": "w1",
            "language": "pt-BR",
            "started_at": "2026-01-31T08:15:00.250Z",
            "custom": {"plan": "pro", "n": 1000.0},
        },
        "stats": {
            "completed_steps": 2,
            "total_steps": 23,
            "completion_percentage": 8.7,
            "session_age_seconds": 3,
            "last_updated": "2026-01-31T08:15:01.250Z",
            "request_count": 0,
            "total_processing_ms": 0,
        },
    }
    assert [each["step_id"] for each in steps] == list(range(1, 24))
    assert steps[:4] == [
        {
            "step_id": 1,
            "key": "evidence_vault",
            "title": "Evidence Vault",
            "required": True,
            "has_draft": False,
            "version": 4,
            "saved_at": "2026-01-31T08:15:00.750Z",
        },
        {
            "step_id": 2,
            "key": "brand_synthesis",
            "title": "Brand Synthesis",
            "required": True,
            "has_draft": True,
        },
        {
            "step_id": 3,
            "key": "strategic_integrity",
            "title": "Strategic Integrity",
            "required": True,
            "has_draft": True,
            "version": 1,
            "saved_at": "2026-01-31T08:15:01.250Z",
        },
        {
            "step_id": 4,
            "key": "truth_confirmation",
            "title": "Truth Confirmation",
            "required": True,
            "has_draft": False,
        },
    ]
    assert [each["step_id"] for each in steps if not each["required"]] == [17, 21, 22]


def test_a_session_made_by_a_host_whose_clock_runs_ahead_is_not_younger_than_nothing() -> None:
    summary = view_summary(SESSION, CATALOGUE, frozenset(), CREATED_MS - 5_000)
    assert summary["stats"]["session_age_seconds"] == 0


@given(objects, st.integers(0, 2**32))
def test_what_a_caller_attached_comes_back_as_it_was(custom: dict[str, Any], seed: int) -> None:
    owner = replace(OWNER, custom=spell(custom, seed).encode())
    assert same(view_session("s1", owner, STATE)["metadata"], custom)
    assert same(describe_owner(owner, CREATED_MS)["custom"], custom)


def test_an_owner_that_is_not_known_is_null_not_absent() -> None:
    owner = Owner(None, None, "en")
    view = view_session("s1", owner, STATE)
    assert view["workspace_id"] is None
    assert view["user_id"] is None
    assert view["metadata"] == {}
    assert json.loads(json.dumps(describe_owner(owner, CREATED_MS))) == {
        "user_id": None,
        "workspace_id": None,
        "language": "en",
        "started_at": "2026-01-31T08:15:00.250Z",
        "custom": {},
    }


def test_the_statuses_are_the_four_of_the_contract() -> None:
    assert [str(each) for each in SessionStatus] == ["pending", "processing", "complete", "error"]


@pytest.mark.parametrize(
    ("at_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
        (1_735_689_599_999, "2024-12-31T23:59:59.999Z"),
        (4_102_444_800_007, "2100-01-01T00:00:00.007Z"),
    ],
)
def test_times_are_written_with_milliseconds_and_z(at_ms: int, text: str) -> None:
    assert rfc3339(at_ms) == text


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_FIRST_MS = -62_135_596_800_000
"""When the year 1 begins."""


@given(st.integers(_FIRST_MS, LAST_MS))
def test_times_are_written_as_the_standard_library_does(at_ms: int) -> None:
    at = _EPOCH + dt.timedelta(milliseconds=at_ms)
    assert rfc3339(at_ms) == at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


_HOUR_MS = 3_600_000
_CLOSE = st.builds(
    lambda at_ms, later_ms: [at_ms + each for each in later_ms],
    st.integers(0, LAST_MS - 3 * _HOUR_MS),
    st.lists(st.integers(0, 3 * _HOUR_MS)),
)


@given(st.lists(st.integers(_FIRST_MS, LAST_MS)) | _CLOSE)
def test_many_times_are_written_as_each_of_them(times_ms: list[int]) -> None:
    assert rfc3339_each(times_ms) == [*map(rfc3339, times_ms)]
