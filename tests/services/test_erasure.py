"""The end of a user: every session and task goes, nobody else's, and nothing names them after."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from fakeredis import FakeServer
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.clock import monotonic_s
from app.context import RequestContext, reset_context, set_context
from app.errors import InvalidRequestError, SessionNotFoundError
from app.onboarding.generation import ProgressEvent
from app.onboarding.retention import MAX_AT_ONCE
from app.onboarding.sessions import Owner
from app.onboarding.tasks import TASK_RULES
from app.services.manager import make_manager
from app.services.retention import RetentionService, make_retention_service
from app.services.tasks import TaskService
from app.settings import Settings
from app.store.connect import connect
from tests.api.helpers import ask
from tests.conftest import fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.store.sessions import Place, keyed, working_at
from tests.store.test_stats import load_sessions

NEEDLE = "find-me:7f3a/é {x}|1"
"""A user whose id is easy to find, and hard to keep apart from the rest of a key."""


class House:
    """The services over one store, and a look at everything in it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.manager = place.manager
        self.gateway = place.gateway
        self.tasks = TaskService(place.gateway, TASK_RULES)
        self.retention: RetentionService = make_retention_service(
            place.gateway, self.tasks, known_settings()
        )

    async def settle(self) -> None:
        """Have the index follow, where it does not lie beside the sessions."""
        await self.gateway.aclose()

    async def begin(self, user_id: str | None, **more: Any) -> str:
        return await self.manager.create_session(workspace_id="w1", user_id=user_id, **more)

    async def begin_task(self, user_id: str | None, **more: Any) -> str:
        return await self.tasks.create_task(
            "scenario_generation", more.pop("short_id", "s1"), user_id=user_id, **more
        )

    async def is_there(self, session_id: str) -> bool:
        try:
            await self.manager.get_session(session_id)
        except SessionNotFoundError:
            return False
        return True

    async def find(self, needle: str) -> list[str]:
        """Name every key that has a text in its name or in what it holds."""
        found = []
        for key in await self.gateway.command("KEYS", "*"):
            kind = (await self.gateway.command("TYPE", key)).decode()
            read: tuple[Any, ...] = {
                "string": ("GET", key),
                "hash": ("HGETALL", key),
                "stream": ("XRANGE", key, "-", "+"),
                "set": ("SMEMBERS", key),
                "zset": ("ZRANGE", key, 0, -1),
                "list": ("LRANGE", key, 0, -1),
            }[kind]
            held = texts_in([key, await self.gateway.command(*read)])
            if any(needle.encode() in text for text in held):
                found.append(key.decode())
        return found


def texts_in(reply: Any) -> list[bytes]:
    match reply:
        case bytes():
            return [reply]
        case dict():
            return texts_in([*reply.keys(), *reply.values()])
        case list() | tuple() | set():
            return [text for each in reply for text in texts_in(each)]
        case _:
            return []


