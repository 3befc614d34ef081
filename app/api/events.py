"""The log of a session over HTTP: read page by page, or followed live (server-sent events)."""

import asyncio
import random
from collections.abc import Sequence
from contextvars import copy_context

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.api.streaming import BEAT, EVENT_STREAM, EXTEND, REST, Outlet, write_event
from app.clock import monotonic_s
from app.errors import AccessError, NotTheirsError, OnboardingError
from app.onboarding.access import Access
from app.onboarding.cursors import parse_limit
from app.onboarding.events import EVENT_TYPES, MAX_EVENTS, EventList
from app.services.events import Follower, Message

BEAT_S = 12.0
"""Longest silence on a stream, in seconds; the contract allows 15."""

OLDEST_S = 3600.0
"""Age at which a stream is ended so that its client comes back, perhaps to another process, in
seconds. Up to a tenth is taken off at random: clients that came together leave one by one."""

RETRY_MS = (1000, 4000)
"""When a client is told to come back, in milliseconds: a random time between, for the same reason.
"""


async def list_events(call: Call) -> ASGIApp:
    """Read a part of the log."""
    query = call.query
    limit = parse_limit(query.get("limit", str(MAX_EVENTS)), MAX_EVENTS)
    return call.answer(
        await call.services.events.list_events(
            call.session_id,
            after=query.get("after"),
            limit=limit,
            only=query.get("type"),
        )
    )


class EventStream:
    """A stream of server-sent events, as long as its follower follows and its client listens.

    Nothing but that wait for the client to leave is left of it while nothing happens. What happens
    is sent in turns: each looks at the log, writes, and is a task of its own but for the first.
    """

    __slots__ = (
        *("_follower", "_access", "_principal", "_headers", "_context", "_outlet"),
        *("_turn", "_is_in_turn", "_until_s", "_beat_s", "_look_again_s"),
    )

    def __init__(self, follower: Follower, call: Call) -> None:
        self._follower = follower
        self._access = call.services.access
        self._principal = call.principal
        self._headers = call.scope["headers"]
        self._turn: asyncio.Task[None] | None = None
        self._is_in_turn = True
        now_s = monotonic_s()
        self._until_s = now_s + OLDEST_S * random.uniform(0.9, 1.0)  # noqa: S311
        self._look_again_s = now_s + BEAT_S
        self._beat_s = _next_beat_s()

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Send the head, and leave the rest for later."""
        outlet = Outlet(scope, send)
        try:
            await outlet.begin(200, EVENT_STREAM)
            if scope["method"] == "HEAD":
                await outlet.write(b"", more=False)
                self._follower.close()
                return
        except BaseException:
            self._follower.close()
            raise
        scope[REST] = self._go_on

    async def _go_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is, wait for more, until either side ends it."""
        self._outlet = Outlet(scope, send)
        # There is no time limit any more, and all that it holds goes with it.
        scope.pop(EXTEND, None)
        try:
            await self._outlet.write(_retry())
            await self._take_turn()
            # Whatever wakes it, a turn is a part of this request.
            self._context = copy_context()
            while (await receive())["type"] != "http.disconnect":
                pass
            self._follower.leave()
            if self._turn is not None:
                # It sees that nobody listens, or has failed.
                await self._turn
        finally:
            if self._turn is not None:
                self._turn.cancel()
            self._follower.close()

    def _wake(self) -> None:
        """Begin a turn, unless one goes on: that sees what is new before it ends."""
        if not self._is_in_turn:
            self._is_in_turn = True
            self._turn = asyncio.create_task(self._take_turn(), context=self._context)

    async def _take_turn(self) -> None:
        """Send what is new, a sign of life when that is due, and the end when it is over."""
        try:
            await self._send_news()
            while self._follower.has_news and not self._follower.is_over:
                await self._send_news()
            if self._follower.is_over:
                await self._outlet.write(b"", more=False)
                return
        except BaseException:
            # By this whoever waits for the client to leave hears of it.
            self._outlet.abort()
            raise
        self._follower.listen(self._wake, min(self._beat_s, self._until_s) - monotonic_s())
        self._turn, self._is_in_turn = None, False

    async def _send_news(self) -> None:
        follower, outlet = self._follower, self._outlet
        if monotonic_s() >= self._look_again_s:
            self._look_again_s += BEAT_S
            if not await self._may_go_on():
                follower.leave()
                return
        messages = await follower.look()
        if messages:
            await outlet.write(_write(messages))
            self._beat_s = _next_beat_s()
        elif monotonic_s() >= self._beat_s:
            await outlet.write(BEAT)
            self._beat_s = _next_beat_s()
        if monotonic_s() >= self._until_s and not follower.is_over:
            await outlet.write(_retry())
            follower.leave()

    async def _may_go_on(self) -> bool:
        """Say whether whoever follows may still: what they showed may be good no more."""
        try:
            principal = await self._access.identify(self._headers)
            await self._access.check_session(principal, self._follower.session_id)
        except (AccessError, NotTheirsError):
            return False
        except OnboardingError:
            # A store that is away is no reason to send anybody away; a session that is gone ends
            # the stream by itself.
            return True
        return principal == self._principal


async def stream_events(call: Call) -> EventStream:
    """Follow the log live."""
    last = call.headers.get("last-event-id")
    return EventStream(await call.services.events.follow(call.session_id, last), call)


def _write(messages: Sequence[Message]) -> bytes:
    return b"".join(
        write_event(each.kind, orjson.dumps(each.data), each.event_id) for each in messages
    )


def _next_beat_s() -> float:
    # At random, or all who came back together would beat together.
    return monotonic_s() + BEAT_S * random.uniform(0.7, 1.0)  # noqa: S311


def _retry() -> bytes:
    return b"retry: %d\n\n" % random.randint(*RETRY_MS)  # noqa: S311 - nothing is kept secret by it


_EVENTS = "/api/v1/onboarding/{id}/events"

OPERATIONS = [
    Operation(
        methods=["GET"],
        path=_EVENTS,
        handler=list_events,
        name="list_events",
        access=Access.FOLLOW,
        summary="Read what happened, oldest first",
        tag="Events",
        query=[
            (
                "after",
                {"type": "string", "pattern": "^[0-9]{1,19}(-[0-9]{1,19})?$"},
                "Only events after this id",
            ),
            ("limit", {"type": "integer", "minimum": 1, "maximum": MAX_EVENTS}, "Most events"),
            ("type", {"type": "string", "enum": [*EVENT_TYPES]}, "Only events of this type"),
        ],
        answers=[Answer(description="A part of the log", schema=EventList)],
        errors=["invalid_request", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_EVENTS + "/stream",
        handler=stream_events,
        name="stream_events",
        access=Access.FOLLOW,
        at_once="own",
        summary="Follow what happens live, beginning with how the session is now",
        tag="Events",
        headers=["Last-Event-ID"],
        answers=[
            Answer(
                description="Server-sent events, a `snapshot` first, until the session is deleted "
                "or the service says `bye`",
                schema={"type": "string"},
                media_type="text/event-stream",
            )
        ],
        errors=["too_many_streams", "corrupt_record"],
    ),
]
