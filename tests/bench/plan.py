"""What one run measures, part by part."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.bench import machine, wizard
from tests.bench.budget import OURS, Findings, Growth
from tests.bench.contestants import KEY, Contestant, bare, described, fastify, ours, running_store
from tests.bench.load import Limits, Request, Wanted, fetch, measure_sets
from tests.bench.node_modules import NoNodeError
from tests.bench.population import (
    CREATE,
    and_finalize,
    at_once,
    begin,
    first_steps,
    step_by_step,
)
from tests.bench.rounds import Cell, Measuring, Spread, commands_us_alone, count_commands, say
from tests.bench.streams import measure_streams
from tests.bench.wizard import STEPS, Operation, Session

PARTS = ("main", "connections", "writes", "workers", "growth", "streams", "floor")

QUICK = ("post", "save", "get", "progress")
"""The operations of a quick run."""

SESSIONS = 100
"""How many full sessions everybody has, and ours as many finalized ones."""

POPULATIONS = (100, 10_000, 40_000)

FULL_BYTES = 40_000
"""What a full session takes in the store, and some more."""

STREAMS = 1000

NEW_SESSIONS = 700
"""Sessions that are begun for each measurement of new steps: 16,100 steps."""

MOST_CREATED = 10_000
"""Most sessions that one measurement of creation makes."""

OTHER_ROUNDS = 3
"""Most rounds over other numbers of connections, of which the budget does not speak."""

PIPELINED = 64
"""How many commands the floor sends at once."""

Result = TypeVar("Result")
Turn = tuple[Contestant, Cell]


class Options(NamedTuple):
    """How much is measured, and how long each time."""

    rounds: int
    limits: Limits
    parts: frozenset[str]
    is_quick: bool


class Plan:
    """One run. Its servers and stores keep their files in a directory that is given."""

    def __init__(self, options: Options, runner: asyncio.Runner, files: Path) -> None:
        self.findings = Findings()
        self._options = options
        self._runner = runner
        self._files = files
        self._places = machine.share_out()
        self.findings.notes.append(f"{str(self._places).capitalize()}.")

    def run(self) -> None:
        """Measure all parts that were asked for. Raises RuntimeError when somebody is not right."""
        machine.pin(self._places.load)
        parts = self._options.parts
        if parts & {"main", "connections", "writes"}:
            self._compare()
        if "workers" in parts:
            self._compare_workers()
        if "growth" in parts:
            self._grow()
        if "streams" in parts:
            say(f"{STREAMS} streams")
            with ours(self._places, self._files) as service:
                self.findings.streams = self._do(measure_streams(service, STREAMS))
        if "floor" in parts:
            self._find_floor()

    # Side by side

    def _compare(self) -> None:
        parts, rounds = self._options.parts, self._options.rounds
        measuring = self._measuring()
        self.findings.main = measuring.results
        with ExitStack() as stack:
            us = stack.enter_context(ours(self._places, self._files))
            self._fill_ours(us)
            for name in ("save", "get", "progress", "summary", "export"):
                asked = count_commands(us, us.learned[name])
                self.findings.asked[name] = self._do(asked)
            lengths = _length(us.learned["summary"]), _length(us.learned["export"])
            yardstick = stack.enter_context(bare(self._places, self._files, *lengths))
            self._do(yardstick.learn())
            if "main" in parts:
                turns = [*_turns(yardstick), *_turns(us)]
                if self._options.is_quick:
                    turns = [turn for turn in turns if turn[1].operation in QUICK]
                else:
                    plain = bare(self._places, self._files, *lengths, is_tuned=False)
                    untuned = stack.enter_context(plain)
                    self._do(untuned.learn())
                    turns += _turns(untuned)[:2]
                    for other in self._others(stack):
                        turns += _turns(other)
                measuring.warm_up(turns)
                measuring.take_in_turns(turns, rounds)
            if "connections" in parts:
                asked_of = ((yardstick, "post"), (us, "save"), (yardstick, "get"), (us, "get"))
                some = [
                    (who, Cell(who.name, operation, count))
                    for who, operation in asked_of
                    for count in (1, 16, 256)
                ]
                measuring.take_in_turns(some, min(rounds, OTHER_ROUNDS))
            if "writes" in parts:
                self._measure_writes(measuring, us)
        self._keep_wrong(measuring)

    def _fill_ours(self, us: Contestant) -> None:
        say("sessions")
        sessions = self._do(begin(us, SESSIONS, at_once))
        finalized = self._do(begin(us, SESSIONS, at_once, and_finalize))
        us.offer(*wizard.of_a_wizard(sessions), *_of_a_generator(finalized))
        self._do(us.learn())

    def _others(self, stack: ExitStack) -> Iterator[Contestant]:
        """Start those whom people would use instead, as far as they are there."""
        starts = [described(self._places, self._files)]
        starts += [fastify(self._places, self._files, is_best=best) for best in (False, True)]
        for start in starts:
            try:
                other = stack.enter_context(start)
            except NoNodeError as missing:
                note = f"Without Fastify: {missing}."
                if note not in self.findings.notes:
                    self.findings.notes.append(note)
                continue
            other.offer(*wizard.of_a_wizard(self._do(begin(other, SESSIONS, step_by_step))))
            self._do(other.learn())
            yield other

    def _measure_writes(self, measuring: Measuring, us: Contestant) -> None:
        """Measure what makes the store grow, and what writes cost it. Comes last for that."""
        alone = self._measuring()
        cell = Cell(OURS, "save")
        found: dict[str, list[float]] = {"save": [], "new": []}
        for number in range(self._options.rounds):
            say(f"new steps and sessions, {number + 1} of {self._options.rounds}")
            measuring.take(us, Cell(OURS, "new"), self._new_steps(us))
            created = (request for request in repeat(us.learned["create"][0], MOST_CREATED))
            measuring.take(us, Cell(OURS, "create"), created)
            server = self._places.server
            found["save"].append(commands_us_alone(alone, us, cell, server))
            new = Cell(OURS, "new")
            found["new"].append(commands_us_alone(alone, us, new, server, self._new_steps(us)))
        self.findings.alone_us = {name: Spread.of(values) for name, values in found.items()}
        self._keep_wrong(alone)

    def _new_steps(self, us: Contestant) -> Iterator[Request]:
        """Begin sessions, and give requests that save each of their steps once."""
        sessions = self._do(begin(us, NEW_SESSIONS))
        # The progress in the answer is shorter, the fewer steps there are.
        status, shortest, longest = us.learned["save"][0].wanted
        wanted = Wanted(status, shortest - 80, longest)
        # Some sessions at a time, a step further each.
        return (
            Request(wizard.save(session, step), wanted)
            for at in range(0, len(sessions), 100)
            for step in wizard.BODIES
            for session in sessions[at : at + 100]
        )

    # Services of their own

    def _compare_workers(self) -> None:
        say("one worker and two")
        measuring = self._measuring()
        self.findings.workers = measuring.results
        with ExitStack() as stack:
            turns: list[Turn] = []
            for workers in (1, 2):
                service = ours(self._places, self._files, workers=workers)
                us = stack.enter_context(service)
                sessions = self._do(begin(us, SESSIONS, at_once))
                us.offer(*wizard.of_a_wizard(sessions)[:2])
                yardstick = stack.enter_context(bare(self._places, self._files, workers=workers))
                for each in (us, yardstick):
                    self._do(each.learn())
                    turns += _turns(each)[:2]
            measuring.warm_up(turns)
            measuring.take_in_turns(turns, self._options.rounds)
        self._keep_wrong(measuring)

    def _grow(self) -> None:
        """Measure saves among more and more sessions."""
        measuring = self._measuring()
        with ours(self._places, self._files) as us:
            store = us.store
            assert store is not None
            sessions: list[Session] = []
            for count in POPULATIONS:
                more = count - len(sessions)
                is_full = more * FULL_BYTES < machine.available_bytes() / 2
                say(f"{count:,} sessions")
                sessions += self._do(begin(us, more, at_once if is_full else first_steps))
                if not is_full:
                    note = f"Beyond {count - more:,} sessions only three steps: no memory for more."
                    self.findings.notes.append(note)
                save = wizard.of_a_wizard(sessions)[0]
                us.offer(save)
                self._do(us.learn())
                # Once before: who was never seen is looked up.
                self._do(fetch(us.address, us.learned["save"]))
                each_us, per_s = [], []
                for _ in range(self._options.rounds):
                    cell = Cell(OURS, "save")
                    each_us.append(commands_us_alone(measuring, us, cell, self._places.server))
                    per_s.append(measuring.take(us, cell).per_s)
                used = int(store.command("INFO", "memory")["used_memory"])
                self.findings.growth.append(
                    Growth(count, used, Spread.of(each_us).middle, Spread.of(per_s).middle)
                )
        self._keep_wrong(measuring)

    def _find_floor(self) -> None:
        """Measure what the store does without a service in front of it."""
        value = b"x" * wizard.BODY_BYTES
        with running_store(self._places, self._files) as store:
            window = self._do(
                measure_sets((store.host, store.port), value, PIPELINED, self._options.limits)
            )
            for what, count in window.wrong.items():
                self.findings.wrong[f"floor: {what}"] = count
            name = f"this load, {PIPELINED} in a write, one connection"
            self.findings.floor[name] = window.per_s
            tool = shutil.which("valkey-benchmark") or shutil.which("redis-benchmark")
            if tool is None:
                note = "Without redis-benchmark: neither it nor valkey-benchmark is on PATH."
                self.findings.notes.append(note)
                return
            name = Path(tool).name
            try:
                self.findings.floor[f"{name}, 64 connections"] = _run_tool(tool, store.port)
            except subprocess.SubprocessError as failure:
                # All that was measured before must not be lost for it.
                self.findings.notes.append(f"Without {name}: {type(failure).__name__}.")

    # What all parts do

    def _measuring(self) -> Measuring:
        return Measuring(self._runner, self._options.limits)

    def _keep_wrong(self, measuring: Measuring) -> None:
        for what, count in measuring.results.wrong.items():
            self.findings.wrong[what] = self.findings.wrong.get(what, 0) + count

    def _do(self, what: Any) -> Any:
        return self._runner.run(what)


def _of_a_generator(finalized: list[Session]) -> list[Operation]:
    """The calls of ours about finalized sessions, and the one that begins a session."""

    def is_export(answer: Any) -> bool:
        return len(answer["steps"]) == STEPS and answer["missing_steps"] == []

    def is_event(answer: Any) -> bool:
        return bool(answer["type"] == "progress" and answer["progress"] == 40)

    def is_new(answer: Any) -> bool:
        return bool(answer["session_token"] and answer["progress"]["completed"] == 0)

    return [
        Operation("export", [wizard.read(each, "export") for each in finalized], is_export),
        Operation(
            "event",
            [
                wizard.write("POST", wizard.path_of(each, "/events"), wizard.EVENT_BODY, key=KEY)
                for each in finalized
            ],
            is_event,
            status=201,
            slack=2,
        ),
        Operation("create", [CREATE.sent], is_new, status=201),
    ]


def _turns(contestant: Contestant) -> list[Turn]:
    """What is measured of a contestant in each round; what makes the store grow is not."""
    names = (name for name in contestant.operations if name != "create")
    return [(contestant, Cell(contestant.name, name)) for name in names]


def _length(requests: Sequence[Request]) -> int:
    _, shortest, longest = requests[0].wanted
    return (shortest + longest) // 2


def _run_tool(tool: str, port: int) -> float:
    """Have redis-benchmark send SETs, and give how many a second it says."""
    command = [tool, "-p", str(port), "-t", "set", "-d", str(wizard.BODY_BYTES), "-c", "64"]
    command += ["-n", "200000", "--csv"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    figures = said.strip().splitlines()[-1].split(",")
    return float(figures[1].strip('"'))
