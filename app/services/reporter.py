"""Reporting progress from inside a generator, whatever lies between it and the service."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import structlog

from app.errors import OnboardingError, StoreError
from app.onboarding.generation import (
    ProgressEvent,
    add_up,
    check_progress_event,
    clean_message,
    progress_of_stage,
    whole_percent,
)
from app.onboarding.sessions import SessionStatus

log = structlog.get_logger()

SEND_AGAIN_S = 1.0
"""Pause before a report that could not be delivered is sent again, in seconds."""

Report = Callable[..., None]
"""Takes `(stage, progress=None, message=None)`; a known stage need not say its progress."""


class Desk(Protocol):
    """Where reports go: the generation service, or a client of it in another process."""

    async def update_session_status(
        self,
        session_id: str,
        status: SessionStatus,
        error_message: str | None = None,
        *,
        run: str | None = None,
    ) -> object:
        """Set the status."""

    async def add_progress_event(self, event: ProgressEvent) -> object:
        """Add a report to the log."""


class ProgressReporter:
    """Reports a run: `processing` on entry, its stages meanwhile, `complete` or `error` on exit.

    Call it with a stage, its progress in percent and a message, from the thread of the event loop
    or any other, wherever a plain `progress_callback(stage, progress, message)` is wanted. Reports
    are delivered in the order of the calls, each once; on exit the last ones are waited for. A call
    raises what an earlier report was refused with, such as `SessionNotFoundError`.

    A run that answers several questions gives each the callback `question(number)`: what they
    report counts for their share, and the run is at 100 once, when all of them are.

    An exception that leaves the block becomes the status `error` with its text, and goes on; a run
    that is cancelled has not ended, and stays `processing` for whoever takes it up. Leaving the
    block raises an `OnboardingError` when what was reported could not be delivered, such as when
    another run of the same session has begun since.
    """

    def __init__(self, session_id: str, desk: Desk | None = None, *, questions: int = 1) -> None:
        """Report on a session; without a desk, to the generation service of this process."""
        if desk is None:
            # Not above: a generator in another process has a client, and no need for a store.
            from app.services.generation import get_generation_service

            desk = get_generation_service()
        self._session_id = session_id
        self._desk = desk
        self._progress = [0] * max(1, questions)
        self._run = os.urandom(8).hex()
        self._count = 0
        self._is_full = False
        self._is_running = False
        self._failure: OnboardingError | None = None
        self._waiting: deque[ProgressEvent] = deque()
        self._calls = threading.Lock()
        self._more = asyncio.Event()

    @property
    def run(self) -> str:
        """The name of the run, for a result that is to be refused when another run has begun."""
        return self._run

    async def __aenter__(self) -> Self:
        """Set the status to `processing`. Raises what the desk raises."""
        self._loop = asyncio.get_running_loop()
        await self._set(SessionStatus.PROCESSING)
        self._delivery = asyncio.create_task(self._deliver(), name="progress-reports")
        self._is_running = True
        return self

    def __call__(
        self, stage: str, progress: float | None = None, message: str | None = None
    ) -> None:
        """Report the run as a whole. Raises `InvalidRequestError`, `RuntimeError` outside it."""
        self._report(None, stage, progress, message)

    def question(self, number: int) -> Report:
        """Give the callback of one question, numbered from 0."""
        if not 0 <= number < len(self._progress):
            raise IndexError(f"the run has {len(self._progress)} questions")

        return partial(self._report, number)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Deliver what is left and set the status that the run ended with."""
        if failure is None and self._failure is None and not self._is_full:
            self("complete")
        with self._calls:
            self._is_running = False
        if isinstance(failure, asyncio.CancelledError):
            self._delivery.cancel()
            return
        self._more.set()
        try:
            await self._delivery
            if failure is None:
                await self._set(SessionStatus.COMPLETE)
                return
            text = clean_message(str(failure)) or type(failure).__name__
            await self._set(SessionStatus.ERROR, text)
        except OnboardingError as undelivered:
            if failure is None:
                raise
            # The caller has worse to hear of.
            log.warning("run_end_not_reported", session_id=self._session_id, code=undelivered.code)

    async def _set(self, status: SessionStatus, error_message: str | None = None) -> None:
        await self._desk.update_session_status(
            self._session_id, status, error_message, run=self._run
        )

    def _report(
        self,
        question: int | None,
        stage: str,
        progress: float | None = None,
        message: str | None = None,
    ) -> None:
        own = progress_of_stage(stage) if progress is None else whole_percent(progress)
        # What is reported from the middle of a library should not fail there for a line break.
        message = None if message is None else clean_message(message)
        check_progress_event(ProgressEvent(self._session_id, stage, own, message))
        with self._calls:
            if not self._is_running:
                raise RuntimeError("the run has ended, or not begun: report within its block")
            if self._failure is not None:
                raise self._failure
            if question is not None:
                self._progress[question] = own
                own = add_up(self._progress)
            if own == 100 and self._is_full:
                return
            self._is_full = own == 100
            event_id = f"{self._run}-{self._count}"
            self._count += 1
            self._waiting.append(
                ProgressEvent(self._session_id, stage, own, message, event_id, self._run)
            )
        self._loop.call_soon_threadsafe(self._more.set)

    async def _deliver(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._waiting:
                last_try = not self._is_running
                try:
                    await self._desk.add_progress_event(self._waiting[0])
                except StoreError:
                    if last_try:
                        raise
                    await asyncio.sleep(SEND_AGAIN_S)
                    continue
                except OnboardingError as refused:
                    # Such as that the session is gone: the run would go on for nobody.
                    self._failure = refused
                    raise
                self._waiting.popleft()
            if not self._is_running:
                return
