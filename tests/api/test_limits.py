"""Limits over HTTP: who is one caller, what the answers say, and what is never counted."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response

from app.api.headers import describe_policies, describe_standings
from app.api.problems import describe
from app.errors import RateLimitedError
from app.onboarding.access import Scope
from app.onboarding.limits import Limit, Policy, Standing
from app.services.limits import TRANSFERS_OF_ONE
from tests.access import AUTH, bearer, machine, user
from tests.api.helpers import (
    CREATE,
    GET_PROGRESS,
    GET_SESSION,
    SAVE,
    answer_of,
    create,
    problem_of,
    unknown_id,
)
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.service import BASE

SCOPES = list(Scope)
Serve = Callable[..., Any]

DAY = "/day"
"""A limit of so many a day gets no token back while a test runs."""


def test_a_refusal_says_when_there_is_room_again() -> None:
    scope = {"type": "http", "raw_path": b"/somewhere"}
    for error, retry_after in [
        (RateLimitedError("Too much; ask again in 17 seconds", 17), "17"),
        (RateLimitedError(), "1"),
    ]:
        response = describe(scope, error)
        assert response.status_code == 429
        assert response.headers.getlist("retry-after") == [retry_after]


def test_callers_are_told_in_the_words_of_the_draft() -> None:
    limit = Limit(600, 60)
    one = Standing(Policy.REQUESTS, limit, 597, 1)
    other = Standing(Policy.CREATIONS, Limit(1, 86_400), 0, 0)
    assert describe_policies([one]) == '"requests";q=600;w=60'
    assert describe_policies([one, other]) == '"requests";q=600;w=60, "creations";q=1;w=86400'
    assert describe_standings([one]) == '"requests";r=597;t=1'
    assert describe_standings([one, other]) == '"requests";r=597;t=1, "creations";r=0;t=0'


def check_refused(answer: Response, policy: str, quota: int) -> None:
    """Check that an answer says which limit was reached, and when to come again."""
    problem_of(answer, "rate_limited")
    wait_s = int(answer.headers["retry-after"])
    assert wait_s >= 1
    assert answer.headers["ratelimit-policy"].endswith(f'"{policy}";q={quota};w=86400')
    assert answer.headers["ratelimit"].endswith(f'"{policy}";r=0;t={wait_s}')


async def test_every_answer_says_how_its_caller_stands(serve: Serve) -> None:
    api: AsyncClient = await serve(rate_limit="5" + DAY)
    session_id = await create(api)
    lefts = []
    for call in (GET_SESSION, SAVE, GET_PROGRESS):
        answer = await call.send(api, session_id)
        assert answer.headers["ratelimit-policy"] == '"requests";q=5;w=86400'
        left = re.fullmatch(r'"requests";r=(\d+);t=\d+', answer.headers["ratelimit"])
        lefts.append(left and int(left[1]))
    assert lefts == [3, 2, 1]
    # Errors say it too, and count.
    wrong = await api.post(f"{BASE}/{session_id}/steps/1", content=b"no JSON")
    assert wrong.headers["ratelimit"].startswith('"requests";r=0;')
    check_refused(await GET_SESSION.send(api, session_id), "requests", 5)
    for path in ("/livez", "/health", "/readyz", "/docs", "/openapi.json"):
        answer = await api.get(path)
        assert answer.is_success
        assert "ratelimit" not in answer.headers


async def test_sessions_made_are_counted_beside_requests(serve: Serve) -> None:
    api: AsyncClient = await serve(rate_limit="50" + DAY, create_limit="2" + DAY)
    made = await CREATE.send(api)
    assert made.headers["ratelimit-policy"] == '"requests";q=50;w=86400, "creations";q=2;w=86400'
    assert re.match(r'"requests";r=49;t=\d+, "creations";r=1;t=\d+', made.headers["ratelimit"])
    uploaded = await api.post("/api/upload", files={"file": ("a.txt", b"text")})
    assert uploaded.status_code == 201
    for refused in (
        await CREATE.send(api),
        await api.post("/api/upload", files={"file": ("a.txt", b"text")}),
    ):
        check_refused(refused, "creations", 2)
    assert (await GET_SESSION.send(api, made.json()["session_id"])).is_success


async def test_who_guesses_ids_too_often_learns_no_more_from_any(serve: Serve) -> None:
    api: AsyncClient = await serve(miss_limit="3" + DAY)
    session_id = await create(api)
    for call in (GET_SESSION, SAVE):
        problem_of(await call.send(api, unknown_id()), "session_not_found")
    problem_of(await api.post(f"{BASE}/resume", json={"token": "x"}), "resume_token_not_found")
    for each in (unknown_id(), session_id, unknown_id()):
        check_refused(await GET_SESSION.send(api, each), "misses", 3)
    # Where there is nothing to guess, there is nothing to refuse.
    assert (await api.get(f"{BASE}/steps")).is_success


async def test_callers_are_counted_apart_by_who_they_are_and_others_by_where(serve: Serve) -> None:
    api: AsyncClient = await serve(**AUTH, rate_limit="4" + DAY)

    async def get(headers: dict[str, str]) -> int:
        return (await api.get(f"{BASE}/steps", headers=headers)).status_code

    made = await api.post(f"{BASE}/session", json={}, headers=user())
    wizard = bearer(answer_of(made, 201)["session_token"])
    # The user has made one request already. Two tokens of one are one caller.
    assert [await get(user(jti=str(n))) for n in range(4)] == [200] * 3 + [429]
    assert [await get(user("u2")) for _ in range(5)] == [200] * 4 + [429]
    assert [await get(wizard) for _ in range(5)] == [200] * 4 + [429]
    assert [await get(machine(scope)) for scope in SCOPES] == [200] * 3
    # Who is nobody is their address, and takes nothing from who is somebody.
    nobody = [await get(shown) for shown in ({}, bearer("x"), {}, bearer("y"), {}, bearer("z"))]
    assert nobody == [401] * 4 + [429] * 2
    assert await get(machine(SCOPES[0])) == 200


async def test_a_proxy_is_believed_as_uvicorn_is_told_and_names_nobody_but_addresses(
    serve: Serve,
) -> None:
    api: AsyncClient = await serve(**AUTH, rate_limit="2" + DAY)

    async def get(host: str, **headers: str) -> int:
        told = {"x-forwarded-for": host, **headers}
        return (await api.get(f"{BASE}/steps", headers=told)).status_code

    for host in ("192.0.2.1", "2001:db8::1", f"machine:{SCOPES[0]}-key"):
        assert [await get(host) for _ in range(3)] == [401, 401, 429]
    assert await get("192.0.2.1", **machine(SCOPES[0])) == 200


async def test_without_the_store_nothing_is_limited_and_nothing_is_given_away(
    serve: Serve, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        api: AsyncClient = await serve(
            **AUTH, redis_url=url, rate_limit="2" + DAY, retry_attempts=1, redis_timeout_s=0.2
        )
        made = answer_of(await api.post(f"{BASE}/session", json={}, headers=user()), 201)
        proxy.refuse()
        proxy.reset_all()
        for _ in range(4):
            # The catalogue lies in memory; whose a session is does not.
            assert (await api.get(f"{BASE}/steps", headers=user())).status_code == 200
            foreign = await GET_SESSION.send(api, made["session_id"], **user("u2"))
            assert problem_of(foreign, "store_unavailable")["status"] == 503
        unverified = await GET_SESSION.send(
            api, made["session_id"], **bearer(made["session_token"])
        )
        problem_of(unverified, "store_unavailable")


# --- Requests at once -----------------------------------------------------------------------------


async def test_one_request_more_than_may_be_at_once_is_refused_at_once(
    serve: Serve, valkey: Valkey
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        api: AsyncClient = await serve(redis_url=url, max_in_flight=2, redis_timeout_s=5)
        session_id = await create(api)
        before = proxy.commands.total()
        proxy.hold()
        held = [asyncio.create_task(GET_PROGRESS.send(api, session_id)) for _ in range(2)]
        async with asyncio.timeout(5):
            while proxy.commands.total() < before + 2:
                await asyncio.sleep(0.001)
        refused = await SAVE.send(api, session_id)
        assert problem_of(refused, "overloaded")["status"] == 503
        assert refused.headers["retry-after"] == "1"
        assert (await api.get("/livez")).is_success
        assert (await api.get("/health")).status_code in (200, 503)
        proxy.release()
        assert [each.status_code for each in await asyncio.gather(*held)] == [200, 200]
        assert (await SAVE.send(api, session_id)).is_success


async def test_whoever_sends_a_body_slowly_is_none_of_the_requests_at_once(serve: Serve) -> None:
    api: AsyncClient = await serve(max_in_flight=1)
    session_id = await create(api)
    writers = []
    for path, length in ((f"{BASE}/resume", 50), (f"{BASE}/{session_id}/result", 50)):
        _, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
        method = "POST" if path.endswith("resume") else "PUT"
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {length}\r\n\r\n{{".encode())
        await writer.drain()
        writers.append(writer)
    for _ in range(5):
        assert (await SAVE.send(api, session_id)).is_success
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("path", ["progress", "events/stream"])
async def test_who_leaves_is_not_counted_any_more(serve: Serve, path: str) -> None:
    api: AsyncClient = await serve(max_in_flight=1)
    session_id = await create(api)
    for _ in range(3):
        async with api.stream("GET", f"{BASE}/{session_id}/{path}") as response:
            assert response.status_code == 200
        assert (await SAVE.send(api, session_id)).is_success


async def test_transfers_are_counted_apart_and_no_session_has_many(serve: Serve) -> None:
    api: AsyncClient = await serve(max_in_flight=TRANSFERS_OF_ONE + 1)
    one, other = await create(api), await create(api)
    writers = []
    for _ in range(TRANSFERS_OF_ONE):
        _, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
        head = f"PUT {BASE}/{one}/result HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
        writer.write(f"{head}1".encode())
        writers.append(writer)
    async with asyncio.timeout(5):
        while (refused := await api.put(f"{BASE}/{one}/result", content=b"x")).status_code == 201:
            pass
    problem_of(refused, "overloaded")
    for _ in range(3):
        assert (await SAVE.send(api, one)).is_success
        assert (await api.put(f"{BASE}/{other}/result", content=b"x")).status_code == 201
    for writer in writers:
        writer.close()
    async with asyncio.timeout(5):
        while (await api.put(f"{BASE}/{one}/result", content=b"x")).status_code != 201:
            pass
