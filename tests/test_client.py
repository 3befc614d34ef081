"""The HTTP client for generators, against a real service: every call, and every way to miss it."""

import asyncio
import json
import random
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import unquote

import pytest
from httpx2 import AsyncClient
from tenacity import wait_none

import app.client
from app.client import ATTEMPTS, OnboardingClient, RefusedError, UnreachableError
from app.errors import InvalidRequestError, StoreError
from app.onboarding.generation import ProgressEvent
from app.services.files import make_file_service
from app.services.generation import GenerationService
from app.services.manager import make_manager
from app.services.reporter import Desk, ProgressReporter
from app.settings import Settings
from app.store.connect import connect
from tests.api.helpers import (
    DELETE_SESSION,
    FINALIZE,
    GET_EXPORT,
    Answers,
    answer_of,
    create,
    save,
    unknown_id,
)
from tests.events import following
from tests.faults.http_proxy import HttpProxy
from tests.service import BASE

SOON_S = 10.0
"""How long a test waits before it fails for what takes milliseconds."""


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    """Write an answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


PROBLEM = b'{"code": "store_unavailable", "status": 503, "detail": "Try again shortly"}'
AWAY = answer("503 Service Unavailable", PROBLEM, "content-type: application/problem+json")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out every wait before something is tried again."""
    monkeypatch.setattr("app.client._BACKOFF", wait_none())
    monkeypatch.setattr("app.client.COME_BACK_S", 0.01)
    monkeypatch.setattr("app.api.events.RETRY_MS", (10, 20))
    monkeypatch.setattr("app.services.reporter.SEND_AGAIN_S", 0.01)


@pytest.fixture
async def wire(api: AsyncClient) -> AsyncIterator[HttpProxy]:
    """Stand between the client and the service."""
    async with HttpProxy(api.base_url) as wire:
        yield wire


@pytest.fixture
async def client(wire: HttpProxy) -> AsyncIterator[OnboardingClient]:
    async with OnboardingClient(wire.url) as client:
        yield client


async def finalized(api: AsyncClient) -> str:
    """Make a finalized session."""
    session_id = await create(api)
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    return session_id


async def log_of(api: AsyncClient, session_id: str) -> list[Answers]:
    """Read what happened to a session after it was made, in order."""
    events: list[Answers] = answer_of(await api.get(f"{BASE}/{session_id}/events"))["events"]
    assert events[0]["type"] == "session_created"
    return events[1:]


async def report(api: AsyncClient, session_id: str, number: int) -> None:
    body = {"stage": f"stage {number}", "progress": number % 101}
    answer_of(await api.post(f"{BASE}/{session_id}/events", json=body), 201)


# --- What the documentation shows -----------------------------------------------------------------


async def test_the_five_lines_of_the_documentation_make_a_generator(
    api: AsyncClient, wire: HttpProxy
) -> None:
    session_id = await finalized(api)
    assert app.client.__doc__ is not None
    _, _, rest = app.client.__doc__.partition("\n\n")
    shown, _, _ = rest.partition("\n\n")
    lines = textwrap.dedent(shown).replace("http://127.0.0.1:8000", wire.url)
    source = "async def main(session_id, make_manifest):\n" + textwrap.indent(lines, "    ")
    names: dict[str, Any] = {"OnboardingClient": OnboardingClient}
    exec(compile(source, "app/client.py", "exec"), names)

    await names["main"](session_id, lambda export: {"made_of": export["checksum"]})

    assert len(lines.splitlines()) == 5
    export = answer_of(await GET_EXPORT.send(api, session_id))
    result = await api.get(f"{BASE}/{session_id}/result")
    assert result.json() == {"made_of": export["checksum"]}
    assert "bcm.json" in result.headers["content-disposition"]
    told = [
        (each["type"], each.get("status") or each.get("stage"), each.get("progress"))
        for each in (await log_of(api, session_id))[2:]
    ]
    assert ("progress", "answer_generation", 40) in told
    assert ("result_stored", None, None) in told
    assert told[0] == ("status_changed", "processing", None)
    assert told[-2:] == [("progress", "complete", 100), ("status_changed", "complete", None)]
    assert len(told) == 5


