"""Resume tokens over HTTP: made, listed, revoked, used."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.context import learn
from app.onboarding.access import Access
from app.onboarding.tokens import (
    DEFAULT_TTL_S,
    MAX_LABEL_LENGTH,
    MAX_TTL_S,
    MIN_TTL_S,
    CreatedResumeToken,
    ResumedSessionView,
    ResumeTokenList,
    RevokedResumeToken,
)

_LABEL = StringConstraints(
    min_length=1, max_length=MAX_LABEL_LENGTH, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$"
)


class CreateResumeToken(BaseModel):
    """How long a resume token lives, in seconds, and what it is for."""

    model_config = ConfigDict(strict=True, extra="ignore")

    ttl_s: Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)] = DEFAULT_TTL_S
    label: Annotated[str, _LABEL] | None = None


class UseResumeToken(BaseModel):
    """A resume token."""

    model_config = ConfigDict(strict=True, extra="ignore")

    token: str


async def create_resume_token(call: Call) -> ASGIApp:
    """Make a resume token, which is shown once."""
    wanted = call.parse(CreateResumeToken)
    created = await call.services.tokens.create_resume_token(
        call.session_id, ttl_s=wanted.ttl_s, label=wanted.label
    )
    return call.answer(created, 201)


async def list_resume_tokens(call: Call) -> ASGIApp:
    """Tell of the resume tokens of a session."""
    return call.answer(await call.services.tokens.list_resume_tokens(call.session_id))


async def revoke_resume_token(call: Call) -> ASGIApp:
    """Revoke a resume token."""
    token_id = call.parameters["token_id"]
    try:
        revoked = await call.services.tokens.revoke_resume_token(call.session_id, token_id)
    finally:
        # Where the store did not answer, it may have been done all the same.
        call.services.access.forget_tokens(call.session_id)
    return call.answer(revoked)


async def resume_session(call: Call) -> ASGIApp:
    """Take a session up with a resume token."""
    view, session_token = await call.services.tokens.resume(call.parse(UseResumeToken).token)
    learn(session_id=view["session_id"])
    return call.answer(ResumedSessionView(**view, session_token=session_token))


_TOKENS = "/api/v1/onboarding/{id}/resume-tokens"

OPERATIONS = [
    Operation(
        methods=["POST"],
        path="/api/v1/onboarding/resume",
        handler=resume_session,
        name="resume_session",
        access=Access.OPEN,
        audited=True,
        summary="Take a session up with a resume token, once; within a minute the same again",
        tag="Resume",
        body=Body(schema=UseResumeToken),
        answers=[
            Answer(description="The session, and a token that opens it", schema=ResumedSessionView)
        ],
        errors=["invalid_request", "resume_token_not_found", "corrupt_record"],
    ),
    Operation(
        methods=["POST"],
        path=_TOKENS,
        handler=create_resume_token,
        name="create_resume_token",
        access=Access.EDIT,
        audited=True,
        summary="Make a token with which the session is taken up elsewhere, once",
        tag="Resume",
        body=Body(schema=CreateResumeToken, required=False),
        answers=[
            Answer(status=201, description="The token, shown this once", schema=CreatedResumeToken)
        ],
        errors=["invalid_request", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_TOKENS,
        handler=list_resume_tokens,
        name="list_resume_tokens",
        access=Access.EDIT,
        summary="List the resume tokens that can be used, or revoked, newest first",
        tag="Resume",
        answers=[Answer(description="What can be told of them", schema=ResumeTokenList)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["DELETE"],
        path=_TOKENS + "/{token_id}",
        handler=revoke_resume_token,
        name="revoke_resume_token",
        access=Access.EDIT,
        audited=True,
        summary="Revoke a resume token, and the session token that it gave",
        tag="Resume",
        answers=[Answer(description="It is revoked", schema=RevokedResumeToken)],
        errors=["corrupt_record"],
    ),
]
