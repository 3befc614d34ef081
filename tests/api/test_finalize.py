import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    DELETE_STEP,
    FINALIZE,
    GET_EXPORT,
    GET_PROGRESS,
    GET_SESSION,
    JSON,
    REOPEN,
    SAVE,
    SESSION,
    Answers,
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

EXPORT = {
    *("version", "revision", "generated_at", "session_id", "catalogue_version", "metadata"),
    *("progress", "steps", "raw_step_data", "complete", "missing_steps", "checksum"),
}
FINALIZED = {
    *("success", "session_id", "business_context", "completed_steps", "total_steps"),
    "finalized_at",
}
OPTIONAL = {17, 21, 22}
ALL_STEPS = range(1, 24)
FORCED = FINALIZE._replace(body={"force": True})


def recomputed(export: Answers) -> str:
    """Compute the checksum as a reader of the contract would."""
    content = {
        name: value for name, value in export.items() if name not in {"checksum", "generated_at"}
    }
    return "sha256:" + hashlib.sha256(rfc8785.dumps(content)).hexdigest()


async def save_all(api: AsyncClient, session_id: str, step_ids: Any) -> None:
    for step_id in step_ids:
        await save(api, session_id, step_id, {"n": step_id})


# --- What comes out -------------------------------------------------------------------------------


async def test_finalize_freezes_the_steps_into_an_export(api: AsyncClient) -> None:
    session_id = await create(api, user_id="u1", language="de", metadata={"plan": "pro"})
    await save(api, session_id, 3, {"x": 1})
    await save(api, session_id, 3, {"x": 2})
    await save(api, session_id, 1, {"y": []})

    finalized = answer_of(await FINALIZE.send(api, session_id))

    assert finalized.keys() >= FINALIZED
    assert finalized["success"] is True
    assert finalized["session_id"] == session_id
    assert finalized["completed_steps"] == 2
    assert finalized["total_steps"] == 23
    assert is_time(finalized["finalized_at"])

    export = finalized["business_context"]
    assert export.keys() >= EXPORT
    assert export["version"] == "2.0"
    assert export["revision"] == 1
    assert is_time(export["generated_at"])
    assert export["session_id"] == session_id
    assert export["catalogue_version"] == "1"
    owner = {"user_id": "u1", "workspace_id": "w1", "language": "de"}
    assert export["metadata"].items() >= owner.items()
    assert is_time(export["metadata"]["started_at"])
    check_progress(export["progress"], saved=[1, 3])
    assert export["steps"].keys() == {"1", "3"}
    assert export["steps"]["3"].keys() >= {"step_id", "data", "version", "saved_at"}
    assert export["steps"]["3"]["data"] == {"x": 2}
    assert (export["steps"]["3"]["step_id"], export["steps"]["3"]["version"]) == (3, 2)
    assert export["raw_step_data"] == {
        "metadata": {"workspace_id": "w1", "user_id": "u1"},
        "step_1": {"data": {"y": []}},
        "step_3": {"data": {"x": 2}},
    }
    assert export["complete"] is False
    assert export["missing_steps"] == [each for each in ALL_STEPS if each not in {1, 3}]
    assert export["checksum"] == recomputed(export)


async def test_an_export_is_complete_without_the_optional_steps(
    api: AsyncClient, session_id: str
) -> None:
    await save_all(api, session_id, set(ALL_STEPS) - OPTIONAL)

    export = answer_of(await FINALIZE.send(api, session_id))["business_context"]

    assert export["complete"] is True
    assert export["missing_steps"] == sorted(OPTIONAL)


