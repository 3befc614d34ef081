"""The manager as a worker or a REPL uses it: without HTTP, on whatever store there is."""

import asyncio
import datetime as dt
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeServer
from redis.asyncio import Redis

import app
from app.errors import (
    BodyLostError,
    DraftNotFoundError,
    InvalidRequestError,
    InvalidStepDataError,
    InvalidStepIdError,
    NotFinalizedError,
    NothingToFinalizeError,
    SessionFinalizedError,
    SessionNotFoundError,
    StepNotFoundError,
    StepsMissingError,
    StoreUnavailableError,
    VersionConflictError,
)
from app.onboarding.exports import compute_checksum
from app.onboarding.files import FileInfo, FileKind
from app.onboarding.sessions import Owner
from app.onboarding.steps import Precondition, Tags
from app.services.manager import (
    OnboardingSessionManager,
    get_onboarding_session_manager,
    make_manager,
)
from app.store.connect import connect
from app.store.files import FileStore
from app.store.gateway import Gateway
from tests.conftest import QUICKLY, fake_gateway, known_settings
from tests.faults.servers import HOST, Valkey, free_ports

Manager = OnboardingSessionManager
MakeManager = Callable[..., Manager]

USAGE = """
import asyncio, json
from app.services.manager import get_onboarding_session_manager

async def main(session_id, user_id, workspace_id):
    manager = get_onboarding_session_manager()
    await manager.set_metadata(session_id, user_id, workspace_id)
    await manager.update_progress(session_id, 0)
    await manager.save_step(session_id, 1, {"company_name": "Test Corp"})
    progress = await manager.get_progress(session_id)
    all_steps = await manager.get_all_steps(session_id)
    summary = await manager.get_session_summary(session_id)
    await manager.delete_session(session_id)
    return progress, {n: step["data"] for n, step in all_steps.items()}, summary

outcome = asyncio.run(main("test-session-001", "user-1", "workspace-1"))
print("OUTCOME", json.dumps(outcome), flush=True)
"""


def check_usage(progress: Any, all_steps: Any, summary: Any) -> None:
    assert progress["completed"] == 1
    assert progress["total"] == 23
    assert progress["percentage"] == 4.35
    assert progress["highest_step"] == 1
    assert progress["next_step"] == 2
    assert {int(number): data for number, data in all_steps.items()} == {
        1: {"company_name": "Test Corp"}
    }
    assert summary["metadata"]["user_id"] == "user-1"
    assert summary["metadata"]["workspace_id"] == "workspace-1"
    assert summary["stats"]["completed_steps"] == 1


@pytest.fixture
async def manager_at(raw: Redis, valkey: Valkey) -> AsyncIterator[MakeManager]:
    """Make managers on the empty real store with settings of their own."""
    made: list[Manager] = []

    def make(**overrides: Any) -> Manager:
        settings = known_settings(**{**QUICKLY, "redis_url": valkey.url, **overrides})
        made.append(make_manager(connect(settings), settings))
        return made[-1]

    yield make
    for manager in made:
        await manager.aclose()


async def keys_of(gateway: Gateway) -> set[str]:
    found = await gateway.command("KEYS", "*")
    return {key.decode() for key in found if not key.startswith(b"onboarding:index:")}


