"""From the settings to a gateway: the one way in, with HTTP and without."""

import atexit
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis

from app.address import StoreAddress, unix_address
from app.settings import Settings
from app.store.client import Client, ClusterClient, make_client
from app.store.embedded import attach_or_start
from app.store.gateway import Gateway, RetryPolicy
from app.store.health import STEP_S, Probe
from app.store.keys import Keys
from app.store.links import Link, PooledLink, SharedCluster, SharedLink, Way
from app.store.subscription import Subscription

BULK_CONNECTIONS = 8
"""Connections for the parts of large bodies: 4 MB on their way at once, and no other call waits
behind them."""

WAITING_CONNECTIONS = 2
"""Connections for commands that wait until something happens: one, and one for all others."""

SEND_LIMIT = 1.5
"""Longest sending, in time limits of one command: four of them and the waits between, 14.5 s by
default, stay below the deadline of a request."""

REPLICA_WAIT = 0.5
"""How long one sending of a write waits for a replica, in time limits of one command: the answer
to WAIT must come within one."""


def connect(settings: Settings) -> Gateway:
    """Make a gateway to the configured store; it connects when it is first used.

    Without a configured one, attaches to the embedded store of the data directory and starts it if
    none runs there. Raises `EmbeddedStoreError`, and `RuntimeError` outside the main thread when it
    has to start one.
    """
    return _connect(settings, partial(_make_link, settings))


def connect_bulk(settings: Settings) -> Gateway:
    """Make a gateway to the same store for large bodies. Raises what `connect` raises."""
    return _connect(settings, partial(_lend, settings, BULK_CONNECTIONS, "onboarding-bulk"))


def make_subscription(settings: Settings) -> Subscription:
    """Make a subscription to the same store. Raises what `connect` raises."""
    return Subscription(_client_maker(settings, settings.redis_timeout_s, 2, "onboarding-streams"))


def _connect(settings: Settings, make_link: Callable[[Way], Link]) -> Gateway:
    # An embedded store is started here and now, and by the main thread.
    _address(settings)
    return Gateway(
        make_link,
        keys=Keys(hash_tag=settings.hash_tag),
        lifetime_ms=settings.session_ttl_s * 1000,
        mode=store_mode(settings),
        policy=RetryPolicy(
            send_s=_send_s(settings),
            attempts=settings.retry_attempts,
            base_s=settings.retry_base_s,
            jitter_s=settings.retry_jitter_s,
            deadline_s=settings.request_deadline_s,
            budget=settings.max_in_flight * (settings.retry_attempts - 1),
        ),
        replica_wait_ms=_replica_wait_ms(settings),
    )


def make_probe(settings: Settings) -> Probe:
    """Make a probe of the same store with a connection of its own. Raises `EmbeddedStoreError`."""
    # Two connections: one look may still hold the first while it is being given up.
    client = _client_maker(settings, STEP_S, 2, "onboarding-health")()
    return Probe(client, Keys.canary, _if_replicated(settings, REPLICA_WAIT * STEP_S))


def store_mode(settings: Settings) -> str:
    """Name the kind of store: embedded, standalone, sentinel or cluster."""
    return "embedded" if settings.store_address is None else settings.store_address.mode


def _if_replicated(settings: Settings, wait_s: float) -> int | None:
    """Give a wait in milliseconds, at least one: WAIT 0 waits for ever."""
    return max(1, int(wait_s * 1000)) if settings.durability == "replicated" else None


def _send_s(settings: Settings) -> float:
    return SEND_LIMIT * settings.redis_timeout_s


def _replica_wait_ms(settings: Settings) -> int | None:
    return _if_replicated(settings, REPLICA_WAIT * settings.redis_timeout_s)


def _make_link(settings: Settings, way: Way) -> Link:
    if way is Way.LENT:
        return _lend(settings, WAITING_CONNECTIONS, "onboarding-waiting", way)
    how: dict[str, Any] = {
        "timeout_s": settings.redis_timeout_s,
        "open_s": _send_s(settings),
        "wait_ms": _replica_wait_ms(settings) if way is Way.CONFIRMED else None,
    }
    # The client only says how connections are made; one of a Cluster asks for the nodes, too.
    client = _client_maker(settings, settings.redis_timeout_s, 2, "onboarding")()
    if isinstance(client, Redis):
        return SharedLink(client, **how)
    return SharedCluster(cast("ClusterClient", client), **how)


def _lend(settings: Settings, connections: int, name: str, way: Way) -> Link:
    client = _client_maker(settings, settings.redis_timeout_s, connections, name)()
    wait_ms = _replica_wait_ms(settings) if way is Way.CONFIRMED else None
    return PooledLink(client, send_s=_send_s(settings), wait_ms=wait_ms)


def _client_maker(
    settings: Settings, timeout_s: float, connections: int, name: str
) -> Callable[[], Client]:
    return partial(
        make_client,
        _address(settings),
        timeout_s=timeout_s,
        max_connections=connections,
        client_name=name,
    )


def _address(settings: Settings) -> StoreAddress:
    return settings.store_address or _embedded_address(settings.data_dir)


@cache
def _embedded_address(data_dir: Path) -> StoreAddress:
    socket_path, started = attach_or_start(data_dir)
    if started is not None:
        atexit.register(started.stop)
    return unix_address(socket_path)
