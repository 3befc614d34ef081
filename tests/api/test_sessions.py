import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    BATCH,
    CREATE,
    DELETE_SESSION,
    DELETE_STEP,
    FINALIZE,
    GET_DRAFT,
    GET_EXPORT,
    GET_PROGRESS,
    GET_SESSION,
    GET_STEP,
    GET_STEPS,
    GET_SUMMARY,
    PATCH,
    PROMOTE,
    PUT_DRAFT,
    REOPEN,
    SAVE,
    SESSION,
    SESSION_CALLS,
    STEP_CALLS,
    Call,
    answer_of,
    check_progress,
    create,
    is_time,
    keys_of,
    pointers_of,
    problem_of,
    save,
    types_of,
    unknown_id,
)
from tests.service import BASE

UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

DAY_MS = 86_400_000

LIFETIME_MS = 7 * DAY_MS


# --- POST /session --------------------------------------------------------------------------------


async def test_a_new_session_is_described_in_full(api: AsyncClient) -> None:
    wanted = {
        "workspace_id": "Acme & Söhne",
        "user_id": "u-1",
        "language": "pt-BR",
        "metadata": {"plan": "pro", "seats": [1, 2.5, None]},
    }

    response = await api.post(f"{BASE}/session", json=wanted)
    session = answer_of(response, 201)

    assert session.keys() >= SESSION
    assert {name: session[name] for name in wanted} == wanted
    assert UUID4.fullmatch(session["session_id"])
    assert session["status"] == "pending"
    assert session["finalized_at"] is None
    assert session["revision"] == 0
    assert is_time(session["created_at"])
    assert is_time(session["expires_at"])
    check_progress(session["progress"], saved=[])
    assert session["progress"]["highest_step"] == 0
    assert session["progress"]["started_at"] == session["created_at"]


async def test_a_new_session_lies_where_its_location_says(api: AsyncClient) -> None:
    response = await CREATE.send(api)
    created = answer_of(response, 201)

    assert response.headers["location"] == f"{BASE}/{created['session_id']}"
    assert answer_of(await api.get(response.headers["location"])) == created


async def test_only_the_workspace_has_to_be_named(api: AsyncClient) -> None:
    session = answer_of(await api.post(f"{BASE}/session", json={"workspace_id": "w"}), 201)

    assert session["workspace_id"] == "w"
    assert session["user_id"] is None
    assert session["language"] == "en"
    assert session["metadata"] == {}


async def test_the_owner_may_come_in_the_query_without_a_body(api: AsyncClient) -> None:
    query = {"workspace_id": "w q", "user_id": "ü", "language": "de"}

    session = answer_of(await api.post(f"{BASE}/session", params=query), 201)

    assert {name: session[name] for name in query} == query


async def test_the_body_wins_over_the_query(api: AsyncClient) -> None:
    query = {"workspace_id": "from query", "user_id": "from query", "language": "de"}
    body = {"workspace_id": "from body", "user_id": None}

    session = answer_of(await api.post(f"{BASE}/session", params=query, json=body), 201)

    assert session["workspace_id"] == "from body"
    assert session["user_id"] is None
    assert session["language"] == "de"


async def test_metadata_is_not_taken_from_the_query(api: AsyncClient) -> None:
    query = {"workspace_id": "w", "metadata": '{"a":1}'}

    assert answer_of(await api.post(f"{BASE}/session", params=query), 201)["metadata"] == {}


async def test_unknown_members_and_parameters_are_ignored(api: AsyncClient) -> None:
    body = {"workspace_id": "w", "status": "complete", "session_id": "mine", "x": [1]}

    session = answer_of(await api.post(f"{BASE}/session?y=1", json=body), 201)

    assert session["status"] == "pending"
    assert session["session_id"] != "mine"


@pytest.mark.parametrize(
    "tag",
    [
        *("en", "de", "pt-BR", "zh-Hant-TW", "sl-rozaj-biske", "es-419", "x-private"),
        *("de-CH-1996", "en-US-u-islamcal", "EN-us", "gsw"),
    ],
)
async def test_a_language_is_a_well_formed_tag_and_kept_as_it_was_spelled(
    api: AsyncClient, tag: str
) -> None:
    body = {"workspace_id": "w", "language": tag}

    assert answer_of(await api.post(f"{BASE}/session", json=body), 201)["language"] == tag