@pytest.fixture(autouse=True)
def logs_that_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget loggers that a service of another test has bound to its own configuration."""
    for name in ("app.services.retention", "app.services.tasks", "app.store.faults"):
        monkeypatch.setattr(f"{name}.log", structlog.get_logger())


@pytest.fixture(params=["fakeredis", "fakeredis tagged", "valkey", "valkey tagged"])
async def house(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[House]:
    """Give the services on the fake store and on the real one, with and without hash tags."""
    kind, _, tagged = request.param.partition(" ")
    tag = "on" if tagged else "off"
    chosen = known_settings(**{**settings.model_dump(exclude_unset=True), "key_hash_tag": tag})
    server = FakeServer()
    gateway = fake_gateway(server, key_hash_tag=tag) if kind == "fakeredis" else connect(chosen)
    yield House(Place(make_manager(gateway, chosen), gateway))
    await gateway.aclose()


async def use_everything(house: House, user_id: str) -> list[str]:
    """Let a user have sessions in every state, with everything that one may hold."""
    manager, place = house.manager, house.place
    owner = Owner("w1", user_id, "en")
    first = (await manager.begin_session(owner, request=keyed("k1")))["session_id"]
    await manager.save_steps(first, {1: {"a": 1}, 2: {"a": user_id}}, request=keyed("k2"))
    await manager.save_draft(first, 3, {"a": user_id})
    await place.add_answer(first, f"who is {user_id}?")
    finalized = await house.begin(user_id, metadata={"mail": user_id})
    await manager.save_step(finalized, 1, {"a": 1})
    await manager.finalize(finalized)
    await place.generation.update_session_status(finalized, "processing")
    await place.generation.add_progress_event(ProgressEvent(finalized, "a", 1, user_id))
    await place.generation.store_result(finalized, {"made for": user_id})
    adopted = await house.begin("somebody")
    await manager.set_metadata(adopted, user_id, "w2")
    sessions = [first, finalized, adopted]
    for session_id in (None, first):
        await house.begin_task(user_id, session_id=session_id)
    ended = await house.begin_task(user_id, short_id="s2")
    await house.tasks.complete_task(ended)
    await house.settle()
    return sessions


async def test_nothing_names_an_erased_user_any_more(house: House) -> None:
    sessions = await use_everything(house, NEEDLE)
    assert len(await house.find(NEEDLE)) > 10

    erased = await house.retention.erase_user(NEEDLE)
    assert erased == {"user_id": NEEDLE, "removed": 3, "tasks_removed": 3, "more": False}
    await house.settle()
    assert await house.find(NEEDLE) == []
    for session_id in sessions:
        assert not await house.is_there(session_id)
        assert set(await house.find(session_id)) <= {
            house.gateway.keys.index("feed"),
            house.gateway.keys.jobs,
        }


async def test_nobody_else_loses_anything(house: House) -> None:
    others = [None, "somebody", NEEDLE + "1", NEEDLE[:-1], NEEDLE.upper()]
    kept = [await house.begin(user_id) for user_id in others]
    tasks = [await house.begin_task(user_id) for user_id in others]
    mine = await house.begin(NEEDLE)
    await house.begin_task(NEEDLE)
    await house.settle()

    erased = await house.retention.erase_user(NEEDLE)
    assert (erased["removed"], erased["tasks_removed"]) == (1, 1)
    assert not await house.is_there(mine)
    assert [await house.is_there(session_id) for session_id in kept] == [True] * len(others)
    assert None not in [await house.tasks.get_session(task_id) for task_id in tasks]
    assert (await house.tasks.list_sessions())["total_sessions"] == len(others)


async def test_an_unknown_user_has_nothing_to_lose(house: House) -> None:
    nothing = {"user_id": NEEDLE, "removed": 0, "tasks_removed": 0, "more": False}
    assert await house.retention.erase_user(NEEDLE) == nothing
    await house.begin(NEEDLE)
    await house.settle()
    assert (await house.retention.erase_user(NEEDLE))["removed"] == 1
    assert await house.retention.erase_user(NEEDLE) == nothing


async def test_a_session_that_has_become_somebody_elses_stays(house: House) -> None:
    given, mine = [await house.begin(NEEDLE) for _ in range(2)]
    freed = await house.begin(NEEDLE)
    await house.settle()
    # The index has not heard of it yet: they are looked at, and found to be another's.
    keys, command = house.gateway.keys, house.gateway.command
    await command("HSET", keys.session(given).metadata, "user_id", "somebody")
    await command("HDEL", keys.session(freed).metadata, "user_id")
    assert (await house.retention.erase_user(NEEDLE))["removed"] == 1
    await house.settle()
    stays = [await house.is_there(session_id) for session_id in (given, freed, mine)]
    assert stays == [True, True, False]
    assert await house.find(NEEDLE) == []
    somebody = await command("ZRANGE", keys.index("user:somebody"), 0, -1)
    assert [place.decode().partition(":")[2] for place in somebody] == [given]


@pytest.mark.parametrize("user_id", ["", "a\nb", "x" * 129, "\ud800"])
async def test_what_can_be_no_user_is_refused(house: House, user_id: str) -> None:
    with pytest.raises(InvalidRequestError):
        await house.retention.erase_user(user_id)


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["progress", "no progress", "metadata", "no metadata", "entry"])
async def test_a_damaged_session_of_the_user_goes_too(house: House, damage: str) -> None:
    session_id = await house.begin(NEEDLE)
    await house.manager.save_step(session_id, 1, {"a": NEEDLE})
    await house.settle()
    keys, command = house.gateway.keys.session(session_id), house.gateway.command
    match damage.split():
        case ["no", part]:
            await command("DEL", getattr(keys, part))
        case ["entry"]:
            await command("HDEL", house.gateway.keys.index("entries"), session_id)
        case [part]:
            await command("DEL", getattr(keys, part))
            await command("SET", getattr(keys, part), "x", "PX", 60_000)

    with capture_logs():
        assert (await house.retention.erase_user(NEEDLE))["removed"] == 1
    await house.settle()
    assert await house.find(NEEDLE) == []
    assert await command("KEYS", f"{keys.prefix}*") == []


async def test_what_has_ended_by_itself_is_cleared_away_and_not_counted(house: House) -> None:
    session_id, task_id = await house.begin(NEEDLE), await house.begin_task(NEEDLE)
    await house.settle()
    command, keys = house.gateway.command, house.gateway.keys
    await command("DEL", *await command("KEYS", f"{keys.session(session_id).prefix}*"))
    await command("DEL", keys.task(task_id))
    erased = await house.retention.erase_user(NEEDLE)
    assert (erased["removed"], erased["tasks_removed"], erased["more"]) == (0, 0, False)
    assert await house.find(NEEDLE) == []


async def test_a_damaged_task_goes_and_another_ones_of_its_name_stays(house: House) -> None:
    damaged = await house.begin_task(NEEDLE)
    taken = await house.begin_task(NEEDLE)
    keys, command = house.gateway.keys, house.gateway.command
    await command("HDEL", keys.task(damaged), "status")
    await command("DEL", keys.task(taken))
    await house.begin_task("somebody", task_id=taken)

    with capture_logs():
        assert (await house.retention.erase_user(NEEDLE))["tasks_removed"] == 1
    assert await house.find(NEEDLE) == []
    kept = await house.tasks.get_session(taken)
    assert kept is not None
    assert kept["user_id"] == "somebody"
    assert await command("EXISTS", keys.task(damaged)) == 0


# --- Many -----------------------------------------------------------------------------------------


@pytest.fixture
async def real_house(settings: Settings) -> AsyncIterator[House]:
    """Give the services on the real store."""
    gateway = connect(settings)
    yield House(Place(make_manager(gateway, settings), gateway))
    await gateway.aclose()


async def own_all(raw: Redis, session_ids: list[str]) -> None:
    """Give sessions of the loader to the user, in the index too."""
    index = "onboarding:index:sessions:"
    places = await ask(raw, "ZRANGE", f"{index}created:pending:free", 0, -1)
    entries = await ask(raw, "HMGET", f"{index}entries", *session_ids)
    pipe = raw.pipeline(transaction=False)
    for session_id, entry in zip(session_ids, entries, strict=True):
        pipe.hset(f"onboarding:{session_id}:metadata", "user_id", NEEDLE)
        pipe.hset(f"{index}entries", session_id, entry + NEEDLE.encode())
    pipe.zadd(f"{index}user:{NEEDLE}", dict.fromkeys(places, 0))
    await pipe.execute()


async def test_a_call_takes_a_thousand_and_says_that_there_are_more(
    raw: Redis, real_house: House, settings: Settings
) -> None:
    await own_all(raw, await load_sessions(raw, settings, MAX_AT_ONCE + 5))
    with capture_logs() as logs:
        first = await real_house.retention.erase_user(NEEDLE)
        second = await real_house.retention.erase_user(NEEDLE)
    assert (first["removed"], first["more"]) == (MAX_AT_ONCE, True)
    assert (second["removed"], second["more"]) == (5, False)
    assert await real_house.find(NEEDLE) == []
    assert [line for line in logs if line["event"] == "user_erased"] == [
        {
            "event": "user_erased",
            "log_level": "info",
            "removed": each["removed"],
            "tasks_removed": 0,
            "more": each["more"],
        }
        for each in (first, second)
    ]


async def test_a_call_takes_a_thousand_tasks(
    real_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.retention.MAX_AT_ONCE", 40)
    await asyncio.gather(*(real_house.begin_task(NEEDLE) for _ in range(50)))
    first = await real_house.retention.erase_user(NEEDLE)
    second = await real_house.retention.erase_user(NEEDLE)
    assert (first["tasks_removed"], first["more"]) == (40, True)
    assert (second["tasks_removed"], second["more"]) == (10, False)


async def test_a_request_ends_in_time_and_says_that_there_is_more(house: House) -> None:
    await house.begin(NEEDLE)
    await house.begin_task(NEEDLE)
    await house.settle()
    token = set_context(RequestContext("r1", monotonic_s() + 1))
    try:
        erased = await house.retention.erase_user(NEEDLE)
    finally:
        reset_context(token)
    assert (erased["removed"], erased["tasks_removed"], erased["more"]) == (0, 0, True)
    erased = await house.retention.erase_user(NEEDLE)
    assert (erased["removed"], erased["tasks_removed"], erased["more"]) == (1, 1, False)


async def test_the_feed_says_that_a_session_was_erased_and_nothing_else_of_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.feed.LOOKED_AT_ONCE", 3)
    mine, other = await house.begin(NEEDLE), await house.begin("somebody")
    for number in range(5):
        for session_id in (mine, other):
            await house.place.generation.add_progress_event(
                ProgressEvent(session_id, "a", number, NEEDLE if session_id == mine else "else")
            )
    await house.settle()
    await house.retention.erase_user(NEEDLE)
    # One of the same name that begins later has nothing to do with it.
    await house.manager.set_metadata(mine, "somebody", "w1")
    await house.settle()
    await house.retention.erase_user("nobody")

    entries = await house.gateway.command("XRANGE", house.gateway.keys.index("feed"), "-", "+")
    told = [{text.decode() for text in texts_in(entry[1])} for entry in entries]
    end, beginning = [entry for entry in told if mine in entry]
    assert {"deleted", "erasure"} < end
    assert "session_created" in beginning
    assert sum(other in entry for entry in told) == 6
    assert not any(NEEDLE in entry for entry in told)


@pytest.mark.parametrize("tag", ["off", "on"])
async def test_a_removal_whose_reply_was_lost_is_counted_once(
    raw: Redis, valkey: Valkey, tag: str
) -> None:
    async with (
        Proxy(valkey.port) as proxy,
        working_at(
            f"redis://{proxy.host}:{proxy.port}/0", redis_timeout_s=0.2, key_hash_tag=tag
        ) as place,
    ):
        house = House(place)
        for _ in range(3):
            await house.begin(NEEDLE)
        await house.begin_task(NEEDLE)
        await house.settle()
        await house.retention.erase_user("somebody")
        proxy.drop_replies(2, to="EVALSHA")
        erased = await house.retention.erase_user(NEEDLE)
        assert (erased["removed"], erased["tasks_removed"]) == (3, 1)
        assert await house.find(NEEDLE) == []
