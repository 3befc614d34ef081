"""What a live stream costs while nothing happens in it."""

import asyncio
from contextlib import suppress
from typing import NamedTuple

from tests.bench import wizard
from tests.bench.contestants import Contestant
from tests.bench.load import Address
from tests.bench.machine import resident_bytes
from tests.bench.population import begin
from tests.faults.servers import Valkey

FIRST = 50
"""Streams that are opened before the others: what is made once is not the cost of one."""

SETTLE_S = 1.5
"""How long is waited until everybody has done what opening makes them do."""

OPEN_S = 30.0
"""How long a stream may take to begin."""


class Streams(NamedTuple):
    """How many were opened, and what all of them added."""

    opened: int
    bytes_each: float
    connections: int
    """Connections to the store that were added by all of them."""
    connections_before: int


async def measure_streams(contestant: Contestant, count: int) -> Streams:
    """Open streams of sessions of their own and leave them alone.

    Raises RuntimeError when one does not begin or does not stay.
    """
    store = contestant.store
    if store is None:
        raise ValueError("streams need a store")
    sessions = await begin(contestant, FIRST + count)
    paths = [
        wizard.write("GET", wizard.path_of(session, "/events/stream"), token=session.token)
        for session in sessions
    ]
    links = await _open(contestant.address, paths[:FIRST])
    await asyncio.sleep(SETTLE_S)
    pids = contestant.pids
    bytes_before, connections_before = resident_bytes(pids), _connections(store)
    links += await _open(contestant.address, paths[FIRST:])
    await asyncio.sleep(SETTLE_S)
    bytes_after, connections_after = resident_bytes(pids), _connections(store)
    ended = sum(reader.at_eof() for reader, _ in links)
    for _, writer in links:
        writer.close()
    if ended:
        raise RuntimeError(f"{ended} of {len(links)} streams ended by themselves")
    return Streams(
        count,
        (bytes_after - bytes_before) / count,
        connections_after - connections_before,
        connections_before,
    )


Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _open(address: Address, requests: list[bytes]) -> list[Link]:
    links: list[Link] = []
    for at in range(0, len(requests), 50):
        some = requests[at : at + 50]
        links += await asyncio.gather(*(_begin(address, request) for request in some))
    return links


async def _begin(address: Address, request: bytes) -> Link:
    """Open a stream and read until it has said how things stand."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    said = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(OPEN_S):
            while b"event: snapshot" not in said:
                some = await reader.read(4096)
                if not some:
                    break
                said += some
    if b"event: snapshot" not in said:
        raise RuntimeError(f"a stream began with {said[:300]!r}")
    return reader, writer


def _connections(store: Valkey) -> int:
    # One of them asks.
    return int(store.command("INFO", "clients")["connected_clients"]) - 1