@pytest.mark.parametrize("name", ["workspace_id", "user_id"])
@pytest.mark.parametrize("text", ["x" * 128, "é" * 128, "😀" * 128, " ", '"\\/', "a\u2028b"])
async def test_an_owner_has_1_to_128_characters_of_any_script(
    api: AsyncClient, name: str, text: str
) -> None:
    body = {"workspace_id": "w", name: text}

    assert answer_of(await api.post(f"{BASE}/session", json=body), 201)[name] == text


NOT_ACCEPTABLE = [
    ({}, "/workspace_id"),
    ({"workspace_id": None}, "/workspace_id"),
    ({"workspace_id": ""}, "/workspace_id"),
    ({"workspace_id": "x" * 129}, "/workspace_id"),
    ({"workspace_id": 1}, "/workspace_id"),
    ({"workspace_id": True}, "/workspace_id"),
    ({"workspace_id": ["w"]}, "/workspace_id"),
    ({"workspace_id": {"w": 1}}, "/workspace_id"),
    ({"workspace_id": "a\nb"}, "/workspace_id"),
    ({"workspace_id": "a\u0000"}, "/workspace_id"),
    ({"workspace_id": "a\u001bb"}, "/workspace_id"),
    ({"workspace_id": "a\u007f"}, "/workspace_id"),
    ({"workspace_id": "a\u0085b"}, "/workspace_id"),
    ({"workspace_id": "w", "user_id": ""}, "/user_id"),
    ({"workspace_id": "w", "user_id": "x" * 129}, "/user_id"),
    ({"workspace_id": "w", "user_id": 7}, "/user_id"),
    ({"workspace_id": "w", "user_id": "a\tb"}, "/user_id"),
    ({"workspace_id": "w", "language": None}, "/language"),
    ({"workspace_id": "w", "language": 1}, "/language"),
    ({"workspace_id": "w", "language": ""}, "/language"),
    ({"workspace_id": "w", "language": "e"}, "/language"),
    ({"workspace_id": "w", "language": "en_US"}, "/language"),
    ({"workspace_id": "w", "language": "en-"}, "/language"),
    ({"workspace_id": "w", "language": "-en"}, "/language"),
    ({"workspace_id": "w", "language": "en--US"}, "/language"),
    ({"workspace_id": "w", "language": "en-a"}, "/language"),
    ({"workspace_id": "w", "language": "en\n"}, "/language"),
    ({"workspace_id": "w", "language": "toolonglanguage"}, "/language"),
    ({"workspace_id": "w", "language": "d\u0435"}, "/language"),
    ({"workspace_id": "w", "language": "en-" + "x-aaaaaaaa" * 40}, "/language"),
    ({"workspace_id": "w", "metadata": []}, "/metadata"),
    ({"workspace_id": "w", "metadata": "{}"}, "/metadata"),
    ({"workspace_id": "w", "metadata": 1}, "/metadata"),
]


async def test_what_cannot_own_a_session_is_named_by_its_pointer(
    api: AsyncClient, raw: Redis
) -> None:
    for body, pointer in NOT_ACCEPTABLE:
        problem = problem_of(await api.post(f"{BASE}/session", json=body), "invalid_request")
        assert pointers_of(problem) == {pointer}, body
    assert [key async for key in raw.scan_iter() if b"canary" not in key] == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        "workspace_id=",
        "workspace_id=" + "x" * 129,
        "workspace_id=a%0ab",
        "workspace_id=w&language=en_US",
        "workspace_id=w&user_id=",
        "workspace_id=a&workspace_id=b",
        "workspace_id=%ff",
    ],
)
async def test_what_cannot_own_a_session_is_refused_in_the_query_too(
    api: AsyncClient, query: str
) -> None:
    problem_of(await api.post(f"{BASE}/session?{query}"), "invalid_request")


async def test_every_member_at_fault_is_named_at_once(api: AsyncClient) -> None:
    body = {"workspace_id": "", "user_id": 1, "metadata": []}

    problem = problem_of(await api.post(f"{BASE}/session", json=body), "invalid_request")

    assert pointers_of(problem) == {"/workspace_id", "/user_id", "/metadata"}


async def test_making_a_session_makes_one_event(api: AsyncClient, raw: Redis) -> None:
    assert await types_of(raw, await create(api)) == ["session_created"]


