"""Buckets of tokens in the store: never more than a limit allows, and all of that."""

import asyncio
import os
from fractions import Fraction

import pytest
import time_machine
from fakeredis import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.clock import monotonic_s
from app.errors import CorruptRecordError, StoreUnavailableError
from app.onboarding.limits import Limit, Policy, digest_caller
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.limits import TAKE_S, LimitStore
from tests.conftest import NOON_S, fake_gateway, known_settings
from tests.faults.proxy import Proxy

A_DAY = 86_400
CALLER = "user:jane"


async def take(
    gateway: Gateway, limit: Limit, wanted: int = 1, caller: str = CALLER
) -> tuple[int, int, int]:
    return await LimitStore(gateway).take(Policy.REQUESTS, caller, limit, wanted)


async def test_a_bucket_begins_full_and_gives_what_it_has(gateway: Gateway) -> None:
    limit = Limit(10, A_DAY)
    granted, left, next_ms = await take(gateway, limit, 4)
    assert (granted, left) == (4, 6)
    assert next_ms == A_DAY * 100
    assert (await take(gateway, limit, 4))[:2] == (4, 2)
    assert (await take(gateway, limit, 4))[:2] == (2, 0)
    granted, left, next_ms = await take(gateway, limit, 4)
    assert (granted, left) == (0, 0)
    assert A_DAY * 100 - 10_000 < next_ms <= A_DAY * 100


async def test_callers_and_policies_have_buckets_of_their_own(gateway: Gateway) -> None:
    store, limit = LimitStore(gateway), Limit(1, A_DAY)
    taken = [
        await store.take(policy, caller, limit, 1)
        for policy in Policy
        for caller in ("user:jane", "user:june", "192.0.2.7")
    ]
    assert [each.granted for each in taken] == [1] * 9


async def test_a_key_names_nobody_and_goes_when_the_bucket_is_full(
    clock: time_machine.Traveller,
) -> None:
    gateway = fake_gateway()
    await take(gateway, Limit(10, 60), 5)
    [key] = await gateway.command("KEYS", "*")
    assert key.decode() == f"onboarding:rate:requests:{digest_caller(CALLER)}"
    assert await gateway.command("PTTL", key) == 30_000
    clock.shift(30.001)
    assert await gateway.command("KEYS", "*") == []
    await gateway.aclose()


@settings(max_examples=60, deadline=None, derandomize="CI" in os.environ)
@given(
    limit=st.builds(
        Limit,
        st.sampled_from([1, 2, 3, 7, 60, 600, 1_000_000]),
        st.sampled_from([1, 60, 3600, A_DAY]),
    ),
    work=st.lists(
        st.tuples(
            st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 1.2)),
            st.one_of(st.integers(1, 3), st.integers(1, 1_000_000)),
        ),
        max_size=25,
    ),
)
def test_it_gives_exactly_what_a_bucket_that_fills_evenly_has(
    limit: Limit, work: list[tuple[float, int]]
) -> None:
    """`work` is how long is waited, in windows, and how many are wanted then."""
    quota, window_ms = limit.quota, limit.window_s * 1000
    level, before_ms = Fraction(quota), 0
    given_at: list[tuple[int, int]] = []

    async def run() -> None:
        nonlocal level, before_ms
        gateway = fake_gateway()
        for windows, wanted in work:
            clock.shift(windows * limit.window_s)
            now_ms = await time_of(gateway)
            level = min(Fraction(quota), level + Fraction((now_ms - before_ms) * quota, window_ms))
            granted, left, next_ms = await take(gateway, limit, wanted)
            assert granted == min(wanted, int(level))
            level, before_ms = level - granted, now_ms
            assert left == int(level)
            refill = (left + 1 - level) * window_ms / quota
            assert 0 <= next_ms - refill < 1
            given_at.append((now_ms, granted))
        clock.shift(limit.window_s + 0.001)
        assert (await take(gateway, limit, quota))[:2] == (quota, 0)
        await gateway.aclose()

    with time_machine.travel(NOON_S, tick=False) as clock:
        asyncio.run(run())
    # So in no time at all, however it is cut out, there were more than may be.
    for at, (begin_ms, _) in enumerate(given_at):
        total = 0
        for end_ms, granted in given_at[at:]:
            total += granted
            assert total <= quota + Fraction((end_ms - begin_ms) * quota, window_ms)


