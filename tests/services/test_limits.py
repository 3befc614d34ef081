"""Limits as callers meet them: what is let through, what it costs, and what an outage does."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import structlog
import time_machine
from fakeredis import FakeServer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.clock import monotonic_s
from app.context import Meter, RequestContext, reset_context, set_context
from app.errors import RateLimitedError
from app.onboarding.limits import Limit, Policy, Standing
from app.services.limits import Limiter, make_limiter
from app.settings import Settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.limits import LimitStore
from tests.conftest import NOON_S, fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey

A_DAY = 86_400
JANE, JUNE = "user:jane", "user:june"


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the logger that a service of another test has bound to its own configuration."""
    monkeypatch.setattr("app.services.limits.log", structlog.get_logger())


@pytest.fixture
def hands(clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch) -> time_machine.Traveller:
    """Give a clock for processes and fake stores alike."""
    monkeypatch.setattr("app.services.limits.monotonic_s", time.time)
    return clock


@pytest.fixture
def server() -> FakeServer:
    """Give a fake store that can be cut off."""
    return FakeServer()


@pytest.fixture
async def fake(server: FakeServer) -> AsyncIterator[Gateway]:
    """Give a gateway to the fake store."""
    gateway = fake_gateway(server)
    yield gateway
    await gateway.aclose()


def limiter(
    gateway: Gateway,
    requests: Limit | None = None,
    creations: Limit | None = None,
    misses: Limit | None = None,
) -> Limiter:
    return Limiter(LimitStore(gateway), requests, creations, misses)


@contextmanager
def counting() -> Iterator[Meter]:
    """Count the commands to the store."""
    context = RequestContext("r1", monotonic_s() + 30)
    token = set_context(context)
    yield context.meter
    reset_context(token)


async def admitted(limiter: Limiter, caller: str, count: int) -> int:
    """Ask so often at once, and say how often it was let through."""
    asked = (limiter.admit(caller) for _ in range(count))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(each, Standing | RateLimitedError) for each in answers)
    return sum(isinstance(each, Standing) for each in answers)


async def refused(limiter: Limiter, caller: str = JANE) -> int:
    """Be refused, and say after how many seconds to come again."""
    with pytest.raises(RateLimitedError) as refusal:
        await limiter.admit(caller)
    return refusal.value.retry_after_s


# --- Requests -------------------------------------------------------------------------------------


async def test_a_caller_is_let_through_as_often_as_the_limit_says_and_told_how_they_stand(
    gateway: Gateway,
) -> None:
    gate = limiter(gateway, Limit(60, A_DAY))
    for left in reversed(range(60)):
        standing = await gate.admit(JANE)
        assert standing is not None
        assert (standing.policy, standing.left) == (Policy.REQUESTS, left)
        assert A_DAY // 60 - 30 < standing.reset_s <= A_DAY // 60
    with pytest.raises(RateLimitedError, match=r"^Too much is being asked; ask again in \d+ s"):
        await gate.admit(JANE)
    assert A_DAY // 60 - 30 < await refused(gate) <= A_DAY // 60
    assert await gate.admit(JUNE) is not None


async def test_two_processes_together_let_no_more_through_than_one(settings: Settings) -> None:
    gateways = [connect(settings), connect(settings)]
    gates = [limiter(gateway, Limit(100, A_DAY)) for gateway in gateways]
    through = await asyncio.gather(*(admitted(gate, JANE, 150) for gate in gates))
    assert sum(through) == 100
    assert [await admitted(gate, JANE, 3) for gate in gates] == [0, 0]
    for gateway in gateways:
        await gateway.aclose()


@hypothesis_settings(max_examples=30, deadline=None, derandomize="CI" in os.environ)
@given(
    quota=st.sampled_from([1, 5, 40, 100]),
    work=st.lists(
        st.tuples(st.booleans(), st.integers(1, 40), st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.5])),
        max_size=20,
    ),
)
def test_over_any_time_no_more_is_let_through_than_was_there_and_came(
    quota: int, work: list[tuple[bool, int, float]]
) -> None:
    """`work` is who of two processes is asked, how often, and how long is waited then."""

    async def run() -> None:
        gateway = fake_gateway()
        gates = [limiter(gateway, Limit(quota, 10)) for _ in range(2)]
        through = 0
        for is_second, count, windows in work:
            through += await admitted(gates[is_second], JANE, count)
            come = quota * (time.time() - NOON_S) / 10
            assert through <= quota + come + 0.001  # as exactly as a float says what time it is
            clock.shift(windows * 10)
        clock.shift(10)
        assert await admitted(gates[0], JANE, quota + 1) == quota
        await gateway.aclose()

    with time_machine.travel(NOON_S, tick=False) as clock, pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.services.limits.monotonic_s", time.time)
        asyncio.run(run())


async def test_the_store_is_asked_once_for_a_twentieth_of_the_quota(gateway: Gateway) -> None:
    gate = limiter(gateway, Limit(600, A_DAY))
    await gate.admit(JUNE)  # the store knows the script from here on
    with counting() as meter:
        for _ in range(30):
            await gate.admit(JANE)
        assert meter.commands == 1
        await gate.admit(JANE)
        assert meter.commands == 2