# --- GET and DELETE /{id} -------------------------------------------------------------------------


async def test_a_session_shows_what_was_saved(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id, 2)

    session = answer_of(await GET_SESSION.send(api, session_id))

    assert session.keys() >= SESSION
    check_progress(session["progress"], saved=[2])


@pytest.mark.parametrize("call", SESSION_CALLS, ids=lambda call: call.name)
async def test_an_unknown_session_is_not_found(api: AsyncClient, raw: Redis, call: Call) -> None:
    session_id = unknown_id()

    response = await call.send(api, session_id)

    problem = problem_of(response, "session_not_found")
    assert problem["instance"] == call.target.replace("{id}", session_id)
    assert await keys_of(raw, session_id) == []


async def test_a_deleted_session_is_confirmed_and_gone(api: AsyncClient, session_id: str) -> None:
    deleted = answer_of(await DELETE_SESSION.send(api, session_id))

    assert deleted.keys() >= {"success", "session_id", "message", "deleted_at"}
    assert deleted["success"] is True
    assert deleted["session_id"] == session_id
    assert deleted["message"]
    assert is_time(deleted["deleted_at"])
    for call in SESSION_CALLS:
        problem_of(await call.send(api, session_id), "session_not_found")


@pytest.mark.parametrize("hash_tag", ["off", "on"])
async def test_a_deleted_session_leaves_no_key(
    serve: Callable[..., Any], raw: Redis, hash_tag: str
) -> None:
    api = await serve(key_hash_tag=hash_tag)
    created = await CREATE.send(api, idempotency_key="k-create")
    session_id = created.json()["session_id"]
    for call in (SAVE, PATCH, BATCH, PUT_DRAFT, FINALIZE, REOPEN):
        answer_of(await call.send(api, session_id, idempotency_key=f"k-{call.method}"))
    answer_of(await PROMOTE.send(api, session_id, idempotency_key="k-promote"))
    answer_of(await DELETE_STEP.send(api, session_id, idempotency_key="k-delete"))
    for step_id in (1, 7, 23):
        draft = f"{BASE}/{session_id}/steps/{step_id}/draft"
        answer_of(await api.put(draft, json={"data": {"d": 1}}))
        await save(api, session_id, step_id)
        answer_of(await api.put(draft, json={"data": {"d": 1}}))
    answer_of(await DELETE_STEP.send(api, session_id))
    answer_of(await FINALIZE.send(api, session_id, idempotency_key="k-again"))
    before = {key.decode() async for key in raw.scan_iter(count=1000)}

    answer_of(await DELETE_SESSION.send(api, session_id))

    assert len([key for key in before if ":idem:" in key]) == 10
    left = {key.decode() async for key in raw.scan_iter(count=1000)}
    assert {
        key for key in left if not key.startswith(("onboarding:index:", "onboarding:canary"))
    } == set()


async def test_deleting_a_session_leaves_the_others_alone(
    api: AsyncClient, session_id: str
) -> None:
    other = await create(api)
    await save(api, other, 3, {"kept": True})

    answer_of(await DELETE_SESSION.send(api, session_id))

    check_progress(answer_of(await GET_PROGRESS.send(api, other))["progress"], saved=[3])


# --- Headers of every answer ----------------------------------------------------------------------


async def test_every_session_answer_forbids_caches(api: AsyncClient, session_id: str) -> None:
    calls = [
        *(SAVE, GET_STEP, PATCH, PUT_DRAFT, GET_DRAFT, PROMOTE, BATCH, GET_STEPS, GET_PROGRESS),
        *(GET_SUMMARY, FINALIZE, GET_EXPORT, REOPEN, DELETE_STEP, GET_SESSION, DELETE_SESSION),
    ]
    for call in [*calls, CREATE]:
        response = await call.send(api, session_id)
        assert response.is_success, call.name
        assert response.headers["cache-control"] == "no-store", call.name


@pytest.mark.parametrize("request_id", ["r-1", "A.b_C-9", "x" * 128, "0"])
async def test_a_request_id_is_echoed(api: AsyncClient, session_id: str, request_id: str) -> None:
    served = await GET_SESSION.send(api, session_id, x_request_id=request_id)
    refused = await GET_SESSION.send(api, unknown_id(), x_request_id=request_id)

    assert served.headers["x-request-id"] == request_id
    assert refused.headers["x-request-id"] == request_id
    assert refused.json()["request_id"] == request_id


