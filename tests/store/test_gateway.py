"""The way to the store, counted on the wire: what is sent how often, and what a failure becomes."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fakeredis import FakeServer
from redis import Redis as SyncRedis
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from app.address import parse_store_url
from app.clock import monotonic_s
from app.context import RequestContext, reset_context, set_context
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    InvalidStepDataError,
    InvalidStepIdError,
    OnboardingError,
    OverloadedError,
    PayloadTooLargeError,
    RequestError,
    SessionNotFoundError,
    StoreError,
    StoreFullError,
    StoreReadonlyError,
    StoreUnavailableError,
)
from app.services.manager import make_manager
from app.store.client import make_client
from app.store.connect import connect
from app.store.faults import Remedy, TooMuchAtOnceError, judge
from app.store.gateway import Gateway, RetryPolicy
from app.store.keys import Keys
from app.store.links import PooledLink
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey, free_ports, wait_until
from tests.store.sessions import (
    READS,
    WRITES,
    Call,
    Manager,
    Place,
    Write,
    count_events,
    keyed,
    prepare,
    watch_operation_ids,
    working_at,
)

REAL_WAITS = {"retry_base_s": 1.0, "retry_jitter_s": 0.5}
"""The waits of production; only where nothing waits for them."""

STORING = {
    **{name: write for name, write in WRITES.items() if not name.startswith("delete_")},
    "create_session": Write(lambda p, _: p.manager.create_session(workspace_id="w"), 1),
}
"""The writes that need room; deletes go on without."""

BadCall = tuple[type[RequestError], Callable[[Manager, str], Awaitable[Any]]]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A store whose configuration may be spoiled."""
    server = Valkey.start(tmp_path_factory.mktemp("apart"), dbfilename="taken", save="3600 1")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
async def front(server: Valkey) -> AsyncIterator[Proxy]:
    """A proxy before that store."""
    async with Proxy(server.port) as proxy:
        yield proxy