class TestTheUsageExample:
    async def test_works_on_any_store(self, manager: Manager, gateway: Gateway) -> None:
        session_id = "test-session-001"
        await manager.set_metadata(session_id, "user-1", "workspace-1")
        await manager.update_progress(session_id, 0)
        await manager.save_step(session_id, 1, {"company_name": "Test Corp"})
        progress = await manager.get_progress(session_id)
        all_steps = await manager.get_all_steps(session_id)
        summary = await manager.get_session_summary(session_id)
        await manager.delete_session(session_id)
        check_usage(progress, {n: step["data"] for n, step in all_steps.items()}, summary)
        assert await keys_of(gateway) == set()

    def test_works_in_a_fresh_process_on_an_embedded_store(self, tmp_path: Path) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ONBOARDING_", "REDIS_", "UPSTASH_"))
        }
        environment["ONBOARDING_DATA_DIR"] = str(tmp_path / "data")
        environment["PYTHONPATH"] = str(Path(app.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", USAGE],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        [outcome] = [
            line.removeprefix("OUTCOME ")
            for line in done.stdout.splitlines()
            if line.startswith("OUTCOME ")
        ]
        check_usage(*json.loads(outcome))
        assert "Traceback" not in done.stderr
        # The store ended with its process, and cleared up.
        assert not [path for path in (tmp_path / "data").rglob("*") if path.is_socket()]

    def test_works_with_the_manager_of_the_process_on_a_configured_store(
        self, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REDIS_URL", valkey.url)
        get_onboarding_session_manager.cache_clear()

        async def use() -> Any:
            manager = get_onboarding_session_manager()
            assert manager is get_onboarding_session_manager()
            await manager.set_metadata("test-session-001", "user-1", "workspace-1")
            await manager.save_step("test-session-001", 1, {"company_name": "Test Corp"})
            summary = await manager.get_session_summary("test-session-001")
            await manager.delete_session("test-session-001")
            await manager.aclose()
            return summary

        try:
            assert asyncio.run(use())["stats"]["completed_steps"] == 1
        finally:
            get_onboarding_session_manager.cache_clear()


class TestCreate:
    async def test_with_nothing_makes_a_session_of_nobody(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        assert str(uuid.UUID(session_id, version=4)) == session_id
        session = await manager.get_session(session_id)
        assert {
            name: session[name]
            for name in ("session_id", "workspace_id", "user_id", "language", "status", "metadata")
        } == {
            "session_id": session_id,
            "workspace_id": None,
            "user_id": None,
            "language": "en",
            "status": "pending",
            "metadata": {},
        }
        assert session["finalized_at"] is None
        assert session["revision"] == 0
        assert session["progress"]["completed_steps"] == []
        assert session["progress"]["next_step"] == 1
        timestamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
        assert re.fullmatch(timestamp, session["created_at"])
        assert re.fullmatch(timestamp, session["expires_at"])
        assert session["expires_at"] > session["created_at"]

    async def test_with_everything_keeps_it(self, manager: Manager) -> None:
        metadata = {"source": {"campaign": "é"}, "n": 1.5, "list": [], "nothing": None}
        session_id = await manager.create_session(
            workspace_id="w", user_id="u", language="pt-BR", metadata=metadata
        )
        session = await manager.get_session(session_id)
        assert (session["workspace_id"], session["user_id"]) == ("w", "u")
        assert session["language"] == "pt-BR"
        assert session["metadata"] == metadata
        summary = await manager.get_session_summary(session_id)
        assert summary["metadata"]["custom"] == metadata

    async def test_makes_another_session_each_time(self, manager: Manager) -> None:
        assert await manager.create_session() != await manager.create_session()

    @pytest.mark.parametrize(
        "bad",
        [
            {"workspace_id": ""},
            {"workspace_id": "w" * 129},
            {"workspace_id": "a\nb"},
            {"user_id": "\x7f"},
            {"user_id": "\ud800"},
            {"language": ""},
            {"language": "english language"},
            {"language": "e"},
            {"metadata": {"a": float("nan")}},
            {"metadata": {1: "a"}},
        ],
        ids=repr,
    )
    async def test_refuses_what_it_cannot_keep(
        self, manager: Manager, gateway: Gateway, bad: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidRequestError):
            await manager.create_session(**bad)
        assert await keys_of(gateway) == set()


NOBODY = Owner(None, None, "de")
UPLOAD = FileInfo(
    transfer="t",
    parts=2,
    size=5,
    content_type="text/plain",
    filename="a.txt",
    checksum="sha256:0a",
    is_document=False,
    stored_ms=1_767_268_800_000,
)


class TestCreateWithAFile:
    @pytest.fixture
    def files(self, gateway: Gateway) -> FileStore:
        return FileStore(gateway, gateway)

    async def test_makes_a_session_of_its_owner_that_has_the_file_whose_parts_are_kept(
        self, manager: Manager, gateway: Gateway, files: FileStore
    ) -> None:
        for number, data in ((1, b"abc"), (2, b"de")):
            await files.save_early_part("s", FileKind.UPLOAD, "t", number, data)
        await manager.begin_session_with("s", NOBODY, upload=UPLOAD)

        session = await manager.get_session("s")
        assert (session["workspace_id"], session["user_id"]) == (None, None)
        assert (session["language"], session["status"]) == ("de", "pending")
        body = await files.get("s", FileKind.UPLOAD)
        assert body is not None
        assert (body.info, body.first) == (UPLOAD, b"abc")
        assert await files.get_part("s", FileKind.UPLOAD, UPLOAD, 2) == b"de"
        assert await files.get("s", FileKind.RESULT) is None
        await manager.save_step("s", 1, {"a": 1})
        await manager.delete_session("s")
        assert await keys_of(gateway) == set()

    @pytest.mark.parametrize("kept", [[], [1], [2]])
    async def test_makes_none_when_a_part_of_the_file_is_gone(
        self, manager: Manager, gateway: Gateway, files: FileStore, kept: list[int]
    ) -> None:
        for number in kept:
            await files.save_early_part("s", FileKind.UPLOAD, "t", number, b"x")
        before = await keys_of(gateway)
        with pytest.raises(BodyLostError):
            await manager.begin_session_with("s", NOBODY, upload=UPLOAD)
        assert await keys_of(gateway) == before
        with pytest.raises(SessionNotFoundError):
            await manager.get_session("s")


class TestTheSessionBlock:
    async def test_makes_it_on_entry_and_deletes_it_on_exit(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        async with manager.session(workspace_id="w", user_id="u") as session:
            session_id = session["session_id"]
            assert session["workspace_id"] == "w"
            await manager.save_step(session_id, 1, {"a": 1})
        with pytest.raises(SessionNotFoundError):
            await manager.get_session(session_id)
        assert await keys_of(gateway) == set()

    async def test_deletes_it_when_the_block_fails_and_lets_the_failure_through(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        async def fail() -> None:
            async with manager.session() as session:
                await manager.save_draft(session["session_id"], 1, {"a": 1})
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert await keys_of(gateway) == set()

    async def test_does_not_mind_when_it_was_deleted_in_the_block(self, manager: Manager) -> None:
        async with manager.session() as session:
            await manager.delete_session(session["session_id"])


class TestSetMetadata:
    async def test_of_an_unknown_id_makes_the_session(self, manager: Manager) -> None:
        await manager.set_metadata("new", "u", "w", {"a": 1})
        session = await manager.get_session("new")
        assert (session["user_id"], session["workspace_id"]) == ("u", "w")
        assert session["metadata"] == {"a": 1}
        assert session["progress"]["completed"] == 0

    async def test_of_a_known_id_changes_who_it_belongs_to_and_nothing_else(
        self, manager: Manager
    ) -> None:
        session_id = await manager.create_session(
            workspace_id="w1", user_id="u1", language="de", metadata={"a": 1}
        )
        await manager.save_step(session_id, 1, {"a": 1})
        before = await manager.get_session(session_id)
        await manager.set_metadata(session_id, "u2", "w2")
        after = await manager.get_session(session_id)
        assert (after["user_id"], after["workspace_id"]) == ("u2", "w2")
        assert after["metadata"] == {"a": 1}
        assert after["language"] == "de"
        assert after["created_at"] == before["created_at"]
        assert after["progress"]["completed_steps"] == [1]

    async def test_replaces_what_is_attached_when_it_is_given(self, manager: Manager) -> None:
        session_id = await manager.create_session(metadata={"a": 1, "b": 2})
        await manager.set_metadata(session_id, None, None, {"b": 3})
        assert (await manager.get_session(session_id))["metadata"] == {"b": 3}
        await manager.set_metadata(session_id, None, None, {})
        assert (await manager.get_session(session_id))["metadata"] == {}

    async def test_with_none_takes_the_owner_away(self, manager: Manager) -> None:
        session_id = await manager.create_session(workspace_id="w", user_id="u")
        await manager.set_metadata(session_id, None, None)
        session = await manager.get_session(session_id)
        assert (session["user_id"], session["workspace_id"]) == (None, None)

    async def test_is_refused_with_what_cannot_be_kept_and_makes_nothing(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        for user_id, metadata in (("a\x00", None), ("", None), ("u", {"a": float("inf")})):
            with pytest.raises(InvalidRequestError):
                await manager.set_metadata("new", user_id, "w", metadata)
        assert await keys_of(gateway) == set()


class TestUpdateProgress:
    async def test_moves_the_mark_up_and_never_down_and_saves_no_step(
        self, manager: Manager
    ) -> None:
        session_id = await manager.create_session()
        for step, mark in ((0, 0), (5, 5), (3, 5), (0, 5), (23, 23), (1, 23)):
            progress = await manager.update_progress(session_id, step)
            assert progress["highest_step"] == mark
            assert progress == await manager.get_progress(session_id)
        assert progress["completed"] == 0
        assert progress["next_step"] == 1

    async def test_is_moved_by_a_saved_step_and_stays_when_that_is_deleted(
        self, manager: Manager
    ) -> None:
        session_id = await manager.create_session()
        await manager.save_step(session_id, 7, {"a": 1})
        await manager.save_step(session_id, 2, {"a": 1})
        assert (await manager.get_progress(session_id))["highest_step"] == 7
        deleted = await manager.delete_step(session_id, 7)
        assert deleted["progress"]["highest_step"] == 7
        assert deleted["progress"]["completed_steps"] == [2]

    @pytest.mark.parametrize("step", [-1, 24, 10**6])
    async def test_refuses_what_is_no_step(self, manager: Manager, step: int) -> None:
        session_id = await manager.create_session()
        with pytest.raises(InvalidStepIdError):
            await manager.update_progress(session_id, step)
        assert (await manager.get_progress(session_id))["highest_step"] == 0

    async def test_of_an_unknown_session_makes_none(
        self, manager: Manager, gateway: Gateway
    ) -> None:
        with pytest.raises(SessionNotFoundError):
            await manager.update_progress("unknown", 1)
        assert await keys_of(gateway) == set()


class TestIds:
    @pytest.mark.parametrize(
        "session_id", ["a", "A-Z_a.z-0.9", "...", "-", "0", "x" * 500, "index", "idem", "canary"]
    )
    async def test_of_these_characters_work_for_everything(
        self, manager: Manager, gateway: Gateway, session_id: str
    ) -> None:
        await manager.set_metadata(session_id, "u", "w")
        await manager.save_step(session_id, 1, {"a": 1})
        await manager.save_draft(session_id, 2, {"a": 2})
        await manager.promote_draft_to_step(session_id, 2)
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert json.loads(step.text)["session_id"] == session_id
        answer = await manager.finalize(session_id)
        assert answer["business_context"]["session_id"] == session_id
        await manager.delete_session(session_id)
        assert await keys_of(gateway) == set()

    async def test_that_begin_alike_are_sessions_apart(self, manager: Manager) -> None:
        for session_id in ("a", "a.b", "ab", "A"):
            await manager.set_metadata(session_id, session_id, None)
            await manager.save_step(session_id, 1, {"of": session_id})
        await manager.delete_session("a")
        for session_id in ("a.b", "ab", "A"):
            step = await manager.get_step(session_id, 1)
            assert step is not None
            assert step["data"] == {"of": session_id}

    @pytest.mark.parametrize(
        "session_id",
        ["", " ", "a b", "a:b", "a/b", "{a}", "a*", "ä", "a\n", "\n", "a\x00", "../a%"],
    )
    async def test_of_others_are_refused_by_every_call(
        self, manager: Manager, gateway: Gateway, session_id: str
    ) -> None:
        for call in CALLS.values():
            with pytest.raises(InvalidRequestError):
                await call(manager, session_id)
        assert await keys_of(gateway) == set()


def nested(levels: int) -> dict[str, Any]:
    """A document of so many levels."""
    inner: Any = 1
    for _ in range(levels):
        inner = {"a": inner}
    assert isinstance(inner, dict)
    return inner


class Text(str):
    __slots__ = ()


BAD_VALUES: dict[str, Mapping[Any, Any]] = {
    "NaN": {"a": float("nan")},
    "infinity": {"a": [float("-inf")]},
    "a tuple": {"a": (1, 2)},
    "an empty tuple": {"a": ()},
    "a tuple inside": {"a": [{"b": (1,)}]},
    "a set": {"a": {1}},
    "a datetime": {"a": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)},
    "a date": {"a": dt.date(2026, 1, 1)},
    "a UUID": {"a": uuid.UUID(int=1)},
    "a decimal": {"a": Decimal("1.5")},
    "bytes": {"a": b"x"},
    "an object": {"a": object()},
    "an integer as a key": {1: "a"},
    "an integer as a key inside": {"a": {1: 2}},
    "None as a key": {None: "a"},
    "2**53": {"a": 2**53},
    "-2**53": {"a": [-(2**53)]},
    "2**64": {"a": 2**64},
    "a huge integer": {"a": 10**500},
    "a lone surrogate": {"a": "\ud800"},
    "a lone surrogate as a key": {"\udfff": 1},
    "65 levels": nested(65),
    "100 levels": nested(100),
    "1000 levels": nested(1000),
    "100 levels of lists": {"a": json.loads("[" * 100 + "]" * 100)},
}

GOOD_VALUES: dict[str, dict[str, Any]] = {
    "64 levels": nested(64),
    "many brackets in a string": {"a": "{[" * 500},
    "2**53-1": {"a": [2**53 - 1, -(2**53) + 1]},
    "floats": {"a": [0.1, -0.0, 1e308, 5e-324, 1.0]},
    "constants": {"a": [True, False, None]},
    "an emoji and a NUL": {"a": "😀\x00"},
    "empty names and values": {"": {"": [[], {}, ""]}},
    "what looks like a record": {"data": {"a": 1}, "step_id": 9, "version": 9, "saved_at": "x"},
    "what looks like the end of one": {"a": '"}]}}', "draft_id": '"draft_id":"0f"'},
}


class TestPythonValues:
    @pytest.mark.parametrize("name", BAD_VALUES)
    async def test_that_json_cannot_hold_are_refused_and_nothing_is_stored(
        self, manager: Manager, gateway: Gateway, name: str
    ) -> None:
        bad = BAD_VALUES[name]
        session_id = await manager.create_session()
        await manager.save_step(session_id, 2, {"a": 1})
        before = await keys_of(gateway)
        view = await manager.view_progress(session_id)
        with pytest.raises(InvalidStepDataError):
            await manager.save_step(session_id, 1, bad)
        with pytest.raises(InvalidStepDataError):
            await manager.save_steps(session_id, {1: {"a": 1}, 3: bad})
        with pytest.raises(InvalidStepDataError):
            await manager.save_draft(session_id, 1, bad)
        with pytest.raises(InvalidStepDataError):
            await manager.patch_step(session_id, 2, bad)
        with pytest.raises(InvalidRequestError):
            await manager.create_session(metadata=bad)
        assert await keys_of(gateway) == before
        assert await manager.view_progress(session_id) == view
        step = await manager.get_step(session_id, 2)
        assert step is not None
        assert step["data"] == {"a": 1}

    @pytest.mark.parametrize("name", GOOD_VALUES)
    async def test_that_json_can_hold_come_back_as_they_went_in(
        self, manager: Manager, name: str
    ) -> None:
        good = GOOD_VALUES[name]
        session_id = await manager.create_session(metadata=good)
        await manager.save_step(session_id, 1, good)
        await manager.save_draft(session_id, 2, good)
        await manager.promote_draft_to_step(session_id, 2)
        for number in (1, 2):
            step = await manager.get_step(session_id, number)
            assert step is not None
            assert repr(step["data"]) == repr(good)
        assert repr((await manager.get_session(session_id))["metadata"]) == repr(good)
        export = (await manager.finalize(session_id))["business_context"]
        assert repr(export["steps"]["1"]["data"]) == repr(good)
        assert export["checksum"] == compute_checksum(export)

    async def test_that_change_after_the_call_change_nothing_that_was_saved(
        self, manager: Manager
    ) -> None:
        session_id = await manager.create_session()
        data: dict[str, Any] = {"list": [1]}
        await manager.save_step(session_id, 1, data)
        data["list"].append(2)
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert step["data"] == {"list": [1]}

    @pytest.mark.parametrize("bad", [None, [], "text", 1, [1], {1}], ids=repr)
    async def test_that_are_no_object_are_refused(self, manager: Manager, bad: Any) -> None:
        session_id = await manager.create_session()
        with pytest.raises((InvalidStepDataError, TypeError, ValueError)):
            await manager.save_step(session_id, 1, bad)
        assert await manager.get_step(session_id, 1) is None


class TestReads:
    async def test_of_what_is_absent_in_a_session_are_none(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        assert await manager.get_step(session_id, 1) is None
        assert await manager.get_draft(session_id, 1) is None
        assert await manager.get_export(session_id) is None
        steps = await manager.get_all_steps(session_id)
        assert steps == {}
        assert steps.missing == list(range(1, 24))

    @pytest.mark.parametrize("step", [0, -1, 24, 10**9])
    async def test_of_what_is_no_step_are_errors(self, manager: Manager, step: int) -> None:
        session_id = await manager.create_session()
        for read in (manager.get_step, manager.get_draft, manager.delete_step):
            with pytest.raises(InvalidStepIdError):
                await read(session_id, step)
        with pytest.raises(InvalidStepIdError):
            await manager.save_step(session_id, step, {"a": 1})

    async def test_of_a_step_are_a_mapping_and_its_version(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        await manager.save_step(session_id, 1, {"a": 1})
        step = await manager.get_step(session_id, 1)
        assert step is not None
        assert dict(step) == {
            "session_id": session_id,
            "step_id": 1,
            "data": {"a": 1},
            "version": 1,
            "saved_at": step["saved_at"],
            "is_draft": False,
        }
        assert step.version == 1
        assert json.loads(step.text) == dict(step)


class TestStates:
    async def test_finalize_is_final_until_reopened(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        with pytest.raises(NothingToFinalizeError):
            await manager.finalize(session_id)
        with pytest.raises(NothingToFinalizeError):
            await manager.finalize(session_id, force=True)
        with pytest.raises(NotFinalizedError):
            await manager.reopen(session_id)
        await manager.save_step(session_id, 1, {"a": 1})
        await manager.save_draft(session_id, 2, {"a": 2})
        answer = await manager.finalize(session_id)
        assert (await manager.finalize(session_id)).text == answer.text
        for locked in (
            manager.save_step(session_id, 1, {"a": 2}),
            manager.save_steps(session_id, {3: {"a": 2}}),
            manager.patch_step(session_id, 1, {"b": 2}),
            manager.delete_step(session_id, 1),
            manager.save_draft(session_id, 1, {"a": 2}),
            manager.delete_draft(session_id, 2),
            manager.promote_draft_to_step(session_id, 2),
        ):
            with pytest.raises(SessionFinalizedError):
                await locked
        view = await manager.reopen(session_id)
        assert (view["revision"], view["finalized_at"]) == (1, None)
        export = await manager.get_export(session_id)
        assert export is not None
        assert export.text in answer.text
        await manager.save_step(session_id, 1, {"a": 2})
        assert (await manager.finalize(session_id))["business_context"]["revision"] == 2

    async def test_finalize_names_what_is_missing_unless_it_is_forced(
        self, manager_at: MakeManager
    ) -> None:
        for requires, without in (("required", [17, 21, 22, 23]), ("all", [17, 21, 22, 23])):
            manager = manager_at(finalize_requires=requires)
            session_id = await manager.create_session()
            saved = [number for number in range(1, 24) if number not in without]
            await manager.save_steps(session_id, {number: {"a": 1} for number in saved})
            with pytest.raises(StepsMissingError) as raised:
                await manager.finalize(session_id)
            assert raised.value.missing == ([23] if requires == "required" else without)
            answer = await manager.finalize(session_id, force=True)
            assert answer["business_context"]["missing_steps"] == without
            assert answer["business_context"]["complete"] is False

    async def test_an_export_is_complete_without_the_optional_steps(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        required = [number for number in range(1, 24) if number not in {17, 21, 22}]
        await manager.save_steps(session_id, {number: {"a": 1} for number in required})
        export = (await manager.finalize(session_id))["business_context"]
        assert export["complete"] is True
        assert export["missing_steps"] == [17, 21, 22]

    async def test_a_version_goes_on_after_a_delete(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        await manager.save_step(session_id, 1, {"a": 1})
        await manager.save_step(session_id, 1, {"a": 2})
        await manager.delete_step(session_id, 1)
        with pytest.raises(StepNotFoundError):
            await manager.delete_step(session_id, 1)
        with pytest.raises(StepNotFoundError):
            await manager.patch_step(session_id, 1, {"a": 1})
        condition = Precondition(Tags(versions=frozenset({2})))
        with pytest.raises(VersionConflictError) as raised:
            await manager.save_step(session_id, 1, {"a": 3}, precondition=condition)
        assert raised.value.current_version is None
        assert (await manager.save_step(session_id, 1, {"a": 3}))["version"] == 3

    async def test_a_saved_step_takes_its_draft_along(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        await manager.save_draft(session_id, 1, {"a": 1})
        await manager.save_draft(session_id, 2, {"a": 1})
        await manager.save_step(session_id, 1, {"a": 2})
        assert await manager.get_draft(session_id, 1) is None
        assert await manager.get_draft(session_id, 2) is not None
        with pytest.raises(DraftNotFoundError):
            await manager.promote_draft_to_step(session_id, 1)
        with pytest.raises(DraftNotFoundError):
            await manager.delete_draft(session_id, 1)

    async def test_a_draft_may_be_empty_but_not_become_a_step_so(self, manager: Manager) -> None:
        session_id = await manager.create_session()
        await manager.save_draft(session_id, 1, {})
        draft = await manager.get_draft(session_id, 1)
        assert draft is not None
        assert draft["data"] == {}
        with pytest.raises(InvalidStepDataError):
            await manager.promote_draft_to_step(session_id, 1)
        assert await manager.get_draft(session_id, 1) is not None


CALLS: dict[str, Callable[[Manager, str], Awaitable[Any]]] = {
    "get_session": lambda m, s: m.get_session(s),
    "set_metadata": lambda m, s: m.set_metadata(s, "u", "w"),
    "delete_session": lambda m, s: m.delete_session(s),
    "save_step": lambda m, s: m.save_step(s, 1, {"a": 1}),
    "save_steps": lambda m, s: m.save_steps(s, {1: {"a": 1}}),
    "patch_step": lambda m, s: m.patch_step(s, 1, {"a": 1}),
    "get_step": lambda m, s: m.get_step(s, 1),
    "get_all_steps": lambda m, s: m.get_all_steps(s),
    "delete_step": lambda m, s: m.delete_step(s, 1),
    "save_draft": lambda m, s: m.save_draft(s, 1, {"a": 1}),
    "get_draft": lambda m, s: m.get_draft(s, 1),
    "delete_draft": lambda m, s: m.delete_draft(s, 1),
    "promote_draft_to_step": lambda m, s: m.promote_draft_to_step(s, 1),
    "get_progress": lambda m, s: m.get_progress(s),
    "view_progress": lambda m, s: m.view_progress(s),
    "update_progress": lambda m, s: m.update_progress(s, 1),
    "get_session_summary": lambda m, s: m.get_session_summary(s),
    "write_summary": lambda m, s: m.write_summary(s),
    "finalize": lambda m, s: m.finalize(s),
    "get_export": lambda m, s: m.get_export(s),
    "reopen": lambda m, s: m.reopen(s),
    "begin_session_with": lambda m, s: m.begin_session_with(s, NOBODY, upload=UPLOAD),
}

MAKING = {"set_metadata", "begin_session_with"}
"""The calls that make a session which is not there."""


def public_calls_about_a_session() -> set[str]:
    return {
        name
        for name, member in vars(OnboardingSessionManager).items()
        if not name.startswith("_")
        and callable(member)
        and "session_id" in member.__code__.co_varnames[: member.__code__.co_argcount]
    }


def test_these_are_all_calls_about_a_session() -> None:
    assert set(CALLS) == public_calls_about_a_session()


class TestAnUnknownSession:
    @pytest.mark.parametrize("name", sorted(CALLS.keys() - MAKING))
    async def test_is_an_error_of_every_call_and_is_not_made_by_any(
        self, manager: Manager, gateway: Gateway, name: str
    ) -> None:
        with pytest.raises(SessionNotFoundError):
            await CALLS[name](manager, "unknown")
        assert await keys_of(gateway) == set()


class TestAnOutage:
    @pytest.fixture
    async def away(self) -> AsyncIterator[Manager]:
        server = FakeServer()
        gateway = fake_gateway(server)
        manager = make_manager(gateway, known_settings())
        await manager.set_metadata("known", "u", "w")
        await manager.save_step("known", 1, {"a": 1})
        server.connected = False
        yield manager
        await gateway.aclose()

    @pytest.mark.parametrize("name", CALLS)
    async def test_is_an_error_of_every_call_and_no_absence(self, away: Manager, name: str) -> None:
        for session_id in ("known", "unknown"):
            with pytest.raises(StoreUnavailableError):
                await CALLS[name](away, session_id)

    async def test_is_an_error_of_making_a_session(self, away: Manager) -> None:
        with pytest.raises(StoreUnavailableError):
            await away.create_session()
        with pytest.raises(StoreUnavailableError):
            async with away.session():
                pass

    async def test_that_begins_in_a_block_is_told_at_its_end(self) -> None:
        server = FakeServer()
        gateway = fake_gateway(server)
        manager = make_manager(gateway, known_settings())
        with pytest.raises(StoreUnavailableError):
            async with manager.session():
                server.connected = False
        await gateway.aclose()

    async def test_does_not_hide_a_bad_argument(self, away: Manager) -> None:
        with pytest.raises(InvalidStepIdError):
            await away.update_progress("known", -1)
        with pytest.raises(InvalidStepDataError):
            await away.save_step("known", 1, {"a": float("nan")})
        with pytest.raises(InvalidRequestError):
            await away.get_progress("a:b")


HEALTH = ("redis_connection", "set_operation", "get_operation", "delete_operation")


class TestHealthCheck:
    async def test_of_a_store_that_works_is_all_true_and_leaves_nothing(
        self, manager_at: MakeManager, raw: Redis
    ) -> None:
        manager = manager_at()
        assert await manager.health_check() == dict.fromkeys((*HEALTH, "overall_healthy"), True)
        assert await raw.keys() == []

    async def test_of_a_store_that_is_away_is_all_false_and_no_error(
        self, manager_at: MakeManager
    ) -> None:
        [port] = free_ports(1)
        manager = manager_at(redis_url=f"redis://{HOST}:{port}/0")
        assert await manager.health_check() == dict.fromkeys((*HEALTH, "overall_healthy"), False)

    async def test_of_a_store_that_takes_no_writes_tells_what_works(
        self, manager_at: MakeManager, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with Valkey.start(tmp_path_factory.mktemp("full")) as server:
            server.command("CONFIG", "SET", "maxmemory", 1)
            manager = manager_at(redis_url=server.url)
            found = await manager.health_check()
            assert found["redis_connection"] is True
            assert found["set_operation"] is False
            assert found["overall_healthy"] is False

    async def test_of_a_frozen_store_is_told_within_two_seconds(
        self, manager_at: MakeManager, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with Valkey.start(tmp_path_factory.mktemp("frozen")) as server:
            manager = manager_at(redis_url=server.url)
            server.freeze()
            async with asyncio.timeout(2.5):
                assert (await manager.health_check())["overall_healthy"] is False
            server.thaw()


class TestCatalogues:
    TWO = json.dumps(
        {
            "version": "two",
            "steps": [
                {"id": 1, "key": "a", "title": "A", "phase": 1, "required": True},
                {
                    "id": 2,
                    "key": "b",
                    "title": "B",
                    "phase": 1,
                    "required": False,
                    "schema": {
                        "type": "object",
                        "properties": {"n": {"type": "integer", "minimum": 1}},
                        "required": ["n"],
                    },
                },
            ],
        }
    )

    @pytest.fixture
    def both(
        self, manager_at: MakeManager, steps_file: Callable[[str], Path]
    ) -> tuple[Manager, Manager]:
        """A manager with the packaged steps, and one with two."""
        return manager_at(), manager_at(steps_file=steps_file(self.TWO))

    async def test_a_session_keeps_the_one_it_began_with(
        self, both: tuple[Manager, Manager]
    ) -> None:
        packaged, two = both
        session_id = await two.create_session()
        await packaged.save_step(session_id, 1, {"a": 1})
        progress = await packaged.get_progress(session_id)
        assert (progress["total"], progress["percentage"]) == (2, 50.0)
        assert (await packaged.get_all_steps(session_id)).missing == [2]
        assert len((await packaged.get_session_summary(session_id))["steps"]) == 2
        with pytest.raises(InvalidStepIdError):
            await packaged.save_step(session_id, 3, {"a": 1})
        with pytest.raises(InvalidStepIdError):
            await packaged.update_progress(session_id, 3)
        assert (await packaged.finalize(session_id))["total_steps"] == 2
        export = await packaged.get_export(session_id)
        assert export is not None
        assert (export["catalogue_version"], export["missing_steps"]) == ("two", [2])

    async def test_a_session_with_more_steps_than_the_current_one_works_whole(
        self, both: tuple[Manager, Manager]
    ) -> None:
        packaged, two = both
        session_id = await packaged.create_session()
        await two.save_step(session_id, 23, {"a": 1})
        assert set(await two.get_all_steps(session_id)) == {23}
        assert len((await two.get_session_summary(session_id))["steps"]) == 23
        step = await two.get_step(session_id, 23)
        assert step is not None
        await two.save_draft(session_id, 22, {"a": 1})
        await two.promote_draft_to_step(session_id, 22)
        await two.patch_step(session_id, 23, {"b": 1})
        assert (await two.delete_step(session_id, 22))["progress"]["completed_steps"] == [23]
        assert (await two.finalize(session_id))["completed_steps"] == 1

    async def test_a_session_with_more_steps_is_deleted_whole(
        self, both: tuple[Manager, Manager], raw: Redis
    ) -> None:
        packaged, two = both
        session_id = await packaged.create_session()
        await packaged.save_step(session_id, 23, {"a": 1})
        await packaged.save_draft(session_id, 22, {"a": 1})
        await two.delete_session(session_id)
        assert await raw.keys(f"onboarding:{session_id}:*") == []

    async def test_the_largest_one_works_whole(
        self, manager_at: MakeManager, steps_file: Callable[[str], Path], raw: Redis
    ) -> None:
        steps = [
            {"id": n, "key": f"s{n}", "title": "S", "phase": 1, "required": True}
            for n in range(1, 1000)
        ]
        manager = manager_at(steps_file=steps_file(json.dumps({"version": "l", "steps": steps})))
        session_id = await manager.create_session()
        saved = await manager.save_steps(session_id, {n: {"n": n} for n in range(1, 1000)})
        assert saved["progress"]["percentage"] == 100.0
        assert saved["progress"]["next_step"] is None
        await manager.save_draft(session_id, 999, {"n": 0})
        assert len(await manager.get_all_steps(session_id)) == 999
        assert len((await manager.get_session_summary(session_id))["steps"]) == 999
        assert (await manager.finalize(session_id))["completed_steps"] == 999
        await manager.delete_session(session_id)
        assert await raw.keys(f"onboarding:{session_id}:*") == []

    async def test_a_step_is_checked_by_the_schema_of_the_sessions_own(
        self, both: tuple[Manager, Manager]
    ) -> None:
        packaged, two = both
        session_id = await two.create_session()
        for manager in (two, packaged):
            with pytest.raises(InvalidStepDataError) as raised:
                await manager.save_step(session_id, 2, {"n": 0})
            assert [fault["pointer"] for fault in raised.value.faults] == ["/data/n"]
            # A draft is not checked, until it is to be a step.
            await manager.save_draft(session_id, 2, {"n": "secret answer"})
            with pytest.raises(InvalidStepDataError) as raised:
                await manager.promote_draft_to_step(session_id, 2)
            assert "secret" not in str(raised.value) + str(raised.value.faults)
            await manager.save_step(session_id, 2, {"n": 1})
            with pytest.raises(InvalidStepDataError):
                await manager.patch_step(session_id, 2, {"n": None})

    async def test_a_catalogue_that_came_after_a_first_fault_is_known_soon(
        self, both: tuple[Manager, Manager], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As while a new version of the service is rolled out beside the old one.
        monkeypatch.setattr("app.services.manager.LEARN_EVERY_S", 0.05)
        packaged, two = both
        own = await two.create_session()
        with pytest.raises(InvalidStepDataError):
            await two.save_step(own, 2, {"n": 0})
        session_id = await packaged.create_session()
        async with asyncio.timeout(3):
            while True:
                try:
                    saved = await two.save_step(session_id, 2, {"n": "anything"})
                except InvalidStepDataError:
                    await asyncio.sleep(0.05)
                else:
                    break
        assert saved["version"] == 1
        assert (await two.save_step(session_id, 23, {"a": 1}))["version"] == 1


@pytest.fixture(autouse=True)
def no_store_beside_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test that reaches for an embedded store by mistake find none of anybody's."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / ".data").exists()
