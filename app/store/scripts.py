"""The Lua scripts: files beside this one, each opening with its contract."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"-- include (\w+)\.lua\n")


READING = frozenset(
    {
        *("read_session", "read_draft", "read_body", "read_events", "read_history", "read_facts"),
        *("read_tokens", "read_remains", "read_audit", "recall_answer"),
        *("list_tasks", "list_old_tasks", "list_due", "page_sessions"),
        *("count_sessions", "count_capacity"),
    }
)
"""The scripts that write nothing."""

HINTS = frozenset(
    {
        # The index and the lists beside the truth: the sweeper mends them.
        *("reserve_session", "release_room", "place_session", "unplace_session"),
        *("reclaim_sessions", "repair_index", "delist_user", "enlist_task", "delist_tasks"),
        # Who sweeps, and who works on which job: somebody else takes over.
        *("claim_sweep", "finish_sweep", "keep_job", "finish_job", "leave_queue"),
        # What was used up: a limit lets a few more through.
        *("take_tokens", "claim_ask"),
        # The record of who did what: it is written behind the requests, which are answered.
        "add_audit",
        # What WAIT goes by: it means nothing.
        "write_mark",
    }
)
"""The scripts whose writes nobody is told of as done: what is lost of them is made up for."""


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the SHA-1 by which the store knows it."""

    name: str
    text: str
    sha: str

    is_promise: bool
    """Whether its answer says that something was done that must not be lost.

    Then it must not be done too late either: it opens with `sending.lua`. What others do too late
    is made up for as what is lost of them.
    """


@cache
def load_script(name: str) -> Script:
    """Load `lua/<name>.lua`, after the files that its first lines ask for, each of them once."""
    texts: dict[str, str] = {}
    _gather(name, texts)
    text = "".join(texts.values())
    # SHA-1 is the name that EVALSHA takes; nothing is protected by it.
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(name, text, sha, name not in READING and name not in HINTS)


def _gather(name: str, texts: dict[str, str]) -> None:
    if name in texts:
        return
    text = files("app.store").joinpath("lua", f"{name}.lua").read_text("utf-8")
    at = 0
    while asked := _INCLUDE.match(text, at):
        _gather(asked[1], texts)
        at = asked.end()
    texts[name] = text
