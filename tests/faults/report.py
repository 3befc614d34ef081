"""The table that `make chaos` prints: a row for each fault."""

from collections import Counter
from dataclasses import dataclass, field

from tests.faults.load import Found, Ledger

HEAD = ("fault", "runs", "acknowledged", "lost", "duplicated", "errors", "longest gap", "beside")


@dataclass
class Row:
    """What one fault did, over all of its runs.

    `gap_s` is the longest time in which nothing was acknowledged; `beside` is what else was
    measured, in words.
    """

    fault: str
    runs: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    gap_s: float | None = None
    beside: dict[str, str] = field(default_factory=dict)

    def add(self, ledger: Ledger, found: Found) -> None:
        """Count a run."""
        self.runs += 1
        self.acknowledged += ledger.acknowledged
        self.lost += found.lost
        self.duplicated += found.duplicated
        self.errors += ledger.errors
        self.gap_s = max(self.gap_s or 0.0, ledger.longest_gap_s)

    def cells(self) -> tuple[str, ...]:
        errors = ", ".join(f"{count} x {what}" for what, count in self.errors.items())
        return (
            self.fault,
            str(self.runs),
            f"{self.acknowledged:,}",
            str(self.lost),
            str(self.duplicated),
            errors or "0",
            "" if self.gap_s is None else f"{self.gap_s:.1f} s",
            "; ".join(f"{name} {value}" for name, value in self.beside.items()),
        )


def render(rows: list[Row]) -> str:
    """Write the table as Markdown, its columns in line."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(HEAD))]
    texts = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])
