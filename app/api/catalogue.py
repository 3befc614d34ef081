"""The step catalogue over HTTP."""

from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.onboarding.access import Access
from app.onboarding.catalogue import CatalogueView


async def get_catalogue(call: Call) -> ASGIApp:
    """Show the steps that new sessions begin with."""
    return Response(call.manager.catalogue.text, media_type="application/json")


OPERATIONS = [
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/steps",
        handler=get_catalogue,
        name="get_catalogue",
        access=Access.ANY,
        summary="Show the steps that new sessions begin with",
        tag="Steps",
        answers=[Answer(description="The catalogue", schema=CatalogueView)],
    ),
]
