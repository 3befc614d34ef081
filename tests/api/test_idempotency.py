import asyncio
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.helpers import (
    BATCH,
    CREATE,
    DELETE_SESSION,
    DELETE_STEP,
    FINALIZE,
    GET_PROGRESS,
    GET_STEP,
    JSON,
    PATCH,
    PROMOTE,
    PUT,
    PUT_DRAFT,
    REOPEN,
    SAVE,
    Call,
    answer_of,
    ask,
    dump,
    problem_of,
    save,
    step_path,
    types_of,
)

DAY_MS = 86_400_000


class Write(NamedTuple):
    """A call that takes an Idempotency-Key, and what has to be there before it succeeds."""

    call: Call
    before: tuple[Call, ...] = ()
    event: str | None = "step_saved"
    status: int = 200
    other_body: Any = None

    async def prepare(self, api: AsyncClient, session_id: str) -> None:
        for call in self.before:
            answer_of(await call.send(api, session_id))


SAVING = {"data": {"other": 1}}

WRITES = {
    "create": Write(CREATE, (), None, 201, {"workspace_id": "w2"}),
    "post step": Write(SAVE, other_body=SAVING),
    "put step": Write(PUT, other_body=SAVING),
    "patch step": Write(PATCH, (SAVE,), other_body={"c": 1}),
    "batch": Write(BATCH, other_body={"steps": {"1": {"a": 2}}}),
    "promote": Write(PROMOTE, (PUT_DRAFT,)),
    "delete step": Write(DELETE_STEP, (SAVE,), "step_deleted"),
    "finalize": Write(FINALIZE, (SAVE,), "finalized", 200, {"force": True}),
    "reopen": Write(REOPEN, (SAVE, FINALIZE), "reopened"),
    "put draft": Write(PUT_DRAFT, (), None, 200, SAVING),
}

each_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())


def check_replay(replayed: Response, first: Response) -> None:
    assert replayed.status_code == first.status_code, replayed.text
    assert replayed.content == first.content
    assert replayed.headers["idempotent-replayed"] == "true"
    for name in ("content-type", "etag", "location", "cache-control"):
        assert replayed.headers.get(name) == first.headers.get(name)


def check_first(first: Response, status: int = 200) -> None:
    answer_of(first, status)
    assert "idempotent-replayed" not in first.headers


async def repeat_at_once(
    api: AsyncClient, session_id: str, call: Call, key: str = "k1"
) -> list[Response]:
    """Send a call 20 times with one key, each a moment later, so that they meet at every stage."""

    async def send(number: int) -> Response:
        await asyncio.sleep(number * 0.0003)
        return await call.send(api, session_id, idempotency_key=key)

    return await asyncio.gather(*map(send, range(20)))


async def let_the_clock_move(raw: Redis) -> None:
    """Ask the store until its milliseconds are other ones, so that equal times are no accident."""
    begun = await raw.time()
    while (await raw.time())[1] // 1000 == begun[1] // 1000:
        pass


# --- A repeat -------------------------------------------------------------------------------------


@each_write
async def test_a_repeat_answers_as_the_first_and_changes_nothing(
    api: AsyncClient, raw: Redis, session_id: str, write: Write
) -> None:
    await write.prepare(api, session_id)
    first = await write.call.send(api, session_id, idempotency_key="k1")
    check_first(first, write.status)
    before = await dump(raw)
    for _ in range(2):
        await let_the_clock_move(raw)

        check_replay(await write.call.send(api, session_id, idempotency_key="k1"), first)

    assert await dump(raw) == before


@each_write
async def test_a_key_means_the_same_bare_and_quoted(
    api: AsyncClient, session_id: str, write: Write
) -> None:
    await write.prepare(api, session_id)
    first = await write.call.send(api, session_id, idempotency_key="A.b_c~1-x")

    check_replay(await write.call.send(api, session_id, idempotency_key='"A.b_c~1-x"'), first)


