"""Sessions as these tests need them: services at any address, every kind of call, the keys."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from app.clock import now_ms
from app.onboarding.assistant import AskedQuestion
from app.onboarding.events import BEFORE_ALL
from app.onboarding.files import FileInfo, FileKind
from app.onboarding.generation import ProgressEvent
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import Owner
from app.services.files import BodyLimits, FileService
from app.services.generation import GenerationService
from app.services.manager import OnboardingSessionManager, make_manager
from app.store import gateway as gateway_module
from app.store.assistant import AssistantStore
from app.store.connect import connect
from app.store.events import EventStore
from app.store.files import FileStore
from app.store.gateway import Gateway
from app.store.keys import SessionKeys
from app.store.tokens import NewResumeToken, TokenStore
from tests.conftest import QUICKLY, known_settings

Manager = OnboardingSessionManager

SHARED = (
    *("metadata", "progress", "events", "ops", "export", "step:", "result", "upload"),
    *("history", "tokens"),
)
"""How the names of the keys begin that share the session's deadline."""


class Place(NamedTuple):
    """A manager, the gateway below it, and what else works on that."""

    manager: Manager
    gateway: Gateway

    @property
    def bodies(self) -> FileService:
        """The use cases of large bodies."""
        limits = BodyLimits(upload=10_000_000, result=10_000_000)
        return FileService(self.gateway, self.gateway, self.manager, limits)

    @property
    def generation(self) -> GenerationService:
        """The use cases of a generation."""
        return GenerationService(self.gateway, self.bodies)

    @property
    def events(self) -> EventStore:
        """The logs."""
        return EventStore(self.gateway)

    @property
    def questions(self) -> AssistantStore:
        """The questions that were asked."""
        return AssistantStore(self.gateway)

    @property
    def tokens(self) -> TokenStore:
        """The digests of tokens."""
        return TokenStore(self.gateway)

    async def add_answer(self, session_id: str, question: str = "a", took_ms: int = 5) -> None:
        """Keep a question with its answer."""
        await self.questions.add(session_id, asked(question, took_ms), at_ms=now_ms())

    @property
    def files(self) -> FileStore:
        """Where large bodies are kept."""
        return FileStore(self.gateway, self.gateway)

    async def send(self, session_id: str, transfer: str, *parts: bytes) -> FileInfo:
        """Keep the parts of a result that nothing shows yet, and describe it."""
        for number, data in enumerate(parts, start=1):
            await self.files.save_part(session_id, FileKind.RESULT, transfer, number, data)
        return describe(transfer, *parts)

    async def place(self, session_id: str, info: FileInfo) -> None:
        """Show a result whose parts are kept."""
        await self.files.place(
            session_id, FileKind.RESULT, info, event="result_stored", run="", at_ms=now_ms()
        )

    async def store(self, session_id: str, transfer: str, *parts: bytes) -> None:
        """Store a result in parts of any size."""
        await self.place(session_id, await self.send(session_id, transfer, *parts))

    async def upload(self, session_id: str, *parts: bytes) -> None:
        """Make a session with a file in parts of any size."""
        for number, data in enumerate(parts, start=1):
            await self.files.save_early_part(session_id, FileKind.UPLOAD, "u", number, data)
        owner = Owner("w1", None, "en")
        await self.manager.begin_session_with(session_id, owner, upload=describe("u", *parts))


def asked(question: str, took_ms: int = 5) -> AskedQuestion:
    """Make a question with its answer."""
    return AskedQuestion(
        question=question,
        answer=f"an answer to {question}",
        confidence=0.5,
        processing_time_ms=took_ms,
        at="2026-01-01T12:00:00.000Z",
    )


def describe(transfer: str, *parts: bytes) -> FileInfo:
    """Say what is known of a body in parts of any size."""
    return FileInfo(
        transfer=transfer,
        parts=len(parts),
        size=len(b"".join(parts)),
        content_type="text/plain",
        filename="a.txt",
        checksum="sha256:0a",
        is_document=False,
        stored_ms=now_ms(),
    )


