"""What each call costs on the wire, and that answers keep their bytes."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import orjson
import pytest
from redis.asyncio import Redis

from app.errors import InvalidStepDataError
from app.onboarding.documents import Document
from app.onboarding.steps import Precondition, Tags
from tests.proxy import Proxy
from tests.store.sessions import Manager, Place, keyed, prepare, working_at


@pytest.fixture
async def wired(proxy: Proxy) -> AsyncIterator[Place]:
    """A manager behind the proxy that waits long enough for every reply: none is lost here."""
    url = f"redis://{proxy.host}:{proxy.port}/0"
    async with working_at(url, redis_timeout_s=10) as place:
        yield place


class Cost(NamedTuple):
    """How many commands a call of the manager may send, once the scripts are loaded."""

    call: Callable[[Manager, str], Awaitable[Any]]
    commands: int
    finalized: bool = False


COSTS = {
    "create a session": Cost(lambda m, _: m.create_session(workspace_id="w"), 1),
    "read a session": Cost(lambda m, s: m.get_session(s), 1),
    "set metadata": Cost(lambda m, s: m.set_metadata(s, "u", "w"), 1),
    "save a new step": Cost(lambda m, s: m.save_step(s, 9, {"a": 1}), 1),
    "save a step over another": Cost(lambda m, s: m.save_step(s, 1, {"a": 2}), 1),
    "save a step if it matches": Cost(
        lambda m, s: m.save_step(s, 1, {"a": 2}, precondition=Precondition(Tags(any_version=True))),
        1,
    ),
    "save a step with an Idempotency-Key": Cost(
        lambda m, s: m.save_step(s, 1, {"a": 2}, request=keyed()), 1
    ),
    "save 23 steps": Cost(lambda m, s: m.save_steps(s, {n: {"a": n} for n in range(1, 24)}), 1),
    "read a step": Cost(lambda m, s: m.get_step(s, 1), 1),
    "read all steps": Cost(lambda m, s: m.get_all_steps(s), 1),
    "patch a step": Cost(lambda m, s: m.patch_step(s, 1, {"b": 1}), 2),
    "delete a step": Cost(lambda m, s: m.delete_step(s, 1), 1),
    "save a draft": Cost(lambda m, s: m.save_draft(s, 1, {"a": 1}), 1),
    "read a draft": Cost(lambda m, s: m.get_draft(s, 3), 1),
    "drop a draft": Cost(lambda m, s: m.delete_draft(s, 3), 1),
    "promote a draft": Cost(lambda m, s: m.promote_draft_to_step(s, 3), 2),
    "read the progress": Cost(lambda m, s: m.get_progress(s), 1),
    "view the progress": Cost(lambda m, s: m.view_progress(s), 1),
    "raise the mark": Cost(lambda m, s: m.update_progress(s, 9), 1),
    "summarize": Cost(lambda m, s: m.get_session_summary(s), 1),
    "finalize": Cost(lambda m, s: m.finalize(s), 2),
    "finalize again": Cost(lambda m, s: m.finalize(s), 2, finalized=True),
    "read the export": Cost(lambda m, s: m.get_export(s), 1, finalized=True),
    "reopen": Cost(lambda m, s: m.reopen(s), 1, finalized=True),
    "delete a session": Cost(lambda m, s: m.delete_session(s), 1),
    "delete a finalized session": Cost(lambda m, s: m.delete_session(s), 1, finalized=True),
}


@pytest.mark.parametrize("name", COSTS)
async def test_a_call_sends_no_more_commands_than_this(
    wired: Place, proxy: Proxy, name: str
) -> None:
    cost = COSTS[name]
    # The first round loads the scripts and opens the connection.
    await cost.call(wired.manager, await prepare(wired.manager, finalized=cost.finalized))
    session_id = await prepare(wired.manager, finalized=cost.finalized)
    before = proxy.commands.copy()

    await cost.call(wired.manager, session_id)

    sent = proxy.commands - before
    assert sent.total() <= cost.commands, sent
    assert sent.total() >= 1


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
