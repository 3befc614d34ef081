"""A real service whose way to the store leads through a proxy."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from httpx2 import AsyncClient, Limits, Response

from tests.faults.load import PATIENCE_S
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey
from tests.process.service_process import ServiceProcess
from tests.service import BASE


class Wired(NamedTuple):
    """A service whose way to the store leads through a proxy, and a session in it."""

    client: AsyncClient
    proxy: Proxy
    session_id: str

    async def save(self, data: object) -> Response:
        return await self.client.post(f"{BASE}/{self.session_id}/steps/1", json={"data": data})


@asynccontextmanager
async def wired(directory: Path, store: Valkey, **environment: str) -> AsyncIterator[Wired]:
    """Start a service that reaches the store through a proxy, and have it learn its scripts."""
    async with Proxy(store.port) as proxy:
        url = f"redis://{HOST}:{proxy.port}/0"
        with ServiceProcess(
            directory / "said", directory / "data", REDIS_URL=url, **environment
        ) as service:
            # The proxy is of this thread, and the service asks for the store before it answers.
            await asyncio.to_thread(service.wait_until_it_answers)
            limits = Limits(max_connections=None)
            async with AsyncClient(
                base_url=service.url, timeout=PATIENCE_S, limits=limits, trust_env=False
            ) as client:
                answer = await client.post(f"{BASE}/session", json={"workspace_id": "w1"})
                here = Wired(client, proxy, answer.json()["session_id"])
                assert (await here.save({"a": 1})).status_code == 200
                yield here