async def test_a_request_id_is_made_for_each_request_that_brings_none(api: AsyncClient) -> None:
    made = {(await api.get("/livez")).headers["x-request-id"] for _ in range(3)}

    assert len(made) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id) for request_id in made)


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a/b", "a\tb", '"a"', "{}", "a;b"])
async def test_a_request_id_that_cannot_be_taken_is_replaced(
    api: AsyncClient, request_id: str
) -> None:
    response = await api.get("/livez", headers={"x-request-id": request_id})

    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
    assert response.headers["x-request-id"] != request_id


async def test_head_answers_as_get_without_a_body(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    for call in (GET_SESSION, GET_STEP, GET_STEPS, GET_PROGRESS):
        got = await call.send(api, session_id)
        headed = await call._replace(method="HEAD").send(api, session_id)
        assert headed.status_code == 200
        assert headed.content == b""
        assert headed.headers.get("etag") == got.headers.get("etag")


# --- The life of a session ------------------------------------------------------------------------

WRITES = [SAVE, PATCH, BATCH, PUT_DRAFT, PROMOTE, DELETE_STEP, BATCH, FINALIZE, REOPEN]


async def deadlines(raw: Redis, session_id: str) -> dict[str, int]:
    """Give when each key of a session expires, in Unix ms; drafts and records of keys aside."""
    names = [name for name in await keys_of(raw, session_id) if ":draft:" not in name]
    names = [name for name in names if ":idem:" not in name]
    return {name: await raw.pexpiretime(name) for name in names}


async def time_ms(raw: Redis) -> int:
    seconds, micros = await raw.time()
    return int(seconds) * 1000 + int(micros) // 1000


@pytest.mark.parametrize("lifetime_s", [3, 604_800])
async def test_every_write_gives_all_keys_one_deadline_a_lifetime_ahead(
    serve: Callable[..., Any], raw: Redis, lifetime_s: int
) -> None:
    # With the short life the deadline moves on about every 18 ms, so between most of the writes.
    api = await serve(session_ttl_s=lifetime_s, draft_ttl_s=1)
    session_id = await create(api)
    for call in [*WRITES, *WRITES, *WRITES]:
        before = await time_ms(raw)
        answer_of(await call.send(api, session_id))
        after = await time_ms(raw)

        found = await deadlines(raw, session_id)

        assert len(found) >= 4
        assert max(found.values()) - min(found.values()) <= 1000, call.name
        for name, deadline in found.items():
            assert deadline >= before + lifetime_s * 1000 - 2, (call.name, name)
            assert deadline <= after + lifetime_s * 1010 + 2, (call.name, name)


async def test_what_is_shown_as_expiry_is_when_the_keys_expire(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    found = await deadlines(raw, session_id)
    for call in (GET_SESSION, GET_PROGRESS):
        shown = answer_of(await call.send(api, session_id))["expires_at"]
        assert {stamp(deadline) for deadline in found.values()} == {shown}


def stamp(at_ms: int) -> str:
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def test_reads_renew_nothing(serve: Callable[..., Any], raw: Redis) -> None:
    api = await serve(session_ttl_s=2)
    session_id = await create(api)
    for call in (SAVE, PUT_DRAFT, FINALIZE):
        answer_of(await call.send(api, session_id))
    before = await deadlines(raw, session_id)

    for _ in range(5):
        for call in SESSION_CALLS:
            if call.method == "GET":
                await call.send(api, session_id)

    assert await deadlines(raw, session_id) == before


async def test_a_refused_write_renews_nothing(serve: Callable[..., Any], raw: Redis) -> None:
    api = await serve(session_ttl_s=2)
    session_id = await create(api)
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    before = await deadlines(raw, session_id)

    for _ in range(5):
        for call in [*STEP_CALLS, BATCH]:
            if call.method != "GET":
                assert (await call.send(api, session_id)).is_client_error

    assert await deadlines(raw, session_id) == before


async def test_a_damaged_session_is_an_error_and_not_absent(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await raw.delete(f"onboarding:{session_id}:metadata")

    problem_of(await GET_SESSION.send(api, session_id), "corrupt_record")
