"""How many sessions there may be: refused beyond, or room made, and never one more."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import structlog
import time_machine
from httpx2 import AsyncClient
from structlog.testing import capture_logs

from app.errors import BodyLostError, SessionCapacityError
from app.onboarding.events import EventId
from app.onboarding.sessions import Owner
from app.onboarding.tasks import TASK_RULES
from app.services.retention import RetentionService, make_retention_service
from app.services.tasks import TaskService
from app.store.feed import FeedStore
from app.store.gateway import Gateway
from tests.conftest import known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import ClusterSet
from tests.service import BASE
from tests.store.conftest import MakePlace
from tests.store.sessions import Manager, Place, describe, keyed, names_of_keys, working_at

TAGS = pytest.mark.parametrize("tag", ["off", "on"])

OWNER = Owner("w1", None, "en")


@pytest.fixture(autouse=True)
def logs_of_managers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the logger that a service of another test has bound to its own configuration."""
    monkeypatch.setattr("app.services.manager.log", structlog.get_logger())


def retention_of(place: Place, **overrides: Any) -> RetentionService:
    """Give what operators work with, on the same store."""
    tasks = TaskService(place.gateway, TASK_RULES)
    return make_retention_service(place.gateway, tasks, known_settings(**overrides))


async def fill(manager: Manager, count: int) -> list[str]:
    return [await manager.create_session() for _ in range(count)]


async def export(manager: Manager, session_id: str) -> None:
    await manager.save_step(session_id, 1, {"a": 1})
    await manager.finalize(session_id)


async def end(place: Place, session_id: str, status: str = "complete") -> None:
    await place.generation.update_session_status(session_id, "processing")
    await place.generation.update_session_status(session_id, status)


async def sessions_of(gateway: Gateway) -> set[str]:
    """Name every session of which there is a key."""
    keys = [key.decode() for key in await gateway.command("KEYS", "onboarding:*")]
    parts = [key.split(":")[1].strip("{}") for key in keys]
    return {part for part in parts if part not in ("index", "idem", "canary")}


async def feed_of(gateway: Gateway, *kinds: str) -> list[tuple[str, str, str | None]]:
    """List events of these types in the feed: session, type, reason."""
    feed, place = FeedStore(gateway), EventId(0, 0)
    found: list[tuple[str, str, str | None]] = []
    while True:
        events, place = await feed.list_after(place)
        if not events:
            return found
        found += [
            (session_id, str(event["type"]), event.get("reason"))  # type: ignore[misc]
            for session_id, event in events
            if event["type"] in kinds
        ]


# --- Refused --------------------------------------------------------------------------------------


@TAGS
async def test_no_session_is_made_beyond_the_limit_and_none_is_lost_for_it(
    real: MakePlace, tag: str
) -> None:
    place = real(max_sessions=3, key_hash_tag=tag)
    made = await fill(place.manager, 3)
    for _ in range(2):
        with pytest.raises(SessionCapacityError):
            await place.manager.create_session()
    with pytest.raises(SessionCapacityError):
        await place.manager.set_metadata("own-id", "u1", "w1")
    assert await sessions_of(place.gateway) == set(made)

    await place.manager.delete_session(made.pop())
    made += await fill(place.manager, 1)
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    # What is there already takes no room.
    await place.manager.set_metadata(made[0], "u1", "w1")
    await place.manager.save_step(made[0], 1, {"a": 1})
    await place.gateway.aclose()
    assert await sessions_of(place.gateway) == set(made)


@TAGS
async def test_no_limit_is_0(real: MakePlace, tag: str) -> None:
    place = real(max_sessions=0, capacity_policy="evict_oldest", key_hash_tag=tag)
    made = await fill(place.manager, 20)
    assert await sessions_of(place.gateway) == set(made)


