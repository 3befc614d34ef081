"""Sessions listed and counted over HTTP, for operators."""

from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.onboarding.access import Access
from app.onboarding.cursors import parse_limit
from app.onboarding.sessions import SessionStatus, check_owner
from app.onboarding.stats import MAX_PAGE, CapacityHealth, SessionPage, StatsView


async def list_sessions(call: Call) -> ASGIApp:
    """List sessions, a page at a time."""
    query = call.query
    workspace_id, user_id = query.get("workspace_id"), query.get("user_id")
    check_owner(workspace_id, user_id, "en", workspace_required=False)
    page = await call.services.stats.list_sessions(
        status=query.get("status"),
        workspace_id=workspace_id,
        user_id=user_id,
        cursor=query.get("cursor"),
        limit=parse_limit(query.get("limit", "50"), MAX_PAGE),
    )
    return call.answer(page)


async def get_stats(call: Call) -> ASGIApp:
    """Count everything."""
    return call.answer(await call.services.stats.get_performance_stats())


async def get_capacity_health(call: Call) -> ASGIApp:
    """Judge how full it is."""
    return call.answer(await call.services.stats.get_health_status())


_ADMIN = "/api/v1/admin"

OPERATIONS = [
    Operation(
        methods=["GET"],
        path=_ADMIN + "/sessions",
        handler=list_sessions,
        name="list_sessions",
        access=Access.OPERATE,
        summary="List sessions, newest first",
        tag="Operators",
        query=[
            (
                "status",
                {"type": "string", "enum": [status.value for status in SessionStatus]},
                "Only those of this status",
            ),
            ("workspace_id", {"type": "string"}, "Only those of this workspace"),
            ("user_id", {"type": "string"}, "Only those of this user"),
            ("cursor", {"type": "string"}, "`next_cursor` of the page before"),
            (
                "limit",
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 50},
                "How many at most; a page may be shorter before the end",
            ),
        ],
        answers=[Answer(description="A page", schema=SessionPage)],
        errors=["invalid_request"],
    ),
    Operation(
        methods=["GET"],
        path=_ADMIN + "/stats",
        handler=get_stats,
        name="get_stats",
        access=Access.OPERATE,
        summary="Count the sessions, their ages, and where people stop",
        tag="Operators",
        answers=[Answer(description="The statistics", schema=StatsView)],
    ),
    Operation(
        methods=["GET"],
        path=_ADMIN + "/health",
        handler=get_capacity_health,
        name="get_capacity_health",
        access=Access.OPERATE,
        summary="Judge how full it is, and name the sessions that are stuck",
        tag="Operators",
        answers=[Answer(description="The health of the whole", schema=CapacityHealth)],
    ),
]
