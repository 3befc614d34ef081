"""What was generated: kept as it comes, given back byte for byte, shown whole or not at all."""

import asyncio
import gzip
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from time import process_time
from typing import Any
from urllib.parse import unquote

import pytest
from httpx2 import AsyncClient, ReadError, RemoteProtocolError
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.onboarding.files import PART_BYTES
from tests.api.helpers import (
    ADD_EVENT,
    DELETE_SESSION,
    DOWNLOAD,
    FINALIZE,
    GET_RESULT,
    GET_STATUS,
    JSON,
    PUT_RESULT,
    REOPEN,
    Answers,
    answer_of,
    ask,
    create,
    dump,
    events_of,
    exchange,
    is_time,
    keys_of,
    problem_of,
    save,
    types_of,
    unknown_id,
)
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.service import BASE

STORED = {"session_id", "checksum", "size", "content_type", "filename", "stored_at"}

BODIES = {
    "nothing": b"",
    "a byte": b"\x00",
    "text": "é 中 \U0001f600\r\n".encode(),
    "less than a part": b"\xff" * (PART_BYTES - 1),
    "a part": b"p" * PART_BYTES,
    "a part and a byte": b"p" * PART_BYTES + b"q",
    "two parts": bytes(range(256)) * (2 * PART_BYTES // 256),
    "several parts": bytes(range(256)) * 9001,
}


def result_path(session_id: str) -> str:
    return f"{BASE}/{session_id}/result"


def etag_of(body: bytes) -> str:
    return f'"sha256:{hashlib.sha256(body).hexdigest()}"'


def filled(letter: bytes, size: int) -> bytes:
    return letter * size


async def store(api: AsyncClient, session_id: str, body: bytes, **headers: str) -> Answers:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await api.put(result_path(session_id), content=body, headers=fields)
    return answer_of(response, 201)


async def parts_of(raw: Redis, session_id: str) -> list[str]:
    """Give the keys that hold parts of results, shown or not."""
    return [key for key in await keys_of(raw, session_id) if ":result:" in key]


async def eventually_no_parts(raw: Redis, session_id: str) -> None:
    async with asyncio.timeout(10):
        while await parts_of(raw, session_id):
            await asyncio.sleep(0.005)


async def in_pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(body), size):
        yield body[at : at + size]


