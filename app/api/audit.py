"""The record of who did what over HTTP, for operators."""

from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Operation
from app.onboarding.access import Access
from app.onboarding.audit import MAX_AUDITED, USUAL_AUDITED, AuditList
from app.onboarding.cursors import parse_limit


async def get_audit(call: Call) -> ASGIApp:
    """Read a part of the record."""
    query = call.query
    limit = parse_limit(query.get("limit", str(USUAL_AUDITED)), MAX_AUDITED)
    return call.answer(await call.services.audit.list_events(query.get("after"), limit))


OPERATIONS = [
    Operation(
        methods=["GET"],
        path="/api/v1/admin/audit",
        handler=get_audit,
        name="get_audit",
        access=Access.OPERATE,
        summary="Read who did what, and who was refused what, oldest first",
        tag="Operators",
        query=[
            (
                "after",
                {"type": "string", "pattern": "^[0-9]{1,19}(-[0-9]{1,19})?$"},
                "Only events after this id",
            ),
            (
                "limit",
                {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": MAX_AUDITED,
                    "default": USUAL_AUDITED,
                },
                "Most events",
            ),
        ],
        answers=[Answer(description="A part of the record", schema=AuditList)],
        errors=["invalid_request", "corrupt_record"],
    ),
]
