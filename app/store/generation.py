"""The generation of a session in the store: its status, its reports, its language."""

from collections.abc import Sequence
from typing import NamedTuple

from app.errors import InvalidTransitionError, RunSupersededError, SessionNotFoundError
from app.onboarding.generation import MAY_FOLLOW, Generation, ProgressEvent
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import SessionStatus
from app.store.faults import corrupt
from app.store.gateway import Gateway, Reply
from app.store.sessions import SessionStore

GENERATION_FIELDS = (
    *("status", "percent", "stage", "message", "error_message", "reported_at", "run_at"),
    *("run_percent", "created_at"),
)
"""The fields of `progress` from which `read_generation` reads."""


class Taken(NamedTuple):
    """A report of progress in the log; `repeated` when its sender's id was taken before."""

    event_id: str
    stage: str
    progress: int
    message: str | None
    at_ms: int
    repeated: bool


class GenerationStore:
    """Keeps generations. An unknown session raises `SessionNotFoundError`.

    Each call is one round trip, a second one where nothing is found.
    """

    def __init__(self, gateway: Gateway, sessions: SessionStore) -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._sessions = sessions

    async def get(self, session_id: str) -> Generation:
        """Read how far a generation is. One command, two when the session is not there."""
        key = self._keys.session(session_id).progress
        values = await self._gateway.command("HMGET", key, *GENERATION_FIELDS)
        if not any(values):
            # No session, or a damaged one: only a look at all of it at once can tell.
            await self._sessions.get(session_id)
        return read_generation(key, values)

    async def set_status(
        self,
        session_id: str,
        status: SessionStatus,
        error_message: str,
        *,
        run: str,
        at_ms: int,
        request: IdempotentRequest | None = None,
    ) -> tuple[Generation, int, bool]:
        """Set the status; give the generation, when that was in Unix ms, and whether it changed.

        Raises `InvalidTransitionError` when it may not follow the current status, and
        `RunSupersededError` when another run has begun since the one that ends.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(
            "set_status",
            keys,
            args=[
                status,
                f"|{'|'.join(MAY_FOLLOW[status])}|",
                error_message,
                run,
                *GENERATION_FIELDS,
            ],
            at_ms=at_ms,
            request=request,
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "invalid_transition":
                raise InvalidTransitionError(reply.values[0].decode(), status)
            case "superseded":
                raise RunSupersededError
        asked_ms, *values = reply.values
        return read_generation(keys.progress, values), int(asked_ms), reply.word == "ok"

    async def add_event(
        self, event: ProgressEvent, *, at_ms: int, request: IdempotentRequest | None = None
    ) -> Taken:
        """Add a report of progress to the log. Raises `RunSupersededError`."""
        reply = await self._gateway.change(
            "add_event",
            self._keys.session(event.session_id),
            args=[
                event.stage,
                event.progress,
                event.message or "",
                event.event_id or "",
                event.run or "",
            ],
            at_ms=at_ms,
            request=request,
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "superseded":
                raise RunSupersededError
        return _taken(reply)

    async def get_language(self, session_id: str) -> str:
        """Read the language. One command, two when the session is not there."""
        key = self._keys.session(session_id).metadata
        language = await self._gateway.command("HGET", key, "language")
        if language is None:
            return (await self._sessions.get(session_id)).owner.language
        return read_language(key, language)


def read_generation(key: str, values: Sequence[bytes | None]) -> Generation:
    """Read a generation from the fields of `progress`, which is `key`.

    Raises `CorruptRecordError`. A session that no generator has met yet has none but its status.
    """
    status, percent, stage, message, error, reported, run_at, run_percent, created = values
    try:
        return Generation(
            status=SessionStatus((status or b"").decode()),
            percent=int(percent or 0),
            stage=_text(stage),
            message=_text(message),
            error_message=_text(error),
            updated_ms=int(reported or created or b""),
            run_ms=int(run_at) if run_at else None,
            run_percent=int(run_percent or 0),
        )
    except ValueError:
        raise corrupt(key) from None


def read_language(key: str, value: bytes | None) -> str:
    """Read the language from a field of `metadata`, which is `key`. Raises `CorruptRecordError`."""
    if not value:
        raise corrupt(key)
    try:
        return value.decode()
    except ValueError:
        raise corrupt(key) from None


def _taken(reply: Reply) -> Taken:
    event_id, stage, progress, message, at_ms = reply.values
    return Taken(
        event_id=event_id.decode(),
        stage=stage.decode(),
        progress=int(progress),
        message=_text(message),
        at_ms=int(at_ms),
        repeated=reply.word == "repeated",
    )


def _text(value: bytes | None) -> str | None:
    return value.decode() if value else None
