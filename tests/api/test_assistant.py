"""Questions over HTTP: answered at once, read along, listed; how many, and who goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from httpx2 import AsyncClient, Limits, Response
from redis.asyncio import Redis

from tests import agents
from tests.agents import AGENT, Book
from tests.api.helpers import (
    FINALIZE,
    GET_PROGRESS,
    GET_SUMMARY,
    Answers,
    answer_of,
    commands,
    create,
    events_of,
    is_time,
    pointers_of,
    problem_of,
    save,
    unknown_id,
)
from tests.service import BASE

Serve = Callable[..., Any]

ANSWER = {"answer", "confidence", "processing_stage", "processing_time_ms"}
ASKED = {"question", "answer", "confidence", "processing_time_ms", "at"}


@pytest.fixture
def book() -> Book:
    """Give what the agents of a test write into."""
    return agents.new_book()


@pytest.fixture
async def rehearsed(serve: Serve, book: Book) -> AsyncClient:
    """Serve with agents that do what the question says, on however slow a machine."""
    patient = {"redis_timeout_s": 10, "request_deadline_s": 60}
    api: AsyncClient = await serve(agent=AGENT, asks_per_second=10_000, **patient)
    return api


async def ask(api: AsyncClient, session_id: str, question: Any) -> Response:
    return await api.post(f"{BASE}/{session_id}/ask", json={"question": question})


async def history_of(api: AsyncClient, session_id: str) -> list[Answers]:
    """Read the history, checking its shape."""
    answer = answer_of(await api.get(f"{BASE}/{session_id}/history"))
    assert answer.keys() == {"history"}
    assert all(each.keys() == ASKED and is_time(each["at"]) for each in answer["history"])
    history: list[Answers] = answer["history"]
    return history


class Said(NamedTuple):
    """An event of a stream."""

    type: str
    data: Answers


class Reading:
    """Reads along on a connection of its own, which can be closed at any moment."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.head = ""

    async def begin(self) -> None:
        self.head = (await self._reader.readuntil(b"\r\n\r\n")).decode()

    async def receive(self) -> Said | None:
        """Give the next event, None at the end; comments are passed over."""
        async with asyncio.timeout(10):
            while True:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                text = (await self._reader.readexactly(size + 2))[:-2].decode()
                if size == 0:
                    return None
                if not text.startswith(":"):
                    break
        kind, data, *rest = text.split("\n")
        assert rest == ["", ""]
        assert kind.startswith("event: ")
        assert data.startswith("data: ")
        return Said(kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))

    async def wait_for_beats(self, count: int) -> None:
        async with asyncio.timeout(10):
            for _ in range(count):
                await self._reader.readuntil(b": still here\n\n\r\n")

    async def receive_all(self) -> list[Said]:
        received = []
        while (said := await self.receive()) is not None:
            received.append(said)
        return received

    def leave(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def reading(api: AsyncClient, session_id: str, question: str) -> AsyncIterator[Reading]:
    """Ask and read along for the length of a block."""
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    body = json.dumps({"question": question}).encode()
    lines = [
        f"POST {BASE}/{session_id}/ask-stream HTTP/1.1",
        *("host: test", "content-type: application/json", f"content-length: {len(body)}"),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    stream = Reading(reader, writer)
    try:
        await stream.begin()
        yield stream
    finally:
        writer.close()


# --- POST /ask ------------------------------------------------------------------------------------


async def test_a_question_is_answered_from_the_help_texts(
    api: AsyncClient, session_id: str
) -> None:
    answer = answer_of(await ask(api, session_id, "Where do I enter our prices?"))
    assert answer.keys() == {*ANSWER, "step_id"}
    assert answer["step_id"] == 5
    assert "costs" in answer["answer"]
    assert 0.25 <= answer["confidence"] <= 1
    assert answer["processing_stage"] == "completed"
    assert isinstance(answer["processing_time_ms"], int)


async def test_where_nothing_comes_close_enough_the_answer_is_null(
    api: AsyncClient, session_id: str
) -> None:
    answer = answer_of(await ask(api, session_id, "What is the boiling point of water?"))
    assert answer.keys() == ANSWER
    assert answer["answer"] is None
    assert 0 <= answer["confidence"] < 0.25
    assert answer["processing_stage"] == "completed"


@pytest.mark.parametrize(
    "question", ["?", "a\nb\tc", " ", "x" * 2000, "😀" * 2000, '"; DROP TABLE entries; --', "NEAR("]
)
async def test_any_text_may_be_asked(api: AsyncClient, session_id: str, question: str) -> None:
    assert answer_of(await ask(api, session_id, question)).keys() >= ANSWER
    assert [each["question"] for each in await history_of(api, session_id)] == [question]


@pytest.mark.parametrize("path", ["ask", "ask-stream"])
@pytest.mark.parametrize(
    "body",
    [
        *({}, {"question": ""}, {"question": "x" * 2001}, {"question": 5}, {"question": None}),
        *({"question": ["a"]}, {"question": "a\0"}, {"question": "a\r\nb"}, {"question": "\x7f"}),
    ],
    ids=lambda body: ascii(body)[:30],
)
async def test_what_is_no_question_is_refused_and_costs_the_store_nothing(
    api: AsyncClient, raw: Redis, session_id: str, path: str, body: Any
) -> None:
    before = await commands(raw)
    response = await api.post(f"{BASE}/{session_id}/{path}", json=body)
    assert pointers_of(problem_of(response, "invalid_request")) == {"/question"}
    assert await commands(raw) == before


@pytest.mark.parametrize("path", ["ask", "ask-stream"])
async def test_an_unknown_session_is_not_found_before_any_agent_is_made(
    rehearsed: AsyncClient, raw: Redis, book: Book, path: str
) -> None:
    for session_id in (unknown_id(), "no-uuid"):
        target = f"{BASE}/{session_id}/{path}"
        response = await rehearsed.post(target, json={"question": "quick"})
        problem_of(response, "session_not_found")
        problem_of(await rehearsed.get(f"{BASE}/{session_id}/history"), "session_not_found")
    assert book.contexts == []
    assert await raw.exists("onboarding:rate:asks") == 0


async def test_an_answer_costs_three_round_trips_and_the_history_one(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    async def scripts() -> int:
        return (await commands(raw)).get("cmdstat_evalsha", 0)

    # The store learns the scripts first.
    answer_of(await ask(api, session_id, "What is a draft?"))
    await history_of(api, session_id)
    before = await scripts()
    answer_of(await ask(api, session_id, "What is a draft?"))
    asked = await scripts()
    await history_of(api, session_id)
    assert (asked - before, await scripts() - asked) == (3, 1)


async def test_questions_change_nothing_but_the_history_and_the_counts(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    before = answer_of(await GET_SUMMARY.send(api, session_id))
    events = await events_of(raw, session_id)
    assert before["stats"]["request_count"] == before["stats"]["total_processing_ms"] == 0

    took = 0
    for question in ("What is a draft?", "xyzzy", "What is an ICP?"):
        took += answer_of(await ask(api, session_id, question))["processing_time_ms"]

    after = answer_of(await GET_SUMMARY.send(api, session_id))
    stats = after.pop("stats")
    assert (stats.pop("request_count"), stats.pop("total_processing_ms")) == (3, took)
    age = stats.pop("session_age_seconds")
    first = before.pop("stats")
    assert age >= first.pop("session_age_seconds")
    assert first == {**stats, "request_count": 0, "total_processing_ms": 0}
    assert after == before
    assert await events_of(raw, session_id) == events


async def test_the_history_has_the_last_ten_oldest_first(
    rehearsed: AsyncClient, session_id: str
) -> None:
    assert await history_of(rehearsed, session_id) == []
    questions = [f"question {number}" for number in range(12)]
    for question in questions:
        answer_of(await ask(rehearsed, session_id, question))
    history = await history_of(rehearsed, session_id)
    assert [each["question"] for each in history] == questions[2:]
    assert {(each["answer"], each["confidence"]) for each in history} == {("an answer", 0.9)}


async def test_a_damaged_history_is_an_error_and_harms_nothing_else(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await raw.set(f"onboarding:{session_id}:history", "x", ex=60)
    problem_of(await ask(api, session_id, "What is a draft?"), "corrupt_record")
    problem_of(await api.get(f"{BASE}/{session_id}/history"), "corrupt_record")
    answer_of(await GET_SUMMARY.send(api, session_id))
    await save(api, session_id)


@pytest.mark.parametrize("question", ["fail", "no result", "no confidence", "cancel yourself"])
async def test_an_agent_that_fails_is_an_error_that_tells_nothing(
    rehearsed: AsyncClient, session_id: str, book: Book, question: str
) -> None:
    response = await ask(rehearsed, session_id, question)
    problem_of(response, "internal_error")
    assert b"secret" not in response.content
    assert (book.begun, book.closed) == (1, 1)
    assert await history_of(rehearsed, session_id) == []


async def test_an_agent_that_takes_too_long_is_ended(serve: Serve, book: Book) -> None:
    api: AsyncClient = await serve(agent=AGENT, request_deadline_s=0.2)
    session_id = await create(api)
    problem_of(await ask(api, session_id, "silent"), "deadline_exceeded")
    await book.wait_for(closed=1)
    assert book.running == 0
    assert answer_of(await ask(api, session_id, "quick"))["answer"] == "an answer"


# --- POST /ask-stream -----------------------------------------------------------------------------


async def test_who_reads_along_sees_stages_chunks_and_the_answer(
    api: AsyncClient, session_id: str
) -> None:
    async with reading(api, session_id, "What is step 5 about?") as stream:
        first, *chunks, done = await stream.receive_all()
    head = stream.head.lower()
    assert head.startswith("http/1.1 200 ")
    assert "content-type: text/event-stream" in head
    assert "cache-control: no-store" in head
    assert "x-request-id: " in head
    assert first == Said("stage", {"stage": "searching"})
    assert {each.type for each in chunks} == {"chunk"}
    assert len(chunks) > 1
    assert done.type == "done"
    assert done.data.keys() == {*ANSWER, "step_id"}
    assert "".join(each.data["text"] for each in chunks) == done.data["answer"]
    [asked] = await history_of(api, session_id)
    assert {name: asked[name] for name in ASKED & ANSWER} == {
        name: done.data[name] for name in ASKED & ANSWER
    }


async def test_an_unknown_answer_ends_the_stream_with_null(
    rehearsed: AsyncClient, session_id: str
) -> None:
    async with reading(rehearsed, session_id, "unknown") as stream:
        said = await stream.receive_all()
    assert [each.type for each in said] == ["stage", "done"]
    assert said[-1].data["answer"] is None
    assert said[-1].data["confidence"] == 0.1


async def test_what_is_said_comes_when_it_is_said(
    rehearsed: AsyncClient, session_id: str, book: Book
) -> None:
    async with reading(rehearsed, session_id, "talk, then wait") as stream:
        assert await stream.receive() == Said("stage", {"stage": "thinking"})
        assert await stream.receive() == Said("chunk", {"text": "begun "})
        assert book.running == 1
        book.gate.set()
        assert [each.type for each in await stream.receive_all()] == ["chunk", "chunk", "done"]


@pytest.mark.parametrize("question", ["wait", "talk, then wait", "silent"])
async def test_a_reader_who_leaves_ends_the_agent_within_a_tenth_of_a_second(
    rehearsed: AsyncClient, session_id: str, book: Book, question: str
) -> None:
    loop = asyncio.get_running_loop()
    for count in range(1, 6):
        async with reading(rehearsed, session_id, question) as stream:
            assert await stream.receive() == Said("stage", {"stage": "thinking"})
            left_at = loop.time()
            stream.leave()
            await book.wait_for(closed=count)
        assert book.closed_at[-1] - left_at < 0.1
        assert book.running == 0
    assert await history_of(rehearsed, session_id) == []


async def test_an_agent_that_fails_midway_ends_the_stream_with_a_problem(
    rehearsed: AsyncClient, session_id: str, book: Book
) -> None:
    async with reading(rehearsed, session_id, "fail") as stream:
        stage, error = await stream.receive_all()
    assert stage.type == "stage"
    assert error.type == "error"
    assert error.data["code"] == "internal_error"
    assert error.data["instance"] == f"{BASE}/{session_id}/ask-stream"
    assert f"x-request-id: {error.data['request_id']}" in stream.head.lower()
    assert "secret" not in str(error)
    assert book.closed == 1
    assert await history_of(rehearsed, session_id) == []


async def test_an_agent_that_falls_silent_ends_the_stream_with_a_problem(
    serve: Serve, book: Book
) -> None:
    api: AsyncClient = await serve(agent=AGENT, request_deadline_s=0.2)
    session_id = await create(api)
    async with reading(api, session_id, "silent") as stream:
        stage, error = await stream.receive_all()
    assert (stage.type, error.type) == ("stage", "error")
    assert error.data["code"] == "deadline_exceeded"
    assert (book.closed, book.running) == (1, 0)


async def test_a_silent_stream_is_kept_alive(
    rehearsed: AsyncClient, session_id: str, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.assistant.BEAT_S", 0.01)
    async with reading(rehearsed, session_id, "wait") as stream:
        assert (await stream.receive()) == Said("stage", {"stage": "thinking"})
        await stream.wait_for_beats(2)
        book.gate.set()
        assert [each.type for each in await stream.receive_all()] == ["chunk", "chunk", "done"]


# --- How many -------------------------------------------------------------------------------------


async def test_of_500_at_once_ten_run_others_wait_and_the_rest_are_refused_while_others_are_served(
    rehearsed: AsyncClient, session_id: str, book: Book
) -> None:
    async def ask_many() -> list[Response]:
        # Beside the client of the others, and with as many connections as there are questions.
        limits = Limits(max_connections=500)
        async with AsyncClient(base_url=rehearsed.base_url, limits=limits, timeout=30) as many:
            return await asyncio.gather(*(ask(many, session_id, "wait") for _ in range(500)))

    answering = asyncio.create_task(ask_many())
    await book.wait_for(running=10)
    for _ in range(20):
        async with asyncio.timeout(5):
            answer_of(await GET_PROGRESS.send(rehearsed, session_id))
            assert (await rehearsed.get("/livez")).status_code == 200
    assert book.most_running == 10
    book.gate.set()

    responses = await answering
    answered = [each for each in responses if each.status_code == 200]
    refused = [each for each in responses if each.status_code != 200]
    assert len(refused) == 500 - len(answered)
    assert len(answered) >= 10
    assert book.most_running == 10
    assert book.closed == len(answered)
    for response in refused:
        # On a slow machine so many connections may find the store's all taken.
        assert response.json()["code"] in {"rate_limited", "overloaded"}
        assert int(response.headers["retry-after"]) >= 1
    summary = answer_of(await GET_SUMMARY.send(rehearsed, session_id))
    assert summary["stats"]["request_count"] == len(answered)


async def test_all_processes_together_take_so_many_a_second(
    serve: Serve, raw: Redis, book: Book
) -> None:
    services = [await serve(agent=AGENT, asks_per_second=5) for _ in range(2)]
    session_id = await create(services[0])
    answers = await asyncio.gather(*(ask(services[n % 2], session_id, "quick") for n in range(20)))
    assert sorted(each.status_code for each in answers) == [200] * 5 + [429] * 15
    for response in answers:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            problem_of(response, "rate_limited")
    # What is not asked is not limited, and a second later there is room again.
    assert len(await history_of(services[0], session_id)) == 5
    await raw.delete("onboarding:rate:asks")
    answer_of(await ask(services[1], session_id, "quick"))


async def test_a_stream_that_is_refused_is_a_problem_and_no_stream(
    serve: Serve, book: Book
) -> None:
    api: AsyncClient = await serve(agent=AGENT, asks_per_second=1)
    session_id = await create(api)
    answer_of(await ask(api, session_id, "quick"))
    response = await api.post(f"{BASE}/{session_id}/ask-stream", json={"question": "quick"})
    problem_of(response, "rate_limited")
    assert book.begun == 1


async def test_a_limit_that_cannot_be_looked_up_stops_nobody(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await raw.set("onboarding:rate:asks", "no list", ex=60)
    answer_of(await ask(api, session_id, "What is a draft?"))