async def chunked(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Write pieces as they stand in a body of Transfer-Encoding chunked, with its end."""
    async for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


# --- In and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_a_result_comes_back_as_it_was_sent(
    api: AsyncClient, session_id: str, body: bytes
) -> None:
    sent = await api.put(
        result_path(session_id), content=body, headers={"content-type": "application/x-own"}
    )

    stored = answer_of(sent, 201)
    assert stored.keys() >= STORED
    assert (stored["session_id"], stored["size"]) == (session_id, len(body))
    assert stored["content_type"] == "application/x-own"
    assert is_time(stored["stored_at"])
    assert sent.headers["etag"] == f'"{stored["checksum"]}"' == etag_of(body)
    assert sent.headers["cache-control"] == "no-store"
    for call in (GET_RESULT, DOWNLOAD):
        response = await call.send(api, session_id)
        assert response.status_code == 200
        assert response.content == body
        assert response.headers["content-type"] == "application/x-own"
        assert response.headers["content-length"] == str(len(body))
        assert response.headers["etag"] == etag_of(body)
        assert response.headers["cache-control"] == "no-store"


async def test_a_result_is_a_download_that_no_browser_shows(
    api: AsyncClient, session_id: str
) -> None:
    page = b"<script>alert(1)</script>"
    await store(api, session_id, page, content_type="text/html; charset=utf-8")

    for call in (GET_RESULT, DOWNLOAD):
        response = await call.send(api, session_id)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "content_type",
    [
        *("application/pdf", "text/plain", 'Text/HTML;charset="UTF-8"', "image/svg+xml"),
        *("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "*/*"),
        'a/b; c="d e; \\" f"',
    ],
)
async def test_a_type_is_kept_as_it_is(
    api: AsyncClient, session_id: str, content_type: str
) -> None:
    await store(api, session_id, b"x", content_type=content_type)
    response = await GET_RESULT.send(api, session_id)
    assert response.headers["content-type"] == content_type


@pytest.mark.parametrize("lines", [[], [("content-type", "")], [("content-type", "  ")]])
async def test_what_has_no_type_is_bytes(
    api: AsyncClient, session_id: str, lines: list[tuple[str, str]]
) -> None:
    answer_of(await exchange(api, "PUT", result_path(session_id), lines, b"x"), 201)
    response = await GET_RESULT.send(api, session_id)
    assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "content_type", ["text", "text/", "/", "a/b/c", "a/b;", "a/b; c", "a b/c", b"a/\xe9", "a/b\tc"]
)
async def test_what_is_no_type_is_refused(
    api: AsyncClient, raw: Redis, session_id: str, content_type: str | bytes
) -> None:
    before = await dump(raw)
    lines = [("content-type", content_type)]
    response = await exchange(api, "PUT", result_path(session_id), lines, b"x")
    problem_of(response, "invalid_header")
    assert await dump(raw) == before


async def test_there_is_no_result_before_one_is_stored(api: AsyncClient, session_id: str) -> None:
    for call in (GET_RESULT, DOWNLOAD):
        problem_of(await call.send(api, session_id), "result_not_found")


async def test_storing_a_result_is_an_event_and_leaves_the_status(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    before = answer_of(await GET_STATUS.send(api, session_id))

    stored = await store(api, session_id, b"x" * 1000, content_type="text/plain")

    event = (await events_of(raw, session_id))[-1]
    assert event["type"] == "result_stored"
    assert {name: event[name] for name in ("checksum", "content_type", "filename")} == {
        name: stored[name] for name in ("checksum", "content_type", "filename")
    }
    assert answer_of(await GET_STATUS.send(api, session_id))["status"] == before["status"]


async def test_a_result_may_be_stored_in_any_state_and_outlives_reopening(
    api: AsyncClient, session_id: str
) -> None:
    await store(api, session_id, b"first")
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    assert (await GET_RESULT.send(api, session_id)).content == b"first"
    await store(api, session_id, b"second")
    answer_of(await REOPEN.send(api, session_id))
    assert (await GET_RESULT.send(api, session_id)).content == b"second"


async def test_a_result_in_chunks_is_taken_like_one_with_a_length(
    api: AsyncClient, session_id: str
) -> None:
    body = BODIES["several parts"]
    for size in (1_000_000, 65_537, 4_096):
        response = await api.put(result_path(session_id), content=in_pieces(body, size))
        assert answer_of(response, 201)["checksum"] == etag_of(body).strip('"')
        assert (await GET_RESULT.send(api, session_id)).content == body


async def test_a_result_byte_by_byte_is_taken_too(api: AsyncClient, session_id: str) -> None:
    body = bytes(range(256))
    lines = [("transfer-encoding", "chunked")]
    pieces = chunked(in_pieces(body, 1))
    answer_of(await exchange(api, "PUT", result_path(session_id), lines, pieces), 201)
    assert (await GET_RESULT.send(api, session_id)).content == body


# --- Conditional and bodiless ---------------------------------------------------------------------


async def test_who_has_the_result_is_not_sent_it_again(api: AsyncClient, session_id: str) -> None:
    body = BODIES["several parts"]
    await store(api, session_id, body)
    tag = etag_of(body)
    for call in (GET_RESULT, DOWNLOAD):
        for held in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            response = await call.send(api, session_id, if_none_match=held)
            assert response.status_code == 304, held
            assert response.content == b""
            assert response.headers["etag"] == tag
            assert response.headers["cache-control"] == "no-store"
        for held in ('"x"', etag_of(b"another"), '""'):
            assert (await call.send(api, session_id, if_none_match=held)).content == body
        for held in ("", "x", tag.strip('"'), f"{tag} {tag}"):
            response = await call.send(api, session_id, if_none_match=held)
            problem_of(response, "invalid_header")

    await store(api, session_id, b"another")
    assert (await GET_RESULT.send(api, session_id, if_none_match=tag)).content == b"another"


@pytest.mark.parametrize("name", ["nothing", "text", "several parts"])
async def test_head_answers_like_get_without_the_body(
    api: AsyncClient, session_id: str, name: str
) -> None:
    body = BODIES[name]
    await store(api, session_id, body, content_type="text/plain")
    for call in (GET_RESULT, DOWNLOAD):
        target = call.target.replace("{id}", session_id)
        got = await call.send(api, session_id)
        response = await exchange(api, "HEAD", target)
        assert response.status_code == 200
        for header in ("content-type", "content-length", "etag", "content-disposition"):
            assert response.headers[header] == got.headers[header]
        unchanged = [("if-none-match", etag_of(body))]
        assert (await exchange(api, "HEAD", target, unchanged)).status_code == 304
    assert (await exchange(api, "HEAD", result_path(unknown_id()))).status_code == 404


# --- Names ----------------------------------------------------------------------------------------

NAMES: dict[str, tuple[str | bytes, str]] = {
    "a plain name": ('attachment; filename="report.pdf"', "report.pdf"),
    "no quotes": ("attachment; filename=report.pdf", "report.pdf"),
    "upper case": ('ATTACHMENT; FILENAME="report.pdf"', "report.pdf"),
    "inline": ('inline; filename="report.pdf"', "report.pdf"),
    "spaces": ('attachment; filename="a b (1).pdf"', "a b (1).pdf"),
    "a semicolon": ('attachment; filename="a;b.pdf"', "a;b.pdf"),
    "a comma and a quote": ('attachment; filename="a,b\'c.pdf"', "a,b'c.pdf"),
    "a percent": ('attachment; filename="100%25.pdf"', "100%25.pdf"),
    "RFC 8187": ("attachment; filename*=UTF-8''na%C3%AFve%20%e2%82%ac.pdf", "naïve €.pdf"),
    "RFC 8187 with a language": ("attachment; filename*=UTF-8'fr'%C3%A9.pdf", "é.pdf"),
    "RFC 8187 in Latin-1": ("attachment; filename*=ISO-8859-1''%E9.pdf", "é.pdf"),
    "RFC 8187 after a plain one": (
        "attachment; filename=\"plain.pdf\"; filename*=UTF-8''%e2%82%ac.pdf",
        "€.pdf",
    ),
    "RFC 8187 before a plain one": (
        "attachment; filename*=UTF-8''%e2%82%ac.pdf; filename=\"plain.pdf\"",
        "€.pdf",
    ),
    "UTF-8 as it is": ('attachment; filename="\u00fc \u4e2d.pdf"'.encode(), "ü 中.pdf"),
    "Latin-1 as it is": (b'attachment; filename="\xfc.pdf"', "ü.pdf"),
    "a path": ('attachment; filename="../../etc/passwd"', "passwd"),
    "a path of Windows": ('attachment; filename="C:\\\\x\\\\y.pdf"', "y.pdf"),
    "a path of Windows, not escaped": ('attachment; filename="C:\\dir\\y.pdf"', "y.pdf"),
    "an encoded path": ("attachment; filename*=UTF-8''..%2F..%2Fx.pdf", "x.pdf"),
    "an encoded path of Windows": ("attachment; filename*=UTF-8''..%5C..%5Cx.pdf", "x.pdf"),
    "a hidden file": ('attachment; filename=".htaccess"', "htaccess"),
    "escaped quotes": ('attachment; filename="a\\"b\\".pdf"', "a_b_.pdf"),
    "encoded quotes": ("attachment; filename*=UTF-8''a%22%3B%20b%3D%22.pdf", "a_; b=_.pdf"),
    "CR LF": ("attachment; filename*=UTF-8''a%0D%0ASet-Cookie:%20b.pdf", "aSet-Cookie_ b.pdf"),
    "NUL": ("attachment; filename*=UTF-8''a%00b.pdf", "ab.pdf"),
    "right to left": ("attachment; filename*=UTF-8''a%E2%80%AEfdp.exe", "afdp.exe"),
    "markup": ('attachment; filename="<b>.pdf"', "_b_.pdf"),
    "300 letters": (f'attachment; filename="{"a" * 300}.pdf"', "a" * 251 + ".pdf"),
    "300 letters of two bytes": (
        f"attachment; filename*=UTF-8''{'%C3%A9' * 300}.pdf",
        "é" * 125 + ".pdf",
    ),
    "an encoded word": ('attachment; filename="=?utf-8?q?a?=.pdf"', "=_utf-8_q_a_=.pdf"),
    "nothing": ("attachment", "result.bin"),
    "an empty one": ('attachment; filename=""', "result.bin"),
    "dots": ('attachment; filename=".."', "result.bin"),
    "a folder": ('attachment; filename="a/"', "result.bin"),
    "only control characters": ("attachment; filename*=UTF-8''%0d%0a", "result.bin"),
}
"""What is sent, and the name under which the result is saved."""


@pytest.mark.parametrize(("sent", "name"), NAMES.values(), ids=NAMES.keys())
async def test_a_result_is_saved_under_a_name_that_harms_nobody(
    api: AsyncClient, session_id: str, sent: str | bytes, name: str
) -> None:
    lines = [("content-disposition", sent)]
    response = await exchange(api, "PUT", result_path(session_id), lines, b"x")

    assert answer_of(response, 201)["filename"] == name
    for call in (GET_RESULT, DOWNLOAD):
        got = await call.send(api, session_id)
        assert name_in(got.headers["content-disposition"]) == name


def name_in(disposition: str) -> str:
    """Read a Content-Disposition that holds one file name, plain and encoded, and nothing else."""
    pattern = r"attachment; filename=\"([ !#-\[\]-~]+)\"; filename\*=UTF-8''([A-Za-z0-9._~%-]+)"
    found = re.fullmatch(pattern, disposition)
    assert found, disposition
    plain, encoded = found[1], unquote(found[2])
    # Where the plain one can be right, it is.
    assert len(plain) == len(encoded)
    assert all(mine in (theirs, "_") for mine, theirs in zip(plain, encoded, strict=True))
    return encoded


ODD_DISPOSITIONS: dict[str, str | bytes] = {
    "whole and in pieces": "attachment; filename*=UTF-8''a; filename*0=b",
    "in pieces and whole": "attachment; filename*0=a; filename*=UTF-8''b",
    "a piece with a number of 5,000 digits": f"attachment; filename*{'9' * 5000}=a",
    "the charset undefined": "attachment; filename*=undefined''a",
    "the charset punycode": "attachment; filename*=punycode''%41%80",
    "the charset idna": "attachment; filename*=idna''%ff",
    "the charset unicode_escape": "attachment; filename*=unicode_escape''%5cud800",
    "the charset rot13": "attachment; filename*=rot13''a",
    "no charset at all": "attachment; filename*=''a",
    "a charset that nobody knows": "attachment; filename*=unknown''a",
    "one tick": "attachment; filename*='",
    "no value": "attachment; filename*=",
    "not UTF-8": "attachment; filename*=UTF-8''%ff%fe",
    "half an escape": "attachment; filename*=UTF-8''%",
    "one quote": 'attachment; filename="',
    "an open quote": 'attachment; filename="a',
    "an open escape": 'attachment; filename="a\\',
    "no equals sign": "attachment; filename",
    "twice": "attachment; filename=a; filename=b",
    "no name": "attachment; =a",
    "only semicolons": "; ; ;",
    "an equals sign": "=",
    "no type": "filename=a",
    "no text": b"\xff\xfe",
    "a surrogate": b'attachment; filename="\xed\xa0\x80"',
}


@pytest.mark.parametrize("sent", ODD_DISPOSITIONS.values(), ids=ODD_DISPOSITIONS.keys())
async def test_a_disposition_that_nobody_can_read_is_refused_or_passed_over(
    api: AsyncClient, session_id: str, sent: str | bytes
) -> None:
    lines = [("content-disposition", sent)]
    response = await exchange(api, "PUT", result_path(session_id), lines, b"x")

    if response.status_code == 201:
        stored = answer_of(response, 201)
        got = await GET_RESULT.send(api, session_id)
        assert name_in(got.headers["content-disposition"]) == stored["filename"]
    else:
        problem_of(response, "invalid_header")


@pytest.mark.parametrize(
    "sent",
    [
        'attachment; filename="' + ";" * 60_000,
        'attachment; filename="' + "a" * 60_000 + '"',
        'attachment; filename="' + "a" * 60_000 + '.pdf"',
        "attachment; " + "a;" * 30_000,
        "attachment; " + ";".join(f"filename*{number}=x" for number in range(4_000)),
        "attachment; filename=" + '\\"' * 30_000,
    ],
    ids=["semicolons", "letters", "letters and an ending", "parameters", "pieces", "quotes"],
)
async def test_a_long_disposition_holds_nobody_up(
    api: AsyncClient, session_id: str, sent: str
) -> None:
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            begun_s = process_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, process_time() - begun_s)

    watching = asyncio.create_task(watch())
    lines = [("content-disposition", sent)]
    response = await exchange(api, "PUT", result_path(session_id), lines, b"x")
    watching.cancel()

    if response.status_code != 201:
        problem_of(response, "invalid_header")
    assert longest_s < 0.3


# --- Sizes and encodings --------------------------------------------------------------------------


async def test_a_result_of_exactly_the_limit_is_taken_and_a_byte_more_is_not(
    serve: Callable[..., Any], raw: Redis
) -> None:
    limit = PART_BYTES + 1000
    api = await serve(max_result_bytes=limit)
    session_id = await create(api)
    target = result_path(session_id)
    largest = filled(b"x", limit)

    answer_of(await api.put(target, content=in_pieces(largest, 100_000)), 201)
    await store(api, session_id, largest)
    before = await dump(raw)

    for body in (largest + b"x", in_pieces(largest + b"x", 100_000)):
        problem_of(await api.put(target, content=body), "payload_too_large")
        assert (await GET_RESULT.send(api, session_id)).content == largest
        assert len(await parts_of(raw, session_id)) == 2
    assert {key: value for key, value in (await dump(raw)).items() if ":ops" not in key} == {
        key: value for key, value in before.items() if ":ops" not in key
    }


async def test_a_result_past_the_limit_is_refused_without_being_read(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    before = await dump(raw)
    for length in (32 * 1024 * 1024 + 1, 10**12):
        for target in (result_path(session_id), result_path(unknown_id())):
            response = await exchange(api, "PUT", target, [("content-length", str(length))])
            problem_of(response, "payload_too_large")
    assert await dump(raw) == before


async def test_a_result_without_an_end_is_refused_early_and_nothing_of_it_is_kept(
    serve: Callable[..., Any], raw: Redis
) -> None:
    limit = 2 * 1024 * 1024
    api = await serve(max_result_bytes=limit)
    session_id = await create(api)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 20 * limit:
            sent += 65_536
            yield b"10000\r\n" + b"x" * 65_536 + b"\r\n"

    lines = [("transfer-encoding", "chunked")]
    response = await exchange(api, "PUT", result_path(session_id), lines, endless())

    problem_of(response, "payload_too_large")
    assert sent < 10 * limit
    assert await parts_of(raw, session_id) == []
    assert await types_of(raw, session_id) == ["session_created"]


@pytest.mark.parametrize("coding", ["gzip", "br", "x", "identity, gzip", "deflate"])
async def test_a_compressed_result_is_not_taken(
    api: AsyncClient, raw: Redis, session_id: str, coding: str
) -> None:
    before = await dump(raw)
    for target in (result_path(session_id), result_path(unknown_id())):
        headers = {"content-encoding": coding}
        response = await api.put(target, content=gzip.compress(b"x"), headers=headers)
        problem_of(response, "unsupported_media_type")
    assert await dump(raw) == before


async def test_what_is_compressed_but_does_not_say_so_is_kept_as_it_is(
    api: AsyncClient, session_id: str
) -> None:
    body = gzip.compress(b"x" * 1000)
    await store(api, session_id, body, content_encoding="identity", content_type="application/gzip")
    response = await GET_RESULT.send(api, session_id)
    assert response.content == body
    assert "content-encoding" not in response.headers


# --- One in the place of another ------------------------------------------------------------------


async def test_a_result_replaces_the_one_before_it_and_leaves_nothing_of_it(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for body in [*BODIES.values(), BODIES["a byte"], BODIES["nothing"]]:
        await store(api, session_id, body, content_disposition=f"x; filename={len(body)}.bin")
        response = await GET_RESULT.send(api, session_id)
        assert response.content == body
        assert name_in(response.headers["content-disposition"]) == f"{len(body)}.bin"
        assert len(await parts_of(raw, session_id)) == -(-len(body) // PART_BYTES)


async def test_of_many_at_once_one_is_shown_whole_and_the_others_leave_nothing(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    bodies = [filled(letter.encode(), PART_BYTES + 100 + at) for at, letter in enumerate("abcdef")]

    await asyncio.gather(*(store(api, session_id, body) for body in bodies))

    response = await GET_RESULT.send(api, session_id)
    assert response.content in bodies
    assert response.headers["etag"] == etag_of(response.content)
    assert len(await parts_of(raw, session_id)) == 2
    types = await types_of(raw, session_id)
    assert types.count("result_stored") == len(bodies)


async def test_who_reads_while_it_is_replaced_gets_one_whole_or_is_cut_short(
    api: AsyncClient, session_id: str
) -> None:
    bodies = [filled(letter, 3 * PART_BYTES + len(letter)) for letter in (b"a", b"bb", b"c")]
    await store(api, session_id, bodies[0])
    over = asyncio.Event()
    whole = cut = 0

    async def read() -> None:
        nonlocal whole, cut
        while not over.is_set():
            got = b""
            try:
                async with api.stream("GET", result_path(session_id)) as response:
                    assert response.status_code == 200
                    async for piece in response.aiter_bytes():
                        got += piece
            except (RemoteProtocolError, ReadError):
                cut += 1
                assert len(set(got)) <= 1
            else:
                whole += 1
                assert response.headers["etag"] == etag_of(got)

    async def replace() -> None:
        for turn in range(15):
            await store(api, session_id, bodies[turn % 3])
        over.set()

    await asyncio.gather(replace(), read(), read(), read())

    assert whole + cut >= 3
    assert (await GET_RESULT.send(api, session_id)).content == bodies[14 % 3]


@pytest.mark.parametrize("how", ["replaced", "deleted"])
async def test_a_result_that_is_gone_halfway_is_cut_short(
    serve: Callable[..., Any], valkey: Valkey, raw: Redis, how: str
) -> None:
    old, new = filled(b"a", 12 * PART_BYTES), filled(b"b", 12 * PART_BYTES)
    direct = await serve()
    session_id = await create(direct)
    await store(direct, session_id, old)
    async with Proxy(valkey.port) as proxy:
        held = await serve(redis_url=f"redis://{proxy.host}:{proxy.port}/0", redis_timeout_s=10)
        got = bytearray()

        async def read() -> None:
            async with held.stream("GET", result_path(session_id)) as response:
                assert response.status_code == 200
                async for piece in response.aiter_bytes():
                    if not got:
                        proxy.hold()
                        if how == "replaced":
                            await store(direct, session_id, new)
                        else:
                            answer_of(await DELETE_SESSION.send(direct, session_id))
                        proxy.release()
                    got.extend(piece)

        with pytest.raises((RemoteProtocolError, ReadError)):
            await read()
        assert 0 < len(got) < len(old)
        assert set(got) == {ord("a")}
        if how == "replaced":
            assert (await GET_RESULT.send(held, session_id)).content == new
        else:
            assert await keys_of(raw, session_id) == []


async def test_a_result_whose_part_is_lost_is_cut_short_or_an_error_and_never_a_mixture(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await store(api, session_id, filled(b"a", 3 * PART_BYTES))
    first, second, _ = sorted(await parts_of(raw, session_id))

    await raw.delete(second)
    with pytest.raises((RemoteProtocolError, ReadError)):
        await GET_RESULT.send(api, session_id)
    await raw.delete(first)
    problem_of(await GET_RESULT.send(api, session_id), "corrupt_record")
    await store(api, session_id, b"whole again")
    assert (await GET_RESULT.send(api, session_id)).content == b"whole again"


async def test_a_result_that_cannot_be_read_is_an_error(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for field in ("size", "parts", "stored_at"):
        await store(api, session_id, b"x")
        await raw.hset(f"onboarding:{session_id}:result", field, "rubbish")
        problem_of(await GET_RESULT.send(api, session_id), "corrupt_record")


# --- What does not arrive -------------------------------------------------------------------------


@asynccontextmanager
async def half_sent(
    api: AsyncClient,
    method: str,
    target: str,
    body: bytes,
    length: int,
    lines: Iterable[tuple[str, str]] = (),
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Begin a request with a body of so many bytes, send the first ones, and give the connection.

    What is still open at the end is broken.
    """
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    try:
        fields = [f"{name}: {value}" for name, value in (*lines, ("content-length", str(length)))]
        head = [f"{method} {target} HTTP/1.1", "host: test", *fields, "", ""]
        writer.write("\r\n".join(head).encode() + body)
        await writer.drain()
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_a_result_whose_sender_leaves_is_not_there_and_nothing_of_it_is(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await store(api, session_id, b"before")
    body = filled(b"x", 3 * PART_BYTES)
    async with half_sent(api, "PUT", result_path(session_id), body, 10**7), asyncio.timeout(10):
        while len(await parts_of(raw, session_id)) < 4:
            await asyncio.sleep(0.002)

    async with asyncio.timeout(10):
        while len(await parts_of(raw, session_id)) > 1:
            await asyncio.sleep(0.002)
    assert (await GET_RESULT.send(api, session_id)).content == b"before"
    assert (await types_of(raw, session_id)).count("result_stored") == 1


async def test_a_result_on_its_way_is_shown_to_nobody_and_ends_with_its_session(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    body, length = filled(b"x", 2 * PART_BYTES), 3 * PART_BYTES
    async with half_sent(api, "PUT", result_path(session_id), body, length) as (reader, writer):
        async with asyncio.timeout(10):
            while len(await parts_of(raw, session_id)) < 2:
                await asyncio.sleep(0.002)
        problem_of(await GET_RESULT.send(api, session_id), "result_not_found")
        assert {await raw.pttl(key) > 0 for key in await keys_of(raw, session_id)} == {True}

        answer_of(await DELETE_SESSION.send(api, session_id))

        assert await keys_of(raw, session_id) == []
        writer.write(b"x" * PART_BYTES)
        assert b" 404 " in await asyncio.wait_for(reader.readline(), 10)
    assert await keys_of(raw, session_id) == []


async def test_a_result_for_an_unknown_session_leaves_nothing(api: AsyncClient, raw: Redis) -> None:
    session_id = unknown_id()
    for body in (b"", b"x", filled(b"x", 3 * PART_BYTES)):
        response = await api.put(result_path(session_id), content=body)
        problem_of(response, "session_not_found")
        assert await keys_of(raw, session_id) == []


async def test_a_result_of_which_a_part_was_lost_on_the_way_is_not_shown(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await store(api, session_id, b"before")
    body, length = filled(b"x", 2 * PART_BYTES), 2 * PART_BYTES + 10
    async with half_sent(api, "PUT", result_path(session_id), body, length) as (reader, writer):
        async with asyncio.timeout(10):
            while len(found := await parts_of(raw, session_id)) < 3:
                await asyncio.sleep(0.002)
        lost, _ = [key for key in found if await raw.strlen(key) == PART_BYTES]

        await raw.delete(lost)
        writer.write(b"x" * 10)

        assert b" 409 " in await asyncio.wait_for(reader.readline(), 10)
    assert (await GET_RESULT.send(api, session_id)).content == b"before"


# --- Slow senders and readers ---------------------------------------------------------------------


async def test_a_slow_result_is_waited_for_as_long_as_it_gets_on(
    serve: Callable[..., Any],
) -> None:
    deadline_s, pieces = 0.6, 8
    api = await serve(request_deadline_s=deadline_s)
    session_id = await create(api)
    loop = asyncio.get_running_loop()

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield b"x" * 1000
            await asyncio.sleep(deadline_s / 5)

    begun_s = loop.time()
    lines = [("content-length", str(pieces * 1000))]
    response = await exchange(api, "PUT", result_path(session_id), lines, slowly())

    assert loop.time() - begun_s > deadline_s
    answer_of(response, 201)
    assert (await GET_RESULT.send(api, session_id)).content == b"x" * 1000 * pieces


async def test_a_result_that_stalls_is_given_up_and_nothing_of_it_is_kept(
    serve: Callable[..., Any], raw: Redis
) -> None:
    api = await serve(request_deadline_s=0.3)
    session_id = await create(api)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"x" * 2 * PART_BYTES

    lines = [("content-length", str(3 * PART_BYTES))]
    response = await exchange(api, "PUT", result_path(session_id), lines, stalling())

    problem_of(response, "deadline_exceeded")
    await eventually_no_parts(raw, session_id)
    problem_of(await GET_RESULT.send(api, session_id), "result_not_found")
    assert await types_of(raw, session_id) == ["session_created"]


async def test_who_takes_nothing_of_a_result_is_cut_off(
    api: AsyncClient, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.streaming.STALL_S", 0.2)
    await store(api, session_id, filled(b"x", 24 * PART_BYTES))
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, (api.base_url.host, api.base_url.port))
    reader, writer = await asyncio.open_connection(sock=link, limit=1024)
    with capture_logs() as logs:
        writer.write(f"GET {result_path(session_id)} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        async with asyncio.timeout(10):
            while not any(line.get("status") == 499 for line in logs):
                await asyncio.sleep(0.005)

    got = 0
    with suppress(ConnectionError):
        async with asyncio.timeout(10):
            while piece := await reader.read(65_536):
                got += len(piece)

    assert got < 24 * PART_BYTES
    writer.close()


# --- Lifetimes and repeats ------------------------------------------------------------------------


async def test_a_result_lives_on_with_its_session(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await store(api, session_id, filled(b"x", 2 * PART_BYTES))
    await check_later_write_renews(api, raw, session_id, "result")


async def check_later_write_renews(
    api: AsyncClient, raw: Redis, session_id: str, body: str
) -> None:
    """Check that all keys, those of a body of two parts too, get another lifetime together."""
    keys = await keys_of(raw, session_id)
    assert len([key for key in keys if f":{body}" in key]) == 3
    deadlines = {int(await ask(raw, "PEXPIRETIME", key)) for key in keys}
    assert max(deadlines) - min(deadlines) <= 1000
    # As if it had been written six days ago.
    earlier = min(deadlines) - 6 * 86_400_000
    await raw.hset(f"onboarding:{session_id}:progress", "deadline", earlier)
    for key in keys:
        await raw.pexpireat(key, earlier)

    answer_of(await ADD_EVENT.send(api, session_id), 201)

    renewed = {int(await ask(raw, "PEXPIRETIME", key)) for key in keys}
    assert max(renewed) - min(renewed) <= 1000
    assert min(renewed) >= min(deadlines)


async def test_what_was_stored_outlives_the_time_that_a_body_may_be_on_its_way(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    body = filled(b"x", 2 * PART_BYTES)
    await store(api, session_id, body)
    async with half_sent(api, "PUT", result_path(session_id), body, 10**7):
        async with asyncio.timeout(10):
            while len(await parts_of(raw, session_id)) < 4:
                await asyncio.sleep(0.002)

        await let_two_hours_pass(raw, session_id)
        answer_of(await ADD_EVENT.send(api, session_id), 201)

        assert len(await parts_of(raw, session_id)) == 2
        assert (await GET_RESULT.send(api, session_id)).content == body


async def let_two_hours_pass(raw: Redis, session_id: str) -> None:
    """Put back the times until which parts are waited for, and have the next write look."""
    ops = f"onboarding:{session_id}:ops"
    for name, value in (await ask(raw, "HGETALL", ops)).items():
        if name.startswith(b"part:") and value.isdigit():
            await raw.hincrby(ops, name.decode(), -2 * 3_600_000)
    await raw.hset(ops, "turn", "0")


async def test_an_idempotency_key_repeats_the_first_answer_and_keeps_no_second_body(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    body = filled(b"x", PART_BYTES + 1)
    first = await put_once(api, session_id, body)
    assert first.status_code == 201
    await store(api, session_id, b"later")

    again = await put_once(api, session_id, body)

    assert again.status_code == 201
    assert again.json() == first.json()
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["idempotent-replayed"] == "true"
    assert (await GET_RESULT.send(api, session_id)).content == b"later"
    problem_of(await put_once(api, session_id, body + b"y"), "idempotency_mismatch")
    assert (await GET_RESULT.send(api, session_id)).content == b"later"
    assert len(await parts_of(raw, session_id)) == 1
    assert (await types_of(raw, session_id)).count("result_stored") == 2


async def put_once(api: AsyncClient, session_id: str, body: bytes) -> Any:
    headers = {"idempotency-key": "k"}
    return await api.put(result_path(session_id), content=body, headers=headers)


async def test_a_result_whose_replies_are_lost_is_stored_once(
    serve: Callable[..., Any], raw: Redis, valkey: Valkey
) -> None:
    body = filled(b"x", 2 * PART_BYTES + 1)
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=f"redis://{proxy.host}:{proxy.port}/0", redis_timeout_s=0.2)
        session_id = await create(api)
        await store(api, session_id, b"before")
        proxy.drop_replies(2, to="EVALSHA")
        await store(api, session_id, body)
        proxy.drop_replies(1, to="EVALSHA")
        proxy.drop_replies(1, to="GET")
        got = await GET_RESULT.send(api, session_id)
    assert got.content == body
    assert len(await parts_of(raw, session_id)) == 3
    assert (await types_of(raw, session_id)).count("result_stored") == 2


async def test_a_json_result_is_a_body_like_any_other(api: AsyncClient, session_id: str) -> None:
    body = b'{"a":1,"a":1e999}'
    response = await api.put(result_path(session_id), content=body, headers=JSON)
    answer_of(response, 201)
    got = await GET_RESULT.send(api, session_id)
    assert (got.content, got.headers["content-type"]) == (body, "application/json")
    answer_of(await PUT_RESULT.send(api, session_id), 201)
