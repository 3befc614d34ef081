"""Large bodies: kept in parts, shown whole or not at all, and gone with their session."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count

import pytest
import time_machine

from app.errors import (
    BodyLostError,
    CorruptRecordError,
    IdempotencyMismatchError,
    SessionNotFoundError,
    StoreFullError,
)
from app.onboarding.files import FileInfo, FileKind
from app.store.files import ON_ITS_WAY_MS
from app.store.gateway import Gateway
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Place,
    count_events,
    deadlines_ms,
    describe,
    keyed,
    names_of_keys,
    prepare,
    prepare_with_files,
    working_at,
)

HOUR_S = 3600
TURN_S = 120
PREPARED = {"metadata", "progress", "events", "ops", "step:1", "step:2", "draft:3", "draft:4"}


async def read(place: Place, session_id: str, kind: FileKind = FileKind.RESULT) -> bytes | None:
    """Read a body, all that comes of it."""
    opened = await place.bodies.open(session_id, kind)
    return None if opened is None else b"".join([part async for part in opened.content])


async def dump(gateway: Gateway, session_id: str) -> dict[str, bytes]:
    """Give everything that a session has."""
    prefix = gateway.keys.session(session_id).prefix
    names = sorted(await names_of_keys(gateway, session_id))
    return {name: await gateway.command("DUMP", prefix + name) for name in names}


class TestABodyOnItsWay:
    async def test_is_shown_by_nothing_before_it_is_placed(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        info = await place.send(session_id, "t", b"abc", b"de")
        assert await read(place, session_id) is None
        assert await count_events(place.gateway, session_id) == 3

        await place.place(session_id, info)

        body = await place.files.get(session_id, FileKind.RESULT)
        assert body is not None
        assert (body.info, body.first) == (info, b"abc")
        assert await read(place, session_id) == b"abcde"
        assert await count_events(place.gateway, session_id) == 4

    async def test_leaves_the_one_before_it_as_it_is_until_it_is_placed(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        await place.store(session_id, "t1", b"abc", b"de")
        info = await place.send(session_id, "t2", b"fg")
        assert await read(place, session_id) == b"abcde"
        await place.place(session_id, info)
        assert await read(place, session_id) == b"fg"
        assert await names_of_keys(place.gateway, session_id) == {
            *PREPARED,
            "result",
            "result:t2:1",
        }

    @pytest.mark.parametrize("lost", [1, 2, 3])
    async def test_that_has_lost_a_part_changes_nothing(self, place: Place, lost: int) -> None:
        session_id = await prepare(place.manager)
        await place.store(session_id, "t1", b"abc", b"de")
        info = await place.send(session_id, "t2", b"f", b"g", b"h")
        part = place.gateway.keys.session(session_id).part(FileKind.RESULT, "t2", lost)
        await place.gateway.command("DEL", part)
        before = await dump(place.gateway, session_id)
        with pytest.raises(BodyLostError):
            await place.place(session_id, info)
        assert await dump(place.gateway, session_id) == before
        assert await read(place, session_id) == b"abcde"

    async def test_that_will_not_be_finished_is_dropped(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        info = await place.send(session_id, "t", b"abc", b"de")
        await place.files.drop_parts(session_id, FileKind.RESULT, "t", info.parts)
        assert await names_of_keys(place.gateway, session_id) == PREPARED

    async def test_may_be_sent_part_by_part_again(self, wired: Place, proxy: Proxy) -> None:
        session_id = await prepare(wired.manager)
        await wired.store(session_id, "t0", b"x")
        proxy.drop_replies(1, to="EVALSHA")
        info = await wired.send(session_id, "t", b"abc", b"de")
        proxy.drop_replies(1, to="EVALSHA")
        await wired.place(session_id, info)
        proxy.drop_replies(1, to="EVALSHA")
        assert await read(wired, session_id) == b"abcde"
        proxy.drop_replies(1, to="GET")
        assert await read(wired, session_id) == b"abcde"
        assert await count_events(wired.gateway, session_id) == 3 + 2

    async def test_is_refused_by_a_full_store_and_changes_nothing(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with Valkey.start(tmp_path_factory.mktemp("full")) as server:
            async with working_at(server.url) as place:
                session_id = await prepare(place.manager)
                await place.store(session_id, "t1", b"abc", b"de")
                info = await place.send(session_id, "t2", b"f")
                before = await dump(place.gateway, session_id)
                server.command("CONFIG", "SET", "maxmemory", 1)
                with pytest.raises(StoreFullError):
                    await place.send(session_id, "t3", b"g")
                with pytest.raises(StoreFullError):
                    await place.place(session_id, info)
                assert await read(place, session_id) == b"abcde"
                assert await dump(place.gateway, session_id) == before
                await place.files.drop_parts(session_id, FileKind.RESULT, "t2", 1)
                await place.manager.delete_session(session_id)
                assert await names_of_keys(place.gateway, session_id) == set()

    async def test_is_not_spoiled_by_a_sending_of_a_part_that_arrives_late(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        # The store may carry out a sending that was given up after the one that took its place.
        place = fake()
        session_id = await prepare(place.manager)
        await place.store(session_id, "t", b"abc", b"de")
        await place.send(session_id, "t", b"abc", b"de")
        assert await read(place, session_id) == b"abcde"
        clock.shift(ON_ITS_WAY_MS / 1000 + TURN_S)
        await place.manager.update_progress(session_id, 1)
        assert await read(place, session_id) == b"abcde"


class TestABodyThatIsNeverFinished:
    async def test_is_there_for_an_hour_and_goes_with_a_later_write(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        session_id = await prepare(place.manager)
        info = await place.send(session_id, "t", b"abc", b"de")
        ops = place.gateway.keys.session(session_id).ops
        parts = {"result:t:1", "result:t:2"}

        clock.shift(ON_ITS_WAY_MS / 1000 - 1)
        await place.manager.update_progress(session_id, 1)
        assert parts <= await names_of_keys(place.gateway, session_id)

        clock.shift(TURN_S)
        await place.manager.update_progress(session_id, 2)
        assert not parts & await names_of_keys(place.gateway, session_id)
        assert await place.gateway.command("HLEN", ops) == 3
        with pytest.raises(BodyLostError):
            await place.place(session_id, info)

    async def test_takes_no_other_body_along(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        session_id = await prepare_with_files(place)
        clock.shift(HOUR_S / 2)
        late = await place.send(session_id, "late", b"la", b"te")
        clock.shift(HOUR_S / 2 + TURN_S)
        await place.manager.update_progress(session_id, 1)
        names = await names_of_keys(place.gateway, session_id)
        assert {name for name in names if name.startswith(("result", "upload"))} == {
            *("result", "result:r:1", "result:r:2", "upload", "upload:u:1", "upload:u:2"),
            *("result:late:1", "result:late:2"),
        }
        assert await read(place, session_id) == b"result"
        assert await read(place, session_id, FileKind.UPLOAD) == b"upload"
        await place.place(session_id, late)
        clock.shift(2 * HOUR_S)
        await place.manager.update_progress(session_id, 2)
        assert await read(place, session_id) == b"late"

    async def test_ends_with_its_session_at_the_latest(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake(session_ttl_s=60)
        session_id = await prepare(place.manager)
        await place.send(session_id, "t", b"abc")
        clock.shift(61)
        assert await names_of_keys(place.gateway, session_id) == set()

    async def test_and_whose_session_was_not_made_yet_ends_after_an_hour(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        for number in (1, 2):
            await place.files.save_early_part("s", FileKind.UPLOAD, "u", number, b"x")
        clock.shift(HOUR_S - 1)
        assert len(await names_of_keys(place.gateway, "s")) == 2
        clock.shift(2)
        assert await names_of_keys(place.gateway, "s") == set()


class TestAFileThatASessionBeginsWith:
    async def test_lives_as_long_as_the_session(
        self, fake: MakePlace, clock: time_machine.Traveller
    ) -> None:
        place = fake()
        await place.upload("s", b"up", b"load")
        deadlines = await deadlines_ms(place.gateway, "s")
        assert deadlines.keys() == {
            *("metadata", "progress", "events", "ops", "upload", "upload:u:1", "upload:u:2")
        }
        assert len(set(deadlines.values())) == 1
        clock.shift(6 * 24 * HOUR_S)
        assert await read(place, "s", FileKind.UPLOAD) == b"upload"

    async def test_makes_one_session_when_the_reply_is_lost(
        self, wired: Place, proxy: Proxy
    ) -> None:
        await wired.upload("s0", b"x")
        proxy.drop_replies(1, to="EVALSHA")
        await wired.upload("s", b"up", b"load")
        assert await count_events(wired.gateway, "s") == 1
        assert await read(wired, "s", FileKind.UPLOAD) == b"upload"

    async def test_is_left_alone_by_a_result(self, place: Place) -> None:
        await place.upload("s", b"up", b"load")
        await place.store("s", "u", b"re", b"sult")
        await place.store("s", "v", b"another")
        assert await read(place, "s", FileKind.UPLOAD) == b"upload"
        assert await read(place, "s") == b"another"


class TestADeletedSession:
    @pytest.mark.parametrize("with_file", [False, True])
    @pytest.mark.parametrize("with_result", [False, True])
    @pytest.mark.parametrize("unfinished", [False, True])
    async def test_leaves_no_key(
        self, place: Place, *, with_file: bool, with_result: bool, unfinished: bool
    ) -> None:
        if with_file:
            await place.upload("s", b"up", b"load")
        else:
            await place.manager.set_metadata("s", "u", "w")
        if with_result:
            await place.store("s", "r", b"re", b"sult")
        if unfinished:
            await place.send("s", "x", b"un", b"finished")
        await place.manager.delete_session("s")
        assert await names_of_keys(place.gateway, "s") == set()

    async def test_leaves_no_key_of_a_body_of_2500_parts(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)
        info = describe("many", *[b"x"] * 2500)
        save = place.files.save_part

        async def send(numbers: range) -> None:
            for number in numbers:
                await save(session_id, FileKind.RESULT, "many", number, b"x")

        await asyncio.gather(*(send(range(first, 2501, 25)) for first in range(1, 26)))
        await place.place(session_id, info)
        assert len(await names_of_keys(place.gateway, session_id)) == len(PREPARED) + 1 + 2500
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()

    async def test_takes_no_part_that_comes_late(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        info = await place.send(session_id, "t", b"abc")
        await place.manager.delete_session(session_id)
        with pytest.raises(SessionNotFoundError):
            await place.send(session_id, "t", b"abc")
        with pytest.raises(SessionNotFoundError):
            await place.place(session_id, info)
        with pytest.raises(SessionNotFoundError):
            await place.files.get(session_id, FileKind.RESULT)
        assert await names_of_keys(place.gateway, session_id) == set()

    async def test_leaves_no_key_while_bodies_are_on_their_way(self, real: MakePlace) -> None:
        place = real()
        names = count()

        async def send(session_id: str) -> int:
            stored = 0
            while True:
                try:
                    await place.store(session_id, f"t{next(names)}", b"a", b"b", b"c")
                except SessionNotFoundError:
                    return stored
                stored += 1

        stored = 0
        for _ in range(10):
            session_id = await prepare(place.manager)
            sending = [asyncio.create_task(send(session_id)) for _ in range(5)]
            while await count_events(place.gateway, session_id) < 10:
                await asyncio.sleep(0)
            await place.manager.delete_session(session_id)
            stored += sum(await asyncio.gather(*sending))
            assert await names_of_keys(place.gateway, session_id) == set()
        assert stored >= 70


class TestAReaderOfABodyThatIsReplacedMeanwhile:
    async def test_gets_one_whole_or_knows_that_it_was_cut(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)

        def parts_of(number: int) -> list[bytes]:
            return [bytes([65 + number]) * (1 + number % 3) for _ in range(4)]

        await place.store(session_id, "t0", *parts_of(0))
        done = False
        seen: list[tuple[FileInfo, bytes]] = []

        async def watch() -> None:
            while not done:
                opened = await place.bodies.open(session_id, FileKind.RESULT)
                assert opened is not None
                content = b"".join([part async for part in opened.content])
                seen.append((opened.info, content))

        readers = [asyncio.create_task(watch()) for _ in range(4)]
        for number in range(1, 26):
            await place.store(session_id, f"t{number}", *parts_of(number))
        done = True
        await asyncio.gather(*readers)

        assert len({info.transfer for info, _ in seen}) > 3
        for info, content in seen:
            whole = b"".join(parts_of(int(info.transfer[1:])))
            assert info.size == len(whole)
            assert whole.startswith(content)

    async def test_whose_part_is_gone_though_it_was_not_replaced_is_told(
        self, place: Place
    ) -> None:
        session_id = await prepare(place.manager)
        await place.store(session_id, "t", b"abc", b"de")
        keys = place.gateway.keys.session(session_id)
        info = describe("t", b"abc", b"de")
        await place.gateway.command("DEL", keys.part(FileKind.RESULT, "t", 2))
        with pytest.raises(CorruptRecordError) as raised:
            await place.files.get_part(session_id, FileKind.RESULT, info, 2)
        assert raised.value.key == keys.part(FileKind.RESULT, "t", 2)
        await place.gateway.command("DEL", keys.part(FileKind.RESULT, "t", 1))
        with pytest.raises(CorruptRecordError) as raised:
            await place.files.get(session_id, FileKind.RESULT)
        assert raised.value.key == keys.body(FileKind.RESULT)
        await place.store(session_id, "t2", b"anew")
        assert await read(place, session_id) == b"anew"


class TestADamagedBody:
    @pytest.mark.parametrize(
        "kind", ["string", "list", "gone", "no transfer", "no parts", "no size"]
    )
    async def test_is_an_error_or_absent_and_goes_with_its_session(
        self, place: Place, kind: str
    ) -> None:
        session_id = await prepare(place.manager)
        await place.store(session_id, "t", b"abc", b"de")
        key = place.gateway.keys.session(session_id).body(FileKind.RESULT)
        match kind:
            case "gone":
                await place.gateway.command("DEL", key)
            case "string" | "list":
                until_ms = await place.gateway.command("PEXPIRETIME", key)
                await place.gateway.command("DEL", key)
                put = ("SET", key, "x") if kind == "string" else ("RPUSH", key, "x")
                await place.gateway.command(*put)
                await place.gateway.command("PEXPIREAT", key, until_ms)
            case _:
                await place.gateway.command("HDEL", key, kind.removeprefix("no "))
        if kind == "gone":
            assert await read(place, session_id) is None
        else:
            with pytest.raises(CorruptRecordError) as raised:
                await read(place, session_id)
            assert key in raised.value.key.split()
        step = await place.manager.get_step(session_id, 1)
        assert step is not None
        await place.manager.save_step(session_id, 1, {"a": 2})
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()

    @pytest.mark.parametrize("kind", ["no transfer", "no parts", "no size"])
    async def test_ends_when_another_one_is_stored(self, place: Place, kind: str) -> None:
        session_id = await prepare(place.manager)
        await place.store(session_id, "t", b"abc", b"de")
        key = place.gateway.keys.session(session_id).body(FileKind.RESULT)
        await place.gateway.command("HDEL", key, kind.removeprefix("no "))
        await place.store(session_id, "t2", b"anew")
        assert await read(place, session_id) == b"anew"

    async def test_that_is_no_body_at_all_is_replaced(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        key = place.gateway.keys.session(session_id).body(FileKind.RESULT)
        await place.gateway.command("SET", key, "x", "EX", 1000)
        await place.store(session_id, "t", b"anew")
        assert await read(place, session_id) == b"anew"


class Sent:
    """A result that comes with an Idempotency-Key, as a call over HTTP brings it."""

    content_type = "text/plain"
    filename = "a.txt"

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


class TestAResultWithAnIdempotencyKey:
    async def test_again_is_answered_with_the_first_and_leaves_no_part(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        first = await place.bodies.store_result(session_id, Sent(b"one"), request=keyed())
        names = await names_of_keys(place.gateway, session_id)
        await place.bodies.store_result(session_id, Sent(b"two"))
        events = await count_events(place.gateway, session_id)

        request = keyed()
        again = await place.bodies.store_result(session_id, Sent(b"one"), request=request)

        assert request.replayed
        assert again == first
        assert await read(place, session_id) == b"two"
        assert await count_events(place.gateway, session_id) == events
        assert len(await names_of_keys(place.gateway, session_id)) == len(names)

    async def test_with_another_body_is_refused_and_leaves_no_part(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        await place.bodies.store_result(session_id, Sent(b"one"), request=keyed())
        names = await names_of_keys(place.gateway, session_id)
        with pytest.raises(IdempotencyMismatchError):
            await place.bodies.store_result(session_id, Sent(b"two"), request=keyed())
        assert await read(place, session_id) == b"one"
        assert await names_of_keys(place.gateway, session_id) == names

    async def test_of_nothing_is_kept_too(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        first = await place.bodies.store_result(session_id, Sent(b""), request=keyed())
        assert await place.bodies.store_result(session_id, Sent(b""), request=keyed()) == first
        assert await read(place, session_id) == b""
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()
