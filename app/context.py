"""The world of one request: its id, who asks, about which session, how long it may take."""

import os
import random
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from app.onboarding.access import NOBODY, Principal
from app.onboarding.assistant import Agent


@dataclass(slots=True)
class Meter:
    """What a request has asked of the store."""

    commands: int = 0
    retries: int = 0


@dataclass(slots=True)
class RequestContext:
    """Replaced by one that knows more, where that is only for a part; the meter in it counts.

    `deadline_s` is a time of `clock.monotonic_s`, after which no retry begins. `principal` and
    `session_id` are put in by who lets the request in, before anybody else looks; `agent` is the
    one that was made for the request's question, and is seen only where that runs.
    """

    request_id: str
    deadline_s: float
    meter: Meter = field(default_factory=Meter)
    principal: Principal = NOBODY
    session_id: str | None = None
    agent: Agent | None = None


def new_request_id() -> str:
    """Make an id for a request that came without one."""
    return f"{_draw(128):032x}"


_draw = random.Random(os.urandom(32)).getrandbits  # noqa: S311 - ids of requests are no secret
"""Asking the system for each id would cost a call to it; processes begin in different places."""


_current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)

get_context = _current.get
"""Return the context of the running request, or None outside of one."""


def learn(**known: Any) -> None:
    """Put one into the place of the running request's context that knows more."""
    context = _current.get()
    if context is not None:
        _current.set(replace(context, **known))


set_context = _current.set
reset_context = _current.reset
