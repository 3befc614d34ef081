"""Damage is not absence: what cannot be read is an error that names its key, and only that."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from app.errors import CorruptRecordError, SessionNotFoundError
from app.onboarding.events import BEFORE_ALL
from app.onboarding.files import FileKind
from app.onboarding.generation import ProgressEvent
from app.store.gateway import Gateway
from tests.store.conftest import MakePlace
from tests.store.sessions import Manager, Place, names_of_keys, prepare

FOREIGN = b"\x93NUMPY\x01\x00\xff\xfe{}\x00"
"""What nobody here would write; no UTF-8."""

STRING_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "foreign bytes": lambda _: FOREIGN,
    "foreign text": lambda _: b"hello",
    "foreign JSON": lambda _: b'{"hello":"world"}',
    "nothing": lambda _: b"",
    "its first half": lambda text: text[: len(text) // 2],
    "all but its last byte": lambda text: text[:-1],
    "twice itself": lambda text: text * 2,
    "a foreign byte in its answers": lambda text: text.replace(b'"a"', b'"\xff"'),
    "a number that is none in JSON": lambda text: text.replace(b'"step_id":', b'"step_id":0'),
}
TYPES = ["list", "hash"]

Call = Callable[[Manager, str], Awaitable[Any]]


class Damage(NamedTuple):
    """A session with one key at fault, and the whole name of that key."""

    session_id: str
    key: str


async def replace(gateway: Gateway, key: str, kind: str) -> None:
    """Put another type of value in the place of a key, with its lifetime."""
    until_ms = await gateway.command("PEXPIRETIME", key)
    await gateway.command("DEL", key)
    match kind:
        case "list":
            await gateway.command("RPUSH", key, "x")
        case "hash":
            await gateway.command("HSET", key, "x", "y")
        case "string":
            await gateway.command("SET", key, "x")
    await gateway.command("PEXPIREAT", key, until_ms)


async def spoil(gateway: Gateway, key: str, how: str) -> None:
    """Damage a string key, and leave its lifetime."""
    if how in TYPES:
        await replace(gateway, key, how)
    else:
        text = await gateway.command("GET", key)
        await gateway.command("SET", key, STRING_DAMAGE[how](text), "KEEPTTL")


async def assert_reported(call: Awaitable[Any], key: str) -> None:
    """The call fails as damaged, and a line of the log names the key."""
    with capture_logs() as lines, pytest.raises(CorruptRecordError) as raised:
        await call
    reported = [line for line in lines if line["event"] == "corrupt_record_found"]
    assert len(reported) == 1, lines
    assert reported[0]["log_level"] == "error"
    assert key in named(reported[0])
    assert key in raised.value.key.split()
    # The caller is told nothing about keys.
    assert "onboarding:" not in str(raised.value)


def named(line: EventDict) -> list[str]:
    return str(line["key"]).split()


def is_real(request: pytest.FixtureRequest) -> bool:
    return "valkey" in request.node.name


@pytest.mark.parametrize("how", [*STRING_DAMAGE, *TYPES])
class TestADamagedStep:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, how: str) -> Damage:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).step(2)
        await spoil(gateway, key, how)
        return Damage(session_id, key)

    async def test_is_an_error_that_names_its_key(self, manager: Manager, damage: Damage) -> None:
        session_id = damage.session_id
        await assert_reported(manager.get_step(session_id, 2), damage.key)
        await assert_reported(manager.get_all_steps(session_id), damage.key)
        await assert_reported(manager.patch_step(session_id, 2, {"b": 1}), damage.key)
        await assert_reported(manager.finalize(session_id), damage.key)

    async def test_leaves_the_others_alone_and_ends_when_it_is_written_over_or_deleted(
        self, manager: Manager, gateway: Gateway, damage: Damage, how: str
    ) -> None:
        session_id, key = damage
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}
        assert (await manager.save_step(session_id, 1, {"a": 2}))["version"] == 2
        assert (await manager.get_progress(session_id))["completed_steps"] == [1, 2]
        await manager.get_session_summary(session_id)

        assert (await manager.save_step(session_id, 2, {"a": 3}))["version"] == 2
        assert set(await manager.get_all_steps(session_id)) == {1, 2}

        await spoil(gateway, key, how)
        deleted = await manager.delete_step(session_id, 2)
        assert deleted["progress"]["completed_steps"] == [1]
        assert set(await manager.get_all_steps(session_id)) == {1}

        await manager.save_step(session_id, 2, {"a": 4})
        await spoil(gateway, key, how)
        await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()


class TestAStepThatIsGone:
    async def test_though_progress_counts_it_is_an_error(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).step(2)
        await gateway.command("DEL", key)
        await assert_reported(manager.get_all_steps(session_id), key)
        await assert_reported(manager.finalize(session_id), key)
        await assert_reported(manager.get_step(session_id, 2), key)

    async def test_or_of_another_number_is_an_error(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        keys = gateway.keys.session(session_id)
        other = await gateway.command("GET", keys.step(1))
        await gateway.command("SET", keys.step(2), other, "KEEPTTL")
        await assert_reported(manager.get_step(session_id, 2), keys.step(2))


@pytest.mark.parametrize("how", [*STRING_DAMAGE, *TYPES])
class TestADamagedDraft:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, how: str) -> Damage:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).draft(4)
        await spoil(gateway, key, how)
        return Damage(session_id, key)

    async def test_is_an_error_that_names_its_key(self, manager: Manager, damage: Damage) -> None:
        await assert_reported(manager.get_draft(damage.session_id, 4), damage.key)
        await assert_reported(manager.promote_draft_to_step(damage.session_id, 4), damage.key)

    async def test_leaves_the_rest_alone_and_ends_when_it_is_written_over_or_dropped(
        self,
        request: pytest.FixtureRequest,
        manager: Manager,
        gateway: Gateway,
        damage: Damage,
        how: str,
    ) -> None:
        session_id, key = damage
        other = await manager.get_draft(session_id, 3)
        assert other is not None
        assert other["data"] == {"a": 3}
        assert set(await manager.get_all_steps(session_id)) == {1, 2}

        await manager.save_draft(session_id, 4, {"a": 5})
        draft = await manager.get_draft(session_id, 4)
        assert draft is not None
        assert draft["data"] == {"a": 5}

        await spoil(gateway, key, how)
        if how not in {"foreign bytes", "a foreign byte in its answers"} or is_real(request):
            # The fake store cannot hold what is no UTF-8 in a script.
            assert await manager.delete_draft(session_id, 4) is None
            assert await manager.get_draft(session_id, 4) is None

        await manager.save_draft(session_id, 4, {"a": 6})
        await spoil(gateway, key, how)
        await manager.save_step(session_id, 4, {"a": 4})
        assert await manager.get_draft(session_id, 4) is None

        await manager.save_draft(session_id, 4, {"a": 7})
        await spoil(gateway, key, how)
        assert (await manager.finalize(session_id))["completed_steps"] == 3
        await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()


async def test_a_draft_of_another_type_is_no_absent_draft_in_the_summary(
    manager: Manager, gateway: Gateway
) -> None:
    session_id = await prepare(manager)
    await replace(gateway, gateway.keys.session(session_id).draft(4), "list")
    summary = await manager.get_session_summary(session_id)
    assert [step["step_id"] for step in summary["steps"] if step["has_draft"]] == [3, 4]


# An export is recognised by its ends alone; its checksum is for its reader.
@pytest.mark.parametrize("how", [*list(STRING_DAMAGE)[:-3], *TYPES])
class TestADamagedExport:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, how: str) -> Damage:
        session_id = await prepare(manager, finalized=True)
        key = gateway.keys.session(session_id).export
        await spoil(gateway, key, how)
        return Damage(session_id, key)

    async def test_is_an_error_that_names_its_key(self, manager: Manager, damage: Damage) -> None:
        await assert_reported(manager.get_export(damage.session_id), damage.key)
        await assert_reported(manager.finalize(damage.session_id), damage.key)

    async def test_leaves_the_answers_readable_and_ends_with_the_next_revision(
        self, manager: Manager, gateway: Gateway, damage: Damage, how: str
    ) -> None:
        session_id, key = damage
        assert set(await manager.get_all_steps(session_id)) == {1, 2}
        assert (await manager.get_session(session_id))["revision"] == 1
        await manager.reopen(session_id)
        await manager.finalize(session_id)
        export = await manager.get_export(session_id)
        assert export is not None
        assert export["revision"] == 2

        await spoil(gateway, key, how)
        await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()


class TestAnExportThatIsGone:
    async def test_though_the_session_is_finalized_is_an_error(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager, finalized=True)
        key = gateway.keys.session(session_id).export
        await gateway.command("DEL", key)
        await assert_reported(manager.finalize(session_id), key)
        await assert_reported(manager.get_export(session_id), key)


REPLACED = ["string", "list", "hash"]
"""In the place of a hash of ours; the hash is somebody else's."""

