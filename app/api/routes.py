"""Every operation of the service, and the routes that lead to them."""

from collections import defaultdict
from functools import cache

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from app.api import (
    assistant,
    audit,
    catalogue,
    events,
    exports,
    files,
    generation,
    health,
    metrics,
    progress,
    retention,
    sessions,
    stats,
    steps,
    tasks,
    tokens,
)
from app.api.calls import Call
from app.api.dispatch import Resource
from app.api.documentation import render_documentation
from app.api.openapi import OPENAPI_PATH, describe_operations
from app.api.operations import Answer, Operation
from app.onboarding.access import Access


async def get_openapi(_: Call) -> ASGIApp:
    """Describe the interface to programs."""
    return Response(_openapi(), media_type="application/json")


async def get_documentation(_: Call) -> ASGIApp:
    """Describe the interface to people."""
    # The page is one file that loads nothing and runs nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return Response(
        _documentation(), headers={"content-security-policy": policy}, media_type="text/html"
    )


OPERATIONS: list[Operation] = [
    # The router asks from the top: what is asked most comes first, and the fixed paths under
    # /api/v1/onboarding before the one that is a session's id.
    *steps.OPERATIONS,
    *progress.OPERATIONS,
    *generation.OPERATIONS,
    *events.OPERATIONS,
    *exports.OPERATIONS,
    *files.OPERATIONS,
    *assistant.OPERATIONS,
    *catalogue.OPERATIONS,
    *tokens.OPERATIONS,
    *sessions.OPERATIONS,
    *tasks.OPERATIONS,
    *stats.OPERATIONS,
    *retention.OPERATIONS,
    *audit.OPERATIONS,
    *health.OPERATIONS,
    *metrics.OPERATIONS,
    Operation(
        methods=["GET"],
        path=OPENAPI_PATH,
        handler=get_openapi,
        name="get_openapi",
        access=Access.PUBLIC,
        summary="Describe the interface to programs",
        tag="Documentation",
        answers=[Answer(description="OpenAPI 3.1", schema={"type": "object"})],
    ),
    Operation(
        methods=["GET"],
        path="/docs",
        handler=get_documentation,
        name="get_documentation",
        access=Access.PUBLIC,
        summary="Describe the interface to people",
        tag="Documentation",
        answers=[Answer(description="A page", schema={"type": "string"}, media_type="text/html")],
    ),
]


def build_routes() -> list[Route]:
    """Make one route for each path, which answers every method that the path has."""
    by_path: dict[str, dict[str, Operation]] = defaultdict(dict)
    for operation in OPERATIONS:
        for method in operation.methods:
            by_path[operation.path][method] = operation
    return [Route(path, Resource(path, operations)) for path, operations in by_path.items()]


@cache
def _openapi() -> bytes:
    return describe_operations(OPERATIONS)


@cache
def _documentation() -> bytes:
    return render_documentation(_openapi())
