"""What one look at the store sees, and how long it takes."""

from collections.abc import AsyncIterator

import pytest

from app.store.connect import make_probe
from app.store.health import Probe
from tests.conftest import known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey


@pytest.fixture
async def way(valkey: Valkey) -> AsyncIterator[Proxy]:
    """Give a way to the store that can be slow."""
    async with Proxy(valkey.port) as way:
        yield way


@pytest.fixture
async def probe(way: Proxy) -> AsyncIterator[Probe]:
    """Give a probe at its end, that has not connected yet."""
    probe = make_probe(known_settings(redis_url=f"redis://{way.host}:{way.port}/0"))
    yield probe
    await probe.aclose()


async def test_a_store_far_away_is_well_though_a_connection_takes_four_answers(
    way: Proxy, probe: Probe
) -> None:
    way.delay(0.06, shortest_s=0.06)
    look = await probe.look()
    assert (look.readable, look.writable, look.fault) == (True, True, None)
    way.reset_all()
    assert not (await probe.look()).readable
    assert (await probe.look()).writable


async def test_a_store_that_is_slower_than_a_call_may_be_is_away(way: Proxy, probe: Probe) -> None:
    assert (await probe.look()).writable
    way.delay(0.3, shortest_s=0.3)
    for _ in range(2):
        look = await probe.look()
        assert (look.readable, look.writable, look.fault) == (False, False, "timeout")
    way.delay(0)
    assert (await probe.look()).writable
