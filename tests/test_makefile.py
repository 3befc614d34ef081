"""The Makefile explains itself and keeps what it promises; the locks are closed and complete."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = {
    name: ROOT / "deploy" / name
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-bench.lock")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TARGETS = re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE)


def make(*arguments: str) -> str:
    # Not the flags of a make that runs these tests: they would make this one talkative.
    finished = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={"PATH": str(Path(shutil.which("make") or "").parent) + ":/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert finished.stderr == ""
    return finished.stdout


def canonical(name: str) -> str:
    """Spell a distribution's name in the one way that PEP 503 compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, set[str]]:
    """Give the distributions of a lock with the versions that it pins."""
    found: dict[str, set[str]] = {}
    for distribution, version in re.findall(
        r"^([^\s=\[]+)(?:\[.*?\])?==(\S+)", text(name), re.MULTILINE
    ):
        found.setdefault(canonical(distribution), set()).add(version.split()[0])
    return found


def text(name: str) -> str:
    return LOCKS[name].read_text()


def required(requirements: list[str]) -> set[str]:
    """Give the names that pyproject.toml asks for, without their extras and markers."""
    names = [re.match(r"[A-Za-z0-9._-]+", each) for each in requirements]
    return {canonical(name.group()) for name in names if name}


# make help


def test_help_lists_every_target_with_one_line() -> None:
    lines = make("help").splitlines()

    assert sorted(line.split()[0] for line in lines) == sorted(TARGETS)
    assert [line for line in lines if len(line.split()) < 2] == []


def test_help_is_the_default_goal() -> None:
    assert make() == make("help")


@pytest.mark.parametrize(
    "target", ["run", "test", "install", "install-dev", "check", "chaos", "bench", "help"]
)
def test_a_target_that_people_rely_on_is_there(target: str) -> None:
    assert target in TARGETS


def test_every_target_is_made_whatever_files_lie_about() -> None:
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert sorted(" ".join(phony).split()) == sorted(TARGETS)


def test_ci_runs_what_a_developer_runs() -> None:
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd ", "export "))
    ]
    assert commands == ["make check"]


# The locks


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_names_versions_and_hashes_and_no_place_to_get_them(name: str) -> None:
    pin = r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==[A-Za-z0-9.!+]+( ; [^\\/@]+)?( \\)?"
    digest = r"    --hash=sha256:[0-9a-f]{64}( \\)?"

    other = [line for line in text(name).splitlines() if not re.fullmatch(f"{pin}|{digest}", line)]

    assert other == []
    assert "://" not in text(name)


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_of_a_lock_has_a_hash(name: str) -> None:
    requirements = re.split(r"\n(?=\S)", text(name).strip())

    assert len(requirements) > 10
    assert [each for each in requirements if "--hash=sha256:" not in each] == []


@pytest.mark.parametrize("name", LOCKS)
def test_what_the_service_needs_is_in_every_lock(name: str) -> None:
    assert required(PROJECT["dependencies"]) - set(pins(name)) == set()


@pytest.mark.parametrize("extra", ["dev", "bench"])
def test_what_an_extra_needs_is_in_its_lock(extra: str) -> None:
    wanted = required(PROJECT["optional-dependencies"][extra])
    assert wanted - set(pins(f"requirements-{extra}.lock")) == set()


@pytest.mark.parametrize("name", ["requirements-dev.lock", "requirements-bench.lock"])
def test_locks_pin_the_same_versions(name: str) -> None:
    other = pins(name)
    for distribution, versions in pins("requirements.lock").items():
        assert other.get(distribution) == versions, distribution
