"""The Lua scripts: files beside this one, each opening with its contract."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_INCLUDE = "-- include session.lua\n"


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 by which the store knows it."""

    name: str
    text: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """Load `lua/<name>.lua`, with `session.lua` before it where its first line asks for that."""
    text = _read(name)
    if text.startswith(_INCLUDE):
        text = _read("session") + text
    # SHA-1 is the name that EVALSHA takes; nothing is protected by it.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return files("app.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
