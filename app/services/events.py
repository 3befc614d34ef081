"""What happens in a session, read page by page or followed live.

Who follows keeps a place in the log and reads on from there whenever the store says that the log
has grown. Nothing is held for a slow reader, so nothing can overflow, and nothing is passed on by
memory, so nothing can be lost or come twice.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from app.clock import monotonic_s, now_ms, rfc3339
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

NEVER_S = float("inf")
"""The time of an alarm that is not set."""


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
        self._alarms = _Alarms()
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
        channel = self._keys.session(session_id).events
        follower = Follower(self, self._alarms, session_id, channel)
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
        if not self._followers:
            self._alarms.clear()

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
    """Somebody who follows a session: a place in its log, and whom to wake when it may have grown.

    Call `look` for what is new: when `listen` says so, and again while it `has_news`, until it
    `is_over`. There may be thousands, who mostly wait: none has a task or a timer to itself.
    """

    __slots__ = (
        *("session_id", "channel", "is_over", "has_news", "due_s", "alarm_s"),
        *("_service", "_alarms", "_place", "_first", "_wake", "_deleted", "_failed"),
    )

    def __init__(
        self, service: EventService, alarms: "_Alarms", session_id: str, channel: str
    ) -> None:
        self.session_id = session_id
        self.channel = channel
        self.is_over = False
        self.has_news = False
        # Kept by the alarms: when it is to be woken, and when they look at it next.
        self.due_s = self.alarm_s = NEVER_S
        self._service = service
        self._alarms = alarms
        self._place = BEFORE_ALL
        self._first: Sequence[Message] = ()
        self._wake: Callable[[], None] | None = None
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
        messages = [*self._first]
        self._first, self._failed, self.has_news = (), False, False
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

    def listen(self, wake: Callable[[], None], limit_s: float) -> None:
        """Have `wake` called when there may be something new, and after `limit_s` at the latest.

        Look then, in both cases: the store may have said that there is, and nobody heard it.
        """
        if self._failed:
            limit_s = min(limit_s, TRY_AGAIN_S)
        self._wake = wake
        self._alarms.set(self, monotonic_s() + limit_s)

    def hear(self, said: bytes) -> None:
        """Take what the store says about the log."""
        if said.startswith(b"deleted "):
            self._deleted = said
        self.wake()

    def wake(self) -> None:
        """Say that there may be something new."""
        self.has_news = True
        self.ring()

    def ring(self) -> None:
        """Call whoever listens."""
        if self._wake is not None:
            self._wake()

    def leave(self) -> None:
        """Say that nobody listens any more."""
        self.is_over = True

    def close(self) -> None:
        """Follow no more."""
        self.is_over = True
        self._wake = None
        self._service.release(self)

    async def _read_on(self) -> list[Message]:
        events, extent = await self._service.read_after(self.session_id, self._place)
        if is_gap(self._place, extent):
            return [self._show(await self._service.read_scene(self.session_id), gap=True)]
        if events:
            self._place = parse_event_id(events[-1]["id"]) or self._place
        if len(events) == EVENTS_AT_ONCE:
            self.has_news = True
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


class _Alarms:
    """Wakes followers when their time has come, by one timer for all.

    A timer each would be more than the rest of what a follower takes. There is one entry for each
    at most that still counts; one whose time was put off is looked at, and put off too.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Follower]] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None

    def set(self, follower: Follower, at_s: float) -> None:
        """Wake a follower then, and not when it was said before."""
        follower.due_s = at_s
        if at_s < follower.alarm_s:
            follower.alarm_s = at_s
            heappush(self._entries, (at_s, next(self._numbers), follower))
            if self._entries[0][2] is follower:
                self._wind()

    def clear(self) -> None:
        """Wake nobody."""
        self._entries.clear()
        self._wind()

    def _wind(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._entries:
            wait_s = max(0.0, self._entries[0][0] - monotonic_s())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        now_s = monotonic_s()
        while self._entries and self._entries[0][0] <= now_s:
            at_s, _, follower = heappop(self._entries)
            if follower.is_over or follower.alarm_s != at_s:
                continue
            follower.alarm_s = NEVER_S
            if follower.due_s > now_s:
                self.set(follower, follower.due_s)
            else:
                follower.ring()
        self._wind()


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
