"""Steps and drafts over HTTP."""

from typing import Any

import orjson
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.errors import DraftNotFoundError, InvalidStepDataError, StepNotFoundError
from app.onboarding.access import Access
from app.onboarding.catalogue import parse_step_id
from app.onboarding.documents import Document
from app.onboarding.steps import DeletedStep, DroppedDraft, SavedStep, SavedSteps, StepView

_BASE = "/api/v1/onboarding/{id}"


async def save_step(call: Call) -> ASGIApp:
    """Save the answers of a step."""
    saved = await call.manager.save_step(
        call.session_id,
        call.step_id,
        call.data(),
        precondition=call.precondition,
        request=call.idempotent,
    )
    return call.answer(saved, etag=str(saved["version"]))


async def patch_step(call: Call) -> ASGIApp:
    """Change some answers of a saved step."""
    saved = await call.manager.patch_step(
        call.session_id,
        call.step_id,
        call.document(),
        precondition=call.precondition,
        request=call.idempotent,
    )
    return call.answer(saved, etag=str(saved["version"]))


async def get_step(call: Call) -> ASGIApp:
    """Read a saved step."""
    step = await call.manager.get_step(call.session_id, call.step_id)
    if step is None:
        raise StepNotFoundError(call.step_id)
    etag = str(step.version)
    if call.if_none_match is not None and call.if_none_match.match_weakly(etag):
        return call.not_modified(etag)
    return call.answer(step, etag=etag)


async def delete_step(call: Call) -> ASGIApp:
    """Delete a saved step."""
    deleted = await call.manager.delete_step(
        call.session_id,
        call.step_id,
        if_match=call.precondition.if_match,
        request=call.idempotent,
    )
    return call.answer(deleted)


async def save_steps(call: Call) -> ASGIApp:
    """Save several steps, all or none."""
    steps = _numbered(call.document().part("steps", InvalidStepDataError))
    return call.answer(
        await call.manager.save_steps(call.session_id, steps, request=call.idempotent)
    )


async def list_steps(call: Call) -> ASGIApp:
    """Read every saved step."""
    steps = await call.manager.get_all_steps(call.session_id)
    return call.answer(
        {
            "session_id": call.session_id,
            "steps": {str(number): orjson.Fragment(step.text) for number, step in steps.items()},
            "missing": steps.missing,
        }
    )


async def save_draft(call: Call) -> ASGIApp:
    """Keep what is being typed."""
    return call.answer(
        await call.manager.save_draft(
            call.session_id, call.step_id, call.data(), request=call.idempotent
        )
    )


async def get_draft(call: Call) -> ASGIApp:
    """Read a draft."""
    draft = await call.manager.get_draft(call.session_id, call.step_id)
    if draft is None:
        raise DraftNotFoundError(call.step_id)
    return call.answer(draft)


async def delete_draft(call: Call) -> ASGIApp:
    """Drop a draft."""
    draft = await call.manager.delete_draft(call.session_id, call.step_id)
    named = {"success": True, "session_id": call.session_id, "step_id": call.step_id}
    return call.answer({**named, **(draft or {})})


async def promote_draft(call: Call) -> ASGIApp:
    """Save a draft as the step."""
    saved = await call.manager.promote_draft_to_step(
        call.session_id,
        call.step_id,
        precondition=call.precondition,
        request=call.idempotent,
    )
    return call.answer(saved, etag=str(saved["version"]))


def _numbered(steps: Document) -> dict[int, Document]:
    parts = steps.parts("/steps", InvalidStepDataError)
    return {parse_step_id(name): data for name, data in parts.items()}


_DATA: dict[str, Any] = {"type": "object", "minProperties": 1}
_SAVE = Body(
    limit="step",
    schema={"type": "object", "required": ["data"], "properties": {"data": _DATA}},
)
_SAVED = Answer(description="Saved", schema=SavedStep, headers=["ETag", "Idempotent-Replayed"])
_SAVE_ERRORS = ["invalid_step_data", "session_finalized", "version_conflict"]

