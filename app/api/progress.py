"""How far a session is, over HTTP."""

from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.onboarding.access import Access
from app.onboarding.sessions import ProgressView, SummaryView


async def get_progress(call: Call) -> ASGIApp:
    """Say how far a session is."""
    return call.answer(await call.manager.view_progress(call.session_id))


async def get_summary(call: Call) -> ASGIApp:
    """Show a session at a glance, without its answers."""
    return call.answer(await call.manager.write_summary(call.session_id))


OPERATIONS = [
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/{id}/progress",
        handler=get_progress,
        name="get_progress",
        access=Access.EDIT,
        summary="Say how far a session is",
        tag="Progress",
        answers=[Answer(description="The progress", schema=ProgressView)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/{id}/summary",
        handler=get_summary,
        name="get_summary",
        access=Access.EDIT,
        summary="Show a session at a glance, without its answers",
        tag="Progress",
        answers=[Answer(description="The summary", schema=SummaryView)],
        errors=["corrupt_record"],
    ),
]