PROGRESS_DAMAGE: dict[str, dict[str, bytes | None]] = {
    "foreign steps": {"saved": FOREIGN},
    "steps of another alphabet": {"saved": b"1200000"},
    "empty steps": {"saved": b""},
    "no steps": {"saved": None},
    "a foreign mark": {"highest": FOREIGN},
    "no mark": {"highest": None},
    "a foreign status": {"status": FOREIGN},
    "no status": {"status": None},
    "a foreign deadline": {"deadline": FOREIGN},
    "no deadline": {"deadline": None},
    "a foreign time": {"created_at": FOREIGN},
    "no time": {"updated_at": None},
    "a foreign revision": {"revision": FOREIGN},
}

ONE_READ_MORE: dict[str, dict[str, bytes | None]] = {
    "a foreign version": {"v2": FOREIGN},
    "no version": {"v2": None},
    "an empty version": {"v2": b""},
    "two versions": {"v2": b"1,1"},
    "a version after a zero": {"v2": b"01"},
    "no number of JSON": {"v2": b"null"},
    "another number of JSON": {"v2": b"1.5"},
    "a version beyond all": {"v2": b"9" * 30},
    "a foreign time of a step": {"s2": FOREIGN},
    "a time of a step beyond the calendar": {"s2": b"253402300800000"},
    "a foreign count of changes": {"changes": FOREIGN},
    "no catalogue": {"catalogue": None},
    "a foreign catalogue": {"catalogue": FOREIGN},
}
"""Damage that a look at the progress does not meet, but a look at the session does."""

