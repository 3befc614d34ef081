"""Put a real store into a state for the length of a block: what begins and ends with it."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.servers import HOST, Valkey, free_ports, wait_until

NEEDS = {
    "enable_protected_configs": True,
    "enable_debug_command": True,
    "rdbcompression": False,
    "loading_process_events_interval_bytes": 1024,
}
"""How a store is configured that is to be put into all of them."""


def connect(store: Valkey) -> redis.Redis:
    """Make a connection that stays, whatever becomes of the password."""
    return redis.Redis(
        host=store.host,
        port=store.port,
        single_connection_client=True,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


@contextmanager
def killed(store: Valkey) -> Iterator[None]:
    store.kill()
    try:
        yield
    finally:
        store.restart()


@contextmanager
def frozen(store: Valkey) -> Iterator[None]:
    store.freeze()
    try:
        yield
    finally:
        store.thaw()


@contextmanager
def full(store: Valkey) -> Iterator[None]:
    """Leave no memory for what is written."""
    with _set(store, "maxmemory", 1, 0):
        yield


@contextmanager
def without_replicas(store: Valkey) -> Iterator[None]:
    """Make it a master that misses its replicas."""
    with _set(store, "min-replicas-to-write", 1, 0):
        yield


@contextmanager
def demoted(store: Valkey) -> Iterator[None]:
    """Make it a replica, whose master is not there."""
    store.command("REPLICAOF", HOST, free_ports(1)[0])
    try:
        yield
    finally:
        store.command("REPLICAOF", "NO", "ONE")


@contextmanager
def unable_to_save(store: Valkey) -> Iterator[None]:
    """Let it find that it cannot write its snapshot, for which it stops taking writes."""
    gone = Path(store.directory, "gone")
    gone.mkdir()
    store.command("CONFIG", "SET", "save", "3600 1", "dir", str(gone))
    gone.rmdir()
    try:
        store.command("BGSAVE")
        wait_until(lambda: _last_snapshot(store) == "err", 5.0, "the snapshot has failed")
        yield
    finally:
        store.command("CONFIG", "SET", "dir", str(store.directory), "save", "")


@contextmanager
def locked(store: Valkey, password: str = "another-secret") -> Iterator[None]:
    """Change the password, and close the connections of those who knew the old one."""
    with closing(connect(store)) as admin:
        admin.config_set("requirepass", password)
        try:
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]
            yield
        finally:
            admin.config_set("requirepass", "")


@contextmanager
def loading(store: Valkey) -> Iterator[None]:
    """Let it load what it has saved; it is no restart, so that the connections stay."""
    store.command("DEBUG", "POPULATE", 1000, "onboarding:ballast", 2000)
    with socket.create_connection((store.host, store.port), timeout=10.0) as link:
        with _set(store, "key-load-delay", 10_000, 0):
            link.sendall(b"DEBUG RELOAD\r\n")
            wait_until(lambda: _is_loading(store), 5.0, "the store loads")
            yield
            assert _is_loading(store)
        assert link.recv(64).startswith(b"+OK")


@contextmanager
def _set(store: Valkey, name: str, value: int, normal: int) -> Iterator[None]:
    store.command("CONFIG", "SET", name, value)
    try:
        yield
    finally:
        store.command("CONFIG", "SET", name, normal)


def _last_snapshot(store: Valkey) -> str:
    return str(store.command("INFO", "persistence")["rdb_last_bgsave_status"])


def _is_loading(store: Valkey) -> bool:
    return bool(store.command("INFO", "persistence")["loading"])