# --- Every call -----------------------------------------------------------------------------------


async def test_an_export_comes_as_the_service_gives_it(
    api: AsyncClient, client: OnboardingClient
) -> None:
    session_id = await finalized(api)

    assert await client.get_export(session_id) == answer_of(await GET_EXPORT.send(api, session_id))


async def test_a_status_is_set_and_read(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    processing = await client.update_session_status(session_id, "processing")
    failed = await client.update_session_status(session_id, "error", "the model\u2028has hung up")

    assert (processing["status"], processing["error_message"]) == ("processing", None)
    assert (failed["status"], failed["error_message"]) == ("error", "the model\u2028has hung up")
    assert await client.get_status(session_id) == failed
    assert answer_of(await api.get(f"{BASE}/{session_id}/status")) == failed


async def test_a_report_is_added_with_an_id_of_its_own_or_a_given_one(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    for event_id in (None, None, "e1", "e1"):
        await client.add_progress_event(ProgressEvent(session_id, "a stage", 5, "héllo", event_id))

    log = await log_of(api, session_id)
    assert [(each["stage"], each["progress"], each["message"]) for each in log] == [
        ("a stage", 5, "héllo")
    ] * 3
    assert len({each["event_id"] for each in log}) == 3
    assert log[-1]["event_id"] == "e1"


async def test_a_result_of_bytes_comes_back_byte_for_byte(
    client: OnboardingClient, session_id: str
) -> None:
    for size in (0, 1, 2_000_000):
        result = random.Random(size).randbytes(size)

        told = await client.store_result(session_id, result)

        assert await client.get_result(session_id) == result
        assert (told["size"], told["content_type"]) == (size, "application/octet-stream")


async def test_a_result_that_is_an_object_is_json(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    result = {"title": "Größe \u2028 😀", "numbers": [1, 2.5, 1e300, -0.0], "none": None}

    told = await client.store_result(session_id, result)

    assert repr(json.loads(await client.get_result(session_id))) == repr(result)
    assert told["content_type"] == "application/json"
    stored = await api.get(f"{BASE}/{session_id}/result")
    assert stored.content == await client.get_result(session_id)


async def test_a_result_has_the_name_and_the_type_that_were_given(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    kind = "text/plain; charset=utf-8"
    for filename in ("bcm.json", "Größe 😀 100%.pdf", "a;b='c',d.txt", "дом.json"):
        told = await client.store_result(session_id, b"x", filename=filename, content_type=kind)

        assert told["filename"] == filename
        stored = await api.get(f"{BASE}/{session_id}/result")
        assert stored.headers["content-type"] == kind
        named = stored.headers["content-disposition"].partition("filename*=UTF-8''")[2]
        assert unquote(named) == filename


async def test_the_api_key_goes_with_every_call(wire: HttpProxy, session_id: str) -> None:
    async with OnboardingClient(wire.url, api_key="the-key") as client:
        await client.get_status(session_id)
        async with listening(client, session_id):
            pass

    assert [each.headers["x-api-key"] for each in wire.requests] == ["the-key"] * 2


# --- Refusals -------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[OnboardingClient, str], Awaitable[Any]]] = {
    "get_export": lambda client, session_id: client.get_export(session_id),
    "get_status": lambda client, session_id: client.get_status(session_id),
    "update_session_status": lambda client, session_id: client.update_session_status(
        session_id, "processing"
    ),
    "add_progress_event": lambda client, session_id: client.add_progress_event(
        ProgressEvent(session_id, "a stage", 5)
    ),
    "store_result": lambda client, session_id: client.store_result(session_id, b"x"),
    "get_result": lambda client, session_id: client.get_result(session_id),
    "follow": lambda client, session_id: anext(client.follow(session_id)),
}
"""Every call of the client."""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_an_unknown_session_is_refused_by_every_call_and_asked_for_once(
    wire: HttpProxy, client: OnboardingClient, call: Callable[..., Awaitable[Any]]
) -> None:
    for session_id in (unknown_id(), "../health", "a/b?c", "ü"):
        wire.requests.clear()
        with pytest.raises(RefusedError) as refusal:
            await call(client, session_id)
        assert (refusal.value.code, refusal.value.status) == ("session_not_found", 404)
        assert "no such session" in refusal.value.detail
        assert len(wire.requests) == 1


@pytest.mark.parametrize(
    ("call", "code", "status", "says"),
    [
        (CALLS["get_export"], "export_not_found", 404, "finalize"),
        (CALLS["get_result"], "result_not_found", 404, "generator"),
        (
            lambda client, session_id: client.update_session_status(session_id, "complete"),
            "invalid_transition",
            409,
            "pending",
        ),
        (
            lambda client, session_id: client.update_session_status(session_id, "done"),
            "invalid_request",
            422,
            "status",
        ),
        (
            lambda client, session_id: client.add_progress_event(
                ProgressEvent(session_id, "a stage", 101)
            ),
            "invalid_request",
            422,
            "progress",
        ),
    ],
    ids=["export", "result", "transition", "status", "progress"],
)
async def test_a_refusal_says_what_was_wrong(
    wire: HttpProxy,
    client: OnboardingClient,
    session_id: str,
    call: Callable[..., Awaitable[Any]],
    code: str,
    status: int,
    says: str,
) -> None:
    with pytest.raises(RefusedError) as refusal:
        await call(client, session_id)

    assert (refusal.value.code, refusal.value.status) == (code, status)
    assert says in refusal.value.detail
    assert not isinstance(refusal.value, StoreError)
    assert len(wire.requests) == 1


# --- Sent again -----------------------------------------------------------------------------------


def one_of_each(wire: HttpProxy) -> None:
    wire.refuse(1)
    wire.answer(AWAY)
    wire.lose()


FAULTS: dict[str, Callable[[HttpProxy], None]] = {
    "refused": lambda wire: wire.refuse(3),
    "lost": lambda wire: wire.lose(3),
    "broken-off": lambda wire: wire.break_off(40),
    "503": lambda wire: wire.answer(AWAY, AWAY, AWAY),
    "504": lambda wire: wire.answer(answer("504 Gateway Timeout", b"<html>")),
    "502": lambda wire: wire.answer(answer("502 Bad Gateway", b"<html>")),
    "429": lambda wire: wire.answer(answer("429 Too Many Requests", b"{}", "retry-after: 0")),
    "each-once": one_of_each,
}
"""What can come in the way of a call, three times at most."""


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_call_is_sent_again_and_done_once(
    api: AsyncClient,
    wire: HttpProxy,
    client: OnboardingClient,
    session_id: str,
    fault: Callable[[HttpProxy], None],
) -> None:
    fault(wire)
    await client.update_session_status(session_id, "processing")
    fault(wire)
    await client.add_progress_event(ProgressEvent(session_id, "a stage", 5))
    fault(wire)
    told = await client.store_result(session_id, b"the result")
    fault(wire)
    status = await client.get_status(session_id)
    fault(wire)
    result = await client.get_result(session_id)

    assert [each["type"] for each in await log_of(api, session_id)] == [
        *("status_changed", "progress", "result_stored")
    ]
    assert (status["status"], status["progress"]) == ("processing", 5)
    assert (result, told["size"]) == (b"the result", 10)


@pytest.mark.parametrize(
    "fault",
    [
        lambda wire: wire.refuse(),
        lambda wire: wire.lose(10),
        lambda wire: wire.answer(*[AWAY] * 10),
        lambda wire: wire.answer(*[answer("500 Internal Server Error")] * 10),
        lambda wire: wire.answer(*[b"SSH-2.0-OpenSSH_9.2\r\n"] * 10),
    ],
    ids=["refused", "lost", "503", "empty", "no-http"],
)
async def test_a_service_that_stays_away_is_unreachable_after_four_times(
    wire: HttpProxy,
    client: OnboardingClient,
    session_id: str,
    fault: Callable[[HttpProxy], None],
) -> None:
    before = wire.connections
    fault(wire)

    with pytest.raises(UnreachableError):
        await client.add_progress_event(ProgressEvent(session_id, "a stage", 5))

    assert wire.connections - before == ATTEMPTS == 4


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("404 Not Found", b"<html>no such host</html>"),
        ("403 Forbidden", b'{"message": "Forbidden"}'),
        ("400 Bad Request", b"[]"),
        ("301 Moved Permanently", b""),
    ],
)
async def test_what_somebody_else_refuses_is_refused_at_once(
    wire: HttpProxy, client: OnboardingClient, session_id: str, status: str, body: bytes
) -> None:
    wire.answer(answer(status, body))

    with pytest.raises(RefusedError) as refused:
        await client.get_status(session_id)

    assert (refused.value.code, refused.value.status) == ("unknown", int(status[:3]))


async def test_who_follows_a_service_that_never_does_its_part_is_told(
    wire: HttpProxy, client: OnboardingClient, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.client.COME_BACK_S", 0.01)
    wire.answer(*[answer("503 Service Unavailable")] * 10)

    with pytest.raises(UnreachableError):
        await anext(client.follow(session_id))


@pytest.mark.parametrize("result", [{"a": float("nan")}, {"a": (1, 2)}, "text", None, [1]])
async def test_a_result_that_could_not_be_kept_as_it_is_is_refused(
    client: OnboardingClient, session_id: str, result: Any
) -> None:
    with pytest.raises(InvalidRequestError):
        await client.store_result(session_id, result)
    with pytest.raises(InvalidRequestError):
        await client.store_result(session_id, b"x", content_type="a\r\nb: c")


async def test_an_unreachable_service_is_an_outage_to_who_knows_the_stores(
    wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    wire.refuse()

    with pytest.raises(StoreError) as failure:
        await client.get_status(session_id)

    assert failure.value.code == "store_unavailable"


async def test_a_service_that_says_when_to_come_again_is_left_alone_until_then(
    wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    wire.answer(answer("503 Service Unavailable", PROBLEM, "retry-after: 1"))
    begun_s = time.monotonic()

    await client.get_status(session_id)

    assert time.monotonic() - begun_s >= 1.0
    assert len(wire.requests) == 2


async def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, wire: HttpProxy, session_id: str
) -> None:
    monkeypatch.setattr("app.client.ANSWER_S", 0.2)
    async with OnboardingClient(wire.url) as client:
        wire.say_nothing()
        await client.add_progress_event(ProgressEvent(session_id, "a stage", 5))

    assert len(wire.requests) == 2
    assert len(await log_of(api, session_id)) == 1


# --- Followed live --------------------------------------------------------------------------------


class Listener:
    """Follows a session with the client, and keeps what it is given."""

    def __init__(self, client: OnboardingClient, session_id: str, **how: Any) -> None:
        self.events: list[Answers] = []
        self._events = client.follow(session_id, **how)
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self._events:
            self.events.append(event)

    def of(self, *types: str) -> list[Answers]:
        return [event for event in self.events if event["type"] in types]

    async def wait_for(self, event_type: str, count: int = 1) -> None:
        async with asyncio.timeout(SOON_S):
            while len(self.of(event_type)) < count and not self._task.done():
                await asyncio.sleep(0.005)
        if self._task.done():
            await self._task
        assert len(self.of(event_type)) >= count, self.events

    async def wait_for_the_end(self) -> None:
        async with asyncio.timeout(SOON_S):
            await self._task

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


@asynccontextmanager
async def listening(
    client: OnboardingClient, session_id: str, **how: Any
) -> AsyncIterator[Listener]:
    """Follow a session for the length of a block, from its first snapshot on."""
    listener = Listener(client, session_id, **how)
    try:
        await listener.wait_for("snapshot")
        yield listener
    finally:
        await listener.aclose()


async def test_who_follows_gets_a_snapshot_and_then_everything_until_the_session_is_deleted(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    async with listening(client, session_id) as listener:
        await save(api, session_id)
        answer_of(await FINALIZE.send(api, session_id))
        await report(api, session_id, 7)
        log = await log_of(api, session_id)
        # What a stream has not read yet goes with the session.
        await listener.wait_for("progress")
        answer_of(await DELETE_SESSION.send(api, session_id))
        await listener.wait_for_the_end()

    snapshot, *events, deleted = listener.events
    assert (snapshot["type"], snapshot["status"]) == ("snapshot", "pending")
    assert events == log
    assert [each["type"] for each in events] == ["step_saved", "finalized", "progress"]
    assert deleted["type"] == "deleted"


async def test_who_begins_after_an_event_gets_what_came_later(
    api: AsyncClient, client: OnboardingClient, session_id: str
) -> None:
    for number in range(3):
        await report(api, session_id, number)
    log = await log_of(api, session_id)

    async with listening(client, session_id, last_event_id=log[0]["id"]) as listener:
        await listener.wait_for("progress", 2)

    assert listener.of("progress") == log[1:]


async def test_every_event_comes_once_and_in_order_however_often_the_connection_is_cut(
    api: AsyncClient, wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    chance = random.Random(7)
    async with listening(client, session_id) as listener:
        for number in range(200):
            await report(api, session_id, number)
            if chance.random() < 0.15:
                wire.cut()
        await listener.wait_for("progress", 200)

    assert listener.of("progress") == await log_of(api, session_id)
    assert len(listener.of("snapshot")) > 3
    assert not any(each["gap"] for each in listener.of("snapshot"))


@pytest.mark.parametrize("fault", ["refused", "503", "504", "502", "429"])
async def test_who_follows_comes_back_after_any_fault(
    api: AsyncClient,
    wire: HttpProxy,
    client: OnboardingClient,
    session_id: str,
    fault: str,
) -> None:
    async with listening(client, session_id) as listener:
        FAULTS[fault](wire)
        wire.cut()
        await report(api, session_id, 1)
        await listener.wait_for("progress")

    assert [each["type"] for each in listener.events] == ["snapshot", "snapshot", "progress"]


async def test_who_follows_comes_back_after_bye_when_the_service_wants_it(
    api: AsyncClient, wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    [created] = answer_of(await api.get(f"{BASE}/{session_id}/events"))["events"]
    said = (
        "retry: 30\n\n"
        f'id: {created["id"]}\nevent: snapshot\ndata: {{"type": "snapshot"}}\n\n'
        ": still here\n\n"
        'event: bye\ndata: {"type": "bye", "reason": "stopping"}\n\n'
    )
    wire.answer(answer("200 OK", said.encode(), "content-type: text/event-stream"))

    async with listening(client, session_id) as listener:
        await listener.wait_for("snapshot", 2)
        await report(api, session_id, 1)
        await listener.wait_for("progress")

    assert [each["type"] for each in listener.events] == ["snapshot", "bye", "snapshot", "progress"]
    first, second = wire.requests
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"] == created["id"]


async def test_a_stream_that_falls_silent_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, api: AsyncClient, wire: HttpProxy, session_id: str
) -> None:
    monkeypatch.setattr("app.client.SILENCE_S", 0.2)
    async with OnboardingClient(wire.url) as client:
        wire.say_nothing(2)
        async with listening(client, session_id) as listener:
            await report(api, session_id, 1)
            await listener.wait_for("progress")
            await listener.wait_for("snapshot", 2)

    assert len(listener.of("progress")) == 1


async def test_who_finds_no_room_waits_until_there_is(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Awaitable[Any]]
) -> None:
    # The service asks for 5 s.
    monkeypatch.setattr("app.client.LONGEST_PAUSE_S", 0.2)
    api = await serve(max_streams_per_session=1)
    session_id = await create(api)
    async with (
        HttpProxy(api.base_url) as wire,
        OnboardingClient(wire.url) as client,
    ):
        async with following(api.base_url, session_id):
            listener = Listener(client, session_id)
            async with asyncio.timeout(SOON_S):
                while len(wire.requests) < 2:
                    await asyncio.sleep(0.005)
            assert listener.events == []
        await listener.wait_for("snapshot")
        await listener.aclose()


async def test_an_event_comes_as_it_was_written_whatever_its_text_looks_like(
    client: OnboardingClient, session_id: str
) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\u00a0b", "data: x", ": a", "a: b: c", "😀", "id:"]
    async with listening(client, session_id) as listener:
        for text in texts:
            await client.add_progress_event(ProgressEvent(session_id, text, 5, text))
        await listener.wait_for("progress", len(texts))

    told = [(event["stage"], event["message"]) for event in listener.of("progress")]
    assert told == [(text, text) for text in texts]


async def test_who_comes_back_after_the_session_was_deleted_is_told_so(
    api: AsyncClient, wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    async with listening(client, session_id) as listener:
        wire.refuse()
        wire.cut()
        answer_of(await DELETE_SESSION.send(api, session_id))
        wire.accept()
        with pytest.raises(RefusedError) as refusal:
            await listener.wait_for_the_end()

    assert refusal.value.code == "session_not_found"


# --- The reporter ---------------------------------------------------------------------------------


async def run_stages(desk: Desk, session_id: str) -> None:
    async with ProgressReporter(session_id, desk) as report:
        report("knowledge_search")
        report("answer_generation", 55, "Half way there")
        report("a stage of its own", 60)


async def run_questions(desk: Desk, session_id: str) -> None:
    async with ProgressReporter(session_id, desk, questions=3) as report:
        for number in (2, 0, 1):
            callback = report.question(number)
            for stage in ("knowledge_search", "answer_generation", "complete"):
                callback(stage)


async def run_in_a_thread(desk: Desk, session_id: str) -> None:
    def work(progress_callback: Callable[[str, int, str], None]) -> None:
        for number in range(20):
            progress_callback("a stage", number, f"number {number}")

    async with ProgressReporter(session_id, desk) as report:
        await asyncio.to_thread(work, report)


async def run_and_fail(desk: Desk, session_id: str) -> None:
    with suppress(ZeroDivisionError):
        async with ProgressReporter(session_id, desk) as report:
            report("knowledge_search")
            report("visual_detection", 1 // 0)


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[GenerationService]:
    """Give the generation service without HTTP, on the same store."""
    gateway = connect(settings)
    files = make_file_service(gateway, make_manager(gateway, settings), settings)
    service = GenerationService(gateway, files)
    yield service
    await service.aclose()


@pytest.mark.parametrize("run", [run_stages, run_questions, run_in_a_thread, run_and_fail])
async def test_a_run_is_reported_over_the_client_as_it_is_over_the_service(
    api: AsyncClient,
    wire: HttpProxy,
    client: OnboardingClient,
    service: GenerationService,
    run: Callable[[Desk, str], Awaitable[None]],
) -> None:
    seen = []
    for desk in (client, service):
        session_id = await create(api)
        if desk is client:
            one_of_each(wire)
        await run(desk, session_id)
        log = await log_of(api, session_id)
        own = {"id", "at", "event_id"}
        told = [{name: each[name] for name in each.keys() - own} for each in log]
        status = answer_of(await api.get(f"{BASE}/{session_id}/status"))
        seen.append((told, {**status, "session_id": None, "updated_at": None}))

    assert seen[0] == seen[1]
    assert len(seen[0][0]) >= 3


async def test_reports_wait_for_a_service_that_is_away_and_keep_their_order(
    api: AsyncClient, wire: HttpProxy, client: OnboardingClient, session_id: str
) -> None:
    async with client.report(session_id) as report:
        report("knowledge_search")
        wire.refuse()
        wire.cut()
        for number in range(11, 30):
            report("a stage", number)
        async with asyncio.timeout(SOON_S):
            before = wire.connections
            while wire.connections < before + 2 * ATTEMPTS:
                await asyncio.sleep(0.005)
        wire.accept()

    reports = [each for each in await log_of(api, session_id) if each["type"] == "progress"]
    assert [each["progress"] for each in reports] == [10, *range(11, 30), 100]
