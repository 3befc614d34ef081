"""`python -m app.keys`: what it prints is what the service and the machine need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.onboarding.access import Scope, find_api_key, parse_api_keys

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.keys", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_it_makes_a_key_and_the_line_by_which_it_is_known() -> None:
    done = run("bcm", "generator", "admin", "generator")

    assert done.returncode == 0
    assert done.stderr == ""
    key, line = done.stdout.splitlines()
    assert re.fullmatch(r"ok_[A-Za-z0-9_-]{43}", key)
    assert key not in line
    (known,) = parse_api_keys(line)
    assert (known.name, *sorted(known.scopes)) == ("bcm", Scope.ADMIN, Scope.GENERATOR)
    assert find_api_key((known,), key.encode()) == known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "NAME, SCOPE"),
        (("bcm",), "SCOPE"),
        (("b m", "admin"), "a name has 1 to 64 of A-Z a-z 0-9 . _ -"),
        (("b" * 65, "admin"), "a name has 1 to 64"),
        (("bcm", "root"), "the scopes are sessions, generator, admin"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_it_explains_itself() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("ONBOARDING_API_KEYS", "X-API-Key", *Scope):
        assert word in done.stdout
