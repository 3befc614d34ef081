"""The main job on every kind of store: a Sentinel set, a Cluster, and one node with hash tags."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from redis.crc import key_slot

from app.errors import (
    IdempotencyInProgressError,
    IdempotencyMismatchError,
    SessionFinalizedError,
    SessionNotFoundError,
    TaskExistsError,
)
from app.onboarding.audit import Lane
from app.onboarding.events import BEFORE_ALL
from app.onboarding.exports import compute_checksum
from app.onboarding.files import FileKind
from app.onboarding.generation import ProgressEvent
from app.onboarding.limits import Limit, Policy
from app.onboarding.sessions import Owner
from app.onboarding.tasks import TASK_RULES
from app.onboarding.tokens import digest_of
from app.services.audit import AuditTrail
from app.services.retention import make_retention_service
from app.services.tasks import TaskService
from app.services.tokens import TokenService
from app.settings import Settings
from app.store.connect import make_subscription
from app.store.jobs import JobStore
from app.store.limits import LimitStore
from tests.conftest import QUICKLY, known_settings
from tests.faults.servers import ClusterSet, SentinelSet, Valkey
from tests.store.sessions import Manager, Place, keyed, prepare, working_at

pytestmark = pytest.mark.xdist_group("sets")

STEPS = range(1, 24)
OWNER = Owner("w1", "u1", "en", b'{"source":"test"}')


class Topology:
    """A kind of store: a manager on it, and its data servers to look at."""

    def __init__(
        self, place: Place, servers: list[Valkey], settings: Settings, *, tagged: bool
    ) -> None:
        self.place = place
        self.manager = place.manager
        self.gateway = place.gateway
        self.settings = settings
        self.tagged = tagged
        self._servers = servers

    def list_keys(self) -> set[str]:
        """List every key in the store but the index."""
        found = {str(key) for server in self._servers for key in server.command("KEYS", "*")}
        return {key for key in found if not key.startswith("onboarding:index:")}

    def immortal(self) -> set[str]:
        """List the keys without a lifetime."""
        return {
            str(key)
            for server in self._servers
            for key in server.command("KEYS", "*")
            if server.command("PTTL", key) == -1
        }

    def deadlines_ms(self) -> dict[str, int]:
        """Ask when each key expires."""
        return {
            str(key): int(server.command("PEXPIRETIME", key))
            for server in self._servers
            for key in server.command("KEYS", "onboarding:*")
        }

    def prefix(self, session_id: str) -> str:
        return f"onboarding:{{{session_id}}}:" if self.tagged else f"onboarding:{session_id}:"


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSet]:
    with SentinelSet.start(tmp_path_factory.mktemp("sentinels")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    with ClusterSet.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(params=["sentinel", "cluster", "tagged"])
async def topology(request: pytest.FixtureRequest) -> AsyncIterator[Topology]:
    """Give each topology in turn, empty."""
    overrides: dict[str, Any] = {}
    if request.param == "sentinel":
        sentinels: SentinelSet = request.getfixturevalue("sentinels")
        url, servers = sentinels.url, [sentinels.acting_master()]
    elif request.param == "cluster":
        cluster: ClusterSet = request.getfixturevalue("cluster")
        url, servers = cluster.url, [*cluster.nodes]
    else:
        valkey: Valkey = request.getfixturevalue("valkey")
        url, servers = valkey.url, [valkey]
        overrides["key_hash_tag"] = "on"
    for server in servers:
        server.command("FLUSHALL")
    settings = known_settings(redis_url=url, **QUICKLY, **overrides)
    async with working_at(url, **overrides) as place:
        yield Topology(place, servers, settings, tagged=request.param != "sentinel")


async def test_the_main_job(topology: Topology) -> None:
    manager = topology.manager
    session_id = await manager.create_session(workspace_id="w1", user_id="u1")
    for number in STEPS:
        saved = await manager.save_step(session_id, number, {"answer": number, "list": [], "o": {}})
        assert saved["version"] == 1
        assert saved["progress"]["completed"] == number

    await manager.save_draft(session_id, 3, {"typing": True})
    draft = await manager.get_draft(session_id, 3)
    assert draft is not None
    assert (draft["data"], draft["version"]) == ({"typing": True}, 1)
    await manager.save_draft(session_id, 4, {"promoted": True})
    assert (await manager.promote_draft_to_step(session_id, 4))["version"] == 2
    assert (await manager.patch_step(session_id, 1, {"more": 1, "list": None}))["version"] == 2
    step = await manager.get_step(session_id, 1)
    assert step is not None
    assert step["data"] == {"answer": 1, "o": {}, "more": 1}
    await manager.delete_step(session_id, 23)
    await manager.save_steps(session_id, {23: {"again": 1}, 22: {"again": 2}})

    summary = await manager.get_session_summary(session_id)
    assert summary["stats"]["completed_steps"] == 23
    assert [each["version"] for each in summary["steps"]] == [2, 1, 1, 2, *[1] * 17, 2, 2]
    assert [each["step_id"] for each in summary["steps"] if each["has_draft"]] == [3]
    steps = await manager.get_all_steps(session_id)
    assert (len(steps), steps.missing) == (23, [])

    answer = await manager.finalize(session_id, request=keyed("finalize"))
    again = await manager.finalize(session_id, request=keyed("finalize"))
    assert again.text == answer.text
    export = await manager.get_export(session_id)
    assert export is not None
    assert export.checksum == compute_checksum(export.value) == export["checksum"]
    assert export["steps"]["4"]["data"] == {"promoted": True}
    with pytest.raises(SessionFinalizedError):
        await manager.save_step(session_id, 1, {"a": 1})
    assert (await manager.reopen(session_id))["finalized_at"] is None
    await manager.save_step(session_id, 1, {"reopened": True})
    assert (await manager.finalize(session_id))["business_context"]["revision"] == 2

    generation = topology.place.generation
    await generation.update_session_status(session_id, "processing")
    report = ProgressEvent(session_id, "answer_generation", 40, None, "id-1")
    event, taken_before = await generation.report_progress(report)
    assert not taken_before
    assert await generation.report_progress(report) == (event, True)
    assert await generation.set_language_preference(session_id, "de") == "de"
    await topology.place.store(session_id, "t1", b"a", b"first", b"result")
    await topology.place.store(session_id, "t2", b"the ", b"result")
    assert await generation.get_result(session_id) == b"the result"
    assert (await generation.update_session_status(session_id, "complete"))["progress"] == 100
    scene = await topology.place.events.get_scene(session_id)
    assert (scene.generation.status, scene.language) == ("complete", "de")
    events, extent = await topology.place.events.list_after(session_id, BEFORE_ALL, None)
    assert [each["type"] for each in events[-6:]] == [
        *("status_changed", "progress", "language_changed"),
        *("result_stored", "result_stored", "status_changed"),
    ]
    assert str(extent.newest) == events[-1]["id"]

    prefix = topology.prefix(session_id)
    assert {key.removeprefix(prefix) for key in topology.list_keys()} == {
        *("metadata", "progress", "events", "ops", "export", "draft:3"),
        *("result", "result:t2:1", "result:t2:2"),
        *(f"step:{number}" for number in STEPS),
        f"idem:{keyed('finalize').scope}",
    }
    deadlines = topology.deadlines_ms()
    shared = {
        at
        for key, at in deadlines.items()
        if not key.startswith((f"{prefix}draft", f"{prefix}idem", "onboarding:index"))
    }
    assert len(shared) == 1
    assert {key for key in topology.immortal() if not key.startswith("onboarding:index:")} == set()
    await manager.delete_session(session_id)
    assert topology.list_keys() == set()
    with pytest.raises(SessionNotFoundError):
        await manager.save_step(session_id, 1, {"late": 1})
    assert topology.list_keys() == set()


async def test_a_session_lies_in_one_slot_where_keys_are_tagged(topology: Topology) -> None:
    session_id = await prepare(topology.manager)
    await topology.manager.finalize(session_id, request=keyed())
    keys = topology.list_keys()
    prefix = topology.prefix(session_id)
    assert all(key.startswith(prefix) for key in keys)
    if topology.tagged:
        assert len({key_slot(key.encode()) for key in keys}) == 1


async def test_a_session_that_is_handed_over(topology: Topology) -> None:
    place = topology.place
    service = TokenService(place.gateway, place.manager)
    session_id = await place.manager.create_session(workspace_id="w")
    made = await service.create_resume_token(session_id)
    _, session_token = await service.resume(made["token"])
    assert await place.tokens.is_session_token(session_id, digest_of(session_token))
    tokens = place.gateway.keys.session(session_id).tokens
    assert tokens in topology.list_keys()
    if topology.tagged:
        assert len({key_slot(key.encode()) for key in topology.list_keys()}) == 1
    deadlines = topology.deadlines_ms()
    assert len({deadlines[key] for key in topology.list_keys()}) == 1
    await service.revoke_resume_token(session_id, made["token_id"])
    assert not await place.tokens.is_session_token(session_id, digest_of(session_token))
    await place.manager.delete_session(session_id)
    assert topology.list_keys() == set()


async def test_a_session_that_begins_with_a_file(topology: Topology) -> None:
    place = topology.place
    await place.upload("s", b"up", b"load")
    opened = await place.bodies.open("s", FileKind.UPLOAD)
    assert opened is not None
    assert b"".join([part async for part in opened.content]) == b"upload"
    await place.send("s", "x", b"unfinished")
    prefix = topology.prefix("s")
    deadlines = topology.deadlines_ms()
    assert len({at for key, at in deadlines.items() if key.startswith(prefix)}) == 1
    await place.manager.delete_session("s")
    assert topology.list_keys() == set()


async def test_one_connection_hears_of_every_session(topology: Topology) -> None:
    subscription = make_subscription(topology.settings)
    heard: dict[str, list[bytes]] = {}
    try:
        for _ in range(10):
            session_id = await prepare(topology.manager)
            ear = heard.setdefault(session_id, [])
            await subscription.add(topology.gateway.keys.session(session_id).events, ear.append)
        for session_id in heard:
            await topology.manager.save_step(session_id, 5, {"a": 1})
            await topology.manager.delete_session(session_id)
        async with asyncio.timeout(5):
            while not all(ear[-1].startswith(b"deleted ") for ear in heard.values()):
                await asyncio.sleep(0.005)
        # In a Cluster, what was said before anybody listened may arrive late.
        assert {said for ear in heard.values() for said in ear[:-1]} == {b"", b"recorded"}
        assert all(b"recorded" in ear for ear in heard.values())
    finally:
        await subscription.aclose()


async def test_the_generators_share_the_finalized_sessions(topology: Topology) -> None:
    finalized = {await prepare(topology.manager, finalized=True) for _ in range(6)}
    taken: list[str] = []
    workers = {name: JobStore(topology.gateway) for name in ("w1", "w2")}
    async with asyncio.timeout(5):
        while len(taken) < len(finalized):
            for name, jobs in workers.items():
                job = await jobs.take(name, abandoned_ms=60_000, wait_ms=1)
                if job is not None:
                    assert await jobs.keep(name, job)
                    await jobs.finish(name, job)
                    taken.append(job.session_id)
    assert sorted(taken) == sorted(finalized)


async def test_tasks_and_the_lists_that_they_stand_in(topology: Topology) -> None:
    tasks = TaskService(topology.gateway, TASK_RULES)
    made = [
        await tasks.create_task("scenario_generation", f"s{n % 2}", user_id="u1", task_id=f"t{n}")
        for n in range(6)
    ]
    with pytest.raises(TaskExistsError):
        await tasks.create_session("image_analysis", short_id="s1", task_id="t1")
    await tasks.create_task("image_analysis", "s1", task_id="t6")
    everything = await tasks.list_sessions()
    assert (len(everything["sessions"]), everything["total_sessions"]) == (7, 7)
    assert (await tasks.list_sessions(user_id="u1"))["total_sessions"] == 6
    ended = await tasks.complete_task("t1")
    assert ended == await tasks.get_session("t1")
    assert {t["task_id"] for t in await tasks.get_sessions_by_short_id("s1")} == {
        *("t1", "t3", "t5", "t6")
    }
    assert await tasks.complete_task("t6") is not None
    assert await tasks.get_session("t6") is None
    assert topology.immortal() <= set(topology.gateway.keys.tasks())
    assert await tasks.release_scenarios("s1") == 3
    assert await tasks.cleanup_old_sessions() == 0
    for task_id in made:
        assert await tasks.remove_session(task_id) == (task_id in {"t0", "t2", "t4"})
    assert topology.list_keys() == set()
    assert (await tasks.list_sessions())["total_sessions"] == 0


async def test_a_user_is_erased_and_the_record_of_it_stays(topology: Topology) -> None:
    tasks = TaskService(topology.gateway, TASK_RULES)
    retention = make_retention_service(topology.gateway, tasks, topology.settings)
    trail = AuditTrail(topology.gateway)
    trail.start()
    other = await topology.manager.create_session(user_id="u2")
    for _ in range(5):
        await topology.manager.create_session(user_id="u1")
        await tasks.create_task("scenario_generation", "s1", user_id="u1")
    # On a Cluster the index follows.
    await topology.gateway.aclose()

    erased = await retention.erase_user("u1")
    trail.record("machine:ops", "erase_user", None, "done", Lane.OPERATED)
    trail.record("machine:ops", "get_session", other, "forbidden", Lane.REFUSED)
    record = (await trail.list_events())["events"]
    await trail.aclose()
    assert (erased["removed"], erased["tasks_removed"], erased["more"]) == (5, 5, False)
    assert [event["action"] for event in record] == ["erase_user", "get_session"]
    left = {key.split(":")[1].strip("{}") for key in topology.list_keys()}
    assert left == {other}


class TestCreateWithAnIdempotencyKey:
    async def test_again_is_answered_with_the_same_session(self, topology: Topology) -> None:
        first = await topology.manager.begin_session(OWNER, request=keyed())
        again = keyed()
        assert await topology.manager.begin_session(OWNER, request=again) == first
        assert again.replayed
        with pytest.raises(IdempotencyMismatchError):
            await topology.manager.begin_session(OWNER, request=keyed(body=b"another"))
        assert len([key for key in topology.list_keys() if key.endswith(":metadata")]) == 1
        assert all(key.startswith("onboarding:index:") for key in topology.immortal())

    async def test_by_20_at_once_makes_one_session(self, topology: Topology) -> None:
        async def begin() -> str | None:
            try:
                view = await topology.manager.begin_session(OWNER, request=keyed())
            except IdempotencyInProgressError:
                return None
            return view["session_id"]

        ids = set(await asyncio.gather(*(begin() for _ in range(20)))) - {None}
        assert len(ids) == 1
        assert len([key for key in topology.list_keys() if key.endswith(":metadata")]) == 1
        assert {await begin()} == ids

    async def test_leaves_nothing_when_the_session_is_deleted(self, topology: Topology) -> None:
        view = await topology.manager.begin_session(OWNER, request=keyed())
        assert f"onboarding:idem:{keyed().scope}" in topology.list_keys()
        await topology.manager.delete_session(view["session_id"])
        assert topology.list_keys() == set()

    async def test_expires_no_later_than_the_session(self, topology: Topology) -> None:
        view = await topology.manager.begin_session(OWNER, request=keyed())
        deadlines = topology.deadlines_ms()
        session_ms = deadlines[topology.prefix(view["session_id"]) + "progress"]
        assert 0 < deadlines[f"onboarding:idem:{keyed().scope}"] <= session_ms

    async def test_of_a_short_session_expires_with_it(self, topology: Topology) -> None:
        topology.gateway.lifetime_ms = 3_600_000
        view = await topology.manager.begin_session(OWNER, request=keyed())
        deadlines = topology.deadlines_ms()
        session_ms = deadlines[topology.prefix(view["session_id"]) + "progress"]
        assert 0 < deadlines[f"onboarding:idem:{keyed().scope}"] <= session_ms


async def test_limits_hold_for_callers_whose_buckets_lie_anywhere(
    monkeypatch: pytest.MonkeyPatch, topology: Topology
) -> None:
    # The first ones look for the master and open a connection each, all at once.
    monkeypatch.setattr("app.store.limits.TAKE_S", 5.0)
    store, limit = LimitStore(topology.gateway), Limit(5, 3600)
    callers = [f"user:{number}" for number in range(12)]
    taken = await asyncio.gather(
        *(store.take(Policy.REQUESTS, caller, limit, 2) for caller in callers * 4)
    )
    assert sum(each.granted for each in taken) == 5 * len(callers)
    assert len(topology.list_keys()) == len(callers)
    assert topology.immortal() == set()


async def test_many_sessions_at_once_stay_apart(topology: Topology) -> None:
    manager: Manager = topology.manager

    async def work(number: int) -> str:
        session_id = await manager.create_session(workspace_id=f"w{number}")
        for step in range(1, 6):
            await manager.save_step(session_id, step, {"session": number, "step": step})
        steps = await manager.get_all_steps(session_id)
        assert {n: step["data"] for n, step in steps.items()} == {
            n: {"session": number, "step": n} for n in range(1, 6)
        }
        return session_id

    for session_id in await asyncio.gather(*(work(number) for number in range(20))):
        await manager.delete_session(session_id)
    assert topology.list_keys() == set()


async def test_a_failover_is_ridden_out_and_loses_nothing_that_was_replicated(
    sentinels: SentinelSet,
) -> None:
    heard: list[bytes] = []
    subscription = make_subscription(known_settings(redis_url=sentinels.url))
    async with (
        working_at(sentinels.url, retry_base_s=0.5, retry_attempts=5) as place,
        aclosing(subscription),
    ):
        session_id = await prepare(place.manager)
        await subscription.add(place.gateway.keys.session(session_id).events, heard.append)
        before = sentinels.acting_master()
        before.command("WAIT", 1, 2000)
        sentinels.sentinels[0].command("SENTINEL", "FAILOVER", sentinels.service)
        async with asyncio.timeout(15):
            round_ = 0
            while sentinels.acting_master() is before:
                round_ += 1
                await place.manager.save_step(session_id, 5, {"round": round_})
        await place.manager.save_step(session_id, 6, {"after": True})
        heard.clear()
        async with asyncio.timeout(10):
            while b"recorded" not in heard:
                await place.manager.save_step(session_id, 6, {"after": True})
                await asyncio.sleep(0.01)
        steps = await place.manager.get_all_steps(session_id)
        assert {1, 2, 6} <= set(steps)
        await place.manager.delete_session(session_id)
