"""Sessions in the store: made, read, changed and removed as one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import orjson

from app.clock import LAST_MS
from app.errors import (
    BodyLostError,
    CorruptRecordError,
    GenerationRunningError,
    IdempotencyInProgressError,
    InvalidStepIdError,
    InvalidTransitionError,
    NotFinalizedError,
    OnboardingError,
    SessionCapacityError,
    SessionNotFoundError,
)
from app.onboarding.catalogue import Catalogue
from app.onboarding.files import FileInfo, FileKind
from app.onboarding.generation import MAY_FOLLOW
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.progress import Progress, count_saved, describe_progress
from app.onboarding.retention import NO_LIMIT, Capacity, DeleteReason, Since, Terms
from app.onboarding.sessions import Owner, Session, SessionChanges, SessionStatus, State
from app.store.faults import corrupt
from app.store.files import body_keys, write_info
from app.store.gateway import Argument, Gateway, Reply, unwrap_replay
from app.store.index import SessionIndex
from app.store.keys import SessionKeys

IDEMPOTENCY_MS = 86_400_000
"""How long the answer to an Idempotency-Key is kept: 24 hours."""


class NewSession(NamedTuple):
    """What a session is made of, and for how many there is room.

    `at_ms` is the caller's time in Unix milliseconds, `upload` the file that it begins with, whose
    parts are kept already. `token_digest` is that of its first session token, `seed` what the
    caller will need to make that token again.
    """

    session_id: str
    owner: Owner
    catalogue: Catalogue
    at_ms: int
    upload: FileInfo | None = None
    capacity: Capacity = NO_LIMIT
    token_digest: str | None = None
    seed: str | None = None


class Created(NamedTuple):
    """A session that was made, or found made before by the same Idempotency-Key.

    `evicted` names the sessions that were removed to make room for it.
    """

    session_id: str
    state: State
    evicted: list[str]


class Updated(NamedTuple):
    """A session that was changed, as the store showed it then."""

    session_id: str
    keys: SessionKeys
    shown: Sequence[Any]

    @property
    def has_other_status(self) -> bool:
        """Whether its status is another one now."""
        return bool(self.shown[2])

    def read(self) -> Session:
        """Read it. Raises `CorruptRecordError` where something else of it is damaged."""
        return _session(self.session_id, self.keys, *(_pairs(part) for part in self.shown[:2]))


class SessionChangedError(Exception):
    """The session is not as it was when the change was prepared."""


class SessionStore:
    """Keeps sessions. An unknown one raises `SessionNotFoundError` wherever a session is named."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._keys = gateway.keys
        self._index = SessionIndex(gateway)

    async def create(
        self, new: NewSession, *, request: IdempotentRequest | None = None
    ) -> Created | None:
        """Make a session; None when there is one with this id.

        One with an upload is made without an Idempotency-Key. Raises `BodyLostError` when a part of
        the upload is gone, and `SessionCapacityError` when there is no room.

        One round trip. Where keys have hash tags the index, the session, and what an
        Idempotency-Key keeps lie in different slots, and room is reserved first.
        """
        if not self._keys.hash_tag:
            record = None if request is None else self._keys.creation(request.scope)
            return await self._make(new, record, request)
        if request is None:
            return await self._make_with_room(new)
        return await self._make_once(new, request)

    async def _make_once(self, new: NewSession, request: IdempotentRequest) -> Created | None:
        """Make a session of which an Idempotency-Key keeps the answer in another slot."""
        record = self._keys.creation(request.scope)
        created = await self._claim(record, new.session_id, request)
        if request.replayed:
            return created
        try:
            created = await self._make_with_room(new, record)
        except SessionCapacityError:
            # There may be room when it is asked for again.
            await self._gateway.write("DEL", record)
            raise
        if created is not None:
            await self._keep_answer(record, request, created)
        return created

    async def _claim(
        self, record: str, session_id: str, request: IdempotentRequest
    ) -> Created | None:
        """Claim an Idempotency-Key for a session that is about to be made.

        Gives the session that another request has made under it, if one has. That request may have
        ended before it could keep its answer: then its session is there all the same.
        """
        # A request that never comes back must not hold the key for long, one that runs must.
        claim_ms = 2 * self._gateway.deadline_ms
        kept_ms = min(IDEMPOTENCY_MS, self._gateway.lifetime_ms)
        abandoned = ""
        while True:
            reply = await self._gateway.evaluate(
                "claim_key",
                [record],
                [request.fingerprint, session_id, claim_ms, kept_ms, abandoned],
            )
            if reply.word != "claimed":
                reply = unwrap_replay(reply, request)
                return _created(reply) if request.replayed else None
            claimed, is_over = (value.decode() for value in reply.values)
            with suppress(SessionNotFoundError):
                session, _ = await self.get_with(claimed, [], is_promise=True)
                request.replayed = True
                state = session.state
                made = _new_state(state.created_ms, state.deadline_ms, len(state.saved))
                created = Created(claimed, made, [])
                await self._keep_answer(record, request, created)
                return created
            if not is_over:
                raise IdempotencyInProgressError
            abandoned = claimed

    async def _keep_answer(self, record: str, request: IdempotentRequest, created: Created) -> None:
        state = created.state
        answer = ["ok", created.session_id, state.created_ms, state.deadline_ms, len(state.saved)]
        kept_ms = min(IDEMPOTENCY_MS, self._gateway.lifetime_ms)
        text = request.fingerprint.encode() + orjson.dumps([str(part) for part in answer])
        await self._gateway.write("SET", record, text, "PX", kept_ms)

    async def _make_with_room(self, new: NewSession, record: str | None = None) -> Created | None:
        """Make a session for which room is reserved in an index that lies in another slot."""
        has_room, evicted = await self._index.reserve(
            new.session_id, new.capacity, pin=new.catalogue.pin, at_ms=new.at_ms
        )
        evicted = list(dict.fromkeys(evicted))
        for victim in evicted:
            await self.evict(victim, at_ms=new.at_ms)
        if not has_room:
            raise SessionCapacityError
        try:
            created = await self._make(new, record)
        except BodyLostError:
            await self._index.release(new.session_id)
            raise
        if created is not None and new.capacity.policy == "evict_oldest":
            # Only what is known to be made can be removed for another one.
            await self._index.follow(new.session_id)
        return None if created is None else created._replace(evicted=evicted)

    async def _make(
        self, new: NewSession, record: str | None, request: IdempotentRequest | None = None
    ) -> Created | None:
        """Make a session, and room for it where the index lies beside it.

        `record` is the key of what an Idempotency-Key keeps; the script writes it when there is a
        `request`, and notes it otherwise.
        """
        keys = self._keys.session(new.session_id)
        fields: dict[str, str | bytes] = {
            "language": new.owner.language,
            "custom": new.owner.custom,
        }
        further = {
            "workspace_id": new.owner.workspace_id,
            "user_id": new.owner.user_id,
            "record": record if request is None else None,
        }
        fields |= {name: value for name, value in further.items() if value is not None}
        about = [] if new.upload is None else write_info(new.upload)
        args: list[Argument] = [new.session_id, new.catalogue.pin, new.catalogue.total]
        args += [*new.capacity, new.token_digest or "", new.seed or ""]
        args += [len(about), *about, *_flat(fields)]
        evicted: list[str] = []
        while True:
            reply = await self._gateway.change(
                "create_session",
                keys,
                [] if new.upload is None else body_keys(keys, FileKind.UPLOAD, new.upload),
                args,
                at_ms=new.at_ms,
                request=request,
                record=record,
            )
            if reply.word != "capacity_reached" or not reply.values:
                break
            # One call removes a hundred at most, so that it does not hold others up.
            evicted += [each.decode() for each in reply.values]
        match reply.word:
            case "exists":
                return None
            case "part_lost":
                raise BodyLostError
            case "capacity_reached":
                raise SessionCapacityError
        created = _created(reply)
        return created._replace(evicted=[*evicted, *created.evicted])

    async def get(self, session_id: str) -> Session:
        """Read a session without its answers. One round trip."""
        session, _ = await self.get_with(session_id, [])
        return session

    async def get_with_drafts(self, session_id: str, steps: int) -> tuple[Session, frozenset[int]]:
        """Read a session, and which of its steps, up to `steps`, have a draft, at one instant."""
        keys = self._keys.session(session_id)
        reply = await self._gateway.evaluate("read_session", keys[:2], [steps])
        session, numbers = _read(session_id, keys, reply)
        return session, frozenset(numbers)

    async def get_with(
        self, session_id: str, strings: Sequence[str], *, is_promise: bool = False
    ) -> tuple[Session, list[bytes | None]]:
        """Read a session and some of its string keys at one instant, in one round trip.

        `is_promise` as `Gateway.evaluate` has it.
        """
        keys = self._keys.session(session_id)
        reply = await self._gateway.evaluate(
            "read_session", [*keys[:2], *strings], [0], is_promise=is_promise
        )
        return _read(session_id, keys, reply)

    async def get_state(self, session_id: str) -> State:
        """Read what a session's progress tells. One command, two when it is not there."""
        key = self._keys.of(session_id, "progress")
        values = await self._gateway.command("HMGET", key, *STATE_FIELDS)
        if not any(values):
            # No session, or a damaged one: only a look at all of it at once can tell.
            return (await self.get(session_id)).state
        return read_state(key, values)

    async def get_pin(self, session_id: str) -> str:
        """Read which catalogue a session began with. One round trip."""
        return (await self.get(session_id)).pin

    async def update(
        self,
        session_id: str,
        changes: SessionChanges,
        *,
        at_ms: int,
        expected: int | None = None,
        request: IdempotentRequest | None = None,
    ) -> Updated:
        """Change several things at once, all or none.

        `expected` is the count of changes that the session must have: `SessionChangedError` when
        it has not. Raises `InvalidTransitionError`.
        """
        present = {name: value for name, value in changes.owner.items() if value is not None}
        absent = [name for name, value in changes.owner.items() if value is None]
        status, after = "", ""
        if changes.status is not None:
            may_follow = MAY_FOLLOW.get(changes.status, ())
            status, after = changes.status.value, f"|{'|'.join(may_follow)}|"
        keys = self._keys.session(session_id)
        reply = await self._gateway.change(
            "update_session",
            keys,
            args=[
                *("" if expected is None else expected, status, after, changes.error_message),
                *(2 * len(present), *_flat(present), *absent),
            ],
            at_ms=at_ms,
            request=request,
        )
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "changed":
                raise SessionChangedError
            case "invalid_transition":
                raise InvalidTransitionError(reply.values[0].decode(), status)
        return Updated(session_id, keys, reply.values)

    async def raise_progress(self, session_id: str, step_id: int, *, at_ms: int) -> Progress:
        """Raise the high-water mark. Raises `InvalidStepIdError` beyond the session's steps."""
        reply = await self._gateway.change(
            "raise_progress", self._keys.session(session_id), args=[step_id], at_ms=at_ms
        )
        if reply.word == "not_found":
            raise SessionNotFoundError
        if reply.word == "out_of_range":
            raise InvalidStepIdError(f"The mark is 0 to {int(reply.values[0])}")
        return progress_of(reply)

    async def reopen(
        self, session_id: str, *, at_ms: int, request: IdempotentRequest | None = None
    ) -> tuple[Owner, State]:
        """Unlock the steps. Raises `NotFinalizedError`, `GenerationRunningError`."""
        keys = self._keys.session(session_id)
        reply = await self._gateway.change("reopen_session", keys, at_ms=at_ms, request=request)
        match reply.word:
            case "not_found":
                raise SessionNotFoundError
            case "not_finalized":
                raise NotFinalizedError
            case "generation_running":
                raise GenerationRunningError
        session = _session(session_id, keys, *(_pairs(part) for part in reply.values))
        return session.owner, session.state

    async def delete(
        self,
        session_id: str,
        steps: int,
        *,
        at_ms: int,
        reason: DeleteReason = DeleteReason.REQUEST,
        terms: Terms | None = None,
    ) -> bool:
        """Remove every key of a session, of at least `steps` steps; say whether it was done.

        It is left alone when it does not, or no longer, meet the `terms`.
        """
        keys = self._keys.session(session_id)
        record = None
        if self._keys.hash_tag:
            # What an Idempotency-Key keeps of the making lies in another slot. Asked for first: a
            # repeat of the delete would find nothing that still tells.
            with suppress(CorruptRecordError):
                record = await self._gateway.command("HGET", keys.metadata, "record")
            if reason is not DeleteReason.CAPACITY:
                # What happened since the index followed last goes with the session. One that was
                # evicted is out of the index, where following would put it back.
                with suppress(OnboardingError):
                    await self._index.move(session_id)
        only = _arguments(Terms() if terms is None else terms)
        reply = await self._gateway.remove(
            "delete_session", keys[:4], [steps, at_ms, reason.event, reason, *only]
        )
        if reply.word == "spared":
            return False
        if self._keys.hash_tag:
            if record is not None:
                await self._gateway.write("DEL", record.decode(errors="replace"))
            await self._index.remove(session_id, reason, at_ms=at_ms)
        if reply.word == "not_found":
            raise SessionNotFoundError
        return True

    async def evict(self, session_id: str, *, at_ms: int) -> None:
        """Remove a session that has lost its room in the index already."""
        with suppress(SessionNotFoundError):
            await self.delete(session_id, 0, at_ms=at_ms, reason=DeleteReason.CAPACITY)
        await self._index.acquit(session_id)


