"""The runbook is compared with the code: every event of the log stands in it, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


def calls_of_the_log() -> Iterator[tuple[str, ast.Call]]:
    """Give every call that logs, with its level."""
    for path in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)):
                    if level in LEVELS:
                        yield level, node


def events_of_the_code() -> dict[str, set[str]]:
    """Every event, with the levels at which it is logged."""
    found: dict[str, set[str]] = {}
    for level, call in calls_of_the_log():
        names = [
            each.value
            for each in ast.walk(call.args[0])
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        assert names, f"an event is logged whose name cannot be read: {ast.unparse(call)}"
        for name in names:
            found.setdefault(name, set()).add(level)
    return found


def rows_of_the_runbook() -> dict[str, tuple[str, str]]:
    """Every event of the tables, with its level and what it means and asks for."""
    text = (ROOT / "deploy" / "runbook.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (level, rest) for name, level, rest in rows}


def test_every_event_of_the_log_stands_in_the_runbook_with_its_level() -> None:
    in_code = events_of_the_code()
    assert len(in_code) > 40
    assert in_code == {name: {level} for name, (level, _) in rows_of_the_runbook().items()}


def test_and_what_a_warning_or_an_error_asks_for() -> None:
    for name, (level, rest) in rows_of_the_runbook().items():
        means, _, do = rest.partition(" | ")
        assert means, name
        assert do or level in {"info", "debug"}, name
