"""The walls of the house: which room may know which other, and what may stand where.

Each wall is a function that reads source text and returns what is wrong with it, so that a test
can show that it would fall: once over `app/`, and once over a few lines that offend.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import pytest

APP = Path(__file__).parent.parent / "app"

RINGS = ("onboarding", "store", "services", "api")

EVERYONES = {"errors", "clock", "context", "metrics", "__version__"}

ARROWS: dict[str, set[str]] = {
    # The rings: api -> services -> store -> onboarding, and everyone -> onboarding.
    "onboarding": {"onboarding", "errors", "clock"},
    "store": {"store", "onboarding", "settings", "address", *EVERYONES},
    "services": {"services", "store", "onboarding", "settings", *EVERYONES},
    # The api takes from wiring the types of what the lifespan hands to a request.
    "api": {"api", "services", "onboarding", "settings", "wiring", *EVERYONES},
    # What everyone may use knows nobody.
    "errors": set(),
    "clock": set(),
    "metrics": set(),
    # The request's world is told in the domain's words.
    "context": {"onboarding"},
    "__init__": set(),
    # A URL of the store is a setting, a file of steps too; both are judged where they belong.
    "address": set(),
    "settings": {"address", "onboarding", *EVERYONES},
    "logs": EVERYONES,
    # On top: who puts it together, who makes the application, who serves it, who runs it all.
    "wiring": {"services", "store", "settings", *EVERYONES},
    "main": {"api", "wiring", "settings", "logs", *EVERYONES},
    "server": {"protocol", *EVERYONES},
    "protocol": {"api", *EVERYONES},
    "__main__": {"main", "server", "settings", "logs", "store", *EVERYONES},
    # Beside it: who talks to it over HTTP, from another process, and who shows how to generate.
    "client": {"services", "onboarding", "errors", "clock"},
    # For the tests of others, on a store that is thrown away.
    "testing": {"services", "store", "onboarding", "settings", *EVERYONES},
    # Makes a key, and needs nothing of the service.
    "keys": {"onboarding"},
    "generator": {"services", "store", "onboarding", "settings", "logs", *EVERYONES},
}
"""Which parts of `app` a part may import."""

HOMES: dict[str, set[str]] = {
    "redis": {"store"},
    "hiredis": {"store"},
    "tenacity": {"store", "client"},
    "starlette": {"api", "main"},
    "python_multipart": {"api"},
    "uvicorn": {"server", "protocol", "__main__"},
    "httpx2": {"client", "services"},
    "joserfc": {"onboarding"},
    "async_lru": {"services"},
    # In memory, and so as pure as a dict.
    "sqlite3": {"onboarding"},
    "prometheus_client": {"metrics"},
}
"""The parts that alone may import a library."""

IMPURE_MODULES = {
    *("time", "random", "secrets", "uuid", "os", "io", "pathlib", "tempfile", "shutil", "glob"),
    *("socket", "ssl", "http", "urllib.request", "subprocess", "threading", "multiprocessing"),
    *("asyncio", "concurrent", "contextvars", "signal", "logging", "structlog", "importlib"),
}
PURE_CLOCK = {"app.clock.rfc3339", "app.clock.rfc3339_each", "app.clock.LAST_MS"}
IMPURE_CALLS = {"open", "input", "print", "now", "utcnow", "today", "now_ms", "monotonic_s"}
ASYNCHRONOUS = (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)

FEATURES = {
    *("sessions", "steps", "progress", "catalogue", "exports", "generation", "tasks"),
    *("retention", "stats", "access", "limits", "assistant", "health", "events", "files", "jobs"),
    *("feed", "recovery", "tokens", "audit", "metrics"),
}
"""The stems of the features: the same one in every ring."""

INFRASTRUCTURE: dict[str, str] = {
    "onboarding/documents": "JSON that is kept exactly: one rule for HTTP and Python callers",
    "onboarding/cursors": "where a page of any list ends",
    "onboarding/jwt": "tokens of others: which keys verify them, and whom they name",
    "onboarding/guide": "what the built-in agent knows, and how it is searched",
    "onboarding/idempotency": "what makes two requests the same, whatever they ask for",
    "services/background": "what is done again and again beside the requests",
    "services/keyring": "verifies the tokens of users, by keys that are fetched beside",
    "services/standin": "services by module-level names",
    "services/sweeper": "what every feature has cleaned up, by one process at a time",
    "services/reporter": "what a generator reports through, in any process",
    "api/fastpath": "the plain requests, without the layers that stand around the others",
    "store/links": "the ways that commands reach a store, alike for the gateway",
    "store/multiplex": "one connection that everybody shares",
    "store/client": "from an address to a client of the Redis library",
    "store/connect": "from the settings to a gateway, the one way in",
    "store/embedded": "the server that runs when no other is configured",
    "store/faults": "the one table of what may be tried again",
    "store/gateway": "the one way to the store, and the one layer that retries",
    "store/index": "the index of all sessions, kept where their own scripts cannot",
    "store/keys": "the name of every key",
    "store/retry_budget": "how many calls a process may send again",
    "store/scripts": "loads the Lua files",
    "store/subscription": "the one connection on which the store says which logs have grown",
    "services/manager": "the one class about one session, by the name that callers know",
    "api/calls": "a checked request, as handlers see it",
    "api/dispatch": "from a request to a call, the checks in their order",
    "api/documentation": "the page for people",
    "api/headers": "headers to values",
    "api/middleware": "what surrounds every request",
    "api/openapi": "the document for programs",
    "api/operations": "the shape of an entry in the table of operations",
    "api/problems": "errors as answers",
    "api/routes": "the table of operations",
    "api/streaming": "bodies that come and go in pieces",
    "api/uploads": "a form with a file, taken apart as it comes",
}
"""The modules that serve every feature, with the reason why each is none."""

INCLUDE = re.compile(r"-- include (\w+)\.lua\n")
"""How the first lines of a script ask for other files."""

NAMELESS = {"core", "common", "util", "utils", "helper", "helpers", "lib", "base", "misc"}
"""Names that say nothing about what is inside."""


# --- The walls ------------------------------------------------------------------------------------


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Give every import with its line, as a dotted name; those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative one could be made to lead anywhere, so it counts as leading to the root.
            module = "app" if node.level else node.module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in {"import_module", "__import__"}:
            yield (node.lineno, first_text(node) or "app")


def name_of(called: ast.expr) -> str:
    """Give the last part of what is called: `now` for `datetime.now`."""
    match called:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def first_text(call: ast.Call) -> str | None:
    """Give the first argument of a call where it is literal text."""
    match call.args:
        case [ast.Constant(value=str(text)), *_]:
            return text
        case _:
            return None


def part_of(path: str) -> str:
    """Give the part of `app` that a file is in: `store` for `store/keys.py`."""
    return PurePosixPath(path).parts[0].removesuffix(".py")


def arrows_back(path: str, source: str) -> list[str]:
    """Find imports that point where they may not."""
    part = part_of(path)
    return [
        f"{path}:{line} imports {name}"
        for line, name in imports_of(source)
        if name == "app" or name.startswith("app.")
        if name.removeprefix("app.").split(".")[0] not in ARROWS.get(part, set())
    ]


def libraries_from_home(path: str, source: str) -> list[str]:
    """Find libraries outside of the parts that alone may import them."""
    return [
        f"{path}:{line} imports {name}"
        for line, name in imports_of(source)
        if part_of(path) not in HOMES.get(name.split(".")[0], {part_of(path)})
    ]


def impurities(path: str, source: str) -> list[str]:
    """Find what a pure rule has no use for: waiting, clocks, chance, files, the world."""
    if part_of(path) != "onboarding":
        return []
    found = [
        f"{path}:{line} imports {name}"
        for line, name in imports_of(source)
        if any(name == module or name.startswith(f"{module}.") for module in IMPURE_MODULES)
        or (name.startswith("app.clock") and name not in PURE_CLOCK)
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ASYNCHRONOUS) or (
            isinstance(node, ast.comprehension) and node.is_async
        ):
            found.append(f"{path}:{getattr(node, 'lineno', 0)} waits")
        if isinstance(node, ast.Call) and name_of(node.func) in IMPURE_CALLS:
            found.append(f"{path}:{node.lineno} calls {name_of(node.func)}")
    return found


def leftovers(path: str, source: str) -> list[str]:
    """Find what was left for later."""
    lines = enumerate(source.splitlines(), start=1)
    return [f"{path}:{n}" for n, line in lines if re.search(r"\b(TODO|FIXME|XXX)\b", line)]


def nameless(path: str, _: str = "") -> list[str]:
    """Find modules and folders whose name says nothing."""
    stems = [part.split(".")[0] for part in PurePosixPath(path).parts]
    return [f"{path}: {stem}" for stem in stems if stem in NAMELESS]


def strangers(path: str, _: str = "") -> list[str]:
    """Find modules that are neither a part of a feature nor named as infrastructure."""
    ring, *rest = PurePosixPath(path).with_suffix("").parts
    if not rest:
        return [] if ring in ARROWS else [f"{path} is no known part"]
    if ring not in RINGS:
        return [f"{path} is in no ring"]
    stem = "/".join(rest)
    known = stem in FEATURES or stem == "__init__" or f"{ring}/{stem}" in INFRASTRUCTURE
    return [] if known else [f"{path} is part of no feature"]


def asked_for(text: str) -> list[str]:
    """Give the files that the first lines of a script ask for."""
    first = re.match(rf"(?:{INCLUDE.pattern})*", text)
    return INCLUDE.findall(first[0]) if first else []


def orphans(scripts: Mapping[str, str], sources: Iterable[str]) -> list[str]:
    """Find Lua scripts, given by name and text, that nobody loads.

    One is loaded when a call in the sources names it first, or another one that is loaded asks for
    it.
    """
    loaded = {
        first_text(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
    }
    while True:
        texts = [text for name, text in scripts.items() if name in loaded]
        asked = {name for text in texts for name in asked_for(text)}
        if asked <= loaded:
            return sorted(scripts.keys() - loaded)
        loaded |= asked


Wall = Callable[[str, str], list[str]]

WALLS: list[Wall] = [
    *(arrows_back, libraries_from_home, impurities, leftovers, nameless, strangers),
]


# --- The house as it stands -----------------------------------------------------------------------


def files_of(pattern: str) -> dict[str, str]:
    """Read the files of `app/` by their paths in it."""
    return {
        path.relative_to(APP).as_posix(): path.read_text("utf-8")
        for path in sorted(APP.glob(pattern))
    }


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: str(wall.__name__))
def test_the_wall_stands(wall: Wall) -> None:
    sources = files_of("**/*.py")
    assert len(sources) > 30
    assert [wrong for path, source in sources.items() for wrong in wall(path, source)] == []


def test_scripts_are_named_by_what_they_do_and_finished() -> None:
    scripts = files_of("store/lua/*.lua")
    assert len(scripts) > 10
    assert [wrong for path, text in scripts.items() for wrong in leftovers(path, text)] == []
    assert [wrong for path in scripts for wrong in nameless(path)] == []


def test_every_script_is_loaded_by_name() -> None:
    scripts = {PurePosixPath(path).stem: text for path, text in files_of("**/*.lua").items()}
    assert orphans(scripts, files_of("store/*.py").values()) == []


def test_scripts_live_in_one_place() -> None:
    assert set(files_of("**/*.lua")) == set(files_of("store/lua/*.lua"))


def test_no_module_is_named_as_infrastructure_that_is_not_there() -> None:
    present = {path.removesuffix(".py") for path in files_of("*/*.py")}
    assert set(INFRASTRUCTURE) - present == set()
    assert {stem.split("/")[1] for stem in INFRASTRUCTURE} & FEATURES == set()
    assert set(ARROWS) - set(RINGS) == {path.removesuffix(".py") for path in files_of("*.py")}


def test_a_client_in_a_process_of_its_own_loads_no_store_and_no_server() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, app.client; print(*sys.modules)"],
        cwd=APP.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout.split()
    assert "app.client" in loaded
    unwanted = {"redis", "starlette", "uvicorn", "app.store", "app.api", "app.settings"}
    assert unwanted & set(loaded) == set()


# --- Each wall can fall ---------------------------------------------------------------------------

OFFENCES: list[tuple[Wall, str, str]] = [
    (arrows_back, "onboarding/steps.py", "from app.store.keys import Keys"),
    (arrows_back, "onboarding/steps.py", "from app.context import get_context"),
    (arrows_back, "onboarding/steps.py", "from app.settings import Settings"),
    (arrows_back, "store/steps.py", "import app.services.manager"),
    (arrows_back, "store/steps.py", "def f():\n    from app.api import calls"),
    (arrows_back, "store/steps.py", "if TYPE_CHECKING:\n    from app.wiring import Services"),
    (arrows_back, "store/steps.py", "import importlib\nimportlib.import_module('app.services.x')"),
    (arrows_back, "store/steps.py", "__import__('app.' + name)\n__import__(name)"),
    (arrows_back, "services/manager.py", "from app.api.headers import parse_entity_tags"),
    (arrows_back, "services/manager.py", "from app import wiring"),
    (arrows_back, "services/manager.py", "from . import health"),
    (arrows_back, "services/manager.py", "import app"),
    (arrows_back, "api/steps.py", "from app.store.steps import StepStore"),
    (arrows_back, "api/steps.py", "from app.main import create_app"),
    (arrows_back, "errors.py", "from app.clock import rfc3339"),
    (arrows_back, "clock.py", "import app.settings"),
    (arrows_back, "address.py", "from app.store.client import make_client"),
    (arrows_back, "settings.py", "from app.store.connect import connect"),
    (arrows_back, "wiring.py", "from app.main import create_app"),
    (arrows_back, "main.py", "from app.store.gateway import Gateway"),
    (arrows_back, "client.py", "from app.store.gateway import Gateway"),
    (arrows_back, "client.py", "from app.settings import load_settings"),
    (arrows_back, "keys.py", "from app.settings import load_settings"),
    (arrows_back, "generator.py", "from app.wiring import build_services"),
    (arrows_back, "services/generation.py", "from app.client import OnboardingClient"),
    (arrows_back, "unknown.py", "from app.errors import Fault"),
    (libraries_from_home, "services/health.py", "import redis"),
    (libraries_from_home, "onboarding/steps.py", "from redis.asyncio import Redis"),
    (libraries_from_home, "settings.py", "import redis.asyncio as client"),
    (libraries_from_home, "api/health.py", "from redis.exceptions import RedisError"),
    (libraries_from_home, "services/manager.py", "from tenacity import retry"),
    (libraries_from_home, "generator.py", "import tenacity"),
    (libraries_from_home, "services/files.py", "import python_multipart"),
    (libraries_from_home, "store/assistant.py", "import sqlite3"),
    (libraries_from_home, "services/metrics.py", "from prometheus_client import Counter"),
    (arrows_back, "onboarding/limits.py", "from app.metrics import REFUSALS"),
    (libraries_from_home, "api/assistant.py", "from async_lru import alru_cache"),
    (libraries_from_home, "api/access.py", "from httpx2 import AsyncClient"),
    (libraries_from_home, "services/keyring.py", "from joserfc import jwt"),
    (libraries_from_home, "services/health.py", "from starlette.responses import Response"),
    (libraries_from_home, "wiring.py", "import starlette.applications"),
    (libraries_from_home, "main.py", "import uvicorn"),
    (libraries_from_home, "api/routes.py", "def f():\n    from uvicorn import Server"),
    (impurities, "onboarding/steps.py", "async def f(): ..."),
    (impurities, "onboarding/steps.py", "async def f():\n    await g()"),
    (impurities, "onboarding/steps.py", "def f(x):\n    return [y async for y in x]"),
    (impurities, "onboarding/steps.py", "import time"),
    (impurities, "onboarding/steps.py", "from time import time_ns"),
    (impurities, "onboarding/steps.py", "from datetime import datetime\ndatetime.now()"),
    (impurities, "onboarding/steps.py", "import datetime\ndatetime.date.today()"),
    (impurities, "onboarding/steps.py", "import random"),
    (impurities, "onboarding/steps.py", "import uuid"),
    (impurities, "onboarding/steps.py", "import os.path"),
    (impurities, "onboarding/steps.py", "open('x')"),
    (impurities, "onboarding/steps.py", "import structlog"),
    (impurities, "onboarding/steps.py", "from app.clock import now_ms, rfc3339"),
    (impurities, "onboarding/steps.py", "from app.clock import monotonic_s"),
    (impurities, "onboarding/steps.py", "from app import clock\nclock.now_ms()"),
    (impurities, "onboarding/steps.py", "import app.clock"),
    (leftovers, "api/steps.py", "x = 1  # TODO later"),
    (leftovers, "api/steps.py", '"""FIXME."""'),
    (leftovers, "store/lua/save_steps.lua", "-- XXX: not yet"),
    (nameless, "core/steps.py", ""),
    (nameless, "store/common/steps.py", ""),
    (nameless, "api/utils.py", ""),
    (nameless, "services/helpers.py", ""),
    (nameless, "store/lua/base.lua", ""),
    (strangers, "services/documents.py", ""),
    (strangers, "api/step.py", ""),
    (strangers, "store/steps/save.py", ""),
    (strangers, "domain/steps.py", ""),
    (strangers, "tools.py", ""),
]


@pytest.mark.parametrize(
    ("wall", "path", "source"),
    OFFENCES,
    ids=[f"{wall.__name__}-{path}-{source[:40]!r}" for wall, path, source in OFFENCES],
)
def test_the_wall_falls_for_an_offence(wall: Wall, path: str, source: str) -> None:
    assert wall(path, source) != []


def test_every_wall_has_been_seen_to_fall() -> None:
    assert {wall for wall, _, _ in OFFENCES} == set(WALLS)


def test_a_script_that_nobody_loads_is_found() -> None:
    sources = [
        'gateway.run("save_step", keys)\n# delete_step\nx = "read_step"',
        'f(1, "move_step")\n"""copy_step"""',
    ]
    named = ["save_step", "delete_step", "read_step", "move_step", "copy_step"]
    scripts = dict.fromkeys(named, "-- Do it.\n")
    assert orphans(scripts, sources) == ["copy_step", "delete_step", "move_step", "read_step"]
    assert orphans({"save_step": ""}, sources) == []


def test_a_script_is_loaded_by_another_one_that_asks_for_it_and_is_called() -> None:
    sources = ['gateway.run("save_step", keys)']
    scripts = {
        "save_step": "-- include opening.lua\n-- Do it.\n",
        "opening": "-- include parts.lua\n",
        "parts": "",
        "read_step": "-- include reading.lua\n",
        "reading": "",
        "named": "",
    }
    scripts["save_step"] += "-- include named.lua\n"
    assert orphans(scripts, sources) == ["named", "read_step", "reading"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("onboarding/steps.py", "from app.clock import rfc3339\nfrom app.errors import Fault"),
        ("onboarding/steps.py", "import re\nfrom datetime import timedelta\nre.match('a', 'a')"),
        ("store/steps.py", "import redis\nfrom app.onboarding.steps import Step\nopen('x')"),
        ("services/manager.py", "import asyncio\nfrom app.store.keys import Keys"),
        ("api/steps.py", "from starlette.responses import Response\nfrom app.api import calls"),
        ("main.py", "import starlette\nfrom app import __version__\nfrom app.api import routes"),
        ("__main__.py", "import uvicorn\nfrom app.store.embedded import EmbeddedStore"),
        ("client.py", "import httpx2\nimport tenacity\nfrom app.services import reporter"),
        ("generator.py", "from app.services.jobs import JobService\nimport rfc8785"),
        ("store/steps.py", "import tenacity_like\nimport redistribution\nimport application"),
        ("api/tasks.py", "TODOS = 1\ncoretime = 2"),
    ],
)
def test_no_wall_falls_for_what_is_allowed(path: str, source: str) -> None:
    assert [wrong for wall in WALLS for wrong in wall(path, source)] == []