def progress_of(reply: Reply) -> Progress:
    """Read the progress with which scripts answer: saved, highest, created_at, updated_at."""
    saved, highest, created_at, updated_at = reply.values[:4]
    return describe_progress(saved.decode(), int(highest), int(created_at), int(updated_at))


STATE_FIELDS = (
    *("status", "saved", "highest", "created_at", "updated_at"),
    *("deadline", "finalized_at", "revision", "run_revision"),
)
"""The fields of `progress` from which `read_state` reads."""

_STATE_NAMES = [name.encode() for name in STATE_FIELDS]
_STATUSES = {status.encode(): status for status in SessionStatus}


def read_state(key: str, values: Sequence[Any]) -> State:
    """Read the state of a session from the fields of `progress`, which is `key`: bytes, or None.

    Raises `CorruptRecordError`.
    """
    status, saved, highest, created, updated, deadline, finalized, revision, run_revision = values
    if not saved or saved.strip(b"01"):
        raise corrupt(key)
    try:
        created_ms, updated_ms, deadline_ms = int(created), int(updated), int(deadline)
        finalized_ms = int(finalized) if finalized else None
        _check_times((created_ms, updated_ms, deadline_ms, finalized_ms or 0))
        return State(
            _STATUSES[status],
            saved.decode(),
            int(highest),
            created_ms,
            updated_ms,
            deadline_ms,
            finalized_ms,
            int(revision),
            int(run_revision or 0),
        )
    except _UNREADABLE:
        raise corrupt(key) from None


