"""A long way between a client and a server."""

import asyncio

from tests.faults.proxy import Proxy
from tests.faults.servers import HOST


class SlowProxy(Proxy):
    """Forward everything, and what comes back `delay_s` later than it came."""

    delay_s = 0.0

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(HOST, self._target_port)
        self._writers.add(forth)
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        pumps = [
            asyncio.create_task(_carry(reader, forth)),
            asyncio.create_task(self._load(back, on_the_way)),
            asyncio.create_task(_unload(on_the_way, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self._close(forth)

    async def _load(
        self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65_536):
            on_the_way.put_nowait((loop.time() + self.delay_s, data))


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)


async def _unload(
    on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s, data = await on_the_way.get()
        await asyncio.sleep(due_s - loop.time())
        writer.write(data)
