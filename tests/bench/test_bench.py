"""The benchmark counts what it says it counts, and tells what it found."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.bench import wizard
from tests.bench.__main__ import _parse
from tests.bench.budget import (
    AGAINST_BARE,
    BARE,
    OURS,
    TWO,
    Findings,
    Growth,
    Row,
    judge,
    status_of,
)
from tests.bench.contestants import Contestant, Cost
from tests.bench.load import Address, Limits, Request, Wanted, Window, fetch, measure, measure_sets
from tests.bench.machine import cpu_s, processes_of, resident_bytes, share_out
from tests.bench.node_modules import NoNodeError, find_node, install
from tests.bench.picture import Bar, Group, draw, groups_of
from tests.bench.report import render
from tests.bench.rounds import (
    Asked,
    Cell,
    Results,
    Sample,
    Spread,
    count_commands,
    sample_of,
)
from tests.bench.streams import Streams
from tests.bench.wizard import Operation, Session
from tests.faults.servers import Valkey

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SHORTLY = Limits(0.0, 0.05)
ASKED = wizard.write("GET", "/x")
RIGHT = Request(ASKED, Wanted(200, 2, 2))

Reply = Callable[[int], bytes]
"""What the nth request is answered with; nothing closes the connection."""


def http(body: bytes = b"{}", status: bytes = b"200 OK", name: bytes = b"content-length") -> bytes:
    return b"HTTP/1.1 %s\r\ndate: x\r\n%s: %d\r\n\r\n%s" % (status, name, len(body), body)


async def nothing() -> None:
    """Do what a server without a store does before it answers."""


@asynccontextmanager
async def answering(
    reply: Reply, size: int = 65_536, first: Callable[[], Awaitable[None]] = nothing
) -> AsyncIterator[Address]:
    """Answer requests without a body in pieces of a size, each after something else is done."""
    numbers = count()
    talks: set[asyncio.Task[None] | None] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                await first()
                text = reply(next(numbers))
                if not text:
                    break
                for at in range(0, len(text), size):
                    writer.write(text[at : at + size])
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()
    await asyncio.gather(*filter(None, talks))


async def load(reply: Reply, size: int = 65_536) -> Window:
    async with answering(reply, size) as address:
        return await measure(address, [RIGHT], 4, SHORTLY)


# The load


async def test_right_answers_are_counted_and_timed() -> None:
    window = await load(lambda _: http())

    assert window.answered > 10
    assert window.wrong == {}
    assert window.answered - 4 <= len(window.latencies_ns) <= window.answered
    assert 0 < window.percentile_ms(0.5) <= window.percentile_ms(0.99) < 50
    assert window.per_s == pytest.approx(window.answered / window.took_s)


async def test_an_answer_in_pieces_is_one_answer() -> None:
    window = await load(lambda _: http(), size=7)
    assert window.answered > 1
    assert window.wrong == {}


async def test_a_header_may_be_spelled_as_one_likes() -> None:
    window = await load(lambda _: http(name=b"Content-Length"))
    assert window.answered > 1
    assert window.wrong == {}


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (http(status=b"503 Service Unavailable"), "status 503 instead of 200"),
        (http(b"{ }"), "body of 3 bytes instead of 2 to 2"),
        (http(b"1"), "body of 1 bytes instead of 2 to 2"),
        (http() + b"{}", "more bytes than Content-Length says"),
        (http(name=b"x-length"), "answer without Content-Length"),
        (b"", "connection lost"),
    ],
    ids=["status", "longer", "shorter", "too much", "no length", "closed"],
)
async def test_a_wrong_answer_is_told_and_not_counted(reply: bytes, what: str) -> None:
    window = await load(lambda number: reply if number == 20 else http())
    assert window.wrong == {what: 1}


async def test_nothing_but_wrong_answers_end_a_measurement_early() -> None:
    begun_s = time.monotonic()
    async with answering(lambda _: http(b"1")) as address:
        window = await measure(address, [RIGHT], 4, Limits(30.0, 30.0))
    assert window.answered == 0
    assert time.monotonic() - begun_s < 15


async def test_what_may_be_asked_once_is_asked_once() -> None:
    requests = iter([RIGHT] * 50)
    # From the 51st on the answers would be wrong.
    async with answering(lambda number: http() if number < 50 else http(b"1")) as address:
        window = await measure(address, requests, 4, Limits(0.0, 30.0))
    assert [*requests] == []
    assert window.wrong == {}
    assert window.took_s < 15


async def test_the_cost_is_looked_at_around_what_is_measured() -> None:
    looked: list[float] = []
    async with answering(lambda _: http()) as address:
        limits = Limits(0.02, 0.05)
        window = await measure(
            address, [RIGHT], 2, limits, lambda: looked.append(time.perf_counter())
        )
    before, after = looked
    assert window.took_s == pytest.approx(after - before, abs=0.02)


async def test_answers_are_fetched_in_the_order_of_their_questions() -> None:
    async with answering(lambda number: http(b"%d" % number)) as address:
        answers = await fetch(address, [RIGHT] * 20, 1)
    assert [int(answer.body) for answer in answers] == [*range(20)]


async def test_a_refusal_while_fetching_is_an_error_that_says_what_was_asked() -> None:
    async with answering(lambda _: http(b'{"code":"x"}', b"429 Slow")) as address:
        with pytest.raises(RuntimeError, match=r'GET /x answered 429: .*"code":"x"'):
            await fetch(address, [RIGHT] * 3)


async def test_raw_sets_reach_the_store(store: Valkey) -> None:
    window = await measure_sets((store.host, store.port), b"v" * 1024, 16, SHORTLY)
    assert window.wrong == {}
    assert window.answered > 100
    assert store.command("GET", "floor") == "v" * 1024


async def test_commands_are_counted_on_their_way_and_scripts_are_one(store: Valkey) -> None:
    reader, writer = await asyncio.open_connection(store.host, store.port)

    async def ask() -> None:
        for command in (b"EVAL \"return redis.call('DEL', 'a')\" 0\r\n", b"DEL a\r\n"):
            writer.write(command)
            await reader.readline()

    async with answering(lambda _: http(), first=ask) as address:
        asked = await count_commands(Contestant("ours", address, 0, store), [RIGHT])
    writer.close()
    await writer.wait_closed()

    assert round(asked.commands) == 2
    assert round(asked.round_trips) == 2


# What is sent


def test_every_save_has_the_same_kilobyte() -> None:
    assert {len(body) for body in wizard.BODIES.values()} == {wizard.BODY_BYTES}
    assert json.loads(wizard.BODIES[7])["data"] == wizard.answers(7)


def test_a_step_is_saved_together_with_others_in_the_same_bytes() -> None:
    alone = wizard.BODIES[3].removeprefix(b'{"data":').removesuffix(b"}")
    assert alone in wizard.FILL_BODY


def test_what_is_asked_for_goes_over_all_sessions_and_steps() -> None:
    few = [Session(str(number)) for number in range(3)]
    assert len({*wizard.everywhere(few)}) == 3 * wizard.STEPS

    many = [Session(str(number)) for number in range(40_000)]
    sample = [*wizard.everywhere(many)]
    assert len(sample) == wizard.SAMPLE
    assert {step for _, step in sample} == {*range(1, wizard.STEPS + 1)}


async def test_how_long_answers_are_is_learned_from_right_ones_only() -> None:
    operation = Operation("x", [ASKED] * 5, lambda answer: "ok" in answer, slack=3)

    async with answering(lambda number: http(b'{"ok":%d}' % 10**number)) as address:
        learned = await operation.learn(address)
    assert [request.wanted for request in learned] == [Wanted(200, 8 - 3, 9 + 3)] * 5

    async with answering(lambda _: http(b'{"no":1}')) as address:
        with pytest.raises(RuntimeError, match="x answered"):
            await operation.learn(address)


# What it comes to


def sample(per_s: float, p99_ms: float = 2.0, server_us: float = 30.0) -> Sample:
    return Sample(per_s, 1.0, p99_ms, server_us, 1.0, 9.0, 6.0)


def results(**per_s: list[float]) -> Results:
    """Make results of ours by operation, beside a bare one that always does 1,000 a second."""
    found = Results()
    for operation, values in per_s.items():
        theirs, _ = AGAINST_BARE[operation]
        found.samples[Cell(OURS, operation)] = [sample(value) for value in values]
        found.samples[Cell(BARE, theirs)] = [sample(1000.0)] * len(values)
    return found


def row_of(findings: Findings, begin: str) -> Row:
    (row,) = (row for row in judge(findings) if row.claim.startswith(begin))
    return row


def test_ratios_are_of_the_same_round_and_the_one_in_the_middle_counts() -> None:
    found = Results()
    found.samples[Cell("a", "x")] = [sample(10.0), sample(40.0), sample(90.0)]
    found.samples[Cell("b", "y")] = [sample(10.0), sample(20.0), sample(30.0)]
    assert found.ratio(Cell("a", "x"), Cell("b", "y")) == Spread(2.0, 1.0, 3.0)
    assert found.ratio(Cell("a", "x"), Cell("c", "y")) is None
    assert found.middle(Cell("a", "x"), lambda each: each.per_s) == 40.0
    assert found.middle(Cell("c", "x"), lambda each: each.per_s) is None


def test_what_was_spent_is_told_for_each_answer() -> None:
    window = Window(answered=1000, took_s=2.0, latencies_ns=[1_000_000])
    before = Cost((5.0, 1.0), store_s=3.0, commands_s=1.0)
    after = Cost((5.3, 1.1), store_s=3.2, commands_s=1.1)
    found = sample_of(window, before, after)
    assert (found.per_s, found.p50_ms) == (500.0, 1.0)
    assert found.server_us == pytest.approx(400.0)
    assert found.busy == pytest.approx(0.2)
    assert found.busiest == pytest.approx(0.75)
    assert (found.store_us, found.commands_us) == pytest.approx((200.0, 100.0))


def test_percentiles_are_those_of_what_was_measured() -> None:
    window = Window(latencies_ns=[number * 1_000_000 for number in range(100, 0, -1)])
    assert window.percentile_ms(0.5) == 51
    assert window.percentile_ms(0.99) == 100
    assert Window().percentile_ms(0.5) == 0


@pytest.mark.parametrize(("per_s", "holds"), [(1000.0, True), (999.0, False)])
def test_a_row_holds_at_its_bound_and_misses_below(per_s: float, holds: bool) -> None:
    findings = Findings(main=results(save=[1.0, per_s, 5000.0]))
    assert row_of(findings, "save: requests/s, times those of a bare route").holds is holds


def test_what_was_not_measured_is_not_judged() -> None:
    rows = judge(Findings())
    assert {row.holds for row in rows} == {None}
    assert {row.value for row in rows} == {"not measured"}


def test_every_row_of_the_budget_is_judged_when_all_was_measured() -> None:
    workers = Results()
    for operation in ("save", "get"):
        workers.samples[Cell(OURS, operation)] = [sample(1.0, server_us=30.0)]
        workers.samples[Cell(TWO, operation)] = [sample(1.0, server_us=34.0)]
    findings = Findings(
        workers=workers,
        asked={"save": Asked(1.04, 1.04), "export": Asked(2.03, 2.03)},
        alone_us={"save": Spread.of([8.0]), "new": Spread.of([18.1])},
        streams=Streams(1000, 20 * 1024, 1, 3),
    )
    verdicts = {
        "save: commands": True,
        "export: round trips": False,
        "an overwrite": True,
        "a new step": False,
        "save: CPU": False,
        "memory of an idle stream": True,
        "connections to the store": True,
    }
    assert {name: row_of(findings, name).holds for name in verdicts} == verdicts


def test_a_miss_or_a_wrong_answer_ends_with_a_failure() -> None:
    held = Row("a", "b", "c", holds=True)
    missed = Row("a", "b", "c", holds=False)
    unknown = Row("a", "b", "c", holds=None)
    assert status_of(Findings(), [held, unknown], judges=True) == 0
    assert status_of(Findings(), [held, missed], judges=True) == 1
    assert status_of(Findings(), [held, missed], judges=False) == 0
    assert status_of(Findings(wrong={"x": 1}), [held], judges=False) == 1


# How it is told


def test_a_report_tells_what_was_measured_on_and_every_row() -> None:
    findings = Findings(main=results(save=[1100.0, 1200.0], get=[900.0, 900.0]))
    findings.growth.append(Growth(40_000, 1_320_000_000, 7.5, 9000.0))
    findings.notes.append("Without Fastify: node is not on PATH.")

    report = render(findings, judge(findings), "2026-01-01", {"Python": "3.11.7"})

    assert "Measured on 2026-01-01.\n\nPython 3.11.7\n\n- Without" in report
    assert "- Without Fastify: node is not on PATH." in report
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert [
        "save: requests/s, times those of a bare route",
        "at least 1",
        "1.15 (1.10 to 1.20)",
        "holds",
    ] in lines
    assert [
        "get: requests/s, times those of a bare route",
        "at least 0.95",
        "0.90 (0.90 to 0.90)",
        "misses",
    ] in lines
    assert ["40,000", "1,320 MB", "33.0 KB", "7.5", "9,000"] in lines
    assert "Wrong answers" not in report


def test_the_columns_of_every_table_are_in_line() -> None:
    findings = Findings(main=results(save=[1100.0], export=[1.0]))
    report = render(findings, judge(findings), "2026-01-01", {})
    tables = [part for part in report.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 2
    assert [len({len(line) for line in table.splitlines()}) for table in tables] == [1] * len(
        tables
    )


def test_wrong_answers_stand_at_the_top() -> None:
    findings = Findings(wrong={"ours, get: status 503 instead of 200": 3})
    report = render(findings, [], "2026-01-01", {})
    told = report.index("**Wrong answers, so nothing here counts:** 3 x ours, get: status 503")
    assert told < report.index("### Budget")


def test_a_picture_has_a_bar_for_every_ratio_and_suits_dark_pages() -> None:
    groups = groups_of(results(save=[1200.0], get=[950.0]))
    assert groups == [
        Group(
            "Requests/s, times those of a bare Starlette route that does nothing",
            [Bar("save", 1.2, 1.0), Bar("get", 0.95, 0.95)],
        )
    ]
    text = draw(groups, "Told <below>.")
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    page, *bars = root.iter(f"{space}rect")
    assert page.attrib["class"] == "page"
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 2
    assert widths[0] / widths[1] == pytest.approx(1.2 / 0.95, rel=0.01)
    assert len([*root.iter(f"{space}line")]) == 2
    assert "prefers-color-scheme: dark" in text
    texts = [each.text or "" for each in root.iter(f"{space}text")]
    assert {"save", "1.20", "get", "0.95"} <= {*texts}
    assert texts[-1].endswith("Told <below>.")


# The machine


@linux_only
def test_the_time_that_a_process_takes_is_seen() -> None:
    here = [os.getpid()]
    before_s = cpu_s(here)
    until_s = time.thread_time() + 0.05
    while time.thread_time() < until_s:
        pass
    assert 0.03 < cpu_s(here) - before_s < 5
    assert resident_bytes(here) > 10_000_000


@linux_only
def test_the_processes_of_a_session_are_found() -> None:
    assert os.getpid() in processes_of(os.getsid(0))


def test_processes_that_are_gone_cost_nothing() -> None:
    assert cpu_s([2**22 + 1]) == 0
    assert resident_bytes([2**22 + 1]) == 0


def test_the_server_shares_its_core_with_nobody_where_there_are_two() -> None:
    places = share_out()
    assert not places.server & places.load or "one core" in str(places) or "nothing" in str(places)


def test_a_machine_without_node_is_told_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NoNodeError, match="node is not on PATH"):
        find_node()
    with pytest.raises(NoNodeError, match="npm is not on PATH"):
        install()


def test_options_have_defaults_for_a_whole_run() -> None:
    asked = _parse([])
    assert (asked.rounds, asked.only, asked.quick, asked.no_judge) == (None, None, False, False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Valkey]:
    """Run a store."""
    with Valkey.start(tmp_path / "store") as server:
        yield server