async def test_the_session_shows_that_it_is_finalized(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    finalized = answer_of(await FINALIZE.send(api, session_id))

    session = answer_of(await GET_SESSION.send(api, session_id))

    assert session["finalized_at"] == finalized["finalized_at"]
    assert session["revision"] == 1
    assert session["status"] == "pending"


ODD_ANSWERS = (
    b'{"\\u20ac":1,"\\ud83d\\ude00":2,"\xef\xac\xb3":3,"\\r":4,"1":5,"\\u0080":6,"":7,'
    b'"n":[1e21,1E-7,0.000001,1e20,-0,-0.0,0e-999,5e-324,1.7976931348623157e308,'
    b"9007199254740991,-9007199254740991,1.50,333333333.33333329,4.50,2e-3,"
    b"0.000000000000000000000000001],"
    b'"s":"\\u000f\\n\\u007f\\"\\\\\\/\xe2\x80\xa8\\u0000"}'
)


async def test_the_checksum_is_that_of_the_canonical_export_for_odd_answers_too(
    api: AsyncClient, session_id: str
) -> None:
    body = b'{"data":' + ODD_ANSWERS + b"}"
    answer_of(await api.put(step_path(session_id, 1), content=body, headers=JSON))

    export = answer_of(await FINALIZE.send(api, session_id))["business_context"]

    assert export["steps"]["1"]["data"] == json.loads(ODD_ANSWERS)
    assert export["checksum"] == recomputed(export)


async def test_an_export_keeps_the_bytes_of_the_answers(api: AsyncClient, session_id: str) -> None:
    body = b'{"data":' + ODD_ANSWERS + b"}"
    answer_of(await api.put(step_path(session_id, 1), content=body, headers=JSON))

    answer_of(await FINALIZE.send(api, session_id))

    assert ODD_ANSWERS in (await GET_EXPORT.send(api, session_id)).content


async def test_equal_answers_have_equal_steps_and_other_answers_another_checksum(
    api: AsyncClient, session_id: str
) -> None:
    seen = set()
    for data in ({"a": 1}, {"a": 2}, {"a": "1"}):
        await save(api, session_id, 1, data)
        seen.add(answer_of(await FINALIZE.send(api, session_id))["business_context"]["checksum"])
        answer_of(await REOPEN.send(api, session_id))
    assert len(seen) == 3


async def test_drafts_do_not_get_into_an_export(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    answer_of(await api.put(step_path(session_id, "1/draft"), json={"data": {"draft": 1}}))
    answer_of(await api.put(step_path(session_id, "2/draft"), json={"data": {"draft": 1}}))

    response = await FINALIZE.send(api, session_id)

    assert b"draft" not in response.content


# --- Once is enough -------------------------------------------------------------------------------


async def test_finalize_again_answers_the_same_bytes(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    first = await FINALIZE.send(api, session_id)
    answer_of(first)
    before = await dump(raw)

    for call in (FINALIZE, FORCED, FINALIZE._replace(body={"force": False})):
        again = await call.send(api, session_id)
        assert again.status_code == 200
        assert again.content == first.content
    assert await dump(raw) == before


async def test_50_finalizes_at_once_make_one_export(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save_all(api, session_id, [1, 2])

    answers = await asyncio.gather(*(FINALIZE.send(api, session_id) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert (await types_of(raw, session_id)).count("finalized") == 1
    assert answer_of(await GET_PROGRESS.send(api, session_id))["revision"] == 1


async def test_what_is_saved_while_finalizing_is_in_the_export_or_refused(
    api: AsyncClient, session_id: str
) -> None:
    await save_all(api, session_id, [1])
    saves = [
        api.put(step_path(session_id, step_id), json={"data": {"n": step_id}})
        for step_id in range(2, 22)
    ]
    calls = [*saves[:10], FINALIZE.send(api, session_id), *saves[10:]]

    answers = await asyncio.gather(*calls)

    accepted = {
        step_id
        for step_id, answer in zip(range(2, 22), answers[:10] + answers[11:], strict=True)
        if answer.status_code == 200
    }
    export = answer_of(await GET_EXPORT.send(api, session_id))
    assert {int(number) for number in export["steps"]} == accepted | {1}
    check_progress(export["progress"], saved=accepted | {1})
    assert export["checksum"] == recomputed(export)


async def test_finalize_and_reopen_make_one_event_each(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    for call in (FINALIZE, FINALIZE, REOPEN):
        answer_of(await call.send(api, session_id))
    problem_of(await REOPEN.send(api, session_id), "not_finalized")

    events = await types_of(raw, session_id)

    assert events == ["session_created", "step_saved", "finalized", "reopened"]


# --- When it is refused ---------------------------------------------------------------------------


async def test_a_session_without_steps_has_nothing_to_finalize(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await api.put(step_path(session_id, "1/draft"), json={"data": {"d": 1}}))
    before = await dump(raw)

    for call in (FINALIZE, FORCED):
        problem_of(await call.send(api, session_id), "nothing_to_finalize")

    assert await dump(raw) == before
    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))
    problem_of(await FINALIZE.send(api, session_id), "nothing_to_finalize")


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        ("none", None),
        ("required", [each for each in ALL_STEPS if each not in OPTIONAL | {1, 2, 3}]),
        ("all", [each for each in ALL_STEPS if each not in {1, 2, 3}]),
    ],
)
async def test_finalize_asks_for_the_steps_that_the_settings_require(
    serve: Callable[..., Any], raw: Redis, requires: str, missing: list[int] | None
) -> None:
    api = await serve(finalize_requires=requires)
    session_id = await create(api)
    await save_all(api, session_id, [1, 2, 3])
    before = await dump(raw)
    for body in (None, {}, {"force": False}):
        response = await FINALIZE._replace(body=body).send(api, session_id)
        if missing is None:
            answer_of(response)
        else:
            problem = problem_of(response, "steps_missing")
            assert problem["missing"] == missing
            assert await dump(raw) == before

    export = answer_of(await FORCED.send(api, session_id))["business_context"]

    assert export["missing_steps"] == [each for each in ALL_STEPS if each not in {1, 2, 3}]
    assert export["complete"] is False


@pytest.mark.parametrize(
    ("requires", "enough"),
    [("required", set(ALL_STEPS) - OPTIONAL), ("all", set(ALL_STEPS))],
)
async def test_finalize_goes_through_once_nothing_that_is_required_is_missing(
    serve: Callable[..., Any], requires: str, enough: set[int]
) -> None:
    api = await serve(finalize_requires=requires)
    session_id = await create(api)
    await save_all(api, session_id, sorted(enough)[:-1])
    problem = problem_of(await FINALIZE.send(api, session_id), "steps_missing")
    assert problem["missing"] == [23]

    await save_all(api, session_id, [23])

    answer_of(await FINALIZE.send(api, session_id))


@pytest.mark.parametrize("force", [1, "true", None, [], {}, 0])
async def test_force_is_true_or_false(api: AsyncClient, session_id: str, force: Any) -> None:
    await save(api, session_id)

    response = await FINALIZE._replace(body={"force": force}).send(api, session_id)

    assert pointers_of(problem_of(response, "invalid_request")) == {"/force"}


# --- The export -----------------------------------------------------------------------------------


async def test_the_export_is_what_finalize_answered(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    finalized = await FINALIZE.send(api, session_id)

    response = await GET_EXPORT.send(api, session_id)
    export = answer_of(response)

    assert export == finalized.json()["business_context"]
    assert response.content in finalized.content
    assert response.headers["etag"] == f'"{export["checksum"]}"'


async def test_a_session_that_was_never_finalized_has_no_export(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id)

    problem_of(await GET_EXPORT.send(api, session_id), "export_not_found")


async def test_an_export_that_the_client_has_is_not_sent_again(
    api: AsyncClient, finalized_id: str
) -> None:
    etag = (await GET_EXPORT.send(api, finalized_id)).headers["etag"]

    for tags in (etag, f"W/{etag}", "*", f'"x", {etag}'):
        response = await GET_EXPORT.send(api, finalized_id, if_none_match=tags)
        assert response.status_code == 304, tags
        assert response.content == b""
        assert response.headers["etag"] == etag
        assert response.headers["cache-control"] == "no-store"
    for tags in ('"x"', '"1"', '""'):
        answer_of(await GET_EXPORT.send(api, finalized_id, if_none_match=tags))
    for tags in (etag.strip('"'), etag + "x"):
        response = await GET_EXPORT.send(api, finalized_id, if_none_match=tags)
        problem_of(response, "invalid_header")


async def test_a_damaged_export_is_an_error_and_not_absent(
    api: AsyncClient, raw: Redis, finalized_id: str
) -> None:
    await raw.set(f"onboarding:{finalized_id}:export", b'{"version":"2.0"', keepttl=True)

    for call in (GET_EXPORT, FINALIZE):
        problem_of(await call.send(api, finalized_id), "corrupt_record")


# --- Reopen ---------------------------------------------------------------------------------------


async def test_a_reopened_session_takes_changes_again(api: AsyncClient, finalized_id: str) -> None:
    session = answer_of(await REOPEN.send(api, finalized_id))

    assert session.keys() >= SESSION
    assert session["status"] == "pending"
    assert session["finalized_at"] is None
    assert session["revision"] == 1
    check_progress(session["progress"], saved=[1])
    shown = answer_of(await GET_SESSION.send(api, finalized_id))
    assert shown == session
    assert (await save(api, finalized_id))["version"] == 2


async def test_only_a_finalized_session_can_be_reopened(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    before = await dump(raw)

    problem_of(await REOPEN.send(api, session_id), "not_finalized")

    assert await dump(raw) == before


async def test_a_session_is_not_reopened_under_a_running_generator(
    api: AsyncClient, raw: Redis, finalized_id: str
) -> None:
    progress = f"onboarding:{finalized_id}:progress"
    await raw.hset(progress, "status", "processing")
    before = await dump(raw)

    problem_of(await REOPEN.send(api, finalized_id), "generation_running")

    assert await dump(raw) == before
    for status in ("complete", "error"):
        await raw.hset(progress, "status", status)
        assert answer_of(await REOPEN.send(api, finalized_id))["status"] == "pending"
        answer_of(await FINALIZE.send(api, finalized_id))


async def test_the_last_export_stays_readable_until_the_next_one(
    api: AsyncClient, finalized_id: str
) -> None:
    first = await GET_EXPORT.send(api, finalized_id)
    answer_of(await REOPEN.send(api, finalized_id))
    for call in (SAVE, DELETE_STEP, SAVE):
        answer_of(await call.send(api, finalized_id))
        during = await GET_EXPORT.send(api, finalized_id)
        assert during.content == first.content
        assert during.headers["etag"] == first.headers["etag"]

    second = answer_of(await FINALIZE.send(api, finalized_id))["business_context"]

    assert second["revision"] == 2
    assert second["steps"]["1"]["version"] == 3
    assert second["checksum"] == recomputed(second) != first.json()["checksum"]
    latest = await GET_EXPORT.send(api, finalized_id, if_none_match=first.headers["etag"])
    assert answer_of(latest) == second
    assert answer_of(await GET_PROGRESS.send(api, finalized_id))["revision"] == 2
