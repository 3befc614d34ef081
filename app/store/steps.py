"""Saved steps and drafts in the store: bytes in, the same bytes out."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import orjson

from app.clock import rfc3339
from app.errors import (
    CorruptRecordError,
    DraftNotFoundError,
    InvalidStepIdError,
    SessionFinalizedError,
    SessionNotFoundError,
    StepNotFoundError,
    VersionConflictError,
)
from app.onboarding.documents import Document
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.progress import Progress
from app.onboarding.sessions import Session
from app.onboarding.steps import NO_PRECONDITION, Precondition, Tags
from app.store.faults import corrupt
from app.store.gateway import Argument, Gateway, Reply
from app.store.sessions import SessionStore, progress_of


class OtherCatalogueError(Exception):
    """The session began with another catalogue, known by `pin`; nothing was done."""

    def __init__(self, pin: str) -> None:
        super().__init__(pin)
        self.pin = pin


class StepChangedError(Exception):
    """The step or the draft is no longer what the caller has read; nothing was done."""


class Saved(NamedTuple):
    """What a save came to: the versions by step number, the progress, when (Unix ms)."""

    versions: dict[int, int]
    progress: Progress
    at_ms: int


class SavedDraft(NamedTuple):
    """What saving a draft came to: the version of the step beside it, when (Unix ms)."""

    version: int | None
    at_ms: int


class StoredStep(NamedTuple):
    """A step as stored: `data` is its answers, `text` the whole record, both JSON."""

    version: int
    data: bytes
    text: bytes


class Draft(NamedTuple):
    """A draft as stored, and the version of the step beside it (None: not saved)."""

    draft_id: str
    data: bytes
    saved_at: str
    version: int | None


class StepStore:
    """Keeps the steps and drafts of sessions.

    An unknown session raises `SessionNotFoundError`, a finalized one `SessionFinalizedError`
    where it is about to be changed. Each call is one round trip.
    """

    def __init__(self, gateway: Gateway, sessions: SessionStore) -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._sessions = sessions

    async def save(
        self,
        session_id: str,
        answers: Mapping[int, Document],
        *,
        pin: str,
        at_ms: int,
        precondition: Precondition = NO_PRECONDITION,
        expected_version: int | None = None,
        expected_draft: str | None = None,
        request: IdempotentRequest | None = None,
    ) -> Saved:
        """Save steps, all or none; what is expected or a precondition is for a single one.

        Raises `OtherCatalogueError` unless the session's catalogue is `pin`, `VersionConflictError`
        when the precondition does not hold, `StepChangedError` when the expectation does not.
        """
        keys = self._keys.session(session_id)
        named: list[str] = []
        args: list[Argument] = [
            pin,
            *_conditions(precondition),
            "" if expected_version is None else expected_version,
            expected_draft or "",
            rfc3339(at_ms),
        ]
        for number, data in answers.items():
            named += (keys.step(number), keys.draft(number))
            args += (number, data.text)
        reply = await self._gateway.change(
            "save_steps", keys, named, args, at_ms=at_ms, request=request
        )
        if reply.word != "ok":
            _check_done(reply)
        return _saved(reply)

    async def recall_save(self, session_id: str, request: IdempotentRequest) -> Saved | None:
        """Return what a save with this Idempotency-Key came to; None when there was none."""
        reply = await self._gateway.recall(self._keys.session(session_id), request)
        return None if reply is None else _saved(reply)

    async def get(self, session_id: str, step_id: int) -> StoredStep | None:
        """Read a step; None when it is not saved. One command, two when it is not there.

        Raises `InvalidStepIdError` when the session has no such step.
        """
        key = self._keys.of(session_id, f"step:{step_id}")
        stored = await self._gateway.command("GET", key)
        if stored is None:
            # No session, no such step, not saved, or lost: only a look at both at once can tell.
            session, [stored] = await self._sessions.get_with(session_id, [key])
            _check_has_step(len(session.state.saved), step_id)
            if session.state.saved[step_id - 1] != "1":
                return None
        return decode_step(step_id, key, stored)

    async def list_all(self, session_id: str, steps: int) -> tuple[Session, dict[int, StoredStep]]:
        """Read a session with its saved steps, of the numbers 1 to `steps`, at one instant.

        Where the session has more steps than that, those beyond are not read.
        """
        keys = self._keys.session(session_id)
        numbers = range(1, steps + 1)
        session, strings = await self._sessions.get_with(session_id, [*map(keys.step, numbers)])
        records = {
            number: decode_step(number, keys.step(number), stored)
            for number, stored, mark in zip(numbers, strings, session.state.saved, strict=False)
            if mark == "1"
        }
        return session, records

    async def delete(
        self,
        session_id: str,
        step_id: int,
        *,
        at_ms: int,
        if_match: Tags | None = None,
        request: IdempotentRequest | None = None,
    ) -> Progress:
        """Remove a step.

        Raises `InvalidStepIdError`, `StepNotFoundError`, `VersionConflictError`.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(
            "delete_step",
            keys,
            [keys.step(step_id)],
            [step_id, _tags(if_match)],
            at_ms=at_ms,
            request=request,
        )
        _check_done(reply, step_id)
        return progress_of(reply)

    async def save_draft(
        self,
        session_id: str,
        step_id: int,
        data: Document,
        *,
        pin: str,
        at_ms: int,
        saved_at: str,
        lifetime_ms: int,
        request: IdempotentRequest | None = None,
    ) -> SavedDraft:
        """Keep a draft for `lifetime_ms`.

        Raises `OtherCatalogueError` unless the session's catalogue is `pin`.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(
            "save_draft",
            keys,
            [keys.draft(step_id)],
            [pin, step_id, saved_at, lifetime_ms, data.text],
            at_ms=at_ms,
            request=request,
        )
        _check_done(reply)
        version, at_ms = reply.values
        return SavedDraft(_version(version), int(at_ms))

    async def get_draft(self, session_id: str, step_id: int) -> Draft | None:
        """Read a draft; None when there is none. Raises `InvalidStepIdError`."""
        keys = self._keys.session(session_id)
        key = keys.draft(step_id)
        reply = await self._gateway.evaluate(
            "read_draft", [keys.progress, key, keys.metadata], [step_id]
        )
        if reply.word == "draft_not_found":
            return None
        _check_done(reply, step_id)
        return decode_draft(step_id, key, *reply.values)

    async def delete_draft(self, session_id: str, step_id: int, *, at_ms: int) -> Draft | None:
        """Drop a draft and return it, or None when it was damaged.

        Raises `InvalidStepIdError`, `DraftNotFoundError`.
        """
        keys = self._keys.session(session_id)
        key = keys.draft(step_id)
        reply = await self._gateway.change("delete_draft", keys, [key], [step_id], at_ms=at_ms)
        _check_done(reply, step_id)
        try:
            return decode_draft(step_id, key, *reply.values)
        except CorruptRecordError:
            return None


def decode_step(step_id: int, key: str, stored: bytes | None) -> StoredStep:
    """Recognise a stored step. Raises `CorruptRecordError`.

    The answers are parsed once to see that they are whole (1 us for 1 KB) and stay bytes.
    """
    if stored is not None and (found := _STEP.match(stored)) and stored.endswith(b"}"):
        data = stored[found.end() : -1]
        if int(found[1]) == step_id and _is_object(data):
            return StoredStep(int(found[2]), data, stored)
    raise corrupt(key, f"step {step_id}")


def decode_draft(step_id: int, key: str, stored: bytes, version: bytes) -> Draft:
    """Recognise a stored draft; `version` is the saved step's. Raises `CorruptRecordError`."""
    if (found := _DRAFT.match(stored)) and stored.endswith(b"}"):
        data = stored[found.end() : -1]
        if _is_object(data):
            return Draft(found[1].decode(), data, found[2].decode(), _version(version))
    raise corrupt(key, f"the draft of step {step_id}")


