"""The yardstick: a Starlette application that does nothing, on uvicorn.

    python -m tests.bench.bare <port> <workers> <tuned or not> <bytes of a summary> <of an export>

`tuned` is with the settings of the garbage collector that the service has.
"""

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

OK = b'{"ok":true}'


async def post(request: Request) -> Response:
    """Read a body and parse it."""
    orjson.loads(await request.body())
    return Response(OK, media_type="application/json")


async def get(_: Request) -> Response:
    """Answer in a few bytes."""
    return Response(OK, media_type="application/json")


def filled(length: int) -> bytes:
    """Make JSON of so many bytes, or as short as it can be."""
    return orjson.dumps({"filled": "x" * max(0, length - len('{"filled":""}'))})


def make_app(summary_bytes: int, export_bytes: int, *, is_tuned: bool) -> Starlette:
    """Make the application."""
    summary, export = filled(summary_bytes), filled(export_bytes)

    async def get_summary(_: Request) -> Response:
        return Response(summary, media_type="application/json")

    async def get_export(_: Request) -> Response:
        return Response(export, media_type="application/json")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if is_tuned:
            gc.freeze()
            gc.set_threshold(50_000, 20, 100)
        yield

    return Starlette(
        routes=[
            Route("/livez", get),
            Route("/bare", post, methods=["POST"]),
            Route("/bare", get),
            Route("/summary", get_summary),
            Route("/export", get_export),
        ],
        lifespan=lifespan,
    )


def make_app_as_asked() -> Starlette:
    """Make the application by the arguments of the program, which every worker has."""
    tuning, *lengths = sys.argv[3:]
    return make_app(*map(int, lengths), is_tuned=tuning == "tuned")


if __name__ == "__main__":
    uvicorn.run(
        "tests.bench.bare:make_app_as_asked",
        factory=True,
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        server_header=False,
        log_level="warning",
    )
