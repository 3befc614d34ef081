"""The generation of a session over HTTP: its status, its reports, its language."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.types import ASGIApp

from app.api.calls import Call
from app.api.operations import Answer, Body, Operation
from app.onboarding.access import Access
from app.onboarding.generation import (
    MAX_MESSAGE_LENGTH,
    MAX_STAGE_LENGTH,
    LanguageView,
    ProgressEvent,
    ProgressEventView,
    ShortStatusView,
    StatusView,
)

_NO_CONTROL = r"^[^\x00-\x1f\x7f-\x9f]*$"
_NAME = StringConstraints(min_length=1, max_length=MAX_STAGE_LENGTH, pattern=_NO_CONTROL)
_MESSAGE = StringConstraints(max_length=MAX_MESSAGE_LENGTH, pattern=_NO_CONTROL)

_TAG = StringConstraints(pattern=r"^[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*$", max_length=35)
LanguageTag = Annotated[str, _TAG]
"""What every tag looks like; whether it is one is asked later (RFC 5646 section 2.1)."""


class SetStatus(BaseModel):
    """A status to set: `error_message` belongs to `error`, `run` names what begins or ends."""

    model_config = ConfigDict(strict=True, extra="ignore")

    status: Literal["processing", "complete", "error"]
    error_message: Annotated[str, _MESSAGE] | None = None
    run: Annotated[str, _NAME] | None = None


class AddEvent(BaseModel):
    """A report of progress, in percent; one with an `event_id` is taken once.

    One that names its `run` is refused when another run has begun since.
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    stage: Annotated[str, _NAME]
    progress: Annotated[int, Field(ge=0, le=100)]
    message: Annotated[str, _MESSAGE] | None = None
    event_id: Annotated[str, _NAME] | None = None
    run: Annotated[str, _NAME] | None = None


class SetLanguage(BaseModel):
    """A language tag as in BCP 47."""

    model_config = ConfigDict(strict=True, extra="ignore")

    language: LanguageTag


async def get_status(call: Call) -> ASGIApp:
    """Say how far the generation is."""
    return call.answer(await call.services.generation.get_status(call.session_id))


async def get_short_status(call: Call) -> ASGIApp:
    """Say the same in fewer words."""
    status = await call.services.generation.get_status(call.session_id)
    return call.answer(
        ShortStatusView(
            status=status["status"],
            progress=status["progress"],
            stage=status["stage"],
            message=status["message"],
        )
    )


async def set_status(call: Call) -> ASGIApp:
    """Set the status."""
    wanted = call.parse(SetStatus)
    return call.answer(
        await call.services.generation.update_session_status(
            call.session_id,
            wanted.status,
            wanted.error_message,
            run=wanted.run,
            request=call.idempotent,
        )
    )


async def add_event(call: Call) -> ASGIApp:
    """Add a report of progress to the log."""
    sent = call.parse(AddEvent)
    event = ProgressEvent(
        call.session_id, sent.stage, sent.progress, sent.message, sent.event_id, sent.run
    )
    view, was_taken_before = await call.services.generation.report_progress(
        event, request=call.idempotent
    )
    return call.answer(view, 200 if was_taken_before else 201)


async def get_language(call: Call) -> ASGIApp:
    """Say in which language the session is answered."""
    language = await call.services.generation.get_language_preference(call.session_id)
    return call.answer(LanguageView(session_id=call.session_id, language=language))


async def set_language(call: Call) -> ASGIApp:
    """Set the language."""
    wanted = call.parse(SetLanguage)
    language = await call.services.generation.set_language_preference(
        call.session_id, wanted.language, request=call.idempotent
    )
    return call.answer(LanguageView(session_id=call.session_id, language=language))


_SESSION = "/api/v1/onboarding/{id}"

OPERATIONS = [
    Operation(
        methods=["POST"],
        path=_SESSION + "/events",
        handler=add_event,
        name="add_event",
        access=Access.REPORT,
        summary="Report progress",
        tag="Generation",
        body=Body(schema=AddEvent),
        idempotency_key=True,
        answers=[
            Answer(
                status=201,
                description="Taken",
                schema=ProgressEventView,
                headers=["Idempotent-Replayed"],
            ),
            Answer(
                description="Taken before, by its `event_id`",
                schema=ProgressEventView,
                headers=["Idempotent-Replayed"],
            ),
        ],
        errors=["invalid_request", "invalid_transition"],
    ),
    Operation(
        methods=["GET"],
        path=_SESSION + "/status",
        handler=get_status,
        name="get_status",
        access=Access.FOLLOW,
        summary="Say how far the generation is",
        tag="Generation",
        answers=[Answer(description="The status", schema=StatusView)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["PUT"],
        path=_SESSION + "/status",
        handler=set_status,
        name="set_status",
        access=Access.REPORT,
        summary="Set the status of the generation",
        tag="Generation",
        body=Body(schema=SetStatus),
        idempotency_key=True,
        answers=[
            Answer(description="The status", schema=StatusView, headers=["Idempotent-Replayed"])
        ],
        errors=["invalid_request", "invalid_transition", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_SESSION + "/language",
        handler=get_language,
        name="get_language",
        access=Access.FOLLOW,
        summary="Say in which language the session is answered",
        tag="Generation",
        answers=[Answer(description="The language", schema=LanguageView)],
        errors=["corrupt_record"],
    ),
    Operation(
        methods=["PUT"],
        path=_SESSION + "/language",
        handler=set_language,
        name="set_language",
        access=Access.EDIT,
        summary="Set the language that the session is answered in",
        tag="Generation",
        body=Body(schema=SetLanguage),
        idempotency_key=True,
        answers=[
            Answer(description="The language", schema=LanguageView, headers=["Idempotent-Replayed"])
        ],
        errors=["invalid_request"],
    ),
    Operation(
        methods=["GET"],
        path="/api/status/{id}",
        handler=get_short_status,
        name="get_short_status",
        access=Access.FOLLOW,
        summary="Say how far the generation is, in four members",
        tag="Generation",
        answers=[Answer(description="The status", schema=ShortStatusView)],
        errors=["corrupt_record"],
    ),
]
