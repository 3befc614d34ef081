"""Sessions as these tests need them: a manager at any address, every kind of call, the keys."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from app.onboarding.idempotency import IdempotentRequest
from app.services.manager import OnboardingSessionManager, make_manager
from app.settings import load_settings
from app.store.connect import connect
from app.store.gateway import Gateway
from tests.conftest import QUICKLY

Manager = OnboardingSessionManager

NOON_S = 1_767_268_800.0
"""The moment at which the fake stores' clock begins, in Unix seconds."""

SHARED = ("metadata", "progress", "events", "ops", "export", "step:")
"""How the names of the keys begin that share the session's deadline."""


class Place(NamedTuple):
    """A manager and the gateway below it."""

    manager: Manager
    gateway: Gateway


@asynccontextmanager
async def working_at(url: str, **overrides: Any) -> AsyncIterator[Place]:
    """Give a manager for the store at an address, with settings of its own."""
    settings = load_settings(redis_url=url, **{**QUICKLY, **overrides})
    gateway = connect(settings)
    try:
        yield Place(make_manager(gateway, settings), gateway)
    finally:
        await gateway.aclose()


class Write(NamedTuple):
    """One kind of write that the session from `prepare` accepts."""

    do: Callable[[Manager, str], Awaitable[Any]]
    events: int
    """How many events it makes."""

    finalized: bool = False
    """Whether the session must be finalized before."""


WRITES = {
    "set_metadata": Write(lambda m, s: m.set_metadata(s, "u2", "w2"), 1),
    "update_progress": Write(lambda m, s: m.update_progress(s, 9), 0),
    "save_step, a new one": Write(lambda m, s: m.save_step(s, 23, {"a": 1}), 1),
    "save_step, over another": Write(lambda m, s: m.save_step(s, 1, {"a": 2}), 1),
    "save_steps": Write(lambda m, s: m.save_steps(s, {2: {"a": 2}, 7: {"a": 7}}), 2),
    "patch_step": Write(lambda m, s: m.patch_step(s, 1, {"b": 1}), 1),
    "delete_step": Write(lambda m, s: m.delete_step(s, 2), 1),
    "save_draft": Write(lambda m, s: m.save_draft(s, 5, {"a": 5}), 0),
    "delete_draft": Write(lambda m, s: m.delete_draft(s, 3), 0),
    "promote_draft_to_step": Write(lambda m, s: m.promote_draft_to_step(s, 4), 1),
    "finalize": Write(lambda m, s: m.finalize(s), 1),
    "reopen": Write(lambda m, s: m.reopen(s), 1, finalized=True),
}

READS: dict[str, Callable[[Manager, str], Awaitable[Any]]] = {
    "get_session": lambda m, s: m.get_session(s),
    "get_step": lambda m, s: m.get_step(s, 1),
    "get_step, not saved": lambda m, s: m.get_step(s, 20),
    "get_all_steps": lambda m, s: m.get_all_steps(s),
    "get_draft": lambda m, s: m.get_draft(s, 3),
    "get_progress": lambda m, s: m.get_progress(s),
    "view_progress": lambda m, s: m.view_progress(s),
    "get_session_summary": lambda m, s: m.get_session_summary(s),
    "get_export": lambda m, s: m.get_export(s),
}


async def prepare(manager: Manager, *, finalized: bool = False) -> str:
    """Make a session with steps 1 and 2 and drafts of 3 and 4; give its id."""
    session_id = await manager.create_session(workspace_id="w1")
    await manager.save_steps(session_id, {1: {"a": 1}, 2: {"a": 2}})
    await manager.save_draft(session_id, 3, {"a": 3})
    await manager.save_draft(session_id, 4, {"a": 4})
    if finalized:
        await manager.finalize(session_id)
    return session_id


def keyed(key: str = "k1", body: bytes = b"{}") -> IdempotentRequest:
    """Make a request with an Idempotency-Key."""
    return IdempotentRequest.of(
        caller="", method="POST", path="/any", key=key, query=b"", body=body
    )


async def names_of_keys(gateway: Gateway, session_id: str) -> set[str]:
    """List the keys of a session, each without the session's prefix."""
    prefix = gateway.keys.session(session_id).prefix
    found = await gateway.command("KEYS", f"{prefix}*")
    return {key.decode().removeprefix(prefix) for key in found}


async def deadlines_ms(gateway: Gateway, session_id: str) -> dict[str, int]:
    """Ask when each key of a session expires, in Unix milliseconds; -1 stands for never."""
    prefix = gateway.keys.session(session_id).prefix
    names = sorted(await names_of_keys(gateway, session_id))
    return {name: await gateway.command("PEXPIRETIME", prefix + name) for name in names}


async def store_time_ms(gateway: Gateway) -> int:
    """Ask the store's own clock, in Unix milliseconds."""
    seconds, microseconds = await gateway.command("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def count_events(gateway: Gateway, session_id: str) -> int:
    """Count the events of a session."""
    return int(await gateway.command("XLEN", gateway.keys.session(session_id).events))


def watch_operation_ids(monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes | None]) -> None:
    """Call `make` whenever an operation id is drawn; what it gives, if anything, is the id."""
    draw = os.urandom

    def urandom(size: int) -> bytes:
        # Of this length nobody else asks for random bytes.
        return (make() if size == 12 else None) or draw(size)

    monkeypatch.setattr("app.store.gateway.os.urandom", urandom)
