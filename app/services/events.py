"""What happens in a session, read page by page or followed live.

Who follows keeps a place in the log and reads on from there whenever the store says that the log
has grown. Nothing is held for a slow reader, so nothing can overflow, and nothing is passed on by
memory, so nothing can be lost or come twice.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from app.clock import now_ms, rfc3339
from app.errors import (
    CorruptRecordError,
    InvalidRequestError,
    SessionNotFoundError,
    StoreError,
    TooManyStreamsError,
)
from app.onboarding.cursors import check_limit
from app.onboarding.events import (
    BEFORE_ALL,
    EVENT_TYPES,
    MAX_EVENTS,
    EventId,
    EventList,
    EventView,
    Extent,
    Snapshot,
    describe_event,
    is_gap,
    parse_after,
    parse_event_id,
)
from app.onboarding.generation import view_status
from app.onboarding.sessions import check_session_id
from app.store.events import EventStore, Scene
from app.store.gateway import Gateway
from app.store.subscription import Subscription

EVENTS_AT_ONCE = 100
"""Most events that are read for one follower at once: 1 MB at worst, 20 KB as a rule."""

READERS = 8
"""Most followers that read their logs at once; the others wait their turn, a moment each. So a
thousand of them leave connections to the requests, whatever the store does."""

LOOK_S = 1.0
"""How long a look at the log may take before a follower goes on without it, in seconds."""

TRY_AGAIN_S = 1.0
"""Longest wait before the log is read again when the store could not be asked, in seconds."""


class StreamLimits(NamedTuple):
    """How many may follow at once: in this process, and of these one session."""

    per_process: int
    per_session: int


class Message(NamedTuple):
    """What a follower is told; one without an `event_id` moves nobody's place in the log."""

    kind: str
    event_id: str | None
    data: Snapshot | EventView | dict[str, Any]


class EventService:
    """Reads the logs of sessions.

    Raises `SessionNotFoundError`, and a `StoreError` where the store cannot do its part.
    """

    def __init__(self, gateway: Gateway, subscription: Subscription, limits: StreamLimits) -> None:
        self._events = EventStore(gateway)
        self._keys = gateway.keys
        self._subscription = subscription
        self._limits = limits
        self._reading = asyncio.Semaphore(READERS)
        self._followers: set[Follower] = set()
        self._per_session: Counter[str] = Counter()
        self.stopping = False

    async def list_events(
        self,
        session_id: str,
        *,
        after: str | None = None,
        limit: int = MAX_EVENTS,
        only: str | None = None,
    ) -> EventList:
        """Read up to `limit` events after an id, of the type `only` if given, oldest first.

        Raises `InvalidRequestError`.
        """
        check_session_id(session_id)
        place = parse_after(after)
        if only is not None and only not in EVENT_TYPES:
            raise InvalidRequestError(f"type is one of {', '.join(EVENT_TYPES)}")
        check_limit(limit, MAX_EVENTS)
        most = limit + 1 if only is None else None
        events, extent = await self._events.list_after(session_id, place, most)
        wanted = [event for event in events if only in (None, event["type"])]
        page = wanted[:limit]
        return EventList(
            session_id=session_id,
            events=page,
            next=page[-1]["id"] if len(wanted) > limit else None,
            gap=after is not None and is_gap(place, extent),
        )

    async def follow(self, session_id: str, last_event_id: str | None = None) -> "Follower":
        """Begin to follow a session, after the event that was seen last if one was.

        What is returned has its first messages ready and must be closed. Raises
        `TooManyStreamsError`.
        """
        if len(self._followers) >= self._limits.per_process:
            raise TooManyStreamsError("the service")
        if self._per_session[session_id] >= self._limits.per_session:
            raise TooManyStreamsError("a session")
        follower = Follower(self, session_id, self._keys.session(session_id).events)
        self._followers.add(follower)
        self._per_session[session_id] += 1
        try:
            # Before the first look: what happens between the two is heard of.
            await self._subscription.add(follower.channel, follower.hear)
            await follower.begin(last_event_id)
        except BaseException:
            self.release(follower)
            raise
        return follower

    def release(self, follower: "Follower") -> None:
        """Let a follower go."""
        if follower not in self._followers:
            return
        self._followers.discard(follower)
        self._per_session[follower.session_id] -= 1
        if not self._per_session[follower.session_id]:
            del self._per_session[follower.session_id]
        self._subscription.remove(follower.channel, follower.hear)

    @property
    def followers(self) -> int:
        """How many follow."""
        return len(self._followers)

    @property
    def can_hear(self) -> bool:
        """Whether the store can tell that a log has grown."""
        return self._subscription.is_connected

    def stop_soon(self) -> None:
        """Tell every follower that it is over."""
        self.stopping = True
        for follower in self._followers:
            follower.wake()

    async def read_scene(self, session_id: str) -> Scene:
        """Read how a session is."""
        return await self._events.get_scene(session_id)

    async def read_after(self, session_id: str, after: EventId) -> tuple[list[EventView], Extent]:
        """Read the next events after an id, for a follower."""
        async with self._reading:
            return await self._events.list_after(session_id, after, EVENTS_AT_ONCE)