METADATA_DAMAGE: dict[str, dict[str, bytes | None]] = {
    "a foreign language": {"language": FOREIGN},
    "no language": {"language": None},
    "a foreign owner": {"user_id": FOREIGN},
    "a foreign workspace": {"workspace_id": FOREIGN},
    "foreign custom metadata": {"custom": FOREIGN},
    "custom metadata cut in half": {"custom": b'{"a":'},
    "custom metadata that are no object": {"custom": b"[]"},
    "no custom metadata": {"custom": None},
}

FIELD_DAMAGE = {**PROGRESS_DAMAGE, **ONE_READ_MORE, **METADATA_DAMAGE}

SESSION_READS: dict[str, Call] = {
    "get_session": lambda m, s: m.get_session(s),
    "get_all_steps": lambda m, s: m.get_all_steps(s),
    "get_session_summary": lambda m, s: m.get_session_summary(s),
    "finalize": lambda m, s: m.finalize(s),
}
SESSION_WRITES: dict[str, Call] = {
    "save_step": lambda m, s: m.save_step(s, 5, {"a": 1}),
    "delete_step": lambda m, s: m.delete_step(s, 1),
    "update_progress": lambda m, s: m.update_progress(s, 9),
    "save_draft": lambda m, s: m.save_draft(s, 5, {"a": 1}),
    "set_metadata": lambda m, s: m.set_metadata(s, "u", "w"),
}


async def spoil_hash(gateway: Gateway, key: str, how: str) -> None:
    """Damage a hash, and leave its lifetime."""
    if how in REPLACED:
        await replace(gateway, key, how)
    elif how == "gone":
        await gateway.command("DEL", key)
    else:
        for name, value in FIELD_DAMAGE[how].items():
            change = ("HDEL", key, name) if value is None else ("HSET", key, name, value)
            await gateway.command(*change)


