"""Sessions found again over HTTP: handed over by a token, and listed for whom they belong to."""

import asyncio
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.clock import now_ms
from app.onboarding.tokens import make_resume_token, parse_session_token
from tests.api.helpers import (
    CREATE_TOKEN,
    DELETE_SESSION,
    GET_SESSION,
    GET_TOKENS,
    SESSION,
    Answers,
    answer_of,
    ask,
    check_progress,
    create,
    is_time,
    pointers_of,
    problem_of,
    save,
    unknown_id,
)
from tests.service import BASE

RESUME = f"{BASE}/resume"
MINE = f"{BASE}/mine"


async def hand_over(api: AsyncClient, session_id: str, **body: Any) -> Answers:
    """Make a resume token."""
    return answer_of(await api.post(f"{BASE}/{session_id}/resume-tokens", json=body), 201)


async def resume(api: AsyncClient, token: object) -> Response:
    return await api.post(RESUME, json={"token": token})


async def listed(api: AsyncClient, session_id: str) -> list[Answers]:
    answer = answer_of(await GET_TOKENS.send(api, session_id))
    assert answer["session_id"] == session_id
    tokens: list[Answers] = answer["resume_tokens"]
    return tokens


# --- Handed over ----------------------------------------------------------------------------------


async def test_a_session_is_taken_up_with_a_token_and_gives_one(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id, 2)
    made = await hand_over(api, session_id, label="a phone", ttl_s=60, other=1)
    assert made.keys() == {"token_id", "token", "expires_at"}
    assert re.fullmatch("[0-9a-f]{16}", made["token_id"])
    assert is_time(made["expires_at"])

    first = await resume(api, made["token"])
    session = answer_of(first)
    assert session.keys() == {*SESSION, "session_token"}
    assert first.headers["cache-control"] == "no-store"
    parsed = parse_session_token(session.pop("session_token"))
    assert parsed is not None
    assert parsed.session_id == session_id
    assert session == answer_of(await GET_SESSION.send(api, session_id))
    check_progress(session["progress"], saved=[2])
    # The answer may have been lost.
    assert (await resume(api, made["token"])).content == first.content


async def test_tokens_are_listed_without_themselves_and_revoked(
    api: AsyncClient, session_id: str
) -> None:
    assert await listed(api, session_id) == []
    made = [await hand_over(api, session_id), await hand_over(api, session_id, label="é")]
    answer_of(await resume(api, made[0]["token"]))
    tokens = {each["token_id"]: each for each in await listed(api, session_id)}
    assert tokens.keys() == {each["token_id"] for each in made}
    for each in made:
        told = tokens[each["token_id"]]
        assert told.keys() == {"token_id", "label", "created_at", "expires_at", "used_at"}
        assert told["expires_at"] == each["expires_at"]
    assert [tokens[each["token_id"]]["label"] for each in made] == [None, "é"]
    assert [tokens[each["token_id"]]["used_at"] is None for each in made] == [False, True]

    for each in made:
        path = f"{BASE}/{session_id}/resume-tokens/{each['token_id']}"
        revoked = answer_of(await api.delete(path))
        assert revoked == {"success": True, "session_id": session_id, "token_id": each["token_id"]}
        problem_of(await api.delete(path), "resume_token_not_found")
        problem_of(await resume(api, each["token"]), "resume_token_not_found")
    assert await listed(api, session_id) == []


@pytest.mark.parametrize("content", [b"", b"{}", b'{"label":null}'])
async def test_nothing_has_to_be_said_of_a_token(
    api: AsyncClient, session_id: str, content: bytes
) -> None:
    headers = {"content-type": "application/json"} if content else {}
    made = await api.post(f"{BASE}/{session_id}/resume-tokens", content=content, headers=headers)
    assert answer_of(made, 201)["token"].startswith("ort_")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"ttl_s": 59}, "/ttl_s"),
        ({"ttl_s": 604_801}, "/ttl_s"),
        ({"ttl_s": "60"}, "/ttl_s"),
        ({"ttl_s": 60.5}, "/ttl_s"),
        ({"ttl_s": True}, "/ttl_s"),
        ({"ttl_s": None}, "/ttl_s"),
        ({"label": ""}, "/label"),
        ({"label": "a" * 101}, "/label"),
        ({"label": "a\nb"}, "/label"),
        ({"label": 1}, "/label"),
    ],
)
async def test_what_may_not_be_asked_for_is_named(
    api: AsyncClient, session_id: str, body: Answers, pointer: str
) -> None:
    response = await api.post(f"{BASE}/{session_id}/resume-tokens", json=body)
    assert pointers_of(problem_of(response, "invalid_request")) == {pointer}
    assert await listed(api, session_id) == []


