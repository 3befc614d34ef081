"""A connection to a service that is kept, on which bytes go and come as they are."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

from httpx2 import AsyncClient


class Answer(NamedTuple):
    """An answer: the headers in their order, with names in lower case, as latin-1."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)


class Connection:
    """One connection, on which requests may be written before the answers are read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def open(cls, api: AsyncClient, *, limit_s: float = 20.0) -> AsyncIterator[Self]:
        """Connect to a service for the length of a block, which may take so long."""
        reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
        try:
            async with asyncio.timeout(limit_s):
                yield cls(reader, writer)
        finally:
            writer.close()

    def write(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        """Write a request; a body brings its length and, unless told, its type with it."""
        self.writer.write(head(method, target, headers, body) + body)

    async def read(self, *, bodiless: bool = False) -> Answer:
        """Read the next answer; one to HEAD has no body. Raises `IncompleteReadError`."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = [line.split(": ", 1) for line in lines if line]
        headers = [(name.lower(), value) for name, value in pairs]
        length = int(dict(headers).get("content-length", "0"))
        body = b"" if bodiless else await self.reader.readexactly(length)
        return Answer(int(status), headers, body)

    async def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Write a request and read its answer."""
        self.write(method, target, headers, body)
        return await self.read(bodiless=method == "HEAD")

    async def is_closed(self) -> bool:
        """Say whether the other side has sent all, and closes."""
        return await self.reader.read(1) == b""


def head(
    method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> bytes:
    """Write what stands before a body."""
    own = {"host": "test"}
    if body:
        own |= {"content-type": "application/json", "content-length": str(len(body))}
    told = {name: value for name, value in (own | dict(headers or {})).items() if value}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode()
