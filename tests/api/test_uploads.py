"""A session that begins with a file: the form that it comes in, and the paths of its answers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.onboarding.files import PART_BYTES
from tests.api.helpers import (
    ADD_EVENT,
    DELETE_SESSION,
    DOWNLOAD,
    GET_EVENTS,
    GET_LANGUAGE,
    GET_SESSION,
    GET_SHORT_STATUS,
    GET_UPLOAD,
    SAVE,
    SESSION,
    SET_STATUS,
    answer_of,
    exchange,
    keys_of,
    pointers_of,
    problem_of,
)
from tests.api.test_results import (
    check_later_write_renews,
    chunked,
    half_sent,
    in_pieces,
    name_in,
)
from tests.service import BASE

UPLOAD = "/api/upload"
BOUNDARY = "----x7Y"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
FORM_LINES = [*FORM.items()]


def field(name: str, value: bytes, more: str = "", lines: str = "") -> bytes:
    """Write a part of a form: `more` follows its name, `lines` its disposition."""
    head = f'Content-Disposition: form-data; name="{name}"{more}\r\n{lines}\r\n'
    return head.encode() + value


def file_field(content: bytes, name: str = "a.pdf", content_type: str = "application/pdf") -> bytes:
    return field("file", content, f'; filename="{name}"', f"Content-Type: {content_type}\r\n")


def form(*fields: bytes, end: bytes = b"--\r\n", boundary: str = BOUNDARY) -> bytes:
    """Write a whole form."""
    mark = b"--" + boundary.encode()
    return b"".join(mark + b"\r\n" + each + b"\r\n" for each in fields) + mark + end


async def send(api: AsyncClient, body: bytes | AsyncIterator[bytes], **headers: str) -> Response:
    fields = {**FORM, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await api.post(UPLOAD, content=body, headers=fields)


async def uploaded(api: AsyncClient, body: bytes | AsyncIterator[bytes]) -> str:
    """Send a form that can be taken, and give the id of the session."""
    return str(answer_of(await send(api, body), 201)["session_id"])


async def left(raw: Redis) -> list[str]:
    """Give every key that a session may have left."""
    keys = [key.decode() async for key in raw.scan_iter("onboarding:*", count=1000)]
    return [
        key
        for key in sorted(keys)
        if not key.startswith(("onboarding:index:", "onboarding:canary"))
    ]


async def check_upload(api: AsyncClient, session_id: str, content: bytes, name: str) -> None:
    response = await GET_UPLOAD.send(api, session_id)
    assert response.status_code == 200
    assert response.content == content
    assert name_in(response.headers["content-disposition"]) == name


# --- What an upload makes -------------------------------------------------------------------------


async def test_an_upload_begins_a_session_of_nobody_with_the_file(
    api: AsyncClient, raw: Redis
) -> None:
    content = b"%PDF-1.7\r\n\x00\xff"
    sent = await send(api, form(file_field(content), field("language", b"pt-BR")))

    answer = answer_of(sent, 201)
    session_id = answer["session_id"]
    assert answer == {"session_id": session_id, "status": "pending"}
    assert sent.headers["location"] == f"{BASE}/{session_id}"
    assert sent.headers["cache-control"] == "no-store"

    session = answer_of(await GET_SESSION.send(api, session_id))
    assert session.keys() >= SESSION
    assert (session["workspace_id"], session["user_id"]) == (None, None)
    assert (session["language"], session["status"]) == ("pt-BR", "pending")
    short = answer_of(await GET_SHORT_STATUS.send(api, session_id))
    assert short == {"status": "pending", "progress": 0, "stage": None, "message": None}

    await check_upload(api, session_id, content, "a.pdf")
    response = await GET_UPLOAD.send(api, session_id)
    assert response.headers["content-type"] == "application/pdf"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["etag"] == f'"sha256:{hashlib.sha256(content).hexdigest()}"'
    assert response.headers["cache-control"] == "no-store"
    assert {await raw.pttl(key) > 0 for key in await keys_of(raw, session_id)} == {True}


async def test_a_file_for_which_there_is_no_session_any_more_leaves_nothing(
    serve: Callable[..., Any], raw: Redis
) -> None:
    api = await serve(max_sessions=1)
    await uploaded(api, form(file_field(b"content")))
    before = await left(raw)
    refused = await send(api, form(file_field(b"content")))
    problem_of(refused, "capacity_reached")
    assert int(refused.headers["retry-after"]) > 0
    assert await left(raw) == before


async def test_a_session_with_a_file_is_one_like_any_other(api: AsyncClient, raw: Redis) -> None:
    session_id = await uploaded(api, form(file_field(b"x" * (PART_BYTES + 1))))
    answer_of(await SAVE.send(api, session_id))
    answer_of(await SET_STATUS.send(api, session_id))
    answer_of(await ADD_EVENT.send(api, session_id), 201)
    result = {"content-type": "text/plain"}
    answer_of(await api.put(f"{BASE}/{session_id}/result", content=b"R", headers=result), 201)

    short = answer_of(await GET_SHORT_STATUS.send(api, session_id))
    assert (short["status"], short["progress"], short["stage"]) == ("processing", 10, "a stage")
    download = await DOWNLOAD.send(api, session_id)
    assert (download.content, download.headers["content-type"]) == (b"R", "text/plain")
    types = [event["type"] for event in answer_of(await GET_EVENTS.send(api, session_id))["events"]]
    assert types == [
        *("session_created", "step_saved", "status_changed", "progress", "result_stored")
    ]
    answer_of(await DELETE_SESSION.send(api, session_id))
    assert await left(raw) == []


async def test_a_session_without_a_file_has_none(api: AsyncClient, session_id: str) -> None:
    problem_of(await GET_UPLOAD.send(api, session_id), "upload_not_found")


@pytest.mark.parametrize(
    "size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 17]
)
async def test_a_file_of_any_size_comes_back_as_it_was_sent(
    api: AsyncClient, raw: Redis, size: int
) -> None:
    content = (bytes(range(256)) * (size // 256 + 1))[:size]

    session_id = await uploaded(api, form(file_field(content)))

    await check_upload(api, session_id, content, "a.pdf")
    parts = [key for key in await left(raw) if ":upload:" in key]
    assert len(parts) == -(-size // PART_BYTES)


async def test_who_has_the_file_is_not_sent_it_again(api: AsyncClient) -> None:
    session_id = await uploaded(api, form(file_field(b"x" * 1000)))
    first = await GET_UPLOAD.send(api, session_id)

    again = await GET_UPLOAD.send(api, session_id, if_none_match=first.headers["etag"])
    head = await exchange(api, "HEAD", GET_UPLOAD.target.replace("{id}", session_id))

    assert (again.status_code, again.content) == (304, b"")
    assert (head.status_code, head.headers["content-length"]) == (200, "1000")


async def test_a_client_library_sends_a_form_that_is_taken(api: AsyncClient) -> None:
    files = {"file": ("Übersicht 中.txt", b"text", "text/plain; charset=utf-8")}

    response = await api.post(UPLOAD, files=files, data={"language": "de"})

    session_id = answer_of(response, 201)["session_id"]
    await check_upload(api, session_id, b"text", "Übersicht 中.txt")
    assert answer_of(await GET_LANGUAGE.send(api, session_id))["language"] == "de"
    got = await GET_UPLOAD.send(api, session_id)
    assert got.headers["content-type"] == "text/plain; charset=utf-8"


# --- How the form comes ---------------------------------------------------------------------------

TRICKY = (
    b"\r\n--" + BOUNDARY[:-1].encode() + b"\r\n\r\n-\r\n--\r\n\r--" + BOUNDARY.encode() + b"\r\n\r"
)
"""A content that nearly ends a part several times."""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
async def test_a_form_may_come_in_pieces_of_any_size(api: AsyncClient, size: int) -> None:
    body = form(field("other", b"o"), file_field(TRICKY), field("language", b"de"))
    pieces = chunked(in_pieces(body, size))

    lines = [*FORM_LINES, ("transfer-encoding", "chunked")]
    response = await exchange(api, "POST", UPLOAD, lines, pieces)

    session_id = answer_of(response, 201)["session_id"]
    await check_upload(api, session_id, TRICKY, "a.pdf")
    assert answer_of(await GET_LANGUAGE.send(api, session_id))["language"] == "de"


@pytest.mark.parametrize(
    "fields",
    [
        [file_field(b"F"), field("language", b"de")],
        [field("language", b"de"), file_field(b"F")],
        [field("a", b"1"), field("language", b" de "), field("b", b"x" * 50_000), file_field(b"F")],
        [file_field(b"F"), field("language", b"de", lines="Content-Type: text/plain\r\n")],
        [field("language", b"fr"), file_field(b"F"), field("language", b"de")],
    ],
    ids=["after the file", "before it", "among others", "with a type", "twice"],
)
async def test_the_language_may_stand_anywhere(api: AsyncClient, fields: list[bytes]) -> None:
    session_id = await uploaded(api, form(*fields))

    assert answer_of(await GET_LANGUAGE.send(api, session_id))["language"] == "de"
    await check_upload(api, session_id, b"F", "a.pdf")


async def test_a_form_without_a_language_speaks_english(api: AsyncClient) -> None:
    for fields in ([file_field(b"F")], [file_field(b"F"), field("language", b"")]):
        session_id = await uploaded(api, form(*fields))
        assert answer_of(await GET_LANGUAGE.send(api, session_id))["language"] == "en"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(file_field(b"F"), end=b"--"), FORM["content-type"]),
        (form(file_field(b"F"), end=b"--\r\nwhat comes after"), FORM["content-type"]),
        (b"\r\n" + form(file_field(b"F")), FORM["content-type"]),
        (form(file_field(b"F"), boundary="a b'(c)"), 'multipart/form-data; boundary="a b\'(c)"'),
        (form(file_field(b"F"), boundary="z" * 70), f"multipart/form-data; boundary={'z' * 70}"),
        (form(file_field(b"F")), f"Multipart/Form-Data;boundary={BOUNDARY}; charset=utf-8"),
        (form(file_field(b"F").replace(b"Disposition: ", b"disposition:")), FORM["content-type"]),
    ],
    ids=[
        *("no line end behind it", "something behind it", "a line end before it"),
        *("a quoted boundary", "a long boundary", "other letters", "a head in other letters"),
    ],
)
async def test_a_form_may_be_written_in_other_ways(
    api: AsyncClient, body: bytes, content_type: str
) -> None:
    response = await send(api, body, content_type=content_type)
    session_id = answer_of(response, 201)["session_id"]
    await check_upload(api, session_id, b"F", "a.pdf")


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ('; filename="../../x.pdf"', "x.pdf"),
        ('; filename="C:\\dir\\x.pdf"', "x.pdf"),
        ('; filename="a\\"b.pdf"', "a_b.pdf"),
        ('; filename="a%22b.pdf"', "a%22b.pdf"),
        ('; filename="ü 中.pdf"', "ü 中.pdf"),
        (f'; filename="{"a" * 300}.pdf"', "a" * 251 + ".pdf"),
        ('; filename=""', "upload.bin"),
        ("", "upload.bin"),
        ('; filename=".."', "upload.bin"),
    ],
    ids=["path", "Windows", "quote", "escape", "UTF-8", "long", "empty", "none", "dots"],
)
async def test_a_file_is_kept_under_a_name_that_harms_nobody(
    api: AsyncClient, sent: str, name: str
) -> None:
    session_id = await uploaded(api, form(field("file", b"F", sent)))
    await check_upload(api, session_id, b"F", name)
    response = await GET_UPLOAD.send(api, session_id)
    assert response.headers["content-type"] == "application/octet-stream"


# --- What is no upload ----------------------------------------------------------------------------

TWO_FILES = [file_field(b"F"), file_field(b"G", "b.pdf")]
LARGE = file_field(b"x" * (2 * PART_BYTES))

BAD_FORMS: dict[str, tuple[bytes, str | None]] = {
    # What is sent, and the member at fault.
    "no file": (form(field("language", b"de")), "/file"),
    "another field": (form(field("files", b"F", '; filename="a.pdf"')), "/file"),
    "no field": (form(), "/file"),
    "two files": (form(*TWO_FILES), "/file"),
    "two large files": (form(LARGE, LARGE), "/file"),
    "no language": (form(LARGE, field("language", b"english language")), "/language"),
    "a language that is not UTF-8": (
        form(file_field(b"F"), field("language", b"\xff")),
        "/language",
    ),
    "a language without an end": (form(field("language", b"e" * 10_000), file_field(b"F")), None),
    "no end": (form(LARGE, end=b""), None),
    "half an end": (form(LARGE, end=b"-"), None),
    "another part to come": (form(LARGE, end=b"\r\n"), None),
    "cut in the file": (form(LARGE)[:-50], None),
    "cut in a head": (form(file_field(b"F"))[:60], None),
    "another boundary": (form(LARGE, boundary="other"), None),
    "nothing": (b"", None),
    "no form": (b'{"file":"F"}', None),
    "a head without a name": (form(b": x\r\n\r\nF"), None),
    "a head without an end": (form(b"Content-Disposition: " + b"x" * 100_000), None),
    "many heads": (form(b"X-A: b\r\n" * 1000 + b"\r\nF"), None),
    "a head that is none": (form(b"no head\r\n\r\nF"), None),
}


@pytest.mark.parametrize(("body", "pointer"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
async def test_what_is_no_form_with_one_file_is_refused_and_leaves_nothing(
    api: AsyncClient, raw: Redis, body: bytes, pointer: str | None
) -> None:
    problem = problem_of(await send(api, body), "invalid_request")

    if pointer is not None:
        assert pointers_of(problem) == {pointer}
    assert await left(raw) == []


@pytest.mark.parametrize("content_type", ["pdf", "a/b/c", "a/b;", "text/plain\tx/y"])
async def test_a_file_of_no_type_is_refused(
    api: AsyncClient, raw: Redis, content_type: str
) -> None:
    body = form(file_field(b"F", content_type=content_type))
    problem_of(await send(api, body), "invalid_header")
    assert await left(raw) == []


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", ""],
)
async def test_another_type_is_not_taken(api: AsyncClient, raw: Redis, content_type: str) -> None:
    response = await send(api, form(file_field(b"F")), content_type=content_type)
    problem_of(response, "unsupported_media_type")
    assert await left(raw) == []


async def test_a_form_says_what_its_boundary_is(api: AsyncClient, raw: Redis) -> None:
    for parameters in ("", "; boundary=", '; boundary=""', f"; boundary={'b' * 71}"):
        content_type = f"multipart/form-data{parameters}"
        response = await send(api, form(file_field(b"F")), content_type=content_type)
        problem_of(response, "invalid_request")
    assert await left(raw) == []


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
async def test_a_compressed_form_is_not_taken(api: AsyncClient, raw: Redis, coding: str) -> None:
    response = await send(api, form(file_field(b"F")), content_encoding=coding)
    problem_of(response, "unsupported_media_type")
    assert await left(raw) == []


async def test_an_upload_is_made_with_post(api: AsyncClient) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        response = await exchange(api, method, UPLOAD)
        problem_of(response, "method_not_allowed")
        assert response.headers["allow"] == "POST"


async def test_paths_beside_those_of_the_question_answer_system_are_none(
    api: AsyncClient, session_id: str
) -> None:
    for path in ("/api/upload/", "/api/status", "/api/download", f"/api/result/{session_id}"):
        for method in ("GET", "POST"):
            problem_of(await exchange(api, method, path), "not_found")
    for path in ("/api/status", "/api/download"):
        response = await exchange(api, "POST", f"{path}/{session_id}")
        problem_of(response, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD"


# --- Sizes ----------------------------------------------------------------------------------------


async def test_a_file_of_exactly_the_limit_is_taken_and_a_byte_more_is_not(
    serve: Callable[..., Any], raw: Redis
) -> None:
    limit = PART_BYTES + 1000
    api = await serve(max_upload_bytes=limit)
    for pieces in (1, 10):
        for beyond in (1, 30_000):
            body = form(file_field(b"x" * (limit + beyond)))
            sent = in_pieces(body, len(body) // pieces + 1) if pieces > 1 else body
            problem_of(await send(api, sent), "payload_too_large")
            assert await left(raw) == []

    session_id = await uploaded(api, form(file_field(b"x" * limit), field("language", b"de")))
    assert len((await GET_UPLOAD.send(api, session_id)).content) == limit


async def test_an_upload_past_the_limit_is_refused_without_being_read(
    api: AsyncClient, raw: Redis
) -> None:
    for length in (11 * 1024 * 1024, 10**12):
        lines = [*FORM_LINES, ("content-length", str(length))]
        response = await exchange(api, "POST", UPLOAD, lines)
        problem_of(response, "payload_too_large")
    assert await left(raw) == []


@pytest.mark.parametrize("where", ["in the file", "beside the file"])
async def test_an_upload_without_an_end_is_refused_early_and_leaves_nothing(
    serve: Callable[..., Any], raw: Redis, where: str
) -> None:
    limit = 2 * 1024 * 1024
    api = await serve(max_upload_bytes=limit)
    begin = form(file_field(b"") if where == "in the file" else field("other", b""), end=b"")
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield begin.rpartition(b"\r\n--")[0]
        while sent < 20 * limit:
            sent += 65_536
            yield b"x" * 65_536

    lines = [*FORM_LINES, ("transfer-encoding", "chunked")]
    response = await exchange(api, "POST", UPLOAD, lines, chunked(endless()))

    problem_of(response, "payload_too_large")
    assert sent < 10 * limit
    assert await left(raw) == []


async def test_the_other_calls_take_no_more_for_it(api: AsyncClient, session_id: str) -> None:
    body = form(file_field(b"F"))
    for target in (f"{BASE}/{session_id}/status", f"{BASE}/{session_id}/language"):
        response = await api.put(target, content=body, headers=FORM)
        problem_of(response, "unsupported_media_type")


# --- What does not arrive -------------------------------------------------------------------------


async def until_parts(raw: Redis, count: int) -> list[str]:
    """Wait until the store holds so many keys of uploads, and give them."""
    async with asyncio.timeout(10):
        while len(found := await left(raw)) != count:
            await asyncio.sleep(0.002)
    return found


async def test_an_upload_whose_sender_leaves_leaves_nothing(api: AsyncClient, raw: Redis) -> None:
    body = form(file_field(b"x" * 4 * PART_BYTES))
    for count in (0, 1, 3):
        sent = body[: count * PART_BYTES + 400]
        async with half_sent(api, "POST", UPLOAD, sent, len(body), FORM_LINES):
            found = await until_parts(raw, count)
            # Until then they can end by themselves, and name nothing that anybody could ask for.
            assert all(":upload:" in key for key in found)
            assert {await raw.pttl(key) > 0 for key in found} <= {True}
        await until_parts(raw, 0)


async def test_an_upload_that_ends_before_its_length_leaves_nothing(
    api: AsyncClient, raw: Redis
) -> None:
    body = form(file_field(b"x" * 2 * PART_BYTES))
    sending = half_sent(api, "POST", UPLOAD, body, len(body) + 10, FORM_LINES)
    async with sending as (_, writer):
        await until_parts(raw, 2)
        writer.write_eof()
        await until_parts(raw, 0)


async def test_a_slow_upload_is_waited_for_as_long_as_it_gets_on(
    serve: Callable[..., Any],
) -> None:
    deadline_s, pieces = 0.6, 8
    api = await serve(request_deadline_s=deadline_s)
    content = b"x" * 8000
    body = form(file_field(content))
    loop = asyncio.get_running_loop()

    async def slowly() -> AsyncIterator[bytes]:
        async for piece in in_pieces(body, len(body) // pieces + 1):
            yield piece
            await asyncio.sleep(deadline_s / 5)

    begun_s = loop.time()
    lines = [*FORM_LINES, ("content-length", str(len(body)))]
    response = await exchange(api, "POST", UPLOAD, lines, slowly())

    assert loop.time() - begun_s > deadline_s
    await check_upload(api, answer_of(response, 201)["session_id"], content, "a.pdf")


async def test_an_upload_that_stalls_is_given_up_and_leaves_nothing(
    serve: Callable[..., Any], raw: Redis
) -> None:
    api = await serve(request_deadline_s=0.3)
    body = form(file_field(b"x" * 3 * PART_BYTES))

    async def stalling() -> AsyncIterator[bytes]:
        yield body[: 2 * PART_BYTES]

    lines = [*FORM_LINES, ("content-length", str(len(body)))]
    response = await exchange(api, "POST", UPLOAD, lines, stalling())

    problem_of(response, "deadline_exceeded")
    await until_parts(raw, 0)


async def test_a_file_lives_on_with_its_session(api: AsyncClient, raw: Redis) -> None:
    session_id = await uploaded(api, form(file_field(b"x" * 2 * PART_BYTES)))
    await check_later_write_renews(api, raw, session_id, "upload")
