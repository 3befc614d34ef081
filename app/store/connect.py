"""From the settings to a gateway: the one way in, with HTTP and without."""

import atexit
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from app.address import StoreAddress, unix_address
from app.settings import Settings
from app.store.client import make_client
from app.store.embedded import attach_or_start
from app.store.gateway import Client, Gateway, RetryPolicy
from app.store.health import STEP_S, Probe
from app.store.keys import Keys
from app.store.subscription import Subscription

CONNECTIONS = 50
"""Most connections of one process to the store. A call takes well under a millisecond of one, so
more would only queue in the store instead of here: the 51st call waits for a free one."""

CLUSTER_CONNECTIONS = 512
"""The same for each node of a Cluster, whose client cannot wait: the 513th call at once is refused
as `overloaded`."""

BULK_CONNECTIONS = 8
"""Connections for the parts of large bodies: 4 MB on their way at once, and no other call waits
behind them."""

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
    return _connect(settings, CONNECTIONS, "onboarding")


def connect_bulk(settings: Settings) -> Gateway:
    """Make a gateway to the same store for large bodies. Raises what `connect` raises."""
    return _connect(settings, BULK_CONNECTIONS, "onboarding-bulk")


def make_subscription(settings: Settings) -> Subscription:
    """Make a subscription to the same store. Raises what `connect` raises."""
    return Subscription(_client_maker(settings, settings.redis_timeout_s, 2, "onboarding-streams"))


def _connect(settings: Settings, connections: int, name: str) -> Gateway:
    mode = store_mode(settings)
    connections = CLUSTER_CONNECTIONS if mode == "cluster" else connections
    return Gateway(
        _client_maker(settings, settings.redis_timeout_s, connections, name),
        keys=Keys(hash_tag=settings.hash_tag),
        lifetime_ms=settings.session_ttl_s * 1000,
        mode=mode,
        policy=RetryPolicy(
            send_s=SEND_LIMIT * settings.redis_timeout_s,
            attempts=settings.retry_attempts,
            base_s=settings.retry_base_s,
            jitter_s=settings.retry_jitter_s,
            deadline_s=settings.request_deadline_s,
            budget=settings.max_in_flight * (settings.retry_attempts - 1),
        ),
        replica_wait_ms=_if_replicated(settings, REPLICA_WAIT * settings.redis_timeout_s),
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


def _client_maker(
    settings: Settings, timeout_s: float, connections: int, name: str
) -> Callable[[], Client]:
    address = settings.store_address or _embedded_address(settings.data_dir)
    return partial(
        make_client, address, timeout_s=timeout_s, max_connections=connections, client_name=name
    )


@cache
def _embedded_address(data_dir: Path) -> StoreAddress:
    socket_path, started = attach_or_start(data_dir)
    if started is not None:
        atexit.register(started.stop)
    return unix_address(socket_path)
