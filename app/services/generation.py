"""The generation of a session: what a generator reports, and what is made of it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import orjson
import structlog

from app.clock import now_ms, rfc3339
from app.errors import InvalidRequestError
from app.onboarding.events import BEFORE_ALL
from app.onboarding.files import (
    PART_BYTES,
    FileKind,
    FileView,
    check_media_type,
    clean_filename,
    content_of,
)
from app.onboarding.generation import (
    LatestProgress,
    ProgressEvent,
    ProgressEventView,
    StatusView,
    check_progress_event,
    check_status_change,
    view_status,
)
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import (
    SessionChanges,
    SessionStatus,
    check_language,
    check_session_id,
)
from app.services.files import FileService, make_file_service
from app.services.manager import make_manager
from app.services.reporter import ProgressReporter
from app.services.standin import stand_in
from app.settings import load_settings
from app.store.connect import connect
from app.store.events import EventStore
from app.store.gateway import Gateway
from app.store.generation import GenerationStore
from app.store.sessions import SessionStore

__all__ = [
    "GenerationService",
    "ProgressEvent",
    "ProgressReporter",
    "SessionStatus",
    "add_progress_event",
    "get_generation_service",
    "get_language_preference",
    "get_latest_progress",
    "get_progress_events",
    "get_result",
    "get_status",
    "set_language_preference",
    "store_result",
    "update_session_progress",
    "update_session_status",
]

log = structlog.get_logger()


class GenerationService:
    """Everything a generator says of a session, and everybody may ask.

    Every method raises a `StoreError` when the store cannot do its part and `SessionNotFoundError`
    when there is no such session; what else it raises, it says. `request` is the Idempotency-Key of
    a call over HTTP.
    """

    def __init__(self, gateway: Gateway, files: FileService) -> None:
        self._gateway = gateway
        self._sessions = SessionStore(gateway)
        self._generations = GenerationStore(gateway, self._sessions)
        self._events = EventStore(gateway)
        self._files = files

    async def get_status(self, session_id: str) -> StatusView:
        """Say how far the generation is. One command."""
        check_session_id(session_id)
        return view_status(session_id, await self._generations.get(session_id), now_ms())

    async def update_session_status(
        self,
        session_id: str,
        status: SessionStatus | str,
        error_message: str | None = None,
        *,
        run: str | None = None,
        request: IdempotentRequest | None = None,
    ) -> StatusView:
        """Set the status and say how far the generation is. The current status changes nothing.

        `error_message` belongs to the status `error`. `run` names the run that begins or ends:
        reports and ends in the name of another one are refused from then on. Raises
        `InvalidTransitionError`, `RunSupersededError`, `InvalidRequestError`.
        """
        check_session_id(session_id)
        wanted = _status(status)
        check_status_change(wanted, error_message, run)
        generation, at_ms, changed = await self._generations.set_status(
            session_id,
            wanted,
            error_message or "",
            run=run or "",
            at_ms=now_ms(),
            request=request,
        )
        if changed and not (request and request.replayed):
            log.info("status_changed", session_id=session_id, status=wanted)
        return view_status(session_id, generation, at_ms)

    async def report_progress(
        self, event: ProgressEvent, *, request: IdempotentRequest | None = None
    ) -> tuple[ProgressEventView, bool]:
        """Add a report to the log; give it as it was taken, and whether that was before now.

        Raises `InvalidRequestError`, `RunSupersededError`.
        """
        check_session_id(event.session_id)
        check_progress_event(event)
        taken = await self._generations.add_event(event, at_ms=now_ms(), request=request)
        view = ProgressEventView(
            id=taken.event_id,
            type="progress",
            stage=taken.stage,
            progress=taken.progress,
            message=taken.message,
            at=rfc3339(taken.at_ms),
        )
        if event.event_id is not None:
            view["event_id"] = event.event_id
        return view, taken.repeated

    async def add_progress_event(self, event: ProgressEvent) -> ProgressEventView:
        """Add a report to the log, once for each `event_id`. Raises as `report_progress` does."""
        view, _ = await self.report_progress(event)
        return view

    async def update_session_progress(
        self, session_id: str, current_step: int, total_steps: int, description: str | None = None
    ) -> ProgressEventView:
        """Report that `current_step` of `total_steps` is done. Raises `InvalidRequestError`."""
        if not 0 <= current_step <= total_steps or total_steps < 1:
            raise InvalidRequestError("current_step is 0 to total_steps, and that is 1 or more")
        stage = f"step {current_step} of {total_steps}"
        progress = 100 * current_step // total_steps
        return await self.add_progress_event(
            ProgressEvent(session_id, stage, progress, description)
        )

    async def get_progress_events(self, session_id: str) -> list[ProgressEvent]:
        """Read the reports that the log still holds, oldest first."""
        check_session_id(session_id)
        events, _ = await self._events.list_after(session_id, BEFORE_ALL, None)
        return [
            ProgressEvent(
                session_id=session_id,
                stage=event["stage"],
                progress=event["progress"],
                message=event.get("message"),
                event_id=event.get("event_id"),
            )
            for event in events
            if event["type"] == "progress"
        ]

    async def get_latest_progress(self, session_id: str) -> LatestProgress:
        """Say what was reported last. One command."""
        check_session_id(session_id)
        generation = await self._generations.get(session_id)
        return LatestProgress(
            progress=generation.percent, stage=generation.stage, status=generation.status.value
        )

    async def get_language_preference(self, session_id: str) -> str:
        """Say in which language the session is answered, a tag as in BCP 47. One command."""
        check_session_id(session_id)
        return await self._generations.get_language(session_id)

    async def set_language_preference(
        self, session_id: str, language: str, *, request: IdempotentRequest | None = None
    ) -> str:
        """Set the language, and return it. Raises `InvalidRequestError`."""
        check_session_id(session_id)
        check_language(language)
        changes = SessionChanges({"language": language})
        await self._sessions.update(session_id, changes, at_ms=now_ms(), request=request)
        return language

    async def store_result(
        self,
        session_id: str,
        result: bytes | Mapping[str, Any],
        *,
        content_type: str | None = None,
        filename: str | None = None,
        run: str | None = None,
    ) -> FileView:
        """Keep what was generated, bytes or a JSON object, instead of what was before.

        Without a type, bytes are `application/octet-stream`. `run` names the run that made it.
        Raises `InvalidRequestError`, `PayloadTooLargeError`, `RunSupersededError`.
        """
        is_document = isinstance(result, Mapping)
        content, own_type = await asyncio.to_thread(content_of, result)
        content_type = check_media_type(content_type or own_type)
        name = clean_filename(filename, "result.json" if is_document else "result.bin")
        incoming = _Ready(content, content_type, name)
        return await self._files.store_result(
            session_id, incoming, is_document=is_document, run=run
        )

    async def get_result(self, session_id: str) -> bytes | dict[str, Any] | None:
        """Read what was generated, as it was stored; None when nothing was."""
        while True:
            opened = await self._files.open(session_id, FileKind.RESULT)
            if opened is None:
                return None
            # Unlike join(), it does not hold everything twice.
            content = BytesIO()
            async for part in opened.content:
                content.write(part)
            if content.tell() == opened.info.size:
                break
            # Replaced while it was read: the next one is there already.
        result = content.getvalue()
        if not opened.info.is_document:
            return result
        return dict(await asyncio.to_thread(orjson.loads, result))

    async def aclose(self) -> None:
        """Close the connections of this event loop; the next call opens them again."""
        await self._files.aclose()
        await self._gateway.aclose()


@dataclass(slots=True)
class _Ready:
    """A body that is here already."""

    content: bytes
    content_type: str
    filename: str

    async def __aiter__(self) -> AsyncIterator[bytes]:
        # In parts, so that nobody copies the whole.
        for start in range(0, len(self.content), PART_BYTES):
            yield self.content[start : start + PART_BYTES]


def _status(status: str) -> SessionStatus:
    try:
        return SessionStatus(status)
    except ValueError:
        raise InvalidRequestError("status is processing, complete or error") from None


@cache
def get_generation_service() -> GenerationService:
    """Return this process's service, made from the environment; it connects when it is first used.

    It finds the store as `get_onboarding_session_manager` does, and raises the same.
    """
    settings = load_settings()
    gateway = connect(settings)
    files = make_file_service(gateway, make_manager(gateway, settings), settings)
    return GenerationService(gateway, files)


# What callers import from here by name, for a worker or a REPL.
_service = stand_in(GenerationService, get_generation_service)
get_status = _service.get_status
update_session_status = _service.update_session_status
update_session_progress = _service.update_session_progress
add_progress_event = _service.add_progress_event
get_progress_events = _service.get_progress_events
get_latest_progress = _service.get_latest_progress
get_language_preference = _service.get_language_preference
set_language_preference = _service.set_language_preference
store_result = _service.store_result
get_result = _service.get_result
