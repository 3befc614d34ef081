from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.helpers import (
    CREATE,
    GET_EXPORT,
    GET_SESSION,
    JSON,
    SAVE,
    answer_of,
    commands,
    create,
    dump,
    problem_of,
    save,
    step_path,
    unknown_id,
)
from tests.service import BASE

ORIGIN = "https://app.example.com"
OTHER_PORT = "http://localhost:3000"
BASE_SESSION = f"{BASE}/session"

STRANGERS = [
    "https://evil.example.com",
    "https://app.example.com.evil.test",
    "https://xapp.example.com",
    "http://app.example.com",
    "https://app.example.com:8443",
    "https://app.example.com:443",
    "https://app.example.com/",
    "https://APP.example.com",
    "https://app.example.com https://evil.test",
    "http://localhost:3001",
    "http://localhost",
    "null",
    "*",
]

REQUEST_HEADERS = [
    *("content-type", "if-match", "if-none-match", "idempotency-key", "x-request-id"),
]

EXPOSED = {"etag", "location", "retry-after", "x-request-id", "idempotent-replayed"}


@pytest.fixture
async def api(serve: Callable[..., Any]) -> AsyncClient:
    """Run the service for the pages of two origins."""
    client: AsyncClient = await serve(cors_origins=f"{ORIGIN}, {OTHER_PORT}")
    return client


def cors_of(response: Response) -> dict[str, str]:
    return {
        name: value
        for name, value in response.headers.items()
        if name.startswith("access-control-")
    }


def names_in(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


async def preflight(
    api: AsyncClient, origin: str, method: str = "POST", headers: str = "", path: str = BASE_SESSION
) -> Response:
    asked = {"origin": origin, "access-control-request-method": method}
    if headers:
        asked["access-control-request-headers"] = headers
    return await api.options(path, headers=asked)


# --- Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [ORIGIN, OTHER_PORT])
async def test_a_listed_origin_may_read_the_answer(api: AsyncClient, origin: str) -> None:
    response = await CREATE.send(api, origin=origin)

    answer_of(response, 201)
    assert response.headers["access-control-allow-origin"] == origin
    assert "origin" in names_in(response.headers["vary"])
    assert names_in(response.headers["access-control-expose-headers"]) >= EXPOSED


async def test_a_page_may_read_the_headers_that_it_needs(api: AsyncClient, session_id: str) -> None:
    response = await SAVE.send(api, session_id, origin=ORIGIN, idempotency_key="k1")
    response = await SAVE.send(api, session_id, origin=ORIGIN, idempotency_key="k1")

    exposed = names_in(response.headers["access-control-expose-headers"])

    for name in ("etag", "x-request-id", "idempotent-replayed"):
        assert response.headers[name]
        assert name in exposed


@pytest.mark.parametrize("origin", STRANGERS)
async def test_any_other_origin_gets_no_header_of_cors(api: AsyncClient, origin: str) -> None:
    served = await CREATE.send(api, origin=origin)
    refused = await GET_SESSION.send(api, unknown_id(), origin=origin)
    asked = await preflight(api, origin)

    answer_of(served, 201)
    problem_of(refused, "session_not_found")
    problem_of(asked, "method_not_allowed")
    for response in (served, refused, asked):
        assert cors_of(response) == {}


async def test_without_an_origin_there_is_no_header_of_cors(api: AsyncClient) -> None:
    response = await CREATE.send(api)

    answer_of(response, 201)
    assert cors_of(response) == {}


async def test_nobody_is_listed_by_default(serve: Callable[..., Any]) -> None:
    api = await serve()

    for response in (await CREATE.send(api, origin=ORIGIN), await preflight(api, ORIGIN)):
        assert cors_of(response) == {}


async def test_errors_can_be_read_by_the_page_too(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    damaged = await create(api)
    await save(api, damaged)
    await raw.set(f"onboarding:{damaged}:step:1", b"\xff", keepttl=True)
    path, origin = step_path(session_id, 1), {"origin": ORIGIN}
    large = b" " * (256 * 1024 + 1)
    refusals = {
        "malformed_json": await api.post(path, content=b"{", headers={**JSON, **origin}),
        "session_not_found": await GET_SESSION.send(api, unknown_id(), origin=ORIGIN),
        "export_not_found": await GET_EXPORT.send(api, session_id, origin=ORIGIN),
        "not_found": await api.get("/nope", headers=origin),
        "method_not_allowed": await api.put(BASE_SESSION, headers=origin),
        "version_conflict": await SAVE.send(api, session_id, origin=ORIGIN, if_match='"9"'),
        "payload_too_large": await api.post(path, content=large, headers={**JSON, **origin}),
        "unsupported_media_type": await api.post(path, content=b"{}", headers=origin),
        "invalid_step_data": await api.post(path, json={"data": {}}, headers=origin),
        "corrupt_record": await api.get(step_path(damaged, 1), headers=origin),
    }
    for code, response in refusals.items():
        problem_of(response, code)
        assert response.headers["access-control-allow-origin"] == ORIGIN, code
        assert names_in(response.headers["access-control-expose-headers"]) >= EXPOSED, code


async def test_a_304_can_be_read_by_the_page_too(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    headers = {"origin": ORIGIN, "if-none-match": '"1"'}

    response = await api.get(step_path(session_id, 1), headers=headers)

    assert response.status_code == 304
    assert response.headers["access-control-allow-origin"] == ORIGIN


# --- Preflight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_a_preflight_admits_every_method_and_header_of_ours(
    api: AsyncClient, raw: Redis, session_id: str, method: str
) -> None:
    keys, asked = await dump(raw), await commands(raw)
    path = step_path(session_id, 1)

    response = await preflight(api, ORIGIN, method, ", ".join(REQUEST_HEADERS), path)

    assert response.status_code in {200, 204}, response.text
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert method.lower() in names_in(response.headers["access-control-allow-methods"])
    assert names_in(response.headers["access-control-allow-headers"]) >= set(REQUEST_HEADERS)
    assert "origin" in names_in(response.headers["vary"])
    assert response.headers["x-request-id"]
    assert await commands(raw) == asked
    assert await dump(raw) == keys


@pytest.mark.parametrize(("method", "headers"), [("PROPFIND", ""), ("POST", "x-other")])
async def test_a_preflight_for_something_else_is_a_problem(
    api: AsyncClient, method: str, headers: str
) -> None:
    response = await preflight(api, ORIGIN, method, headers)

    assert 400 <= response.status_code < 500
    problem_of(response, response.json()["code"])


async def test_options_that_are_no_preflight_are_a_method_that_is_not_there(
    api: AsyncClient,
) -> None:
    response = await api.options(BASE_SESSION, headers={"origin": ORIGIN})

    problem_of(response, "method_not_allowed")
    assert response.headers["access-control-allow-origin"] == ORIGIN
