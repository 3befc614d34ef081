"""What each call costs on the wire, and that answers keep their bytes."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import orjson
import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.errors import InvalidStepDataError
from app.onboarding.documents import Document
from app.onboarding.events import BEFORE_ALL
from app.onboarding.files import PART_BYTES
from app.onboarding.generation import ProgressEvent
from app.onboarding.steps import Precondition, Tags
from tests.conftest import UNLIMITED, known_settings
from tests.faults.proxy import Proxy
from tests.service import BASE, serving
from tests.store.sessions import Call, Place, keyed, prepare, working_at


@pytest.fixture
async def wired(proxy: Proxy) -> AsyncIterator[Place]:
    """A manager behind the proxy that waits long enough for every reply: none is lost here."""
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with working_at(url, redis_timeout_s=10) as place:
        yield place


class Cost(NamedTuple):
    """How many commands a call of the manager may send, once the scripts are loaded."""

    call: Call
    commands: int
    finalized: bool = False


COSTS = {
    "create a session": Cost(lambda p, _: p.manager.create_session(workspace_id="w"), 1),
    "read a session": Cost(lambda p, s: p.manager.get_session(s), 1),
    "set metadata": Cost(lambda p, s: p.manager.set_metadata(s, "u", "w"), 1),
    "save a new step": Cost(lambda p, s: p.manager.save_step(s, 9, {"a": 1}), 1),
    "save a step over another": Cost(lambda p, s: p.manager.save_step(s, 1, {"a": 2}), 1),
    "save a step if it matches": Cost(
        lambda p, s: p.manager.save_step(
            s, 1, {"a": 2}, precondition=Precondition(Tags(any_version=True))
        ),
        1,
    ),
    "save a step with an Idempotency-Key": Cost(
        lambda p, s: p.manager.save_step(s, 1, {"a": 2}, request=keyed()), 1
    ),
    "save 23 steps": Cost(
        lambda p, s: p.manager.save_steps(s, {n: {"a": n} for n in range(1, 24)}), 1
    ),
    "read a step": Cost(lambda p, s: p.manager.get_step(s, 1), 1),
    "read all steps": Cost(lambda p, s: p.manager.get_all_steps(s), 1),
    "patch a step": Cost(lambda p, s: p.manager.patch_step(s, 1, {"b": 1}), 2),
    "delete a step": Cost(lambda p, s: p.manager.delete_step(s, 1), 1),
    "save a draft": Cost(lambda p, s: p.manager.save_draft(s, 1, {"a": 1}), 1),
    "read a draft": Cost(lambda p, s: p.manager.get_draft(s, 3), 1),
    "drop a draft": Cost(lambda p, s: p.manager.delete_draft(s, 3), 1),
    "promote a draft": Cost(lambda p, s: p.manager.promote_draft_to_step(s, 3), 2),
    "read the progress": Cost(lambda p, s: p.manager.get_progress(s), 1),
    "view the progress": Cost(lambda p, s: p.manager.view_progress(s), 1),
    "raise the mark": Cost(lambda p, s: p.manager.update_progress(s, 9), 1),
    "summarize": Cost(lambda p, s: p.manager.get_session_summary(s), 1),
    "finalize": Cost(lambda p, s: p.manager.finalize(s), 2),
    "finalize again": Cost(lambda p, s: p.manager.finalize(s), 2, finalized=True),
    "read the export": Cost(lambda p, s: p.manager.get_export(s), 1, finalized=True),
    "reopen": Cost(lambda p, s: p.manager.reopen(s), 1, finalized=True),
    "read the status": Cost(lambda p, s: p.generation.get_status(s), 1),
    "read the latest progress": Cost(lambda p, s: p.generation.get_latest_progress(s), 1),
    "set the status": Cost(lambda p, s: p.generation.update_session_status(s, "processing"), 1),
    "add a report": Cost(
        lambda p, s: p.generation.add_progress_event(ProgressEvent(s, "a", 1, None, "id")), 1
    ),
    "read the reports": Cost(lambda p, s: p.generation.get_progress_events(s), 1),
    "read the log": Cost(lambda p, s: p.events.list_after(s, BEFORE_ALL, 10), 1),
    "read the scene": Cost(lambda p, s: p.events.get_scene(s), 1),
    "read the language": Cost(lambda p, s: p.generation.get_language_preference(s), 1),
    "set the language": Cost(lambda p, s: p.generation.set_language_preference(s, "de"), 1),
    "store a result of three parts": Cost(
        lambda p, s: p.generation.store_result(s, b"x" * (2 * PART_BYTES + 1)), 4
    ),
    "read that there is no result": Cost(lambda p, s: p.generation.get_result(s), 1),
    "delete a session": Cost(lambda p, s: p.manager.delete_session(s), 1),
    "delete a finalized session": Cost(lambda p, s: p.manager.delete_session(s), 1, finalized=True),
}


@pytest.mark.parametrize("name", COSTS)
async def test_a_call_sends_no_more_commands_than_this(
    wired: Place, proxy: Proxy, name: str
) -> None:
    cost = COSTS[name]
    # The first round loads the scripts and opens the connection.
    await cost.call(wired, await prepare(wired.manager, finalized=cost.finalized))
    session_id = await prepare(wired.manager, finalized=cost.finalized)
    before = proxy.commands.copy()

    await cost.call(wired, session_id)

    sent = proxy.commands - before
    assert sent.total() <= cost.commands, sent
    assert sent.total() >= 1


class Exchange(NamedTuple):
    """A call over HTTP on a session that has a result and a file, and what it may send."""

    method: str
    target: str
    commands: int
    body: Any = None
    content: bytes | None = None
    headers: dict[str, str] | None = None
    status: int = 200


THREE_PARTS = b"x" * (2 * PART_BYTES + 1)
FORM = {"content-type": "multipart/form-data; boundary=b"}

EXCHANGES = {
    "read the status": Exchange("GET", "{s}/status", 1),
    "read the status in short": Exchange("GET", "/api/status/{id}", 1),
    "set the status": Exchange("PUT", "{s}/status", 1, {"status": "processing"}),
    "report progress": Exchange(
        "POST", "{s}/events", 1, {"stage": "a", "progress": 1, "event_id": "e"}, status=201
    ),
    "read the log": Exchange("GET", "{s}/events", 1),
    "read the language": Exchange("GET", "{s}/language", 1),
    "set the language": Exchange("PUT", "{s}/language", 1, {"language": "de"}),
    "store a result of three parts": Exchange(
        "PUT", "{s}/result", 4, content=THREE_PARTS, status=201
    ),
    "store a result of one part": Exchange("PUT", "{s}/result", 2, content=b"x", status=201),
    "store a result of none": Exchange("PUT", "{s}/result", 1, content=b"", status=201),
    "fetch a result of one part": Exchange("GET", "{s}/result", 1),
    "fetch it at its other path": Exchange("GET", "/api/download/{id}", 1),
    "fetch nothing that is known": Exchange(
        "GET", "{s}/result", 1, headers={"if-none-match": "*"}, status=304
    ),
    "look at a result": Exchange("HEAD", "{s}/result", 1),
    "fetch a file of three parts": Exchange("GET", "{s}/upload", 3),
    "make a session with a file of one part": Exchange(
        *("POST", "/api/upload", 2),
        content=b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
        headers=FORM,
        status=201,
    ),
}

BESIDE_REQUESTS = {"EVAL", "AUDIT", "HKEYS", "INFO", "HELLO", "CLIENT", "SELECT"}
"""What the health probe, the look at the catalogues, the record and new connections send."""


@pytest.fixture
async def wired_api(proxy: Proxy) -> AsyncIterator[AsyncClient]:
    """The service behind the proxy."""
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with serving(known_settings(redis_url=url, redis_timeout_s=10, **UNLIMITED)) as api:
        yield api


@pytest.mark.parametrize("name", EXCHANGES)
async def test_a_call_over_http_sends_exactly_these_commands(
    wired_api: AsyncClient, proxy: Proxy, name: str
) -> None:
    exchange = EXCHANGES[name]

    async def do() -> dict[str, int]:
        form = {"file": ("a.txt", THREE_PARTS)}
        made = await wired_api.post("/api/upload", files=form)
        session_id = made.json()["session_id"]
        stored = await wired_api.put(f"{BASE}/{session_id}/result", content=b"result")
        assert (made.status_code, stored.status_code) == (201, 201)
        target = exchange.target.replace("{s}", f"{BASE}/{session_id}")
        before = proxy.commands.copy()
        answer = await wired_api.request(
            exchange.method,
            target.replace("{id}", session_id),
            headers=exchange.headers,
            content=exchange.content,
            json=exchange.body,
        )
        assert answer.status_code == exchange.status, answer.text
        sent = proxy.commands - before
        return {word: count for word, count in sent.items() if word not in BESIDE_REQUESTS}

    # The first round loads the scripts.
    await do()
    sent = await do()
    assert sum(sent.values()) == exchange.commands, sent


ODDLY_SPELLED = [
    b'{"a": 1.50 ,"b":[ ]}',
    b'{"a":{},"b":[],"c":[{}],"d":[[]]}',
    b'\t{ "a" :\n1e2 }\r\n',
    b'{"a":1.0,"b":-0,"c":-0.0,"d":1E+2,"e":0.1e-7}',
    b'{"a":9007199254740991,"b":0.30000000000000004}',
    b'{"b":1,"a":2}',
    rb'{"a":"\u00e9\/\u0000\ud83d\ude00","b":"' + "é😀".encode() + b'"}',
    rb'{"\u0061":1,"":2}',
    rb'{"a":"}],\"saved_at\":\"","data":{"data":{}}}',
    b'{"a":' + b"[" * 62 + b"]" * 62 + b"}",
]


@pytest.mark.parametrize("text", ODDLY_SPELLED, ids=lambda text: text.decode()[:24])
class TestAnswersKeepTheirBytes:
    async def test_as_a_step(self, wired: Place, raw: Redis, text: bytes) -> None:
        session_id = await prepare(wired.manager)
        await wired.manager.save_step(session_id, 1, Document.parse(text, InvalidStepDataError))

        kept: Any = await raw.get(wired.gateway.keys.session(session_id).step(1))
        assert kept.endswith(b'"data":' + text + b"}")
        step = await wired.manager.get_step(session_id, 1)
        assert step is not None
        assert b'"data":' + text + b"," in step.text
        assert step["data"] == orjson.loads(text)
        assert (await wired.manager.get_all_steps(session_id))[1].text == step.text

    async def test_as_one_of_several_steps(self, wired: Place, text: bytes) -> None:
        session_id = await prepare(wired.manager)
        body = Document.parse(b'{"1":' + text + b',"2" :' + text + b"}", InvalidStepDataError)
        parts = body.parts("/steps")
        await wired.manager.save_steps(session_id, {int(n): part for n, part in parts.items()})
        for number in (1, 2):
            step = await wired.manager.get_step(session_id, number)
            assert step is not None
            assert b'"data":' + text.strip() + b"," in step.text

    async def test_as_a_draft_and_promoted(self, wired: Place, text: bytes) -> None:
        session_id = await prepare(wired.manager)
        data = Document.parse(text, InvalidStepDataError)
        saved = await wired.manager.save_draft(session_id, 1, data)
        draft = await wired.manager.get_draft(session_id, 1)
        assert draft is not None
        assert b'"data":' + text + b"," in draft.text
        assert draft.text == saved.text.replace(b'"version":null', b'"version":1')
        await wired.manager.promote_draft_to_step(session_id, 1)
        step = await wired.manager.get_step(session_id, 1)
        assert step is not None
        assert b'"data":' + text + b"," in step.text

    async def test_in_the_export(self, wired: Place, text: bytes) -> None:
        session_id = await prepare(wired.manager)
        await wired.manager.save_step(session_id, 1, Document.parse(text, InvalidStepDataError))
        answer = await wired.manager.finalize(session_id)
        export = await wired.manager.get_export(session_id)
        assert export is not None
        assert export.text in answer.text
        assert export.text.count(text.strip()) == 2
        assert export["steps"]["1"]["data"] == orjson.loads(text)
        assert export["raw_step_data"]["step_1"]["data"] == orjson.loads(text)


async def test_a_batch_of_23_large_steps_comes_back_whole(wired: Place) -> None:
    session_id = await prepare(wired.manager)
    answers = {number: {"a": "é" * 100_000, "n": number} for number in range(1, 24)}
    await wired.manager.save_steps(session_id, answers)
    steps = await wired.manager.get_all_steps(session_id)
    assert {number: step["data"] for number, step in steps.items()} == answers