def _read(session_id: str, keys: SessionKeys, reply: Reply) -> tuple[Session, list[Any]]:
    """Read what `read_session` answers with: the session, and what else was found."""
    if reply.word == "not_found":
        raise SessionNotFoundError
    metadata, lines, count, found = reply.values
    progress = _fields(keys.progress, lines, count)
    return _session(session_id, keys, _pairs(metadata), progress), found


def _session(
    session_id: str,
    keys: SessionKeys,
    metadata: Mapping[bytes, bytes],
    progress: Mapping[bytes, bytes],
) -> Session:
    return read_progress(session_id, keys, read_owner(keys, metadata), progress)


def read_progress(
    session_id: str, keys: SessionKeys, owner: Owner, progress: Mapping[bytes, bytes]
) -> Session:
    """Read all fields of `progress`. Raises `CorruptRecordError`."""
    state = read_state(keys.progress, [*map(progress.get, _STATE_NAMES)])
    try:
        versions, saved_ms = _read_steps(state.saved, progress)
        return Session(
            session_id=session_id,
            owner=owner,
            state=state,
            pin=progress[b"catalogue"].decode(),
            changes=int(progress[b"changes"]),
            versions=versions,
            saved_ms=saved_ms,
            is_export_lost=progress.get(b"export_lost") == b"1",
            request_count=int(progress.get(b"request_count", 0)),
            total_processing_ms=int(progress.get(b"total_processing_ms", 0)),
        )
    except _UNREADABLE:
        raise corrupt(keys.progress) from None


