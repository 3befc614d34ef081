"""What state the store is in, seen by doing what the service does: a small write and a read."""

import asyncio
import os
from collections.abc import Awaitable
from typing import Any, NamedTuple, TypeVar

from redis.exceptions import ResponseError

from app.clock import monotonic_s
from app.store.client import Client, close_client, leave_server, send_and_wait
from app.store.faults import TooFewReplicasError, judge

STEP_S = 0.4
"""Longest wait for one answer, in seconds. The probe's client keeps it too."""

CONNECT_S = 4 * STEP_S
"""Longest wait for an answer that a connection is to be made for, in seconds: a new one asks three
times by itself. Cut after one step, it would never be made where the store is 100 ms away."""

CANARY_MS = 5_000
"""How long the canary lives."""

T = TypeVar("T")

_WRITE = "return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"


class Look(NamedTuple):
    """What one look at the store saw; `fault` names what failed first, if anything did."""

    readable: bool
    writable: bool
    latency_ms: float | None
    fault: str | None


class Probe:
    """Looks at the store over a connection of its own, without a retry.

    A write by a script goes wrong in every state in which a session cannot be saved (out of memory,
    read-only, replicas missing, cluster down, a script that blocks), where PING still says PONG.
    """

    def __init__(self, client: Client, canary: str, replica_wait_ms: int | None = None) -> None:
        """Take a client of its own, and how long a write waits for a replica; None = for none."""
        self._client = client
        self._canary = canary
        self._replica_wait_ms = replica_wait_ms
        self._connected = False

    async def look(self) -> Look:
        """Write the canary; when the store refuses that, see whether it reads. Never raises."""
        begun_s = monotonic_s()
        try:
            await self._write("EVAL", _WRITE, 1, self._canary, "alive", CANARY_MS)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is what we came to see
            fault = judge(failure)
            kind = fault.kind if fault else type(failure).__name__
            if fault is not None and fault.elsewhere:
                await leave_server(self._client)
                self._connected = False
            if not isinstance(failure, ResponseError | TooFewReplicasError):
                return Look(readable=False, writable=False, latency_ms=None, fault=kind)
            readable = await self._can("GET", self._canary) is not _FAILED
            return Look(readable=readable, writable=False, latency_ms=None, fault=kind)
        latency_ms = round((monotonic_s() - begun_s) * 1000, 2)
        return Look(readable=True, writable=True, latency_ms=latency_ms, fault=None)

    async def version(self) -> str | None:
        """Ask which version the store is; None when it will not say."""
        info = await self._can("INFO", "server")
        if not isinstance(info, dict):
            return None
        if "redis_version" not in info:
            # A Cluster client answers by node.
            info = next((node for node in info.values() if isinstance(node, dict)), {})
        # Valkey's redis_version is that of the Redis it once left.
        version = info.get("valkey_version") or info.get("redis_version")
        return None if version is None else str(version)

    async def try_each(self) -> dict[str, bool]:
        """Try a connection, a write, a read and a delete, each by itself. Never raises."""
        # A key of its own: the canary of other probes must not be deleted under them.
        key, value = f"{self._canary}:{os.urandom(8).hex()}", "alive"
        connected = await self._can("GET", key) is not _FAILED
        written = await self._can("SET", key, value, "PX", CANARY_MS) is not _FAILED
        read = await self._can("GET", key) == value.encode()
        deleted = await self._can("DEL", key) == 1
        return {
            "redis_connection": connected,
            "set_operation": written,
            "get_operation": read,
            "delete_operation": deleted,
            "overall_healthy": connected and written and read and deleted,
        }

    async def aclose(self) -> None:
        """Close the probe's connection."""
        await close_client(self._client)

    async def _can(self, *parts: str | int) -> Any:
        try:
            return await self._do(*parts)
        except Exception:  # noqa: BLE001
            return _FAILED

    async def _write(self, *parts: str | int) -> None:
        """Write the canary as a session is written: it is there once a replica has it."""
        if self._replica_wait_ms is None:
            await self._do(*parts)
            return
        waiting = send_and_wait(self._client, self._canary, [parts], self._replica_wait_ms)
        await self._within_limit(waiting)

    async def _do(self, *parts: str | int) -> Any:
        return await self._within_limit(self._client.execute_command(*parts))

    async def _within_limit(self, answering: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(STEP_S if self._connected else CONNECT_S):
                answer = await answering
        except Exception as failure:
            self._connected = isinstance(failure, ResponseError | TooFewReplicasError)
            raise
        self._connected = True
        return answer


_FAILED = object()
