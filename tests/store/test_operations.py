"""The memory of operations: what was done under an operation id is not done again."""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import pytest
import time_machine

from app.errors import IdempotencyMismatchError, SessionNotFoundError
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import Owner
from app.store.gateway import Argument, Gateway, Reply
from app.store.scripts import load_script
from tests.faults.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Manager,
    deadlines_ms,
    key_named,
    keyed,
    names_of_keys,
    prepare,
    watch_operation_ids,
    working_at,
)

AT_MS = 1_767_268_800_000
AT = "2026-01-01T12:00:00.000Z"
PIN = "p1"

TURN_S = 120
"""How long an operation is remembered at least, in seconds."""


class Operation(NamedTuple):
    """A call of a script that changes the session `SESSION`."""

    script: str
    keys: Sequence[str] = ()
    args: Sequence[Argument] = ()


SESSION = "s"
EXPORT = '{"version":"2.0","checksum":"sha256:' + "0" * 64 + '"}'

OPERATIONS = [
    Operation(
        "create_session",
        args=[SESSION, PIN, 3, 0, "refuse", "0a", "5e", 0, "language", "en", "custom", "{}"],
    ),
    Operation(
        "save_steps",
        ["step:1", "draft:1", "step:2", "draft:2"],
        [PIN, "", "", "", "", AT, 1, '{"a":1}', 2, '{"a":2}'],
    ),
    Operation("save_draft", ["draft:3"], [PIN, 3, AT, 60_000_000, '{"a":3}']),
    Operation("delete_draft", ["draft:3"], [3]),
    Operation("delete_step", ["step:2"], [2, ""]),
    Operation("raise_progress", args=[3]),
    Operation("update_session", args=["", "", "", "", 2, "user_id", "u", "workspace_id"]),
    Operation("record_recovery", args=[3, 0]),
    Operation("add_event", args=["a stage", 10, "a message", "id-1", ""]),
    Operation("add_session_token", args=["0b", 100]),
    Operation("create_resume_token", args=["f0", "0c", 60_000, 20, 100, 60_000, "a label"]),
    Operation("use_resume_token", args=["f0", "0c", "0d", 60_000, 100]),
    Operation("revoke_resume_token", args=["f0"]),
    Operation("add_answer", ["history"], ['{"question":"a"}', 5, 10]),
    Operation(
        "store_body", ["result"], ["result_stored", "", 4, "transfer", "t", "parts", 0, "size", 0]
    ),
    # The ninth change of the session; what is counted is in finalize_session.lua.
    Operation("finalize_session", ["export"], ["8", EXPORT, ""]),
    Operation("reopen_session"),
    Operation("set_status", args=["processing", "|pending|", "", "", "status", "percent"]),
]
"""Every script that changes a session, in an order in which all are accepted."""


