"""The life of sessions: changed at once, cleaned up, recovered, and told of, by operators."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar, overload

import structlog

from app.clock import monotonic_s, now_ms
from app.context import get_context
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    OnboardingError,
    SessionConflictError,
    SessionNotFoundError,
    StoreFullError,
    StoreReadonlyError,
    StoreUnavailableError,
)
from app.onboarding.catalogue import Catalogue
from app.onboarding.recovery import RecoveryView
from app.onboarding.retention import (
    MAX_AT_ONCE,
    BulkFailure,
    BulkView,
    CleanupView,
    ConfigView,
    DeleteReason,
    ErasureView,
    Since,
    Terms,
    check_config,
    plan_cleanup,
)
from app.onboarding.sessions import (
    SessionChanges,
    SessionStatus,
    SessionView,
    check_owner,
    check_session_id,
    is_session_id,
    parse_changes,
    parse_status,
    plan_changes,
    view_session,
)
from app.services.feed import Callback, FeedService
from app.services.manager import TRIES
from app.services.standin import stand_in
from app.services.stats import make_stats_store
from app.services.sweeper import Sweeper
from app.services.tasks import TaskService
from app.settings import Settings, load_settings
from app.store.catalogue import CatalogueStore
from app.store.client import end_task
from app.store.connect import connect
from app.store.feed import FeedStore
from app.store.gateway import Gateway
from app.store.recovery import RecoveryStore
from app.store.retention import RetentionStore
from app.store.sessions import SessionChangedError, SessionStore, Updated

__all__ = [
    "RetentionService",
    "atomic_session_update",
    "bulk_update_sessions",
    "cleanup_completed_sessions",
    "cleanup_failed_sessions",
    "erase_user",
    "force_cleanup_all",
    "get_retention_service",
    "reconfigure",
    "recover_corrupted_session",
    "register_session_callback",
    "shutdown",
    "start",
    "with_session",
]

log = structlog.get_logger()

T = TypeVar("T")

AT_ONCE = 16
"""How many sessions of a bulk change, or a clean-up, are worked on at a time."""

TO_ANSWER_S = 3.0
"""How much of a request's time is left for the answer when a clean-up stops, in seconds."""

SWEPT_WITHIN_S = 1.0
"""How long a change of the limit waits for the sweep that it causes, in seconds."""

_OUTAGES = (StoreUnavailableError, StoreFullError, StoreReadonlyError)
"""What no session of a bulk change is at fault for."""


