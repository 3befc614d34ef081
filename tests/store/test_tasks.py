"""Tasks and the lists that they stand in: made once, ended once, never in one and not the other."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import time_machine
from structlog.testing import capture_logs

from app.clock import now_ms
from app.errors import (
    CorruptRecordError,
    InvalidTransitionError,
    StoreUnavailableError,
    TaskExistsError,
    TaskNotFoundError,
)
from app.onboarding.tasks import MAY_FOLLOW, TASK_LIFE_MS, Task, TaskStatus
from app.store.gateway import Argument, Gateway
from app.store.keys import Keys
from app.store.tasks import READS_AT_ONCE, Scope, TaskPage, TaskStore, new_operation
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import working_at

ACTIVE, COMPLETED = TaskStatus.ACTIVE, TaskStatus.COMPLETED

DAY_MS = 86_400_000
LIFE_S = TASK_LIFE_MS / 1000

ALL = Scope()
OF_SHORT = Scope(short_id="s1")
OF_USER = Scope(user_id="u1")
SCOPES = [OF_SHORT, OF_USER, ALL]


def make(task_id: str = "t1", *, at_ms: int | None = None, **fields: object) -> Task:
    at_ms = now_ms() if at_ms is None else at_ms
    task = Task(
        task_id=task_id,
        short_id="s1",
        task_type="scenario_generation",
        user_id="u1",
        session_id="of-python",
        status=ACTIVE,
        created_ms=at_ms,
        updated_ms=at_ms,
        operation=new_operation(),
    )
    return replace(task, **fields)  # type: ignore[arg-type]


async def read(store: TaskStore, scope: Scope, limit: int = 1000) -> TaskPage:
    return await store.list_newest(scope, after=None, limit=limit)


async def listed(store: TaskStore, scope: Scope) -> list[str]:
    """Give the ids of a list, whose count must be right."""
    page = await read(store, scope)
    assert page.total == len(page.tasks)
    return [task.task_id for task in page.tasks]


async def names(gateway: Gateway) -> set[str]:
    return {key.decode() for key in await gateway.command("KEYS", "*")}


def lists_of(gateway: Gateway, task: Task) -> list[str]:
    keys = gateway.keys
    return [*keys.short(task.short_id), *keys.tasks(task.user_id), *keys.tasks()]


@pytest.fixture(params=["untagged", "tagged"])
def store(request: pytest.FixtureRequest, gateway: Gateway) -> TaskStore:
    """Give a store on the fake and on the real one, without hash tags and with them."""
    gateway.keys = Keys(hash_tag=request.param == "tagged")
    return TaskStore(gateway)


@pytest.fixture(params=["off", "on"])
async def cut_off(request: pytest.FixtureRequest, proxy: Proxy) -> AsyncIterator[TaskStore]:
    """Give a store behind the proxy, without hash tags and with them."""
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with working_at(url, redis_timeout_s=0.2, key_hash_tag=request.param) as place:
        yield TaskStore(place.gateway)


class TestATask:
    async def test_comes_back_as_it_was_made(self, store: TaskStore) -> None:
        whole = make("t1")
        bare = make("t2", user_id=None, session_id=None)
        for task in (whole, bare):
            await store.create(task)
            assert await store.get(task.task_id) == task
        assert await store.get("t3") is None

    async def test_stands_in_the_lists_of_its_short_its_user_and_all(
        self, store: TaskStore
    ) -> None:
        await store.create(make("t1"))
        await store.create(make("t2", short_id="s2", at_ms=now_ms() + 1))
        await store.create(make("t3", user_id="u2", at_ms=now_ms() + 2))
        await store.create(make("t4", user_id=None, at_ms=now_ms() + 3))
        assert await listed(store, OF_SHORT) == ["t4", "t3", "t1"]
        assert await listed(store, OF_USER) == ["t2", "t1"]
        assert await listed(store, ALL) == ["t4", "t3", "t2", "t1"]
        assert await listed(store, Scope(user_id="u3")) == []
        assert await listed(store, Scope(short_id="s3")) == []

    async def test_that_is_removed_leaves_nothing(self, store: TaskStore, gateway: Gateway) -> None:
        task = make()
        await store.create(task)
        await store.remove(task)
        assert await names(gateway) == set()
        with pytest.raises(TaskNotFoundError):
            await store.remove(task)
        with pytest.raises(TaskNotFoundError):
            await store.change(task, ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
        for scope in SCOPES:
            assert await listed(store, scope) == []

    async def test_has_a_user_by_any_name(self, store: TaskStore) -> None:
        users = ["u", "ends:u", "of:u", "{u}", "ä {x} : /", "*"]
        for number, user_id in enumerate(users):
            await store.create(make(f"t{number}", user_id=user_id))
        for number, user_id in enumerate(users):
            assert await listed(store, Scope(user_id=user_id)) == [f"t{number}"]

    async def test_changes_its_status_and_nothing_else(self, store: TaskStore) -> None:
        task = make(at_ms=now_ms() - 10)
        await store.create(task)
        at_ms = now_ms()
        await store.change(task, COMPLETED, MAY_FOLLOW[COMPLETED], at_ms=at_ms)
        assert await store.get("t1") == replace(task, status=COMPLETED, updated_ms=at_ms)
        for scope in SCOPES:
            assert await listed(store, scope) == ["t1"]

    async def test_whose_status_another_has_changed_meanwhile_is_not_changed(
        self, store: TaskStore
    ) -> None:
        task, failed = make(), TaskStatus.FAILED
        await store.create(task)
        await store.change(task, COMPLETED, MAY_FOLLOW[COMPLETED], at_ms=now_ms())
        with pytest.raises(InvalidTransitionError, match="A task that is completed"):
            await store.change(task, failed, MAY_FOLLOW[failed], at_ms=now_ms())
        with pytest.raises(InvalidTransitionError) as refused:
            await store.remove(task, to=failed, may_follow=MAY_FOLLOW[failed])
        assert refused.value.current == "completed"
        assert await listed(store, ALL) == ["t1"]
        await store.remove(task)

    async def test_is_not_confused_with_another_that_has_its_id_now(self, store: TaskStore) -> None:
        first, second = make(), make(short_id="s2", at_ms=now_ms() + 5)
        await store.create(first)
        await store.remove(first)
        await store.create(second)
        with pytest.raises(TaskNotFoundError):
            await store.remove(first)
        with pytest.raises(TaskNotFoundError):
            await store.change(first, COMPLETED, MAY_FOLLOW[COMPLETED], at_ms=now_ms())
        assert await store.get("t1") == second
        assert await listed(store, OF_SHORT) == []
        assert await listed(store, ALL) == ["t1"]


class TestAnIdThatIsTaken:
    async def test_is_refused_and_changes_nothing(self, store: TaskStore) -> None:
        task = make()
        await store.create(task)
        with pytest.raises(TaskExistsError):
            await store.create(make(short_id="s2", at_ms=now_ms() + 5))
        assert await store.get("t1") == task
        assert await listed(store, OF_SHORT) == ["t1"]
        assert await listed(store, Scope(short_id="s2")) == []

    async def test_by_20_at_once_is_given_to_one(self, store: TaskStore) -> None:
        async def create(number: int) -> bool:
            try:
                await store.create(make(short_id=f"s{number}", at_ms=now_ms() + number))
            except TaskExistsError:
                return False
            return True

        made = await asyncio.gather(*map(create, range(20)))
        assert sum(made) == 1
        # What the others had announced goes when somebody looks.
        assert len((await read(store, ALL)).tasks) == 1
        for number in range(20):
            expected = ["t1"] if made[number] else []
            await read(store, Scope(short_id=f"s{number}"))
            assert await listed(store, Scope(short_id=f"s{number}")) == expected
        assert await listed(store, ALL) == ["t1"]


class TestWhoseReplyIsLost:
    """Each is sent again, and done once."""

    @pytest.fixture(autouse=True)
    async def warm(self, cut_off: TaskStore) -> None:
        """Let the store learn the scripts, so that each call is one EVALSHA."""
        task = make("warm")
        await cut_off.create(task)
        await cut_off.change(task, ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
        await cut_off.remove(task)

    @pytest.fixture
    def lose(
        self, cut_off: TaskStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[], None]:
        """Give a function that loses the reply to the next script that touches the task itself."""
        enlist = cut_off._enlist
        is_armed = False

        async def enlist_and_lose(task: Task) -> None:
            nonlocal is_armed
            await enlist(task)
            if is_armed:
                proxy.drop_replies(1, to="EVALSHA")
            is_armed = False

        def arm() -> None:
            nonlocal is_armed
            is_armed = cut_off._keys.hash_tag
            if not is_armed:
                proxy.drop_replies(1, to="EVALSHA")

        monkeypatch.setattr(cut_off, "_enlist", enlist_and_lose)
        return arm

    async def test_a_creation_makes_one_task(
        self, cut_off: TaskStore, proxy: Proxy, lose: Callable[[], None]
    ) -> None:
        sent_before = proxy.commands["EVALSHA"]
        lose()
        await cut_off.create(make())
        assert proxy.commands["EVALSHA"] - sent_before == (4 if cut_off._keys.hash_tag else 2)
        assert await listed(cut_off, ALL) == ["t1"]
        with pytest.raises(TaskExistsError):
            await cut_off.create(make())

    async def test_a_change_is_made(
        self, cut_off: TaskStore, proxy: Proxy, lose: Callable[[], None]
    ) -> None:
        task, at_ms = make(), now_ms() + 5
        await cut_off.create(task)
        sent_before = proxy.commands["EVALSHA"]
        lose()
        await cut_off.change(task, COMPLETED, MAY_FOLLOW[COMPLETED], at_ms=at_ms)
        assert proxy.commands["EVALSHA"] - sent_before == (4 if cut_off._keys.hash_tag else 2)
        assert await cut_off.get("t1") == replace(task, status=COMPLETED, updated_ms=at_ms)

    async def test_a_removal_is_one(self, cut_off: TaskStore, proxy: Proxy) -> None:
        task = make()
        await cut_off.create(task)
        sent_before = proxy.commands["EVALSHA"]
        proxy.drop_replies(1, to="EVALSHA")
        await cut_off.remove(task, to=COMPLETED, may_follow=MAY_FOLLOW[COMPLETED])
        assert proxy.commands["EVALSHA"] - sent_before == (4 if cut_off._keys.hash_tag else 2)
        assert await cut_off.get("t1") is None
        with pytest.raises(TaskNotFoundError):
            await cut_off.remove(task)


class TestALifetime:
    async def test_of_seven_days_is_shared_by_a_task_and_the_lists_that_end_with_it(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        task = make()
        await store.create(task)
        first, last, *_ = lists_of(gateway, task)
        for key in (gateway.keys.task("t1"), first, last, *gateway.keys.tasks("u1")):
            assert TASK_LIFE_MS - 5_000 < await gateway.command("PTTL", key) <= TASK_LIFE_MS
        for key in gateway.keys.tasks():
            assert await gateway.command("PTTL", key) == -1

    @pytest.mark.parametrize("tagged", ["off", "on"])
    async def test_begins_anew_with_every_change(
        self, fake: MakePlace, clock: time_machine.Traveller, tagged: str
    ) -> None:
        place = fake(key_hash_tag=tagged)
        store, task, other = TaskStore(place.gateway), make("t1"), make("t2")
        await store.create(task)
        await store.create(other)
        for _ in range(3):
            clock.shift(LIFE_S - 1)
            await store.change(task, ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
        for scope in SCOPES:
            assert await listed(store, scope) == ["t1"]
        clock.shift(LIFE_S + 1)
        assert await store.get("t1") is None
        for scope in SCOPES:
            assert await listed(store, scope) == []
        assert await names(place.gateway) == set()

    @pytest.mark.parametrize("tagged", ["off", "on"])
    async def test_that_is_over_is_not_counted_and_those_that_look_after_themselves_forget_it(
        self, fake: MakePlace, clock: time_machine.Traveller, tagged: str
    ) -> None:
        place = fake(key_hash_tag=tagged)
        store = TaskStore(place.gateway)
        for number in range(5):
            await store.create(make(f"old{number}"))
        clock.shift(LIFE_S + 1)
        await store.create(make("new"))
        keys = place.gateway.keys
        for key in (*keys.short("s1"), *keys.tasks("u1")):
            assert await place.gateway.command("ZCARD", key) == 1
        assert await place.gateway.command("ZCARD", keys.tasks().entries) == 6
        page = await read(store, ALL)
        assert ([task.task_id for task in page.tasks], page.total) == (["new"], 1)

    async def test_is_that_of_the_store_and_not_of_the_host(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        await store.create(make(at_ms=now_ms() - 30 * DAY_MS))
        assert await gateway.command("PTTL", gateway.keys.task("t1")) > TASK_LIFE_MS - 5_000
        assert await listed(store, ALL) == ["t1"]


class TestAListThatNamesATask:
    """Lists are hints where keys have hash tags; what they say is held against the task."""

    async def test_that_is_not_there_skips_and_forgets_it(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        await store.create(make("t1"))
        await store.create(make("t2", at_ms=now_ms() + 5))
        await gateway.command("DEL", gateway.keys.task("t1"))
        for scope in SCOPES:
            assert await listed(store, scope) == ["t2"]
        for key in lists_of(gateway, make("t2")):
            assert await gateway.command("ZCARD", key) == 1

    @pytest.mark.parametrize(
        ("field", "value", "wrong"),
        [
            ("short_id", "s2", OF_SHORT),
            ("user_id", "u2", OF_USER),
            ("created_at", 1, ALL),
        ],
    )
    async def test_that_belongs_elsewhere_skips_and_forgets_it(
        self, store: TaskStore, gateway: Gateway, field: str, value: str, wrong: Scope
    ) -> None:
        await store.create(make())
        await gateway.command("HSET", gateway.keys.task("t1"), field, value)
        assert await listed(store, wrong) == []
        assert (await read(store, wrong)).total == 0

    async def test_which_was_only_announced_skips_and_forgets_it(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        task = make()
        await store._enlist(task)
        for scope in SCOPES:
            assert await listed(store, scope) == []
        assert await names(gateway) == set()

    async def test_that_cannot_be_read_leaves_it_out_and_says_so(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        for number in range(4):
            await store.create(make(f"t{number}", at_ms=now_ms() + number))
        await gateway.command("HDEL", gateway.keys.task("t0"), "status")
        await gateway.command("HSET", gateway.keys.task("t1"), "created_at", "yesterday")
        await gateway.command("DEL", gateway.keys.task("t2"))
        await gateway.command("SET", gateway.keys.task("t2"), "x", "PX", 60_000)
        for scope in SCOPES:
            with capture_logs() as logs:
                page = await read(store, scope)
            assert [task.task_id for task in page.tasks] == ["t3"]
            told = {each["key"] for each in logs if each["event"] == "corrupt_record_found"}
            assert told == {gateway.keys.task(f"t{number}") for number in range(3)}


class TestDamage:
    async def test_is_not_absence(self, store: TaskStore, gateway: Gateway) -> None:
        task = make()
        await store.create(task)
        key = gateway.keys.task("t1")
        await gateway.command("HDEL", key, "operation")
        with pytest.raises(CorruptRecordError) as damaged:
            await store.get("t1")
        assert damaged.value.key == key
        await gateway.command("DEL", key)
        await gateway.command("HSET", key, "something", "else")
        with pytest.raises(CorruptRecordError):
            await store.get("t1")
        await gateway.command("DEL", key)
        await gateway.command("SET", key, "x")
        for call in (store.get("t1"), store.create(make())):
            with pytest.raises(CorruptRecordError):
                await call
        await store.drop("t1")
        assert await store.get("t1") is None

    async def test_of_a_list_is_found_before_anything_is_written(
        self, store: TaskStore, gateway: Gateway
    ) -> None:
        kept = make("kept")
        await store.create(kept)
        for key in lists_of(gateway, kept):
            await gateway.command("RENAME", key, "away")
            await gateway.command("SET", key, "x")
            with pytest.raises(CorruptRecordError):
                await store.create(make("t1"))
            assert await store.get("t1") is None
            with pytest.raises(CorruptRecordError):
                await store.change(kept, COMPLETED, MAY_FOLLOW[COMPLETED], at_ms=now_ms())
            assert await store.get("kept") == kept
            await gateway.command("RENAME", "away", key)

    async def test_of_a_list_keeps_no_task_alive(self, store: TaskStore, gateway: Gateway) -> None:
        task = make()
        await store.create(task)
        await gateway.command("SET", gateway.keys.short("s1").entries, "x", "PX", 60_000)
        await store.remove(task)
        assert await store.get("t1") is None
        assert await listed(store, ALL) == []


class TestAPage:
    async def test_goes_on_where_the_last_one_ended_whatever_comes_and_goes(
        self, store: TaskStore
    ) -> None:
        # Three at each of four times, so that a page ends between tasks of the same time.
        tasks = [make(f"t{n:02}", at_ms=1_767_268_800_000 + n // 3) for n in range(12)]
        for task in tasks:
            await store.create(task)
        for scope in SCOPES:
            seen: list[str] = []
            after = None
            while True:
                page = await store.list_newest(scope, after=after, limit=5)
                assert page.total == 12
                seen += [task.task_id for task in page.tasks]
                after = page.next
                if after is None:
                    break
            assert seen == [f"t{n:02}" for n in reversed(range(12))]

        first = await store.list_newest(ALL, after=None, limit=5)
        assert first.next is not None
        await store.remove(first.tasks[-1])
        await store.change(tasks[0], ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
        await store.create(make("newer"))
        second = await store.list_newest(ALL, after=first.next, limit=50)
        assert [task.task_id for task in second.tasks] == [f"t{n:02}" for n in reversed(range(7))]
        assert second.next is None

    async def test_that_is_just_full_is_the_last(self, store: TaskStore) -> None:
        for number in range(3):
            await store.create(make(f"t{number}", at_ms=now_ms() + number))
        assert (await read(store, ALL, limit=3)).next is None
        assert (await read(store, ALL, limit=2)).next is not None

    async def test_holds_more_tasks_than_are_read_at_once(self, store: TaskStore) -> None:
        count = READS_AT_ONCE + 3
        for number in range(count):
            await store.create(make(f"t{number:03}", at_ms=1_767_268_800_000 + number))
        assert await listed(store, ALL) == [f"t{n:03}" for n in reversed(range(count))]


class TestOldTasks:
    @pytest.mark.parametrize("tagged", ["off", "on"])
    async def test_are_those_that_were_not_changed_for_so_long(
        self, fake: MakePlace, clock: time_machine.Traveller, tagged: str
    ) -> None:
        store = TaskStore(fake(key_hash_tag=tagged).gateway)
        tasks = []
        for number in range(4):
            clock.shift(DAY_MS / 1000)
            tasks.append(make(f"t{number}"))
            await store.create(tasks[-1])
        # The oldest was made three days ago, the newest just now.
        for days, expected in ((3, ["t0"]), (2, ["t0", "t1"]), (0, ["t0", "t1", "t2", "t3"])):
            old = await store.list_old(days * DAY_MS, skip=0, limit=10)
            assert ([t.task_id for t in old.tasks], old.gone) == (expected, [])
            assert old.looked_at == len(expected)
        await store.change(tasks[0], ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
        part = await store.list_old(2 * DAY_MS, skip=0, limit=10)
        assert [t.task_id for t in part.tasks] == ["t1"]
        clock.shift(LIFE_S - DAY_MS / 1000 + 1)
        part = await store.list_old(TASK_LIFE_MS, skip=0, limit=10)
        assert (part.tasks, part.looked_at) == ([], 2)
        assert part.gone == [tasks[1].place, tasks[2].place]
        assert (await store.list_old(TASK_LIFE_MS, skip=1, limit=1)).gone == part.gone[1:]
        await store.delist(part.gone)
        assert (await store.list_old(TASK_LIFE_MS, skip=0, limit=10)).looked_at == 0


# --- With hash tags -------------------------------------------------------------------------------


async def test_a_tagged_task_that_is_away_is_announced_first_and_removed_first(
    real: MakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = real(key_hash_tag="on").gateway
    store, sent = TaskStore(gateway), []
    execute = gateway._execute

    async def note(command: tuple[Argument, ...], *rest: Any) -> object:
        sent.append(command)
        return await execute(command, *rest)

    monkeypatch.setattr(gateway, "_execute", note)
    task = make()
    await store.create(task)
    await store.change(task, ACTIVE, MAY_FOLLOW[ACTIVE], at_ms=now_ms())
    await store.remove(task)
    keys = [parts[3] for parts in sent if parts[0] == "EVALSHA"]
    short, index = gateway.keys.short("s1").entries, gateway.keys.tasks("u1").entries
    itself = gateway.keys.task("t1")
    assert keys == [short, index, itself] * 2 + [itself, short, index]
    slots = [{part for part in parts[3:] if str(part).startswith("onboarding:")} for parts in sent]
    for names_of_one_call in slots:
        tags = {str(n).partition("{")[2].partition("}")[0] for n in names_of_one_call}
        assert len(tags) <= 1


# --- A store that is away -------------------------------------------------------------------------


async def test_a_store_that_is_away_is_told_apart_from_a_task_that_is_not_there(
    cut_off: TaskStore, proxy: Proxy
) -> None:
    task = make()
    await cut_off.create(task)
    proxy.refuse()
    proxy.reset_all()
    for call in (
        cut_off.get("t1"),
        cut_off.create(make("t2")),
        cut_off.remove(task),
        read(cut_off, ALL),
    ):
        with pytest.raises(StoreUnavailableError):
            await call
    proxy.accept()
    assert await listed(cut_off, ALL) == ["t1"]