class Driver:
    """Calls scripts with an operation id of the caller's choice."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gateway = gateway
        self.keys = gateway.keys.session(SESSION)
        self._next: bytes | None = None
        watch_operation_ids(monkeypatch, lambda: self._next)

    async def __call__(
        self, operation: Operation, id_: int | None, request: IdempotentRequest | None = None
    ) -> Reply:
        """Call; without an id, the gateway draws one."""
        self._next = None if id_ is None else id_.to_bytes(12, "big")
        keys = [self.keys.prefix + name for name in operation.keys]
        return await self.gateway.change(
            operation.script, self.keys, keys, operation.args, at_ms=AT_MS, request=request
        )

    async def state(self) -> Any:
        """Everything that a repeat must leave alone."""
        names = await names_of_keys(self.gateway, SESSION) - {"ops"}
        dumps = {
            name: await self.gateway.command("DUMP", key_named(self.keys, name)) for name in names
        }
        return dumps, await deadlines_ms(self.gateway, SESSION)


@pytest.fixture
def driver(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(gateway, monkeypatch)


def test_these_are_all_scripts_that_remember_their_operations() -> None:
    scripts = files("app.store").joinpath("lua").iterdir()
    names = {file.name.removesuffix(".lua") for file in scripts}
    opening = files("app.store").joinpath("lua", "session.lua").read_text("utf-8")
    callable_ = names - {"session", "status", "tokens"}
    remembering = {name for name in callable_ if opening in load_script(name).text}
    assert {operation.script for operation in OPERATIONS} == remembering


class TestARepeat:
    async def test_is_answered_with_the_first_answer_at_once(self, driver: Driver) -> None:
        for id_, operation in enumerate(OPERATIONS):
            first = await driver(operation, id_)
            assert first.word == "ok", operation
            state = await driver.state()
            assert await driver(operation, id_) == first
            assert await driver.state() == state

    async def test_is_answered_with_the_first_answer_after_all_others(self, driver: Driver) -> None:
        first = [await driver(operation, id_) for id_, operation in enumerate(OPERATIONS)]
        state = await driver.state()
        again = [await driver(operation, id_) for id_, operation in enumerate(OPERATIONS)]
        assert again == first
        assert await driver.state() == state

    async def test_is_recognised_by_its_id_alone(self, driver: Driver) -> None:
        first = [await driver(operation, id_) for id_, operation in enumerate(OPERATIONS[:2])]
        other = OPERATIONS[1]._replace(args=[PIN, "", "", "", "", AT, 1, '{"b":2}', 2, '{"b":3}'])
        assert await driver(other, 1) == first[1]
        anew = await driver(other, 99)
        assert anew.word == "ok"
        assert anew != first[1]

    async def test_is_answered_although_2000_others_wrote_meanwhile(
        self, real: MakePlace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = real()
        driver = Driver(place.gateway, monkeypatch)
        first = [await driver(operation, id_) for id_, operation in enumerate(OPERATIONS)]

        async def write(worker: int) -> None:
            for number in range(40):
                answers = f'{{"worker":{worker},"number":{number}}}'
                args: list[Argument] = [PIN, "", "", "", "", AT, 1 + worker % 3, answers]
                step = f"step:{1 + worker % 3}"
                reply = await driver(Operation("save_steps", [step, "draft:1"], args), None)
                assert reply.word == "ok"

        await asyncio.gather(*(write(worker) for worker in range(50)))
        state = await driver.state()
        assert [await driver(each, id_) for id_, each in enumerate(OPERATIONS)] == first
        assert await driver.state() == state

    async def test_of_a_refusal_is_looked_at_anew(self, driver: Driver) -> None:
        # Nothing was done, so there is nothing to remember, and no session would hold it.
        save = OPERATIONS[1]
        assert (await driver(save, 7)).word == "not_found"
        assert await names_of_keys(driver.gateway, SESSION) == set()
        await driver(OPERATIONS[0], 0)
        assert (await driver(save, 7)).word == "ok"

    async def test_with_an_idempotency_key_keeps_answering_as_the_first_sending(
        self, driver: Driver
    ) -> None:
        await driver(OPERATIONS[0], 0)
        first = keyed()
        saved = await driver(OPERATIONS[1], 1, first)
        resent = keyed()
        assert await driver(OPERATIONS[1], 1, resent) == saved
        # The same sending again is no replay of another request.
        assert not resent.replayed
        replay = keyed()
        assert await driver(OPERATIONS[1], 2, replay) == saved
        assert replay.replayed
        with pytest.raises(IdempotencyMismatchError):
            await driver(OPERATIONS[1], 3, keyed(body=b"another"))

    async def test_that_finds_another_write_in_between_does_not_undo_it(
        self, driver: Driver
    ) -> None:
        await driver(OPERATIONS[0], 0)
        await driver(OPERATIONS[1], 1)
        other = OPERATIONS[1]._replace(args=[PIN, "", "", "", "", AT, 1, '{"b":2}', 2, '{"b":3}'])
        await driver(other, 2)
        await driver(OPERATIONS[1], 1)
        step = await driver.gateway.command("GET", driver.keys.step(1))
        assert b'"version":2' in step
        assert b'{"b":2}' in step


class TestTime:
    @pytest.mark.parametrize("script", range(1, len(OPERATIONS)))
    @pytest.mark.parametrize("phase_s", [0, 1, 119])
    async def test_an_operation_is_remembered_for_120_s_whenever_it_came(
        self,
        fake: MakePlace,
        clock: time_machine.Traveller,
        monkeypatch: pytest.MonkeyPatch,
        script: int,
        phase_s: int,
    ) -> None:
        clock.move_to(AT_MS // 1000 // TURN_S * TURN_S + phase_s)
        driver = Driver(fake().gateway, monkeypatch)
        for id_, operation in enumerate(OPERATIONS[:script]):
            await driver(operation, id_)
        first = await driver(OPERATIONS[script], 50)
        assert first.word == "ok"
        for _ in range(12):
            clock.shift(TURN_S / 12)
            # Others write all the while.
            await driver(Operation("raise_progress", args=[1]), None)
        assert await driver(OPERATIONS[script], 50) == first

    async def test_an_operation_is_forgotten_later(
        self, fake: MakePlace, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(fake().gateway, monkeypatch)
        await driver(OPERATIONS[0], 0)
        first = await driver(OPERATIONS[1], 1)
        clock.shift(2 * TURN_S)
        again = await driver(OPERATIONS[1], 1)
        assert again.word == "ok"
        assert again != first

    async def test_the_memory_does_not_grow_for_ever(
        self, fake: MakePlace, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(fake().gateway, monkeypatch)
        await driver(OPERATIONS[0], 0)
        sizes = []
        for _ in range(40):
            await driver(Operation("raise_progress", args=[1]), None)
            sizes.append(await driver.gateway.command("HLEN", driver.keys.ops))
            clock.shift(TURN_S / 5)
        # The making, two turns of five, and one field that says which turn it is.
        assert max(sizes) == 12
        clock.shift(10 * TURN_S)
        await driver(Operation("raise_progress", args=[1]), None)
        assert await driver.gateway.command("HLEN", driver.keys.ops) == 2

    async def test_the_memory_of_a_busy_turn_is_dropped_whole(
        self, fake: MakePlace, clock: time_machine.Traveller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(fake().gateway, monkeypatch)
        await driver(OPERATIONS[0], 0)
        memory = {f"{AT_MS // 1000 // TURN_S}:{n:024x}": '["ok"]' for n in range(1100)}
        fields = [part for field in memory.items() for part in field]
        await driver.gateway.command("HSET", driver.keys.ops, *fields)
        clock.shift(2 * TURN_S)
        await driver(Operation("raise_progress", args=[1]), None)
        assert await driver.gateway.command("HLEN", driver.keys.ops) == 2

    async def test_what_is_kept_about_idempotency_records_goes_when_they_do(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        manager, gateway = fake()
        session_id = await prepare(manager)
        ops = gateway.keys.session(session_id).ops
        for number in range(20):
            await manager.save_step(session_id, 1, {"a": 1}, request=keyed(f"k{number}"))
        assert await gateway.command("HLEN", ops) >= 20
        clock.shift(86_401)
        await manager.save_step(session_id, 1, {"a": 2})
        assert await gateway.command("HLEN", ops) == 2

    async def test_a_host_with_a_wrong_clock_changes_nothing_about_it(
        self, real: MakePlace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = Driver(real().gateway, monkeypatch)
        await driver(OPERATIONS[0], 0)
        first = await driver(OPERATIONS[1], 1)
        with time_machine.travel(AT_MS / 1000 + 1_000_000_000, tick=True):
            await driver(OPERATIONS[5], 2)
            assert await driver(OPERATIONS[1], 1) == first


async def prepare_and_delete(manager: Manager) -> None:
    """Let the store know the scripts."""
    await manager.delete_session(await prepare(manager))


class TestADeleteSentAgain:
    async def test_takes_the_record_along_that_lies_in_another_slot(self, proxy: Proxy) -> None:
        url = f"redis://{proxy.host}:{proxy.port}/0"
        async with working_at(url, redis_timeout_s=0.25, key_hash_tag="on") as place:
            owner = Owner("w", None, "en")
            view = await place.manager.begin_session(owner, request=keyed())
            await prepare_and_delete(place.manager)
            proxy.drop_replies(1, to="EVALSHA")
            await place.manager.delete_session(view["session_id"])
            found = await place.gateway.command("KEYS", "onboarding:*")
            assert [key for key in found if not key.startswith(b"onboarding:index:")] == []

    async def test_by_somebody_else_is_not_found(self, manager: Manager) -> None:
        session_id = await prepare(manager)
        await manager.delete_session(session_id)
        with pytest.raises(SessionNotFoundError):
            await manager.delete_session(session_id)

    async def test_takes_the_memory_and_the_idempotency_records_along(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        await manager.save_step(session_id, 1, {"a": 1}, request=keyed("a"))
        await manager.finalize(session_id, request=keyed("b"))
        assert "ops" in await names_of_keys(gateway, session_id)
        await manager.delete_session(session_id)
        assert await gateway.command("KEYS", f"*{session_id}*") == []
