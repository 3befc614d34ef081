from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.headers import (
    EntityTags,
    check_media_type,
    is_request_id,
    parse_entity_tags,
    parse_idempotency_key,
)
from app.errors import InvalidHeaderError, InvalidIdempotencyKeyError, UnsupportedMediaTypeError
from app.onboarding.steps import Tags

LARGE = 100_000
"""Characters in a hostile value. A pattern that backtracks would need years for it, so the tests
with such a value claim no more than that they end."""

ANYTHING = EntityTags(any=True, strong=frozenset(), weak=frozenset())


def tags(*strong: str, weak: tuple[str, ...] = ()) -> EntityTags:
    return EntityTags(any=False, strong=frozenset(strong), weak=frozenset(weak))


# --- Entity tags ----------------------------------------------------------------------------------

# RFC 9110 section 8.8.3 for the tags, section 5.6.1.2 for the lists.
TAGS: dict[str, tuple[list[str], EntityTags | None]] = {
    "nothing sent": ([], None),
    "any": (["*"], ANYTHING),
    "any with space around": ([" * \t"], ANYTHING),
    "one": (['"3"'], tags("3")),
    "space around": ([' \t"3"\t '], tags("3")),
    "two": (['"3", "4"'], tags("3", "4")),
    "two without space": (['"3","4"'], tags("3", "4")),
    "two with much space": (['"3" \t ,\t\t"4"'], tags("3", "4")),
    "two lines": (['"3"', '"4"'], tags("3", "4")),
    "a line with two and one": (['"3", "4"', 'W/"5"'], tags("3", "4", weak=("5",))),
    "the same twice": (['"3", "3"'], tags("3")),
    "a weak one": (['W/"3"'], tags(weak=("3",))),
    "weak and strong": (['W/"3", "3"'], tags("3", weak=("3",))),
    "an empty one": (['""'], tags("")),
    "a weak empty one": (['W/""'], tags(weak=("",))),
    "a star in quotes": (['"*"'], tags("*")),
    "a comma inside": (['"a,b", "c"'], tags("a,b", "c")),
    "a backslash, which escapes nothing": (['"a\\"'], tags("a\\")),
    "every other sign": (
        ['"!#$%&\'()*+,-./:;<=>?@[]^_`{|}~"'],
        tags("!#$%&'()*+,-./:;<=>?@[]^_`{|}~"),
    ),
    "bytes above ASCII": (['"\x80\xff"'], tags("\x80\xff")),
    "empty elements between": (['"3", , ,,"4"'], tags("3", "4")),
    "empty elements before": ([',, "3"'], tags("3")),
    "empty elements behind": (['"3", ,'], tags("3")),
    "an empty line beside one": (['"3"', ""], tags("3")),
    "the checksum of an export": (['"sha256:0a"'], tags("sha256:0a")),
}


@pytest.mark.parametrize(("lines", "expected"), TAGS.values(), ids=TAGS.keys())
def test_entity_tags_are_read_as_rfc_9110_writes_them(
    lines: list[str], expected: EntityTags | None
) -> None:
    assert parse_entity_tags("If-Match", lines) == expected


@pytest.mark.parametrize(
    "lines",
    [
        *(["3"], ['"3'], ['3"'], ["'3'"], ['"3" "4"'], ['"3"; "4"'], ['"a"b"'], ['"3""4"']),
        *(['w/"3"'], ['W"3"'], ['W/ "3"'], ["W/3"], ["W/"], ['W/W/"3"'], ['"3"W/"4"']),
        *(['"a b"'], ['"a\tb"'], ['"a\x7fb"'], ['"a\x00"'], ['"a\n"'], ['"\u0100"'], ['"3"\n']),
        *(["**"], ["*, *"], ['*, "3"'], ['"3", *'], ["*", "*"], ["*", '"3"'], ['"3"', "*"]),
        *(['"3"\u00a0'], ['"3"\x0b,"4"'], ["x"], ['"3", x'], ['x, "3"'], ["W"], ['"']),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("name", ["If-Match", "If-None-Match"])
def test_what_is_no_list_of_tags_is_an_invalid_header_that_names_itself(
    lines: list[str], name: str
) -> None:
    with pytest.raises(InvalidHeaderError, match=f"^{name} "):
        parse_entity_tags(name, lines)


_OPAQUE = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters='"\x7f'), max_size=6
)
_SPACE = st.text(" \t", max_size=2)


@given(
    st.lists(st.tuples(st.booleans(), _OPAQUE, _SPACE, _SPACE), min_size=1, max_size=5),
    st.lists(st.sampled_from([",", ", ,", ",,", " , "]), min_size=5, max_size=5),
    st.integers(0, 5),
)
def test_every_list_of_tags_is_read_however_it_is_spaced_and_split_into_lines(
    elements: list[tuple[bool, str, str, str]], commas: list[str], split: int
) -> None:
    written = [
        f'{before}{"W/" if weak else ""}"{opaque}"{behind}'
        for weak, opaque, before, behind in elements
    ]
    value = written[0]
    for comma, each in zip(commas, written[1:], strict=False):
        value += comma + each
    expected = tags(
        *(opaque for weak, opaque, _, _ in elements if not weak),
        weak=tuple(opaque for weak, opaque, _, _ in elements if weak),
    )
    assert parse_entity_tags("If-Match", [value]) == expected
    assert parse_entity_tags("If-Match", [*written[:split], *written[split:]]) == expected