@each_write
async def test_a_repeat_with_another_query_or_body_is_a_mismatch(
    api: AsyncClient, raw: Redis, session_id: str, write: Write
) -> None:
    await write.prepare(api, session_id)
    first = await write.call.send(api, session_id, idempotency_key="k1")
    before = await dump(raw)
    others = [write.call._replace(target=write.call.target + "?x=1")]
    if write.other_body is not None:
        others.append(write.call._replace(body=write.other_body))

    for other in others:
        response = await other.send(api, session_id, idempotency_key="k1")
        problem_of(response, "idempotency_mismatch")

    assert await dump(raw) == before
    check_replay(await write.call.send(api, session_id, idempotency_key="k1"), first)


async def test_the_same_document_spelled_otherwise_is_a_mismatch(
    api: AsyncClient, session_id: str
) -> None:
    path, headers = step_path(session_id, 1), {**JSON, "idempotency-key": "k1"}
    check_first(await api.post(path, content=b'{"data":{"a":1}}', headers=headers))

    response = await api.post(path, content=b'{"data": {"a":1}}', headers=headers)

    problem_of(response, "idempotency_mismatch")


@each_write
async def test_20_repeats_at_once_have_one_effect(
    api: AsyncClient, raw: Redis, session_id: str, write: Write
) -> None:
    await write.prepare(api, session_id)
    before = await types_of(raw, session_id)

    answers = await repeat_at_once(api, session_id, write.call)

    done = [answer for answer in answers if answer.status_code != 409]
    for answer in answers:
        if answer not in done:
            problem_of(answer, "idempotency_in_progress")
    assert {answer.status_code for answer in done} == {write.status}, [a.text for a in done]
    assert len({answer.content for answer in done}) == 1
    if write.event:
        new = (await types_of(raw, session_id))[len(before) :]
        assert new == [write.event] * (2 if write.call is BATCH else 1)
    else:
        sessions = [key for key in await dump(raw) if key.endswith(":progress")]
        assert len(sessions) == (2 if write.call is CREATE else 1)


@pytest.mark.parametrize("call", [PATCH, PROMOTE, FINALIZE], ids=lambda call: call.name)
async def test_repeats_of_what_reads_before_it_writes_answer_alike_wherever_they_meet(
    api: AsyncClient, session_id: str, call: Call
) -> None:
    for number in range(10):
        answer_of(await SAVE.send(api, session_id))
        answer_of(await PUT_DRAFT.send(api, session_id))

        answers = await repeat_at_once(api, session_id, call, key=f"k{number}")

        assert {answer.status_code for answer in answers} <= {200, 409}, [a.text for a in answers]
        assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
        if call is FINALIZE:
            answer_of(await REOPEN.send(api, session_id))


@each_write
async def test_one_of_20_repeats_at_once_is_the_first(
    api: AsyncClient, session_id: str, write: Write
) -> None:
    await write.prepare(api, session_id)

    answers = await repeat_at_once(api, session_id, write.call)

    first = [each for each in answers if "idempotent-replayed" not in each.headers]
    assert len([each for each in first if each.is_success]) == 1


async def test_finalizes_at_once_with_keys_of_their_own_are_no_repeats(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id)

    answers = await asyncio.gather(
        *(FINALIZE.send(api, session_id, idempotency_key=f"k{number}") for number in range(20))
    )

    for answer in answers:
        check_first(answer)
    assert len({answer.content for answer in answers}) == 1


# --- The scope of a key ---------------------------------------------------------------------------


async def test_a_key_is_for_one_method_and_path(api: AsyncClient, session_id: str) -> None:
    other = answer_of(await CREATE.send(api, idempotency_key="k1"), 201)["session_id"]

    versions = [
        answer_of(await call.send(api, each, idempotency_key="k1"))["version"]
        for each in (session_id, other)
        for call in (SAVE, PUT, SAVE._replace(target=SAVE.target.replace("/steps/1", "/steps/2")))
    ]

    assert versions == [1, 2, 1, 1, 2, 1]


