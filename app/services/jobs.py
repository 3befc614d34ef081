"""The work of generators: every finalized session, handed to some generator at least once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from app.clock import now_ms
from app.errors import CorruptRecordError, SessionNotFoundError, StoreError
from app.onboarding.jobs import Course, Job, plan_job
from app.settings import load_settings
from app.store.connect import connect
from app.store.gateway import Gateway
from app.store.jobs import JobStore
from app.store.sessions import SessionStore

log = structlog.get_logger()

ABANDONED_S = 30.0
"""How long nothing is heard of a generator before another one takes its job over, in seconds."""

HEARTBEATS = 3
"""How often a generator says within that time that it is still at work."""

WAIT_S = 0.5
"""Longest wait for a new job in one look, in seconds; less than one command may take."""

LOOKS = 20
"""How often a session that is about to be finalized is looked at, before its job is left alone for
as long as an abandoned one."""

LOOK_AGAIN_S = 0.05
"""Pause between two of these looks, in seconds."""

TRY_AGAIN_S = 1.0
"""Pause before the queue is asked again when the store could not be, in seconds."""


LEAVE_S = 0.5
"""How long a generator that ends may take to say so, in seconds."""


class JobService:
    """Hands finalized sessions to one generator, which has a name of its own.

    Several generators share the work; a job whose generator has died goes to another one.
    """

    def __init__(
        self,
        gateway: Gateway,
        worker: str,
        *,
        abandoned_s: float = ABANDONED_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._wait_s = wait_s
        self._gateway = gateway
        self._jobs = JobStore(gateway)
        self._sessions = SessionStore(gateway)
        self._worker = worker
        self._abandoned_s = abandoned_s

    async def jobs(self) -> AsyncGenerator[Job, None]:
        """Give the jobs that are to be done, one after the other, for ever."""
        while True:
            try:
                job = await self._jobs.take(
                    self._worker,
                    abandoned_ms=int(self._abandoned_s * 1000),
                    wait_ms=max(1, int(self._wait_s * 1000)),
                )
                is_due = job is not None and await self._choose(job) is Course.WORK
            except StoreError as failure:
                log.warning("queue_unreachable", code=failure.code)
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            if job is not None and is_due:
                yield job

    @asynccontextmanager
    async def hold(self, job: Job) -> AsyncIterator[None]:
        """Keep a job for the length of a block, and take it out of the queue at its end.

        It stays in the queue, for this generator or another, when the block is cancelled or the
        store is away. An error of the generator itself would only come again, so it does not. When
        another generator has taken the job over, the block is ended, and the job is theirs.
        """
        block = asyncio.current_task()
        heartbeat = asyncio.create_task(self._beat(job, block), name="heartbeat")
        try:
            yield
        except asyncio.CancelledError:
            if block is None or not heartbeat.done():
                raise
            if block.uncancel():
                # Somebody else has cancelled as well.
                raise
            return
        except Exception as failure:  # noqa: BLE001 - the reporter has told, and the next job waits
            kind = type(failure).__name__
            if isinstance(failure, StoreError) and not isinstance(failure, CorruptRecordError):
                log.warning("job_left", session_id=job.session_id, exception=kind)
                return
            log.error("generation_failed", session_id=job.session_id, exception=kind)
        finally:
            heartbeat.cancel()
        # If that fails, the job comes once more, and is found to be done.
        with suppress(StoreError):
            is_ours = await self._jobs.finish(self._worker, job)
            log.info(
                "job_finished" if is_ours else "job_finished_elsewhere",
                session_id=job.session_id,
                revision=job.revision,
            )

    async def aclose(self) -> None:
        """Leave the queue, and close the connections of this event loop."""
        # A courtesy, for which nobody waits long.
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._jobs.leave(self._worker)
        await self._gateway.aclose()

    async def _beat(self, job: Job, block: "asyncio.Task[None] | None") -> None:
        while True:
            await asyncio.sleep(self._abandoned_s / HEARTBEATS)
            with suppress(StoreError):
                if not await self._jobs.keep(self._worker, job):
                    log.warning("job_lost", session_id=job.session_id)
                    if block is not None:
                        block.cancel()
                    return

    async def _choose(self, job: Job) -> Course:
        for _ in range(LOOKS):
            try:
                state = await self._sessions.get_state(job.session_id)
            except SessionNotFoundError:
                state = None
            except CorruptRecordError:
                # Nobody could work on it, now or later; the log names the key.
                course = Course.DROP
                break
            course = plan_job(job, state, now_ms())
            if course is not Course.LEAVE:
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        if course is Course.DROP:
            await self._jobs.finish(self._worker, job)
        return course


def get_job_service(worker: str, *, abandoned_s: float = ABANDONED_S) -> JobService:
    """Make a job service from the environment, as `get_onboarding_session_manager` makes its own.

    `worker` is a name that no other generator has. Raises the same.
    """
    settings = load_settings()
    wait_s = min(WAIT_S, settings.redis_timeout_s / 2)
    return JobService(connect(settings), worker, abandoned_s=abandoned_s, wait_s=wait_s)
