"""The runbook is compared with the code: every event of the log and every metric, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from app import metrics

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


def metrics_of_the_code() -> dict[str, list[str]]:
    """Give the labels of every metric that a service tells, by its name."""
    metrics.count_request(None, "GET", 200, 0.0)
    metrics.settle()
    metrics.STORE_ERRORS.labels("timeout")
    metrics.REFUSALS.labels("requests")
    metrics.ASKS.labels("running")
    metrics.IN_FLIGHT.labels("requests")
    metrics.PROCESSES.labels("ok")
    told = metrics.describe_sessions({"pending": 0}, {"last_run": 0})
    found = {}
    for family in text_string_to_metric_families(metrics.render("", told).text.decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = [label for label in family.samples[0].labels if label != "le"]
        found[name] = sorted(labels)
    return found


def test_every_metric_stands_in_the_runbook_with_its_labels_and_what_to_do() -> None:
    text = (ROOT / "deploy" / "runbook.md").read_text("utf-8")
    rows = re.findall(
        r"^\| `(onboarding_\w+)` \|((?: `\w+`)*) \| (.+) \| (.+) \|$", text, re.MULTILINE
    )
    labels = {name: sorted(re.findall(r"`(\w+)`", listed)) for name, listed, _, _ in rows}
    assert len(labels) == len(rows)
    assert labels == metrics_of_the_code()
