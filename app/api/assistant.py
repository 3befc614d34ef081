"""Questions over HTTP: answered at once, or read along while they are answered."""

import asyncio
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.calls import Call
from app.api.events import BEAT_S
from app.api.operations import Answer, Body, Operation
from app.api.problems import describe
from app.api.streaming import BEAT, EVENT_STREAM, Outlet, write_event
from app.errors import OnboardingError
from app.onboarding.access import Access
from app.onboarding.assistant import (
    MAX_QUESTION_LENGTH,
    QUESTION_PATTERN,
    AnswerView,
    Chunk,
    HistoryView,
    Result,
    Stage,
)
from app.services.assistant import Answering, AssistantService

_QUESTION = StringConstraints(
    min_length=1, max_length=MAX_QUESTION_LENGTH, pattern=QUESTION_PATTERN
)


class AskQuestion(BaseModel):
    """A question about the wizard or one of its steps."""

    model_config = ConfigDict(strict=True, extra="ignore")

    question: Annotated[str, _QUESTION]


async def ask_question(call: Call) -> "AwaitedAnswer":
    """Answer a question."""
    asked = call.parse(AskQuestion)
    # Before anything is begun: of a flood, most end here.
    call.services.assistant.check_place(call.session_id)
    return AwaitedAnswer(call, asked.question)


async def stream_answer(call: Call) -> "AnswerStream":
    """Answer a question for who reads along."""
    asked = call.parse(AskQuestion)
    assistant = call.services.assistant
    return AnswerStream(assistant, await assistant.begin(call.session_id, asked.question))


async def get_history(call: Call) -> ASGIApp:
    """List the last questions with their answers."""
    history = await call.services.assistant.get_history(call.session_id)
    return call.answer(HistoryView(history=history))


class AwaitedAnswer:
    """An answer that is worked on as long as its client waits for it."""

    def __init__(self, call: Call, question: str) -> None:
        self._call = call
        self._question = question

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and send the answer. Raises what asking raises, and `ClientDisconnect`."""
        assistant, session_id = self._call.services.assistant, self._call.session_id
        asking = asyncio.create_task(assistant.ask(session_id, self._question))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([asking, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ClientDisconnect
            response = self._call.answer(asking.result())
        finally:
            leaving.cancel()
            asking.cancel()
            # Its agent is closed before anything else is done.
            await asyncio.wait([asking])
        await response(scope, receive, send)


class AnswerStream:
    """A stream of server-sent events that ends with the answer, or when its client leaves."""

    def __init__(self, assistant: AssistantService, answering: Answering) -> None:
        self._assistant = assistant
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what the agent says as it says it."""
        outlet = Outlet(scope, send)
        leaving = asyncio.create_task(self._leave(receive))
        try:
            await outlet.begin(200, EVENT_STREAM)
            try:
                await self._stream(outlet)
            except OnboardingError as error:
                # The head is sent: what would have been the answer is the last event.
                problem = bytes(describe(scope, error).body)
                await outlet.write(write_event("error", problem))
            await outlet.write(b"", more=False)
        finally:
            leaving.cancel()
            await self._answering.aclose()

    async def _stream(self, outlet: Outlet) -> None:
        answering = self._answering
        while not answering.is_over:
            match await answering.hear(BEAT_S):
                case Stage(name):
                    await outlet.write(_write("stage", {"stage": name}))
                case Chunk(text):
                    await outlet.write(_write("chunk", {"text": text}))
                case Result() as result:
                    answer = await self._assistant.keep(answering, result)
                    await outlet.write(_write("done", answer))
                    return
                case None if not answering.is_over:
                    await outlet.write(BEAT)
        if answering.is_stopping:
            await outlet.write(_write("bye", {"type": "bye", "reason": "stopping"}))

    async def _leave(self, receive: Receive) -> None:
        await _left(receive)
        self._answering.leave()


async def _left(receive: Receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _write(kind: str, data: object) -> bytes:
    return write_event(kind, orjson.dumps(data))


_SESSION = "/api/v1/onboarding/{id}"

_EVENT: dict[str, Any] = {
    "description": "One event of the stream; `data` is an object, as JSON",
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["stage", "chunk", "done", "error", "bye"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

OPERATIONS = [
    Operation(
        methods=["POST"],
        path=_SESSION + "/ask",
        handler=ask_question,
        name="ask_question",
        access=Access.EDIT,
        at_once="own",
        summary="Ask a question about the wizard",
        tag="Questions",
        body=Body(schema=AskQuestion),
        answers=[Answer(description="The answer, null when none is known", schema=AnswerView)],
        errors=["invalid_request", "rate_limited", "corrupt_record"],
    ),
    Operation(
        methods=["POST"],
        path=_SESSION + "/ask-stream",
        handler=stream_answer,
        name="stream_answer",
        access=Access.EDIT,
        at_once="own",
        summary="Ask a question, and read along while it is answered",
        tag="Questions",
        body=Body(schema=AskQuestion),
        answers=[
            Answer(
                description="Server-sent events: any number of `stage` and `chunk`, then `done` "
                "with the answer, or `error` with a problem; `bye` when the service stops",
                schema=_EVENT,
                media_type="text/event-stream",
            )
        ],
        errors=["invalid_request", "rate_limited", "corrupt_record"],
    ),
    Operation(
        methods=["GET"],
        path=_SESSION + "/history",
        handler=get_history,
        name="get_history",
        access=Access.EDIT,
        summary="List the last 10 questions with their answers, oldest first",
        tag="Questions",
        answers=[Answer(description="The questions", schema=HistoryView)],
        errors=["corrupt_record"],
    ),
]