@given(st.lists(st.text(st.characters(max_codepoint=0xFF), max_size=12), min_size=1, max_size=3))
def test_no_value_raises_anything_but_an_invalid_header(lines: list[str]) -> None:
    with suppress(InvalidHeaderError):
        parse_entity_tags("If-None-Match", lines)


HOSTILE = [
    "," * LARGE,
    ", " * (LARGE // 2),
    " ," * (LARGE // 2) + "x",
    '"",' * (LARGE // 3) + "x",
    '"a", ' * (LARGE // 5) + '"',
    '"a" ' + " " * LARGE + "x",
    '"a"' + " \t" * (LARGE // 2) + ',"',
    '"a"' + (" " * 100 + ",") * (LARGE // 100) + "x",
    'W/"a",' * (LARGE // 6) + "W/",
    "W/" * (LARGE // 2),
    '"' * LARGE,
    '"' + "a" * LARGE,
    "\\" * LARGE,
    '"' + "\\" * LARGE,
    '"' + '\\"' * (LARGE // 2) + "\\",
    "a" * LARGE,
    "a" * LARGE + "\n",
    " " * LARGE + "x y",
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_value_of_100_kilobytes_is_refused_and_holds_nobody_up(value: str) -> None:
    with pytest.raises(InvalidHeaderError):
        parse_entity_tags("If-Match", [value])
    with pytest.raises(InvalidIdempotencyKeyError):
        parse_idempotency_key([value])
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type(value, [], patch=False)
    assert not is_request_id(value)


def test_a_long_list_of_tags_is_read() -> None:
    value = ", ".join(f'"{number}"' for number in range(LARGE // 8))
    read = parse_entity_tags("If-Match", [value])
    assert read is not None
    assert len(read.strong) == LARGE // 8


# --- Tags and versions ----------------------------------------------------------------------------


def test_if_match_compares_strongly_and_if_none_match_weakly() -> None:
    # RFC 9110 section 8.8.3.2: W/"1" is "1" weakly and nothing strongly.
    both = tags("1", weak=("2",))
    assert both.versions(weakly=False) == Tags(versions=frozenset({1}))
    assert both.versions(weakly=True) == Tags(versions=frozenset({1, 2}))
    assert both.match_weakly("1")
    assert both.match_weakly("2")
    assert not both.match_weakly("3")


def test_a_star_stands_for_any_version() -> None:
    assert ANYTHING.versions(weakly=False) == Tags(any_version=True)
    assert ANYTHING.match_weakly("1")


@pytest.mark.parametrize(
    "opaque",
    ["", "0", "01", "+1", "1.0", "1e0", "-1", "a", "*", "1" * 16, "9" * 5000, "\xb2", "1_0"],
)
def test_a_tag_that_is_no_version_of_ours_matches_nothing(opaque: str) -> None:
    assert tags(opaque, weak=(opaque,)).versions(weakly=True) == Tags()


@given(st.integers(1, 10**15 - 1))
def test_a_version_is_matched_by_the_tag_that_it_was_given_out_with(version: int) -> None:
    read = parse_entity_tags("If-Match", [f'"{version}"'])
    assert read is not None
    assert read.versions(weakly=False).match(version)
    assert not read.versions(weakly=False).match(version + 1)


# --- Idempotency-Key ------------------------------------------------------------------------------

KEYS: dict[str, tuple[list[str], str | None]] = {
    "nothing sent": ([], None),
    "bare": (["a-b_c.d~9"], "a-b_c.d~9"),
    "quoted": (['"a-b_c.d~9"'], "a-b_c.d~9"),
    "space around": ([" \tkey\t "], "key"),
    "space around quotes": ([' "key" '], "key"),
    "a uuid": (["7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f"], "7b4f3c1e-9d2a-4b6c-8e1f-0a2b3c4d5e6f"),
    "one character": (["a"], "a"),
    "255 characters": (["a" * 255], "a" * 255),
    "255 characters quoted": (['"' + "a" * 255 + '"'], "a" * 255),
    "255 escaped characters": (['"' + '\\"' * 255 + '"'], '"' * 255),
    "quotes inside": (['"a\\"b"'], 'a"b'),
    "a backslash inside": (['"a\\\\b"'], "a\\b"),
    "an escaped backslash before an n": (['"a\\\\n"'], "a\\n"),
    "space inside": (['"a b"'], "a b"),
    "signs inside": (['"!#$%&\'()*+,-./:;<=>?@[]^_`{|}~"'], "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"),
}


@pytest.mark.parametrize(("lines", "key"), KEYS.values(), ids=KEYS.keys())
def test_an_idempotency_key_is_a_structured_field_string_or_the_same_bare(
    lines: list[str], key: str | None
) -> None:
    assert parse_idempotency_key(lines) == key


@pytest.mark.parametrize(
    "lines",
    [
        *(
            [""],
            [" "],
            ['""'],
            ['"'],
            ['"a'],
            ['a"'],
            ["a b"],
            ["a,b"],
            ["a;b=1"],
            ["a/b"],
            ["a=b"],
        ),
        *(
            ['"a" "b"'],
            ['"a", "b"'],
            ['"a"b"'],
            ['"a\\b"'],
            ['"a\\n"'],
            ['"a\\"'],
            ["'a'"],
            [":YQ==:"],
        ),
        *(['"a\tb"'], ['"a\x00"'], ['"a\x7f"'], ['"ä"'], ["ä"], ["a\n"], ['"a"\n'], ['"\u0100"']),
        *(
            ["a" * 256],
            ['"' + "a" * 256 + '"'],
            ['"' + "\\\\" * 256 + '"'],
            ["a", "a"],
            ['"a"', "b"],
        ),
    ],
    ids=lambda lines: ascii(lines)[:24],
)
def test_any_other_idempotency_key_is_refused(lines: list[str]) -> None:
    with pytest.raises(InvalidIdempotencyKeyError):
        parse_idempotency_key(lines)


@given(st.text("ABCXYZabcxyz019._~-", min_size=1, max_size=255))
def test_a_key_means_the_same_bare_and_in_quotes(key: str) -> None:
    assert parse_idempotency_key([key]) == parse_idempotency_key([f'"{key}"']) == key


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=60))
def test_any_printable_key_can_be_sent_in_quotes(key: str) -> None:
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    assert parse_idempotency_key([f'"{escaped}"']) == key


@given(st.lists(st.text(st.characters(max_codepoint=0xFF), max_size=8), min_size=1, max_size=2))
def test_no_key_raises_anything_but_an_invalid_idempotency_key(lines: list[str]) -> None:
    try:
        key = parse_idempotency_key(lines)
    except InvalidIdempotencyKeyError:
        return
    assert key
    assert key.isascii()
    assert key.isprintable()


# --- Media types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        " application/json ",
        "application/json;charset=utf-8",
        "application/json; charset=UTF-8",
        'application/json; charset="utf-8"',
        "application/json ; CHARSET=utf-8",
        "application/json; q=1; charset=utf-8",
        "application/json;",
    ],
)
@pytest.mark.parametrize(
    "codings",
    [[], ["identity"], ["Identity"], [" identity "], ["chunked"], ["identity", "chunked"]],
)
def test_json_in_utf_8_is_taken(content_type: str, codings: list[str]) -> None:
    check_media_type(content_type, codings, patch=False)
    check_media_type(content_type, codings, patch=True)


def test_the_media_type_of_a_merge_patch_is_taken_for_a_patch_alone() -> None:
    check_media_type("application/merge-patch+json; charset=utf-8", [], patch=True)
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type("application/merge-patch+json", [], patch=False)


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        (None, None),
        ("", None),
        ("text/plain", None),
        ("text/json", None),
        ("application/jsonp", None),
        ("application/json-seq", None),
        ("application/ld+json", None),
        ("application/json-patch+json", None),
        ("application/*", None),
        ("application", None),
        ("multipart/form-data; boundary=a", None),
        ("application/x-www-form-urlencoded", None),
        ("application/json, application/json", None),
        ("application/json; charset=utf-16", None),
        ("application/json; charset=latin-1", None),
        ('application/json; charset="iso-8859-1"', None),
        ("application/json; charset=utf-8; charset=utf-16", None),
        ("application/json", "gzip"),
        ("application/json", "identity, gzip"),
        ("application/json", "br"),
    ],
)
def test_any_other_media_type_charset_or_encoding_is_unsupported(
    content_type: str | None, encoding: str | None
) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type(content_type, [] if encoding is None else [encoding], patch=True)


def test_a_coding_is_unsupported_whichever_line_names_it() -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type("application/json", ["identity", "gzip"], patch=False)


@given(st.text(st.characters(max_codepoint=0xFF), max_size=30), st.booleans())
def test_no_content_type_raises_anything_but_an_unsupported_media_type(
    value: str, patch: bool
) -> None:
    for content_type in (value, "application/json;" + value, "application/json"):
        for codings in ([], [value]):
            with suppress(UnsupportedMediaTypeError):
                check_media_type(content_type, codings, patch=patch)


# --- X-Request-ID ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a", "A.b_c-9", "-", "x" * 128])
def test_a_request_id_of_safe_characters_is_taken_over(value: str) -> None:
    assert is_request_id(value)


@pytest.mark.parametrize(
    "value",
    ["", " ", "a b", "a\n", "a\r\nX: y", "x" * 129, "ä", "a/b", "{}", "\u0661", '"a"', "a~b"],
)
def test_any_other_request_id_is_not(value: str) -> None:
    assert not is_request_id(value)


@given(st.text(max_size=10))
def test_a_request_id_that_is_taken_over_can_stand_in_a_header_and_in_a_log(value: str) -> None:
    if is_request_id(value):
        assert value.isascii()
        assert value.isprintable()
        assert " " not in value
