"""Run what needs an event loop beside a test that has none: proxies and balancers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import NamedTuple, TypeVar

T = TypeVar("T")

LATEST_S = 30.0
"""How long it may take to begin or to end."""


class Aside(NamedTuple):
    """An event loop in a thread of its own."""

    loop: asyncio.AbstractEventLoop

    def do(self, act: Callable[[], T]) -> T:
        """Call something in the loop's thread, and wait for what it gives."""

        async def call() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(LATEST_S)


@contextmanager
def aside(manager: AbstractAsyncContextManager[T]) -> Iterator[tuple[T, Aside]]:
    """Enter an asynchronous `with` block beside this thread, for the length of this one.

    Gives what the block gives, and what calls its methods.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        entering = asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop)
        entered = entering.result(LATEST_S)
        try:
            yield entered, Aside(loop)
        finally:
            leaving = asyncio.run_coroutine_threadsafe(_leave(manager), loop)
            leaving.result(LATEST_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LATEST_S)
        loop.close()


async def _leave(manager: AbstractAsyncContextManager[T]) -> None:
    await manager.__aexit__(None, None, None)
