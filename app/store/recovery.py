"""Damaged sessions in the store: each part read by its own reader, and what is left mended."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson

from app.errors import CorruptRecordError, SessionNotFoundError
from app.onboarding.exports import Export
from app.onboarding.recovery import Found, Remains, plan_recovery
from app.onboarding.retention import DeleteReason
from app.onboarding.sessions import Owner
from app.store.assistant import read_asked
from app.store.catalogue import CatalogueStore
from app.store.events import read_event
from app.store.files import read_info
from app.store.gateway import Argument, Gateway
from app.store.keys import SessionKeys
from app.store.sessions import (
    SessionChangedError,
    SessionStore,
    read_owner,
    read_progress,
)
from app.store.steps import decode_draft, decode_step
from app.store.tokens import read_tokens

Parts = Mapping[str, tuple[bytes, Any]]
"""What stands under the keys of a session: its type and its value, by name without the id."""

_ANYBODY = Owner(None, None, "en")
"""Whose a session is makes no difference to whether its progress can be read."""


class RecoveryStore:
    """Recovers sessions."""

    def __init__(self, gateway: Gateway, catalogues: CatalogueStore) -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._catalogues = catalogues
        self._sessions = SessionStore(gateway)

    async def recover(self, session_id: str, *, at_ms: int) -> Remains:
        """Keep what can be read of a session, and remove the rest.

        When nothing can be read the session is removed. Raises `SessionNotFoundError`, and
        `SessionChangedError` when it changed meanwhile. Three round trips.
        """
        keys = self._keys.session(session_id)
        most = self._catalogues.current.total
        reply = await self._gateway.evaluate("read_remains", keys[:3], [most])
        if not reply.values:
            raise SessionNotFoundError
        parts = {name.decode(): (kind, value) for name, kind, value in reply.values}
        found = read_parts(keys, parts)
        catalogue = self._catalogues.current
        with suppress(CorruptRecordError):
            catalogue = await self._catalogues.get(found.progress.get("catalogue", catalogue.pin))
        found = found._replace(
            progress_is_whole=found.progress_is_whole
            and found.progress["catalogue"] == catalogue.pin
        )
        remains = plan_recovery(found, pin=catalogue.pin, total=catalogue.total, now_ms=at_ms)
        if remains is None:
            await self._sessions.delete(
                session_id, most, at_ms=at_ms, reason=DeleteReason.UNREADABLE
            )
            return Remains({}, {}, [], sorted(parts))
        await self._mend(keys, parts, remains, at_ms)
        await self._gateway.change(
            "record_recovery", keys, args=[len(remains.kept), len(remains.lost)], at_ms=at_ms
        )
        return remains

    async def _mend(self, keys: SessionKeys, parts: Parts, remains: Remains, at_ms: int) -> None:
        changes = _hash(*parts.get("progress", (b"", []))).get(b"changes", b"")
        strange = [entry[0] for entry in _events(parts) if not _can_be_read(read_event, "", *entry)]
        args: list[Argument] = [os.urandom(12).hex(), self._gateway.lifetime_ms, at_ms, changes]
        args += [len(remains.lost), *remains.lost, len(strange), *strange]
        args += [2 * len(remains.progress)]
        for name, value in [*remains.progress.items(), *remains.owner.items()]:
            args += [name, value]
        mended = await self._gateway.evaluate("mend_session", keys[:4], args)
        if mended.word == "changed":
            raise SessionChangedError


def read_parts(keys: SessionKeys, parts: Parts) -> Found:
    """Judge each part of a session by whether its own reader takes it."""
    kept: list[str] = []
    lost: list[str] = []
    versions: dict[int, int] = {}
    for name, (kind, value) in parts.items():
        what, _, number = name.partition(":")
        if what in {"metadata", "progress"}:
            continue
        if what == "step":
            try:
                versions[int(number)] = decode_step(int(number), name, _string(kind, value)).version
            except CorruptRecordError:
                lost.append(name)
            continue
        is_whole = _is_whole(what, kind, value)
        if what == "ops":
            # The memory of operations is of no interest by itself.
            lost += [] if is_whole else [name]
        else:
            (kept if is_whole else lost).append(name)
    progress, metadata = (_hash(*parts.get(name, (b"", []))) for name in ("progress", "metadata"))
    return Found(
        progress=_texts(progress),
        progress_is_whole=_can_be_read(read_progress, "", keys, _ANYBODY, progress),
        owner=_texts(metadata) | _readable_custom(metadata),
        owner_is_whole=_can_be_read(read_owner, keys, metadata),
        versions={number: version for number, version in versions.items() if version > 0},
        has_export="export" in kept,
        kept=kept,
        lost=lost + [f"step:{number}" for number, version in versions.items() if version == 0],
    )


def _is_whole(what: str, kind: bytes, value: Any) -> bool:
    match what:
        case "draft":
            return kind == b"string" and _can_be_read(decode_draft, 0, "", value, b"")
        case "export":
            return kind == b"string" and Export.read(value) is not None
        case "history":
            return kind == b"list" and all(_can_be_read(read_asked, "", text) for text in value)
        case "tokens":
            return kind == b"hash" and _can_be_read(read_tokens, "", _fields(value))
        case "result" | "upload":
            return kind == b"hash" and _can_be_read(read_info, "", value)
        case "events":
            return kind == b"stream"
        case _:
            return kind == b"hash"


def _can_be_read(read: Callable[..., object], *parts: Any) -> bool:
    try:
        read(*parts)
    except CorruptRecordError:
        return False
    return True


def _events(parts: Parts) -> Sequence[Sequence[Any]]:
    kind, entries = parts.get("events", (b"", []))
    return entries if kind == b"stream" else []


def _string(kind: bytes, value: Any) -> bytes | None:
    return value if kind == b"string" else None


def _hash(kind: bytes, value: Any) -> dict[bytes, bytes]:
    return _fields(value) if kind == b"hash" else {}


def _fields(value: Any) -> dict[bytes, bytes]:
    return dict(zip(value[::2], value[1::2], strict=True)) if isinstance(value, list) else {}


def _texts(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in fields.items():
        with suppress(ValueError):
            texts[name.decode()] = value.decode()
    return texts


def _readable_custom(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """What is attached to the session, unless that is no object any more."""
    with suppress(ValueError):
        if isinstance(orjson.loads(metadata.get(b"custom", b"")), dict):
            return {}
    return {"custom": ""}
