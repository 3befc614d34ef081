"""What cannot be taken is refused as a problem, changes nothing, and costs the store nothing."""

import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.helpers import (
    ASK,
    BATCH,
    BODY_CALLS,
    CREATE,
    CREATE_TOKEN,
    DELETE_STEP,
    FINALIZE,
    GET_DRAFT,
    GET_EXPORT,
    GET_STEP,
    GET_STEPS,
    JSON,
    PATCH,
    PROMOTE,
    PUT,
    PUT_DRAFT,
    SAVE,
    SESSION_CALLS,
    STEP_CALLS,
    Answers,
    Call,
    answer_of,
    commands,
    compact,
    dump,
    exchange,
    pointers_of,
    problem_of,
    save,
    step_path,
    unknown_id,
)
from tests.service import BASE

STEP_BYTES = 256 * 1024
OTHER_BYTES = 64 * 1024

JSON_LINE = [("content-type", "application/json")]


@asynccontextmanager
async def untouched(raw: Redis) -> AsyncIterator[None]:
    """Check that a block leaves every key as it is and asks the store for nothing."""
    keys = await dump(raw)
    asked = await commands(raw)
    yield
    assert await commands(raw) == asked
    assert await dump(raw) == keys


async def send_raw(api: AsyncClient, call: Call, target: str) -> Response:
    """Send a call with exactly this target."""
    body = b"" if call.body is None else compact(call.body)
    return await exchange(api, call.method, target, JSON_LINE if body else [], body)


@pytest.fixture
async def filled_id(api: AsyncClient, session_id: str) -> str:
    """Give a session in which every call that is well-formed could do something."""
    await save(api, session_id)
    answer_of(await PUT_DRAFT.send(api, session_id))
    return session_id


# --- Ids ------------------------------------------------------------------------------------------

KNOWN = "0b0e7a7e-5c1d-4f6a-9d3e-2a1b3c4d5e6f"

BAD_IDS = {
    "star": "*",
    "braces": "{x}",
    "braces around": "{" + KNOWN + "}",
    "colon": "a:b",
    "NUL": "%00",
    "NUL at the end": KNOWN + "%00",
    "CR LF": "%0d%0a",
    "newline at the end": KNOWN + "%0a",
    "space at the end": KNOWN + "%20",
    "parent folder": "..%2f",
    "slash inside": KNOWN + "%2fsteps",
    "upper case": KNOWN.upper(),
    "without hyphens": KNOWN.replace("-", ""),
    "UUID1": str(uuid.uuid1()),
    "nil": "00000000-0000-0000-0000-000000000000",
    "other variant": KNOWN[:19] + "c" + KNOWN[20:],
    "one short": KNOWN[:-1],
    "one long": KNOWN + "0",
    "URN": "urn:uuid:" + KNOWN,
    "full-width digits": "%EF%BC%90" + KNOWN[1:],
    "not UTF-8": "%ff%fe",
    "question": "%3f",
    "pattern": "[0-9]",
    "word": "undefined",
    "60 KB": "a" * 60_000,
    "70 KB": "a" * 70_000,
}


def without_traces(response: Response) -> tuple[Any, ...]:
    """Give an answer without what names its request."""
    body = response.json()
    for name in ("instance", "request_id"):
        del body[name]
    headers = {name: value for name, value in response.headers.items() if name in STEADY}
    return response.status_code, list(body.items()), headers


STEADY = {"content-type", "cache-control", "etag", "vary", "allow"}


@pytest.mark.parametrize("bad_id", BAD_IDS.values(), ids=BAD_IDS.keys())
async def test_what_is_no_id_answers_like_an_unknown_one(
    api: AsyncClient, raw: Redis, filled_id: str, bad_id: str
) -> None:
    unknown = unknown_id()
    expected = [
        without_traces(await send_raw(api, call, call.target.replace("{id}", unknown)))
        for call in SESSION_CALLS
    ]
    async with untouched(raw):
        for call, answer in zip(SESSION_CALLS, expected, strict=True):
            target = call.target.replace("{id}", bad_id)
            response = await send_raw(api, call, target)
            instance = problem_of(response, "session_not_found")["instance"]
            if len(target) < 8000:  # A longer one may be told in part.
                assert instance == target
            assert without_traces(response) == answer


