"""What health says of a real store in every state that it can be in, and how soon."""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import pytest
import redis
from httpx2 import Client

from tests.faults.servers import Valkey, wait_until
from tests.faults.states import (
    NEEDS,
    connect,
    demoted,
    frozen,
    full,
    killed,
    loading,
    locked,
    unable_to_save,
    without_replicas,
)
from tests.process.conftest import StartService
from tests.process.service_process import QUICK_RETRIES, begin_session, save_step, within
from tests.service import BASE

State = Callable[[Valkey], AbstractContextManager[None]]

pytestmark = pytest.mark.xdist_group("health-states")

CHANGE_S = 1.5
"""Within what time health must be right after a change."""

ANSWER_S = 0.5
"""Within what time health must answer, in every state."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Run the store that the tests put into every state."""
    directory = tmp_path_factory.mktemp("store")
    with Valkey.start(directory, busy_reply_threshold=50, **NEEDS) as store:
        yield store


@pytest.fixture(scope="module")
def client(store: Valkey, start_shared: StartService) -> Iterator[Client]:
    """Give a client for a service on the store."""
    with start_shared(REDIS_URL=store.url, **QUICK_RETRIES).wait_until_it_answers().client() as it:
        yield it


@pytest.fixture
def admin(store: Valkey, client: Client) -> Iterator[redis.Redis]:
    """Give a connection that stays, and a service that is well before and after the test."""
    with closing(connect(store)) as connection:
        become(client, "ok")
        yield connection
        become(client, "ok")


@pytest.fixture
def session_id(admin: redis.Redis, client: Client) -> str:
    """Begin a session with one step while all is well."""
    session_id = begin_session(client)
    assert save_step(client, session_id, 1, a=1).status_code == 200
    return session_id


def ask(client: Client, path: str) -> tuple[int, dict[str, Any]]:
    """Ask for the health, which must answer in time and in its shape."""
    with within(ANSWER_S):
        response = client.get(path)
    body: dict[str, Any] = response.json()
    check_shape(body)
    return response.status_code, body


def check_shape(body: dict[str, Any]) -> None:
    assert body["status"] in {"ok", "degraded", "down", "stopping"}
    store = body["redis"]
    assert isinstance(store["connected"], bool)
    assert isinstance(store["writable"], bool)
    assert isinstance(store["latency_ms"], float | int | None)
    assert store["mode"] == "standalone"
    assert isinstance(store["version"], str)
    assert isinstance(store["pool"], dict)
    assert isinstance(store["errors_last_minute"], int)
    assert isinstance(body["version"], str)
    assert body["uptime_s"] >= 0
    assert ("reason" in body) == (body["status"] != "ok")


def become(client: Client, status: str) -> dict[str, Any]:
    """Wait until health says so, no longer than it may take to see a change."""
    claim = f"health says {status}"
    wait_until(lambda: ask(client, "/health")[1]["status"] == status, CHANGE_S, claim)
    body = ask(client, "/health")[1]
    assert body["status"] == status
    return body


def assert_down(client: Client, store: Valkey) -> dict[str, Any]:
    body = become(client, "down")
    assert ask(client, "/health")[0] == 503
    assert ask(client, "/healthz")[0] == 503
    assert ask(client, "/readyz")[0] == 503
    assert (body["redis"]["connected"], body["redis"]["writable"]) == (False, False)
    assert_no_address(body, store)
    with within(ANSWER_S):
        assert client.get("/livez").status_code == 200
    return body


def assert_degraded(client: Client, store: Valkey, session_id: str) -> dict[str, Any]:
    """Health says that reads work and writes do not; and so it is."""
    body = become(client, "degraded")
    assert ask(client, "/health")[0] == 503
    assert ask(client, "/healthz")[0] == 503
    status, ready = ask(client, "/readyz")
    assert (status, ready["status"], ready["reason"]) == (200, "degraded", body["reason"])
    assert (body["redis"]["connected"], body["redis"]["writable"]) == (True, False)
    assert_no_address(body, store)
    assert client.get(f"{BASE}/{session_id}").status_code == 200
    assert client.get(f"{BASE}/{session_id}/steps/1").json()["data"] == {"a": 1}
    assert client.get(f"{BASE}/{session_id}/progress").status_code == 200
    assert save_step(client, session_id, 2, b=1).status_code == 503
    return body


