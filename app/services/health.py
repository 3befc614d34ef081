"""Whether the service can do its work, known before anybody asks."""

from typing import Literal, NotRequired

import structlog
from typing_extensions import TypedDict

from app import __version__
from app.clock import monotonic_s
from app.services.background import Repeated
from app.store.gateway import Gateway
from app.store.health import Look, Probe

log = structlog.get_logger()

LOOK_EVERY_S = 0.3
"""Pause between two looks at the store, in seconds. A look takes two steps of 0.4 s at most, and
after a change to the good a third asks for the version: a change is known within 1.5 s. Only where
the way is slow does a look take longer, that makes a connection."""

Status = Literal["ok", "degraded", "down", "stopping"]

_UNSEEN = Look(readable=False, writable=False, latency_ms=None, fault="not_looked_yet")


class RedisHealth(TypedDict):
    """The state of the store."""

    connected: bool
    writable: bool
    latency_ms: float | None
    mode: str
    version: str | None
    pool: dict[str, int]
    errors_last_minute: int


class HealthReport(TypedDict):
    """The state of the service; `reason` says what is wrong, if anything is."""

    status: Status
    redis: RedisHealth
    version: str
    uptime_s: int
    reason: NotRequired[str]


class HealthMonitor:
    """Looks at the store in the background, so that the answer is ready in a millisecond."""

    def __init__(self, probe: Probe, gateway: Gateway) -> None:
        self._probe = probe
        self._gateway = gateway
        self._look = _UNSEEN
        self._version: str | None = None
        self._began_s = monotonic_s()
        self._stopping = False
        self._looking = Repeated("health", self._look_once, LOOK_EVERY_S)

    async def start(self) -> None:
        """Look once, then go on looking in the background."""
        await self._look_once()
        self._looking.start()

    def stop_soon(self) -> None:
        """Report `stopping` from now on, so that balancers send nobody here any more."""
        self._stopping = True

    async def aclose(self) -> None:
        """Stop looking."""
        await self._looking.aclose()
        await self._probe.aclose()

    @property
    def status(self) -> Status:
        """How the service is, in a word, from the last look."""
        if self._stopping:
            return "stopping"
        if self._look.writable:
            return "ok"
        return "degraded" if self._look.readable else "down"

    @property
    def is_stopping(self) -> bool:
        """Whether the process is about to end."""
        return self._stopping

    @property
    def is_readable(self) -> bool:
        """Whether the store could be read at the last look."""
        return self._look.readable

    def report(self) -> HealthReport:
        """Say how the service is, from the last look."""
        look = self._look
        report = HealthReport(
            status=self.status,
            redis=RedisHealth(
                connected=look.readable,
                writable=look.writable,
                latency_ms=look.latency_ms,
                mode=self._gateway.mode,
                version=self._version,
                pool=self._gateway.describe_pool(),
                errors_last_minute=self._gateway.failures_last_minute,
            ),
            version=__version__,
            uptime_s=int(monotonic_s() - self._began_s),
        )
        if report["status"] != "ok":
            report["reason"] = "stopping" if self._stopping else str(look.fault)
        return report

    async def _look_once(self) -> None:
        before = self.status
        first = self._look is _UNSEEN
        self._look = await self._probe.look()
        status = self.status
        if status != before or first:
            log.info("store_health_changed", status=status, fault=self._look.fault)
            if self._look.readable:
                self._version = await self._probe.version()