def _check_done(reply: Reply, step_id: int = 0) -> None:
    """Raise the error that a script's word stands for, unless it did what it was asked."""
    match reply.word:
        case "ok":
            return
        case "not_found":
            raise SessionNotFoundError
        case "other_catalogue":
            raise OtherCatalogueError(reply.values[0].decode())
        case "out_of_range":
            _check_has_step(int(reply.values[0]), step_id)
        case "step_not_found":
            raise StepNotFoundError(step_id)
        case "draft_not_found":
            raise DraftNotFoundError(step_id)
        case "finalized":
            raise SessionFinalizedError
        case "conflict":
            raise VersionConflictError(_version(reply.values[0]))
        case "changed":
            raise StepChangedError


def _check_has_step(steps: int, step_id: int) -> None:
    if step_id > steps:
        raise InvalidStepIdError(f"The session's steps are numbered 1 to {steps}")


def _saved(reply: Reply) -> Saved:
    numbers = map(int, reply.values[4:])
    return Saved(dict(zip(numbers, numbers, strict=True)), progress_of(reply), int(reply.values[3]))


# How a record begins: what is behind that, up to the last brace, are the answers as they came, with
# the white space around them.
_AT = rb'"saved_at":"([0-9T:.Z-]{20,30})","data":'
_STEP = re.compile(rb'\{"step_id":([1-9][0-9]{0,2}),"version":([1-9][0-9]{0,14}),' + _AT)
_DRAFT = re.compile(rb'\{"step_id":[1-9][0-9]{0,2},"draft_id":"([0-9a-f]+)",' + _AT)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False


def _conditions(precondition: Precondition) -> tuple[str, str]:
    """Write both conditions as the scripts read them."""
    if precondition is NO_PRECONDITION:
        return "", ""
    return _tags(precondition.if_match), _tags(precondition.if_none_match)


def _tags(tags: Tags | None) -> str:
    """Write tags as the scripts read them: '' none, '*', or '|3|4|'."""
    if tags is None:
        return ""
    return "*" if tags.any_version else f"|{'|'.join(map(str, sorted(tags.versions)))}|"


def _version(value: bytes) -> int | None:
    return int(value) if value else None