OPERATIONS = [
    Operation(
        methods=["POST", "PUT"],
        path=_BASE + "/steps/{n}",
        handler=save_step,
        name="save_step",
        access=Access.EDIT,
        summary="Save the answers of a step",
        tag="Steps",
        body=_SAVE,
        preconditions=["If-Match", "If-None-Match"],
        idempotency_key=True,
        answers=[_SAVED],
        errors=_SAVE_ERRORS,
    ),
    Operation(
        methods=["GET"],
        path=_BASE + "/steps/{n}",
        handler=get_step,
        name="get_step",
        access=Access.EDIT,
        summary="Read a saved step",
        tag="Steps",
        preconditions=["If-None-Match"],
        answers=[
            Answer(description="The step", schema=StepView, headers=["ETag"]),
            Answer(status=304, description="Unchanged", headers=["ETag"]),
        ],
        errors=["step_not_found", "corrupt_record"],
    ),
    Operation(
        methods=["PATCH"],
        path=_BASE + "/steps/{n}",
        handler=patch_step,
        name="patch_step",
        access=Access.EDIT,
        summary="Change some answers of a saved step by a JSON merge patch",
        tag="Steps",
        body=Body(limit="step", schema={"type": "object"}, patch=True),
        preconditions=["If-Match", "If-None-Match"],
        idempotency_key=True,
        answers=[_SAVED],
        errors=[*_SAVE_ERRORS, "step_not_found", "session_conflict", "corrupt_record"],
    ),
    Operation(
        methods=["DELETE"],
        path=_BASE + "/steps/{n}",
        handler=delete_step,
        name="delete_step",
        access=Access.EDIT,
        summary="Delete a saved step; its version goes on counting",
        tag="Steps",
        preconditions=["If-Match"],
        idempotency_key=True,
        answers=[
            Answer(description="Deleted", schema=DeletedStep, headers=["Idempotent-Replayed"])
        ],
        errors=["step_not_found", "session_finalized", "version_conflict"],
    ),
    Operation(
        methods=["POST"],
        path=_BASE + "/steps",
        handler=save_steps,
        name="save_steps",
        access=Access.EDIT,
        summary="Save several steps, all or none",
        tag="Steps",
        body=Body(
            limit="step",
            schema={
                "type": "object",
                "required": ["steps"],
                "properties": {
                    "steps": {
                        "type": "object",
                        "minProperties": 1,
                        "propertyNames": {"pattern": "^[1-9][0-9]{0,2}$"},
                        "additionalProperties": _DATA,
                    }
                },
            },
        ),
        idempotency_key=True,
        answers=[Answer(description="Saved", schema=SavedSteps, headers=["Idempotent-Replayed"])],
        errors=["invalid_step_id", "invalid_step_data", "session_finalized"],
    ),
    Operation(
        methods=["GET"],
        path=_BASE + "/steps",
        handler=list_steps,
        name="list_steps",
        access=Access.EDIT,
        summary="Read every saved step",
        tag="Steps",
        answers=[
            Answer(
                description="The saved steps by number, and the numbers of the others",
                schema={
                    "type": "object",
                    "required": ["session_id", "steps", "missing"],
                    "properties": {
                        "session_id": {"type": "string"},
                        "steps": {
                            "type": "object",
                            "additionalProperties": {"$ref": "#/components/schemas/StepView"},
                        },
                        "missing": {"type": "array", "items": {"type": "integer"}},
                    },
                },
            )
        ],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["PUT"],
        path=_BASE + "/steps/{n}/draft",
        handler=save_draft,
        name="save_draft",
        access=Access.EDIT,
        summary="Keep what is being typed; it is no progress and not checked by the schema",
        tag="Drafts",
        body=Body(
            limit="step",
            schema={
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"type": "object"}},
            },
        ),
        idempotency_key=True,
        answers=[Answer(description="The draft", schema=StepView, headers=["Idempotent-Replayed"])],
        errors=["invalid_step_data", "session_finalized"],
    ),
    Operation(
        methods=["GET"],
        path=_BASE + "/steps/{n}/draft",
        handler=get_draft,
        name="get_draft",
        access=Access.EDIT,
        summary="Read a draft",
        tag="Drafts",
        answers=[Answer(description="The draft", schema=StepView)],
        errors=["draft_not_found", "corrupt_record"],
    ),
    Operation(
        methods=["DELETE"],
        path=_BASE + "/steps/{n}/draft",
        handler=delete_draft,
        name="delete_draft",
        access=Access.EDIT,
        summary="Drop a draft",
        tag="Drafts",
        answers=[Answer(description="Dropped", schema=DroppedDraft)],
        errors=["draft_not_found", "session_finalized"],
    ),
    Operation(
        methods=["POST"],
        path=_BASE + "/steps/{n}/draft/promote",
        handler=promote_draft,
        name="promote_draft",
        access=Access.EDIT,
        summary="Save a draft as the step",
        tag="Drafts",
        preconditions=["If-Match", "If-None-Match"],
        idempotency_key=True,
        answers=[_SAVED],
        errors=[*_SAVE_ERRORS, "draft_not_found", "session_conflict", "corrupt_record"],
    ),
]
