"""A session against a plain model of one: any order of calls, read back after each of them."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from redis.asyncio import Redis

from app.errors import (
    DraftNotFoundError,
    GenerationRunningError,
    InvalidStepDataError,
    InvalidStepIdError,
    InvalidTransitionError,
    NotFinalizedError,
    NothingToFinalizeError,
    OnboardingError,
    SessionFinalizedError,
    SessionNotFoundError,
    StepNotFoundError,
    StepsMissingError,
    VersionConflictError,
)
from app.onboarding.documents import merge_patch
from app.onboarding.events import BEFORE_ALL, EventView
from app.onboarding.exports import compute_checksum
from app.onboarding.generation import ProgressEvent, ProgressEventView
from app.onboarding.steps import NO_PRECONDITION, Precondition, Tags
from app.services.files import make_file_service
from app.services.generation import GenerationService
from app.services.manager import OnboardingSessionManager, make_manager
from app.store.connect import connect
from app.store.events import EventStore
from tests.conftest import known_settings
from tests.faults.servers import Valkey

T = TypeVar("T")
Answers = dict[str, Any]

TOTAL = 23
OPTIONAL = {17, 21, 22}
INDEX = "onboarding:index:"
JOBS = INDEX + "jobs"

numbers = st.sampled_from([1, 2, 3, 17, 23])
"""Few steps, so that they meet; the last one and an optional one among them."""

names = st.sampled_from(["a", "b", "é", "data", ""])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
answers = st.dictionaries(names, values, min_size=1, max_size=3)

conditions = st.sampled_from(
    ["none", "none", "none", "match", "match any", "match another", "none match any", "both"]
)


MAY_FOLLOW = {
    ("pending", "processing"),
    ("pending", "error"),
    ("processing", "complete"),
    ("processing", "error"),
    ("error", "processing"),
    ("complete", "processing"),
}
"""Which status may follow which."""

messages = st.none() | st.sampled_from(["m", "été"])
event_ids = st.none() | st.sampled_from(["e1", "e2", "e3"])
results = st.binary(max_size=20) | st.dictionaries(names, values, max_size=2)


@dataclass
class Model:
    """What a session is, if everything holds."""

    steps: dict[int, Answers] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    drafts: dict[int, Answers] = field(default_factory=dict)
    highest: int = 0
    revision: int = 0
    finalized: bool = False
    export: bytes | None = None
    user_id: str | None = None
    status: str = "pending"
    percent: int = 0
    stage: str | None = None
    message: str | None = None
    error_message: str | None = None
    language: str = "en"
    result: bytes | Answers | None = None
    log: list[str] = field(default_factory=lambda: ["session_created"])
    """The types of the events, in order."""

    taken: dict[str, ProgressEventView] = field(default_factory=dict)
    """Reports of progress by the ids that their senders gave."""

    def version(self, number: int) -> int | None:
        return self.versions[number] if number in self.steps else None

    def save(self, number: int, data: Answers) -> int:
        self.steps[number] = data
        self.versions[number] = self.versions.get(number, 0) + 1
        self.drafts.pop(number, None)
        self.highest = max(self.highest, number)
        self.log.append("step_saved")
        return self.versions[number]

    def conditions(self, kind: str, number: int) -> tuple[Precondition, bool]:
        """Make a precondition of a kind, and say whether it holds for a step."""
        version = self.version(number)
        current, another = version or 1, self.versions.get(number, 0) + 7
        present = version is not None
        match kind:
            case "match":
                return Precondition(Tags(versions=frozenset({another, current}))), present
            case "match any":
                return Precondition(Tags(any_version=True)), present
            case "match another":
                return Precondition(Tags(versions=frozenset({another}))), False
            case "none match any":
                return Precondition(if_none_match=Tags(any_version=True)), not present
            case "both":
                tags = Tags(versions=frozenset({current}))
                return Precondition(tags, tags), False
        return NO_PRECONDITION, True


class SessionMachine(RuleBasedStateMachine):
    """The subclass made for a test has what it runs on."""

    runner: asyncio.Runner
    raw: Redis
    lenient: OnboardingSessionManager
    strict: OnboardingSessionManager
    """Finalizes only when all required steps are saved."""

    generation: GenerationService
    log: EventStore

    def __init__(self) -> None:
        super().__init__()
        self.id = ""
        self.model: Model | None = None
        self.jobs: list[tuple[str, int]] = []

    # --- How it is done ---------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def refused(self, work: Coroutine[Any, Any, Any], *errors: type[OnboardingError]) -> Any:
        """The call fails with one of these errors, and nothing is changed."""
        with pytest.raises(errors) as raised:
            self.run(work)
        self.read_back()
        return raised.value

    def read_back(self) -> None:
        """Everything that can be read is as the model says."""
        self.run(self._read_back())

    async def _read_back(self) -> None:
        model, manager = self.model, self.lenient
        names, deadlines = await self._look()
        assert await self._read_jobs() == self.jobs
        if model is None:
            assert names == []
            reads: list[Callable[[str], Awaitable[Any]]] = [
                manager.get_progress,
                manager.get_session,
                manager.get_all_steps,
                manager.get_session_summary,
                manager.get_export,
                self.generation.get_status,
                self.generation.get_language_preference,
                self.generation.get_progress_events,
                self.generation.get_result,
            ]
            for read in reads:
                with pytest.raises(SessionNotFoundError):
                    await read(self.id)
            return

        saved = sorted(model.steps)
        assert set(names) == {
            *("metadata", "progress", "events", "ops"),
            *(f"step:{number}" for number in saved),
            *(f"draft:{number}" for number in model.drafts),
            *(["export"] if model.export else []),
            *(["result"] if model.result is not None else []),
            *(["result:*:1"] if model.result or model.result == {} else []),
        }
        own = {at for name, at in zip(names, deadlines, strict=True) if name.startswith("draft")}
        shared = {at for name, at in zip(names, deadlines, strict=True) if name[:5] != "draft"}
        assert len(shared) == 1
        assert all(0 < at <= min(shared) for at in own)

        view = await manager.view_progress(self.id)
        progress = view["progress"]
        missing = [number for number in range(1, TOTAL + 1) if number not in model.steps]
        assert progress["completed"] == len(saved)
        assert progress["completed_steps"] == saved
        assert progress["highest_step"] == model.highest
        assert progress["next_step"] == missing[0]
        assert progress["percentage"] == round(100 * len(saved) / TOTAL, 2)
        assert view["revision"] == model.revision
        assert (view["finalized_at"] is not None) is model.finalized
        assert view["status"] == model.status

        steps = await manager.get_all_steps(self.id)
        assert {number: step["data"] for number, step in steps.items()} == model.steps
        assert {number: step.version for number, step in steps.items()} == {
            number: model.versions[number] for number in saved
        }
        assert steps.missing == missing

        summary = await manager.get_session_summary(self.id)
        assert summary["progress"] == progress
        assert summary["metadata"]["user_id"] == model.user_id
        lines = {line["step_id"]: line for line in summary["steps"]}
        assert [n for n in lines if lines[n]["has_draft"]] == sorted(model.drafts)
        assert {n: lines[n]["version"] for n in lines if "version" in lines[n]} == {
            number: model.versions[number] for number in saved
        }
        export = await manager.get_export(self.id)
        assert (export and export.text) == model.export
        await self._read_generation(model)

    async def _read_generation(self, model: Model) -> None:
        status = await self.generation.get_status(self.id)
        assert status["status"] == model.status
        assert status["progress"] == model.percent
        assert (status["stage"], status["message"]) == (model.stage, model.message)
        assert status["error_message"] == model.error_message
        assert await self.generation.get_language_preference(self.id) == model.language
        assert await self.generation.get_result(self.id) == model.result

        events = await self._read_log()
        assert [event["type"] for event in events] == model.log
        ids = [tuple(int(part) for part in event["id"].split("-")) for event in events]
        assert ids == sorted(set(ids))
        given = {event["event_id"]: event for event in events if "event_id" in event}
        assert given == model.taken

    async def _read_log(self) -> list[EventView]:
        events, _ = await self.log.list_after(self.id, BEFORE_ALL, None)
        return events

    async def _read_jobs(self) -> list[tuple[str, int]]:
        """List the jobs of the generators: a session and its revision each."""
        entries: Any = await self.raw.xrange(JOBS)
        return [(fields[b"session_id"].decode(), int(fields[b"revision"])) for _, fields in entries]

    async def _flush(self) -> None:
        await self.raw.flushdb()

    async def _look(self) -> tuple[list[str], list[int]]:
        """List the keys of the store without the session's prefix, and when each expires.

        What a former session left behind shows by its prefix. The parts of a result are shown
        without the name of their transfer.
        """
        prefix = f"onboarding:{self.id}:"
        look = """
            local keys, times = redis.call('KEYS', '*'), {}
            for i, key in ipairs(keys) do times[i] = redis.call('PEXPIRETIME', key) end
            return {keys, times}
        """
        keys, times = await self.raw.eval(look, 0)
        names = [key.decode().removeprefix(prefix) for key in keys]
        found = [each for each in zip(names, times, strict=True) if not each[0].startswith(INDEX)]
        shown = [re.sub("^result:[0-9a-f]+:", "result:*:", name) for name, _ in found]
        return shown, [at for _, at in found]

    # --- The session ------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.run(self._flush())
        self.begin_anew("w")

    @rule(workspace_id=st.none() | st.sampled_from(["w", "é"]))
    def begin_anew(self, workspace_id: str | None) -> None:
        if self.model is not None:
            return
        self.id = self.run(self.lenient.create_session(workspace_id=workspace_id))
        self.model = Model()
        self.read_back()

    @rule(user_id=st.sampled_from(["u1", "u2"]))
    def set_metadata(self, user_id: str) -> None:
        self.run(self.lenient.set_metadata(self.id, user_id, None))
        if self.model is None:
            self.model = Model()
        else:
            self.model.log.append("metadata_changed")
        self.model.user_id = user_id
        self.read_back()

    @rule(sure=st.integers(0, 3))
    def delete_session(self, sure: int) -> None:
        if sure:
            return
        if self.model is None:
            self.refused(self.lenient.delete_session(self.id), SessionNotFoundError)
            return
        self.run(self.lenient.delete_session(self.id))
        self.model = None
        self.read_back()

    # --- Steps ------------------------------------------------------------------------------------

    @rule(number=numbers, data=answers, condition=conditions)
    def save_step(self, number: int, data: Answers, condition: str) -> None:
        model = self.model
        precondition, holds = (model or Model()).conditions(condition, number)
        save = self.lenient.save_step(self.id, number, data, precondition=precondition)
        if model is None:
            self.refused(save, SessionNotFoundError)
        elif model.finalized:
            self.refused(save, SessionFinalizedError)
        elif not holds:
            conflict = self.refused(save, VersionConflictError)
            assert conflict.current_version == model.version(number)
        else:
            saved = self.run(save)
            assert saved["version"] == model.save(number, data)
            assert saved["progress"]["completed_steps"] == sorted(model.steps)
            self.read_back()
            step = self.run(self.lenient.get_step(self.id, number))
            assert step is not None
            # Not only equal: 1, 1.0 and True are equal too.
            assert repr(step["data"]) == repr(data)

    @rule(number=numbers)
    def save_nothing(self, number: int) -> None:
        self.refused(self.lenient.save_step(self.id, number, {}), InvalidStepDataError)

    @rule(number=numbers, patch=st.dictionaries(names, values, max_size=2), condition=conditions)
    def patch_step(self, number: int, patch: Answers, condition: str) -> None:
        model = self.model
        precondition, holds = (model or Model()).conditions(condition, number)
        change = self.lenient.patch_step(self.id, number, patch, precondition=precondition)
        if model is None:
            self.refused(change, SessionNotFoundError)
            return
        if number not in model.steps:
            self.refused(change, StepNotFoundError)
            return
        merged = merge_patch(model.steps[number], patch)
        if model.finalized:
            # An outcome that is empty may be told first.
            self.refused(change, SessionFinalizedError, *([] if merged else [InvalidStepDataError]))
        elif not merged:
            self.refused(change, InvalidStepDataError)
        elif not holds:
            conflict = self.refused(change, VersionConflictError)
            assert conflict.current_version == model.version(number)
        else:
            assert self.run(change)["version"] == model.save(number, merged)
            self.read_back()

    @rule(batch=st.dictionaries(numbers, answers, min_size=1, max_size=3), spoilt=st.integers(0, 4))
    def save_steps(self, batch: dict[int, Answers], spoilt: int) -> None:
        model = self.model
        if not spoilt:
            bad: dict[int, Answers] = {**batch, 5: {}}
            self.refused(self.lenient.save_steps(self.id, bad), InvalidStepDataError)
            return
        save = self.lenient.save_steps(self.id, batch)
        if model is None:
            self.refused(save, SessionNotFoundError)
        elif model.finalized:
            self.refused(save, SessionFinalizedError)
        else:
            saved = self.run(save)["saved"]
            assert saved == [
                {"step_id": number, "version": model.save(number, data)}
                for number, data in sorted(batch.items())
            ]
            self.read_back()

    @rule(number=numbers, condition=conditions)
    def delete_step(self, number: int, condition: str) -> None:
        model = self.model
        precondition, holds = (model or Model()).conditions(condition, number)
        if precondition.if_none_match is not None:
            return
        delete = self.lenient.delete_step(self.id, number, if_match=precondition.if_match)
        if model is None:
            self.refused(delete, SessionNotFoundError)
        elif number not in model.steps:
            self.refused(delete, StepNotFoundError)
        elif model.finalized:
            self.refused(delete, SessionFinalizedError)
        elif not holds:
            conflict = self.refused(delete, VersionConflictError)
            assert conflict.current_version == model.version(number)
        else:
            progress = self.run(delete)["progress"]
            del model.steps[number]
            model.log.append("step_deleted")
            assert progress["completed_steps"] == sorted(model.steps)
            self.read_back()
            assert self.run(self.lenient.get_step(self.id, number)) is None

    # --- Drafts -----------------------------------------------------------------------------------

    @rule(number=numbers, data=st.dictionaries(names, values, max_size=2))
    def save_draft(self, number: int, data: Answers) -> None:
        model = self.model
        save = self.lenient.save_draft(self.id, number, data)
        if model is None:
            self.refused(save, SessionNotFoundError)
        elif model.finalized:
            self.refused(save, SessionFinalizedError)
        else:
            saved = self.run(save)
            model.drafts[number] = data
            assert saved.version == model.version(number)
            self.read_back()

    @rule(number=numbers)
    def get_draft(self, number: int) -> None:
        model = self.model
        if model is None:
            self.refused(self.lenient.get_draft(self.id, number), SessionNotFoundError)
            return
        draft = self.run(self.lenient.get_draft(self.id, number))
        assert (draft and draft["data"]) == model.drafts.get(number)
        assert draft is None or (draft.version, draft["is_draft"]) == (model.version(number), True)

    @rule(number=numbers)
    def delete_draft(self, number: int) -> None:
        model = self.model
        delete = self.lenient.delete_draft(self.id, number)
        if model is None:
            self.refused(delete, SessionNotFoundError)
        elif number not in model.drafts:
            self.refused(delete, DraftNotFoundError)
        elif model.finalized:
            self.refused(delete, SessionFinalizedError)
        else:
            self.run(delete)
            del model.drafts[number]
            self.read_back()

    @rule(number=numbers, condition=conditions)
    def promote_draft(self, number: int, condition: str) -> None:
        model = self.model
        precondition, holds = (model or Model()).conditions(condition, number)
        promote = self.lenient.promote_draft_to_step(self.id, number, precondition=precondition)
        if model is None:
            self.refused(promote, SessionNotFoundError)
        elif number not in model.drafts:
            self.refused(promote, DraftNotFoundError)
        elif not model.drafts[number]:
            self.refused(promote, InvalidStepDataError, SessionFinalizedError)
        elif model.finalized:
            self.refused(promote, SessionFinalizedError)
        elif not holds:
            conflict = self.refused(promote, VersionConflictError)
            assert conflict.current_version == model.version(number)
        else:
            saved = self.run(promote)
            assert saved["version"] == model.save(number, model.drafts[number])
            self.read_back()

    # --- Progress, finalize -----------------------------------------------------------------------

    @rule(number=st.integers(-1, TOTAL + 1))
    def update_progress(self, number: int) -> None:
        model = self.model
        update = self.lenient.update_progress(self.id, number)
        if number < 0:
            self.refused(update, InvalidStepIdError)
        elif model is None:
            self.refused(update, SessionNotFoundError)
        elif number > TOTAL:
            self.refused(update, InvalidStepIdError)
        else:
            progress = self.run(update)
            model.highest = max(model.highest, number)
            assert progress["highest_step"] == model.highest
            self.read_back()

    @rule(strict=st.booleans(), force=st.booleans())
    def finalize(self, *, strict: bool, force: bool) -> None:
        model = self.model
        finalize = (self.strict if strict else self.lenient).finalize(self.id, force=force)
        if model is None:
            self.refused(finalize, SessionNotFoundError)
            return
        missing = [
            number
            for number in range(1, TOTAL + 1)
            if number not in model.steps and number not in OPTIONAL
        ]
        if not model.finalized and not model.steps:
            self.refused(finalize, NothingToFinalizeError)
        elif not model.finalized and strict and not force:
            assert self.refused(finalize, StepsMissingError).missing == missing
        else:
            answer = self.run(finalize)
            if not model.finalized:
                model.finalized = True
                model.revision += 1
                model.log.append("finalized")
                self.jobs.append((self.id, model.revision))
                stored = self.run(self.lenient.get_export(self.id))
                assert stored is not None
                model.export = stored.text
            assert model.export is not None
            assert model.export in answer.text
            export = answer["business_context"]
            assert export["revision"] == model.revision
            assert export["checksum"] == compute_checksum(export)
            assert {int(n): step["data"] for n, step in export["steps"].items()} == model.steps
            assert export["complete"] is False
            assert answer["completed_steps"] == len(model.steps)
            self.read_back()

    @rule()
    def reopen(self) -> None:
        model = self.model
        reopen = self.lenient.reopen(self.id)
        if model is None:
            self.refused(reopen, SessionNotFoundError)
        elif not model.finalized:
            self.refused(reopen, NotFinalizedError)
        elif model.status == "processing":
            self.refused(reopen, GenerationRunningError)
        else:
            view = self.run(reopen)
            model.finalized = False
            model.log.append("reopened")
            model.status, model.percent = "pending", 0
            model.stage = model.message = model.error_message = None
            assert (view["status"], view["revision"]) == ("pending", model.revision)
            self.read_back()

    # --- Generation -------------------------------------------------------------------------------

    @rule(status=st.sampled_from(["processing", "complete", "error"]), message=messages)
    def set_status(self, status: str, message: str | None) -> None:
        model = self.model
        error = message if status == "error" else None
        change = self.generation.update_session_status(self.id, status, error)
        if model is None:
            self.refused(change, SessionNotFoundError)
        elif status == model.status:
            assert self.run(change)["error_message"] == model.error_message
            self.read_back()
        elif (model.status, status) not in MAY_FOLLOW:
            assert self.refused(change, InvalidTransitionError).current == model.status
        else:
            answer = self.run(change)
            model.status, model.error_message = status, error
            model.log.append("status_changed")
            if status == "processing":
                model.percent, model.stage, model.message = 0, None, None
            elif status == "complete":
                model.percent = 100
            assert answer == self.run(self.generation.get_status(self.id))
            self.read_back()

    @rule(
        stage=st.sampled_from(["knowledge_search", "é"]),
        percent=st.integers(0, 100),
        message=messages,
        event_id=event_ids,
    )
    def add_event(
        self, stage: str, percent: int, message: str | None, event_id: str | None
    ) -> None:
        model = self.model
        add = self.generation.report_progress(
            ProgressEvent(self.id, stage, percent, message, event_id)
        )
        if model is None:
            self.refused(add, SessionNotFoundError)
            return
        view, was_taken = self.run(add)
        assert was_taken == (event_id in model.taken)
        if event_id is not None and was_taken:
            assert view == model.taken[event_id]
        else:
            assert [view] == self.run(self._read_log())[-1:]
            model.percent, model.stage, model.message = percent, stage, message
            model.log.append("progress")
            if event_id is not None:
                model.taken[event_id] = view
        self.read_back()

    @rule(language=st.sampled_from(["en", "de", "pt-BR"]))
    def set_language(self, language: str) -> None:
        model = self.model
        change = self.generation.set_language_preference(self.id, language)
        if model is None:
            self.refused(change, SessionNotFoundError)
            return
        assert self.run(change) == language
        if language != model.language:
            model.language = language
            model.log.append("language_changed")
        self.read_back()

    @rule(result=results)
    def store_result(self, result: bytes | Answers) -> None:
        model = self.model
        store = self.generation.store_result(self.id, result)
        if model is None:
            self.refused(store, SessionNotFoundError)
            return
        self.run(store)
        model.result = result
        model.log.append("result_stored")
        self.read_back()


def test_a_session_is_as_its_model_says_after_any_calls(valkey: Valkey) -> None:
    lenient = known_settings(redis_url=valkey.url)
    strict = known_settings(redis_url=valkey.url, finalize_requires="required")
    gateway = connect(lenient)
    manager = make_manager(gateway, lenient)
    files = make_file_service(gateway, manager, lenient)
    with asyncio.Runner() as runner:
        raw = Redis(host=valkey.host, port=valkey.port)
        machine = type(
            "SessionMachine",
            (SessionMachine,),
            {
                "runner": runner,
                "raw": raw,
                "lenient": manager,
                "strict": make_manager(gateway, strict),
                "generation": GenerationService(gateway, files),
                "log": EventStore(gateway),
            },
        )
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=40,
                    stateful_step_count=30,
                    deadline=None,
                    derandomize="CI" in os.environ,
                    suppress_health_check=[HealthCheck.too_slow],
                ),
            )
        finally:
            runner.run(files.aclose())
            runner.run(gateway.aclose())
            runner.run(raw.aclose())
