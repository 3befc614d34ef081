"""The metrics over HTTP: for Prometheus."""

from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.onboarding.access import Access


async def get_metrics(call: Call) -> ASGIApp:
    """Tell how the service does, in numbers."""
    accept = call.headers.get("accept", "")
    text, media_type = await call.services.metrics.describe(accept)
    return Response(text, headers={"cache-control": "no-store"}, media_type=media_type)


OPERATIONS = [
    Operation(
        methods=["GET"],
        path="/metrics",
        handler=get_metrics,
        name="get_metrics",
        access=Access.OPERATE,
        summary="Tell how the service does, in numbers, as Prometheus reads them",
        tag="Health",
        quiet=True,
        # It is read when the service has more to do than it can.
        at_once="own",
        answers=[
            Answer(
                description="The metrics of all processes of this service",
                schema={"type": "string"},
                media_type="text/plain",
            )
        ],
    )
]
