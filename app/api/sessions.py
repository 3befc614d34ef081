"""Sessions over HTTP: made, found again, looked at, reopened, deleted."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.context import learn
from app.errors import InvalidRequestError
from app.onboarding.access import Access, claim
from app.onboarding.cursors import parse_limit
from app.onboarding.sessions import (
    MAX_OWNER_LENGTH,
    DeletedSession,
    NewSessionView,
    Owner,
    SessionView,
    check_owner,
)
from app.onboarding.stats import MAX_OWN_PAGE, OwnSessionPage

_OWNER = StringConstraints(min_length=1, max_length=MAX_OWNER_LENGTH)
_QUERY = ("workspace_id", "user_id", "language")


class CreateSession(BaseModel):
    """What a session is made with."""

    model_config = ConfigDict(strict=True, extra="ignore")

    workspace_id: Annotated[str, _OWNER] | None = None
    user_id: Annotated[str, _OWNER] | None = None
    language: str = "en"
    metadata: dict[str, Any] | None = None


async def create_session(call: Call) -> ASGIApp:
    """Make a session; what the body lacks is taken from the query."""
    query = {name: value for name, value in call.query.items() if name in _QUERY}
    wanted = call.parse(CreateSession, query)
    custom = b"{}"
    if wanted.metadata is not None and call.body is not None:
        custom = call.body.part("metadata", InvalidRequestError).text
    asked = Owner(wanted.workspace_id, wanted.user_id, wanted.language, custom)
    owner = claim(call.principal, asked)
    check_owner(owner.workspace_id, owner.user_id, owner.language, workspace_required=True)
    view = await call.services.tokens.begin_session(
        owner, credential=call.credential, request=call.idempotent
    )
    learn(session_id=view["session_id"])
    location = f"/api/v1/onboarding/{view['session_id']}"
    return call.answer(view, 201, {"location": location})


async def list_own_sessions(call: Call) -> ASGIApp:
    """List the sessions of whoever asks, or of the user of the query."""
    query = call.query
    workspace_id, user_id = query.get("workspace_id"), query.get("user_id")
    check_owner(workspace_id, user_id, "en", workspace_required=False)
    page = await call.services.stats.list_own_sessions(
        call.principal,
        user_id=user_id,
        workspace_id=workspace_id,
        cursor=query.get("cursor"),
        limit=parse_limit(query.get("limit", str(MAX_OWN_PAGE)), MAX_OWN_PAGE),
    )
    return call.answer(page)


async def get_session(call: Call) -> ASGIApp:
    """Show a session."""
    return call.answer(await call.manager.get_session(call.session_id))


async def reopen_session(call: Call) -> ASGIApp:
    """Unlock the steps of a finalized session."""
    return call.answer(await call.manager.reopen(call.session_id, request=call.idempotent))


async def delete_session(call: Call) -> ASGIApp:
    """Remove a session with all its answers."""
    return call.answer(await call.manager.delete_session(call.session_id))


OPERATIONS = [
    Operation(
        methods=["POST"],
        path="/api/v1/onboarding/session",
        handler=create_session,
        name="create_session",
        access=Access.CREATE,
        summary="Begin a session",
        tag="Sessions",
        body=Body(schema=CreateSession, required=False),
        query=[
            ("workspace_id", {"type": "string"}, "Taken when the body has none"),
            ("user_id", {"type": "string"}, "Taken when the body has none"),
            ("language", {"type": "string"}, "Taken when the body has none"),
        ],
        idempotency_key=True,
        answers=[
            Answer(
                status=201,
                description="The session",
                schema=NewSessionView,
                headers=["Location", "Idempotent-Replayed"],
            )
        ],
        errors=["invalid_request", "capacity_reached"],
    ),
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/mine",
        handler=list_own_sessions,
        name="list_own_sessions",
        access=Access.OWN,
        summary="List the sessions of a user, newest first",
        tag="Sessions",
        query=[
            ("user_id", {"type": "string"}, "Whose, where nobody has to say who they are"),
            ("workspace_id", {"type": "string"}, "Only those of this workspace"),
            ("cursor", {"type": "string"}, "`next_cursor` of the page before"),
            (
                "limit",
                {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": MAX_OWN_PAGE,
                    "default": MAX_OWN_PAGE,
                },
                "How many at most; a page may be shorter before the end",
            ),
        ],
        answers=[Answer(description="A page", schema=OwnSessionPage)],
        errors=["invalid_request"],
    ),
    Operation(
        methods=["GET"],
        path="/api/v1/onboarding/{id}",
        handler=get_session,
        name="get_session",
        access=Access.EDIT,
        summary="Show a session",
        tag="Sessions",
        answers=[Answer(description="The session", schema=SessionView)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["DELETE"],
        path="/api/v1/onboarding/{id}",
        handler=delete_session,
        name="delete_session",
        access=Access.EDIT,
        audited=True,
        summary="Delete a session with all its answers",
        tag="Sessions",
        answers=[Answer(description="It is gone", schema=DeletedSession)],
    ),
    Operation(
        methods=["POST"],
        path="/api/v1/onboarding/{id}/reopen",
        handler=reopen_session,
        name="reopen_session",
        access=Access.EDIT,
        audited=True,
        summary="Unlock the steps of a finalized session; its export stays readable",
        tag="Finalize",
        idempotency_key=True,
        answers=[
            Answer(description="The session", schema=SessionView, headers=["Idempotent-Replayed"])
        ],
        errors=["not_finalized", "generation_running", "corrupt_record"],
    ),
]