async def test_of_many_at_once_one_asks_for_all(gateway: Gateway) -> None:
    gate = limiter(gateway, Limit(600, A_DAY))
    await gate.admit(JUNE)
    with counting() as meter:
        assert await admitted(gate, JANE, 30) == 30
        assert meter.commands == 1
        assert await admitted(gate, JANE, 600) == 570
        # Nineteen times there was something, and once nothing.
        assert meter.commands == 21
        assert await admitted(gate, JANE, 100) == 0
        assert meter.commands == 21


async def test_who_is_refused_costs_no_command_until_there_is_another(
    fake: Gateway, hands: time_machine.Traveller
) -> None:
    gate = limiter(fake, Limit(1, 10))
    assert await gate.admit(JANE) == Standing(Policy.REQUESTS, Limit(1, 10), 0, 10)
    assert await refused(gate) == 10
    with counting() as meter:
        hands.shift(4)
        assert await refused(gate) == 6
        hands.shift(5.5)
        assert await refused(gate) == 1
        assert meter.commands == 0
        hands.shift(0.5)
        assert await gate.admit(JANE) is not None
        assert meter.commands == 1


async def test_the_time_until_there_is_more_goes_by(
    fake: Gateway, hands: time_machine.Traveller
) -> None:
    gate = limiter(fake, Limit(40, 400))
    assert await gate.admit(JANE) == Standing(Policy.REQUESTS, Limit(40, 400), 39, 10)
    hands.shift(3)
    assert await gate.admit(JANE) == Standing(Policy.REQUESTS, Limit(40, 400), 38, 7)
    # Both are spent, and one of them has come back when the store is asked for two more.
    hands.shift(10)
    assert await gate.admit(JANE) == Standing(Policy.REQUESTS, Limit(40, 400), 38, 7)
    hands.shift(8)
    assert await gate.admit(JANE) == Standing(Policy.REQUESTS, Limit(40, 400), 37, 9)


async def test_what_was_taken_and_not_used_for_a_window_is_forgotten(
    fake: Gateway, hands: time_machine.Traveller
) -> None:
    gate = limiter(fake, Limit(100, 60))
    await gate.admit(JANE)
    hands.shift(59)
    with counting() as meter:
        await gate.admit(JANE)
        assert meter.commands == 0
        hands.shift(1)
        assert await admitted(gate, JANE, 101) == 100
        assert meter.commands > 0


async def test_one_who_leaves_while_asking_for_others_stops_nobody(
    valkey: Valkey, settings: Settings
) -> None:
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        gateway = connect(
            known_settings(**{**settings.model_dump(exclude_unset=True), "redis_url": url})
        )
        gate = limiter(gateway, Limit(40, A_DAY))
        await gate.admit(JUNE)
        sent = proxy.commands["EVALSHA"]
        proxy.hold()
        asking = [asyncio.create_task(gate.admit(JANE)) for _ in range(3)]
        async with asyncio.timeout(10):
            while proxy.commands["EVALSHA"] == sent:
                await asyncio.sleep(0.001)
        asking[0].cancel()
        proxy.release()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert all(isinstance(each, Standing) for each in answers[1:])
        # What was on its way for the one who left is lost, and nothing is given twice.
        assert await admitted(gate, JANE, 50) in (36, 38)
        await gateway.aclose()


async def test_a_limit_that_is_off_costs_nothing(gateway: Gateway) -> None:
    gate = limiter(gateway)
    with counting() as meter:
        for _ in range(100):
            assert await gate.admit(JANE) is None
            assert await gate.admit_creation(JANE) is None
            await gate.count_miss(JANE)
            gate.check_misses(JANE)
    assert meter.commands == 0