async def time_of(gateway: Gateway) -> int:
    seconds, micros = await gateway.command("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def test_a_real_bucket_fills_while_time_goes_by(raw: Redis, settings: Settings) -> None:
    gateway, limit = connect(settings), Limit(20, 1)
    begun_ms = await time_of(gateway)
    total = 0
    while total < 23:
        total += (await take(gateway, limit, 7))[0]
        assert total <= 20 + (await time_of(gateway) - begun_ms) * 20 / 1000
    [key] = await raw.keys("*")
    assert 0 < await raw.pttl(key) <= 1000
    await gateway.aclose()


async def test_processes_that_ask_at_once_get_together_what_there_is(settings: Settings) -> None:
    gateways = [connect(settings) for _ in range(4)]
    taken = await asyncio.gather(*(take(gateways[n % 4], Limit(50, A_DAY), 3) for n in range(40)))
    assert sum(granted for granted, _, _ in taken) == 50
    for gateway in gateways:
        await gateway.aclose()


async def test_a_clock_that_is_set_back_holds_nobody_up_for_longer_than_a_window(
    clock: time_machine.Traveller,
) -> None:
    gateway, limit = fake_gateway(), Limit(10, 60)
    await take(gateway, limit, 10)
    clock.shift(-3600)
    assert (await take(gateway, limit))[0] == 0
    clock.shift(30)
    assert await take(gateway, limit, 10) == (5, 0, 6000)
    clock.shift(60)
    assert (await take(gateway, limit, 10))[0] == 10
    clock.shift(86_400)
    assert (await take(gateway, limit, 10))[0] == 10
    await gateway.aclose()


@pytest.mark.parametrize(("waited_s", "there"), [(0, 0), (0.4, 2), (1, 5), (2, 5)])
async def test_a_limit_that_was_changed_holds_from_then_on(
    clock: time_machine.Traveller, waited_s: float, there: int
) -> None:
    gateway = fake_gateway()
    await take(gateway, Limit(600, 3600), 600)
    clock.shift(waited_s)
    assert (await take(gateway, Limit(5, 1), 50))[:2] == (there, 0)
    assert (await take(gateway, Limit(600, 3600), 1000))[0] <= 600
    await gateway.aclose()


async def test_what_somebody_else_wrote_there_is_a_full_bucket_or_an_error(
    gateway: Gateway,
) -> None:
    key = gateway.keys.bucket(Policy.REQUESTS, digest_caller(CALLER))
    await gateway.command("SET", key, "nonsense", "PX", 60_000)
    assert (await take(gateway, Limit(2, 60)))[:2] == (1, 1)
    await gateway.command("DEL", key)
    await gateway.command("RPUSH", key, "x")
    with pytest.raises(CorruptRecordError):
        await take(gateway, Limit(2, 60))
    await gateway.command("DEL", key)


async def test_a_store_that_does_not_answer_is_asked_once_and_not_for_long(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.limits.TAKE_S", TAKE_S)
    url = f"redis://{proxy.host}:{proxy.port}/0"
    gateway = connect(known_settings(redis_url=url, redis_timeout_s=10))
    await take(gateway, Limit(10, A_DAY))
    before = proxy.commands["EVALSHA"]
    proxy.hold()
    begun_s = monotonic_s()
    with capture_logs() as lines, pytest.raises(StoreUnavailableError):
        await take(gateway, Limit(10, A_DAY))
    assert TAKE_S - 0.05 < monotonic_s() - begun_s < 2
    assert proxy.commands["EVALSHA"] == before + 1
    assert lines == []
    assert gateway.failures_last_minute == 1
    proxy.release()
    granted, left, _ = await take(gateway, Limit(10, A_DAY))
    # What was held up has arrived as well, or not: there is never more than before.
    assert granted == 1
    assert left in (7, 8)
    await gateway.aclose()


async def test_a_store_that_is_away_is_an_error_at_once_and_without_a_line() -> None:
    server = FakeServer()
    gateway = fake_gateway(server)
    server.connected = False
    with capture_logs() as lines, pytest.raises(StoreUnavailableError):
        await take(gateway, Limit(10, 60))
    assert lines == []
    server.connected = True
    assert (await take(gateway, Limit(10, 60)))[0] == 1
    await gateway.aclose()
