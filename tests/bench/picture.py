"""A picture of the ratios, as SVG: readable on a light page and on a dark one."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from tests.bench.budget import (
    AGAINST_BARE,
    AGAINST_BEST,
    AGAINST_FASTAPI,
    BARE,
    BEST,
    FASTAPI,
    OURS,
)
from tests.bench.rounds import Cell, Results

WIDTH = 720
LEFT = 96
"""Where the bars begin; the names of the operations stand before them."""

RIGHT = 84
"""Room for the figures behind the longest bar."""

BAR, GAP, TITLE = 18, 8, 34

MARGIN = 16

STYLE = """
.page { fill: #ffffff; }
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
.bar { fill: #2f6fb3; }
.bound { stroke: #1f2328; stroke-width: 2; }
.note { fill: #656d76; font-size: 12px; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; }
  text { fill: #e6edf3; }
  .bar { fill: #4184cf; }
  .bound { stroke: #e6edf3; }
  .note { fill: #8d96a0; }
}
"""


class Bar(NamedTuple):
    """One ratio, and how high it must be."""

    name: str
    ratio: float
    bound: float


class Group(NamedTuple):
    """Ratios to the same contestant, on a scale of their own."""

    title: str
    bars: list[Bar]


def groups_of(results: Results) -> list[Group]:
    """Collect the ratios; contestants that were not measured have no group."""
    compared = (
        ("a bare Starlette route that does nothing", BARE, AGAINST_BARE),
        ("FastAPI, one command after the other", FASTAPI, AGAINST_FASTAPI),
        ("Fastify and ioredis at their best", BEST, AGAINST_BEST),
    )
    groups = []
    for title, who, bounds in compared:
        bars = []
        for operation, (theirs, bound) in bounds.items():
            ratio = results.ratio(Cell(OURS, operation), Cell(who, theirs))
            if ratio is not None:
                bars.append(Bar(operation, ratio.middle, bound))
        if bars:
            groups.append(Group(f"Requests/s, times those of {title}", bars))
    return groups


def draw(groups: Sequence[Group], caption: str) -> str:
    """Draw the groups one below the other."""
    height = 28 + sum(TITLE + len(group.bars) * (BAR + GAP) + GAP for group in groups)
    told = "; ".join(
        f"{group.title}: " + ", ".join(f"{bar.name} {_figure(bar.ratio)}" for bar in group.bars)
        for group in groups
    )
    size = f'width="{WIDTH + 2 * MARGIN}" height="{height + 2 * MARGIN}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(told)}</title>",
        f"<style>{STYLE}</style>",
        # Of its own, so that it is readable on a page that is dark where the system is not.
        f'<rect class="page" {size} rx="6"/>',
        f'<g transform="translate({MARGIN} {MARGIN})">',
    ]
    top = 0
    for group in groups:
        lines += _draw_group(group, top)
        top += TITLE + len(group.bars) * (BAR + GAP) + GAP
    note = f"The line across a bar is its budget. {caption}"
    lines.append(f'<text class="note" x="0" y="{top + 18}">{escape(note)}</text>')
    return "\n".join([*lines, "</g>", "</svg>", ""])


def _draw_group(group: Group, top: int) -> Iterator[str]:
    longest = max(max(bar.ratio, bar.bound) for bar in group.bars)
    scale = (WIDTH - LEFT - RIGHT) / longest
    yield f'<text class="title" x="0" y="{top + 22}">{escape(group.title)}</text>'
    for at, bar in enumerate(group.bars):
        y = top + TITLE + at * (BAR + GAP)
        middle, end = y + BAR - 5, LEFT + bar.ratio * scale
        bound = LEFT + bar.bound * scale
        figure = max(end, bound) + 8
        yield f'<text x="0" y="{middle}">{escape(bar.name)}</text>'
        yield (
            f'<rect class="bar" x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" rx="2"/>'
        )
        yield (
            f'<line class="bound" x1="{bound:.1f}" x2="{bound:.1f}"'
            f' y1="{y - 3}" y2="{y + BAR + 3}"/>'
        )
        yield f'<text x="{figure:.1f}" y="{middle}">{_figure(bar.ratio)}</text>'


def _figure(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"
