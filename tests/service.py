"""The service as a test needs it: a real server on loopback, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from httpx2 import AsyncClient
from starlette.types import ASGIApp

from app.main import create_app
from app.server import listen, make_config
from app.settings import Settings

BASE = "/api/v1/onboarding"


class Server(uvicorn.Server):
    """uvicorn, but that it is told to end instead of looking whether it should."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    def end(self) -> None:
        """End in order."""
        self.should_exit = True
        self._told.set()

    async def main_loop(self) -> None:
        # Each look tells what time it is, in the header of every answer.
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), 1.0)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[AsyncClient]:
    """Serve with these settings for the length of a block; gives a client for it."""
    async with serving_app(create_app(settings)) as client:
        yield client


@asynccontextmanager
async def serving_app(app: ASGIApp, **options: Any) -> AsyncIterator[AsyncClient]:
    """Serve an application for the length of a block; gives a client for it."""
    server = Server(make_config(app, **options))
    with listen("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
        # Not serve(): it would take the signals of the test run.
        task = asyncio.create_task(server._serve(sockets=[listener]))
        try:
            while not server.started:
                if task.done():
                    await task
                    raise RuntimeError("the server stopped before it started")
                await asyncio.sleep(0.001)
            async with AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client:
                yield client
        finally:
            server.end()
            await task
