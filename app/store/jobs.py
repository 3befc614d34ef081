"""The queue of finalized sessions, which the generators share.

A consumer group on one stream: a job stays with the worker that took it until it is done, and goes
to another one when its worker has not been heard of for a while. So each is done at least once.
"""

from typing import Any

from redis.exceptions import ResponseError

from app.onboarding.jobs import UNCONFIRMED_MS, Job
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway

GROUP = "generators"
"""The consumer group that all generators share."""


class JobStore:
    """Hands jobs out to workers, each of which has a name of its own."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._key = gateway.keys.jobs
        self._looked_at = "0-0"

    async def add(self, session_id: str, revision: int) -> None:
        """Add a job, unless there is one since a moment ago.

        For where the queue does not lie beside the session; else finalize adds it.
        """
        args: list[Argument] = [session_id, revision]
        args += [UNCONFIRMED_MS // 2, self._gateway.lifetime_ms]
        await self._gateway.evaluate("add_job", [self._key], args)

    async def take(self, worker: str, *, abandoned_ms: int, wait_ms: int) -> Job | None:
        """Take a job: one whose worker was not heard of for `abandoned_ms`, or else a new one.

        Waits for a new one; None when none came.
        """
        try:
            return await self._take_over(worker, abandoned_ms) or await self._wait(worker, wait_ms)
        except ResponseError as refused:
            if not str(refused).startswith("NOGROUP"):
                raise
        await self._make_group()
        return None

    async def keep(self, worker: str, job: Job) -> bool:
        """Say that a job is still being worked on; False when it was taken over, or is done."""
        reply = await self._gateway.evaluate("keep_job", [self._key], [GROUP, worker, job.job_id])
        return reply.word == "ok"

    async def finish(self, worker: str, job: Job) -> bool:
        """Take a job out of the queue; False when somebody else has taken it over, or done it."""
        return await self._remove(worker, job.job_id)

    async def leave(self, worker: str) -> None:
        """Forget a worker that will not come back, unless it still has a job."""
        await self._gateway.evaluate("leave_queue", [self._key], [GROUP, worker])

    async def _read(self, worker: str, job_id: bytes, fields: Any) -> Job:
        """Read an entry of the queue; what is no job would only come back, so it goes."""
        try:
            return _job(job_id, fields)
        except (KeyError, ValueError):
            await self._remove(worker, job_id)
            raise corrupt(self._key, "the queue") from None

    async def _remove(self, worker: str, job_id: str | bytes) -> bool:
        reply = await self._gateway.evaluate("finish_job", [self._key], [GROUP, worker, job_id])
        return reply.word == "ok"

    async def _take_over(self, worker: str, abandoned_ms: int) -> Job | None:
        found = await self._gateway.command(
            *("XAUTOCLAIM", self._key, GROUP, worker, abandoned_ms, self._looked_at, "COUNT", 1)
        )
        self._looked_at = found[0].decode()
        return await self._read(worker, *found[1][0]) if found[1] else None

    async def _wait(self, worker: str, wait_ms: int) -> Job | None:
        found = await self._gateway.command_that_waits(
            *("XREADGROUP", "GROUP", GROUP, worker, "COUNT", 1, "BLOCK", wait_ms),
            *("STREAMS", self._key, ">"),
        )
        if not found:
            return None
        # A map of streams, or a list of pairs, as the protocol has it.
        entries = found[self._key.encode()] if isinstance(found, dict) else found[0][1]
        return await self._read(worker, *entries[0])

    async def _make_group(self) -> None:
        try:
            await self._gateway.command(
                "XGROUP", "CREATE", self._key, GROUP, "0", "MKSTREAM", key=self._key
            )
        except ResponseError as refused:
            if not str(refused).startswith("BUSYGROUP"):
                raise


def _job(job_id: bytes, fields: Any) -> Job:
    # Pairs, or a map, as the client gives entries.
    told = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
    return Job(job_id.decode(), told[b"session_id"].decode(), int(told[b"revision"]))
