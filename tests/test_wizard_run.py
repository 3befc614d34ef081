"""The main job, as people do it: 23 steps go in, an export comes out, and nothing was lost."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from httpx2 import AsyncClient

from tests.service import BASE

RUN = json.loads((Path(__file__).parent / "data" / "wizard_run.json").read_text())

Answers = dict[str, Any]


def spelled_by_a_browser(answers: Answers) -> bytes:
    return json.dumps({"data": answers}, ensure_ascii=False, separators=(",", ":")).encode()


def spelled_with_escapes_and_spaces(answers: Answers) -> bytes:
    return json.dumps({"data": answers}, indent=2).encode()


@pytest.mark.parametrize("spell", [spelled_by_a_browser, spelled_with_escapes_and_spaces])
async def test_a_wizard_run_comes_out_of_the_export_value_for_value(
    api: AsyncClient, session_id: str, spell: Any
) -> None:
    for number, answers in RUN.items():
        saved = await api.post(
            f"{BASE}/{session_id}/steps/{number}",
            content=spell(answers),
            headers={"content-type": "application/json"},
        )
        assert saved.status_code == 200
        assert saved.json()["progress"]["completed"] == int(number)

    finalized = await api.post(f"{BASE}/{session_id}/finalize")
    export = (await api.get(f"{BASE}/{session_id}/export")).json()

    assert finalized.json()["business_context"] == export
    assert {number: step["data"] for number, step in export["steps"].items()} == RUN
    assert {number: export["raw_step_data"][f"step_{number}"]["data"] for number in RUN} == RUN
    assert export["complete"] is True
    assert export["missing_steps"] == []
    assert export["progress"]["percentage"] == 100.0
    assert export["checksum"] == recomputed(export)


async def test_the_run_says_the_same_types_and_not_only_equal_values(
    api: AsyncClient, session_id: str
) -> None:
    # In Python 1 == 1.0 == True, so equality alone would miss an integer that became a float.
    for number, answers in RUN.items():
        await api.put(f"{BASE}/{session_id}/steps/{number}", json={"data": answers})
    steps = (await api.get(f"{BASE}/{session_id}/steps")).json()["steps"]

    assert {number: repr(step["data"]) for number, step in steps.items()} == {
        number: repr(answers) for number, answers in RUN.items()
    }


def recomputed(export: Answers) -> str:
    signed = {
        name: value for name, value in export.items() if name not in {"checksum", "generated_at"}
    }
    return f"sha256:{hashlib.sha256(rfc8785.dumps(signed)).hexdigest()}"
