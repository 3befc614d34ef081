"""What one look at the store sees, and how long it takes."""

from collections.abc import AsyncIterator

import pytest

from app.store.connect import make_probe
from app.store.health import Probe
from tests.conftest import known_settings
from tests.faults.servers import Valkey
from tests.faults.slow_proxy import SlowProxy


@pytest.fixture
async def way(valkey: Valkey) -> AsyncIterator[SlowProxy]:
    """Give a way to the store that can be slow."""
    async with SlowProxy(valkey.port) as way:
        yield way


@pytest.fixture
async def probe(way: SlowProxy) -> AsyncIterator[Probe]:
    """Give a probe at its end, that has not connected yet."""
    probe = make_probe(known_settings(redis_url=f"redis://{way.host}:{way.port}/0"))
    yield probe
    await probe.aclose()


async def test_a_store_far_away_is_well_though_a_connection_takes_four_answers(
    way: SlowProxy, probe: Probe
) -> None:
    way.delay_s = 0.12
    look = await probe.look()
    assert (look.readable, look.writable, look.fault) == (True, True, None)
    way.reset_all()
    assert not (await probe.look()).readable
    assert (await probe.look()).writable


async def test_a_store_that_is_slower_than_a_call_may_be_is_away(
    way: SlowProxy, probe: Probe
) -> None:
    assert (await probe.look()).writable
    way.delay_s = 0.6
    for _ in range(2):
        look = await probe.look()
        assert (look.readable, look.writable, look.fault) == (False, False, "timeout")
    way.delay_s = 0.0
    assert (await probe.look()).writable
