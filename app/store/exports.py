"""Exports in the store: one frozen document a session, replaced only by the next revision."""

from typing import NamedTuple

from app.errors import SessionNotFoundError
from app.onboarding.exports import Export
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.sessions import Session
from app.store.faults import corrupt
from app.store.gateway import Gateway, Reply
from app.store.jobs import JobStore
from app.store.sessions import SessionStore


class Frozen(NamedTuple):
    """A finalized session: its export, how many of its steps are in it, since when (Unix ms)."""

    export: bytes
    completed: int
    total: int
    finalized_ms: int


class ExportStore:
    """Keeps exports. An unknown session raises `SessionNotFoundError`."""

    def __init__(self, gateway: Gateway, sessions: SessionStore, jobs: JobStore) -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._sessions = sessions
        self._jobs = jobs

    async def get(self, session_id: str) -> Export | None:
        """Read the latest export; None when there is none. One command, two when there is none."""
        key = self._keys.of(session_id, "export")
        stored = await self._gateway.command("GET", key)
        if stored is None:
            # No session, never finalized, or lost: only a look at both at once can tell.
            session, [stored] = await self._sessions.get_with(session_id, [key])
            if session.state.revision == 0 or session.is_export_lost:
                return None
        return self._recognise(key, stored)

    async def get_frozen(self, session_id: str) -> Frozen | None:
        """Read a finalized session's export with its counts; None when it is not finalized."""
        key = self._keys.session(session_id).export
        # It answers a finalize that may have been done by another, who was not told so.
        session, [stored] = await self._sessions.get_with(session_id, [key], is_promise=True)
        if session.state.finalized_ms is None:
            return None
        export = self._recognise(key, stored)
        progress = session.state.progress
        return Frozen(
            export.text, progress["completed"], progress["total"], session.state.finalized_ms
        )

    async def recall(self, session_id: str, request: IdempotentRequest) -> Frozen | None:
        """Return what a finalize with this Idempotency-Key came to; None when there was none."""
        reply = await self._gateway.recall(self._keys.session(session_id), request)
        return None if reply is None else _frozen(reply)

    async def remember(self, session_id: str, *, at_ms: int, request: IdempotentRequest) -> None:
        """Let an Idempotency-Key answer with the export of a session that is finalized already."""
        keys = self._keys.session(session_id)
        await self._gateway.change(
            "finalize_session", keys, [keys.export], ["", "", ""], at_ms=at_ms, request=request
        )

    async def save(
        self,
        session: Session,
        export: Export,
        *,
        at_ms: int,
        request: IdempotentRequest | None = None,
    ) -> Frozen | None:
        """Finalize and give the generators a job, or read what another finalize has frozen.

        None when the session is no longer as it was read.
        """
        keys = self._keys.session(session.session_id)
        queue, queued_as = [self._keys.jobs], session.session_id
        if self._keys.hash_tag:
            # The queue lies in another slot. It comes first: a job for a session that was not
            # finalized after all is dropped, a session without a job would wait for ever.
            queue, queued_as = [], ""
            await self._jobs.add(session.session_id, session.state.revision + 1)
        reply = await self._gateway.change(
            "finalize_session",
            keys,
            [keys.export, *queue],
            [session.changes, export.text, queued_as],
            at_ms=at_ms,
            request=request,
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "changed":
                return None
            case "finalized":
                return await self.get_frozen(session.session_id)
        return _frozen(reply, export.text)

    def _recognise(self, key: str, stored: bytes | None) -> Export:
        export = Export.read(stored or b"")
        if export is None:
            raise corrupt(key, "the export")
        return export


def _frozen(reply: Reply, export: bytes = b"") -> Frozen:
    # Only the answer that an Idempotency-Key kept brings its export along.
    completed, total, finalized_at, *kept = reply.values
    return Frozen(kept[0] if kept else export, int(completed), int(total), int(finalized_at))