async def test_callers_who_were_long_away_are_forgotten_and_get_no_more_for_it(
    fake: Gateway, hands: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.limits.MOST_CALLERS", 2)
    gate = limiter(fake, Limit(80, A_DAY), misses=Limit(1, 60))
    for caller in ("a", "b", "a", "c"):
        await gate.admit(caller)
    with counting() as meter:
        await gate.admit("a")
        await gate.admit("c")
        assert meter.commands == 0
        # The three that were held for b are lost.
        assert await gate.admit("b") == Standing(Policy.REQUESTS, Limit(80, A_DAY), 75, A_DAY // 80)
        assert meter.commands == 1
    # Who is refused may be forgotten too; the store is not.
    for caller in ("a", "b", "c"):
        await gate.count_miss(caller)
    gate.check_misses("a")
    with pytest.raises(RateLimitedError):
        await gate.count_miss("a")
    with pytest.raises(RateLimitedError):
        gate.check_misses("a")


# --- Sessions made, and ids guessed ---------------------------------------------------------------


async def test_sessions_made_are_counted_one_by_one_and_apart(gateway: Gateway) -> None:
    gate = limiter(gateway, Limit(40, A_DAY), Limit(3, A_DAY), Limit(1, A_DAY))
    await gate.count_miss(JANE)
    limit = Limit(3, A_DAY)
    lefts = [await gate.admit_creation(JANE) for _ in range(3)]
    assert lefts == [Standing(Policy.CREATIONS, limit, left, A_DAY // 3) for left in (2, 1, 0)]
    with pytest.raises(RateLimitedError, match="Too many sessions are being made"):
        await gate.admit_creation(JANE)
    assert await gate.admit(JANE) is not None
    assert await gate.admit_creation(JUNE) is not None


async def test_who_has_guessed_too_often_is_refused_before_the_next_guess(
    fake: Gateway, hands: time_machine.Traveller
) -> None:
    gate = limiter(fake, misses=Limit(3, 60))
    for _ in range(3):
        gate.check_misses(JANE)
        await gate.count_miss(JANE)
    with counting() as meter:
        for _ in range(3):
            with pytest.raises(RateLimitedError, match="ask again in 20 seconds"):
                gate.check_misses(JANE)
            with pytest.raises(RateLimitedError, match="ask again in 20 seconds"):
                await gate.count_miss(JANE)
        assert meter.commands == 0
    gate.check_misses(JUNE)
    hands.shift(20)
    gate.check_misses(JANE)
    await gate.count_miss(JANE)
    with pytest.raises(RateLimitedError):
        gate.check_misses(JANE)
    hands.shift(60)
    gate.check_misses(JANE)


async def test_guesses_are_counted_over_all_processes(gateway: Gateway) -> None:
    gates = [limiter(gateway, misses=Limit(2, A_DAY)) for _ in range(2)]
    for _ in range(2):
        await gates[0].count_miss(JANE)
    gates[1].check_misses(JANE)
    with pytest.raises(RateLimitedError):
        await gates[1].count_miss(JANE)
    with pytest.raises(RateLimitedError):
        gates[1].check_misses(JANE)


async def test_guesses_at_once_are_all_counted(gateway: Gateway) -> None:
    gate = limiter(gateway, misses=Limit(10, A_DAY))
    asked = (gate.count_miss(JANE) for _ in range(50))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert answers.count(None) == 10
    assert sum(isinstance(each, RateLimitedError) for each in answers) == 40


# --- An outage ------------------------------------------------------------------------------------


async def test_in_an_outage_everybody_is_let_through_and_the_store_asked_once_a_second(
    fake: Gateway, server: FakeServer, hands: time_machine.Traveller
) -> None:
    gate = limiter(fake, Limit(1, 60), Limit(1, 60), Limit(1, 60))
    await gate.admit(JUNE)
    server.connected = False
    with counting() as meter, capture_logs() as lines:
        for _ in range(3):
            for _ in range(20):
                assert await gate.admit(JANE) is None
                assert await gate.admit_creation(JANE) is None
                await gate.count_miss(JANE)
                gate.check_misses(JANE)
            hands.shift(1)
        assert meter.commands == 3
        assert [(line["event"], line["log_level"]) for line in lines] == [
            ("limits_unavailable", "warning")
        ]
        assert lines[0]["code"] == "store_unavailable"
        server.connected = True
        assert await gate.admit(JANE) is not None
        assert await refused(gate) == 60
        server.connected = False
        assert await gate.admit_creation(JANE) is None
        assert [line["event"] for line in lines] == ["limits_unavailable"] * 2


async def test_what_was_taken_before_an_outage_is_spent_in_it(
    fake: Gateway, server: FakeServer
) -> None:
    gate = limiter(fake, Limit(40, A_DAY))
    await gate.admit(JANE)
    server.connected = False
    assert await gate.admit(JANE) is not None
    assert await gate.admit(JANE) is None


async def test_a_store_that_is_frozen_holds_everybody_up_once_and_not_for_long(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_s = 0.0
    monkeypatch.setattr("app.services.limits.monotonic_s", lambda: at_s)
    monkeypatch.setattr("app.store.limits.TAKE_S", 0.25)
    async with Proxy(valkey.port) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        gateway = connect(known_settings(redis_url=url, redis_timeout_s=10))
        gate = limiter(gateway, Limit(20, A_DAY))
        await gate.admit(JUNE)
        proxy.hold()
        callers = [JANE] * 20 + [f"192.0.2.{n}" for n in range(20)]
        # All ask, but those for whom somebody asks; then nobody; a second later one for all.
        for commands in (21, 0, 1):
            begun_s = monotonic_s()
            with counting() as meter:
                assert {*await asyncio.gather(*map(gate.admit, callers))} == {None}
            assert meter.commands == commands
            assert monotonic_s() - begun_s < 2
            at_s += 0.9 if commands else 0.1
        proxy.release()
        await gateway.aclose()


async def test_the_settings_say_what_the_limits_are(fake: Gateway) -> None:
    gate = make_limiter(fake, known_settings(create_limit="2/hour", miss_limit="off"))
    standing = await gate.admit(JANE)
    assert standing is not None
    assert standing.left == 599
    assert [await gate.admit_creation(JANE) for _ in range(2)] != [None, None]
    with pytest.raises(RateLimitedError):
        await gate.admit_creation(JANE)
    for _ in range(100):
        await gate.count_miss(JANE)
    gate.check_misses(JANE)
