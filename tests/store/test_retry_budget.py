"""Calls are sent again as often as requests in flight may need, and hardly more."""

import asyncio
from collections.abc import Callable

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from app.errors import StoreUnavailableError
from app.metrics import STORE_RETRIES_DENIED
from app.settings import load_settings
from app.store.connect import connect
from app.store.gateway import Gateway, RetryPolicy
from app.store.keys import Keys
from app.store.links import PooledLink
from app.store.retry_budget import REFILL_S, RetryBudget

Pass = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Pass:
    """Give a function that lets seconds pass for budgets."""
    now_s = 1000.0

    def wait(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr("app.store.retry_budget.monotonic_s", lambda: now_s)
    return wait


def taken(budget: RetryBudget, tries: int) -> int:
    return sum(budget.take() for _ in range(tries))


class TestABudget:
    def test_has_as_much_at_once_as_its_size(self, wait: Pass) -> None:
        wait(REFILL_S)
        assert taken(RetryBudget(10), 20) == 10

    def test_fills_evenly_and_to_its_size_again(self, wait: Pass) -> None:
        budget = RetryBudget(60)
        taken(budget, 60)
        wait(REFILL_S / 60)
        assert taken(budget, 20) == 1
        wait(REFILL_S * 5)
        assert taken(budget, 100) == 60

    def test_gets_back_no_more_than_it_had(self, wait: Pass) -> None:
        budget = RetryBudget(10)
        wait(REFILL_S)
        taken(budget, 4)
        budget.give_back(3)
        assert taken(budget, 20) == 9
        budget.give_back(50)
        assert taken(budget, 20) == 10

    def test_of_none_gives_none(self, wait: Pass) -> None:
        budget = RetryBudget(0)
        wait(REFILL_S)
        assert taken(budget, 5) == 0


def gateway_to(server: FakeServer, budget: int) -> Gateway:
    return Gateway(
        lambda _: PooledLink(FakeAsyncRedis(server=server, legacy_responses=False), send_s=1.5),
        keys=Keys(hash_tag=False),
        lifetime_ms=1000,
        mode="standalone",
        policy=RetryPolicy(base_s=0.001, jitter_s=0.0, budget=budget),
    )


async def test_an_outage_that_goes_on_is_met_by_one_sending_a_call(wait: Pass) -> None:
    server = FakeServer()
    server.connected = False
    gateway = gateway_to(server, budget=7)
    before = STORE_RETRIES_DENIED._value.get()
    sent = []
    for _ in range(5):
        failed = gateway.failures_last_minute
        with pytest.raises(StoreUnavailableError):
            await gateway.command("GET", "onboarding:x")
        sent.append(gateway.failures_last_minute - failed)
    assert sent == [4, 4, 2, 1, 1]
    assert STORE_RETRIES_DENIED._value.get() - before == 3
    wait(REFILL_S)
    server.connected = True
    assert await gateway.command("GET", "onboarding:x") is None
    await gateway.aclose()


async def test_an_outage_that_calls_outlive_spends_nothing() -> None:
    server = FakeServer()
    gateway = gateway_to(server, budget=3)
    for _ in range(5):
        server.connected = False
        calling = asyncio.create_task(gateway.command("GET", "onboarding:x"))
        failed = gateway.failures_last_minute
        while gateway.failures_last_minute < failed + 2:
            await asyncio.sleep(0)
        server.connected = True
        assert await calling is None
    await gateway.aclose()


async def test_all_requests_in_flight_may_be_sent_again_for_all_of_their_tries() -> None:
    settings = load_settings(redis_url="redis://h:1/0", max_in_flight=5, retry_attempts=3)
    gateway = connect(settings)
    assert taken(gateway._budget, 100) == 5 * 2
    await gateway.aclose()
