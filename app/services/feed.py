"""Callbacks: told of what happens to any session, whichever process it happens in."""

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from app.errors import InvalidRequestError, StoreError
from app.onboarding.events import FEED_TYPES, EventId, EventView
from app.store.client import end_task
from app.store.feed import FedEvent, FeedStore
from app.store.gateway import Gateway

log = structlog.get_logger()

LOOK_EVERY_S = 0.2
"""Pause between two looks at the feed while nothing happens, in seconds."""

TRY_AGAIN_S = 1.0
"""Pause before the feed is asked again when it could not be read, in seconds."""

Callback = Callable[[dict[str, Any]], Awaitable[object] | object]
"""Takes an event: its fields as in the session's log, and `session_id`."""


class FeedService:
    """Calls back for events that happen from the registration on, in their order.

    It reads the feed only while there is somebody to tell. A callback that fails is logged, and
    the others and the next event are told all the same; events that the feed has lost, being more
    than 10,000 behind, are not.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._feed = FeedStore(gateway)
        self._callbacks: defaultdict[str, list[Callback]] = defaultdict(list)
        self._begun: asyncio.Future[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    def register(self, event_type: str, callback: Callback) -> Awaitable[None]:
        """Have a callback, a function or a coroutine function, told of a type of event.

        What is returned may be awaited, to be sure that what happens next is told. Raises
        `InvalidRequestError` for a type that there is not.
        """
        if event_type not in FEED_TYPES:
            raise InvalidRequestError(f"event_type is one of {', '.join(FEED_TYPES)}")
        self._callbacks[event_type].append(callback)
        if self._begun is None or self._telling is None or self._telling.done():
            self._begun = asyncio.get_running_loop().create_future()
            self._telling = asyncio.create_task(self._tell(self._begun), name="feed")
        return asyncio.shield(self._begun)

    async def aclose(self) -> None:
        """Tell nobody any more."""
        if self._telling is not None:
            await end_task(self._telling)
            self._telling = None
        if self._begun is not None:
            # Nobody is left waiting for what does not begin any more.
            self._begun.cancel()

    async def _tell(self, begun: "asyncio.Future[None]") -> None:
        place: EventId | None = None
        while True:
            events: list[FedEvent] = []
            try:
                if place is None:
                    place = await self._feed.newest()
                    if not begun.done():
                        begun.set_result(None)
                events, place = await self._feed.list_after(place)
            except StoreError as failure:
                log.warning("feed_unreachable", code=failure.code)
                await asyncio.sleep(TRY_AGAIN_S)
            for session_id, event in events:
                for callback in list(self._callbacks[event["type"]]):
                    await _call(callback, session_id, event)
            if not events:
                await asyncio.sleep(LOOK_EVERY_S)


async def _call(callback: Callback, session_id: str, event: EventView) -> None:
    task = asyncio.current_task()
    try:
        # Each has an event of its own, to do with as it likes.
        outcome = callback({"session_id": session_id, **event})
        if inspect.isawaitable(outcome):
            await outcome
    except (Exception, asyncio.CancelledError) as failure:
        # Whoever listens must not stop what is listened to, not even by waiting for something that
        # was cancelled.
        if isinstance(failure, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        log.error(
            "callback_failed",
            session_id=session_id,
            type=event["type"],
            exception=type(failure).__name__,
        )
