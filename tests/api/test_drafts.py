from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    DELETE_DRAFT,
    DELETE_SESSION,
    FINALIZE,
    GET_DRAFT,
    GET_PROGRESS,
    GET_STEP,
    GET_STEPS,
    GET_SUMMARY,
    JSON,
    PROMOTE,
    PUT,
    PUT_DRAFT,
    REOPEN,
    SAVE,
    SAVED,
    STEP,
    Call,
    answer_of,
    check_progress,
    create,
    dump,
    is_time,
    pointers_of,
    problem_of,
    save,
    step_path,
    types_of,
)

DAY_MS = 86_400_000


async def test_a_draft_is_described_as_a_step(api: AsyncClient, session_id: str) -> None:
    draft = answer_of(await PUT_DRAFT.send(api, session_id))

    assert draft.keys() >= STEP
    assert draft["session_id"] == session_id
    assert draft["step_id"] == 1
    assert draft["data"] == {"d": 1}
    assert draft["version"] is None
    assert is_time(draft["saved_at"])
    assert draft["is_draft"] is True
    assert answer_of(await GET_DRAFT.send(api, session_id)) == draft


async def test_a_draft_tells_the_version_of_the_saved_step(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id)
    await save(api, session_id)

    assert answer_of(await PUT_DRAFT.send(api, session_id))["version"] == 2
    assert answer_of(await GET_DRAFT.send(api, session_id))["version"] == 2

    answer_of(await api.delete(step_path(session_id, 1)))

    assert answer_of(await GET_DRAFT.send(api, session_id))["version"] is None
    assert answer_of(await PUT_DRAFT.send(api, session_id))["version"] is None


async def test_a_draft_may_be_empty_and_is_replaced_by_the_next(
    api: AsyncClient, session_id: str
) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    answer_of(await PUT_DRAFT._replace(body={"data": {}}).send(api, session_id))

    assert answer_of(await GET_DRAFT.send(api, session_id))["data"] == {}


async def test_a_draft_keeps_the_bytes_of_its_data(api: AsyncClient, session_id: str) -> None:
    data = b'{ "z":1.50, "a":"\\u00e9\\/" ,"n":[ ] }'
    path = step_path(session_id, "1/draft")

    response = await api.put(path, content=b'{"data":' + data + b"}", headers=JSON)

    assert data in response.content
    assert data in (await GET_DRAFT.send(api, session_id)).content


async def test_a_draft_is_no_progress_and_no_event_and_leaves_the_step_alone(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id, 2)
    read_only = [GET_PROGRESS, GET_STEPS]
    before = [answer_of(await call.send(api, session_id)) for call in read_only]
    events = await types_of(raw, session_id)
    for call in (PUT_DRAFT, PUT_DRAFT, GET_DRAFT, DELETE_DRAFT, PUT_DRAFT):
        answer_of(await call.send(api, session_id))

    after = [answer_of(await call.send(api, session_id)) for call in read_only]

    for answer in (*before, *after):
        answer.pop("expires_at", None)
    assert after == before
    assert await types_of(raw, session_id) == events
    problem_of(await GET_STEP.send(api, session_id), "step_not_found")


@pytest.mark.parametrize("call", [SAVE, PUT, PROMOTE], ids=lambda call: call.name)
async def test_saving_a_step_removes_its_draft_and_no_other(
    api: AsyncClient, session_id: str, call: Call
) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))
    other = step_path(session_id, "2/draft")
    answer_of(await api.put(other, json={"data": {"kept": 1}}))

    answer_of(await call.send(api, session_id))

    problem_of(await GET_DRAFT.send(api, session_id), "draft_not_found")
    assert answer_of(await api.get(other))["data"] == {"kept": 1}


