"""What the health routes say while the store or the service goes into every state and out again."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.aside import aside
from tests.faults.conftest import Begin, Runs, StartService
from tests.faults.load import Reading, Watch
from tests.faults.proxy import Proxy
from tests.faults.servers import Valkey
from tests.faults.states import (
    NEEDS,
    demoted,
    frozen,
    full,
    killed,
    loading,
    locked,
    unable_to_save,
    without_replicas,
)
from tests.process.service_process import ServiceProcess

CHANGE_S = 1.5
"""Within what time a change must be told, to the bad and to the good."""

ANSWER_S = 0.5
"""Within what time 99 of 100 answers must come."""

ASKED_EVERY_S = 0.1

HEARD = 5
"""How often each route answers at least, once what it tells has to be right."""

STAY_S = CHANGE_S + 1.0
"""How long each state lasts: after the change was told it must be told all the time."""


class Told(NamedTuple):
    """What `/health` must tell, and `/readyz` with the status that is its own."""

    status: str
    reason: str | None = None

    @property
    def health(self) -> int:
        return 200 if self.status == "ok" else 503

    @property
    def readiness(self) -> int:
        return 200 if self.status in {"ok", "degraded"} else 503


FINE = Told("ok")

STATES: dict[str, tuple[Callable[[Valkey], AbstractContextManager[None]], Told]] = {
    "OOM": (full, Told("degraded", "out_of_memory")),
    "READONLY": (demoted, Told("degraded", "readonly")),
    "NOREPLICAS": (without_replicas, Told("degraded", "no_replicas")),
    "MISCONF": (unable_to_save, Told("degraded", "misconfigured")),
    "loading": (loading, Told("down", "loading")),
    "frozen": (frozen, Told("down", "timeout")),
    "killed": (killed, Told("down", "connection")),
    "wrong password": (locked, Told("down", "authentication")),
}
"""How the store gets into a state, and what is right then."""

NEAR_S, FAR_S = 0.05, 0.3
"""How long the way to a slow store takes, there and back again: it is well, and it is away."""


class Watched:
    """A service whose three routes are asked all the time."""

    def __init__(self, service: ServiceProcess, stack: ExitStack) -> None:
        self.service = service
        self.told: list[tuple[float, str]] = []
        """How long after each change something else was told at the latest, and the state."""
        self.took_s: list[float] = []
        """How long the answers took, in each state from its beginning."""
        self._health, self._readiness, self._liveness = (
            stack.enter_context(Watch(service.url, path))
            for path in ("/health", "/readyz", "/livez")
        )

    def see(self, state: str, told: Told) -> None:
        """Stay in a state that has just begun, and look at what was told."""
        begun_s = time.monotonic()
        time.sleep(STAY_S)
        wrong_s = [
            reading.asked_s
            for watch, status in ((self._health, told.health), (self._readiness, told.readiness))
            for reading in watch.readings
            if reading.asked_s > begun_s and not _is_right(reading, status, told)
        ]
        # Until the next time that it was asked.
        for watch in (self._health, self._readiness):
            answered = [each for each in watch.readings if each.asked_s > begun_s]
            assert sum(each.asked_s > begun_s + CHANGE_S for each in answered) >= HEARD, state
            self.took_s += [each.took_s for each in answered]
        after_s = max((at_s - begun_s + ASKED_EVERY_S for at_s in wrong_s), default=0.0)
        self.told.append((after_s, state))
        assert self._liveness.statuses.keys() == {200}


def _is_right(reading: Reading, status: int, told: Told) -> bool:
    return (
        reading.status == status
        and reading.body["status"] == told.status
        and reading.body.get("reason") == told.reason
    )


@pytest.mark.chaos
def test_health_is_right_in_every_state(
    start: StartService, tmp_path: Path, report: Begin, runs: Runs
) -> None:
    row = report("health in 12 states, each begun and ended")
    took_s: list[float] = []
    told: list[tuple[float, str]] = []
    for run in range(runs(5)):
        with ExitStack() as stack:
            store = stack.enter_context(Valkey.start(tmp_path / f"store-{run}", **NEEDS))
            way, _ = stack.enter_context(aside(Proxy(store.port)))
            near = Watched(start(REDIS_URL=store.url), stack)
            way.delay(NEAR_S, shortest_s=NEAR_S)
            far = Watched(start(REDIS_URL=f"redis://{way.host}:{way.port}/0"), stack)
            _walk_through(store, near)
            _walk_away(way, far)
        row.runs += 1
        took_s += near.took_s + far.took_s
        told += near.told + far.told
    p99_s = sorted(took_s)[len(took_s) * 99 // 100]
    latest_s, latest = max(told)
    row.beside |= {
        "asked": f"{len(took_s):,} times",
        "p99": f"{p99_s * 1000:.0f} ms",
        "told": f"{latest_s:.2f} s after the change at the latest ({latest})",
    }
    assert [each for each in told if each[0] > CHANGE_S] == []
    assert p99_s <= ANSWER_S


def _walk_through(store: Valkey, service: Watched) -> None:
    """Put the store into each state, and out of it."""
    service.see("fine", FINE)
    for state, (becoming, told) in STATES.items():
        with becoming(store):
            service.see(state, told)
        service.see(f"healed: {state}", FINE)


def _walk_away(way: Proxy, service: Watched) -> None:
    """Let the store become slow and quick again, and the service end."""
    service.see("far", FINE)
    way.delay(FAR_S, shortest_s=FAR_S)
    service.see("slow", Told("down", "timeout"))
    way.delay(NEAR_S, shortest_s=NEAR_S)
    service.see("healed: slow", FINE)
    service.service.send(signal.SIGTERM)
    service.see("stopping", Told("stopping", "stopping"))
