"""The faults of the proxy itself: they do what their names say, and nothing more."""

import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.address import parse_store_url
from app.store.client import make_client
from tests.faults.proxy import Loss, Proxy
from tests.faults.servers import HOST, Valkey


@pytest.fixture
async def proxy(raw: Redis, valkey: Valkey) -> AsyncIterator[Proxy]:
    async with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Redis]:
    """Give a client that sends everything once, and gives up soon."""
    address = parse_store_url(f"redis://{HOST}:{proxy.port}/0")
    client = make_client(address, timeout_s=0.1, max_connections=2, client_name="t")
    assert isinstance(client, Redis)
    async with client:
        yield client


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        (Loss.SILENCE, StoreTimeoutError),
        (Loss.RESET, LostConnectionError),
        (Loss.HALF_SENT, LostConnectionError),
    ],
)
async def test_a_reply_is_lost_once_and_after_the_server_has_done_its_work(
    proxy: Proxy, client: Redis, raw: Redis, how: Loss, failure: type[Exception]
) -> None:
    proxy.lose_replies(how, 1, to="INCRBY")
    assert await client.get("number") is None
    with pytest.raises(failure):
        await client.incr("number")
    assert await client.get("number") == b"1"
    assert proxy.lost == {how: 1}
    await raw.delete("number")


async def test_of_the_replies_such_a_share_is_lost_until_none_is_any_more(
    proxy: Proxy, client: Redis
) -> None:
    proxy.lose_some(0.3, seed=1)
    for _ in range(100):
        try:
            await client.get("a")
        except (LostConnectionError, StoreTimeoutError):
            if proxy.lost.keys() == {*Loss}:
                break
    share = proxy.lost.total() / proxy.commands["GET"]
    assert 0.1 < share < 0.6
    proxy.lose_none()
    for _ in range(20):
        assert await client.get("a") is None


async def test_what_is_kept_back_holds_up_nothing_else_and_is_done_when_it_is_delivered(
    proxy: Proxy, client: Redis, raw: Redis
) -> None:
    held = proxy.hold_back(b"older")
    with pytest.raises(StoreTimeoutError):
        await client.set("a", "older", px=9000)
    assert held.arrived.is_set()
    await client.set("a", "newer", px=9000)
    assert await raw.get("a") == b"newer"
    assert await held.deliver() == b"+OK\r\n"
    assert await raw.get("a") == b"older"


async def test_a_delay_is_there_until_it_is_taken_away(proxy: Proxy, client: Redis) -> None:
    await client.get("a")
    proxy.delay(0.01)
    begun_s = time.monotonic()
    for _ in range(10):
        await client.get("a")
    assert time.monotonic() - begun_s > 0.02
    proxy.delay(0)
    assert await client.get("a") is None


async def test_a_watch_notes_when_what_it_looks_for_has_passed(proxy: Proxy, client: Redis) -> None:
    times = proxy.watch(b"mine")
    begun_s = time.monotonic()
    await client.get("mine")
    await client.get("yours")
    await client.exists("mine")
    assert len(times) == 2
    assert begun_s <= times[0] <= times[1] <= time.monotonic()