class TestDamagedProgress:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, how: str) -> Damage:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).progress
        await spoil_hash(gateway, key, how)
        return Damage(session_id, key)

    @pytest.mark.parametrize("how", [*PROGRESS_DAMAGE, *REPLACED])
    async def test_is_an_error_of_every_look_at_the_progress(
        self, manager: Manager, damage: Damage
    ) -> None:
        await assert_reported(manager.get_progress(damage.session_id), damage.key)
        await assert_reported(manager.view_progress(damage.session_id), damage.key)

    @pytest.mark.parametrize("how", [*PROGRESS_DAMAGE, *ONE_READ_MORE, *REPLACED, "gone"])
    async def test_is_an_error_of_every_look_at_the_session_and_goes_with_it(
        self, manager: Manager, gateway: Gateway, damage: Damage
    ) -> None:
        for read in SESSION_READS.values():
            await assert_reported(read(manager, damage.session_id), damage.key)
        step = await manager.get_step(damage.session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}
        await manager.delete_session(damage.session_id)
        assert await names_of_keys(gateway, damage.session_id) == set()

    @pytest.mark.parametrize("how", ["no status", *REPLACED])
    async def test_is_no_absent_session_for_a_write(self, manager: Manager, damage: Damage) -> None:
        for write in SESSION_WRITES.values():
            await assert_reported(write(manager, damage.session_id), damage.key)

    @pytest.mark.parametrize(
        "how", ["foreign steps", "steps of another alphabet", "empty steps", "no steps"]
    )
    async def test_is_an_error_of_a_write_that_counts_steps_and_is_not_written_over(
        self, manager: Manager, damage: Damage
    ) -> None:
        for write in ("save_step", "delete_step", "update_progress"):
            await assert_reported(SESSION_WRITES[write](manager, damage.session_id), damage.key)
            await assert_reported(manager.get_progress(damage.session_id), damage.key)

    async def test_in_the_version_of_a_step_is_an_error_of_deleting_it_and_nothing_is_done(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).progress
        await gateway.command("HDEL", key, "v1")
        await assert_reported(manager.delete_step(session_id, 1), key)
        await gateway.command("HSET", key, "v1", "1")
        assert (await manager.delete_step(session_id, 1))["success"]

    async def test_in_the_version_of_a_step_that_was_deleted_is_an_error_of_saving_it_again(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        session_id = await prepare(manager)
        await manager.delete_step(session_id, 2)
        key = gateway.keys.session(session_id).progress
        await gateway.command("HSET", key, "v2", "half")
        await assert_reported(manager.save_step(session_id, 2, {"a": 1}), key)
        assert await manager.get_step(session_id, 2) is None
        assert (await manager.save_step(session_id, 1, {"a": 1}))["version"] == 2


class TestDamagedMetadata:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, how: str) -> Damage:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).metadata
        await spoil_hash(gateway, key, how)
        return Damage(session_id, key)

    @pytest.mark.parametrize("how", [*METADATA_DAMAGE, *REPLACED, "gone"])
    async def test_is_an_error_of_every_read_that_needs_it(
        self, manager: Manager, damage: Damage
    ) -> None:
        for read in ("get_session", "get_session_summary", "finalize"):
            await assert_reported(SESSION_READS[read](manager, damage.session_id), damage.key)

    @pytest.mark.parametrize("how", [*METADATA_DAMAGE, *REPLACED, "gone"])
    async def test_is_an_error_of_reopen(self, real: MakePlace, how: str) -> None:
        # Not on the fake store: its scripts cannot hold bytes that are no UTF-8.
        manager, gateway = real()
        session_id = await prepare(manager, finalized=True)
        key = gateway.keys.session(session_id).metadata
        await spoil_hash(gateway, key, how)
        await assert_reported(manager.reopen(session_id), key)

    @pytest.mark.parametrize("how", [*METADATA_DAMAGE, *REPLACED, "gone"])
    async def test_leaves_progress_and_each_step_alone_and_goes_with_the_session(
        self, manager: Manager, gateway: Gateway, damage: Damage
    ) -> None:
        session_id = damage.session_id
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}
        assert (await manager.save_step(session_id, 5, {"a": 5}))["version"] == 1
        assert (await manager.get_progress(session_id))["completed_steps"] == [1, 2, 5]
        await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()
        with pytest.raises(SessionNotFoundError):
            await manager.get_session(session_id)