def assert_no_address(body: dict[str, Any], store: Valkey) -> None:
    assert body["reason"]
    assert store.host not in body["reason"]
    assert str(store.port) not in body["reason"]


# The states


def test_a_store_that_takes_writes_is_ok(admin: redis.Redis, client: Client) -> None:
    status, body = ask(client, "/health")
    assert (status, body["status"]) == (200, "ok")
    assert (body["redis"]["connected"], body["redis"]["writable"]) == (True, True)
    assert 0 < body["redis"]["latency_ms"] < 500
    assert body["redis"]["version"] == admin.info("server")["valkey_version"]
    assert ask(client, "/healthz")[0] == 200
    assert ask(client, "/readyz") == (200, body)
    assert client.get("/livez").status_code == 200


def test_the_probes_own_key_lives_for_seconds(admin: redis.Redis, client: Client) -> None:
    def lifetimes() -> list[int]:
        return [int(admin.pttl(key)) for key in admin.scan_iter("onboarding:canary*")]

    wait_until(lambda: bool(lifetimes()), CHANGE_S, "the probe has written")
    assert all(0 < each <= 10_000 for each in lifetimes())


@pytest.mark.parametrize("state", [frozen, killed, locked, loading], ids=lambda it: it.__name__)
def test_a_store_in_this_state_is_down(
    admin: redis.Redis, client: Client, store: Valkey, state: State
) -> None:
    with state(store):
        body = assert_down(client, store)
        assert "another-secret" not in str(body)
    become(client, "ok")


def test_a_full_store_is_degraded_and_still_deletes(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    with full(store):
        assert_degraded(client, store, session_id)
        refused = save_step(client, session_id, 2, b=1)
        assert refused.json()["code"] == "store_full"
        assert "retry-after" in refused.headers
        assert client.delete(f"{BASE}/{session_id}").status_code == 200
    become(client, "ok")


def test_a_replica_is_degraded(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    with demoted(store):
        assert_degraded(client, store, session_id)
    become(client, "ok")
    assert save_step(client, session_id, 2, b=1).status_code == 200


def test_a_replica_that_serves_nothing_stale_is_down(
    admin: redis.Redis, client: Client, store: Valkey
) -> None:
    admin.config_set("replica-serve-stale-data", "no")
    try:
        with demoted(store):
            assert_down(client, store)
    finally:
        admin.config_set("replica-serve-stale-data", "yes")
    become(client, "ok")


def test_a_master_that_misses_its_replicas_is_degraded(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    with without_replicas(store):
        assert_degraded(client, store, session_id)
    become(client, "ok")


def test_a_store_that_cannot_save_its_snapshot_is_degraded(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    with unable_to_save(store):
        assert_degraded(client, store, session_id)
        refused = save_step(client, session_id, 2, b=1)
        assert refused.json()["code"] == "store_readonly"
        assert "retry-after" in refused.headers
    become(client, "ok")


def test_a_store_that_a_script_keeps_busy_is_down(
    admin: redis.Redis, client: Client, store: Valkey
) -> None:
    with socket.create_connection((store.host, store.port)) as link, _killing_scripts(admin):
        link.sendall(b'EVAL "while true do end" 0\r\n')
        assert_down(client, store)
    become(client, "ok")


def test_health_says_why_as_soon_as_the_reason_changes(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    with without_replicas(store):
        with full(store):
            assert become(client, "degraded")["reason"] == "out_of_memory"
        claim = "health names the other reason"
        wait_until(lambda: _reason(client) == "no_replicas", CHANGE_S, claim)
    become(client, "ok")


def test_errors_of_the_last_minute_are_counted(
    admin: redis.Redis, client: Client, store: Valkey, session_id: str
) -> None:
    before = ask(client, "/health")[1]["redis"]["errors_last_minute"]
    with full(store):
        assert save_step(client, session_id, 2, b=1).status_code == 503
    assert become(client, "ok")["redis"]["errors_last_minute"] > before


def _reason(client: Client) -> str | None:
    return ask(client, "/health")[1].get("reason")


@contextmanager
def _killing_scripts(admin: redis.Redis) -> Iterator[None]:
    try:
        yield
    finally:
        admin.execute_command("SCRIPT", "KILL")  # type: ignore[no-untyped-call]
