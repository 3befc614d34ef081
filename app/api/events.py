"""The log of a session over HTTP: read page by page, or followed live (server-sent events)."""

import asyncio
import random
from collections.abc import Sequence

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.api.streaming import BEAT, EVENT_STREAM, Outlet, write_event
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
    """A stream of server-sent events, as long as its follower follows and its client listens."""

    def __init__(self, follower: Follower, call: Call) -> None:
        self._follower = follower
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is, wait for more, until either side ends it."""
        outlet = Outlet(scope, send)
        leaving = asyncio.create_task(self._leave(receive))
        try:
            await outlet.begin(200, EVENT_STREAM)
            if scope["method"] != "HEAD":
                await self._stream(outlet)
            await outlet.write(b"", more=False)
        finally:
            leaving.cancel()
            self._follower.close()

    async def _stream(self, outlet: Outlet) -> None:
        follower = self._follower
        until_s = monotonic_s() + OLDEST_S * random.uniform(0.9, 1.0)  # noqa: S311
        look_again_s = monotonic_s() + BEAT_S
        await outlet.write(_retry())
        was_woken = True
        while True:
            if monotonic_s() >= look_again_s:
                look_again_s += BEAT_S
                if not await self._may_go_on():
                    return
            messages = await follower.look()
            if messages:
                await outlet.write(_write(messages))
            elif not was_woken:
                await outlet.write(BEAT)
            left_s = until_s - monotonic_s()
            if left_s <= 0:
                await outlet.write(_retry())
                return
            if not follower.is_over:
                # At random, or all who came back together would beat together.
                beat_s = BEAT_S * random.uniform(0.7, 1.0)  # noqa: S311
                was_woken = await follower.wait(min(beat_s, left_s))
            if follower.is_over:
                return

    async def _may_go_on(self) -> bool:
        """Say whether whoever follows may still: what they showed may be good no more."""
        access, session_id = self._call.services.access, self._call.session_id
        try:
            principal = await access.identify(self._call.scope["headers"])
            await access.check_session(principal, session_id)
        except (AccessError, NotTheirsError):
            return False
        except OnboardingError:
            # A store that is away is no reason to send anybody away; a session that is gone ends
            # the stream by itself.
            return True
        return principal == self._call.principal

    async def _leave(self, receive: Receive) -> None:
        """Wait until the client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._follower.leave()


async def stream_events(call: Call) -> EventStream:
    """Follow the log live."""
    last = call.headers.get("last-event-id")
    return EventStream(await call.services.events.follow(call.session_id, last), call)


def _write(messages: Sequence[Message]) -> bytes:
    return b"".join(
        write_event(each.kind, orjson.dumps(each.data), each.event_id) for each in messages
    )


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