def url_of(proxy: Proxy) -> str:
    return f"redis://{proxy.host}:{proxy.port}/0"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between sendings, none of which takes time; longer ones than 0.05 s count."""
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(delay: float, result: Any = None) -> Any:
        if delay > 0.05:
            waits.append(delay)
            delay = 0
        return await real_sleep(delay, result)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return waits


@contextmanager
def request_ending_in(seconds: float) -> Iterator[RequestContext]:
    context = RequestContext(request_id="r", deadline_s=monotonic_s() + seconds)
    token = set_context(context)
    try:
        yield context
    finally:
        reset_context(token)


class TestNothingBelowUsSendsAgain:
    async def test_a_write_whose_reply_is_lost_is_on_the_wire_once_per_attempt_of_ours(
        self, proxy: Proxy
    ) -> None:
        async with working_at(url_of(proxy), redis_timeout_s=0.2, retry_attempts=1) as place:
            session_id = await prepare(place.manager)
            before = proxy.commands["EVALSHA"]
            proxy.drop_replies(1, to="EVALSHA")
            with pytest.raises(StoreUnavailableError):
                await place.manager.save_step(session_id, 1, {"a": 2})
            assert proxy.commands["EVALSHA"] == before + 1

    async def test_a_read_whose_reply_is_lost_is_on_the_wire_once_per_attempt_of_ours(
        self, proxy: Proxy
    ) -> None:
        async with working_at(url_of(proxy), redis_timeout_s=0.2, retry_attempts=1) as place:
            session_id = await prepare(place.manager)
            proxy.drop_replies(1, to="GET")
            with pytest.raises(StoreUnavailableError):
                await place.manager.get_step(session_id, 1)
            assert proxy.commands["GET"] == 1

    async def test_a_refused_connection_is_tried_once_per_attempt_of_ours(self) -> None:
        tried = 0

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal tried
            tried += 1
            writer.close()

        async with await asyncio.start_server(hang_up, HOST, 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            async with working_at(f"redis://{HOST}:{port}/0", retry_attempts=3) as place:
                with pytest.raises(StoreUnavailableError):
                    await place.manager.get_progress("s")
        assert tried == 3


class TestALostReply:
    async def test_is_asked_for_again_with_the_same_operation_id_and_a_time_of_its_own(
        self, wired: Place, proxy: Proxy, raw: Redis
    ) -> None:
        session_id = await prepare(wired.manager)
        async with raw.monitor() as monitor:
            proxy.drop_replies(2, to="EVALSHA")
            saved = await wired.manager.save_step(session_id, 1, {"a": 2})
            await raw.echo("end")
            sendings = []
            while not (line := (await monitor.next_command())["command"]).startswith("ECHO"):
                if line.startswith("EVALSHA"):
                    sendings.append(line.split(" "))
        assert saved["version"] == 2
        assert len(sendings) == 3
        sent = 3 + int(sendings[0][2])
        assert len({words[sent] for words in sendings}) == 3
        # How long it is waited for, the operation id, and what there is to do.
        assert len({tuple(words[sent + 1 :]) for words in sendings}) == 1

    @pytest.fixture
    async def hasty(self, proxy: Proxy) -> AsyncIterator[Place]:
        """Give up a command soon: nothing is said here of how often one is sent."""
        once_more = {"redis_timeout_s": 0.1, "retry_attempts": 8}
        async with working_at(url_of(proxy), **once_more) as place:
            yield place

    # Every call over HTTP is in tests/api/test_exactly_once.py.
    @pytest.mark.parametrize("name", ["set_metadata", "update_progress", "save_step, over another"])
    async def test_of_a_write_leaves_one_write_and_brings_its_first_answer(
        self, hasty: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        write: Write = WRITES[name]
        session_id = await prepare(hasty.manager, finalized=write.finalized)
        steps_before = (await hasty.manager.get_all_steps(session_id)).items()
        versions_before = {number: step.version or 0 for number, step in steps_before}
        events_before = await count_events(hasty.gateway, session_id)
        # Armed when the operation id is drawn: what a write reads first is not meant.
        watch_operation_ids(monkeypatch, lambda: proxy.drop_replies(1, to="EVALSHA"))
        sent_before = proxy.commands["EVALSHA"]

        answer = await write.do(hasty, session_id)

        assert proxy.commands["EVALSHA"] - sent_before >= 2
        assert await count_events(hasty.gateway, session_id) == events_before + write.events
        steps = await hasty.manager.get_all_steps(session_id)
        if isinstance(answer, dict) and isinstance(version := answer.get("version"), int):
            number = answer["step_id"]
            assert version == versions_before.get(number, 0) + 1
            assert steps[number].version == version
        match answer:
            case {"progress": dict(progress)}:
                assert progress == await hasty.manager.get_progress(session_id)

    async def test_of_a_delete_is_a_success_and_a_delete_of_nothing_is_not(
        self, wired: Place, proxy: Proxy
    ) -> None:
        session_id = await prepare(wired.manager)
        proxy.drop_replies(2, to="EVALSHA")
        assert (await wired.manager.delete_session(session_id))["success"] is True
        with pytest.raises(SessionNotFoundError):
            await wired.manager.delete_session(session_id)

    async def test_of_a_read_is_asked_for_again(self, wired: Place, proxy: Proxy) -> None:
        session_id = await prepare(wired.manager)
        proxy.drop_replies(1, to="GET")
        step = await wired.manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}
        assert proxy.commands["GET"] == 2

    async def test_of_a_first_use_of_a_script_leaves_one_write(
        self, wired: Place, proxy: Proxy, raw: Redis
    ) -> None:
        session_id = await prepare(wired.manager)
        await raw.script_flush()
        proxy.drop_replies(1, to="EVAL")
        assert (await wired.manager.save_step(session_id, 1, {"a": 2}))["version"] == 2
        assert proxy.commands["EVAL"] >= 1
        assert (await wired.manager.save_step(session_id, 1, {"a": 3}))["version"] == 3

    async def test_on_a_connection_that_breaks_leaves_one_write(
        self, wired: Place, proxy: Proxy
    ) -> None:
        session_id = await prepare(wired.manager)
        sent_before = proxy.commands["EVALSHA"]
        proxy.drop_replies(1, to="EVALSHA")
        saving = asyncio.create_task(wired.manager.save_step(session_id, 1, {"a": 2}))
        async with asyncio.timeout(5):
            while proxy.commands["EVALSHA"] == sent_before:
                await asyncio.sleep(0.001)
        proxy.reset_all()
        assert (await saving)["version"] == 2


class TestARefusal:
    @pytest.fixture(autouse=True)
    def no_replica(self, server: Valkey) -> Callable[[bool], None]:
        """Let the store refuse every write for now: NOREPLICAS is transient."""

        def refuse(refusing: bool) -> None:
            server.command("CONFIG", "SET", "min-replicas-to-write", int(refusing))

        return refuse

    async def test_is_sent_four_times_with_waits_of_1_2_and_4_s_and_up_to_half_a_second(
        self, front: Proxy, waits: list[float], no_replica: Callable[[bool], None]
    ) -> None:
        async with working_at(url_of(front), **REAL_WAITS) as place:
            session_id = await prepare(place.manager)
            no_replica(True)
            parts = set()
            for _ in range(5):
                waits.clear()
                sent_before = front.commands["EVALSHA"]
                with pytest.raises(StoreUnavailableError):
                    await place.manager.save_step(session_id, 1, {"a": 2})
                assert front.commands["EVALSHA"] == sent_before + 4
                assert [int(wait) for wait in waits] == [1, 2, 4]
                parts |= {wait - least for wait, least in zip(waits, (1, 2, 4), strict=True)}
            assert all(0 <= part <= 0.5 for part in parts)
            assert len(parts) == 15
            no_replica(False)
            step = await place.manager.get_step(session_id, 1)
            assert step is not None
            assert step.version == 1

    async def test_that_ends_is_over_after_the_next_sending(
        self, front: Proxy, waits: list[float], no_replica: Callable[[bool], None]
    ) -> None:
        async with working_at(url_of(front), **REAL_WAITS) as place:
            session_id = await prepare(place.manager)
            no_replica(True)
            sent_before = front.commands["EVALSHA"]
            with request_ending_in(15) as context:
                saving = asyncio.create_task(place.manager.save_step(session_id, 1, {"a": 2}))
                while len(waits) < 2:
                    await asyncio.sleep(0)
                no_replica(False)
                assert (await saving)["version"] == 2
            sent = front.commands["EVALSHA"] - sent_before
            assert sent in {3, 4}
            assert (context.meter.commands, context.meter.retries) == (sent, sent - 1)

    @pytest.mark.parametrize(
        ("left_s", "sendings"), [(-1.0, 1), (0.0, 1), (0.9, 1), (1.9, 2), (3.9, 3), (15.0, 4)]
    )
    async def test_is_sent_again_only_while_the_wait_ends_before_the_requests_deadline(
        self,
        front: Proxy,
        waits: list[float],
        no_replica: Callable[[bool], None],
        left_s: float,
        sendings: int,
    ) -> None:
        async with working_at(url_of(front), **REAL_WAITS) as place:
            session_id = await prepare(place.manager)
            no_replica(True)
            sent_before = front.commands["EVALSHA"]
            with request_ending_in(left_s) as context, pytest.raises(StoreUnavailableError):
                await place.manager.save_step(session_id, 1, {"a": 2})
            assert front.commands["EVALSHA"] - sent_before == sendings
            assert context.meter.retries == len(waits) == sendings - 1

    async def test_without_a_request_is_sent_again_only_within_the_policys_deadline(
        self, front: Proxy, waits: list[float], no_replica: Callable[[bool], None]
    ) -> None:
        async with working_at(url_of(front), **REAL_WAITS, request_deadline_s=1.9) as place:
            session_id = await prepare(place.manager)
            no_replica(True)
            with pytest.raises(StoreUnavailableError):
                await place.manager.save_step(session_id, 1, {"a": 2})
            assert len(waits) == 1

    async def test_the_time_of_the_first_sending_counts_for_the_policys_deadline(
        self, wired: Place, proxy: Proxy
    ) -> None:
        # The reply is missed after 0.4 s, and 0.2 s later would be past 0.5 s.
        async with working_at(
            url_of(proxy), redis_timeout_s=0.4, retry_base_s=0.2, request_deadline_s=0.5
        ) as place:
            session_id = await prepare(wired.manager)
            await place.manager.get_progress(session_id)
            sent_before = proxy.commands["EVALSHA"]
            proxy.drop_replies(1, to="EVALSHA")
            with pytest.raises(StoreUnavailableError):
                await place.manager.save_step(session_id, 1, {"a": 2})
            assert proxy.commands["EVALSHA"] == sent_before + 1


class TestWhatWouldFailTheSameWayAgainIsSentOnce:
    async def assert_one_sending(
        self, front: Proxy, error: type[StoreError], call: Callable[[], Awaitable[Any]]
    ) -> None:
        before = front.commands.copy()
        with pytest.raises(error) as raised:
            await call()
        assert type(raised.value) is error
        sent = front.commands - before
        # On a fresh store the script itself has to be sent after its name.
        assert sent["EVALSHA"] + sent["GET"] <= 1
        assert sent["EVAL"] + sent["HELLO"] <= 1
        assert sum(sent.values()) >= 1

    async def test_a_wrong_password(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        directory = tmp_path_factory.mktemp("locked")
        with Valkey.start(directory, requirepass="right") as server:
            async with (
                Proxy(server.port) as front,
                working_at(f"redis://:wrong@{HOST}:{front.port}/0") as place,
            ):
                await self.assert_one_sending(
                    front, StoreUnavailableError, lambda: place.manager.get_progress("s")
                )
                assert front.commands == {"HELLO": 1}

    async def test_a_missing_password(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        directory = tmp_path_factory.mktemp("locked")
        with Valkey.start(directory, requirepass="right") as server:
            async with Proxy(server.port) as front, working_at(url_of(front)) as place:
                with pytest.raises(StoreUnavailableError):
                    await place.manager.get_progress("s")
                assert front.commands["HELLO"] + front.commands["HMGET"] <= 2
                assert front.commands["HMGET"] <= 1

    async def test_a_user_who_may_not_run_scripts(self, server: Valkey, front: Proxy) -> None:
        server.command("ACL", "SETUSER", "reader", "on", ">p", "~*", "+@all", "-@scripting")
        async with working_at(url_of(front)) as place:
            session_id = await prepare(place.manager)
        async with working_at(f"redis://reader:p@{HOST}:{front.port}/0") as place:
            await place.manager.get_step(session_id, 1)
            await self.assert_one_sending(
                front,
                StoreUnavailableError,
                lambda: place.manager.save_step(session_id, 1, {"a": 2}),
            )

    @pytest.mark.parametrize("name", STORING)
    async def test_out_of_memory_and_nothing_is_changed(
        self, server: Valkey, front: Proxy, name: str
    ) -> None:
        async with working_at(url_of(front)) as place:
            write = STORING[name]
            session_id = await prepare(place.manager, finalized=write.finalized)
            before = dump(server)
            server.command("CONFIG", "SET", "maxmemory", 1)
            sent_before = front.commands.copy()
            with pytest.raises(StoreFullError):
                await write.do(place, session_id)
            sent = front.commands - sent_before
            server.command("CONFIG", "SET", "maxmemory", 0)
            reads_first = name in {"finalize", "promote_draft_to_step"}
            # A script that the store has not met yet is sent by its name and with its text.
            assert sent["EVALSHA"] == (2 if reads_first else 1)
            assert sent["EVAL"] <= sent["EVALSHA"]
            assert dump(server) == before

    async def test_out_of_memory_reads_and_deletes_go_on(
        self, server: Valkey, front: Proxy
    ) -> None:
        async with working_at(url_of(front)) as place:
            manager = place.manager
            session_id = await prepare(manager)
            frozen_id = await prepare(manager, finalized=True)
            server.command("CONFIG", "SET", "maxmemory", 1)
            for read in READS.values():
                await read(place, session_id)
                await read(place, frozen_id)
            await manager.delete_draft(session_id, 3)
            deleted = await manager.delete_step(session_id, 1)
            assert deleted["progress"]["completed_steps"] == [2]
            assert await manager.get_step(session_id, 1) is None
            await manager.delete_session(session_id)
            assert not [key for key in dump(server) if session_id.encode() in key]

    async def test_a_store_that_cannot_save_its_snapshot(
        self, server: Valkey, front: Proxy
    ) -> None:
        async with working_at(url_of(front)) as place:
            session_id = await prepare(place.manager)
            await place.manager.save_step(session_id, 1, {"a": 2})
            # Where the snapshot should go stands a directory.
            (server.directory / "taken").mkdir()
            server.command("BGSAVE")
            wait_until(
                lambda: server.command("INFO", "persistence")["rdb_last_bgsave_status"] == "err",
                5.0,
                "the snapshot fails",
            )
            await self.assert_one_sending(
                front,
                StoreReadonlyError,
                lambda: place.manager.save_step(session_id, 1, {"a": 3}),
            )
            step = await place.manager.get_step(session_id, 1)
            assert step is not None
            assert step["data"] == {"a": 2}

    async def test_a_record_of_another_type(self, server: Valkey, front: Proxy) -> None:
        async with working_at(url_of(front)) as place:
            session_id = await prepare(place.manager)
            keys = place.gateway.keys.session(session_id)
            server.command("DEL", keys.step(1), keys.ops)
            server.command("RPUSH", keys.step(1), "x")
            server.command("RPUSH", keys.ops, "x")
            await self.assert_one_sending(
                front, CorruptRecordError, lambda: place.manager.get_step(session_id, 1)
            )
            await self.assert_one_sending(
                front, CorruptRecordError, lambda: place.manager.save_step(session_id, 1, {"a": 3})
            )


class TestAPoolWithoutAFreeConnection:
    @pytest.fixture
    async def client(self, proxy: Proxy) -> AsyncIterator[Redis]:
        client = make_client(
            parse_store_url(url_of(proxy)), timeout_s=0.05, max_connections=1, client_name="t"
        )
        assert isinstance(client, Redis)
        yield client
        await client.aclose()

    @pytest.fixture
    def gateway(self, client: Redis) -> Gateway:
        return Gateway(
            lambda _: PooledLink(client, send_s=1.5),
            keys=Keys(hash_tag=False),
            lifetime_ms=1000,
            mode="standalone",
            policy=RetryPolicy(attempts=3, base_s=0.05, jitter_s=0.0),
        )

    async def test_is_overload_when_none_becomes_free_and_nothing_is_sent(
        self, proxy: Proxy, client: Redis, gateway: Gateway
    ) -> None:
        pool: Any = client.connection_pool
        taken = await pool.get_connection()
        before = proxy.commands.copy()
        with pytest.raises(OverloadedError):
            await gateway.command("GET", "a")
        assert gateway.failures_last_minute == 3
        assert proxy.commands == before
        await pool.release(taken)

    async def test_is_waited_for_as_for_a_store_that_is_away(
        self, client: Redis, gateway: Gateway
    ) -> None:
        pool: Any = client.connection_pool
        taken = await pool.get_connection()
        asking = asyncio.create_task(gateway.command("GET", "a"))
        async with asyncio.timeout(5):
            while gateway.failures_last_minute == 0:
                await asyncio.sleep(0.001)
        await pool.release(taken)
        assert await asking is None


class TestARequestAtFaultSendsNothing:
    BAD_CALLS: ClassVar[
        dict[str, tuple[type[RequestError], Callable[[Manager, str], Awaitable[Any]]]]
    ] = {
        "no such step": (InvalidStepIdError, lambda m, s: m.save_step(s, 24, {"a": 1})),
        "step 0": (InvalidStepIdError, lambda m, s: m.get_step(s, 0)),
        "a negative step": (InvalidStepIdError, lambda m, s: m.delete_step(s, -1)),
        "no answers": (InvalidStepDataError, lambda m, s: m.save_step(s, 1, {})),
        "not a number": (InvalidStepDataError, lambda m, s: m.save_step(s, 1, {"a": float("nan")})),
        "no steps": (InvalidStepDataError, lambda m, s: m.save_steps(s, {})),
        "one of two steps at fault": (
            InvalidStepDataError,
            lambda m, s: m.save_steps(s, {1: {"a": 1}, 2: {}}),
        ),
        "too large": (PayloadTooLargeError, lambda m, s: m.save_step(s, 1, {"a": "x" * 300_000})),
        "a draft that is too large": (
            PayloadTooLargeError,
            lambda m, s: m.save_draft(s, 1, {"a": "x" * 300_000}),
        ),
        "a draft of no step": (InvalidStepIdError, lambda m, s: m.save_draft(s, 99, {"a": 1})),
        "a mark below 0": (InvalidStepIdError, lambda m, s: m.update_progress(s, -1)),
        "an id with a colon": (InvalidRequestError, lambda m, _: m.get_progress("a:b")),
        "an id with a brace": (InvalidRequestError, lambda m, _: m.save_step("{a", 1, {"a": 1})),
        "an empty id": (InvalidRequestError, lambda m, _: m.delete_session("")),
        "an id with a newline": (InvalidRequestError, lambda m, _: m.get_export("a\n")),
        "a control character": (InvalidRequestError, lambda m, s: m.set_metadata(s, "a\x00", "w")),
        "a long workspace": (
            InvalidRequestError,
            lambda m, _: m.create_session(workspace_id="w" * 129),
        ),
        "no language": (InvalidRequestError, lambda m, _: m.create_session(language="e")),
    }

    @pytest.mark.parametrize("name", BAD_CALLS)
    async def test_once_the_catalogues_are_learnt(
        self, wired: Place, proxy: Proxy, name: str
    ) -> None:
        error, call = self.BAD_CALLS[name]
        session_id = await prepare(wired.manager)
        await wired.manager.learn_catalogues()
        before = proxy.commands.copy()
        with pytest.raises(error):
            await call(wired.manager, session_id)
        assert proxy.commands == before


class TestForgottenScripts:
    @pytest.mark.parametrize("name", WRITES)
    async def test_are_sent_again_between_two_calls(
        self, wired: Place, raw: Redis, name: str
    ) -> None:
        write = WRITES[name]
        session_id = await prepare(wired.manager, finalized=write.finalized)
        await raw.script_flush()
        events_before = await count_events(wired.gateway, session_id)
        await write.do(wired, session_id)
        assert await count_events(wired.gateway, session_id) == events_before + write.events
        for read in READS.values():
            await raw.script_flush()
            await read(wired, session_id)
        await raw.script_flush()
        await wired.manager.delete_session(session_id)

    async def test_under_20_writers_cost_no_write_and_no_error(
        self, raw: Redis, valkey: Valkey
    ) -> None:
        async with working_at(valkey.url) as place:
            session_id = await place.manager.create_session(workspace_id="w")
            writing = True

            async def flush() -> None:
                while writing:
                    await raw.script_flush()

            async def write(number: int) -> None:
                for round_ in range(1, 16):
                    saved = await place.manager.save_step(session_id, number, {"round": round_})
                    assert saved["version"] == round_

            flushing = asyncio.create_task(flush())
            await asyncio.gather(*(write(number) for number in range(1, 21)))
            writing = False
            await flushing
            assert await count_events(place.gateway, session_id) == 1 + 20 * 15


async def test_the_happy_path_enters_no_retry_machinery(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise AssertionError("a call that succeeds has nothing to retry")

    monkeypatch.setattr("app.store.gateway.AsyncRetrying", explode)
    for write in WRITES.values():
        session_id = await prepare(place.manager, finalized=write.finalized)
        await write.do(place, session_id)
        for read in READS.values():
            await read(place, session_id)
        await place.manager.delete_session(session_id)


class TestAnOutage:
    async def test_is_never_an_absence(self) -> None:
        server = FakeServer()
        gateway = fake_gateway(server)
        manager = make_manager(gateway, known_settings())
        place = Place(manager, gateway)
        session_id = await prepare(manager)
        server.connected = False
        calls = [*READS.values(), *(write.do for write in WRITES.values())]

        async def is_away(call: Call, id_: str) -> None:
            with pytest.raises(StoreUnavailableError):
                await call(place, id_)

        ids = (session_id, "never-made")
        await asyncio.gather(*(is_away(call, id_) for call in calls for id_ in ids))
        server.connected = True
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert step.version == 1
        await gateway.aclose()

    async def test_names_no_address_in_its_error(self) -> None:
        [port] = free_ports(1)
        async with working_at(f"redis://:secret@{HOST}:{port}/0") as place:
            with pytest.raises(StoreUnavailableError) as raised:
                await place.manager.get_progress("s")
        assert raised.value.__suppress_context__
        assert not {HOST, str(port), "secret"} & set(str(raised.value).split())

    async def test_is_what_somebody_else_at_the_stores_address_is_too(self) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                await reader.read(100)
                writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, HOST, 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            async with working_at(f"redis://{HOST}:{port}/0") as place:
                with pytest.raises(StoreUnavailableError):
                    await place.manager.get_progress("s")


async def test_a_demoted_master_is_left_before_every_attempt(server: Valkey, front: Proxy) -> None:
    async with working_at(url_of(front)) as place:
        session_id = await prepare(place.manager)
        server.command("REPLICAOF", HOST, 1)
        before = front.commands.copy()
        with pytest.raises(StoreReadonlyError):
            await place.manager.save_step(session_id, 1, {"a": 2})
        sent = front.commands - before
        assert (sent["EVALSHA"], sent["HELLO"]) == (4, 3)


class TestTwoEventLoops:
    def test_one_after_the_other_share_a_manager_that_was_closed_between(
        self, valkey: Valkey
    ) -> None:
        settings = known_settings(redis_url=valkey.url, **QUICKLY)
        manager = make_manager(connect(settings), settings)

        async def begin() -> str:
            session_id = await prepare(manager)
            await manager.aclose()
            return session_id

        async def go_on(session_id: str) -> None:
            assert (await manager.save_step(session_id, 1, {"a": 2}))["version"] == 2
            await manager.delete_session(session_id)
            await manager.aclose()

        asyncio.run(go_on(asyncio.run(begin())))

    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_one_after_the_other_share_a_manager_that_was_not_closed(self, valkey: Valkey) -> None:
        settings = known_settings(redis_url=valkey.url, **QUICKLY)
        manager = make_manager(connect(settings), settings)

        async def go_on(session_id: str) -> None:
            # More at once than connections were left: none of those may be taken.
            await asyncio.gather(*(manager.get_progress(session_id) for _ in range(20)))
            await manager.delete_session(session_id)
            await manager.aclose()

        session_id = asyncio.run(prepare(manager))
        asyncio.run(go_on(session_id))
        # What was left open complains now, and not in the middle of another test.
        gc.collect()


RETRY, GIVE_UP = Remedy.RETRY, Remedy.GIVE_UP

FAULTS: list[tuple[Exception, Remedy, type[OnboardingError] | None]] = [
    # Transient: sent again.
    (redis_errors.ConnectionError("Connection refused."), RETRY, StoreUnavailableError),
    (redis_errors.ConnectionError("max number of clients reached"), RETRY, StoreUnavailableError),
    (redis_errors.TimeoutError("Timeout reading"), RETRY, StoreUnavailableError),
    (TimeoutError(), RETRY, StoreUnavailableError),
    (ConnectionResetError(104, "reset"), RETRY, StoreUnavailableError),
    (OSError("unreachable"), RETRY, StoreUnavailableError),
    (redis_errors.BusyLoadingError("loading the dataset"), RETRY, StoreUnavailableError),
    (redis_errors.ReadOnlyError("You can't write against"), RETRY, StoreReadonlyError),
    (
        redis_errors.ResponseError("NOREPLICAS Not enough good replicas to write."),
        RETRY,
        StoreUnavailableError,
    ),
    (
        redis_errors.ResponseError("BUSY Valkey is busy running a script."),
        RETRY,
        StoreUnavailableError,
    ),
    (redis_errors.ClusterError("no way"), RETRY, StoreUnavailableError),
    (redis_errors.ClusterDownError("Hash slot not served"), RETRY, StoreUnavailableError),
    (redis_errors.MasterDownError("Link with MASTER is down"), RETRY, StoreUnavailableError),
    (redis_errors.TryAgainError("Multiple keys request"), RETRY, StoreUnavailableError),
    (redis_errors.SlotNotCoveredError("Slot 1 is not covered"), RETRY, StoreUnavailableError),
    (redis_errors.RedisClusterException("cannot be connected"), RETRY, StoreUnavailableError),
    (redis_errors.ResponseError("CLUSTERDOWN The cluster is down"), RETRY, StoreUnavailableError),
    (redis_errors.ResponseError("MASTERDOWN Link is down"), RETRY, StoreUnavailableError),
    (redis_errors.ResponseError("TRYAGAIN Multiple keys"), RETRY, StoreUnavailableError),
    (redis_errors.ExternalAuthProviderError("LDAP service"), RETRY, StoreUnavailableError),
    (redis_errors.ConnectionError("No connection available."), RETRY, OverloadedError),
    (TooMuchAtOnceError(), RETRY, OverloadedError),
    # It would fail the same way again.
    (redis_errors.AuthenticationError("invalid password"), GIVE_UP, StoreUnavailableError),
    (
        redis_errors.AuthenticationWrongNumberOfArgsError("wrong number"),
        GIVE_UP,
        StoreUnavailableError,
    ),
    (redis_errors.AuthorizationError("not allowed"), GIVE_UP, StoreUnavailableError),
    (redis_errors.NoPermissionError("User x has no permissions"), GIVE_UP, StoreUnavailableError),
    (redis_errors.MaxConnectionsError("Too many connections"), GIVE_UP, OverloadedError),
    (redis_errors.OutOfMemoryError("command not allowed"), GIVE_UP, StoreFullError),
    (redis_errors.ResponseError("OOM command not allowed"), GIVE_UP, StoreFullError),
    (redis_errors.ResponseError("MISCONF Errors writing"), GIVE_UP, StoreReadonlyError),
    (redis_errors.ResponseError("WRONGTYPE Operation against"), GIVE_UP, None),
    (
        redis_errors.ResponseError("user_script:3: attempt to compare nil, on @user_script:3."),
        GIVE_UP,
        None,
    ),
]

NOT_OF_THE_STORE = {
    "NoScriptError",  # the gateway sends the text at once
    "RedisError",
    "DataError",
    "PubSubError",
    "WatchError",
    "ExecAbortError",
    "ModuleError",
    "NoSuchFieldsetError",
    "LockError",
    "LockNotOwnedError",
    "ChildDeadlockedError",
    "ClusterCrossSlotError",
    "CrossSlotTransactionError",
    "InvalidPipelineStack",
    "IncorrectPolicyType",
    "InvalidResponse",  # a test of an outage, above
    "ResponseError",  # by its text
    "AskError",  # a Cluster client follows these two
    "MovedError",
}
"""Classes of redis-py that say that somebody programmed wrongly, or that nothing here raises."""


class TestTheTableOfFaults:
    @pytest.mark.parametrize(
        ("failure", "remedy", "error"),
        FAULTS,
        ids=[f"{type(failure).__name__} {failure}"[:40] for failure, _, _ in FAULTS],
    )
    def test_knows_what_to_do_and_what_to_say(
        self, failure: Exception, remedy: Remedy, error: type[OnboardingError] | None
    ) -> None:
        fault = judge(failure)
        assert fault is not None
        assert fault.remedy is remedy
        if error is None:
            assert fault.error is None
        else:
            assert fault.error is not None
            assert type(fault.error()) is error

    def test_knows_every_class_of_redis_py(self) -> None:
        classes = {
            name
            for name, kind in vars(redis_errors).items()
            if isinstance(kind, type) and issubclass(kind, Exception)
        }
        judged = {type(failure).__name__ for failure, _, _ in FAULTS}
        assert classes - judged == NOT_OF_THE_STORE - {"ResponseError"}

    @pytest.mark.parametrize(
        "failure",
        [
            ValueError("x"),
            KeyError("x"),
            redis_errors.DataError("Invalid input of type"),
            redis_errors.ResponseError("ERR unknown command"),
            redis_errors.ResponseError("BUSYGROUP Consumer Group name already exists"),
            redis_errors.ResponseError("BUSYKEY Target key name already exists."),
            redis_errors.WatchError("Watched variable changed."),
        ],
        ids=repr,
    )
    def test_leaves_mistakes_of_ours_alone(self, failure: Exception) -> None:
        assert judge(failure) is None

    async def test_leaves_a_mistake_of_ours_as_it_is_and_sends_it_once(self) -> None:
        class Client:
            sent = 0

            async def execute_command(self, *_: Any) -> None:
                self.sent += 1
                raise ValueError("ours")

        client = Client()
        fake = SimpleNamespace(execute_command=client.execute_command)
        gateway = Gateway(
            lambda _: PooledLink(fake, send_s=1.5),  # type: ignore[arg-type]
            keys=Keys(hash_tag=False),
            lifetime_ms=1000,
            mode="standalone",
            policy=RetryPolicy(base_s=60.0),
        )
        with pytest.raises(ValueError, match="ours"):
            await gateway.command("GET", "a")
        assert client.sent == 1


async def test_a_cancelled_write_frees_its_connection_and_later_answers_are_their_own(
    wired: Place, proxy: Proxy
) -> None:
    session_id = await prepare(wired.manager)
    for round_ in range(3):
        sent_before = proxy.commands["EVALSHA"]
        proxy.hold()
        saving = asyncio.create_task(wired.manager.save_step(session_id, 1, {"round": round_}))
        async with asyncio.timeout(5):
            while proxy.commands["EVALSHA"] == sent_before:
                await asyncio.sleep(0.001)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        proxy.release()
        step = await wired.manager.get_step(session_id, 2)
        assert step is not None
        assert step["data"] == {"a": 2}
        assert wired.gateway.describe_pool()["waiting"] == 0


async def test_an_idempotency_key_and_a_lost_reply_make_one_session(
    wired: Place, proxy: Proxy, raw: Redis
) -> None:
    session_id = await prepare(wired.manager)
    proxy.drop_replies(1, to="EVALSHA")
    first = await wired.manager.save_step(session_id, 5, {"a": 5}, request=keyed())
    again = keyed()
    assert await wired.manager.save_step(session_id, 5, {"a": 5}, request=again) == first
    assert again.replayed


def dump(server: Valkey) -> dict[bytes, tuple[bytes, int]]:
    """Everything in a store by its key, with the deadline."""
    with closing(SyncRedis(host=server.host, port=server.port)) as client:
        keys: Any = client.keys()
        return {key: (client.dump(key), client.pexpiretime(key)) for key in keys}  # type: ignore[misc]