@asynccontextmanager
async def working_at(url: str, **overrides: Any) -> AsyncIterator[Place]:
    """Give a manager for the store at an address, with settings of its own."""
    settings = known_settings(redis_url=url, **{**QUICKLY, **overrides})
    gateway = connect(settings)
    try:
        yield Place(make_manager(gateway, settings), gateway)
    finally:
        await gateway.aclose()


TOKEN = NewResumeToken("0" * 16, "0a", lifetime_ms=60_000, label="a label")
"""A resume token of which nobody knows the secret."""

Call = Callable[[Place, str], Awaitable[Any]]
"""Does something with a session."""


class Write(NamedTuple):
    """One kind of write that the session from `prepare` accepts."""

    do: Call
    events: int
    """How many events it makes."""

    finalized: bool = False
    """Whether the session must be finalized before."""


WRITES = {
    "set_metadata": Write(lambda p, s: p.manager.set_metadata(s, "u2", "w2"), 1),
    "update_progress": Write(lambda p, s: p.manager.update_progress(s, 9), 0),
    "save_step, a new one": Write(lambda p, s: p.manager.save_step(s, 23, {"a": 1}), 1),
    "save_step, over another": Write(lambda p, s: p.manager.save_step(s, 1, {"a": 2}), 1),
    "save_steps": Write(lambda p, s: p.manager.save_steps(s, {2: {"a": 2}, 7: {"a": 7}}), 2),
    "patch_step": Write(lambda p, s: p.manager.patch_step(s, 1, {"b": 1}), 1),
    "delete_step": Write(lambda p, s: p.manager.delete_step(s, 2), 1),
    "save_draft": Write(lambda p, s: p.manager.save_draft(s, 5, {"a": 5}), 0),
    "delete_draft": Write(lambda p, s: p.manager.delete_draft(s, 3), 0),
    "promote_draft_to_step": Write(lambda p, s: p.manager.promote_draft_to_step(s, 4), 1),
    "finalize": Write(lambda p, s: p.manager.finalize(s), 1),
    "reopen": Write(lambda p, s: p.manager.reopen(s), 1, finalized=True),
    "set_status": Write(lambda p, s: p.generation.update_session_status(s, "processing"), 1),
    "set_status, of a finalized one": Write(
        lambda p, s: p.generation.update_session_status(s, "error", "broken"), 1, finalized=True
    ),
    "add_event": Write(
        lambda p, s: p.generation.add_progress_event(ProgressEvent(s, "visual_detection", 70)), 1
    ),
    "add_event, with an id": Write(
        lambda p, s: p.generation.add_progress_event(ProgressEvent(s, "a", 1, "b", "id-1")), 1
    ),
    "set_language": Write(lambda p, s: p.generation.set_language_preference(s, "pt-BR"), 1),
    "set_language, the same": Write(lambda p, s: p.generation.set_language_preference(s, "en"), 0),
    "store_result": Write(lambda p, s: p.generation.store_result(s, {"a": 1}), 1),
    "store_result, in parts": Write(lambda p, s: p.store(s, "w", b"abc", b"de"), 1),
    "add_answer": Write(lambda p, s: p.add_answer(s), 0),
    "add_answer, of a finalized one": Write(lambda p, s: p.add_answer(s), 0, finalized=True),
    "add_session_token": Write(lambda p, s: p.tokens.add_session_token(s, "0b", at_ms=now_ms()), 0),
    "create_resume_token": Write(lambda p, s: p.tokens.create(s, TOKEN, at_ms=now_ms()), 0),
    "store_result, of nothing": Write(lambda p, s: p.generation.store_result(s, b""), 1),
}