def _read_steps(saved: str, progress: Mapping[bytes, bytes]) -> tuple[list[str], list[int]]:
    """Read the versions of the saved steps, and when each was saved, see `Session`.

    In one piece: `int` of 46 numbers takes 3 us, this 2. Raises `LookupError` or `ValueError`.
    """
    count = saved.count("1")
    if not count:
        return [], []
    values = _pick_steps(saved)(progress)
    text = b",".join(values)
    if text.translate(None, b"0123456789,"):
        raise ValueError("no decimal numbers")
    # Refuses what is empty, or begins with a zero.
    numbers: list[int] = orjson.loads(b"[%b]" % text)
    if len(numbers) != len(values) or max(numbers) > LAST_MS:
        raise ValueError("more than a number, or one beyond the calendar")
    return text.decode().split(",", count)[:count], numbers[count:]


@lru_cache(maxsize=1024)
def _pick_steps(saved: str) -> Callable[[Mapping[bytes, bytes]], tuple[bytes, ...]]:
    """Give what takes of `progress` the versions of all saved steps, then when each was saved."""
    steps = count_saved(saved).steps
    return itemgetter(*(b"v%d" % step for step in steps), *(b"s%d" % step for step in steps))


def read_owner(keys: SessionKeys, metadata: Mapping[bytes, bytes]) -> Owner:
    """Read the fields of `metadata`. Raises `CorruptRecordError`."""
    try:
        owner = Owner(
            workspace_id=_text(metadata.get(b"workspace_id")),
            user_id=_text(metadata.get(b"user_id")),
            language=metadata[b"language"].decode(),
            custom=metadata[b"custom"],
        )
        custom = orjson.loads(owner.custom)
    except (KeyError, ValueError):
        raise corrupt(keys.metadata) from None
    if not isinstance(custom, dict) or not owner.language:
        raise corrupt(keys.metadata)
    return owner