class Follower:
    """Somebody who follows a session: a place in its log, and what wakes them.

    Call `look` for what is new and `wait` until there may be more, until it `is_over`.
    """

    __slots__ = (
        *("session_id", "channel", "is_over", "_service", "_place", "_first"),
        *("_woken", "_deleted", "_failed"),
    )

    def __init__(self, service: EventService, session_id: str, channel: str) -> None:
        self.session_id = session_id
        self.channel = channel
        self.is_over = False
        self._service = service
        self._place = BEFORE_ALL
        self._first: list[Message] = []
        self._woken = asyncio.Event()
        self._deleted = b""
        self._failed = False

    async def begin(self, last_event_id: str | None) -> None:
        """Take the place after an event, or the newest one, and prepare the first snapshot."""
        scene = await self._service.read_scene(self.session_id)
        resumed = parse_event_id(last_event_id) if last_event_id else None
        if resumed is not None and not is_gap(resumed, scene.extent):
            self._place = resumed
            self._first = [_snapshot(self.session_id, scene, event_id=None, gap=False)]
        else:
            self._first = [self._show(scene, gap=bool(last_event_id))]

    async def look(self) -> list[Message]:
        """Return what is new, in order; nothing when nothing is."""
        self._woken.clear()
        messages, self._first, self._failed = self._first, [], False
        try:
            if self._service.stopping:
                messages.append(self._end("bye", None, {"type": "bye", "reason": "stopping"}))
            elif self._deleted:
                messages.append(self._end_with_session())
            elif self._service.can_hear:
                # Else there is nothing to ask: when the store is back, everybody hears of it.
                async with asyncio.timeout(LOOK_S):
                    messages += await self._read_on()
        except SessionNotFoundError:
            # It has expired, or nobody heard of its end.
            messages.append(self._end_with_session())
        except CorruptRecordError:
            # Whoever comes back is told what is wrong.
            self.is_over = True
        except (StoreError, TimeoutError):
            self._failed = True
        return messages

    async def wait(self, limit_s: float) -> bool:
        """Wait until there may be something new, `limit_s` seconds at most; say whether it is so.

        When it is not, look all the same: the store may have said so, and nobody heard it.
        """
        if self._failed:
            limit_s = min(limit_s, TRY_AGAIN_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await self._woken.wait()
        return False

    def hear(self, said: bytes) -> None:
        """Take what the store says about the log."""
        if said.startswith(b"deleted "):
            self._deleted = said
        self._woken.set()

    def wake(self) -> None:
        """End a wait."""
        self._woken.set()

    def leave(self) -> None:
        """Say that nobody listens any more."""
        self.is_over = True
        self._woken.set()

    def close(self) -> None:
        """Follow no more."""
        self.is_over = True
        self._service.release(self)

    async def _read_on(self) -> list[Message]:
        events, extent = await self._service.read_after(self.session_id, self._place)
        if is_gap(self._place, extent):
            return [self._show(await self._service.read_scene(self.session_id), gap=True)]
        if events:
            self._place = parse_event_id(events[-1]["id"]) or self._place
        if len(events) == EVENTS_AT_ONCE:
            self._woken.set()
        return [Message(event["type"], event["id"], event) for event in events]

    def _show(self, scene: Scene, *, gap: bool) -> Message:
        """Go on from how the session is now."""
        self._place = scene.extent.newest or BEFORE_ALL
        return _snapshot(self.session_id, scene, event_id=str(self._place), gap=gap)

    def _end_with_session(self) -> Message:
        _, event_id, at_ms = (self._deleted or b"deleted - %d" % now_ms()).decode().split()
        known = parse_event_id(event_id) or EventId(int(at_ms), 0)
        view = describe_event(known, {"type": "deleted", "at": at_ms})
        return self._end("deleted", str(known), view)

    def _end(self, kind: str, event_id: str | None, data: Any) -> Message:
        self.is_over = True
        return Message(kind, event_id, data)


def _snapshot(session_id: str, scene: Scene, *, event_id: str | None, gap: bool) -> Message:
    status = view_status(session_id, scene.generation, now_ms())
    state = scene.state
    snapshot = Snapshot(
        type="snapshot",
        **status,
        language=scene.language,
        finalized_at=None if state.finalized_ms is None else rfc3339(state.finalized_ms),
        revision=state.revision,
        steps=state.progress,
        gap=gap,
    )
    return Message("snapshot", event_id, snapshot)