async def test_keys_are_told_apart_by_every_character(api: AsyncClient, session_id: str) -> None:
    keys = ["k", "K", "k.", '"k "', '" k"', r'"\"k\""', r'"\\k"', "k" * 255, '"' + "k" * 254 + '"']

    versions = [
        answer_of(await SAVE.send(api, session_id, idempotency_key=key))["version"] for key in keys
    ]

    assert versions == list(range(1, len(keys) + 1))


async def test_without_a_key_a_repeat_is_another_write(api: AsyncClient, session_id: str) -> None:
    assert [(await save(api, session_id))["version"] for _ in range(2)] == [1, 2]


async def test_a_key_on_a_read_means_nothing(api: AsyncClient, session_id: str) -> None:
    answers = []
    for step_id in (1, 2):
        await save(api, session_id, step_id)
        response = await GET_PROGRESS.send(api, session_id, idempotency_key="k1")
        answers.append(answer_of(response)["progress"]["completed"])
        assert "idempotent-replayed" not in response.headers
    assert answers == [1, 2]


@pytest.mark.parametrize(
    "key",
    [
        *("", '""', "a b", "a,b", '"a', 'a"', '"a"b"', '"a" "b"', "é", '"é"', r'"\a"', '"\\"'),
        *("k" * 256, '"' + "k" * 256 + '"', '"a\tb"', "a;b", "k/1", "'k'", "?1", ":a:"),
    ],
)
async def test_a_key_that_cannot_be_read_is_refused(
    api: AsyncClient, raw: Redis, session_id: str, key: str
) -> None:
    before = await dump(raw)
    for call in (SAVE, CREATE):
        target = call.target.replace("{id}", session_id)
        headers = [(b"idempotency-key", key.encode())]
        response = await api.post(target, json=call.body, headers=headers)
        problem_of(response, "invalid_idempotency_key")
    assert await dump(raw) == before


async def test_two_keys_on_one_request_are_refused(api: AsyncClient, session_id: str) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]

    response = await api.post(step_path(session_id, 1), json=SAVING, headers=headers)

    problem_of(response, "invalid_idempotency_key")


# --- What is kept ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Call, str, Call, dict[str, str]]] = {
    # What is refused, why, what makes it possible, and the headers of the refused one.
    "post step": (SAVE, "version_conflict", GET_PROGRESS, {"if_match": '"9"'}),
    "patch step": (PATCH, "step_not_found", SAVE, {}),
    "promote": (PROMOTE, "draft_not_found", PUT_DRAFT, {}),
    "delete step": (DELETE_STEP, "step_not_found", SAVE, {}),
    "finalize": (FINALIZE, "nothing_to_finalize", SAVE, {}),
}


@pytest.mark.parametrize(
    ("call", "code", "remedy", "headers"), REFUSED.values(), ids=REFUSED.keys()
)
async def test_a_refusal_is_not_kept(
    api: AsyncClient,
    session_id: str,
    call: Call,
    code: str,
    remedy: Call,
    headers: dict[str, str],
) -> None:
    refused = await call.send(api, session_id, idempotency_key="k1", **headers)
    problem_of(refused, code)
    answer_of(await remedy.send(api, session_id))

    check_first(await call.send(api, session_id, idempotency_key="k1"))


async def test_the_refusal_of_a_finalized_session_is_not_kept(
    api: AsyncClient, finalized_id: str
) -> None:
    for call in (SAVE, BATCH, PUT_DRAFT):
        refused = await call.send(api, finalized_id, idempotency_key="k1")
        problem_of(refused, "session_finalized")
    check_first(await REOPEN.send(api, finalized_id, idempotency_key="k1"))

    for call in (SAVE, BATCH, PUT_DRAFT):
        check_first(await call.send(api, finalized_id, idempotency_key="k1"))


