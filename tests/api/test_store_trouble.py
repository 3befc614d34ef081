"""What every call answers while the store is away, stands still, or is full."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.every_call import (
    ADMIN,
    CALLS,
    DRAFT,
    READS,
    SHORT,
    STEP,
    STREAM,
    TASK,
    TOKENS,
    WITHOUT_STORE,
    WRITES,
    S,
    World,
    every_name,
    name_of,
    prepare,
    send,
)
from tests.api.helpers import JSON, create, exchange, problem_of, save, step_path
from tests.api.test_exactly_once import Trouble
from tests.api.whole_store import read_store, sort_out
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey

Serve = Callable[..., Any]

ANSWERED_S = 5.0
"""When everything has been answered, by far; the time limit of a command is longer here."""


def test_these_are_all_calls_that_ask_the_store() -> None:
    assert {name_of(call) for call in CALLS} == every_name() - WITHOUT_STORE


async def get_ready(
    serve: Serve, api: AsyncClient, raw: Redis, calls: Sequence[str]
) -> dict[str, World]:
    """Do what comes before some calls, by a service that waits as long as it takes."""
    patient = await serve()
    worlds = {call: World(patient, raw) for call in calls}
    await asyncio.gather(*(prepare(world, call) for call, world in worlds.items()))
    for world in worlds.values():
        world.api = api
    # Most meet the trouble on connections that are open.
    await asyncio.gather(*(send(world, f"GET {S}/progress") for world in [*worlds.values()][:20]))
    return worlds


async def send_all(worlds: Mapping[str, World]) -> dict[str, Response]:
    """Send some calls, all at once."""
    answers = await asyncio.gather(*(send(world, call) for call, world in worlds.items()))
    return dict(zip(worlds, answers, strict=True))


def url_of(proxy: Proxy) -> str:
    return f"redis://{proxy.host}:{proxy.port}/0"


@pytest.fixture
def hasty_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no stream wait long for the store to say that it listens."""
    monkeypatch.setattr("app.store.subscription.CONFIRMED_WITHIN_S", 0.3)


# --- Away -----------------------------------------------------------------------------------------


async def test_while_the_store_is_away_every_call_says_so(
    serve: Serve, raw: Redis, valkey: Valkey, hasty_streams: None
) -> None:
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=url_of(proxy), retry_attempts=2)
        worlds = await get_ready(serve, api, raw, [*CALLS])
        proxy.refuse()
        proxy.reset_all()
        for call, response in (await send_all(worlds)).items():
            problem_of(response, "store_unavailable")
            assert int(response.headers["retry-after"]) > 0, call
            assert str(proxy.port) not in response.text, call
            assert proxy.host not in response.text, call


# --- Standing still -------------------------------------------------------------------------------


async def test_while_the_store_stands_still_every_call_is_answered_at_its_deadline(
    serve: Serve, raw: Redis, valkey: Valkey
) -> None:
    loop = asyncio.get_running_loop()
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=url_of(proxy), redis_timeout_s=30, request_deadline_s=1)
        worlds = await get_ready(serve, api, raw, [*CALLS])
        proxy.hold()
        begun_s = loop.time()
        answers = await send_all(worlds)
        assert loop.time() - begun_s < ANSWERED_S
        for response in answers.values():
            problem_of(response, "deadline_exceeded")
        proxy.release()
        await save(api, await create(api))
        async with asyncio.timeout(ANSWERED_S):
            # Nobody's place is kept for ever.
            while (await api.get("/health")).json()["redis"]["pool"]["waiting"]:
                await asyncio.sleep(0.01)


async def test_while_the_store_stands_still_nobody_waits_for_a_connection_for_ever(
    serve: Serve, raw: Redis, valkey: Valkey, hasty_streams: None
) -> None:
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=url_of(proxy), redis_timeout_s=0.2, retry_attempts=1)
        worlds = await get_ready(serve, api, raw, [*CALLS])
        proxy.hold()
        answers = await send_all(worlds)
        codes = {response.json()["code"] for response in answers.values()}
        assert {response.status_code for response in answers.values()} == {503}
        assert "store_unavailable" in codes
        assert codes <= {"store_unavailable", "overloaded"}


async def test_a_body_that_stalls_is_given_up_at_the_deadline(serve: Serve) -> None:
    api = await serve(request_deadline_s=0.3)

    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"data"'

    lines = [*JSON.items(), ("content-length", "20")]
    path = step_path(await create(api), 1)
    problem_of(await exchange(api, "POST", path, lines, stalling()), "deadline_exceeded")


# --- Full -----------------------------------------------------------------------------------------

REMOVING = {
    *(f"DELETE {STEP}", f"DELETE {DRAFT}", f"DELETE {S}", f"DELETE {TOKENS}/{{token_id}}"),
    *(f"DELETE {TASK}", f"DELETE {TASK} (damaged)", f"PATCH {TASK}"),
    *(f"POST {SHORT}/scenario-saved", f"POST {ADMIN}/cleanup"),
    f"DELETE {ADMIN}/users/{{user_id}}",
}
"""What makes room goes on."""

IN_A_STREAM = f"POST {S}/ask-stream"
"""The call whose answer has begun when it cannot be kept."""


async def test_a_full_store_refuses_what_stores_and_keeps_nothing_of_it_by_half(
    serve: Serve, raw: Redis, valkey: Valkey
) -> None:
    calls = [call for call in CALLS if call != STREAM]
    counting = Trouble()
    async with Proxy(valkey.port) as proxy:
        api = await serve(redis_url=url_of(proxy))
        worlds = await get_ready(serve, api, raw, calls)
        before = sort_out(await read_store(raw), worlds)
        proxy.lose(counting)
        with ExitStack() as stack:
            for call, world in worlds.items():
                stack.enter_context(counting.about(call, world.names))
            await raw.config_set("maxmemory", 1)
            try:
                answers = await send_all(worlds)
            finally:
                await raw.config_set("maxmemory", 0)
        after = sort_out(await read_store(raw), worlds)
        refused = [call for call in WRITES if call not in REMOVING]
        for call in refused:
            if call == IN_A_STREAM:
                assert '"code":"store_full"' in answers[call].text.splitlines()[-2]
            else:
                problem_of(answers[call], "store_full")
            assert after[call] == before[call], call
        for call in {*READS, *REMOVING}:
            assert answers[call].status_code == CALLS[call].status, answers[call].text
        # Nothing was sent twice.
        assert {what: n for what, n in counting.sent.items() if n > 1} == {}
        # There is room again.
        again = await send_all({call: worlds[call] for call in refused})
        assert {call: again[call].status_code for call in refused} == {
            call: WRITES[call].status for call in refused
        }
