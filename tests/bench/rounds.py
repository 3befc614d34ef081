"""Measurements in turns: what one of them found, and what all rounds come to."""

import asyncio
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from tests.bench.contestants import Contestant, Cost
from tests.bench.load import Limits, Request, Window, fetch, measure
from tests.bench.machine import Cores, on

AT_64 = 64
"""How many connections the budget speaks of."""

WARM_UP = Limits(0.0, 0.5)
"""How long each operation is asked for before the first round."""

FAIR_SHARE = 0.7
"""Most of a server's time that one of two workers may take where both are measured."""

QUIET = 200
"""How many requests are sent one by one to see what each asks of the store."""


class Cell(NamedTuple):
    """What is measured: somebody's operation, over so many connections."""

    who: str
    operation: str
    connections: int = AT_64


class Sample(NamedTuple):
    """What one measurement found; times of the server and the store are per request."""

    per_s: float
    p50_ms: float
    p99_ms: float
    server_us: float
    busy: float
    """Which part of the time the server was running."""
    store_us: float
    """What the store took of its CPU."""
    commands_us: float
    """How long it ran commands."""
    busiest: float = 1.0
    """Which part of the server's time its busiest process took."""


class Spread(NamedTuple):
    """The median of some numbers, and the lowest and highest of them."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "Spread":
        """Take numbers, one at least."""
        known = list(numbers)
        return cls(median(known), min(known), max(known))


@dataclass
class Results:
    """What the rounds have found, in their order."""

    samples: dict[Cell, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that were not what they must be; one of them and nothing counts."""

    def middle(self, cell: Cell, of: Callable[[Sample], float]) -> float | None:
        """Give the median of something over the rounds; None when it was not measured."""
        found = self.samples.get(cell)
        return median(map(of, found)) if found else None

    def ratio(
        self, of: Cell, to: Cell, by: Callable[[Sample], float] = lambda sample: sample.per_s
    ) -> Spread | None:
        """Compare two cells round by round; None when one was not measured.

        What was measured in the same minute is compared, because machines drift.
        """
        if of not in self.samples or to not in self.samples:
            return None
        pairs = zip(self.samples[of], self.samples[to], strict=True)
        ratios = [by(ours) / by(theirs) for ours, theirs in pairs if by(theirs)]
        return Spread.of(ratios) if ratios else None


def sample_of(window: Window, before: Cost, after: Cost) -> Sample:
    """Put together what was answered and what it cost."""
    each = 1e6 / max(1, window.answered)
    pairs = zip(before.processes_s, after.processes_s, strict=True)
    processes_s = [end - begin for begin, end in pairs]
    server_s = sum(processes_s)
    return Sample(
        per_s=window.per_s,
        p50_ms=window.percentile_ms(0.50),
        p99_ms=window.percentile_ms(0.99),
        server_us=server_s * each,
        busy=server_s / window.took_s if window.took_s else 0.0,
        store_us=(after.store_s - before.store_s) * each,
        commands_us=(after.commands_s - before.commands_s) * each,
        busiest=max(processes_s) / server_s if server_s else 0.0,
    )


class Measuring:
    """Takes measurements one after the other and keeps what they found."""

    def __init__(self, runner: asyncio.Runner, limits: Limits) -> None:
        self.results = Results()
        self._runner = runner
        self._limits = limits

    def take(
        self,
        contestant: Contestant,
        cell: Cell,
        requests: Iterable[Request] | None = None,
        tries: int = 10,
    ) -> Sample:
        """Measure once; by default with the requests that the contestant has learned."""
        asked = contestant.learned[cell.operation] if requests is None else requests
        pids = contestant.pids
        costs: list[Cost] = []
        window = self._runner.run(
            measure(
                contestant.address,
                asked,
                cell.connections,
                self._limits,
                lambda: costs.append(contestant.cost(pids)),
            )
        )
        for what, count in window.wrong.items():
            self.results.wrong[f"{cell.who}, {cell.operation}: {what}"] += count
        if not window.answered:
            self.results.wrong[f"{cell.who}, {cell.operation}: nothing was answered"] += 1
        sample = sample_of(window, *costs)
        if contestant.workers > 1 and sample.busiest > FAIR_SHARE and tries > 1:
            # Whoever wakes first may take all connections that wait, and is measured alone then.
            return self.take(contestant, cell, requests, tries - 1)
        self.results.samples[cell].append(sample)
        say(f"{cell.who:24} {cell.operation:10} {cell.connections:4} {sample.per_s:9,.0f}/s")
        return sample

    def warm_up(self, cells: Iterable[tuple[Contestant, Cell]]) -> None:
        """Ask everybody for everything once, so that what is compiled on the way is compiled."""
        for contestant, cell in cells:
            asked = contestant.learned[cell.operation]
            self._runner.run(measure(contestant.address, asked, cell.connections, WARM_UP))

    def take_in_turns(
        self, cells: Sequence[tuple[Contestant, Cell]], rounds: int, seed: int = 7
    ) -> None:
        """Measure all cells in every round, each time in another order."""
        chance = random.Random(seed)
        order = list(cells)
        for _, cell in order:
            # Reports tell them in this order.
            self.results.samples[cell] = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            chance.shuffle(order)
            for contestant, cell in order:
                self.take(contestant, cell)


class Asked(NamedTuple):
    """What one request asks of the store: commands, and how often they come."""

    commands: float
    round_trips: float


async def count_commands(contestant: Contestant, requests: Sequence[Request]) -> Asked:
    """Send requests one by one and count what reaches the store; scripts are one command.

    What the service does in the background is counted as well, a few commands a second; but not the
    record of who read an export, which is written behind the answers, many at a time.
    """
    store = contestant.store
    if store is None:
        raise ValueError("a contestant without a store asks it nothing")
    some = [requests[number % len(requests)] for number in range(QUIET)]
    # Once before: who was never seen may be looked up.
    await fetch(contestant.address, some, 1)
    reader, writer = await asyncio.open_connection(store.host, store.port)
    writer.write(b"MONITOR\r\n")
    await reader.readline()
    before = contestant.cost([]).reads
    await fetch(contestant.address, some, 1)
    after = contestant.cost([]).reads
    writer.write(b"QUIT\r\n")
    lines = (await asyncio.wait_for(reader.read(), 30.0)).splitlines()
    writer.close()
    # 1763671949.120000 [0 127.0.0.1:50412] "GET" "key"; what a script does comes from `lua`.
    sent = [line for line in lines if b"] " in line and b" lua] " not in line]
    own = (b'"INFO"', b'"HELLO"', b'"CLIENT"', b'"QUIT"')
    asked = [line for line in sent if not line.partition(b"] ")[2].upper().startswith(own)]
    behind = sum(b'"onboarding:index:audit:' in line for line in asked)
    return Asked((len(asked) - behind) / QUIET, (after - before - behind) / QUIET)


def commands_us_alone(
    measuring: Measuring,
    contestant: Contestant,
    cell: Cell,
    server: Cores,
    requests: Iterable[Request] | None = None,
) -> float:
    """Say how long the store runs the commands of a request while it has a core for itself.

    The load moves to the server's core: a store that shares its core would be taken off it in the
    middle of commands.
    """
    with on(server):
        return measuring.take(contestant, cell, requests).commands_us


def say(text: str) -> None:
    """Tell whoever waits what is going on."""
    sys.stderr.write(text + "\n")
