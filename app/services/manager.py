"""The use cases of one session, for HTTP and for anybody who imports it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import structlog

from app.clock import monotonic_s, now_ms, rfc3339
from app.errors import (
    AbsentError,
    DraftNotFoundError,
    Fault,
    InvalidStepDataError,
    InvalidStepIdError,
    NothingToFinalizeError,
    PayloadTooLargeError,
    RequestError,
    SessionConflictError,
    SessionFinalizedError,
    SessionNotFoundError,
    StateError,
    StepNotFoundError,
    StepsMissingError,
    VersionConflictError,
)
from app.onboarding.catalogue import Catalogue
from app.onboarding.documents import Document, merge_patch
from app.onboarding.exports import Export, FinalizeAnswer, build_export
from app.onboarding.files import FileInfo
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.progress import Progress
from app.onboarding.retention import Capacity
from app.onboarding.sessions import (
    DeletedSession,
    Owner,
    ProgressView,
    Session,
    SessionChanges,
    SessionView,
    Summary,
    SummaryView,
    check_owner,
    check_session_id,
    view_progress,
    view_session,
    view_summary,
)
from app.onboarding.steps import (
    NO_PRECONDITION,
    DeletedStep,
    Precondition,
    SavedStep,
    SavedSteps,
    Step,
    StepMap,
    StepVersion,
    Tags,
)
from app.settings import Settings, load_settings
from app.store.catalogue import CatalogueStore
from app.store.connect import connect, make_probe
from app.store.exports import ExportStore
from app.store.gateway import Gateway
from app.store.health import Probe
from app.store.jobs import JobStore
from app.store.sessions import Created, NewSession, SessionStore
from app.store.steps import (
    Draft,
    OtherCatalogueError,
    Saved,
    SavedDraft,
    StepChangedError,
    StepStore,
    StoredStep,
)

log = structlog.get_logger()

T = TypeVar("T")

TRIES = 8
"""How often a change that must read first is tried again when others change the session."""


MAY_HAVE_ANOTHER = (OtherCatalogueError, InvalidStepIdError, InvalidStepDataError)
"""What is raised, too, when a session began with another catalogue than the current one."""


LEARN_EVERY_S = 5.0
"""How soon a process knows the catalogue of a newer one that was started beside it."""


class Rules(NamedTuple):
    """What a deployer decides about sessions."""

    draft_lifetime_ms: int
    finalize_requires: Literal["none", "required", "all"]
    max_step_bytes: int
    capacity: Capacity


class OnboardingSessionManager:
    """Everything that can be done with an onboarding session.

    Every method raises a `StoreError` when the store cannot do its part and
    `SessionNotFoundError` when there is no such session; what else it raises, it says. A
    `session_id` is any non-empty string of `[A-Za-z0-9._-]`. Answers and documents are mappings;
    those that come back keep the JSON they were stored with as `text`.

    Parameters that come from HTTP and are optional everywhere: `precondition` is If-Match and
    If-None-Match, `request` is the Idempotency-Key.
    """

    def __init__(
        self,
        gateway: Gateway,
        make_probe: Callable[[], Probe],
        catalogue: Catalogue,
        rules: Rules,
    ) -> None:
        self._gateway = gateway
        self._make_probe = make_probe
        self._rules = rules
        self.catalogue = catalogue
        """The catalogue that new sessions begin with."""
        self._catalogues = CatalogueStore(gateway, catalogue)
        self._sessions = SessionStore(gateway)
        self._steps = StepStore(gateway, self._sessions)
        self._exports = ExportStore(gateway, self._sessions, JobStore(gateway))
        self._learnt_s = -2 * LEARN_EVERY_S

    # --- The session ------------------------------------------------------------------------------

    async def create_session(
        self,
        *,
        workspace_id: str | None = None,
        user_id: str | None = None,
        language: str = "en",
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Make a session and return its id, a UUID4. Raises `InvalidRequestError`."""
        check_owner(workspace_id, user_id, language, workspace_required=False)
        custom = Document.of(metadata or {})
        view = await self.begin_session(Owner(workspace_id, user_id, language, custom.text))
        return view["session_id"]

    async def begin_session(
        self,
        owner: Owner,
        *,
        request: IdempotentRequest | None = None,
        session_id: str | None = None,
        token_digest: str | None = None,
        seed: str | None = None,
    ) -> SessionView:
        """Make a session for an owner that was checked, and describe it.

        `session_id` is a new UUID4, for who must know it before: a session token holds it.
        `token_digest` lets that token in from the beginning, `seed` is kept beside it. When an
        Idempotency-Key is replayed, the session is the first one, and none of them is kept.
        Raises `SessionConflictError` when there is one with this id.
        """
        await self._catalogues.keep_current()
        created = None
        while created is None:
            created = await self._create(
                session_id or str(uuid.uuid4()),
                owner,
                request=request,
                token_digest=token_digest,
                seed=seed,
            )
            if created is None and session_id is not None:
                raise SessionConflictError
        return view_session(created.session_id, owner, created.state)

    async def begin_session_with(
        self,
        session_id: str,
        owner: Owner,
        *,
        upload: FileInfo,
        token_digest: str | None = None,
    ) -> None:
        """Make a session with a file whose parts are kept under this id already.

        Raises `BodyLostError` when they are gone.
        """
        check_session_id(session_id)
        await self._catalogues.keep_current()
        await self._create(session_id, owner, upload=upload, token_digest=token_digest)

    async def get_session(self, session_id: str) -> SessionView:
        """Describe a session."""
        check_session_id(session_id)
        session = await self._sessions.get(session_id)
        return view_session(session_id, session.owner, session.state)

    async def set_metadata(
        self,
        session_id: str,
        user_id: str | None,
        workspace_id: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Say who a session belongs to, making it if it is not there, and return its id.

        `metadata`, a JSON object to attach, stays as it is when None. Raises `InvalidRequestError`.
        """
        check_session_id(session_id)
        check_owner(workspace_id, user_id, "en", workspace_required=False)
        fields: dict[str, str | bytes | None] = {"user_id": user_id, "workspace_id": workspace_id}
        custom = Document.of(metadata or {}).text
        if metadata is not None:
            fields["custom"] = custom
        for _ in range(TRIES):
            try:
                await self._sessions.update(session_id, SessionChanges(fields), at_ms=now_ms())
            except SessionNotFoundError:
                await self._catalogues.keep_current()
                owner = Owner(workspace_id, user_id, "en", custom)
                if await self._create(session_id, owner) is None:
                    continue
            return session_id
        raise SessionConflictError

    async def delete_session(self, session_id: str) -> DeletedSession:
        """Remove a session with everything that belongs to it."""
        check_session_id(session_id)
        await self._sessions.delete(session_id, self.catalogue.total, at_ms=now_ms())
        log.info("session_deleted", session_id=session_id)
        return DeletedSession(
            success=True,
            session_id=session_id,
            message="The session and all its answers were deleted",
            deleted_at=rfc3339(now_ms()),
        )

    @asynccontextmanager
    async def session(
        self,
        *,
        workspace_id: str | None = None,
        user_id: str | None = None,
        language: str = "en",
        metadata: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[SessionView]:
        """Make a session for the length of a block, and delete it at its end."""
        session_id = await self.create_session(
            workspace_id=workspace_id, user_id=user_id, language=language, metadata=metadata
        )
        try:
            yield await self.get_session(session_id)
        finally:
            try:
                await self.delete_session(session_id)
            except SessionNotFoundError:
                log.debug("session_deleted_before", session_id=session_id)

    # --- Steps ------------------------------------------------------------------------------------

    async def save_step(
        self,
        session_id: str,
        step_id: int,
        data: Mapping[str, Any],
        *,
        precondition: Precondition = NO_PRECONDITION,
        request: IdempotentRequest | None = None,
    ) -> SavedStep:
        """Save the answers of a step, a non-empty object, and drop its draft.

        Raises `InvalidStepIdError`, `InvalidStepDataError`, `PayloadTooLargeError`,
        `SessionFinalizedError`, `VersionConflictError`, `IdempotencyMismatchError`.
        """
        check_session_id(session_id)
        answers = Document.of(data, InvalidStepDataError)

        def save(catalogue: Catalogue) -> Awaitable[Saved]:
            self._check_answers(catalogue, step_id, answers, "/data")
            return self._steps.save(
                session_id,
                {step_id: answers},
                pin=catalogue.pin,
                at_ms=now_ms(),
                precondition=precondition,
                request=request,
            )

        try:
            saved = await save(self.catalogue)
        except MAY_HAVE_ANOTHER as failure:
            saved = await save(await self._find_other_catalogue(session_id, failure))
        return _saved_step(session_id, step_id, saved)

    async def save_steps(
        self,
        session_id: str,
        steps: Mapping[int, Mapping[str, Any]],
        *,
        request: IdempotentRequest | None = None,
    ) -> SavedSteps:
        """Save several steps at once, all or none. Raises what `save_step` raises."""
        check_session_id(session_id)
        answers = {
            number: Document.of(data, InvalidStepDataError)
            for number, data in sorted(steps.items())
        }
        if not answers:
            fault = Fault(pointer="/steps", code="min_properties", detail="Send at least one step")
            raise InvalidStepDataError("Send at least one step", [fault])

        async def save(catalogue: Catalogue) -> Saved:
            for number, data in answers.items():
                catalogue.check_step_id(number, f"/steps/{number}")
                self._check_size(data)
                catalogue.check_data(number, data, f"/steps/{number}")
            return await self._steps.save(
                session_id, answers, pin=catalogue.pin, at_ms=now_ms(), request=request
            )

        saved = await self._by_its_catalogue(session_id, save)
        return SavedSteps(
            success=True,
            session_id=session_id,
            saved=[StepVersion(step_id=n, version=v) for n, v in saved.versions.items()],
            progress=saved.progress,
        )

    async def patch_step(
        self,
        session_id: str,
        step_id: int,
        patch: Mapping[str, Any],
        *,
        precondition: Precondition = NO_PRECONDITION,
        request: IdempotentRequest | None = None,
    ) -> SavedStep:
        """Apply a JSON merge patch (RFC 7396) to the answers of a saved step.

        Reads, merges, and saves if nobody changed the step meanwhile. Raises what `save_step`
        raises, `StepNotFoundError` and `SessionConflictError`.
        """
        change = Document.of(patch, InvalidStepDataError)
        await self._check_step(session_id, step_id)

        async def patched(catalogue: Catalogue) -> Saved:
            stored = await self._steps.get(session_id, step_id)
            if stored is None:
                raise StepNotFoundError(step_id)
            merged = merge_patch(Document(stored.data).value, change.value)
            try:
                answers = Document.of(merged, InvalidStepDataError)
                self._check_answers(catalogue, step_id, answers, "")
            except RequestError:
                # What the script would refuse first outweighs an outcome that cannot be taken.
                if (await self._sessions.get_state(session_id)).finalized_ms is not None:
                    raise SessionFinalizedError from None
                if not precondition.holds(stored.version):
                    raise VersionConflictError(stored.version) from None
                raise
            return await self._steps.save(
                session_id,
                {step_id: answers},
                pin=catalogue.pin,
                at_ms=now_ms(),
                precondition=precondition,
                expected_version=stored.version,
                request=request,
            )

        return await self._compare_and_save(session_id, step_id, patched, request)

    async def get_step(self, session_id: str, step_id: int) -> Step | None:
        """Read a saved step; None when it is not saved. Raises `InvalidStepIdError`."""
        check_session_id(session_id)
        if step_id not in self.catalogue:
            await self._check_step(session_id, step_id)
        stored = await self._steps.get(session_id, step_id)
        if stored is None:
            return None
        return Step.of_record(session_id, stored.text, stored.version)

    async def get_all_steps(self, session_id: str) -> StepMap:
        """Read every saved step by its number; `missing` tells the others. One round trip."""
        check_session_id(session_id)
        _, catalogue, stored = await self._read_all(session_id)
        steps = {
            number: Step.of_record(session_id, each.text, each.version)
            for number, each in stored.items()
        }
        return StepMap(steps, catalogue.missing(steps))

    async def delete_step(
        self,
        session_id: str,
        step_id: int,
        *,
        if_match: Tags | None = None,
        request: IdempotentRequest | None = None,
    ) -> DeletedStep:
        """Delete a saved step; its version goes on counting when it is saved again.

        Raises `InvalidStepIdError`, `StepNotFoundError`, `SessionFinalizedError`,
        `VersionConflictError`.
        """
        await self._check_step(session_id, step_id)
        progress = await self._steps.delete(
            session_id, step_id, at_ms=now_ms(), if_match=if_match, request=request
        )
        return DeletedStep(success=True, session_id=session_id, step_id=step_id, progress=progress)

    # --- Drafts -----------------------------------------------------------------------------------

    async def save_draft(
        self,
        session_id: str,
        step_id: int,
        data: Mapping[str, Any],
        *,
        request: IdempotentRequest | None = None,
    ) -> Step:
        """Keep what is being typed, unchecked by the step's schema; it is no progress.

        Raises `InvalidStepIdError`, `InvalidStepDataError`, `PayloadTooLargeError`,
        `SessionFinalizedError`.
        """
        check_session_id(session_id)
        answers = Document.of(data, InvalidStepDataError)
        self._check_size(answers)
        at_ms = now_ms()

        async def save(catalogue: Catalogue) -> SavedDraft:
            catalogue.check_step_id(step_id)
            return await self._steps.save_draft(
                session_id,
                step_id,
                answers,
                pin=catalogue.pin,
                at_ms=at_ms,
                saved_at=rfc3339(at_ms),
                lifetime_ms=self._rules.draft_lifetime_ms,
                request=request,
            )

        saved = await self._by_its_catalogue(session_id, save)
        return Step.of_draft(session_id, step_id, answers.text, saved.version, rfc3339(saved.at_ms))

    async def get_draft(self, session_id: str, step_id: int) -> Step | None:
        """Read a draft; None when there is none. Raises `InvalidStepIdError`."""
        await self._check_step(session_id, step_id)
        draft = await self._steps.get_draft(session_id, step_id)
        return None if draft is None else _draft(session_id, step_id, draft)

    async def delete_draft(self, session_id: str, step_id: int) -> Step | None:
        """Drop a draft and return what it was; None when that could not be read any more.

        Raises `InvalidStepIdError`, `DraftNotFoundError`, `SessionFinalizedError`.
        """
        await self._check_step(session_id, step_id)
        draft = await self._steps.delete_draft(session_id, step_id, at_ms=now_ms())
        return None if draft is None else _draft(session_id, step_id, draft)

    async def promote_draft_to_step(
        self,
        session_id: str,
        step_id: int,
        *,
        precondition: Precondition = NO_PRECONDITION,
        request: IdempotentRequest | None = None,
    ) -> SavedStep:
        """Save a draft as the step. Raises what `save_step` raises and `DraftNotFoundError`."""
        await self._check_step(session_id, step_id)

        async def promoted(catalogue: Catalogue) -> Saved:
            draft = await self._steps.get_draft(session_id, step_id)
            if draft is None:
                raise DraftNotFoundError(step_id)
            answers = Document(draft.data)
            self._check_answers(catalogue, step_id, answers, "/data")
            return await self._steps.save(
                session_id,
                {step_id: answers},
                pin=catalogue.pin,
                at_ms=now_ms(),
                precondition=precondition,
                expected_draft=draft.draft_id,
                request=request,
            )

        return await self._compare_and_save(session_id, step_id, promoted, request)

    # --- Progress ---------------------------------------------------------------------------------

    async def get_progress(self, session_id: str) -> Progress:
        """Say how far a session is."""
        check_session_id(session_id)
        return (await self._sessions.get_state(session_id)).progress

    async def view_progress(self, session_id: str) -> ProgressView:
        """Say how far a session is, in which state, and until when it lives. One command."""
        check_session_id(session_id)
        return view_progress(session_id, await self._sessions.get_state(session_id))

    async def update_progress(self, session_id: str, step_id: int) -> Progress:
        """Raise the high-water mark `highest_step` to a step, 0 to the number of steps.

        It never falls. Raises `InvalidStepIdError`.
        """
        check_session_id(session_id)
        if step_id < 0:
            raise InvalidStepIdError("The mark is 0 or the number of a step")
        return await self._sessions.raise_progress(session_id, step_id, at_ms=now_ms())

    async def get_session_summary(self, session_id: str) -> SummaryView:
        """Describe a session at a glance, without its answers. One round trip."""
        return cast("SummaryView", (await self.write_summary(session_id)).value)

    async def write_summary(self, session_id: str) -> Summary:
        """Describe a session as `get_session_summary` does, in JSON that was not decoded."""
        check_session_id(session_id)
        steps = self.catalogue.total
        session, drafts = await self._sessions.get_with_drafts(session_id, steps)
        catalogue = await self._catalogues.get(session.pin)
        if catalogue.total > steps:
            session, drafts = await self._sessions.get_with_drafts(session_id, catalogue.total)
        return view_summary(session, catalogue, drafts, now_ms())

    # --- Finalize ---------------------------------------------------------------------------------

    async def finalize(
        self,
        session_id: str,
        *,
        force: bool = False,
        request: IdempotentRequest | None = None,
    ) -> FinalizeAnswer:
        """Lock the steps and freeze them into an export; asked again, give the same answer.

        `force` finalizes although steps are missing that the settings require. Raises
        `NothingToFinalizeError`, `StepsMissingError`, `SessionConflictError`,
        `IdempotencyMismatchError`.
        """
        check_session_id(session_id)
        frozen = request and await self._exports.recall(session_id, request)
        for _ in range(TRIES):
            if frozen:
                break
            session, catalogue, stored = await self._read_all(session_id)
            if session.state.finalized_ms is None:
                self._check_complete(catalogue, stored, force=force)
                at_ms = now_ms()
                records = {number: Document(each.text) for number, each in stored.items()}
                # Canonical JSON takes 30 ms for a megabyte: too long for the event loop.
                export = await asyncio.to_thread(build_export, session, records, catalogue, at_ms)
                frozen = await self._exports.save(session, export, at_ms=at_ms, request=request)
                if frozen and frozen.export is export.text:
                    log.info("session_finalized", session_id=session_id)
            else:
                if request is not None:
                    await self._exports.remember(session_id, at_ms=now_ms(), request=request)
                frozen = await self._exports.get_frozen(session_id)
        if not frozen:
            raise SessionConflictError
        return FinalizeAnswer.compose(
            session_id=session_id,
            export=frozen.export,
            completed=frozen.completed,
            total=frozen.total,
            finalized_ms=frozen.finalized_ms,
        )

    async def get_export(self, session_id: str) -> Export | None:
        """Read the latest export; None when the session was never finalized. One command."""
        check_session_id(session_id)
        return await self._exports.get(session_id)

    async def reopen(
        self, session_id: str, *, request: IdempotentRequest | None = None
    ) -> SessionView:
        """Unlock the steps of a finalized session; its export stays readable.

        Raises `NotFinalizedError`, `GenerationRunningError`.
        """
        check_session_id(session_id)
        owner, state = await self._sessions.reopen(session_id, at_ms=now_ms(), request=request)
        if request is None or not request.replayed:
            log.info("session_reopened", session_id=session_id)
        return view_session(session_id, owner, state)

    # --- The manager itself -----------------------------------------------------------------------

    async def learn_catalogues(self) -> None:
        """Learn which catalogues are in use, so that steps can be judged without asking.

        Done again from time to time: a newer service may be starting beside this one.
        """
        await self._catalogues.learn()
        self._learnt_s = monotonic_s()

    async def health_check(self) -> dict[str, bool]:
        """Try a connection, a write, a read and a delete, each by itself, without retries.

        Returns `redis_connection`, `set_operation`, `get_operation`, `delete_operation` and
        `overall_healthy`. Never raises for a store that is away.
        """
        probe = self._make_probe()
        try:
            return await probe.try_each()
        finally:
            await probe.aclose()

    async def aclose(self) -> None:
        """Close the connections of this event loop; the next call opens them again."""
        await self._gateway.aclose()

    def check_known_step(self, step_id: int) -> None:
        """Raise `InvalidStepIdError` for a number that no catalogue in use has. Asks nobody."""
        if not self._catalogues.is_step(step_id):
            self.catalogue.check_step_id(step_id)

    # --- How it is done ---------------------------------------------------------------------------

    async def _create(
        self,
        session_id: str,
        owner: Owner,
        *,
        request: IdempotentRequest | None = None,
        upload: FileInfo | None = None,
        token_digest: str | None = None,
        seed: str | None = None,
    ) -> Created | None:
        """Make a session where there is room; None when there is one with this id."""
        new = NewSession(
            session_id,
            owner,
            self.catalogue,
            now_ms(),
            upload,
            self._rules.capacity,
            token_digest,
            seed,
        )
        created = await self._sessions.create(new, request=request)
        if created is not None and not (request and request.replayed):
            log.info("session_created", session_id=created.session_id)
            for evicted in created.evicted:
                log.warning("session_evicted", session_id=evicted, made_room_for=session_id)
        return created

    async def _check_step(self, session_id: str, step_id: int) -> None:
        """Raise `InvalidStepIdError` unless the session's catalogue has the step.

        Asks the store only for a number that the current catalogue has not.
        """
        check_session_id(session_id)
        if step_id not in self.catalogue:

            async def check(catalogue: Catalogue) -> None:
                catalogue.check_step_id(step_id)

            await self._by_its_catalogue(session_id, check)

    async def _by_its_catalogue(
        self, session_id: str, attempt: Callable[[Catalogue], Awaitable[T]]
    ) -> T:
        """Attempt something by the current catalogue, and once more if the session has another.

        Nearly every session has the current one, so its catalogue is not looked up first: the
        script that saves tells when it is another.
        """
        try:
            return await attempt(self.catalogue)
        except MAY_HAVE_ANOTHER as failure:
            return await attempt(await self._find_other_catalogue(session_id, failure))

    async def _find_other_catalogue(self, session_id: str, failure: Exception) -> Catalogue:
        """Return the session's catalogue, or raise the failure when that is the current one.

        Only a fault found by the current one, while others are in use, is worth the look-up.
        """
        if isinstance(failure, OtherCatalogueError):
            return await self._catalogues.get(failure.pin)
        if monotonic_s() - self._learnt_s > 2 * LEARN_EVERY_S:
            await self.learn_catalogues()
        if not self._catalogues.has_others:
            raise failure
        pin = await self._sessions.get_pin(session_id)
        if pin == self.catalogue.pin:
            raise failure
        return await self._catalogues.get(pin)

    async def _compare_and_save(
        self,
        session_id: str,
        step_id: int,
        attempt: Callable[[Catalogue], Awaitable[Saved]],
        request: IdempotentRequest | None,
    ) -> SavedStep:
        """Attempt a save that depends on what was read, again while others change that."""
        saved = request and await self._steps.recall_save(session_id, request)
        for _ in range(TRIES):
            if saved:
                break
            try:
                saved = await self._by_its_catalogue(session_id, attempt)
            except StepChangedError:
                continue
            except (RequestError, AbsentError, StateError):
                # What was read may be what the same request has just made of it.
                saved = request and await self._steps.recall_save(session_id, request)
                if not saved:
                    raise
        if not saved:
            raise SessionConflictError
        return _saved_step(session_id, step_id, saved)

    async def _read_all(self, session_id: str) -> tuple[Session, Catalogue, dict[int, StoredStep]]:
        steps = self.catalogue.total
        session, stored = await self._steps.list_all(session_id, steps)
        catalogue = await self._catalogues.get(session.pin)
        if catalogue.total > steps:
            session, stored = await self._steps.list_all(session_id, catalogue.total)
        return session, catalogue, stored

    def _check_answers(
        self, catalogue: Catalogue, step_id: int, answers: Document, at: str
    ) -> None:
        catalogue.check_step_id(step_id)
        self._check_size(answers)
        catalogue.check_data(step_id, answers, at)

    def _check_size(self, answers: Document) -> None:
        if len(answers.text) > self._rules.max_step_bytes:
            limit = self._rules.max_step_bytes
            raise PayloadTooLargeError(f"The answers of a step may take {limit} bytes")

    def _check_complete(
        self, catalogue: Catalogue, saved: Mapping[int, object], *, force: bool
    ) -> None:
        if not saved:
            raise NothingToFinalizeError
        missing = catalogue.missing(saved)
        if self._rules.finalize_requires == "required":
            missing = [number for number in missing if number in catalogue.required]
        if missing and self._rules.finalize_requires != "none" and not force:
            raise StepsMissingError(missing)


def make_rules(settings: Settings) -> Rules:
    """Take the rules from the settings."""
    return Rules(
        draft_lifetime_ms=settings.draft_ttl_s * 1000,
        finalize_requires=settings.finalize_requires,
        max_step_bytes=settings.max_step_bytes,
        capacity=settings.capacity,
    )


def make_manager(gateway: Gateway, settings: Settings) -> OnboardingSessionManager:
    """Make a manager over a gateway, by the settings."""
    return OnboardingSessionManager(
        gateway, partial(make_probe, settings), settings.catalogue, make_rules(settings)
    )


@cache
def get_onboarding_session_manager() -> OnboardingSessionManager:
    """Return this process's manager, made from the environment; it connects when it is first used.

    Without a configured Redis it uses the embedded store: the one of a running service, or its own
    for as long as the process runs. Raises `SettingsError`, `EmbeddedStoreError`.
    """
    settings = load_settings()
    return make_manager(connect(settings), settings)


def _draft(session_id: str, step_id: int, stored: Draft) -> Step:
    return Step.of_draft(session_id, step_id, stored.data, stored.version, stored.saved_at)


def _saved_step(session_id: str, step_id: int, saved: Saved) -> SavedStep:
    return {
        "success": True,
        "session_id": session_id,
        "step_id": step_id,
        "version": saved.versions[step_id],
        "progress": saved.progress,
        "updated_at": rfc3339(saved.at_ms),
    }
