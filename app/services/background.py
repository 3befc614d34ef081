"""Work that is done again and again beside the requests."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from app.store.client import end_task

log = structlog.get_logger()


class Repeated:
    """Does a job, waits, and does it again, until it is closed. A job that fails is logged."""

    def __init__(self, name: str, job: Callable[[], Awaitable[object]], pause_s: float) -> None:
        self._name = name
        self._job = job
        self._pause_s = pause_s
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with the pause first."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def aclose(self) -> None:
        """End; a job that is being done is given up."""
        self._closing = True
        if self._task is not None:
            await end_task(self._task)

    async def _run(self) -> None:
        while not self._closing:
            await asyncio.sleep(self._pause_s)
            try:
                await self._job()
            except Exception as failure:  # noqa: BLE001 - the next time may be better
                log.warning("job_failed", job=self._name, exception=type(failure).__name__)
