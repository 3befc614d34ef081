"""Large bodies in the store: kept in parts, shown whole or not at all.

The parts of a body on its way lie under names of their own. One script, when all are there, puts
the body in the place of the one before it: who reads sees the old one or the new one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from app.errors import BodyLostError, RunSupersededError, SessionNotFoundError
from app.onboarding.files import FileInfo, FileKind
from app.onboarding.idempotency import IdempotentRequest
from app.store.faults import corrupt
from app.store.gateway import Gateway
from app.store.keys import SessionKeys

ON_ITS_WAY_MS = 3_600_000
"""How long a body may be on its way: an hour. What is not finished then goes with the next write of
its session, or with the session."""


class Body(NamedTuple):
    """A stored body: what is known of it, and its first part."""

    info: FileInfo
    first: bytes


class FileStore:
    """Keeps large bodies. An unknown session raises `SessionNotFoundError`."""

    def __init__(self, gateway: Gateway, bulk: Gateway) -> None:
        """Take the way to the store, and another one for the parts.

        No other call has to wait behind half a megabyte.
        """
        self._gateway = gateway
        self._bulk = bulk
        self._keys = gateway.keys

    async def save_part(
        self, session_id: str, kind: FileKind, transfer: str, number: int, data: bytes
    ) -> None:
        """Keep one part of a body that is on its way to a session. Nothing shows it yet."""
        keys = self._keys.session(session_id)
        reply = await self._bulk.evaluate(
            "save_part",
            [keys.progress, keys.ops, keys.part(kind, transfer, number)],
            [data, ON_ITS_WAY_MS],
        )
        if reply.word == "not_found":
            raise SessionNotFoundError

    async def save_early_part(
        self, session_id: str, kind: FileKind, transfer: str, number: int, data: bytes
    ) -> None:
        """Keep one part of a body whose session will be made when all of it has come."""
        key = self._keys.session(session_id).part(kind, transfer, number)
        # NX: a sending that was given up may arrive when the part is kept for longer.
        await self._bulk.write("SET", key, data, "PX", ON_ITS_WAY_MS, "NX")

    async def drop_parts(self, session_id: str, kind: FileKind, transfer: str, parts: int) -> None:
        """Remove the parts of a body that will not be finished."""
        keys = self._keys.session(session_id)
        names = [keys.part(kind, transfer, number) for number in range(1, parts + 1)]
        if names:
            await self._bulk.command("DEL", *names)

    async def place(
        self,
        session_id: str,
        kind: FileKind,
        info: FileInfo,
        *,
        event: str,
        run: str,
        at_ms: int,
        request: IdempotentRequest | None = None,
    ) -> FileInfo:
        """Show a body whose parts are all kept, instead of the one before it.

        Returns what is known of it; with an Idempotency-Key that was used before, of the first.
        Raises `BodyLostError` when a part is gone, and `RunSupersededError` when another run than
        the one that made it has begun since.
        """
        keys = self._keys.session(session_id)
        about = write_info(info)
        told: list[str | int] = ["size", info.size, "checksum", info.checksum]
        told += ["content_type", info.content_type, "filename", info.filename]
        reply = await self._gateway.change(
            "store_body",
            keys,
            body_keys(keys, kind, info),
            [event, run, len(about), *about, *told],
            at_ms=at_ms,
            request=request,
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "part_lost":
                raise BodyLostError
            case "superseded":
                raise RunSupersededError
        return read_info(keys.body(kind), reply.values[0])

    async def get(self, session_id: str, kind: FileKind) -> Body | None:
        """Read what is known of a body, with its first part; None when there is none."""
        keys = self._keys.session(session_id)
        reply = await self._bulk.evaluate(
            "read_body", [keys.metadata, keys.progress, keys.body(kind)]
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "body_not_found":
                return None
        pairs, first = reply.values
        return Body(read_info(keys.body(kind), pairs), first)

    async def get_part(
        self, session_id: str, kind: FileKind, info: FileInfo, number: int
    ) -> bytes | None:
        """Read one part of a body; None when the body has been replaced or removed meanwhile.

        Raises `CorruptRecordError` when it has not, and the part is gone.
        """
        keys = self._keys.session(session_id)
        key = keys.part(kind, info.transfer, number)
        part: bytes | None = await self._bulk.command("GET", key)
        if part is None:
            current = await self._bulk.command("HGET", keys.body(kind), "transfer")
            if current == info.transfer.encode():
                raise corrupt(key, "the file")
        return part

    def check_size(
        self, session_id: str, kind: FileKind, info: FileInfo, parts: int, size: int
    ) -> None:
        """Raise `CorruptRecordError` when the first parts of a body, so many, cannot be so large.

        All of them have the size of the body, and fewer no more.
        """
        if size > info.size or (parts >= info.parts and size != info.size):
            raise corrupt(self._keys.session(session_id).body(kind), "the file")

    async def aclose(self) -> None:
        """Close the connections of this event loop that the parts take."""
        await self._bulk.aclose()


def write_info(info: FileInfo) -> list[str | int]:
    """Write what is known of a body as field and value."""
    fields: Mapping[str, str | int] = {
        "transfer": info.transfer,
        "parts": info.parts,
        "size": info.size,
        "content_type": info.content_type,
        "filename": info.filename,
        "checksum": info.checksum,
        "is_document": int(info.is_document),
        "stored_at": info.stored_ms,
    }
    return [part for pair in fields.items() for part in pair]


def body_keys(keys: SessionKeys, kind: FileKind, info: FileInfo) -> list[str]:
    """Name the key of a body and those of its parts, as the scripts take them."""
    parts = (keys.part(kind, info.transfer, number) for number in range(1, info.parts + 1))
    return [keys.body(kind), *parts]


def read_info(key: str, pairs: Sequence[bytes]) -> FileInfo:
    """Read what is known of a body, which is `key`. Raises `CorruptRecordError`."""
    try:
        fields = {
            name.decode(): value.decode()
            for name, value in zip(pairs[::2], pairs[1::2], strict=True)
        }
        return FileInfo(
            transfer=fields["transfer"],
            parts=int(fields["parts"]),
            size=int(fields["size"]),
            content_type=fields["content_type"],
            filename=fields["filename"],
            checksum=fields["checksum"],
            is_document=fields["is_document"] == "1",
            stored_ms=int(fields["stored_at"]),
        )
    except (KeyError, ValueError):
        raise corrupt(key, "the file") from None