async def test_a_refused_save_keeps_the_draft(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    problem_of(await SAVE.send(api, session_id, if_match='"1"'), "version_conflict")
    problem_of(await SAVE._replace(body={"data": {}}).send(api, session_id), "invalid_step_data")

    assert answer_of(await GET_DRAFT.send(api, session_id))["data"] == {"d": 1}


async def test_a_dropped_draft_is_gone(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    dropped = answer_of(await DELETE_DRAFT.send(api, session_id))

    assert dropped["success"] is True
    for call in (GET_DRAFT, DELETE_DRAFT, PROMOTE):
        problem_of(await call.send(api, session_id), "draft_not_found")


async def test_a_draft_that_was_never_kept_is_not_found(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    for call in (GET_DRAFT, DELETE_DRAFT, PROMOTE):
        problem_of(await call.send(api, session_id), "draft_not_found")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/data"), ({"data": None}, "/data"), ({"data": []}, "/data"), ({"data": 1}, "/data")],
)
async def test_a_draft_that_is_no_object_is_refused(
    api: AsyncClient, session_id: str, body: object, pointer: str
) -> None:
    response = await PUT_DRAFT._replace(body=body).send(api, session_id)

    assert pointers_of(problem_of(response, "invalid_step_data")) == {pointer}


# --- Promote --------------------------------------------------------------------------------------


async def test_a_promoted_draft_is_the_saved_step(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    response = await PROMOTE.send(api, session_id)
    saved = answer_of(response)

    assert saved.keys() >= SAVED
    assert saved["success"] is True
    assert saved["version"] == 1
    assert response.headers["etag"] == '"1"'
    check_progress(saved["progress"], saved=[1])
    step = answer_of(await GET_STEP.send(api, session_id))
    assert step["data"] == {"d": 1}
    assert step["is_draft"] is False
    assert (await types_of(raw, session_id))[1:] == ["step_saved"]


async def test_a_promoted_draft_keeps_its_bytes(api: AsyncClient, session_id: str) -> None:
    data = b'{"z": 1.50,"a":"\\u00e9"}'
    path = step_path(session_id, "1/draft")
    answer_of(await api.put(path, content=b'{"data":' + data + b"}", headers=JSON))

    answer_of(await PROMOTE.send(api, session_id))

    assert data in (await GET_STEP.send(api, session_id)).content


async def test_an_empty_draft_cannot_be_promoted(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await PUT_DRAFT._replace(body={"data": {}}).send(api, session_id))
    before = await dump(raw)

    problem_of(await PROMOTE.send(api, session_id), "invalid_step_data")

    assert await dump(raw) == before


async def test_promoting_again_finds_no_draft(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))
    answer_of(await PROMOTE.send(api, session_id))

    problem_of(await PROMOTE.send(api, session_id), "draft_not_found")


# --- A finalized session --------------------------------------------------------------------------


async def test_a_finalized_session_keeps_its_drafts_as_they_are(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id, 2)
    answer_of(await PUT_DRAFT.send(api, session_id))
    answer_of(await FINALIZE.send(api, session_id))
    before = await dump(raw)

    for call in (PUT_DRAFT, DELETE_DRAFT, PROMOTE):
        problem_of(await call.send(api, session_id), "session_finalized")

    assert await dump(raw) == before
    assert answer_of(await GET_DRAFT.send(api, session_id))["data"] == {"d": 1}
    answer_of(await REOPEN.send(api, session_id))
    answer_of(await PROMOTE.send(api, session_id))


# --- The life of a draft --------------------------------------------------------------------------


async def lives(raw: Redis, session_id: str) -> tuple[int, int]:
    """Give when the draft of step 1 and its session expire, in Unix ms."""
    draft = await raw.pexpiretime(f"onboarding:{session_id}:draft:1")
    return int(draft), int(await raw.pexpiretime(f"onboarding:{session_id}:progress"))


async def test_a_draft_lives_a_day_of_its_own(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    left = await raw.pttl(f"onboarding:{session_id}:draft:1")

    assert DAY_MS - 5_000 < left <= DAY_MS


async def test_the_life_of_a_draft_is_a_setting(serve: Callable[..., Any], raw: Redis) -> None:
    api = await serve(draft_ttl_s=60)
    session_id = await create(api)
    answer_of(await PUT_DRAFT.send(api, session_id))

    assert 55_000 < await raw.pttl(f"onboarding:{session_id}:draft:1") <= 60_000


async def test_a_draft_does_not_outlive_its_session(serve: Callable[..., Any], raw: Redis) -> None:
    api = await serve(session_ttl_s=50, draft_ttl_s=100)
    session_id = await create(api)
    for call in (PUT_DRAFT, PUT_DRAFT):
        answer_of(await call.send(api, session_id))
        draft, session = await lives(raw, session_id)
        assert session - 1000 <= draft <= session


async def test_other_writes_leave_the_life_of_a_draft_alone(
    serve: Callable[..., Any], raw: Redis
) -> None:
    api = await serve(session_ttl_s=3)
    session_id = await create(api)
    answer_of(await PUT_DRAFT.send(api, session_id))
    before, _ = await lives(raw, session_id)

    for _ in range(10):
        await save(api, session_id, 2)
        after, session = await lives(raw, session_id)
        assert after == before <= session


async def test_a_session_takes_its_drafts_along(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    answer_of(await DELETE_SESSION.send(api, session_id))

    assert [key for key in await dump(raw) if "draft" in key] == []


async def test_the_summary_says_which_steps_have_a_draft(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))
    answer_of(await api.put(step_path(session_id, "23/draft"), json={"data": {}}))

    steps = answer_of(await GET_SUMMARY.send(api, session_id))["steps"]

    assert [step["step_id"] for step in steps if step["has_draft"]] == [1, 23]