@pytest.mark.parametrize("body", [{}, {"token": None}, {"token": 1}, {"token": ["a"]}])
async def test_a_body_without_a_token_is_refused(api: AsyncClient, body: Answers) -> None:
    problem = problem_of(await api.post(RESUME, json=body), "invalid_request")
    assert pointers_of(problem) == {"/token"}


async def test_there_are_as_many_waiting_as_may(api: AsyncClient, session_id: str) -> None:
    for _ in range(20):
        await hand_over(api, session_id)
    refusal = problem_of(await CREATE_TOKEN.send(api, session_id), "invalid_request")
    assert "revoke one first" in refusal["detail"]


async def test_whatever_is_wrong_the_answer_is_the_same(api: AsyncClient, session_id: str) -> None:
    made = await hand_over(api, session_id)
    revoked = await hand_over(api, session_id)
    gone = await create(api)
    of_gone = await hand_over(api, gone)
    await DELETE_SESSION.send(api, gone)
    path = f"{BASE}/{session_id}/resume-tokens/{revoked['token_id']}"
    answer_of(await api.delete(path))
    tokens = [
        *("", "hello", "ort_", "x" * 60_000, session_id, "\u0000", made["token"] + "="),
        *(revoked["token"], of_gone["token"], made["token"][:-1]),
        make_resume_token(session_id, made["token_id"], bytes(32)),
        make_resume_token(unknown_id(), made["token_id"], bytes(32)),
    ]
    answers = set()
    for token in tokens:
        response = await api.post(RESUME, json={"token": token}, headers={"x-request-id": "r"})
        problem_of(response, "resume_token_not_found")
        headers = {k: v for k, v in response.headers.items() if k != "date"}
        answers.add((response.content, tuple(sorted(headers.items()))))
    assert len(answers) == 1


@pytest.mark.parametrize("token_id", ["0" * 16, "x", "0" * 17, "%00", "A" * 16])
async def test_an_unknown_token_is_not_found(
    api: AsyncClient, session_id: str, token_id: str
) -> None:
    response = await api.delete(f"{BASE}/{session_id}/resume-tokens/{token_id}")
    problem_of(response, "resume_token_not_found")


