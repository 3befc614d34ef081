"""The world of one request: its id, until when it may take, what it has cost so far."""

import os
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class Meter:
    """What a request has asked of the store."""

    commands: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Set once per request and never changed; the meter in it counts.

    `deadline_s` is a time of `clock.monotonic_s`, after which no retry begins.
    """

    request_id: str
    deadline_s: float
    meter: Meter = field(default_factory=Meter)


def new_request_id() -> str:
    """Make an id for a request that came without one."""
    return os.urandom(16).hex()


_current: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)

get_context = _current.get
"""Return the context of the running request, or None outside of one."""

set_context = _current.set
reset_context = _current.reset
