"""The service as a test needs it: a real server on loopback, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from httpx2 import AsyncClient

from app.main import create_app
from app.server import listen, make_config
from app.settings import Settings

BASE = "/api/v1/onboarding"


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[AsyncClient]:
    """Serve with these settings for the length of a block; gives a client for it."""
    server = uvicorn.Server(make_config(create_app(settings)))
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
            server.should_exit = True
            await task