def _created(reply: Reply) -> Created:
    session_id, at_ms, deadline_ms, steps = reply.values[:4]
    state = _new_state(int(at_ms), int(deadline_ms), int(steps))
    return Created(session_id.decode(), state, [each.decode() for each in reply.values[4:]])


def _new_state(created_ms: int, deadline_ms: int, steps: int) -> State:
    return State(
        status="pending",
        saved="0" * steps,
        highest=0,
        created_ms=created_ms,
        updated_ms=created_ms,
        deadline_ms=deadline_ms,
        finalized_ms=None,
        revision=0,
    )


def _arguments(terms: Terms) -> list[str | int]:
    """Write terms as `delete_session` takes them."""
    statuses = f"|{'|'.join(terms.statuses)}|" if terms.statuses else ""
    field = "" if terms.since is None else _MOMENTS[terms.since]
    spares_held = "1" if terms.spares_held else ""
    return [statuses, field, terms.before_ms, spares_held, terms.user_id or ""]


_MOMENTS = {
    Since.CREATED: "created_at",
    Since.ENDED: "ended_at",
    Since.ACTIVITY: "updated_at",
}
"""The fields of `progress` that tell from when an age is counted."""


def _flat(fields: Mapping[str, str | bytes]) -> list[str | bytes]:
    return [part for pair in fields.items() for part in pair]


def _pairs(flat: Sequence[bytes]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _fields(key: str, lines: bytes, count: int) -> dict[bytes, bytes]:
    """Take `progress` apart, `key`, as `read_session` answers with it.

    Raises `CorruptRecordError` for what is not one name or one value a line: none of ours has two.
    """
    parts = lines.split(b"\n")
    if len(parts) != count:
        raise corrupt(key)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _check_times(times_ms: Sequence[int]) -> None:
    """Raise `ValueError` where one of them, in Unix ms, is in no calendar."""
    if min(times_ms) < 0 or max(times_ms) > LAST_MS:
        raise ValueError("a time beyond the calendar")


_UNREADABLE = (LookupError, ValueError, TypeError)
"""What is raised for a field that holds something else than it should (no text, no number, no such
word), or is not there."""


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
