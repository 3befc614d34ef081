"""The report, as Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from tests.bench.budget import BEST, FASTAPI, FASTIFY, OURS, Findings, Row, tail_of
from tests.bench.rounds import AT_64, Asked, Cell, Results

VERDICTS = {True: "holds", False: "misses", None: ""}


def render(
    findings: Findings, rows: Sequence[Row], occasion: str, versions: Mapping[str, str]
) -> str:
    """Write everything; `occasion` is when and on what it was measured."""
    parts = [
        f"Measured on {occasion}.",
        ", ".join(f"{name} {value}" for name, value in versions.items()),
        "\n".join(f"- {note}" for note in findings.notes),
        *_wrong(findings.wrong),
        _table(
            "Budget",
            ("what", "bound", "this run", ""),
            [(row.claim, row.bound, row.value, VERDICTS[row.holds]) for row in rows],
        ),
        _operations(findings.main),
        _others(findings.main),
        _connections(findings.main),
        _asked(findings.asked),
        _workers(findings.workers),
        _growth(findings),
        _streams(findings),
        _floor(findings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _wrong(wrong: Mapping[str, int]) -> Iterator[str]:
    if wrong:
        yield "**Wrong answers, so nothing here counts:** " + ", ".join(
            f"{count} x {what}" for what, count in wrong.items()
        )


def _operations(results: Results) -> str:
    """Everything over 64 connections: how often, how quickly, and what it took."""
    lines = [
        (
            cell.who,
            cell.operation,
            _number(results, cell, "per_s"),
            _decimals(results, cell, "p50_ms"),
            _decimals(results, cell, "p99_ms"),
            _ratio(results.middle(cell, tail_of)),
            _decimals(results, cell, "server_us", 1),
            _per_cpu(results, cell),
            _share(results.middle(cell, lambda sample: sample.busy)),
            _decimals(results, cell, "store_us", 1),
        )
        for cell in results.samples
        if cell.connections == AT_64
    ]
    head = (
        *("who", "operation", "requests/s", "p50 ms", "p99 ms", "p99/p50", "server us"),
        *("requests per CPU-second", "server busy", "store us"),
    )
    return _table("64 connections, one process", head, lines) if lines else ""


def _others(results: Results) -> str:
    """How often ours does an operation in the time that the others take for one."""
    names = [name for name in (FASTAPI, FASTIFY, BEST) if Cell(name, "save") in results.samples]
    lines = []
    for operation in ("save", "get", "progress", "summary"):
        ratios = [results.ratio(Cell(OURS, operation), Cell(name, operation)) for name in names]
        lines.append((operation, *(_ratio(each and each.middle) for each in ratios)))
    return (
        _table("Requests/s of ours, times those of others", ("operation", *names), lines)
        if names
        else ""
    )


def _connections(results: Results) -> str:
    counts = sorted({cell.connections for cell in results.samples})
    whats = {(cell.who, cell.operation) for cell in results.samples if cell.connections != AT_64}
    if len(counts) < 2:
        return ""
    lines = []
    for who, operation in sorted(whats):
        cells = [Cell(who, operation, count) for count in counts]
        per_s = [_number(results, cell, "per_s") for cell in cells]
        lines.append(
            (who, operation, *per_s, *(_decimals(results, cell, "p99_ms") for cell in cells))
        )
    head = ["who", "operation"]
    head += [f"{count}: requests/s" for count in counts]
    head += [f"{count}: p99 ms" for count in counts]
    return _table("By connections", head, lines)


def _asked(asked: Mapping[str, Asked]) -> str:
    lines = [
        (operation, f"{each.commands:.2f}", f"{each.round_trips:.2f}")
        for operation, each in asked.items()
    ]
    title = "What a request of ours asks of the store, the background's few commands included"
    return _table(title, ("operation", "commands", "round trips"), lines) if lines else ""


def _workers(results: Results) -> str:
    lines = [
        (
            cell.who,
            cell.operation,
            _number(results, cell, "per_s"),
            _decimals(results, cell, "server_us", 1),
        )
        for cell in sorted(results.samples)
    ]
    head = ("who", "operation", "requests/s", "server us")
    return _table("One worker and two", head, lines) if lines else ""


def _growth(findings: Findings) -> str:
    lines = [
        (
            f"{each.sessions:,}",
            f"{each.store_bytes / 1e6:,.0f} MB",
            f"{each.store_bytes / each.sessions / 1e3:.1f} KB",
            f"{each.commands_us:.1f}",
            f"{each.per_s:,.0f}",
        )
        for each in findings.growth
    ]
    head = ("sessions", "store", "a session", "store us a save", "saves/s")
    return _table("Overwriting a step as sessions grow in number", head, lines) if lines else ""


def _streams(findings: Findings) -> str:
    streams = findings.streams
    if streams is None:
        return ""
    return (
        f"{streams.opened:,} idle streams: {streams.bytes_each / 1024:.1f} KB of the process each;"
        f" {streams.connections} connections to the store more than the"
        f" {streams.connections_before} before."
    )


def _floor(findings: Findings) -> str:
    lines = [(name, f"{per_s:,.0f}") for name, per_s in findings.floor.items()]
    return _table("The floor: SET of 1 KB", ("who", "a second"), lines) if lines else ""


# --- Figures as text ------------------------------------------------------------------------------


def _number(results: Results, cell: Cell, of: str) -> str:
    value = results.middle(cell, lambda sample: float(getattr(sample, of)))
    return "" if value is None else f"{value:,.0f}"


def _decimals(results: Results, cell: Cell, of: str, decimals: int = 2) -> str:
    value = results.middle(cell, lambda sample: float(getattr(sample, of)))
    # Nobody who has no store takes anything of it, and some systems do not tell.
    return f"{value:,.{decimals}f}" if value else ""


def _per_cpu(results: Results, cell: Cell) -> str:
    each_us = results.middle(cell, lambda sample: sample.server_us)
    return f"{1e6 / each_us:,.0f}" if each_us else ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return f"{min(value, 1.0):.0%}" if value else ""


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"### {title}", "", row(head), rule, *map(row, lines)])