@pytest.mark.parametrize(
    ("call", "bad_body", "code"),
    [
        (CREATE, {"workspace_id": ""}, "invalid_request"),
        (SAVE, {"data": {}}, "invalid_step_data"),
        (BATCH, {"steps": {}}, "invalid_step_data"),
        (FINALIZE, {"force": 1}, "invalid_request"),
    ],
    ids=lambda value: value.name if isinstance(value, Call) else None,
)
async def test_a_key_of_a_refused_body_is_free_for_a_better_one(
    api: AsyncClient, session_id: str, call: Call, bad_body: Any, code: str
) -> None:
    await save(api, session_id, 2)
    refused = await call._replace(body=bad_body).send(api, session_id, idempotency_key="k1")
    problem_of(refused, code)

    status = 201 if call is CREATE else 200
    check_first(await call.send(api, session_id, idempotency_key="k1"), status)


async def test_a_repeat_answers_the_first_after_finalize_reopen_and_a_second_revision(
    api: AsyncClient, session_id: str
) -> None:
    first: dict[str, tuple[Call, Response]] = {}

    async def do(key: str, call: Call) -> None:
        first[key] = (call, await call.send(api, session_id, idempotency_key=key))
        check_first(first[key][1])

    async def check_all() -> None:
        for key, (call, response) in first.items():
            check_replay(await call.send(api, session_id, idempotency_key=key), response)

    for call in (SAVE, PATCH, BATCH):
        await do(f"1-{call.method}-{len(call.target)}", call)
    answer_of(await PUT_DRAFT.send(api, session_id))
    await do("promote-1", PROMOTE)
    await do("finalize-1", FINALIZE)
    await do("finalize-1-again", FINALIZE)
    await check_all()
    await do("reopen-1", REOPEN)
    await check_all()
    await do("delete", DELETE_STEP)
    await do("save-2", SAVE)
    await check_all()
    await do("finalize-2", FINALIZE)
    await check_all()

    revisions = [
        response.json()["business_context"]["revision"]
        for key, (_, response) in first.items()
        if key.startswith("finalize")
    ]
    assert revisions == [1, 1, 2]
    assert answer_of(await GET_STEP.send(api, session_id))["data"] == {"a": 1}


async def test_records_go_with_their_session(api: AsyncClient, raw: Redis) -> None:
    created = await CREATE.send(api, idempotency_key="k1")
    session_id = created.json()["session_id"]
    for call in (SAVE, PATCH, BATCH, PUT_DRAFT, PROMOTE, FINALIZE, REOPEN, DELETE_STEP):
        answer_of(await call.send(api, session_id, idempotency_key="k1"))
    records = [key for key in await dump(raw) if "idem:" in key]
    assert len(records) == 9
    for key in records:
        assert re.fullmatch(rf"onboarding:({session_id}:)?idem:[0-9a-f]{{64}}", key)

    answer_of(await DELETE_SESSION.send(api, session_id))

    assert [key for key in await dump(raw) if "idem:" in key] == []
    problem_of(await SAVE.send(api, session_id, idempotency_key="k1"), "session_not_found")
    again = await CREATE.send(api, idempotency_key="k1")
    check_first(again, 201)
    assert again.json()["session_id"] != session_id


@pytest.mark.parametrize("hash_tag", ["off", "on"])
@pytest.mark.parametrize("lifetime_s", [100, 604_800])
async def test_a_record_lives_a_day_and_not_beyond_its_session(
    serve: Callable[..., Any], raw: Redis, lifetime_s: int, hash_tag: str
) -> None:
    api = await serve(session_ttl_s=lifetime_s, key_hash_tag=hash_tag)
    created = await CREATE.send(api, idempotency_key="k1")
    session_id = created.json()["session_id"]
    for call in (SAVE, PATCH, FINALIZE, REOPEN, DELETE_STEP):
        answer_of(await call.send(api, session_id, idempotency_key="k1"))

    keys = [key async for key in raw.scan_iter(count=1000)]
    [progress] = [key for key in keys if key.endswith(b":progress")]
    records = [key for key in keys if b"idem:" in key]
    assert len(records) == 6
    longest = min(DAY_MS, lifetime_s * 1010)
    for key in records:
        left = await raw.pttl(key)
        assert min(DAY_MS, lifetime_s * 1000) - 5_000 < left <= longest
        assert await raw.pexpiretime(key) <= await raw.pexpiretime(progress)


