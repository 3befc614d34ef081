import re
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.onboarding.files import FileInfo, clean_filename, is_media_type, view_file

# --- Names ----------------------------------------------------------------------------------------

NAMES = {
    "report.pdf": "report.pdf",
    "a b (1).txt": "a b (1).txt",
    "Übersicht 中文 \U0001f600.txt": "Übersicht 中文 \U0001f600.txt",
    "no ending": "no ending",
    "a.tar.gz": "a.tar.gz",
    "../../etc/passwd": "passwd",
    "..\\..\\boot.ini": "boot.ini",
    "C:\\Users\\x\\y.txt": "y.txt",
    "/absolute/x.txt": "x.txt",
    "\\\\host\\share\\x.txt": "x.txt",
    "a/b\\c.txt": "c.txt",
    ".htaccess": "htaccess",
    "..hidden": "hidden",
    "name.": "name",
    " name. . ": "name",
    "a\r\nSet-Cookie: b.txt": "aSet-Cookie_ b.txt",
    "a\x00.txt": "a.txt",
    "a\tb\x7f\x85.txt": "ab.txt",
    "gpj.\u202etxt": "gpj.txt",
    "a\u200bb.txt": "ab.txt",
    "\ufeffa.txt": "a.txt",
    "\ud800a.txt": "a.txt",
    '<a href="x">?*|': "_a href=_x_____",
    "a%00b.txt": "a%00b.txt",
}
"""What is sent, and what is kept of it."""

NOTHING_LEFT = ["", ".", "..", "...", " ", "/", "a/", "\\", "../", "\x00", "\r\n", "\u202e", ". . "]


@pytest.mark.parametrize(("sent", "kept"), NAMES.items(), ids=map(ascii, NAMES))
def test_a_name_keeps_what_a_file_may_be_called(sent: str, kept: str) -> None:
    assert clean_filename(sent, "other") == kept


@pytest.mark.parametrize("sent", [None, *NOTHING_LEFT], ids=ascii)
def test_a_name_of_which_nothing_is_left_is_another_one(sent: str | None) -> None:
    assert clean_filename(sent, "other.bin") == "other.bin"


@pytest.mark.parametrize("ending", [".pdf", ".tar", ".éé"])
@pytest.mark.parametrize("letter", ["a", "é", "中", "\U0001f600"])
def test_a_name_that_is_too_long_loses_its_middle_and_keeps_its_ending(
    letter: str, ending: str
) -> None:
    name = clean_filename(letter * 300 + ending, "other")

    assert name.endswith(letter + ending)
    assert 250 < len(name.encode()) <= 255
    assert set(name) == {letter, *ending}


def test_what_is_no_ending_is_cut_off() -> None:
    assert clean_filename("a" * 300, "other") == "a" * 255
    assert clean_filename("a." + "b" * 300, "other") == "a." + "b" * 253


_TEXTS = st.text(st.characters(), max_size=30) | st.text('a.é /\\:"\r\n\u202e ', max_size=20)


@given(_TEXTS | st.builds(lambda text, count: text * count, _TEXTS, st.integers(1, 100)))
@example("a" * 250 + " " * 10 + "b")
@example("a" * 254 + "." * 10 + "b" * 30)
@example("a" * 253 + "é" + "é")
def test_any_text_becomes_a_name_that_every_file_system_takes(text: str) -> None:
    name = clean_filename(text, "other")

    assert 1 <= len(name.encode()) <= 255
    assert name.isprintable()
    assert re.search(r'[/\\<>:"|?*]', name) is None
    assert name == name.strip(". ")


@given(_TEXTS)
def test_a_clean_name_is_not_cleaned_again(text: str) -> None:
    name = clean_filename(text, "other")

    assert clean_filename(name, "another") == name


@pytest.mark.parametrize("sent", ["a" * 300_000, "a" * 300_000 + ".txt", "." * 300_000 + "a"])
def test_a_long_name_is_cut_in_a_moment(sent: str) -> None:
    begun_s = process_time()
    clean_filename(sent, "other")
    assert process_time() - begun_s < 0.5


# --- Types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("application/pdf", "text/html; charset=utf-8", 'text/plain;charset="utf-8"'),
        *("image/svg+xml", "application/vnd.ms-excel.sheet.macroEnabled.12", "a/b;c=d;e=f"),
        *('a/b; c="d e; \\" f"', "Text/HTML", "*/*", "multipart/form-data; boundary=x"),
    ],
)
def test_a_media_type_is_one(text: str) -> None:
    assert is_media_type(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "text", "text/", "/html", "text/html;", "text/html; charset", "a/b/c", "a /b"),
        *("text/html\r\nX: y", "text/html\n", 'a/b; c="d', 'a/b; c="\x00"', "a/é", "a/b; c=é"),
        *("a/" + "b" * 254, " a/b", "a/b ", "a/b,c/d"),
    ],
    ids=ascii,
)
def test_what_is_no_media_type_is_none(text: str) -> None:
    assert not is_media_type(text)


def test_a_file_is_described_without_what_only_the_store_needs() -> None:
    info = FileInfo(
        transfer="0f",
        parts=3,
        size=1_200_000,
        content_type="application/pdf",
        filename="a.pdf",
        checksum="sha256:00",
        is_document=False,
        stored_ms=1_767_268_800_000,
    )

    assert view_file("s1", info) == {
        "session_id": "s1",
        "checksum": "sha256:00",
        "size": 1_200_000,
        "content_type": "application/pdf",
        "filename": "a.pdf",
        "stored_at": "2026-01-01T12:00:00.000Z",
    }
