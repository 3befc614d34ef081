"""Large bodies of a session, in and out as they come: never held whole, shown whole or not."""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

import structlog

from app.clock import now_ms
from app.errors import (
    AbsentError,
    PayloadTooLargeError,
    RequestError,
    SessionCapacityError,
    StateError,
    StoreError,
)
from app.onboarding.files import (
    PART_BYTES,
    FileInfo,
    FileKind,
    FileView,
    UploadedView,
    view_file,
)
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import Owner, check_session_id
from app.services.manager import OnboardingSessionManager
from app.services.tokens import FirstToken
from app.settings import Settings
from app.store.client import end_task
from app.store.connect import connect_bulk
from app.store.files import Body, FileStore
from app.store.gateway import Gateway

log = structlog.get_logger()


NOBODYS = Owner(None, None, "en")
"""The owner of a session that belongs to nobody."""


class BodyLimits(NamedTuple):
    """The largest bodies, in bytes."""

    upload: int
    result: int


class Incoming(Protocol):
    """A body on its way in. What is said about it is known when it has been iterated."""

    content_type: str
    filename: str

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Give the bytes as they come."""


class IncomingUpload(Incoming, Protocol):
    """A file on its way in, with the language of the session that it begins."""

    language: str


class OpenedFile(NamedTuple):
    """A stored body: what is known of it, and its bytes, read as they are iterated, once.

    The iteration ends early when the body is replaced or removed meanwhile: what has come is then
    shorter than `info.size`.
    """

    info: FileInfo
    content: AsyncGenerator[bytes, None]


class FileService:
    """Takes and gives large bodies.

    Raises `SessionNotFoundError`, and a `StoreError` where the store cannot do its part; on the way
    in `PayloadTooLargeError`, and `BodyLostError` for what takes longer than an hour to come.
    """

    def __init__(
        self,
        gateway: Gateway,
        bulk: Gateway,
        manager: OnboardingSessionManager,
        limits: BodyLimits,
    ) -> None:
        self._files = FileStore(gateway, bulk)
        self._manager = manager
        self._limits = limits
        self._dropping: set[asyncio.Task[None]] = set()

    async def begin_session(
        self,
        upload: IncomingUpload,
        *,
        owner: Owner = NOBODYS,
        first: FirstToken | None = None,
    ) -> UploadedView:
        """Make a session with the file that is on its way, in the language that comes with it.

        It belongs to nobody, if not said; `first` is a token that opens it.

        Nothing of it is there before all of the file is. Raises `InvalidRequestError`, and
        `SessionCapacityError` when there is no room for it.
        """
        session_id = str(uuid.uuid4()) if first is None else first.session_id
        save, limit = self._files.save_early_part, self._limits.upload
        info = await self._keep(session_id, FileKind.UPLOAD, upload, limit, save)
        owner = replace(owner, language=upload.language)
        try:
            await self._manager.begin_session_with(
                session_id, owner, upload=info, token_digest=first and first.digest
            )
        except SessionCapacityError:
            await self._drop(session_id, FileKind.UPLOAD, info.transfer, info.parts)
            raise
        view = UploadedView(session_id=session_id, status="pending")
        return view if first is None else {**view, "session_token": first.token}

    async def store_result(
        self,
        session_id: str,
        result: Incoming,
        *,
        is_document: bool = False,
        run: str | None = None,
        request: IdempotentRequest | None = None,
    ) -> FileView:
        """Keep what a generator made, instead of what it made before.

        `is_document` notes that it was given as a dict. `run` names the run that made it: when
        another one has begun since, it is refused with `RunSupersededError`. `request` is the
        Idempotency-Key of a call over HTTP, whose fingerprint the body completes.
        """
        check_session_id(session_id)
        save, limit = self._files.save_part, self._limits.result
        info = await self._keep(session_id, FileKind.RESULT, result, limit, save)
        info = replace(info, is_document=is_document)
        if request is not None:
            request.add_body(info.checksum)
        try:
            shown = await self._files.place(
                session_id,
                FileKind.RESULT,
                info,
                event="result_stored",
                run=run or "",
                at_ms=info.stored_ms,
                request=request,
            )
        except (RequestError, AbsentError, StateError):
            await self._drop(session_id, FileKind.RESULT, info.transfer, info.parts)
            raise
        if shown.transfer == info.transfer:
            log.info("result_stored", session_id=session_id, size=info.size)
        else:
            # The Idempotency-Key was used before: what it showed then is shown.
            await self._drop(session_id, FileKind.RESULT, info.transfer, info.parts)
        return view_file(session_id, shown)

    async def open(self, session_id: str, kind: FileKind) -> OpenedFile | None:
        """Read a body; None when there is none. Raises `CorruptRecordError`."""
        check_session_id(session_id)
        body = await self._files.get(session_id, kind)
        if body is None:
            return None
        # Before anything is sent: of the first part it can still be said that it is damaged.
        self._files.check_size(session_id, kind, body.info, 1, len(body.first))
        return OpenedFile(body.info, self._read(session_id, kind, body))

    async def aclose(self) -> None:
        """Close the connections of this event loop that the parts take."""
        loop = asyncio.get_running_loop()
        for task in [each for each in self._dropping if each.get_loop() is loop]:
            await end_task(task)
        await self._files.aclose()

    async def _keep(
        self,
        session_id: str,
        kind: FileKind,
        incoming: Incoming,
        limit: int,
        save: Callable[[str, FileKind, str, int, bytes], Awaitable[None]],
    ) -> FileInfo:
        """Keep a body part by part; nothing shows it yet."""
        transfer = os.urandom(8).hex()
        digest = hashlib.sha256()
        size, parts, waiting = 0, 0, bytearray()

        async def save_next() -> None:
            nonlocal parts
            parts += 1
            with memoryview(waiting) as view:
                part = bytes(view[:PART_BYTES])
            del waiting[:PART_BYTES]
            await save(session_id, kind, transfer, parts, part)

        try:
            async for chunk in incoming:
                size += len(chunk)
                _check_size(kind, size, limit)
                digest.update(chunk)
                waiting += chunk
                while len(waiting) >= PART_BYTES:
                    await save_next()
            if waiting:
                await save_next()
        except BaseException:
            self._drop_soon(session_id, kind, transfer, parts)
            raise
        return FileInfo(
            transfer=transfer,
            parts=parts,
            size=size,
            content_type=incoming.content_type,
            filename=incoming.filename,
            checksum=f"sha256:{digest.hexdigest()}",
            is_document=False,
            stored_ms=now_ms(),
        )

    def _drop_soon(self, session_id: str, kind: FileKind, transfer: str, parts: int) -> None:
        """Remove such parts beside the request: when its time is over, nobody waits for that."""
        task = asyncio.create_task(self._drop(session_id, kind, transfer, parts), name="drop")
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, session_id: str, kind: FileKind, transfer: str, parts: int) -> None:
        """Remove parts that nobody will show; where that fails, their time is limited."""
        with suppress(StoreError):
            await self._files.drop_parts(session_id, kind, transfer, parts)

    async def _read(
        self, session_id: str, kind: FileKind, body: Body
    ) -> AsyncGenerator[bytes, None]:
        size = len(body.first)
        if body.first:
            yield body.first
        for number in range(2, body.info.parts + 1):
            part = await self._files.get_part(session_id, kind, body.info, number)
            if part is None:
                return
            size += len(part)
            self._files.check_size(session_id, kind, body.info, number, size)
            yield part


def _check_size(kind: FileKind, size: int, limit: int) -> None:
    if size > limit:
        raise PayloadTooLargeError(f"The {kind} may take {limit} bytes")


def make_file_service(
    gateway: Gateway, manager: OnboardingSessionManager, settings: Settings
) -> FileService:
    """Make a file service beside a manager, with connections of its own for the parts."""
    limits = BodyLimits(upload=settings.max_upload_bytes, result=settings.max_result_bytes)
    return FileService(gateway, connect_bulk(settings), manager, limits)
