import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from httpx2 import AsyncClient
from openapi_spec_validator import OpenAPIV31SpecValidator
from redis.asyncio import Redis

from app.settings import Settings
from tests.api.helpers import (
    CREATE,
    FINALIZE,
    GET_STEP,
    REOPEN,
    SAVE,
    SESSION_CALLS,
    Answers,
    Call,
    answer_of,
    problem_of,
)
from tests.faults.servers import HOST, free_ports
from tests.service import BASE, serving

HEALTH = {"status", "redis", "version", "uptime_s"}
REDIS = {"connected", "writable", "latency_ms", "mode", "version", "pool", "errors_last_minute"}

KNOWN_IN_S = 1.5
"""The contract's limit for a change to be seen."""

ANSWERED_IN_S = 0.5
"""Its limit for the answer, whatever the state."""


@asynccontextmanager
async def full(raw: Redis) -> AsyncIterator[None]:
    """Leave the store no room for a write, for the length of a block."""
    await raw.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await raw.config_set("maxmemory", 0)


async def seen(api: AsyncClient, status: str) -> Answers:
    """Ask for the health until it is `status`, no longer than a change may stay unseen."""
    begun = monotonic()
    while True:
        asked = monotonic()
        report: Answers = (await api.get("/health")).json()
        assert monotonic() - asked < ANSWERED_IN_S
        if report["status"] == status:
            return report
        assert monotonic() - begun < KNOWN_IN_S, report
        await asyncio.sleep(0.01)


async def test_livez_says_that_the_process_runs(api: AsyncClient) -> None:
    answer_of(await api.get("/livez"))


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz"])
async def test_a_healthy_service_says_so_in_full(api: AsyncClient, path: str) -> None:
    report = answer_of(await api.get(path))

    assert report.keys() >= HEALTH
    assert report["status"] == "ok"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", report["version"])
    assert report["uptime_s"] >= 0
    redis = report["redis"]
    assert redis.keys() >= REDIS
    assert redis["connected"] is True
    assert redis["writable"] is True
    assert 0 < redis["latency_ms"] < 400
    assert redis["mode"] == "standalone"
    assert re.fullmatch(r"\d+\.\d+\.\d+", redis["version"])
    assert isinstance(redis["pool"], dict)
    assert redis["errors_last_minute"] == 0


async def test_a_store_that_takes_no_writes_degrades_the_service_and_heals(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await SAVE.send(api, session_id))
    async with full(raw):
        report = await seen(api, "degraded")

        assert report["redis"]["connected"] is True
        assert report["redis"]["writable"] is False
        assert report["reason"]
        assert (await api.get("/healthz")).status_code == 503
        assert (await api.get("/health")).status_code == 503
        ready = await api.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["status"] == "degraded"
        answer_of(await GET_STEP.send(api, session_id))
        refused = await SAVE.send(api, session_id)
        problem_of(refused, "store_full")
        assert int(refused.headers["retry-after"]) > 0
        answer_of(await api.delete(f"{BASE}/{session_id}"))
    assert "reason" not in await seen(api, "ok")


async def test_a_service_without_a_store_is_down_and_alive(serve: Callable[..., Any]) -> None:
    [port] = free_ports(1)
    api = await serve(redis_url=f"redis://{HOST}:{port}/0", retry_attempts=2)

    for path in ("/health", "/healthz", "/readyz"):
        asked = monotonic()
        response = await api.get(path)
        assert monotonic() - asked < ANSWERED_IN_S
        assert response.status_code == 503
        report = response.json()
        assert report.keys() >= HEALTH
        assert report["status"] == "down"
        assert report["reason"]
        assert report["redis"].keys() >= REDIS
        assert report["redis"]["connected"] is False
        assert report["redis"]["writable"] is False
        assert str(port) not in response.text
    answer_of(await api.get("/livez"))
    refused = await CREATE.send(api)
    assert str(port) not in problem_of(refused, "store_unavailable")["detail"]
    assert int(refused.headers["retry-after"]) > 0
    assert (await api.get("/health")).json()["redis"]["errors_last_minute"] > 0


@pytest.mark.parametrize("pause", ["app.services.health.LOOK_EVERY_S", "app.wiring.LEARN_EVERY_S"])
async def test_a_service_stops_in_the_middle_of_a_look_at_the_store(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    # Before Python 3.12 a cancellation can get lost in asyncio.wait_for, which redis-py uses.
    monkeypatch.setattr(pause, 0)

    async def start_and_stop() -> None:
        async with serving(settings) as api:
            answer_of(await api.get("/livez"))

    for _ in range(20):
        life = asyncio.create_task(start_and_stop())
        await asyncio.wait({life}, timeout=5)
        stopped = life.done()
        while not life.done():
            for task in asyncio.all_tasks():
                if task.get_name() in {"health", "catalogues"}:
                    task.cancel()
            await asyncio.wait({life}, timeout=0.01)
        await life
        assert stopped


# --- The documentation ----------------------------------------------------------------------------


def documented(call: Call) -> tuple[str, str]:
    target = re.sub(r"/resume-tokens/\w+", "/resume-tokens/{token_id}", call.target)
    return call.method.lower(), re.sub(r"/steps/\d+", "/steps/{n}", target)


@pytest.fixture
async def openapi(api: AsyncClient) -> Answers:
    return answer_of(await api.get("/openapi.json"))


async def test_the_openapi_document_is_valid_and_3_1(openapi: Answers) -> None:
    assert openapi["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(openapi).validate()


async def test_every_call_of_the_table_is_documented(openapi: Answers) -> None:
    calls = {documented(call) for call in (*SESSION_CALLS, CREATE)}
    calls.add(("get", f"{BASE}/steps"))
    calls |= {
        ("get", path)
        for path in ("/livez", "/health", "/healthz", "/readyz", "/openapi.json", "/docs")
    }

    described = {(method, path) for path, methods in openapi["paths"].items() for method in methods}

    assert calls - described == set()


@pytest.mark.parametrize("call", [SAVE, FINALIZE, REOPEN, CREATE], ids=lambda call: call.name)
async def test_every_error_of_a_documented_call_is_a_problem(openapi: Answers, call: Call) -> None:
    method, path = documented(call)
    responses = openapi["paths"][path][method]["responses"]

    refusals = [responses[status] for status in responses if int(status) >= 400]

    assert refusals
    for refusal in refusals:
        name = refusal["$ref"].rpartition("/")[2]
        content = openapi["components"]["responses"][name]["content"]
        assert content.keys() == {"application/problem+json"}


async def test_the_page_for_people_loads_nothing_from_elsewhere(api: AsyncClient) -> None:
    page = await api.get("/docs")

    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert f"{BASE}/session" in page.text
    assert re.findall(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", page.text) == []
    assert "<script" not in page.text
    assert "@import" not in page.text
    assert "url(" not in page.text