class RetentionService:
    """Everything that ends, bounds, or mends sessions.

    Every method raises a `StoreError` when the store cannot do its part; what else it raises, it
    says.
    """

    def __init__(
        self,
        gateway: Gateway,
        store: RetentionStore,
        sweeper: Sweeper,
        tasks: TaskService,
        catalogue: Catalogue,
        defaults: ConfigView,
    ) -> None:
        self._gateway = gateway
        self._store = store
        self._sessions = SessionStore(gateway)
        self._recovery = RecoveryStore(gateway, CatalogueStore(gateway, catalogue))
        self._sweeper = sweeper
        self._tasks = tasks
        self._feed = FeedService(gateway)
        self._events = FeedStore(gateway)
        self._defaults = defaults
        self._sweeping: asyncio.Task[bool] | None = None

    # --- Changes of sessions ----------------------------------------------------------------------

    async def atomic_session_update(
        self, session_id: str, updates: Mapping[str, Any]
    ) -> SessionView:
        """Change several fields of a session at once, all or none, and describe it.

        The fields are `status`, `error_message` (with the status `error`), `language`, `metadata`,
        `user_id`, `workspace_id`. Raises `SessionNotFoundError`, `InvalidTransitionError`, and
        `InvalidRequestError` for any other field.
        """
        check_session_id(session_id)
        session = (await self._update(session_id, parse_changes(updates))).read()
        return view_session(session_id, session.owner, session.state)

    @overload
    async def with_session(
        self, session_id: str, operation: Callable[[dict[str, Any]], Coroutine[Any, Any, T]]
    ) -> T: ...

    @overload
    async def with_session(
        self, session_id: str, operation: Callable[[dict[str, Any]], T]
    ) -> T: ...

    async def with_session(
        self, session_id: str, operation: Callable[[dict[str, Any]], Awaitable[T] | T]
    ) -> T:
        """Have an operation change a session as if nobody else did.

        `operation`, a function or a coroutine function, gets the session as a dict, changes in it
        what `atomic_session_update` can change, and what it returns is returned. Nothing is locked:
        when somebody else was faster, it is called again with what they made of the session, 8
        times at most, so it should do nothing that cannot be done again. Raises what it raises (and
        nothing is changed then), `SessionConflictError` when it could not win, and what
        `atomic_session_update` raises.
        """
        check_session_id(session_id)
        for _ in range(TRIES):
            session = await self._sessions.get(session_id)
            view: dict[str, Any] = {**view_session(session_id, session.owner, session.state)}
            draft = deepcopy(view)
            outcome = operation(draft)
            result: T = await outcome if inspect.isawaitable(outcome) else outcome
            changes = plan_changes(view, draft)
            if changes is None:
                return result
            try:
                await self._update(session_id, changes, expected=session.changes)
            except SessionChangedError:
                continue
            return result
        raise SessionConflictError

    async def bulk_update_sessions(
        self, session_ids: Sequence[str], updates: Mapping[str, Any]
    ) -> BulkView:
        """Make the same change to up to 1,000 sessions, each by itself.

        Those that could not be changed are named with the code of what went wrong. Raises
        `InvalidRequestError` for a change that no session could take.
        """
        changes = parse_changes(updates)
        if not 1 <= len(session_ids) <= MAX_AT_ONCE:
            raise InvalidRequestError(f"Name 1 to {MAX_AT_ONCE} sessions")
        turn = asyncio.Semaphore(AT_ONCE)

        async def change(session_id: str) -> BulkFailure | None:
            if not is_session_id(session_id):
                return BulkFailure(session_id=session_id, code=SessionNotFoundError.code)
            try:
                async with turn:
                    await self._update(session_id, changes)
            except OnboardingError as failure:
                return BulkFailure(session_id=session_id, code=failure.code)
            return None

        # Named twice, changed once.
        names = list(dict.fromkeys(session_ids))
        failed = [each for each in await asyncio.gather(*map(change, names)) if each is not None]
        if len(failed) == len(names):
            codes = {each["code"] for each in failed}
            outage = next((each for each in _OUTAGES if codes == {each.code}), None)
            if outage is not None:
                raise outage
        log.info("sessions_updated", updated=len(names) - len(failed), failed=len(failed))
        return BulkView(updated=len(names) - len(failed), failed=failed)

    async def recover_corrupted_session(self, session_id: str) -> RecoveryView:
        """Keep what can be read of a session, drop the rest, and set its status to `error`.

        Parts are called as their keys are: `metadata`, `progress`, `step:4`, `export`. When nothing
        can be read the session is removed. Raises `SessionNotFoundError`, `SessionConflictError`.
        """
        check_session_id(session_id)
        for _ in range(TRIES):
            try:
                remains = await self._recovery.recover(session_id, at_ms=now_ms())
            except SessionChangedError:
                continue
            kept, lost = remains.kept, remains.lost
            log.warning("session_recovered", session_id=session_id, kept=len(kept), lost=lost)
            return RecoveryView(session_id=session_id, status="error", kept=kept, lost=lost)
        raise SessionConflictError

    async def _update(
        self, session_id: str, changes: SessionChanges, expected: int | None = None
    ) -> Updated:
        updated = await self._sessions.update(
            session_id, changes, at_ms=now_ms(), expected=expected
        )
        if updated.has_other_status:
            log.info("status_changed", session_id=session_id, status=changes.status)
        return updated

    # --- Clean-ups --------------------------------------------------------------------------------

    async def cleanup(
        self,
        *,
        status: SessionStatus | str | None = None,
        older_than_hours: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> CleanupView:
        """Remove the sessions of a status, or of an age on, or all, up to 1,000.

        Those with answers that were never exported too: whoever says which sessions means them.
        With `dry_run` they are only named. Raises `InvalidRequestError` without a filter.
        """
        chosen = None if status is None else parse_status(status)
        terms = plan_cleanup(chosen, older_than_hours, now_ms(), everything=everything)
        await self._store.reclaim()
        due = await self._store.list_due(terms, most=MAX_AT_ONCE + 1)
        batch = due[:MAX_AT_ONCE]
        gone = [each.session_id for each in batch]
        is_more = len(due) > MAX_AT_ONCE
        if not dry_run:
            gone, is_done = await self._remove(gone, terms, DeleteReason.CLEANUP)
            is_more = is_more or not is_done
        return CleanupView(removed=len(gone), session_ids=gone, more=is_more)

    async def cleanup_failed_sessions(self, max_age_hours: float = 0.0) -> int:
        """Remove the sessions whose generation failed that long ago; return how many.

        Those with answers that were never exported stay.
        """
        return await self._clean_ended(SessionStatus.ERROR, max_age_hours)

    async def cleanup_completed_sessions(self, max_age_hours: float = 6.0) -> int:
        """Remove the sessions whose generation completed that long ago; return how many.

        Those with answers that were never exported stay.
        """
        return await self._clean_ended(SessionStatus.COMPLETE, max_age_hours)

    async def force_cleanup_all(self) -> int:
        """Remove every session, whatever it holds; return how many."""
        removed = 0
        while True:
            done = await self.cleanup(everything=True)
            removed += done["removed"]
            if not done["more"]:
                return removed

    async def _clean_ended(self, status: SessionStatus, max_age_hours: float) -> int:
        planned = plan_cleanup(status, max_age_hours, now_ms(), everything=False)
        terms = Terms((status,), Since.ENDED, planned.before_ms, spares_held=True)
        due = [each.session_id for each in await self._store.list_due(terms)]
        gone, _ = await self._remove(due, terms, DeleteReason.CLEANUP)
        return len(gone)

    async def _remove(
        self, session_ids: Sequence[str], terms: Terms, reason: DeleteReason
    ) -> tuple[list[str], bool]:
        """Remove those of some sessions that still meet the terms.

        Names them, and says whether all were looked at: a request ends in time to say what it did.
        """

        async def remove(session_id: str) -> bool:
            return await self._store.remove(session_id, terms, reason, at_ms=now_ms())

        gone: list[str] = []
        try:
            for start in range(0, len(session_ids), AT_ONCE):
                if _is_late():
                    return gone, False
                names = session_ids[start : start + AT_ONCE]
                removed = await asyncio.gather(*map(remove, names))
                gone += [name for name, is_gone in zip(names, removed, strict=True) if is_gone]
        finally:
            if gone:
                log.info("sessions_removed", removed=len(gone))
        return gone, True

    # --- The end of a user ------------------------------------------------------------------------

    async def erase_user(self, user_id: str) -> ErasureView:
        """Remove every session and every task of a user, up to 1,000 of each; count them.

        Those with answers that were never exported too, but no session that is somebody else's by
        now. With `more` there is more to remove: call again. On a Cluster, what began within the
        last second may be missed. Raises `InvalidRequestError`.
        """
        check_owner(None, user_id, "en", workspace_required=False)
        removed, is_rid_of_sessions = await self._erase_sessions(user_id)
        tasks_removed, is_rid_of_tasks = await self._erase_tasks(user_id)
        is_more = not (is_rid_of_sessions and is_rid_of_tasks)
        log.info("user_erased", removed=removed, tasks_removed=tasks_removed, more=is_more)
        return ErasureView(
            user_id=user_id, removed=removed, tasks_removed=tasks_removed, more=is_more
        )

    async def _erase_sessions(self, user_id: str) -> tuple[int, bool]:
        """Remove sessions of a user; count them, and say whether that was all."""
        places = await self._store.list_of_user(user_id, most=MAX_AT_ONCE + 1)
        batch = places[:MAX_AT_ONCE]
        names = [place.partition(":")[2] for place in batch]
        gone, is_done = await self._remove(names, Terms(user_id=user_id), DeleteReason.ERASURE)
        if is_done and batch:
            # The name of the list is the user's: what stands there and is not theirs has to go too.
            spared = sorted(set(names) - set(gone))
            await self._store.delist_user(user_id, batch, spared)
        if is_done:
            # In any case: an earlier call may have come to its end just before.
            await self._events.forget_erased()
        return len(gone), is_done and len(places) <= MAX_AT_ONCE

    async def _erase_tasks(self, user_id: str) -> tuple[int, bool]:
        """Remove tasks of a user; count them, and say whether that was all."""
        places = await self._tasks.list_places(user_id, most=MAX_AT_ONCE + 1)
        batch, removed = places[:MAX_AT_ONCE], 0
        for start in range(0, len(batch), AT_ONCE):
            if _is_late():
                return removed, False
            removed += await self._tasks.erase(user_id, batch[start : start + AT_ONCE])
        return removed, len(places) <= MAX_AT_ONCE

    # --- What all processes share -----------------------------------------------------------------

    async def get_config(self) -> ConfigView:
        """Say what holds for all processes: as operators have set it, else as the settings say."""
        config = await self._store.get_config()
        limit, interval_s = config.max_sessions, config.cleanup_interval_s
        return ConfigView(
            max_sessions=self._defaults["max_sessions"] if limit is None else limit,
            cleanup_interval_s=(
                self._defaults["cleanup_interval_s"] if interval_s is None else interval_s
            ),
        )

    async def reconfigure(self, **changes: float | None) -> ConfigView:
        """Set `max_sessions` (0 = any number), `cleanup_interval_s`, or both, for all processes.

        None goes back to the settings. A lower limit has the sweeper come at once, for what has
        expired and what a rule ends; no other session is lost for it, and as long as there are
        more, none is made.
        Raises `InvalidRequestError`.
        """
        checked = check_config(changes)
        before = None
        with suppress(CorruptRecordError):
            before = await self.get_config()
        await self._store.set_config(checked)
        after = await self.get_config()
        log.info("config_changed", **after)
        limit = after["max_sessions"]
        if limit and (before is None or not 0 < before["max_sessions"] <= limit):
            await self._store.want_sweep()
            self._sweeping = asyncio.create_task(self._sweeper.sweep_if_due(), name="sweep")
            # Most sweeps take no longer; nobody waits for one that does.
            await asyncio.wait([self._sweeping], timeout=SWEPT_WITHIN_S)
        return after

    def register_session_callback(self, event_type: str, callback: Callback) -> Awaitable[None]:
        """Have a callback told of a type of event, of any session, from any process.

        It gets a dict: the fields of the event, and `session_id`. What is returned may be awaited,
        to be sure that what happens next is told. Raises `InvalidRequestError` for a type that
        there is not.
        """
        return self._feed.register(event_type, callback)

    async def start(self) -> None:
        """Begin to sweep in the background."""
        self._sweeper.start()

    async def sweep(self) -> bool:
        """Sweep now, unless somebody else does; say whether it was done."""
        return await self._sweeper.sweep()

    async def shutdown(self, timeout: float = 30) -> bool:  # noqa: ASYNC109 - the callers' name
        """Stop what goes on in the background and close the connections of this event loop.

        Says whether that took less than `timeout` seconds; what then still runs is left to itself.
        """
        closing = asyncio.create_task(self._close(), name="shutdown")
        done, _ = await asyncio.wait([closing], timeout=timeout)
        return bool(done)

    async def aclose(self) -> None:
        """Stop what goes on in the background; connections stay as they are."""
        if self._sweeping is not None:
            await end_task(self._sweeping)
        await self._sweeper.aclose()
        await self._feed.aclose()

    async def _close(self) -> None:
        await self.aclose()
        await self._gateway.aclose()


def _is_late() -> bool:
    """Say whether the running request, if there is one, has to come to its end."""
    context = get_context()
    return context is not None and monotonic_s() > context.deadline_s - TO_ANSWER_S


def make_retention_service(
    gateway: Gateway, tasks: TaskService, settings: Settings
) -> RetentionService:
    """Make a service over a gateway, by the settings."""
    store = RetentionStore(gateway, steps=settings.catalogue.total)
    sweeper = Sweeper(
        store,
        make_stats_store(gateway, settings),
        tasks,
        rules=settings.expiry_rules,
        interval_s=settings.cleanup_interval_s,
        pin=settings.catalogue.pin,
    )
    defaults = ConfigView(
        max_sessions=settings.max_sessions, cleanup_interval_s=settings.cleanup_interval_s
    )
    return RetentionService(gateway, store, sweeper, tasks, settings.catalogue, defaults)


@cache
def get_retention_service() -> RetentionService:
    """Return this process's service, made from the environment; it connects when it is first used.

    It finds the store as `get_onboarding_session_manager` does, and raises the same.
    """
    settings = load_settings()
    gateway = connect(settings)
    return make_retention_service(gateway, TaskService(gateway, settings.task_rules), settings)


# What callers import from here by name, for a worker or a REPL.
_service = stand_in(RetentionService, get_retention_service)
atomic_session_update = _service.atomic_session_update
bulk_update_sessions = _service.bulk_update_sessions
cleanup_completed_sessions = _service.cleanup_completed_sessions
cleanup_failed_sessions = _service.cleanup_failed_sessions
erase_user = _service.erase_user
force_cleanup_all = _service.force_cleanup_all
reconfigure = _service.reconfigure
recover_corrupted_session = _service.recover_corrupted_session
register_session_callback = _service.register_session_callback
shutdown = _service.shutdown
start = _service.start
with_session = _service.with_session
