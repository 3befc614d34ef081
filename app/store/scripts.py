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
    """Load `lua/<name>.lua`, after the files that its first lines ask for, each of them once."""
    texts: dict[str, str] = {}
    _gather(name, texts)
    text = "".join(texts.values())
    # SHA-1 is the name that EVALSHA takes; nothing is protected by it.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _gather(name: str, texts: dict[str, str]) -> None:
    if name in texts:
        return
    text = files("app.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
    at = 0
    while asked := _INCLUDE.match(text, at):
        _gather(asked[1], texts)
        at = asked.end()
    texts[name] = text