async def test_damaged_tokens_are_told_as_such(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    made = await hand_over(api, session_id)
    key = f"onboarding:token:{session_id}"
    await ask(raw, "HSET", key, f"resume:{made['token_id']}", "x")
    # To whoever can show nothing else, it is not there.
    problem_of(await resume(api, made["token"]), "resume_token_not_found")
    problem_of(await GET_TOKENS.send(api, session_id), "corrupt_record")
    problem_of(await CREATE_TOKEN.send(api, session_id), "corrupt_record")


async def test_no_line_of_the_log_holds_a_token(
    api: AsyncClient, session_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = await hand_over(api, session_id, label="canary")
    session = answer_of(await resume(api, made["token"]))
    problem_of(await resume(api, made["token"] + "A"), "resume_token_not_found")
    said = capsys.readouterr().out
    assert "/api/v1/onboarding/resume" in said
    for secret in (made["token"][26:], session["session_token"][26:], "canary"):
        assert secret not in said


# --- Mine -----------------------------------------------------------------------------------------


async def mine(api: AsyncClient, **query: Any) -> Answers:
    answer = answer_of(await api.get(MINE, params=query))
    assert answer.keys() == {"sessions", "next_cursor"}
    return answer


async def ids(api: AsyncClient, **query: Any) -> list[str]:
    return [each["session_id"] for each in (await mine(api, **query))["sessions"]]


async def begin_in_turn(api: AsyncClient, *owners: tuple[str, str]) -> list[str]:
    """Begin sessions of users and workspaces, no two within a millisecond."""
    made = []
    for user_id, workspace_id in owners:
        made.append(await create(api, user_id=user_id, workspace_id=workspace_id))
        made_ms = now_ms()
        while now_ms() == made_ms:
            await asyncio.sleep(0)
    return made


@pytest.fixture(params=["off", "on"])
async def anyhow(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> AsyncClient:
    """Give the service without hash tags and with them."""
    client = await serve(key_hash_tag=request.param)
    assert isinstance(client, AsyncClient)
    return client


async def until_listed(api: AsyncClient, expected: list[str], **query: Any) -> None:
    """Wait until the index has followed."""
    async with asyncio.timeout(5):
        while await ids(api, **query) != expected:
            await asyncio.sleep(0.01)


async def test_the_sessions_of_a_user_are_listed_newest_first(anyhow: AsyncClient) -> None:
    api = anyhow
    made = await begin_in_turn(
        api, ("u1", "w1"), ("u2", "w1"), ("u1", "w2"), ("u1", "w1"), ("u", "w1")
    )
    await save(api, made[2], 3)
    await until_listed(api, [made[3], made[2], made[0]], user_id="u1")
    await until_listed(api, [made[3], made[0]], user_id="u1", workspace_id="w1")
    assert await ids(api, user_id="nobody") == []
    rows = (await mine(api, user_id="u1"))["sessions"]
    for row in rows:
        session = answer_of(await GET_SESSION.send(api, row["session_id"]))
        assert row == {name: session[name] for name in row}
        assert row.keys() == {
            *("session_id", "workspace_id", "status", "progress", "created_at", "expires_at")
        }
    check_progress(rows[1]["progress"], saved=[3])
    answer_of(await DELETE_SESSION.send(api, made[3]))
    await until_listed(api, [made[2], made[0]], user_id="u1")


async def test_pages_hold_everything_once(api: AsyncClient) -> None:
    made = await begin_in_turn(api, *[("u1", "w1"), ("u2", "w1")] * 3)
    found, query = [], {"user_id": "u1", "limit": "2"}
    while True:
        page = await mine(api, **query)
        assert len(page["sessions"]) <= 2
        found += [each["session_id"] for each in page["sessions"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert found == made[4::-2]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({}, "/user_id"),
        ({"workspace_id": "w1"}, "/user_id"),
        ({"user_id": ""}, "/user_id"),
        ({"user_id": "u", "workspace_id": "a" * 129}, "/workspace_id"),
        ({"user_id": "u", "limit": "0"}, "/limit"),
        ({"user_id": "u", "limit": "101"}, "/limit"),
        ({"user_id": "u", "cursor": "x"}, "/cursor"),
    ],
)
async def test_a_question_that_cannot_be_answered_is_refused(
    api: AsyncClient, query: Answers, pointer: str
) -> None:
    problem = problem_of(await api.get(MINE, params=query), "invalid_request")
    assert pointers_of(problem) == {pointer}


async def test_a_session_is_shown_to_whom_it_says_itself_that_it_belongs(
    anyhow: AsyncClient, raw: Redis
) -> None:
    api = anyhow
    made = await begin_in_turn(api, *[("u1", "w1")] * 5)
    await until_listed(api, made[::-1], user_id="u1")
    keys = [next(iter([key async for key in raw.scan_iter(f"*{each}*:metadata")])) for each in made]
    # What the index has not noticed: another user, another workspace, none, nothing readable.
    await ask(raw, "HSET", keys[0], "user_id", "u2")
    await ask(raw, "HSET", keys[1], "workspace_id", "w2")
    await ask(raw, "HDEL", keys[2], "user_id")
    await ask(raw, "SET", keys[3], "x", "PX", 60_000)
    assert await ids(api, user_id="u1") == [made[4], made[1]]
    assert await ids(api, user_id="u1", workspace_id="w1") == [made[4]]


async def test_a_session_that_cannot_be_read_is_shown_as_such(
    anyhow: AsyncClient, raw: Redis
) -> None:
    [session_id] = await begin_in_turn(anyhow, ("u1", "w1"))
    await until_listed(anyhow, [session_id], user_id="u1")
    [key] = [key async for key in raw.scan_iter(f"*{session_id}*:progress")]
    await ask(raw, "HSET", key, "saved", "damaged")
    [row] = (await mine(anyhow, user_id="u1"))["sessions"]
    assert (row["session_id"], row["progress"], row["expires_at"]) == (session_id, None, None)


@pytest.mark.parametrize("path", [MINE, RESUME])
async def test_a_fixed_path_is_no_session(api: AsyncClient, path: str) -> None:
    for method in ("DELETE", "PUT", "PATCH"):
        problem_of(await api.request(method, path), "method_not_allowed")
    problem_of(await api.get(f"{path}/progress"), "session_not_found")
    problem_of(await api.get(f"{BASE}/{uuid.uuid4()}"), "session_not_found")