# --- With the hash tag, where the record of a create lies in another slot -------------------------


@pytest.fixture
async def tagged(serve: Callable[..., Any]) -> AsyncClient:
    client: AsyncClient = await serve(key_hash_tag="on")
    return client


async def test_a_tagged_create_is_repeated_too(tagged: AsyncClient, raw: Redis) -> None:
    first = await CREATE.send(tagged, idempotency_key="k1")
    check_first(first, 201)
    before = await dump(raw)

    check_replay(await CREATE.send(tagged, idempotency_key='"k1"'), first)

    other = await CREATE._replace(body={"workspace_id": "w2"}).send(tagged, idempotency_key="k1")
    problem_of(other, "idempotency_mismatch")
    assert await dump(raw) == before


async def test_20_tagged_creates_at_once_make_one_session(tagged: AsyncClient, raw: Redis) -> None:
    answers = await repeat_at_once(tagged, "", CREATE)

    made = [answer for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer not in made:
            problem_of(answer, "idempotency_in_progress")
    assert len({answer.content for answer in made}) == 1
    assert len([key for key in await dump(raw) if key.endswith(":progress")]) == 1


async def test_tagged_writes_are_repeated_too(tagged: AsyncClient) -> None:
    session_id = (await CREATE.send(tagged)).json()["session_id"]
    for call in (SAVE, PATCH, PUT_DRAFT, PROMOTE, DELETE_STEP, BATCH, FINALIZE, REOPEN):
        first = await call.send(tagged, session_id, idempotency_key="k1")
        check_first(first)
        if call is not PUT_DRAFT:
            check_replay(await call.send(tagged, session_id, idempotency_key="k1"), first)


async def test_a_session_is_found_whose_maker_could_not_keep_its_answer(
    tagged: AsyncClient, raw: Redis
) -> None:
    first = await CREATE.send(tagged, idempotency_key="k1")
    [record] = await ask(raw, "KEYS", "onboarding:idem:*")
    for until_ms in (FAR_MS, 1):
        await raw.set(record, await claimed(raw, record, first.json()["session_id"], until_ms))

        check_replay(await CREATE.send(tagged, idempotency_key="k1"), first)

        assert b'["ok"' in await ask(raw, "GET", record)


async def test_a_claim_that_came_to_nothing_is_taken_over_when_its_time_is_over(
    tagged: AsyncClient, raw: Redis
) -> None:
    first = answer_of(await CREATE.send(tagged, idempotency_key="k1"), 201)["session_id"]
    answer_of(await DELETE_SESSION.send(tagged, first))
    answer_of(await CREATE.send(tagged, idempotency_key="k1"), 201)
    [record] = await ask(raw, "KEYS", "onboarding:idem:*")

    await raw.set(record, await claimed(raw, record, first, FAR_MS))
    problem_of(await CREATE.send(tagged, idempotency_key="k1"), "idempotency_in_progress")

    await raw.set(record, await claimed(raw, record, first, 1))
    check_first(await CREATE.send(tagged, idempotency_key="k1"), 201)
    assert 0 < await raw.pttl(record) <= DAY_MS


FAR_MS = 9_999_999_999_999


async def claimed(raw: Redis, record: bytes, session_id: str, until_ms: int) -> bytes:
    """Write a claim of the key that a record is about."""
    kept: bytes = await ask(raw, "GET", record)
    claim = f'["claim","{session_id}","{until_ms}"]'
    return kept[: kept.index(b"[")] + claim.encode()