async def test_an_id_with_a_hash_tag_reaches_no_other_session(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for spelled in (f"%7B{filled_id}%7D", f"{filled_id}:x", f"x%0a{filled_id}"):
            for call in SESSION_CALLS:
                response = await send_raw(api, call, call.target.replace("{id}", spelled))
                problem_of(response, "session_not_found")


async def test_an_encoded_slash_is_a_part_of_a_name_and_no_slash(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for rest in ("progress", "steps", "steps%2f1", "steps/1%2fdraft"):
            response = await exchange(api, "GET", f"{BASE}/{filled_id}%2f{rest}")
            assert response.status_code == 404, response.text


# --- Step numbers ---------------------------------------------------------------------------------

BAD_STEPS = {
    "zero": "0",
    "beyond the last": "24",
    "negative": "-1",
    "leading zero": "01",
    "fraction": "1.0",
    "sign": "+1",
    "true": "true",
    "exponent": "1e0",
    "hexadecimal": "0x1",
    "underscore": "1_0",
    "5,000 digits": "1" * 5000,
    "newline at the end": "1%0a",
    "CR LF at the end": "1%0d%0a",
    "space at the end": "1%20",
    "space before": "%201",
    "NUL at the end": "1%00",
    "full-width": "%EF%BC%91",
    "Arabic-Indic": "%D9%A1",
    "superscript": "%C2%B9",
    "not UTF-8": "%ff",
    "colon": "1:draft",
    "star": "*",
    "null": "null",
}


@pytest.mark.parametrize("bad_step", BAD_STEPS.values(), ids=BAD_STEPS.keys())
async def test_what_is_no_step_number_is_refused(
    api: AsyncClient, raw: Redis, filled_id: str, bad_step: str
) -> None:
    async with untouched(raw):
        for call in STEP_CALLS:
            for session_id in (filled_id, KNOWN):
                target = call.target.replace("{id}", session_id)
                target = target.replace("/steps/1", f"/steps/{bad_step}")
                problem_of(await send_raw(api, call, target), "invalid_step_id")


@pytest.mark.parametrize("other_path", ["", "1/", "1/draft/", "1//draft", "/1"])
async def test_another_path_is_no_step(
    api: AsyncClient, raw: Redis, filled_id: str, other_path: str
) -> None:
    async with untouched(raw):
        for call in (SAVE, GET_STEP, DELETE_STEP):
            response = await send_raw(api, call, step_path(filled_id, other_path))
            problem_of(response, "not_found")


# --- Bodies ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a call takes a value of the caller: `body` has X there, at a level of nesting."""

    call: Call
    body: bytes
    level: int
    pointer: str

    @property
    def code(self) -> str:
        return code_of(self.call)

    def put(self, value: bytes) -> bytes:
        return self.body.replace(b"X", value)


def code_of(call: Call) -> str:
    """Give the code with which a call refuses what is JSON but not acceptable."""
    return (
        "invalid_request" if call in (CREATE, FINALIZE, ASK, CREATE_TOKEN) else "invalid_step_data"
    )


PLACES = [
    Place(SAVE, b'{"data":{"a":X}}', 3, "/data/a"),
    Place(PUT, b'{"data":{"a":X}}', 3, "/data/a"),
    Place(BATCH, b'{"steps":{"1":{"a":X}}}', 4, "/steps/1/a"),
    Place(PATCH, b'{"a":X}', 2, "/a"),
    Place(PUT_DRAFT, b'{"data":{"a":X}}', 3, "/data/a"),
    Place(CREATE, b'{"workspace_id":"w","metadata":{"a":X}}', 3, "/metadata/a"),
    Place(FINALIZE, b'{"force":true,"a":X}', 2, "/a"),
]


async def send_body(
    api: AsyncClient, call: Call, session_id: str, body: bytes, **headers: str
) -> Response:
    target = call.target.replace("{id}", session_id)
    fields = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await api.request(call.method, target, content=body, headers=fields)


NO_JSON = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "leading zero": b"01",
    "plus": b"+1",
    "bare point": b".5",
    "point at the end": b"1.",
    "bare exponent": b"1e",
    "hexadecimal": b"0x10",
    "Python's True": b"True",
    "undefined": b"undefined",
    "single quotes": b"'x'",
    "no quotes": b"x",
    "bad escape": b'"\\x41"',
    "short escape": b'"\\u00g0"',
    "raw newline": b'"a\nb"',
    "raw NUL": b'"a\x00b"',
    "trailing comma": b"[1,]",
    "missing comma": b"[1 2]",
    "member without a value": b'{"b"}',
    "name without quotes": b"{b:1}",
    "number as a name": b"{1:1}",
    "comment": b"1/*c*/",
    "nothing": b"",
    "unclosed string": b'"x',
    "unclosed array": b"[1",
    "not UTF-8": b'"\xff"',
    "Latin-1": b'"\xe9"',
    "overlong": b'"\xc0\x80"',
    "surrogate in UTF-8": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "no-break space": b"\xc2\xa01",
    "form feed": b"\x0c1",
    "BOM inside": b"\xef\xbb\xbf1",
}

BAD_VALUES = {
    "too large": (b"1e999", ""),
    "too large and negative": (b"-1e999", ""),
    "too large by digits": (b"1" * 400 + b".0", ""),
    "too small": (b"1e-999", ""),
    "too small and negative": (b"-1e-999", ""),
    "too small by digits": (b"0." + b"0" * 400 + b"1", ""),
    "just too small": (b"2e-324", ""),
    "2^53": (b"9007199254740992", ""),
    "-2^53": (b"-9007199254740992", ""),
    "20 digits": (b"12345678901234567890", ""),
    "-20 digits": (b"-12345678901234567890", ""),
    "5,000 digits": (b"1" * 5000, ""),
    "in an array": (b"[0,[1e999]]", "/1/0"),
    "lone high surrogate": (b'"\\ud800"', ""),
    "lone low surrogate": (b'"x\\udc00"', ""),
    "surrogates in the wrong order": (b'"\\ude00\\ud83d"', ""),
    "half a pair before a pair": (b'"\\ud83d\\ud83d\\ude00"', ""),
    "lone surrogate in a name": (b'{"\\ud800":1}', ""),
    "duplicate member": (b'{"b":1,"b":2}', ""),
    "duplicate member, equal": (b'{"b":1,"b":1}', ""),
    "duplicate member, escaped": (b'{"b":1,"\\u0062":2}', ""),
    "duplicate member, empty": (b'{"":1,"":2}', ""),
    "duplicate member, deep": (b'[{"c":{"b":1,"c":2,"b":3}}]', "/0/c"),
    "names to escape": (b'{"b/c~d":[1e999]}', "/b~1c~0d/0"),
}


@pytest.mark.parametrize("value", NO_JSON.values(), ids=NO_JSON.keys())
async def test_a_body_that_is_not_json_is_refused(
    api: AsyncClient, raw: Redis, filled_id: str, value: bytes
) -> None:
    async with untouched(raw):
        for place in PLACES:
            response = await send_body(api, place.call, filled_id, place.put(value))
            problem_of(response, "malformed_json")


@pytest.mark.parametrize(("value", "below"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
async def test_a_value_that_could_not_be_kept_is_refused_by_its_pointer(
    api: AsyncClient, raw: Redis, filled_id: str, value: bytes, below: str
) -> None:
    async with untouched(raw):
        for place in PLACES:
            response = await send_body(api, place.call, filled_id, place.put(value))
            problem = problem_of(response, place.code)
            assert pointers_of(problem) == {place.pointer + below}, place.call.name


async def test_every_value_that_could_not_be_kept_is_named_at_once(
    api: AsyncClient, filled_id: str
) -> None:
    body = b'{"data":{"a":1e999,"b":[1,{"c":1,"c":1}],"d":"\\ud800","e":{"f":9007199254740992}}}'

    problem = problem_of(await send_body(api, SAVE, filled_id, body), "invalid_step_data")

    assert pointers_of(problem) == {"/data/a", "/data/b/1", "/data/d", "/data/e/f"}


WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda body: b"\xef\xbb\xbf" + body,
    "UTF-16": lambda body: body.decode().encode("utf-16"),
    "UTF-32": lambda body: body.decode().encode("utf-32-be"),
    "truncated": lambda body: body[:-1],
    "cut in half": lambda body: body[: len(body) // 2],
    "trailing garbage": lambda body: body + b"x",
    "twice": lambda body: body + body,
    "trailing comma": lambda body: body + b",",
    "trailing NUL": lambda body: body + b"\x00",
    "leading garbage": lambda body: b")]}'," + body,
    "only spaces": lambda _: b"  ",
    "one brace": lambda _: b"{",
    "not UTF-8 at all": lambda _: b"\xff\xfe\xfd",
    "no JSON at all": lambda _: b"<xml/>",
    "a form": lambda _: b"data=1&a=2",
}


@pytest.mark.parametrize("spoil", WHOLE.values(), ids=WHOLE.keys())
async def test_a_document_that_is_spoiled_is_refused(
    api: AsyncClient, raw: Redis, filled_id: str, spoil: Callable[[bytes], bytes]
) -> None:
    async with untouched(raw):
        for place in PLACES:
            body = spoil(place.put(b'"\xc3\xa9"'))
            problem_of(await send_body(api, place.call, filled_id, body), "malformed_json")


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"null", b"1", b"1.5", b"true", b"[{}]"])
async def test_a_document_that_is_no_object_is_refused(
    api: AsyncClient, raw: Redis, filled_id: str, body: bytes
) -> None:
    async with untouched(raw):
        for call in BODY_CALLS:
            response = await send_body(api, call, filled_id, body)
            assert pointers_of(problem_of(response, code_of(call))) == {""}


async def test_an_empty_body_is_refused_where_one_is_needed(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for call in (SAVE, PUT, BATCH, PATCH, PUT_DRAFT):
            problem_of(await send_body(api, call, filled_id, b""), "malformed_json")
        problem_of(await send_body(api, CREATE, "", b""), "invalid_request")


WRONG_MEMBERS: list[tuple[Call, Answers]] = [
    (call, {**beside, name: value})
    for calls, beside, name, values in (
        ([SAVE, PUT], {}, "data", [None, [], {}, "x", 1, True]),
        ([PUT_DRAFT], {}, "data", [None, [], "x", 1, True]),
        ([SAVE, PUT, PUT_DRAFT, BATCH, CREATE], {}, "Data", [{"a": 1}]),
        ([BATCH], {}, "steps", [None, [], {}, "x", 1, {"1": {}}, {"1": None}, {"1": [1]}]),
        ([CREATE], {}, "workspace_id", [None, "", 1, [], {}, "a\nb", "x" * 129]),
        ([CREATE], {"workspace_id": "w"}, "user_id", ["", 1, [], "\u0000"]),
        ([CREATE], {"workspace_id": "w"}, "language", [None, "", 1, "e", "a_b"]),
        ([CREATE], {"workspace_id": "w"}, "metadata", [[], "x", 1, True]),
        ([FINALIZE], {}, "force", [None, 0, 1, "true", [], {}]),
    )
    for call in calls
    for value in values
]


async def test_members_of_a_wrong_type_are_refused(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for call, body in WRONG_MEMBERS:
            response = await call._replace(body=body).send(api, filled_id)
            assert problem_of(response, code_of(call)).get("errors"), (call.name, body)


# --- Nesting --------------------------------------------------------------------------------------


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def nested_objects(levels: int) -> bytes:
    return b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1)


@pytest.mark.parametrize("nest", [nested, nested_objects], ids=["arrays", "objects"])
async def test_a_body_may_have_64_levels_and_no_more(
    api: AsyncClient, raw: Redis, filled_id: str, nest: Callable[[int], bytes]
) -> None:
    for place in PLACES:
        most = 64 - (place.level - 1)
        async with untouched(raw):
            for levels in (most + 1, most + 2, 5000):
                body = place.put(nest(levels))
                problem_of(await send_body(api, place.call, filled_id, body), place.code)
                spaced = body.replace(b":", b" : ")
                problem_of(await send_body(api, place.call, filled_id, spaced), place.code)
        response = await send_body(api, place.call, filled_id, place.put(nest(most)))
        assert response.is_success, (place.call.name, response.text)
    answer_of(await GET_EXPORT.send(api, filled_id))


async def test_100_000_levels_are_refused_like_65(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for place in PLACES:
            levels = 30_000 if place.call in (CREATE, FINALIZE) else 100_000
            body = place.put(nested(levels))
            problem_of(await send_body(api, place.call, filled_id, body), place.code)


# --- What is just acceptable ----------------------------------------------------------------------

EDGES = {
    "2^53-1": b"9007199254740991",
    "-(2^53-1)": b"-9007199254740991",
    "minus zero": b"-0",
    "minus zero point zero": b"-0.0",
    "zero with an exponent": b"0e-999",
    "zero with a large exponent": b"0E+999",
    "the smallest double": b"5e-324",
    "rounds to the smallest double": b"3e-324",
    "the largest double": b"1.7976931348623157e308",
    "beyond 2^53 with a point": b"9007199254740993.0",
    "beyond 2^53 with an exponent": b"1E20",
    "trailing zeros": b"1.50",
    "a third": b"0.3333333333333333333333333333",
    "unicode": '"\u00e9\u4e2d\U0001f600\u2028"'.encode(),
    "escapes": b'"\\u00e9\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\\u007f"',
    "an escaped emoji": b'"\\ud83d\\ude00\\uD83D\\uDE00"',
    "a combining mark": b'"e\\u0301"',
    "noncharacters": b'"\\uffff\\ufdd0\xef\xbf\xbe"',
    "odd names": b'{"":1,"\\u0000":2," ":3,"__proto__":4,"data":5,"a.b":6,"~1/":7}',
    "names that differ": b'{"\xc3\xa9":1,"e\xcc\x81":2,"E":3,"e":4}',
    "empty things": b'[{},[],"",null,false,0]',
    "spaces": b'[ 1 ,\t{ "b"\r\n: 2 } ]',
    "a record": b'{"step_id":9,"version":9,"saved_at":"x","data":{}}',
}


@pytest.mark.parametrize("value", EDGES.values(), ids=EDGES.keys())
async def test_an_edge_value_comes_out_as_it_went_in(
    api: AsyncClient, session_id: str, value: bytes
) -> None:
    data = b'{"a":' + value + b"}"
    expected = repr(json.loads(value))
    path = step_path(session_id, 1)

    async def check(call: Call) -> None:
        response = await call.send(api, session_id)
        assert data in response.content, call.name
        assert repr(response.json()["data"]["a"]) == expected

    answer_of(await send_body(api, SAVE, session_id, b'{"data":' + data + b"}"))
    await check(GET_STEP)
    answer_of(await send_body(api, PUT_DRAFT, session_id, b'{"data":' + data + b"}"))
    await check(GET_DRAFT)
    answer_of(await PROMOTE.send(api, session_id))
    await check(GET_STEP)
    answer_of(await send_body(api, BATCH, session_id, b'{"steps":{"1":' + data + b"}}"))
    await check(GET_STEP)
    assert data in (await GET_STEPS.send(api, session_id)).content
    answer_of(await api.patch(path, json={"other": 1}))
    assert repr((await api.get(path)).json()["data"]["a"]) == expected
    answer_of(await send_body(api, PATCH, session_id, b'{"b":' + value + b"}"))
    assert repr((await api.get(path)).json()["data"]["b"]) == expected
    answer_of(await FINALIZE.send(api, session_id))
    export = answer_of(await GET_EXPORT.send(api, session_id))
    assert repr(export["steps"]["1"]["data"]["a"]) == expected
    assert repr(export["raw_step_data"]["step_1"]["data"]["a"]) == expected


@pytest.mark.parametrize("value", EDGES.values(), ids=EDGES.keys())
async def test_an_edge_value_is_kept_in_the_metadata(api: AsyncClient, value: bytes) -> None:
    body = b'{"workspace_id":"w","metadata":{"a":' + value + b"}}"

    created = answer_of(await send_body(api, CREATE, "", body), 201)

    shown = answer_of(await api.get(f"{BASE}/{created['session_id']}"))
    for session in (created, shown):
        assert repr(session["metadata"]["a"]) == repr(json.loads(value))


# --- Sizes ----------------------------------------------------------------------------------------


def limit_of(call: Call) -> int:
    return OTHER_BYTES if call in (CREATE, FINALIZE) else STEP_BYTES


def filled(place: Place, size: int) -> bytes:
    """Make an acceptable body of exactly so many bytes."""
    return place.put(b'"' + b"x" * (size - len(place.put(b'""'))) + b'"')


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 16_384):
        yield body[at : at + 16_384]


async def test_a_body_of_exactly_the_limit_is_taken(api: AsyncClient, filled_id: str) -> None:
    for place in PLACES:
        if place.call is PATCH:
            # Its outcome is larger than itself by what was there before.
            answer_of(await DELETE_STEP.send(api, filled_id))
            answer_of(await send_body(api, SAVE, filled_id, b'{"data":{"a":""}}'))
        body = filled(place, limit_of(place.call))
        response = await send_body(api, place.call, filled_id, body)
        assert response.is_success, (place.call.name, response.text)


async def test_a_body_past_the_limit_is_refused_by_its_length(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for place in PLACES:
            body = filled(place, limit_of(place.call) + 1)
            target = place.call.target.replace("{id}", filled_id)
            response = await exchange(api, place.call.method, target, JSON_LINE, body)
            problem_of(response, "payload_too_large")


async def test_a_body_past_the_limit_is_refused_without_being_read(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for place in PLACES:
            for length in (limit_of(place.call) + 1, 10**12):
                lines = [*JSON_LINE, ("content-length", str(length))]
                target = place.call.target.replace("{id}", filled_id)
                response = await exchange(api, place.call.method, target, lines)
                problem_of(response, "payload_too_large")


async def test_a_chunked_body_past_the_limit_is_refused(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for place in PLACES:
            body = filled(place, limit_of(place.call) + 1)
            target = place.call.target.replace("{id}", filled_id)
            response = await api.request(
                place.call.method, target, content=in_chunks(body), headers=JSON
            )
            problem_of(response, "payload_too_large")


async def test_a_chunked_body_without_an_end_is_refused_early(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64 * 1024 * 1024:
            sent += 65_536
            yield b"10000\r\n" + b" " * 65_536 + b"\r\n"

    async with untouched(raw):
        lines = [*JSON_LINE, ("transfer-encoding", "chunked")]
        target = SAVE.target.replace("{id}", filled_id)
        response = await exchange(api, "POST", target, lines, endless())
        problem_of(response, "payload_too_large")
    assert sent < 32 * 1024 * 1024


async def test_a_chunked_body_within_the_limit_is_taken(api: AsyncClient, filled_id: str) -> None:
    for place in PLACES:
        target = place.call.target.replace("{id}", filled_id)
        response = await api.request(
            place.call.method, target, content=in_chunks(filled(place, 40_000)), headers=JSON
        )
        assert response.is_success, (place.call.name, response.text)


async def test_the_limit_of_a_step_is_a_setting(serve: Callable[..., Any]) -> None:
    api = await serve(max_step_bytes=1000)
    session_id = answer_of(await CREATE.send(api), 201)["session_id"]
    for place in PLACES[:-2]:
        response = await send_body(api, place.call, session_id, filled(place, 1001))
        problem_of(response, "payload_too_large")
        response = await send_body(api, SAVE, session_id, filled(PLACES[0], 1000))
        answer_of(response)


# --- Media types ----------------------------------------------------------------------------------

BAD_TYPES: dict[str, dict[str, str]] = {
    "text": {"content-type": "text/plain"},
    "text/json": {"content-type": "text/json"},
    "form": {"content-type": "application/x-www-form-urlencoded"},
    "multipart": {"content-type": "multipart/form-data; boundary=x"},
    "any": {"content-type": "*/*"},
    "nothing": {"content-type": ""},
    "another JSON": {"content-type": "application/jsonp"},
    "JSON patch": {"content-type": "application/json-patch+json"},
    "Latin-1": {"content-type": "application/json; charset=latin-1"},
    "UTF-16": {"content-type": 'application/json; charset="utf-16"'},
    "none": {},
    "gzip": {**JSON, "content-encoding": "gzip"},
    "gzip of identity": {**JSON, "content-encoding": "identity, gzip"},
    "br": {**JSON, "content-encoding": "br"},
    "unknown encoding": {**JSON, "content-encoding": "x"},
}


@pytest.mark.parametrize("headers", BAD_TYPES.values(), ids=BAD_TYPES.keys())
async def test_what_is_not_plain_json_in_utf_8_is_not_taken(
    api: AsyncClient, raw: Redis, filled_id: str, headers: dict[str, str]
) -> None:
    async with untouched(raw):
        for call in BODY_CALLS:
            target = call.target.replace("{id}", filled_id)
            body = compact(call.body or {})
            response = await api.request(call.method, target, content=body, headers=headers)
            problem_of(response, "unsupported_media_type")


async def test_a_merge_patch_is_for_patch_only(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    headers = {"content-type": "application/merge-patch+json"}
    async with untouched(raw):
        for call in BODY_CALLS:
            if call is not PATCH:
                target = call.target.replace("{id}", filled_id)
                response = await api.request(
                    call.method, target, content=compact(call.body or {}), headers=headers
                )
                problem_of(response, "unsupported_media_type")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json; charset=utf-8"},
        {"content-type": 'Application/JSON;charset="UTF-8"'},
        {"content-type": "application/json; profile=x"},
        {**JSON, "content-encoding": "identity"},
    ],
)
async def test_json_may_be_named_in_other_ways(
    api: AsyncClient, filled_id: str, headers: dict[str, str]
) -> None:
    for call in BODY_CALLS:
        target = call.target.replace("{id}", filled_id)
        body = compact(call.body or {})
        response = await api.request(call.method, target, content=body, headers=headers)
        assert response.is_success, (call.name, response.text)


# --- Paths and methods ----------------------------------------------------------------------------

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


def paths() -> dict[str, set[str]]:
    """Give the methods of each path, HEAD going with GET."""
    found: dict[str, set[str]] = {f"{BASE}/steps": {"GET"}}
    for path in ("/livez", "/health", "/healthz", "/readyz", "/openapi.json", "/docs"):
        found[path] = {"GET"}
    for call in (*SESSION_CALLS, CREATE):
        found.setdefault(call.target, set()).add(call.method)
    for methods in found.values():
        if "GET" in methods:
            methods.add("HEAD")
    return found


async def test_a_method_that_a_path_has_not_is_refused_with_those_it_has(
    api: AsyncClient, raw: Redis, filled_id: str
) -> None:
    async with untouched(raw):
        for path, allowed in paths().items():
            for method in METHODS:
                if method in allowed:
                    continue
                response = await exchange(api, method, path.replace("{id}", filled_id))
                assert response.status_code == 405
                if method != "HEAD":
                    problem_of(response, "method_not_allowed")
                names = {name.strip() for name in response.headers["allow"].split(",")}
                assert names == allowed, path


async def test_what_is_no_path_is_not_found(api: AsyncClient, raw: Redis, filled_id: str) -> None:
    unknown = [
        *("/", "/nope", "/api", "/api/v1", BASE, BASE + "/", "//", "/docs/x", "/OPENAPI.json"),
        *(f"{BASE}/{filled_id}/nope", f"{BASE}/{filled_id}/steps/1/nope", f"{BASE}//progress"),
        *("/favicon.ico", "/.env", "/health.json", "/health%0a", "/livez%0a", f"{BASE}/steps%0a"),
        *(path.replace("{id}", filled_id) + "/" for path in paths()),
    ]
    async with untouched(raw):
        for path in unknown:
            for method in ("GET", "POST", "DELETE"):
                response = await exchange(api, method, path)
                assert problem_of(response, "not_found")["instance"] == path


async def test_a_query_past_every_limit_is_not_cut_in_silence(api: AsyncClient) -> None:
    target = f"{BASE}/session?workspace_id=w&x={'x' * 70_000}&user_id=u"

    response = await exchange(api, "POST", target)

    if response.is_success:
        assert response.json()["user_id"] == "u"
    else:
        problem_of(response, response.json()["code"])


async def test_what_is_no_http_is_a_problem_too(api: AsyncClient) -> None:
    response = await exchange(api, "GET", "/livez", [("a b", "no header")])

    assert response.status_code == 400
    problem_of(response, response.json()["code"])


# --- The order of checks: path, headers, body, existence, state, version --------------------------

TWO_FAULTS: list[tuple[str, Call, str, dict[str, Any], str]] = [
    # Its name, the call, the session, what it is sent with, and which of the faults wins.
    ("id before step", SAVE._replace(target=f"{BASE}/x/steps/0"), "", {}, "session_not_found"),
    ("id before header", SAVE, "x", {"if_match": "3"}, "session_not_found"),
    ("id before key", SAVE, "x", {"idempotency_key": ""}, "session_not_found"),
    ("id before type", SAVE, "x", {"content_type": "text/plain"}, "session_not_found"),
    ("id before body", SAVE, "x", {"body": b"{"}, "session_not_found"),
    ("step before header", SAVE, "step 0", {"if_match": "3"}, "invalid_step_id"),
    ("step before type", SAVE, "step 0", {"content_type": "text/plain"}, "invalid_step_id"),
    ("step before body", SAVE, "step 0", {"body": b"{"}, "invalid_step_id"),
    ("step before size", SAVE, "step 0", {"body": b" " * 300_000}, "invalid_step_id"),
    ("header before body", SAVE, "known", {"if_match": "3", "body": b"{"}, "invalid_header"),
    (
        "key before body",
        CREATE,
        "",
        {"idempotency_key": "", "body": b"{"},
        "invalid_idempotency_key",
    ),
    (
        "type before body",
        SAVE,
        "known",
        {"content_type": "text/plain", "body": b"{"},
        "unsupported_media_type",
    ),
    ("size before body", SAVE, "known", {"body": b"x" * 300_000}, "payload_too_large"),
    ("step before existence", SAVE, "unknown step 0", {}, "invalid_step_id"),
    ("header before existence", SAVE, "unknown", {"if_match": "3"}, "invalid_header"),
    ("key before existence", SAVE, "unknown", {"idempotency_key": ""}, "invalid_idempotency_key"),
    (
        "type before existence",
        SAVE,
        "unknown",
        {"content_type": "text/plain"},
        "unsupported_media_type",
    ),
    ("size before existence", SAVE, "unknown", {"body": b" " * 300_000}, "payload_too_large"),
    ("JSON before existence", SAVE, "unknown", {"body": b"{"}, "malformed_json"),
    ("data before existence", SAVE, "unknown", {"body": b'{"data":{}}'}, "invalid_step_data"),
    ("batch before existence", BATCH, "unknown", {"body": b'{"steps":{}}'}, "invalid_step_data"),
    (
        "step of a batch before existence",
        BATCH,
        "unknown",
        {"body": b'{"steps":{"24":{"a":1}}}'},
        "invalid_step_id",
    ),
    ("patch before existence", PATCH, "unknown", {"body": b"[]"}, "invalid_step_data"),
    ("draft before existence", PUT_DRAFT, "unknown", {"body": b"{}"}, "invalid_step_data"),
    ("member before existence", FINALIZE, "unknown", {"body": b'{"force":1}'}, "invalid_request"),
    ("header before a read", GET_STEP, "unknown", {"if_none_match": "3"}, "invalid_header"),
    ("header before the export", GET_EXPORT, "unknown", {"if_none_match": "x"}, "invalid_header"),
]


@pytest.mark.parametrize(
    ("call", "session", "sent", "code"),
    [case[1:] for case in TWO_FAULTS],
    ids=[case[0] for case in TWO_FAULTS],
)
async def test_of_two_faults_the_first_in_order_is_told(
    api: AsyncClient,
    raw: Redis,
    filled_id: str,
    call: Call,
    session: str,
    sent: dict[str, Any],
    code: str,
) -> None:
    session_id = {"x": "x", "": ""}.get(session, filled_id)
    if session.startswith("unknown"):
        session_id = unknown_id()
    target = call.target.replace("{id}", session_id)
    if session.endswith("step 0"):
        target = target.replace("/steps/1", "/steps/0")
    sent = dict(sent)
    body = sent.pop("body", b"" if call.body is None else compact(call.body))
    lines = [*(JSON | {name.replace("_", "-"): value for name, value in sent.items()}).items()]
    async with untouched(raw):
        problem_of(
            await exchange(api, call.method, target, lines if body else lines[1:], body), code
        )


async def test_existence_comes_before_state_and_state_before_version(
    api: AsyncClient, finalized_id: str
) -> None:
    unknown = unknown_id()
    for call in (SAVE, PATCH, DELETE_STEP):
        response = await call.send(api, unknown, if_match='"9"')
        problem_of(response, "session_not_found")
        response = await call.send(api, finalized_id, if_match='"9"')
        problem_of(response, "session_finalized")
    for call in (PATCH, DELETE_STEP):
        absent = call._replace(target=call.target.replace("/steps/1", "/steps/2"))
        problem_of(await absent.send(api, finalized_id, if_match='"9"'), "step_not_found")
    for call in (PROMOTE, GET_DRAFT):
        problem_of(await call.send(api, finalized_id, if_match='"9"'), "draft_not_found")
    bad = SAVE._replace(body={"data": {}})
    problem_of(await bad.send(api, finalized_id, if_match='"9"'), "invalid_step_data")
