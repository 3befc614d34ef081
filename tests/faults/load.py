"""Wizards that save steps while something fails, and the ledger of what was acknowledged to them.

Every write is one of its kind: a step is saved once, with a number of its own. So each one that was
acknowledged can be looked for afterwards, and one that took effect twice has a second version or a
second event.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count, pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

from httpx2 import AsyncClient, Client, Limits, Response, TransportError

from tests.faults.servers import ends_with_us
from tests.service import BASE

PATIENCE_S = 30.0
"""How long a client waits for an answer: twice as long as the service may take."""


class Found(NamedTuple):
    """What reading back has shown: writes that are gone, and writes that are there twice."""

    lost: int
    duplicated: int


@dataclass
class Ledger:
    """What was acknowledged, what was not, and when. Times are those of `time.monotonic`."""

    sessions: set[str] = field(default_factory=set)
    steps: dict[tuple[str, int], int] = field(default_factory=dict)
    """Which number was acknowledged, by session and step."""
    errors: Counter[str] = field(default_factory=Counter)
    """Answers that were no acknowledgement: `503 store_unavailable`, or how a connection broke."""
    acknowledged_at: list[float] = field(default_factory=list)
    saved: list[tuple[float, str]] = field(default_factory=list)
    """When a write was acknowledged, and to which session; "" for one that begins."""
    longest_answer_s: float = 0.0

    @property
    def acknowledged(self) -> int:
        return len(self.acknowledged_at)

    @property
    def longest_gap_s(self) -> float:
        """The longest time in which nothing was acknowledged."""
        return max((after - before for before, after in pairwise(self.acknowledged_at)), default=0)

    def read_back(self, url: str) -> Found:
        """Look for everything, in the service at `url`."""
        lost = duplicated = 0
        wanted_of: dict[str, dict[int, int]] = {session_id: {} for session_id in self.sessions}
        for (session_id, step_id), number in self.steps.items():
            wanted_of[session_id][step_id] = number
        with Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            for session_id, wanted in wanted_of.items():
                path = f"{BASE}/{session_id}"
                answer = client.get(f"{path}/steps")
                if answer.status_code == 404:
                    lost += 1 + len(wanted)
                    continue
                assert answer.status_code == 200, answer.text
                there = {int(n): step for n, step in answer.json()["steps"].items()}
                for step_id, number in wanted.items():
                    step = there.get(step_id)
                    lost += step is None or step["data"]["number"] != number
                answer = client.get(f"{path}/events", params={"type": "step_saved", "limit": 1000})
                told = Counter(event["step_id"] for event in answer.json()["events"])
                duplicated += sum(
                    step["version"] != 1 or told[step_id] != 1 for step_id, step in there.items()
                )
        return Found(lost, duplicated)


class Load:
    """So many wizards, who save so many steps a second between them, for the length of a block.

    Each waits for its answer before it goes on, as people do: what comes while the store is away
    waits, and no more than one request of each. They run in a thread of their own.
    """

    def __init__(self, *urls: str, wizards: int = 100, per_second: float = 100.0) -> None:
        """Take where the service is; of several addresses the wizards take one in turn."""
        self.ledger = Ledger()
        self._urls = urls
        self._wizards = wizards
        self._pace_s = wizards / per_second
        self._numbers = count()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def wait_for_ack(self, after_s: float, limit_s: float = 60.0) -> float:
        """Wait for a write that was begun and acknowledged after a moment; say how long after."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            last_s = self.ledger.acknowledged_at[-1] if self.ledger.acknowledged_at else 0.0
            if last_s > after_s:
                return next(at for at in self.ledger.acknowledged_at if at > after_s) - after_s
            time.sleep(0.005)
        raise TimeoutError(f"nothing was acknowledged for {limit_s} s; {self.ledger.errors}")

    def wait_for_acks(self, acknowledged: int, limit_s: float = 60.0) -> None:
        """Wait until so many writes were acknowledged in all."""
        deadline_s = time.monotonic() + limit_s
        while self.ledger.acknowledged < acknowledged:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self.ledger.acknowledged} in {limit_s} s")
            time.sleep(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.wait_for_acks(self._wizards)
        except TimeoutError:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Let every wizard finish what it is doing."""
        self._ended.set()
        self._thread.join(2 * PATIENCE_S)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        limits = Limits(max_connections=None)
        async with AsyncClient(timeout=PATIENCE_S, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._write(client, n) for n in range(self._wizards)))

    async def _write(self, client: AsyncClient, number: int) -> None:
        url = self._urls[number % len(self._urls)]
        await asyncio.sleep(self._pace_s * number / self._wizards)
        while not self._ended.is_set():
            await self._fill_a_session(client, url)

    async def _fill_a_session(self, client: AsyncClient, url: str) -> None:
        answer = await self._send(client, f"{url}{BASE}/session", {"workspace_id": "w1"})
        if answer is None:
            return
        session_id = answer.json()["session_id"]
        self.ledger.sessions.add(session_id)
        for step_id in range(1, 24):
            number = next(self._numbers)
            path = f"{url}{BASE}/{session_id}/steps/{step_id}"
            body = {"data": {"number": number}}
            if await self._send(client, path, body, session_id) is not None:
                self.ledger.steps[session_id, step_id] = number
            if self._ended.is_set():
                return

    async def _send(
        self, client: AsyncClient, url: str, body: object, session_id: str = ""
    ) -> Response | None:
        """Write; None when it was not acknowledged. Takes as long as the pace asks for."""
        begun_s = time.monotonic()
        answer: Response | None = None
        try:
            answer = await client.post(url, json=body)
        except TransportError as broken:
            self.ledger.errors[type(broken).__name__] += 1
        now_s = time.monotonic()
        self.ledger.longest_answer_s = max(self.ledger.longest_answer_s, now_s - begun_s)
        if answer is not None and answer.is_success:
            self.ledger.acknowledged_at.append(now_s)
            self.ledger.saved.append((now_s, session_id))
        elif answer is not None:
            what = f"{answer.status_code} {answer.json()['code']}"
            if answer.status_code == 503 and "Retry-After" not in answer.headers:
                what += " without Retry-After"
            self.ledger.errors[what] += 1
            answer = None
        while not self._ended.is_set() and (left_s := begun_s + self._pace_s - now_s) > 0:
            await asyncio.sleep(min(left_s, 0.2))
            now_s = time.monotonic()
        return answer


class Reading(NamedTuple):
    """What was answered, asked at a moment of `time.monotonic`; status 0 is no answer."""

    asked_s: float
    took_s: float
    status: int
    body: Any


_WATCHING = """
import http.client, json, select, sys, time
link = http.client.HTTPConnection(sys.argv[1], timeout=float(sys.argv[3]))
while not select.select([sys.stdin], [], [], 0.1)[0]:
    begun_s = time.monotonic()
    status, body = 0, {}
    try:
        link.request("GET", sys.argv[2])
        with link.getresponse() as answer:
            body, status = json.loads(answer.read()), answer.status
    except (OSError, http.client.HTTPException):
        link.close()
    print(json.dumps([begun_s, time.monotonic() - begun_s, status, body]), flush=True)
"""


class Watch:
    """Asks a path ten times a second for the length of a block, on one connection.

    From a process of its own, which no wizard keeps from running. Enter it in the main thread.
    """

    def __init__(self, url: str, path: str) -> None:
        self.readings: list[Reading] = []
        self._command = [sys.executable, "-IS", "-c", _WATCHING, url.removeprefix("http://"), path]
        self._thread = threading.Thread(target=self._listen)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(reading.status for reading in self.readings)

    @property
    def took_s(self) -> list[float]:
        return [reading.took_s for reading in self.readings]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ends_with_us([*self._command, str(PATIENCE_S)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._thread.join(2 * PATIENCE_S)
        with self._process:
            self._process.kill()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.readings.append(Reading(*json.loads(line)))