READS: dict[str, Call] = {
    "get_session": lambda p, s: p.manager.get_session(s),
    "get_step": lambda p, s: p.manager.get_step(s, 1),
    "get_step, not saved": lambda p, s: p.manager.get_step(s, 20),
    "get_all_steps": lambda p, s: p.manager.get_all_steps(s),
    "get_draft": lambda p, s: p.manager.get_draft(s, 3),
    "get_progress": lambda p, s: p.manager.get_progress(s),
    "view_progress": lambda p, s: p.manager.view_progress(s),
    "get_session_summary": lambda p, s: p.manager.get_session_summary(s),
    "get_export": lambda p, s: p.manager.get_export(s),
    "get_status": lambda p, s: p.generation.get_status(s),
    "get_latest_progress": lambda p, s: p.generation.get_latest_progress(s),
    "get_language_preference": lambda p, s: p.generation.get_language_preference(s),
    "get_progress_events": lambda p, s: p.generation.get_progress_events(s),
    "get_result": lambda p, s: p.generation.get_result(s),
    "list_asked": lambda p, s: p.questions.list_asked(s),
    "list_open": lambda p, s: p.tokens.list_open(s),
    "list_after": lambda p, s: p.events.list_after(s, BEFORE_ALL, 10),
    "get_scene": lambda p, s: p.events.get_scene(s),
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


async def prepare_with_files(place: Place, *, finalized: bool = False) -> str:
    """Make the same with everything else that a session may have; give its id.

    An upload and a result, each in two parts, a body that is still on its way, a question, a
    token.
    """
    session_id = "with-files"
    await place.upload(session_id, b"up", b"load")
    await place.manager.save_steps(session_id, {1: {"a": 1}, 2: {"a": 2}})
    await place.manager.save_draft(session_id, 3, {"a": 3})
    await place.manager.save_draft(session_id, 4, {"a": 4})
    await place.store(session_id, "r", b"re", b"sult")
    await place.send(session_id, "x", b"unfinished")
    await place.add_answer(session_id)
    await place.tokens.add_session_token(session_id, "0a", at_ms=now_ms())
    if finalized:
        await place.manager.finalize(session_id)
    return session_id


def keyed(key: str = "k1", body: bytes = b"{}") -> IdempotentRequest:
    """Make a request with an Idempotency-Key."""
    return IdempotentRequest.of(
        caller="", method="POST", path="/any", key=key, query=b"", body=body
    )


async def names_of_keys(gateway: Gateway, session_id: str) -> set[str]:
    """List the keys of a session, each without the session's prefix, and `tokens`."""
    keys = gateway.keys.session(session_id)
    found = await gateway.command("KEYS", f"{keys.prefix}*")
    tokens = {"tokens"} if await gateway.command("EXISTS", keys.tokens) else set()
    return {key.decode().removeprefix(keys.prefix) for key in found} | tokens


def key_named(keys: SessionKeys, name: str) -> str:
    """Give the key that `names_of_keys` gives this name."""
    return keys.tokens if name == "tokens" else keys.prefix + name


async def deadlines_ms(gateway: Gateway, session_id: str) -> dict[str, int]:
    """Ask when each key of a session expires, in Unix milliseconds; -1 stands for never."""
    keys = gateway.keys.session(session_id)
    names = sorted(await names_of_keys(gateway, session_id))
    return {name: await gateway.command("PEXPIRETIME", key_named(keys, name)) for name in names}


async def store_time_ms(gateway: Gateway) -> int:
    """Ask the store's own clock, in Unix milliseconds."""
    seconds, microseconds = await gateway.command("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def count_events(gateway: Gateway, session_id: str) -> int:
    """Count the events of a session."""
    return int(await gateway.command("XLEN", gateway.keys.session(session_id).events))


def watch_operation_ids(monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes | None]) -> None:
    """Call `make` whenever an operation id is drawn; what it gives, if anything, is the id."""
    draw = gateway_module.new_operation

    def new_operation() -> str:
        made = make()
        return draw() if made is None else made.hex()

    monkeypatch.setattr(gateway_module, "new_operation", new_operation)
