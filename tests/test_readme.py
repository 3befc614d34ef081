"""The README is tried: its walk through is run, its tables are compared with the code."""

import asyncio
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient

from app.api.routes import OPERATIONS
from app.settings import Settings, load_settings, variable_of

PYTHON = sys.executable
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ENV_EXAMPLE = (ROOT / "deploy" / "env.example").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(title: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", section(title), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


async def paste(lines: list[str], directory: Path, url: str = "") -> list[str]:
    """Paste lines into a shell, and give what each of them printed."""
    script = "\n".join(f"{line}\necho; echo --------" for line in lines)
    script = script.replace("http://127.0.0.1:8000", url).replace(".venv/bin/python", PYTHON)
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-eu"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    output, _ = await shell.communicate(script.encode())
    answers = output.decode().split("--------\n")[:-1]

    assert shell.returncode == 0
    assert len(answers) == len(lines)
    assert "urn:onboarding:problem" not in output.decode()
    return answers


async def test_the_walk_through_works_pasted_line_by_line(api: AsyncClient, tmp_path: Path) -> None:
    answers = await paste(commands("Walk through"), tmp_path, str(api.base_url).rstrip("/"))

    assert len(answers) == 32
    assert '"version":2' in answers[6]
    assert '"is_draft":true' in answers[7]
    assert '"completed_steps":4' in answers[9]
    assert '"step_id":5' in answers[10]
    assert "event: done" in answers[11]
    assert '"step_id":14' in answers[11]
    assert '"complete":false' in answers[13]
    assert '"status":"processing"' in answers[14]
    assert '"progress":40' in answers[15]
    assert '"filename":"bcm.json"' in answers[16]
    assert '"status":"complete"' in answers[17]
    assert '"progress":100' in answers[18]
    assert "event: snapshot" in answers[19]
    assert "event: session_created" in answers[19]
    assert "event: result_stored" in answers[19]
    assert answers[20].strip() == '{"summary": "a manifest"}'
    assert '"revision":1' in answers[21]
    assert '"status":"active"' in answers[23]
    assert '"status":"completed"' in answers[24]
    assert '"total_sessions":1' in answers[25]
    assert '"removed":1' in answers[26]
    assert '"next_cursor":null' in answers[28]
    assert '"total_sessions":1' in answers[29]
    assert '"saved":1' in answers[29]
    assert '"overall_health":"healthy"' in answers[30]
    assert '"removed":0' in answers[31]


async def test_a_wizard_a_user_and_machines_get_in_as_told(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    lines = commands("Access")
    begin = next(number for number, line in enumerate(lines) if line.endswith("make run"))
    await paste(lines[:begin], tmp_path)
    # What the shell would put into the variables of the last line.
    told = dict(re.findall(r'ONBOARDING_(\w+)=("[^"]*"|\S+)', lines[begin]))
    shown = [f"echo {text}" for text in told.values()]
    values = [answer.strip() for answer in await paste(shown, tmp_path)]
    api: AsyncClient = await serve(**dict(zip(map(str.lower, told), values, strict=True)))

    answers = await paste(lines[begin + 1 :], tmp_path, str(api.base_url).rstrip("/"))

    said = "".join(answers)
    assert said.count('"session_token":"ost_') == 2  # told to who resumes, and to the user
    assert '"completed":1' in said
    assert '"complete":false' in said
    assert '"status":"processing"' in said
    assert '"progress":50' in said
    assert '"filename":"result.bin"' in said
    assert said.count('"workspace_id":"acme","status"') == 2  # both sessions are the user's own
    assert '"deleted_at"' in said


def test_every_operation_stands_in_the_table_of_calls() -> None:
    table = section("Calls")
    documented = set()
    for part in re.split(r"^Base ", table, flags=re.MULTILINE)[1:]:
        base = part.split("`")[1]
        for row in re.findall(r"^\| (`.*?`) \|", part, re.MULTILINE):
            methods = re.findall(r"\b(GET|POST|PUT|PATCH|DELETE)\b", row)
            path = "".join(re.findall(r"(/\S*)`", row)[-1:])
            documented |= {(method, base + path) for method in methods}
    beside = table.split("As the question-answer system")[1].split("\n\n**")[0]
    documented |= set(re.findall(r"`(GET|POST) (/\S+)`", beside))

    assert documented == {(m, each.path) for each in OPERATIONS for m in each.methods}


@pytest.mark.parametrize("text", [section("Settings"), ENV_EXAMPLE], ids=["README", "env.example"])
def test_every_setting_is_documented_and_nothing_else(text: str) -> None:
    words = set(re.findall(r"\b[A-Z][A-Z_]+[A-Z]\b", text))
    known = {variable_of(name) for name in Settings.model_fields}

    assert known - words == set()
    assert {word for word in words if word.startswith("ONBOARDING_")} - known == set()


def test_every_value_in_the_example_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = load_settings()
    for name, value in re.findall(r"^#([A-Z_]+)=(.*)$", ENV_EXAMPLE, re.MULTILINE):
        if name != "REDIS_URL":
            monkeypatch.setenv(name, value)

    assert load_settings() == defaults


def test_every_file_that_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists()
