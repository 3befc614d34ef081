"""The Lua scripts: files beside this one, each opening with its contract."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"-- include (\w+)\.lua\n")


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 by which the store knows it."""

    name: str
    text: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """Load `lua/<name>.lua`, with the file before it that its first line asks for."""
    text = _read(name)
    # SHA-1 is the name that EVALSHA takes; nothing is protected by it.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    text = files("app.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
    asked = _INCLUDE.match(text)
    return _read(asked[1]) + text if asked else text
