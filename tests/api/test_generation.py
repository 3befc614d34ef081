"""The generation over HTTP: the status and what may follow it, the language."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.helpers import (
    ADD_EVENT,
    CREATE,
    DELETE_SESSION,
    FINALIZE,
    GET_LANGUAGE,
    GET_PROGRESS,
    GET_SESSION,
    GET_SHORT_STATUS,
    GET_STATUS,
    GET_STEPS,
    GET_SUMMARY,
    JSON,
    PATCH,
    REOPEN,
    SAVE,
    SET_LANGUAGE,
    SET_STATUS,
    Answers,
    Call,
    answer_of,
    compact,
    create,
    dump,
    events_of,
    exchange,
    is_time,
    pointers_of,
    problem_of,
    save,
    types_of,
    unknown_id,
)
from tests.api.test_bad_input import (
    BAD_TYPES,
    BAD_VALUES,
    NO_JSON,
    OTHER_BYTES,
    WHOLE,
    nested,
    send_body,
    untouched,
)
from tests.service import BASE

STATUS = {
    *("session_id", "status", "progress", "stage", "message", "error_message"),
    *("eta_seconds", "updated_at"),
}

WAYS = {
    "pending": [],
    "processing": ["processing"],
    "complete": ["processing", "complete"],
    "error": ["error"],
}
"""What is set, one after the other, to reach a status."""

ALLOWED = {
    *(("pending", "processing"), ("pending", "error")),
    *(("processing", "complete"), ("processing", "error")),
    ("error", "processing"),
    ("complete", "processing"),
}

TABLE = [(before, after) for before in WAYS for after in ("processing", "complete", "error")]


async def set_status(api: AsyncClient, session_id: str, status: str, **more: Any) -> Response:
    return await SET_STATUS._replace(body={"status": status, **more}).send(api, session_id)


async def status_of(api: AsyncClient, session_id: str) -> Answers:
    return answer_of(await GET_STATUS.send(api, session_id))


async def bring(api: AsyncClient, session_id: str, status: str) -> None:
    for each in WAYS[status]:
        answer_of(await set_status(api, session_id, each))


async def report(api: AsyncClient, session_id: str, stage: str, progress: int, **more: Any) -> None:
    body = {"stage": stage, "progress": progress, **more}
    answer_of(await ADD_EVENT._replace(body=body).send(api, session_id), 201)


# --- GET /{id}/status -----------------------------------------------------------------------------


async def test_a_new_session_waits_for_its_generation(api: AsyncClient, session_id: str) -> None:
    created = answer_of(await GET_SESSION.send(api, session_id))

    status = await status_of(api, session_id)

    assert status.keys() >= STATUS
    assert status == {
        **status,
        "session_id": session_id,
        "status": "pending",
        "progress": 0,
        "stage": None,
        "message": None,
        "error_message": None,
        "eta_seconds": None,
        "updated_at": created["created_at"],
    }


async def test_the_status_shows_the_last_report(api: AsyncClient, session_id: str) -> None:
    answer_of(await set_status(api, session_id, "processing"))
    await report(api, session_id, "answer_generation", 40, message="Nearly: é 中 \U0001f600")
    await report(api, session_id, "own", 30)

    status = await status_of(api, session_id)

    assert status["status"] == "processing"
    assert (status["stage"], status["progress"], status["message"]) == ("own", 30, None)
    assert is_time(status["updated_at"])
    assert status["eta_seconds"] is None or status["eta_seconds"] >= 0


async def test_the_short_status_says_the_same_in_four_members(
    api: AsyncClient, session_id: str
) -> None:
    for _ in range(2):
        status = await status_of(api, session_id)
        short = answer_of(await GET_SHORT_STATUS.send(api, session_id))
        assert short.keys() >= {"status", "progress", "stage", "message"}
        assert short == {name: status[name] for name in short}
        answer_of(await set_status(api, session_id, "processing"))
        await report(api, session_id, "own", 30, message="So far")


async def test_an_even_pace_tells_how_long_it_takes(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await set_status(api, session_id, "processing"))
    progress = f"onboarding:{session_id}:progress"
    # The run began a minute earlier, which no test can wait for.
    await raw.hincrby(progress, "run_at", -60_000)
    await report(api, session_id, "own", 50)

    eta_s = (await status_of(api, session_id))["eta_seconds"]

    assert 50 <= eta_s <= 75


async def test_a_look_at_the_status_changes_nothing(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    before = await dump(raw)
    for call in (GET_STATUS, GET_SHORT_STATUS, GET_LANGUAGE):
        answer_of(await call.send(api, session_id))
    assert await dump(raw) == before


@pytest.mark.parametrize("field", ["status", "percent", "reported_at", "run_at"])
async def test_a_damaged_status_is_an_error(
    api: AsyncClient, raw: Redis, session_id: str, field: str
) -> None:
    answer_of(await set_status(api, session_id, "processing"))
    await raw.hset(f"onboarding:{session_id}:progress", field, "\xff rubbish")

    for call in (GET_STATUS, GET_SHORT_STATUS):
        problem_of(await call.send(api, session_id), "corrupt_record")


# --- PUT /{id}/status -----------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), TABLE)
async def test_a_status_follows_another_or_does_not(
    api: AsyncClient, raw: Redis, session_id: str, before: str, after: str
) -> None:
    await bring(api, session_id, before)
    there = await dump(raw)
    events = await events_of(raw, session_id)

    response = await set_status(api, session_id, after)

    if before == after:
        assert answer_of(response) == await status_of(api, session_id)
        assert await events_of(raw, session_id) == events
    elif (before, after) in ALLOWED:
        assert answer_of(response).keys() >= STATUS
        assert response.json()["status"] == after
        seen = await status_of(api, session_id)
        assert response.json() == {**seen, "eta_seconds": response.json()["eta_seconds"]}
        assert await types_of(raw, session_id) == [
            *(event["type"] for event in events),
            "status_changed",
        ]
    else:
        problem = problem_of(response, "invalid_transition")
        assert before in problem["detail"]
        assert after in problem["detail"]
        assert await dump(raw) == there


@pytest.mark.parametrize("status", [each for each in WAYS if each != "pending"])
async def test_every_look_at_a_session_shows_the_status(
    api: AsyncClient, session_id: str, status: str
) -> None:
    await bring(api, session_id, status)
    for call in (GET_SESSION, GET_PROGRESS, GET_SUMMARY, GET_STATUS, GET_SHORT_STATUS):
        assert answer_of(await call.send(api, session_id))["status"] == status


async def test_the_last_of_many_at_once_is_one_of_them_and_each_change_is_one_event(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    wanted = ["processing", "complete", "error"] * 10

    answers = await asyncio.gather(*(set_status(api, session_id, each) for each in wanted))

    assert {response.status_code for response in answers} <= {200, 409}
    changes = [
        event["status"]
        for event in await events_of(raw, session_id)
        if event["type"] == "status_changed"
    ]
    walk = ["pending", *changes]
    assert set(pairwise(walk)) <= ALLOWED
    assert (await status_of(api, session_id))["status"] == walk[-1]


async def test_an_error_has_a_message_until_the_next_run(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    text = "No model: é 中 \U0001f600 <b>" + "x" * 1900
    answer_of(await set_status(api, session_id, "processing"))
    await report(api, session_id, "own", 70, message="So far")

    failed = answer_of(await set_status(api, session_id, "error", error_message=text))

    assert failed["error_message"] == text
    assert (failed["stage"], failed["progress"], failed["message"]) == ("own", 70, "So far")
    assert failed["eta_seconds"] is None
    assert (await events_of(raw, session_id))[-1]["error_message"] == text

    again = answer_of(await set_status(api, session_id, "error", error_message="Another"))
    assert again["error_message"] == text

    begun = answer_of(await set_status(api, session_id, "processing"))
    assert begun["error_message"] is None
    assert (begun["stage"], begun["progress"], begun["message"]) == (None, 0, None)
    assert begun == {**await status_of(api, session_id), "eta_seconds": None}


async def test_an_error_needs_no_message(api: AsyncClient, session_id: str) -> None:
    for body in ({}, {"error_message": None}, {"error_message": ""}):
        failed = answer_of(await set_status(api, session_id, "error", **body))
        assert failed["error_message"] is None
        answer_of(await set_status(api, session_id, "processing", **body))


async def test_a_run_that_is_complete_is_at_100(api: AsyncClient, session_id: str) -> None:
    answer_of(await set_status(api, session_id, "processing"))
    await report(api, session_id, "own", 70)

    complete = answer_of(await set_status(api, session_id, "complete"))

    assert complete["progress"] == 100
    assert complete["eta_seconds"] in (0, None)


async def test_a_new_run_begins_at_nothing(api: AsyncClient, session_id: str) -> None:
    await bring(api, session_id, "complete")

    begun = answer_of(await set_status(api, session_id, "processing"))

    assert (begun["progress"], begun["stage"], begun["eta_seconds"]) == (0, None, None)


NO_STATUSES: list[Any] = [
    *("pending", "", "Processing", "done", "processing ", None, 1, True, [], {}, ["error"])
]
NO_MESSAGES: list[Any] = [1, True, [], {}, "x" * 2001, "a\nb", "\0", "\x7f", "\x85", "\t"]

BAD_STATUSES: list[Answers] = [
    *({"status": each} for each in NO_STATUSES),
    *({"status": "error", "error_message": each} for each in NO_MESSAGES),
    *({}, {"Status": "error"}, {"error_message": "It broke"}),
]


async def test_what_is_no_status_is_refused(api: AsyncClient, raw: Redis, session_id: str) -> None:
    async with untouched(raw):
        for body in BAD_STATUSES:
            response = await SET_STATUS._replace(body=body).send(api, session_id)
            pointers = pointers_of(problem_of(response, "invalid_request"))
            message_is_bad = body.get("status") == "error"
            assert pointers == {"/error_message" if message_is_bad else "/status"}, body


async def test_only_an_error_has_a_message(api: AsyncClient, raw: Redis, session_id: str) -> None:
    async with untouched(raw):
        for status in ("processing", "complete"):
            response = await set_status(api, session_id, status, error_message="It broke")
            assert pointers_of(problem_of(response, "invalid_request")) == {"/error_message"}


# --- The steps and the status ---------------------------------------------------------------------


@pytest.mark.parametrize("status", WAYS)
async def test_the_status_locks_no_steps(api: AsyncClient, session_id: str, status: str) -> None:
    await bring(api, session_id, status)

    await save(api, session_id)
    answer_of(await PATCH.send(api, session_id))

    assert (await status_of(api, session_id))["status"] == status


@pytest.mark.parametrize("status", WAYS)
async def test_finalize_locks_them_in_every_status_and_leaves_it(
    api: AsyncClient, session_id: str, status: str
) -> None:
    await save(api, session_id)
    await bring(api, session_id, status)

    answer_of(await FINALIZE.send(api, session_id))

    problem_of(await SAVE.send(api, session_id), "session_finalized")
    assert (await status_of(api, session_id))["status"] == status


async def test_a_session_is_not_reopened_while_its_generator_works(
    api: AsyncClient, raw: Redis, finalized_id: str
) -> None:
    answer_of(await set_status(api, finalized_id, "processing"))
    before = await dump(raw)

    problem_of(await REOPEN.send(api, finalized_id), "generation_running")

    assert await dump(raw) == before


@pytest.mark.parametrize("status", ["pending", "complete", "error"])
async def test_a_reopened_session_waits_for_a_generation_again(
    api: AsyncClient, finalized_id: str, status: str
) -> None:
    await bring(api, finalized_id, status)
    if status == "error":
        answer_of(await set_status(api, finalized_id, "processing"))
        answer_of(await set_status(api, finalized_id, "error", error_message="It broke"))
    await report(api, finalized_id, "own", 70, message="So far")

    reopened = answer_of(await REOPEN.send(api, finalized_id))

    assert reopened["status"] == "pending"
    seen = await status_of(api, finalized_id)
    assert (seen["status"], seen["progress"], seen["stage"]) == ("pending", 0, None)
    assert (seen["message"], seen["error_message"], seen["eta_seconds"]) == (None, None, None)
    answer_of(await set_status(api, finalized_id, "processing"))


# --- The language ---------------------------------------------------------------------------------


async def test_a_language_is_read_as_it_was_set(api: AsyncClient) -> None:
    session_id = await create(api, language="pt-BR")
    shown = answer_of(await GET_LANGUAGE.send(api, session_id))
    assert shown == {"session_id": session_id, "language": "pt-BR"}
    for language in ("de", "DE", "zh-Hans-CN", "i-klingon", "x-own", "en"):
        body = {"language": language}
        answer = answer_of(await SET_LANGUAGE._replace(body=body).send(api, session_id))
        assert answer == {"session_id": session_id, "language": language}
        assert answer_of(await GET_LANGUAGE.send(api, session_id)) == answer
        assert answer_of(await GET_SESSION.send(api, session_id))["language"] == language
        assert answer_of(await GET_SUMMARY.send(api, session_id))["language"] == language


async def test_a_session_without_a_language_speaks_english(
    api: AsyncClient, session_id: str
) -> None:
    assert answer_of(await GET_LANGUAGE.send(api, session_id))["language"] == "en"


async def test_only_another_language_is_an_event(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for language in ("en", "de", "de", "DE"):
        body = {"language": language}
        answer_of(await SET_LANGUAGE._replace(body=body).send(api, session_id))

    events = await events_of(raw, session_id)

    assert [event["type"] for event in events] == ["session_created", *["language_changed"] * 2]
    assert [event["language"] for event in events[1:]] == ["de", "DE"]


async def test_a_language_may_be_set_whatever_the_state(
    api: AsyncClient, finalized_id: str
) -> None:
    answer_of(await set_status(api, finalized_id, "processing"))
    answer_of(await SET_LANGUAGE.send(api, finalized_id))


NO_LANGUAGES: list[Any] = [
    None,
    "",
    1,
    True,
    [],
    {},
    "e",
    "a_b",
    "en-",
    "english language",
    "en\n",
    "é",
]


async def test_what_is_no_language_is_refused(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for body in [*({"language": each} for each in NO_LANGUAGES), {}, {"Language": "de"}]:
            response = await SET_LANGUAGE._replace(body=body).send(api, session_id)
            assert pointers_of(problem_of(response, "invalid_request")) == {"/language"}, body


# --- Bodies: the rules of every other call, for what a generator sends ----------------------------

PLACES = [
    (SET_STATUS, b'{"status":"processing","a":X}'),
    (ADD_EVENT, b'{"stage":"s","progress":1,"a":X}'),
    (SET_LANGUAGE, b'{"language":"de","a":X}'),
]
"""Each call with a body that has X where a member stands that nobody knows."""


async def test_a_body_that_is_not_json_is_refused(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for call, body in PLACES:
            spoiled = [spoil(body.replace(b"X", b'"\xc3\xa9"')) for spoil in WHOLE.values()]
            values = [body.replace(b"X", value) for value in NO_JSON.values()]
            for sent in [*spoiled, *values, b""]:
                response = await send_body(api, call, session_id, sent)
                problem_of(response, "malformed_json")


async def test_a_value_that_no_document_holds_is_refused_by_its_pointer(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for call, body in PLACES:
            for value, below in [*BAD_VALUES.values(), (nested(64), None)]:
                response = await send_body(api, call, session_id, body.replace(b"X", value))
                problem = problem_of(response, "invalid_request")
                if below is not None:
                    assert pointers_of(problem) == {"/a" + below}


async def test_a_document_that_is_no_object_is_refused(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for call, _ in PLACES:
            for body in (b"[]", b'"x"', b"null", b"1", b"true", b"[{}]"):
                response = await send_body(api, call, session_id, body)
                assert pointers_of(problem_of(response, "invalid_request")) == {""}


async def test_a_member_that_nobody_knows_is_ignored(api: AsyncClient, session_id: str) -> None:
    for call, body in PLACES:
        sent = body.replace(b"X", b'{"deep":[1,null,"x"]}')
        response = await send_body(api, call, session_id, sent)
        assert response.is_success, response.text


async def test_what_is_not_plain_json_in_utf_8_is_not_taken(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async with untouched(raw):
        for call, _ in PLACES:
            for headers in BAD_TYPES.values():
                target = call.target.replace("{id}", session_id)
                response = await api.request(
                    call.method, target, content=compact(call.body), headers=headers
                )
                problem_of(response, "unsupported_media_type")


async def test_a_body_may_have_64_kb_and_no_more(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for call, body in PLACES:
        room = OTHER_BYTES - len(body.replace(b"X", b'""'))
        async with untouched(raw):
            larger = body.replace(b"X", b'"' + b"x" * (room + 1) + b'"')
            problem_of(await send_body(api, call, session_id, larger), "payload_too_large")
            target = call.target.replace("{id}", session_id)
            lines = [*JSON.items(), ("content-length", str(10**12))]
            response = await exchange(api, call.method, target, lines)
            problem_of(response, "payload_too_large")
        largest = body.replace(b"X", b'"' + b"x" * room + b'"')
        assert (await send_body(api, call, session_id, largest)).is_success


@pytest.mark.parametrize("call", [SET_STATUS, ADD_EVENT, SET_LANGUAGE], ids=lambda call: call.name)
async def test_of_two_faults_the_first_in_order_is_told(
    api: AsyncClient, raw: Redis, call: Call
) -> None:
    unknown = unknown_id()
    target, lines = call.target.replace("{id}", unknown), [*JSON.items()]
    async with untouched(raw):
        bad_id = call.target.replace("{id}", "x")
        problem_of(await exchange(api, call.method, bad_id, lines, b"{"), "session_not_found")
        plain = [("content-type", "text/plain")]
        response = await exchange(api, call.method, target, plain, b"{")
        problem_of(response, "unsupported_media_type")
        problem_of(await exchange(api, call.method, target, lines, b"{"), "malformed_json")
        problem_of(await exchange(api, call.method, target, lines, b"{}"), "invalid_request")
    problem_of(await call.send(api, unknown), "session_not_found")


# --- Sent twice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "status", "other"),
    [
        (SET_STATUS, 200, {"status": "error"}),
        (ADD_EVENT, 201, {"stage": "another", "progress": 1}),
        (SET_LANGUAGE, 200, {"language": "fr"}),
    ],
    ids=lambda each: each.name if isinstance(each, Call) else "",
)
async def test_an_idempotency_key_repeats_the_first_answer(
    api: AsyncClient, raw: Redis, session_id: str, call: Call, status: int, other: Answers
) -> None:
    first = await call.send(api, session_id, idempotency_key="k")
    answer_of(first, status)
    assert "idempotent-replayed" not in first.headers
    answer_of(await set_status(api, session_id, "error"))
    answer_of(await SET_LANGUAGE._replace(body={"language": "nl"}).send(api, session_id))
    events = await types_of(raw, session_id)

    again = await call.send(api, session_id, idempotency_key="k")

    assert (again.status_code, again.json()) == (status, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    response = await call._replace(body=other).send(api, session_id, idempotency_key="k")
    problem_of(response, "idempotency_mismatch")
    assert await types_of(raw, session_id) == events


@pytest.mark.parametrize("hash_tag", ["off", "on"])
async def test_a_session_with_a_generation_leaves_no_key_when_it_is_deleted(
    serve: Callable[..., Any], raw: Redis, hash_tag: str
) -> None:
    api = await serve(key_hash_tag=hash_tag)
    session_id = answer_of(await CREATE.send(api), 201)["session_id"]
    for call in (SET_STATUS, ADD_EVENT, SET_LANGUAGE):
        assert (await call.send(api, session_id, idempotency_key="k")).is_success
    target = f"{BASE}/{session_id}/result"
    answer_of(await api.put(target, content=b"x" * 600_000), 201)
    answer_of(await GET_STEPS.send(api, session_id))

    answer_of(await DELETE_SESSION.send(api, session_id))

    left = [key for key in await dump(raw) if not key.startswith("onboarding:index:")]
    assert left == []
