"""What the requests that come all day cost: seen to grow without a clock, on any machine."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.costs import LOOKED_AT, REQUESTS, Cost

REPOSITORY = Path(__file__).parents[1]

# What was counted: `python -m tests.costs` prints it anew, in the order of `Cost`.
COSTS = {
    "save a step over another": Cost(1, 1602, 104, 3031, 115),
    "save a new step": Cost(1, 1605, 105, 3058, 116),
    "read a step": Cost(1, 74, 1049, 2321, 83),
    "read the progress": Cost(1, 215, 131, 2367, 84),
    "summarize": Cost(1, 205, 901, 3858, 108),
    "read the export": Cost(1, 74, 45488, 2379, 89),
}

MOST = 1.1
"""How much more it may be: what is a little slower is no reason to stop anybody."""

LEAST = 0.8
"""How much less it may be: what has become so much faster could become slower again unseen."""


@pytest.fixture(scope="module")
def counted() -> tuple[Mapping[str, Cost], Mapping[str, int]]:
    """Count in a process of its own, where nothing else goes on, and nobody else traces."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.costs", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=110,
        check=True,
    )
    costs, garbage = json.loads(told.stdout)
    return {name: Cost(*cost) for name, cost in costs.items()}, garbage


Counted = tuple[Mapping[str, Cost], Mapping[str, int]]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_asks_no_more_of_the_store_than_it_did(name: str, counted: Counted) -> None:
    cost, usual = counted[0][name], COSTS[name]
    assert cost.commands == usual.commands
    assert LEAST * usual.sent < cost.sent < MOST * usual.sent
    assert LEAST * usual.received < cost.received < MOST * usual.received


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="other versions of Python have other instructions"
)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_takes_no_more_instructions_than_it_did(name: str, counted: Counted) -> None:
    cost, usual = counted[0][name], COSTS[name]
    assert LEAST * usual.instructions < cost.instructions < MOST * usual.instructions
    assert LEAST * usual.calls < cost.calls < MOST * usual.calls


def test_a_request_leaves_nothing_for_the_garbage_collector(counted: Counted) -> None:
    # What goes on beside the requests may leave a little, if hardly in every round.
    assert {name: left for name, left in counted[1].items() if left >= LOOKED_AT} == {}
    assert counted[1].keys() <= REQUESTS.keys()
