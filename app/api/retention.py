"""The life of sessions over HTTP, for operators: cleaned up, changed in bulk, recovered."""

from typing import Annotated, Any

from pydantic import MISSING, BaseModel, ConfigDict, Field, StringConstraints
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.generation import LanguageTag
from app.api.operations import Answer, Body, Operation
from app.errors import Fault, InvalidRequestError
from app.onboarding.access import Access
from app.onboarding.recovery import RecoveryView
from app.onboarding.retention import (
    LONGEST_AGE_HOURS,
    LONGEST_INTERVAL_S,
    MAX_AT_ONCE,
    MOST_SESSIONS,
    SHORTEST_INTERVAL_S,
    BulkView,
    CleanupView,
    ConfigView,
    ErasureView,
)
from app.onboarding.sessions import SessionStatus

_BULK_FIELDS = ("status", "language", "metadata")
_STATUS = StringConstraints(pattern=f"^({'|'.join(SessionStatus)})$")


class Cleanup(BaseModel):
    """Which sessions to remove, by status, by age since they were made, or all.

    With `dry_run` they are only named.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    status: Annotated[str, _STATUS] | None = None
    older_than_hours: Annotated[float, Field(ge=0, le=LONGEST_AGE_HOURS)] | None = None
    all: bool = False
    dry_run: bool = False


class BulkSet(BaseModel):
    """What to set: one or several of these."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        json_schema_extra={"anyOf": [{"required": [name]} for name in _BULK_FIELDS]},
    )

    status: Annotated[str, _STATUS] | MISSING = MISSING
    language: LanguageTag | MISSING = MISSING
    metadata: dict[str, Any] | MISSING = MISSING


class BulkChange(BaseModel):
    """Sessions, and what to set of each of them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    session_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_AT_ONCE)]
    set: BulkSet


class Config(BaseModel):
    """What to set for all processes; null goes back to the settings."""

    model_config = ConfigDict(strict=True, extra="ignore")

    max_sessions: Annotated[int, Field(ge=0, le=MOST_SESSIONS)] | None = None
    cleanup_interval_s: (
        Annotated[float, Field(ge=SHORTEST_INTERVAL_S, le=LONGEST_INTERVAL_S)] | None
    ) = None


async def clean_up(call: Call) -> ASGIApp:
    """Remove sessions."""
    wanted = call.parse(Cleanup)
    done = await call.services.retention.cleanup(
        status=wanted.status,
        older_than_hours=wanted.older_than_hours,
        everything=wanted.all,
        dry_run=wanted.dry_run,
    )
    return call.answer(done)


async def change_sessions(call: Call) -> ASGIApp:
    """Change several sessions."""
    wanted = call.parse(BulkChange)
    updates = wanted.set.model_dump()
    if not updates:
        detail = f"Set at least one of {', '.join(_BULK_FIELDS)}"
        fault = Fault(pointer="/set", code="missing", detail=detail)
        raise InvalidRequestError(detail, [fault])
    if "metadata" in updates:
        sent = call.document().part("set", InvalidRequestError)
        updates["metadata"] = sent.part("metadata", InvalidRequestError)
    return call.answer(
        await call.services.retention.bulk_update_sessions(wanted.session_ids, updates)
    )


async def recover_session(call: Call) -> ASGIApp:
    """Keep what can be read of a session."""
    return call.answer(await call.services.retention.recover_corrupted_session(call.session_id))


async def erase_user(call: Call) -> ASGIApp:
    """Remove what there is of a user."""
    return call.answer(await call.services.retention.erase_user(call.parameters["user_id"]))


async def get_config(call: Call) -> ASGIApp:
    """Show what all processes share."""
    return call.answer(await call.services.retention.get_config())


async def set_config(call: Call) -> ASGIApp:
    """Set what all processes share."""
    wanted = call.parse(Config)
    changes = wanted.model_dump(exclude_unset=True)
    return call.answer(await call.services.retention.reconfigure(**changes))


_ADMIN = "/api/v1/admin"

OPERATIONS = [
    Operation(
        methods=["POST"],
        path=_ADMIN + "/cleanup",
        handler=clean_up,
        name="clean_up",
        access=Access.OPERATE,
        audited=True,
        summary="Remove sessions, those with answers that were never exported too",
        tag="Operators",
        body=Body(schema=Cleanup),
        answers=[Answer(description="What was removed", schema=CleanupView)],
        errors=["invalid_request"],
    ),
    Operation(
        methods=["POST"],
        path=_ADMIN + "/sessions/bulk",
        handler=change_sessions,
        name="change_sessions",
        access=Access.OPERATE,
        audited=True,
        summary="Make the same change to several sessions, each by itself",
        tag="Operators",
        body=Body(schema=BulkChange),
        answers=[Answer(description="What became of it", schema=BulkView)],
        errors=["invalid_request"],
    ),
    Operation(
        methods=["POST"],
        path=_ADMIN + "/sessions/{id}/recover",
        handler=recover_session,
        name="recover_session",
        access=Access.OPERATE,
        audited=True,
        summary="Keep what can be read of a damaged session, and drop the rest",
        tag="Operators",
        answers=[Answer(description="What is left", schema=RecoveryView)],
        errors=["session_conflict"],
    ),
    Operation(
        methods=["DELETE"],
        path=_ADMIN + "/users/{user_id}",
        handler=erase_user,
        name="erase_user",
        access=Access.OPERATE,
        audited=True,
        summary="Remove the sessions and tasks of a user, up to 1,000 of each",
        tag="Operators",
        answers=[Answer(description="What was removed", schema=ErasureView)],
    ),
    Operation(
        methods=["GET"],
        path=_ADMIN + "/config",
        handler=get_config,
        name="get_config",
        access=Access.OPERATE,
        summary="Show what all processes share",
        tag="Operators",
        answers=[Answer(description="What holds", schema=ConfigView)],
    ),
    Operation(
        methods=["PATCH"],
        path=_ADMIN + "/config",
        handler=set_config,
        name="set_config",
        access=Access.OPERATE,
        audited=True,
        summary="Set what all processes share, at once",
        tag="Operators",
        body=Body(schema=Config),
        answers=[Answer(description="What holds now", schema=ConfigView)],
        errors=["invalid_request"],
    ),
]