class TestUnderAHashTag:
    @pytest.mark.parametrize("kind", ["string", "list"])
    @pytest.mark.parametrize("name", ["metadata", "progress", "events", "ops", "step:1"])
    async def test_a_delete_takes_a_damaged_session_along(
        self, fake: MakePlace, name: str, kind: str
    ) -> None:
        place = fake(key_hash_tag="on")
        session_id = await prepare(place.manager)
        await replace(place.gateway, place.gateway.keys.session(session_id).prefix + name, kind)
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()


@pytest.mark.parametrize("name", ["events", "ops"])
@pytest.mark.parametrize("kind", ["string", "list"])
class TestADamagedLogOrMemory:
    @pytest.fixture
    async def damage(self, manager: Manager, gateway: Gateway, name: str, kind: str) -> Damage:
        session_id = await prepare(manager)
        key = gateway.keys.session(session_id).prefix + name
        await replace(gateway, key, kind)
        return Damage(session_id, key)

    async def test_is_an_error_of_a_write_and_of_no_read_and_goes_with_the_session(
        self, place: Place, damage: Damage
    ) -> None:
        manager, gateway = place
        session_id = damage.session_id
        await assert_reported(manager.set_metadata(session_id, "u", "w"), damage.key)
        report = ProgressEvent(session_id, "a stage", 10)
        await assert_reported(place.generation.add_progress_event(report), damage.key)
        await assert_reported(
            place.generation.update_session_status(session_id, "processing"), damage.key
        )
        assert set(await manager.get_all_steps(session_id)) == {1, 2}
        assert (await manager.get_progress(session_id))["completed_steps"] == [1, 2]
        assert (await manager.get_session_summary(session_id))["stats"]["total_steps"] == 23
        assert (await place.generation.get_status(session_id))["status"] == "pending"
        assert await place.generation.get_language_preference(session_id) == "en"
        await manager.delete_session(session_id)
        assert await names_of_keys(gateway, session_id) == set()


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_a_damaged_log_is_an_error_of_every_look_at_it(place: Place, kind: str) -> None:
    session_id = await prepare(place.manager)
    key = place.gateway.keys.session(session_id).events
    await replace(place.gateway, key, kind)
    await assert_reported(place.events.list_after(session_id, BEFORE_ALL, None), key)
    await assert_reported(place.events.get_scene(session_id), key)


class TestALostCatalogue:
    @pytest.fixture
    def other(self, real: MakePlace, steps_file: Callable[[str], Any]) -> Place:
        text = (
            '{"version":"other","steps":[{"id":1,"key":"a","title":"A","phase":1,"required":true}]}'
        )
        return real(steps_file=steps_file(text))

    @pytest.mark.parametrize("left", [None, FOREIGN, b"{}", b'{"version":"other","steps":'])
    async def test_is_an_error_that_names_it(
        self, real: MakePlace, other: Place, left: bytes | None
    ) -> None:
        session_id = await other.manager.create_session(workspace_id="w")
        await other.manager.save_step(session_id, 1, {"a": 1})
        key, pin = other.gateway.keys.catalogues, other.manager.catalogue.pin
        change = ("HDEL", key, pin) if left is None else ("HSET", key, pin, left)
        await other.gateway.command(*change)
        current = real()
        await assert_reported(current.manager.get_all_steps(session_id), key)
        await assert_reported(current.manager.save_step(session_id, 1, {"a": 2}), key)
        step = await current.manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"a": 1}


GENERATION_DAMAGE: dict[str, tuple[str, bytes]] = {
    "a foreign progress": ("percent", FOREIGN),
    "a progress that is no number": ("percent", b"half"),
    "a foreign stage": ("stage", FOREIGN),
    "a foreign message": ("message", FOREIGN),
    "a foreign error": ("error_message", FOREIGN),
    "a foreign time of a report": ("reported_at", FOREIGN),
    "a foreign beginning of the run": ("run_at", FOREIGN),
    "a foreign progress at its beginning": ("run_percent", FOREIGN),
    "a foreign status": ("status", FOREIGN),
}


