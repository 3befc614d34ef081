"""What the service tells of itself in numbers: each moves as it should, and no client adds any."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeServer
from httpx2 import AsyncClient
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from starlette.types import Message, Receive, Scope, Send

from app import metrics
from app.api.middleware import ROUTE, RequestMiddleware
from app.api.routes import OPERATIONS
from app.errors import StoreUnavailableError
from app.onboarding.audit import Lane
from app.services.audit import AuditTrail
from tests import agents
from tests.api.helpers import (
    CREATE,
    GET_SESSION,
    SAVE,
    answer_of,
    create,
    exchange,
    problem_of,
    save,
    unknown_id,
)
from tests.conftest import fake_gateway
from tests.faults.servers import Valkey
from tests.service import BASE

Serve = Callable[..., Any]

Series = dict[str, float]
"""The value of every series, by its name and its labels: `name{a="b"}`."""

IN_FLIGHT = 'onboarding_requests_in_flight{among="requests"}'
TRANSFERS = 'onboarding_requests_in_flight{among="transfers"}'

STEP = f"{BASE}/{{id}}/steps/{{n}}"


def series_of(text: str) -> Series:
    """Read what is told; a series that stands there twice is none."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            series = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert series not in found
            found[series] = sample.value
    return found


async def read(api: AsyncClient) -> Series:
    """Ask the service."""
    response = await api.get("/metrics")
    assert response.status_code == 200
    return series_of(response.text)


def told() -> Series:
    """Read what this process has counted, without a service."""
    metrics.settle()
    return series_of(metrics.render("", []).text.decode())


async def until(api: AsyncClient, series: str, *values: float) -> Series:
    """Ask until a series has one of the values, or any when none is named."""
    async with asyncio.timeout(5):
        while True:
            now = await read(api)
            if series in now and (not values or now[series] in values):
                return now
            await asyncio.sleep(0.005)