@TAGS
async def test_what_has_expired_gives_its_room_back(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    place = fake(max_sessions=3, session_ttl_s=2, key_hash_tag=tag)
    old = await fill(place.manager, 2)
    await place.gateway.aclose()
    clock.shift(1.5)
    young = await fill(place.manager, 1)
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    await place.gateway.aclose()
    clock.shift(1)

    made = await fill(place.manager, 2)

    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    await place.gateway.aclose()
    assert await sessions_of(place.gateway) == {*young, *made}
    ends = await feed_of(place.gateway, "expired", "evicted", "deleted")
    assert sorted(ends) == sorted((each, "expired", "lifetime") for each in old)


@TAGS
async def test_a_session_that_lives_on_by_its_writes_keeps_its_room(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    place = fake(max_sessions=1, session_ttl_s=100, key_hash_tag=tag)
    (session_id,) = await fill(place.manager, 1)
    for _ in range(3):
        clock.shift(60)
        await place.manager.save_draft(session_id, 1, {"a": 1})
        await place.gateway.aclose()
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    assert await sessions_of(place.gateway) == {session_id}


@TAGS
async def test_operators_move_the_limit_of_every_process_at_once(real: MakePlace, tag: str) -> None:
    place, other = real(max_sessions=2, key_hash_tag=tag), real(max_sessions=5, key_hash_tag=tag)
    made = await fill(place.manager, 2)
    await retention_of(place).reconfigure(max_sessions=3)
    made += await fill(other.manager, 1)
    for each in (place, other):
        with pytest.raises(SessionCapacityError):
            await each.manager.create_session()

    await retention_of(other).reconfigure(max_sessions=1)
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    assert await sessions_of(place.gateway) == set(made)

    await retention_of(other).reconfigure(max_sessions=None)
    made += await fill(other.manager, 2)
    with pytest.raises(SessionCapacityError):
        await place.manager.create_session()
    await retention_of(other).reconfigure(max_sessions=0)
    made += await fill(place.manager, 4)
    assert await sessions_of(place.gateway) == set(made)


@TAGS
async def test_what_could_not_be_made_takes_no_room(real: MakePlace, tag: str) -> None:
    """A session with a file whose parts are gone is refused, and leaves its place to others."""
    place = real(max_sessions=1, key_hash_tag=tag)
    await place.upload("s", b"a")
    await place.manager.delete_session("s")
    from app.onboarding.sessions import Owner

    with pytest.raises(BodyLostError):
        await place.manager.begin_session_with(
            "s", Owner("w", None, "en"), upload=describe("g", b"a")
        )
    await place.gateway.aclose()

    made = await fill(place.manager, 1)

    assert await sessions_of(place.gateway) == set(made)


# --- Room made ------------------------------------------------------------------------------------


@TAGS
async def test_room_is_made_by_what_was_exported_and_has_ended_and_then_by_the_oldest_activity(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    place = fake(max_sessions=7, capacity_policy="evict_oldest", key_hash_tag=tag)
    manager = place.manager
    names = ["idle", "held", "failed, held", "running", "done", "failed", "renewed"]
    sessions = {}
    for name in names:
        clock.shift(60)
        sessions[name] = await manager.create_session()
    clock.shift(60)
    await manager.save_step(sessions["held"], 1, {"a": 1})
    clock.shift(60)
    await manager.save_step(sessions["failed, held"], 1, {"a": 1})
    await end(place, sessions["failed, held"], "error")
    clock.shift(60)
    await export(manager, sessions["running"])
    await place.generation.update_session_status(sessions["running"], "processing")
    for name, status in (("failed", "error"), ("done", "complete")):
        clock.shift(60)
        await export(manager, sessions[name])
        await end(place, sessions[name], status)
    clock.shift(60)
    await manager.save_draft(sessions["renewed"], 1, {"a": 1})
    clock.shift(60)
    # A write of any kind renews, a read does not.
    await place.generation.set_language_preference(sessions["idle"], "en")
    clock.shift(60)
    await manager.get_session_summary(sessions["held"])
    await place.gateway.aclose()

    evicted = []
    for count in range(7):
        with capture_logs() as logs:
            made = await manager.create_session()
        told = [line for line in logs if line["event"] == "session_evicted"]
        assert [line["made_room_for"] for line in told] == [made]
        assert [line["log_level"] for line in told] == ["warning"]
        evicted += [line["session_id"] for line in told]
        await place.gateway.aclose()
        assert len(await sessions_of(place.gateway)) == 7
        assert await names_of_keys(place.gateway, evicted[-1]) == set()
        clock.shift(1 + count)

    in_order = ["failed", "done", "held", "failed, held", "running", "renewed", "idle"]
    assert evicted == [sessions[name] for name in in_order]
    ends = await feed_of(place.gateway, "evicted", "expired", "deleted")
    assert ends == [(session_id, "evicted", "capacity") for session_id in evicted]
    cleaned = await place.gateway.command("HGET", place.gateway.keys.index("cleanup"), "evicted")
    assert int(cleaned) == 7


@TAGS
async def test_what_has_expired_goes_before_anything_is_evicted(
    fake: MakePlace, clock: time_machine.Traveller, tag: str
) -> None:
    place = fake(
        max_sessions=2, capacity_policy="evict_oldest", session_ttl_s=200, key_hash_tag=tag
    )
    (old,) = await fill(place.manager, 1)
    await place.gateway.aclose()
    clock.shift(150)
    (young,) = await fill(place.manager, 1)
    await place.gateway.aclose()
    clock.shift(100)

    made = await fill(place.manager, 1)

    await place.gateway.aclose()
    assert await sessions_of(place.gateway) == {young, *made}
    assert await feed_of(place.gateway, "expired", "evicted") == [(old, "expired", "lifetime")]


@TAGS
async def test_a_damaged_session_is_evicted_with_everything_that_there_is_of_it(
    real: MakePlace, tag: str
) -> None:
    place = real(max_sessions=1, capacity_policy="evict_oldest", key_hash_tag=tag)
    await place.manager.set_metadata("damaged", "u1", "w1")
    await place.manager.save_steps("damaged", {1: {"a": 1}, 23: {"a": 1}})
    await place.gateway.aclose()
    progress = place.gateway.keys.session("damaged").progress
    await place.gateway.command("HDEL", progress, "saved")

    made = await fill(place.manager, 1)

    assert await sessions_of(place.gateway) == set(made)


@TAGS
async def test_a_limit_far_below_the_number_of_sessions_is_reached_and_every_victim_is_told_of(
    real: MakePlace, tag: str
) -> None:
    place = real(key_hash_tag=tag)
    before = set(await asyncio.gather(*(place.manager.create_session() for _ in range(130))))
    await place.gateway.aclose()
    full = real(max_sessions=5, capacity_policy="evict_oldest", key_hash_tag=tag)
    made = None
    with capture_logs() as logs:
        for _ in range(3):
            with suppress(SessionCapacityError):
                made = await full.manager.create_session()
                break
    assert made is not None
    await full.gateway.aclose()
    left = await sessions_of(full.gateway)
    assert len(left) == 5
    assert made in left
    gone = before - left
    assert {each for each, _, _ in await feed_of(full.gateway, "evicted")} == gone
    logged = [line["session_id"] for line in logs if line["event"] == "session_evicted"]
    assert sorted(logged) == sorted(gone)


@TAGS
async def test_a_repeat_by_the_same_idempotency_key_evicts_nobody(
    real: MakePlace, tag: str
) -> None:
    place = real(max_sessions=2, capacity_policy="evict_oldest", key_hash_tag=tag)
    await fill(place.manager, 2)
    first = await place.manager.begin_session(OWNER, request=keyed())
    await place.gateway.aclose()
    there = await sessions_of(place.gateway)
    with capture_logs() as logs:
        again = await place.manager.begin_session(OWNER, request=keyed())
    assert again == first
    assert logs == []
    assert await sessions_of(place.gateway) == there
    assert len(await feed_of(place.gateway, "evicted")) == 1


# --- Many at once ---------------------------------------------------------------------------------


class Looks:
    """Looks again and again how many sessions there are; `most` is the largest number seen."""

    def __init__(self, *gateways: Gateway) -> None:
        self._gateways = gateways
        self.most = 0
        self.taken = 0

    async def look(self) -> None:
        seen = await asyncio.gather(*(sessions_of(each) for each in self._gateways))
        self.most = max(self.most, len(set().union(*seen)))
        self.taken += 1

    async def go_on(self) -> None:
        while True:
            await self.look()

    async def __aenter__(self) -> "Looks":
        # With the connections open by then, there is time for many while 200 are made.
        await self.look()
        self._task = asyncio.create_task(self.go_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.look()


async def create(manager: Manager) -> str | None:
    try:
        return await manager.create_session()
    except SessionCapacityError:
        return None


@TAGS
@pytest.mark.parametrize("policy", ["refuse", "evict_oldest"])
async def test_200_at_once_never_make_more_than_there_may_be(
    real: MakePlace, tag: str, policy: str
) -> None:
    places = [real(max_sessions=50, capacity_policy=policy, key_hash_tag=tag) for _ in range(2)]
    looker = real().gateway
    before = await fill(places[0].manager, 50) if policy == "evict_oldest" else []
    async with Looks(looker) as looks:
        made = await asyncio.gather(*(create(places[number % 2].manager) for number in range(200)))
    assert looks.taken > 2
    assert looks.most == 50
    for place in places:
        await place.gateway.aclose()
    left = await sessions_of(looker)
    assert len(left) == 50
    if policy == "refuse":
        assert {each for each in made if each} == left
        assert made.count(None) == 150
    else:
        evicted = [each for each, _, _ in await feed_of(places[0].gateway, "evicted")]
        assert set(evicted) == {*before, *made} - left - {None}
        assert len(evicted) == len(set(evicted))
        assert left <= set(made)
        # With hash tags, one whose room is only reserved cannot be made to go again.
        assert tag == "on" or made.count(None) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    with ClusterSet.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def session_keys(cluster: ClusterSet) -> int:
    """Count the sessions on all nodes, one after the other."""
    return sum(len(node.command("KEYS", "onboarding:*:progress")) for node in cluster.nodes)


@pytest.mark.parametrize("policy", ["refuse", "evict_oldest"])
async def test_200_at_once_on_a_cluster_never_make_more_than_there_may_be(
    cluster: ClusterSet, policy: str
) -> None:
    for node in cluster.nodes:
        node.command("FLUSHALL")
    most = 0
    overrides: dict[str, Any] = {"max_sessions": 50, "capacity_policy": policy}
    async with (
        working_at(cluster.url, **overrides) as one,
        working_at(cluster.url, **overrides) as other,
    ):
        if policy == "evict_oldest":
            await asyncio.gather(*(create(one.manager) for _ in range(50)))
        racing = asyncio.gather(
            *(create((one, other)[number % 2].manager) for number in range(200))
        )
        while not racing.done():
            most = max(most, await asyncio.to_thread(session_keys, cluster))
        made = await racing
    assert most <= 50
    assert session_keys(cluster) == 50
    assert policy == "evict_oldest" or made.count(None) == 150


# --- Lost replies ---------------------------------------------------------------------------------


@TAGS
@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_a_session_whose_making_was_answered_into_the_void_is_made_once(
    proxy: Proxy, real: MakePlace, tag: str, lost: int
) -> None:
    url = f"redis://{proxy.host}:{proxy.port}/0"
    full: dict[str, Any] = {"max_sessions": 2, "redis_timeout_s": 0.1, "key_hash_tag": tag}
    looker = real().gateway
    async with working_at(url, **full) as place:
        made = await fill(place.manager, 1)
        proxy.drop_replies(lost, to="EVALSHA")
        made += await fill(place.manager, 1)
        with pytest.raises(SessionCapacityError):
            await place.manager.create_session()
    assert await sessions_of(looker) == set(made)


@TAGS
async def test_a_session_that_made_room_and_was_answered_into_the_void_evicts_one(
    proxy: Proxy, real: MakePlace, tag: str
) -> None:
    url = f"redis://{proxy.host}:{proxy.port}/0"
    full: dict[str, Any] = {
        "max_sessions": 3,
        "capacity_policy": "evict_oldest",
        "redis_timeout_s": 0.1,
        "key_hash_tag": tag,
    }
    looker = real(key_hash_tag=tag).gateway
    async with working_at(url, **full) as place:
        made = await fill(place.manager, 3)
        proxy.drop_replies(2, to="EVALSHA")
        with capture_logs() as logs:
            made += await fill(place.manager, 1)
    (evicted,) = [line["session_id"] for line in logs if line["event"] == "session_evicted"]
    assert evicted in made[:3]
    assert await sessions_of(looker) == {*made} - {evicted}
    assert await feed_of(looker, "evicted") == [(evicted, "evicted", "capacity")]


# --- Over HTTP ------------------------------------------------------------------------------------


@TAGS
async def test_over_http_it_is_503_with_a_hint_when_to_come_back_and_burns_no_key(
    serve: Any, tag: str
) -> None:
    api: AsyncClient = await serve(max_sessions=2, key_hash_tag=tag)
    body = {"workspace_id": "w1"}
    first, second = [await api.post(f"{BASE}/session", json=body) for _ in range(2)]
    assert (first.status_code, second.status_code) == (201, 201)

    for headers in ({}, {"idempotency-key": "k1"}, {"idempotency-key": "k1"}):
        refused = await api.post(f"{BASE}/session", json=body, headers=headers)
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["cache-control"] == "no-store"
        assert "idempotent-replayed" not in refused.headers
        problem = refused.json()
        assert problem["code"] == "capacity_reached"
        assert problem["type"] == "urn:onboarding:problem:capacity_reached"
        assert problem["status"] == 503
        assert problem["detail"]
    refused = await api.post("/api/upload", files={"file": ("a.txt", b"hello")})
    assert (refused.status_code, refused.json()["code"]) == (503, "capacity_reached")

    gone = await api.delete(f"{BASE}/{first.json()['session_id']}")
    assert gone.status_code == 200
    key = {"idempotency-key": "k1"}
    made = await api.post(f"{BASE}/session", json=body, headers=key)
    assert made.status_code == 201
    assert "idempotent-replayed" not in made.headers
    again = await api.post(f"{BASE}/session", json=body, headers=key)
    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == made.json()
    health = (await api.get("/api/v1/admin/health")).json()
    assert (health["session_count"], health["utilization_percent"]) == (2, 100.0)
    assert health["overall_health"] == "critical"