class TestADamagedGeneration:
    # Not on the fake store: its scripts cannot hold bytes that are no UTF-8.

    @pytest.mark.parametrize("how", GENERATION_DAMAGE)
    async def test_is_an_error_that_names_the_progress(self, real: MakePlace, how: str) -> None:
        place = real()
        session_id = await prepare(place.manager)
        await place.generation.update_session_status(session_id, "processing")
        key = place.gateway.keys.session(session_id).progress
        await place.gateway.command("HSET", key, *GENERATION_DAMAGE[how])
        await assert_reported(place.generation.get_status(session_id), key)
        await assert_reported(place.generation.get_latest_progress(session_id), key)
        await assert_reported(place.events.get_scene(session_id), key)
        step = await place.manager.get_step(session_id, 1)
        assert step is not None
        await place.manager.delete_session(session_id)
        assert await names_of_keys(place.gateway, session_id) == set()

    async def test_is_an_error_of_the_language(self, real: MakePlace) -> None:
        place = real()
        session_id = await prepare(place.manager)
        key = place.gateway.keys.session(session_id).metadata
        await place.gateway.command("HSET", key, "language", FOREIGN)
        await assert_reported(place.generation.get_language_preference(session_id), key)
        await assert_reported(place.events.get_scene(session_id), key)
        assert await place.generation.set_language_preference(session_id, "de") == "de"
        assert await place.generation.get_language_preference(session_id) == "de"

    async def test_that_has_no_language_is_an_error(self, place: Place) -> None:
        session_id = await prepare(place.manager)
        key = place.gateway.keys.session(session_id).metadata
        await place.gateway.command("HDEL", key, "language")
        await assert_reported(place.generation.get_language_preference(session_id), key)
        await assert_reported(place.events.get_scene(session_id), key)

    @pytest.mark.parametrize("field", ["filename", "content_type", "size", "parts", "stored_at"])
    async def test_is_an_error_of_a_result_that_is_described_in_foreign_bytes(
        self, real: MakePlace, field: str
    ) -> None:
        place = real()
        session_id = await prepare(place.manager)
        await place.store(session_id, "t", b"abc")
        key = place.gateway.keys.session(session_id).body(FileKind.RESULT)
        await place.gateway.command("HSET", key, field, FOREIGN)
        await assert_reported(place.generation.get_result(session_id), key)
        await place.store(session_id, "t2", b"anew")
        assert await place.generation.get_result(session_id) == b"anew"


FOREIGN_EVENTS: dict[str, list[str | bytes]] = {
    "no type": ["at", "1767268800000"],
    "no time": ["type", "progress"],
    "a time that is no number": ["type", "progress", "at", "noon"],
    "a foreign time": ["type", "progress", "at", FOREIGN],
    "a time beyond the calendar": ["type", "progress", "at", "9" * 30],
    "a progress that is no number": ["type", "progress", "at", "1", "progress", "half"],
    "a foreign message": ["type", "progress", "at", "1", "message", FOREIGN],
    "a foreign name": ["type", "progress", "at", "1", FOREIGN, "x"],
}


class TestAForeignEntryOfTheLog:
    @pytest.mark.parametrize("how", FOREIGN_EVENTS)
    async def test_is_an_error_that_names_the_log_and_of_no_other_read(
        self, real: MakePlace, how: str
    ) -> None:
        place = real()
        session_id = await prepare(place.manager)
        before = (await place.events.get_scene(session_id)).extent.newest
        assert before is not None
        key = place.gateway.keys.session(session_id).events
        await place.gateway.command("XADD", key, "*", *FOREIGN_EVENTS[how])
        await assert_reported(place.events.list_after(session_id, BEFORE_ALL, None), key)
        await assert_reported(place.generation.get_progress_events(session_id), key)
        events, _ = await place.events.list_after(session_id, BEFORE_ALL, 3)
        assert events[-1]["id"] == str(before)
        assert (await place.generation.get_status(session_id))["status"] == "pending"
        assert (await place.manager.save_step(session_id, 1, {"a": 2}))["version"] == 2