def grown(before: Series, after: Series, name: str) -> Series:
    """Give what the series of a metric have grown by, where they have."""
    return {
        series: value - before.get(series, 0.0)
        for series, value in after.items()
        if series.partition("{")[0] == name and value != before.get(series, 0.0)
    }


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store be asked each time."""
    monkeypatch.setattr("app.services.metrics.COUNT_EVERY_S", 0.0)


# --- Requests -------------------------------------------------------------------------------------


async def test_requests_are_counted_by_template_method_and_status(
    api: AsyncClient, session_id: str
) -> None:
    before = await read(api)
    for _ in range(3):
        await save(api, session_id)
    problem_of(await SAVE.send(api, unknown_id()), "session_not_found")
    assert (await api.head(f"{BASE}/{session_id}")).status_code == 200
    after = await read(api)

    assert grown(before, after, "onboarding_requests_total") == {
        f'onboarding_requests_total{{method="POST",route="{STEP}",status="200"}}': 3,
        f'onboarding_requests_total{{method="POST",route="{STEP}",status="404"}}': 1,
        f'onboarding_requests_total{{method="HEAD",route="{BASE}/{{id}}",status="200"}}': 1,
    }
    assert grown(before, after, "onboarding_request_duration_seconds_count") == {
        f'onboarding_request_duration_seconds_count{{route="{STEP}"}}': 4,
        f'onboarding_request_duration_seconds_count{{route="{BASE}/{{id}}"}}': 1,
    }
    [took_s] = [
        value
        for series, value in grown(before, after, "onboarding_request_duration_seconds_sum").items()
        if STEP in series
    ]
    assert 0 < took_s < 4


async def test_probes_and_the_metrics_themselves_are_not_counted(api: AsyncClient) -> None:
    before = await read(api)
    for path in ("/livez", "/health", "/healthz", "/readyz", "/metrics"):
        assert (await api.get(path)).is_success
    assert grown(before, await read(api), "onboarding_requests_total") == {}


async def test_a_duration_ends_where_the_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow(scope: Scope, receive: Receive, send: Send) -> None:
        scope[ROUTE] = "/of/a/stream"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ignore(_: Message) -> None:
        pass

    async def nothing() -> Message:
        raise AssertionError("nobody reads")

    # The beginning, the head of the answer, and an hour later the end.
    times = iter([100.0, 100.03, 3700.0])
    monkeypatch.setattr("app.api.middleware.monotonic_s", lambda: next(times))
    await RequestMiddleware(follow, 15.0)(
        {"type": "http", "method": "GET", "path": "/", "headers": []}, nothing, ignore
    )

    after, labels = told(), 'route="/of/a/stream"'
    assert after[f"onboarding_request_duration_seconds_sum{{{labels}}}"] == pytest.approx(0.03)
    assert after[f'onboarding_request_duration_seconds_bucket{{le="0.025",{labels}}}'] == 0
    assert after[f'onboarding_request_duration_seconds_bucket{{le="0.05",{labels}}}'] == 1
    assert after[f'onboarding_request_duration_seconds_bucket{{le="+Inf",{labels}}}'] == 1


async def test_nothing_that_a_client_sends_adds_a_series(api: AsyncClient, session_id: str) -> None:
    async def send(word: str, method: str) -> None:
        junk = {"user-agent": word, "x-request-id": word}
        await api.get(f"/{word}", headers=junk)
        await api.get(f"{BASE}/{word}", headers=junk)
        await api.get(f"{BASE}/{session_id}/steps/{word}", params={word: word})
        await api.get(f"{BASE}/{session_id}", headers={"accept": word, "origin": word})
        await exchange(api, method, f"{BASE}/{session_id}")
        await exchange(api, method, f"/{word}")

    await send("first", "PROPFIND")
    before = await read(api)
    for number, method in enumerate(["MKCOL", "PURGE", "REPORT", "TRACE", "LOCK", "COPY"] * 3):
        await send(f"made-up-{number}", method)
    after = await read(api)

    assert set(after) == set(before)
    requests = grown(before, after, "onboarding_requests_total")
    assert requests[
        f'onboarding_requests_total{{method="other",route="{BASE}/{{id}}",status="405"}}'
    ]
    assert sum(requests.values()) == 6 * 18
    assert requests['onboarding_requests_total{method="GET",route="none",status="404"}'] == 18


async def test_every_label_is_one_of_a_few(api: AsyncClient) -> None:
    await CREATE.send(api)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families((await api.get("/metrics")).text):
        for sample in family.samples:
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    of_tests = {"/of/a/stream"}
    assert labels.pop("route") - of_tests <= {each.path for each in OPERATIONS} | {"none"}
    assert labels.pop("method") <= metrics.METHODS | {"other"}
    assert all(100 <= int(status) < 600 for status in labels.pop("status") if status.isdecimal())
    assert labels.keys() <= {"le", "among", "state", "kind", "policy", "what"}


# --- What goes on ---------------------------------------------------------------------------------


@asynccontextmanager
async def writes_held(raw: Redis) -> AsyncIterator[None]:
    """Let the store hold back every write for the length of a block."""
    await raw.execute_command("CLIENT", "PAUSE", 5000, "WRITE")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        await raw.execute_command("CLIENT", "UNPAUSE")  # type: ignore[no-untyped-call]


async def test_a_full_process_says_so_and_how_it_finds_the_store(serve: Serve, raw: Redis) -> None:
    api: AsyncClient = await serve(max_in_flight=1)
    session_id = await create(api)
    before = await read(api)
    assert before[IN_FLIGHT] == 0
    assert before['onboarding_processes{status="ok"}'] == 1
    async with writes_held(raw):
        saving = asyncio.create_task(SAVE.send(api, session_id))
        await until(api, IN_FLIGHT, 1)
        problem_of(await GET_SESSION.send(api, session_id), "overloaded")
        held = await until(api, 'onboarding_processes{status="ok"}', 0)
        assert held['onboarding_processes{status="down"}'] == 1
    assert answer_of(await saving)
    healed = await until(api, 'onboarding_processes{status="ok"}', 1)
    assert healed[IN_FLIGHT] == 0
    assert healed['onboarding_processes{status="down"}'] == 0


async def test_files_on_their_way_are_counted(api: AsyncClient, session_id: str) -> None:
    held = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun "
        await held.wait()
        yield b"and done"

    assert (await read(api))[TRANSFERS] == 0
    storing = asyncio.create_task(api.put(f"{BASE}/{session_id}/result", content=body()))
    assert (await until(api, TRANSFERS, 1))[IN_FLIGHT] == 0
    held.set()
    assert (await storing).status_code == 201
    await until(api, TRANSFERS, 0)


async def test_streams_that_are_open_are_counted(api: AsyncClient, session_id: str) -> None:
    assert (await read(api))["onboarding_streams_open"] == 0
    async with api.stream("GET", f"{BASE}/{session_id}/events/stream") as stream:
        assert stream.status_code == 200
        await until(api, "onboarding_streams_open", 1)
    await until(api, "onboarding_streams_open", 0)


async def test_tasks_of_the_process_are_counted(api: AsyncClient, session_id: str) -> None:
    before = (await read(api))["onboarding_tasks"]
    async with api.stream("GET", f"{BASE}/{session_id}/events/stream"):
        following = (await until(api, "onboarding_streams_open", 1))["onboarding_tasks"]
        async with api.stream("GET", f"{BASE}/{session_id}/events/stream"):
            await until(api, "onboarding_streams_open", 2)
        # What all streams share began with the first.
        assert (await until(api, "onboarding_tasks", following))["onboarding_tasks"] > before


async def test_questions_are_counted_that_run_and_that_wait(serve: Serve) -> None:
    book = agents.new_book()
    api: AsyncClient = await serve(agent=agents.AGENT, max_concurrent_asks=1)
    path = f"{BASE}/{await create(api)}/ask"
    asking = [asyncio.create_task(api.post(path, json={"question": "wait"})) for _ in range(3)]
    await until(api, 'onboarding_asks{state="waiting"}', 2)
    assert (await read(api))['onboarding_asks{state="running"}'] == 1
    book.gate.set()
    for answer in await asyncio.gather(*asking):
        assert answer_of(answer)
    after = await until(api, 'onboarding_asks{state="running"}', 0)
    assert after['onboarding_asks{state="waiting"}'] == 0


# --- The store ------------------------------------------------------------------------------------


async def test_commands_retries_and_errors_of_the_store_are_counted() -> None:
    server = FakeServer()
    gateway = fake_gateway(server)
    before = told()
    await gateway.command("GET", "onboarding:x")
    well = told()
    server.connected = False
    with pytest.raises(StoreUnavailableError):
        await gateway.command("GET", "onboarding:x")
    with pytest.raises(StoreUnavailableError):
        await gateway.evaluate_once("take_tokens", ["k"], [1, 1, 1], limit_s=1)
    after = told()
    await gateway.aclose()

    commands = "onboarding_store_commands_total"
    assert grown(before, well, commands) == {commands: 1}
    # Four sendings of the one, and a single one of the other.
    assert grown(well, after, commands) == {commands: 5}
    retries = "onboarding_store_retries_total"
    assert grown(well, after, retries) == {retries: 3}
    errors = grown(well, after, "onboarding_store_errors_total")
    assert errors == {'onboarding_store_errors_total{kind="connection"}': 5}


async def test_sessions_are_counted_by_status_once_in_a_while(
    api: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(api)
    assert (await read(api))['onboarding_sessions{status="pending"}'] == 1
    failed = await create(api)
    answer_of(await api.put(f"{BASE}/{failed}/status", json={"status": "error"}))
    assert (await read(api))['onboarding_sessions{status="error"}'] == 0
    monkeypatch.setattr("app.services.metrics.COUNT_EVERY_S", 0.0)
    counts = grown({}, await read(api), "onboarding_sessions")
    assert counts == {
        'onboarding_sessions{status="pending"}': 1,
        'onboarding_sessions{status="error"}': 1,
    }


@pytest.mark.usefixtures("no_cache")
async def test_what_sweepers_did_is_told(api: AsyncClient) -> None:
    before = await read(api)
    assert "onboarding_sweeper_last_run_timestamp_seconds" not in before
    await create(api)
    answer_of(await api.post("/api/v1/admin/cleanup", json={"all": True}))
    assert grown(before, await read(api), "onboarding_sweeper_removed_total") == {
        'onboarding_sweeper_removed_total{what="sessions"}': 1
    }
    # A new limit causes a sweep.
    answer_of(await api.patch("/api/v1/admin/config", json={"max_sessions": 5}))
    after = await until(api, "onboarding_sweeper_last_run_timestamp_seconds")
    assert after["onboarding_sweeper_last_run_timestamp_seconds"] > 1_700_000_000
    assert after["onboarding_sweeper_failures_total"] == 0


@pytest.mark.usefixtures("no_cache")
async def test_without_the_store_the_rest_is_told_in_time(serve: Serve, tmp_path: Path) -> None:
    with Valkey.start(tmp_path) as store:
        api: AsyncClient = await serve(redis_url=store.url)
        assert 'onboarding_sessions{status="pending"}' in await read(api)
        store.freeze()
        # Before the health knows, the store is asked in vain.
        async with asyncio.timeout(2.0):
            frozen = await read(api)
        assert [series for series in frozen if series.startswith("onboarding_sessions")] == []
        frozen = await until(api, 'onboarding_processes{status="down"}', 1)
        assert [series for series in frozen if series.startswith("onboarding_sweeper")] == []
        assert frozen["onboarding_streams_open"] == 0
        store.thaw()
        await until(api, 'onboarding_sessions{status="pending"}', 0)


# --- What was refused or lost ---------------------------------------------------------------------


async def test_refusals_are_counted_by_policy(serve: Serve) -> None:
    api: AsyncClient = await serve(create_limit="1/day", miss_limit="1/day")
    before = await read(api)
    await create(api)
    for _ in range(2):
        problem_of(await CREATE.send(api), "rate_limited")
    problem_of(await GET_SESSION.send(api, unknown_id()), "session_not_found")
    problem_of(await GET_SESSION.send(api, unknown_id()), "rate_limited")
    assert grown(before, await read(api), "onboarding_limits_refused_total") == {
        'onboarding_limits_refused_total{policy="creations"}': 2,
        'onboarding_limits_refused_total{policy="misses"}': 1,
    }


async def test_events_that_are_missing_in_the_record_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.services.audit.MAX_WAITING", 2)
    before = told()
    trail = AuditTrail(fake_gateway())
    for _ in range(3):
        trail.record("nobody", "get_session", None, "forbidden", Lane.REFUSED)
    dropped = "onboarding_audit_events_dropped_total"
    assert grown(before, told(), dropped) == {dropped: 1}
    # Nobody has begun to write: the end finds the other two still waiting.
    await trail.aclose()
    assert grown(before, told(), dropped) == {dropped: 3}


# --- How it is told -------------------------------------------------------------------------------


async def test_prometheus_may_choose_the_format(api: AsyncClient) -> None:
    await CREATE.send(api)
    plain = await api.get("/metrics", headers={"accept": "*/*"})
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.headers["cache-control"] == "no-store"
    modern = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    chosen = await api.get("/metrics", headers={"accept": modern})
    kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert chosen.headers["content-type"] == kind
    families = openmetrics.text_string_to_metric_families(chosen.text)  # type: ignore[no-untyped-call]
    names = {family.name for family in families}
    assert names >= {"onboarding_requests", "onboarding_sessions", "onboarding_processes"}
    for odd in ("application/openmetrics-text; version=x; escaping=y", "text/plain; version=9x"):
        answer = await api.get("/metrics", headers={"accept": odd})
        assert answer.headers["content-type"] in {kind, plain.headers["content-type"]}


async def test_nothing_stands_there_twice_or_without_a_help(api: AsyncClient) -> None:
    await CREATE.send(api)
    text = (await api.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("onboarding_")
        assert family.documentation
        assert family.type in {"counter", "gauge", "histogram"}
    assert "_created" not in text
