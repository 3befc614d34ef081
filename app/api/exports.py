"""Finalize and the export, over HTTP."""

from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.errors import ExportNotFoundError
from app.onboarding.access import Access
from app.onboarding.exports import ExportView, FinalizeView


class Finalize(BaseModel):
    """How to finalize."""

    model_config = ConfigDict(strict=True, extra="ignore")

    force: bool = False


async def finalize(call: Call) -> ASGIApp:
    """Lock the steps and freeze them into an export."""
    wanted = call.parse(Finalize)
    answer = await call.manager.finalize(
        call.session_id, force=wanted.force, request=call.idempotent
    )
    return call.answer(answer)


async def get_export(call: Call) -> ASGIApp:
    """Read the latest export."""
    export = await call.manager.get_export(call.session_id)
    if export is None:
        raise ExportNotFoundError
    if call.if_none_match is not None and call.if_none_match.match_weakly(export.checksum):
        return call.not_modified(export.checksum)
    return call.answer(export, etag=export.checksum)


OPERATIONS = [
    Operation(
        methods=["POST"],
        path="/api/v1/onboarding/{id}/finalize",
        handler=finalize,
        name="finalize",
        access=Access.EDIT,
        audited=True,
        summary="Lock the steps and freeze them into an export",
        tag="Finalize",
        body=Body(schema=Finalize, required=False),
        idempotency_key=True,
        answers=[
            Answer(
                description="The export; asked again, the same bytes",
                schema=FinalizeView,
                headers=["Idempotent-Replayed"],
            )
        ],
        errors=[
            *("invalid_request", "nothing_to_finalize", "steps_missing", "session_conflict"),
            "corrupt_record",
        ],
    ),
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/{id}/export",
        handler=get_export,
        name="get_export",
        access=Access.FOLLOW,
        audited=True,
        summary="Read the latest export",
        tag="Finalize",
        preconditions=["If-None-Match"],
        answers=[
            Answer(description="The export", schema=ExportView, headers=["ETag"]),
            Answer(status=304, description="Unchanged", headers=["ETag"]),
        ],
        errors=["export_not_found", "corrupt_record"],
    ),
]
