import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from tests.api.helpers import (
    BATCH,
    DELETE_DRAFT,
    DELETE_STEP,
    GET_DRAFT,
    GET_PROGRESS,
    GET_STEP,
    GET_STEPS,
    JSON,
    PATCH,
    PROMOTE,
    PUT,
    PUT_DRAFT,
    SAVE,
    SAVED,
    STEP,
    Answers,
    Call,
    answer_of,
    check_progress,
    dump,
    events_of,
    is_time,
    pointers_of,
    problem_of,
    save,
    step_path,
    types_of,
)
from tests.service import BASE

ALL_STEPS = range(1, 24)

MALFORMED_TAGS = [
    *("3", "W/3", '"3', '3"', "'3'", 'w/"3"', '"a" "b"', '*, "3"', '"3", *', '"a b"', '"3";q=1'),
    *("**", "W/*"),
]


def saving(step_id: int, data: Answers | None = None) -> Call:
    return SAVE._replace(
        target=SAVE.target.replace("/steps/1", f"/steps/{step_id}"), body={"data": data or {"a": 1}}
    )


async def read(api: AsyncClient, session_id: str, step_id: int = 1) -> Answers:
    return answer_of(await api.get(step_path(session_id, step_id)))


async def progress_of(api: AsyncClient, session_id: str) -> Answers:
    progress: Answers = answer_of(await GET_PROGRESS.send(api, session_id))["progress"]
    return progress


# --- POST and PUT /steps/{n} ----------------------------------------------------------------------


@pytest.mark.parametrize("call", [SAVE, PUT], ids=lambda call: call.name)
async def test_a_saved_step_is_described_in_full(
    api: AsyncClient, session_id: str, call: Call
) -> None:
    response = await call.send(api, session_id)
    saved = answer_of(response)

    assert saved.keys() >= SAVED
    assert saved["success"] is True
    assert saved["session_id"] == session_id
    assert saved["step_id"] == 1
    assert saved["version"] == 1
    assert response.headers["etag"] == '"1"'
    assert is_time(saved["updated_at"])
    assert saved["progress"]["last_updated"] == saved["updated_at"]
    check_progress(saved["progress"], saved=[1])
    assert saved["progress"]["highest_step"] == 1


async def test_a_saved_step_is_read_back(api: AsyncClient, session_id: str) -> None:
    data = {"name": "Acme", "tags": ["ä", None, True], "nested": {"deep": [{}]}}
    saved = await save(api, session_id, 4, data)

    response = await api.get(step_path(session_id, 4))
    step = answer_of(response)

    assert step.keys() >= STEP
    assert step["session_id"] == session_id
    assert step["step_id"] == 4
    assert step["data"] == data
    assert step["version"] == 1
    assert step["saved_at"] == saved["updated_at"]
    assert step["is_draft"] is False
    assert response.headers["etag"] == '"1"'


async def test_a_step_saved_twice_is_at_version_2(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id, 1, {"old": 1})

    response = await PUT.send(api, session_id)

    assert answer_of(response)["version"] == 2
    assert response.headers["etag"] == '"2"'
    assert (await read(api, session_id))["data"] == {"a": 1}
    check_progress(answer_of(response)["progress"], saved=[1])


async def test_each_step_counts_its_own_versions(api: AsyncClient, session_id: str) -> None:
    order = [1, 2, 1, 1, 2, 23]

    versions = [(await save(api, session_id, step_id))["version"] for step_id in order]

    assert versions == [1, 1, 2, 3, 2, 1]


async def test_the_version_goes_on_after_a_delete(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))

    assert (await save(api, session_id))["version"] == 3


async def test_the_bytes_of_the_answers_are_kept(api: AsyncClient, session_id: str) -> None:
    data = b'{ "z" : 1.50,\n\t"a" : "\\u00e9\\/", "a\\u0062" : [ 1e2 , -0.0 ] }'
    body = b' { "other": {}, "data" :  ' + data + b" }\r\n"

    answer_of(await api.put(step_path(session_id, 1), content=body, headers=JSON))

    assert data in (await GET_STEP.send(api, session_id)).content
    assert data in (await GET_STEPS.send(api, session_id)).content


async def test_unknown_members_beside_the_data_are_ignored(
    api: AsyncClient, session_id: str
) -> None:
    body = {"data": {"a": 1}, "version": 99, "step_id": 7}

    saved = answer_of(await api.post(step_path(session_id, 2), json=body))

    assert (saved["step_id"], saved["version"]) == (2, 1)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/data"),
        ({"data": None}, "/data"),
        ({"data": []}, "/data"),
        ({"data": "x"}, "/data"),
        ({"data": 1}, "/data"),
        ({"data": {}}, "/data"),
        ([], ""),
    ],
)
async def test_answers_that_are_no_object_are_named_by_their_pointer(
    api: AsyncClient, session_id: str, body: Any, pointer: str
) -> None:
    problem = problem_of(await api.post(step_path(session_id, 1), json=body), "invalid_step_data")

    assert pointers_of(problem) == {pointer}


# --- Progress after writes ------------------------------------------------------------------------


async def test_progress_follows_the_saved_steps_and_not_their_order(
    api: AsyncClient, session_id: str
) -> None:
    done: list[int] = []
    for step_id, highest in [(1, 1), (5, 5), (3, 5)]:
        done.append(step_id)
        progress = (await save(api, session_id, step_id))["progress"]
        check_progress(progress, saved=done)
        assert progress["highest_step"] == highest
    assert progress["next_step"] == 2
    assert progress["percentage"] == 13.04


async def test_a_deleted_step_counts_no_more_but_was_reached(
    api: AsyncClient, session_id: str
) -> None:
    for step_id in (1, 5, 3):
        await save(api, session_id, step_id)

    deleted = answer_of(await api.delete(step_path(session_id, 5)))

    assert deleted.keys() >= {"success", "session_id", "step_id", "progress"}
    assert deleted["success"] is True
    assert deleted["session_id"] == session_id
    assert deleted["step_id"] == 5
    check_progress(deleted["progress"], saved=[1, 3])
    assert deleted["progress"]["highest_step"] == 5
    assert await progress_of(api, session_id) == deleted["progress"]


async def test_a_step_saved_again_counts_once(api: AsyncClient, session_id: str) -> None:
    for _ in range(3):
        progress = (await save(api, session_id, 2))["progress"]

    check_progress(progress, saved=[2])


async def test_the_percentage_is_a_number_with_two_decimals(
    api: AsyncClient, session_id: str
) -> None:
    expected = {1: 4.35, 2: 8.7, 3: 13.04, 7: 30.43, 11: 47.83, 22: 95.65, 23: 100}
    for step_id in ALL_STEPS:
        progress = (await save(api, session_id, step_id))["progress"]
        assert progress["percentage"] == expected.get(step_id, progress["percentage"])
        assert isinstance(progress["percentage"], int | float)
    assert progress["next_step"] is None
    assert progress["completed_steps"] == list(ALL_STEPS)


async def test_the_next_step_is_the_lowest_unsaved_one(api: AsyncClient, session_id: str) -> None:
    seen = [(await progress_of(api, session_id))["next_step"]]
    seen += [
        (await save(api, session_id, step_id))["progress"]["next_step"] for step_id in (2, 1, 4, 3)
    ]
    seen.append(answer_of(await api.delete(step_path(session_id, 2)))["progress"]["next_step"])

    assert seen == [1, 1, 3, 3, 5, 2]


async def test_only_writes_move_the_time_of_the_last_update(
    api: AsyncClient, session_id: str
) -> None:
    saved = await save(api, session_id)
    for call in (GET_STEP, GET_STEPS, GET_PROGRESS):
        await call.send(api, session_id)

    progress = await progress_of(api, session_id)

    assert progress["last_updated"] == saved["updated_at"]
    assert progress["started_at"] <= progress["last_updated"]


# --- Preconditions --------------------------------------------------------------------------------

AT_VERSION_3 = [SAVE, PUT, PATCH, PROMOTE, DELETE_STEP]


@pytest.fixture
async def third_id(api: AsyncClient, session_id: str) -> str:
    """Give a session whose step 1 is at version 3 and has a draft."""
    for _ in range(3):
        await save(api, session_id)
    answer_of(await PUT_DRAFT.send(api, session_id))
    return session_id


@pytest.mark.parametrize("call", AT_VERSION_3, ids=lambda call: call.name)
@pytest.mark.parametrize("tags", ['"3"', '"1", "3"', '"x","3" ,W/"9"', "*"])
async def test_if_match_lets_a_change_through_that_names_the_version(
    api: AsyncClient, third_id: str, call: Call, tags: str
) -> None:
    answer_of(await call.send(api, third_id, if_match=tags))


@pytest.mark.parametrize("call", AT_VERSION_3, ids=lambda call: call.name)
async def test_if_match_stops_a_change_that_names_other_versions(
    api: AsyncClient, raw: Redis, third_id: str, call: Call
) -> None:
    before = await dump(raw)
    for tags in ('"2"', '"1", "2", "4"', 'W/"3"', '"03"', '""', '"3_"', '"é"', '"*"'):
        target = call.target.replace("{id}", third_id)
        lines = [(b"if-match", tags.encode())]
        response = await api.request(call.method, target, json=call.body, headers=lines)
        assert problem_of(response, "version_conflict")["current_version"] == 3, tags
    assert await dump(raw) == before


@pytest.mark.parametrize("call", [SAVE, PATCH, PROMOTE], ids=lambda call: call.name)
async def test_if_none_match_stops_a_change_of_the_named_version(
    api: AsyncClient, third_id: str, call: Call
) -> None:
    for tags in ("*", '"3"', 'W/"3"', '"1", W/"3"'):
        response = await call.send(api, third_id, if_none_match=tags)
        assert problem_of(response, "version_conflict")["current_version"] == 3, tags
    answer_of(await call.send(api, third_id, if_none_match='"1", W/"2"'))


async def test_if_none_match_star_only_creates(api: AsyncClient, session_id: str) -> None:
    answer_of(await SAVE.send(api, session_id, if_none_match="*"))
    again = await PUT.send(api, session_id, if_none_match="*")
    assert problem_of(again, "version_conflict")["current_version"] == 1

    answer_of(await DELETE_STEP.send(api, session_id))
    created = answer_of(await SAVE.send(api, session_id, if_none_match="*"))

    assert created["version"] == 2


@pytest.mark.parametrize("tags", ['"1"', "*", 'W/"1"'])
async def test_a_version_conflict_about_an_absent_step_has_no_current_version(
    api: AsyncClient, session_id: str, tags: str
) -> None:
    problem = problem_of(await SAVE.send(api, session_id, if_match=tags), "version_conflict")
    assert problem["current_version"] is None

    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))

    problem = problem_of(await SAVE.send(api, session_id, if_match=tags), "version_conflict")
    assert problem["current_version"] is None


async def test_both_preconditions_must_hold(api: AsyncClient, third_id: str) -> None:
    stopped = await SAVE.send(api, third_id, if_match='"3"', if_none_match="*")
    problem_of(stopped, "version_conflict")

    answer_of(await SAVE.send(api, third_id, if_match='"3"', if_none_match='"2"'))


async def test_the_lines_of_a_header_make_one_list(api: AsyncClient, third_id: str) -> None:
    path = step_path(third_id, 1)
    lines = [("if-match", '"1"'), ("if-match", '"3"')]

    answer_of(await api.post(path, json={"data": {"a": 2}}, headers=lines))


async def test_without_a_precondition_the_last_write_wins(
    api: AsyncClient, session_id: str
) -> None:
    for text in ("first", "second"):
        await save(api, session_id, 1, {"text": text})

    assert (await read(api, session_id))["data"] == {"text": "second"}


@pytest.mark.parametrize("tags", MALFORMED_TAGS)
async def test_malformed_tags_are_refused(api: AsyncClient, third_id: str, tags: str) -> None:
    lines = [(b"if-match", tags.encode())]
    for call in (SAVE, PATCH, PROMOTE, DELETE_STEP):
        target = call.target.replace("{id}", third_id)
        response = await api.request(call.method, target, json=call.body, headers=lines)
        problem_of(response, "invalid_header")
    lines = [(b"if-none-match", tags.encode())]
    for call in (SAVE, GET_STEP):
        target = call.target.replace("{id}", third_id)
        response = await api.request(call.method, target, json=call.body, headers=lines)
        problem_of(response, "invalid_header")


async def test_a_precondition_that_fails_is_not_even_an_attempt(
    api: AsyncClient, raw: Redis, third_id: str
) -> None:
    events = await types_of(raw, third_id)

    problem_of(await SAVE.send(api, third_id, if_match='"1"'), "version_conflict")

    assert await types_of(raw, third_id) == events
    assert (await save(api, third_id))["version"] == 4


# --- GET /steps/{n} -------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", ['"3"', 'W/"3"', "*", '"1", "3"', 'W/"1" , W/"3"'])
async def test_a_step_that_the_client_has_is_not_sent_again(
    api: AsyncClient, third_id: str, tags: str
) -> None:
    response = await GET_STEP.send(api, third_id, if_none_match=tags)

    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == '"3"'
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("tags", ['"2"', 'W/"2"', '"03"', '"1", "2"', '"x"'])
async def test_a_step_that_the_client_has_not_is_sent(
    api: AsyncClient, third_id: str, tags: str
) -> None:
    answer_of(await GET_STEP.send(api, third_id, if_none_match=tags))


async def test_a_step_that_is_not_saved_is_not_found(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id, 2)
    for call in (GET_STEP, DELETE_STEP, PATCH):
        problem_of(await call.send(api, session_id), "step_not_found")
        problem_of(await call.send(api, session_id, if_match="*"), "step_not_found")


async def test_a_deleted_step_is_not_found(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))

    for call in (GET_STEP, DELETE_STEP, PATCH):
        problem_of(await call.send(api, session_id), "step_not_found")


# --- PATCH /steps/{n} -----------------------------------------------------------------------------


async def patched(api: AsyncClient, session_id: str, target: Answers, patch: Any) -> Response:
    await save(api, session_id, 1, target)
    return await api.patch(step_path(session_id, 1), json=patch)


async def test_a_patched_step_is_described_as_a_saved_one(
    api: AsyncClient, session_id: str
) -> None:
    response = await patched(api, session_id, {"a": 1}, {"b": 2})
    saved = answer_of(response)

    assert saved.keys() >= SAVED
    assert saved["version"] == 2
    assert response.headers["etag"] == '"2"'
    check_progress(saved["progress"], saved=[1])


@pytest.mark.parametrize(
    ("target", "patch", "outcome"),
    [
        # RFC 7396, appendix A: those whose outcome is a non-empty object.
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({"x": 1}, {"a": {"bb": {"ccc": None}}}, {"x": 1, "a": {"bb": {}}}),
        # Its section 2: what is no object gives way to an object; arrays are not merged.
        ({"a": [1, 2]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"d": [None]}}}, {"a": {"b": {"c": 1, "d": [None]}}}),
        ({"a": 1, "b": 2}, {"c": None}, {"a": 1, "b": 2}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": {"b": 1}}, {"a": {"b": None}}, {"a": {}}),
    ],
)
async def test_a_patch_merges_as_rfc_7396_says(
    api: AsyncClient, session_id: str, target: Answers, patch: Answers, outcome: Answers
) -> None:
    answer_of(await patched(api, session_id, target, patch))

    assert (await read(api, session_id))["data"] == outcome


@pytest.mark.parametrize("media_type", ["application/json", "application/merge-patch+json"])
async def test_a_patch_may_come_as_either_media_type(
    api: AsyncClient, session_id: str, media_type: str
) -> None:
    await save(api, session_id)
    headers = {"content-type": media_type}

    answer_of(await api.patch(step_path(session_id, 1), content=b'{"b":2}', headers=headers))

    assert (await read(api, session_id))["data"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("patch", [{"a": None, "b": None}, [1], "x", 1, None, True])
async def test_an_empty_or_non_object_outcome_is_refused(
    api: AsyncClient, raw: Redis, session_id: str, patch: Any
) -> None:
    await save(api, session_id, 1, {"a": 1, "b": 2})
    before = await dump(raw)

    response = await api.patch(
        step_path(session_id, 1), content=json.dumps(patch).encode(), headers=JSON
    )

    problem_of(response, "invalid_step_data")
    assert await dump(raw) == before


async def test_what_a_patch_does_not_name_stays_equal(api: AsyncClient, session_id: str) -> None:
    data = (
        b'{"big":9007199254740991,"small":5e-324,"price":1.50,"zero":-0.0,"e":1E3,'
        b'"text":"\\ud83d\\ude00\\u0000\\/","none":null,"list":[[],{},[null]],"a":1}'
    )
    answer_of(
        await api.put(step_path(session_id, 1), content=b'{"data":' + data + b"}", headers=JSON)
    )

    answer_of(await api.patch(step_path(session_id, 1), json={"a": None, "b": {"c": 1}}))

    expected = json.loads(data)
    del expected["a"]
    expected["b"] = {"c": 1}
    kept = (await read(api, session_id))["data"]
    # By repr: in Python 1 == 1.0 == True and -0.0 == 0.0.
    assert {name: repr(kept[name]) for name in kept} == {
        name: repr(expected[name]) for name in expected
    }


async def test_patches_at_once_are_all_applied(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    names = [f"m{number}" for number in range(5)]

    answers = await asyncio.gather(
        *(api.patch(step_path(session_id, 1), json={name: 1}) for name in names)
    )

    assert sorted(answer_of(answer)["version"] for answer in answers) == [2, 3, 4, 5, 6]
    assert (await read(api, session_id))["data"] == {"a": 1, **dict.fromkeys(names, 1)}


async def test_a_patch_that_always_comes_too_late_is_a_conflict_and_leaves_no_trace(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id)
    names = [f"m{number}" for number in range(60)]

    answers = await asyncio.gather(
        *(api.patch(step_path(session_id, 1), json={name: 1}) for name in names)
    )

    accepted = {}
    for name, answer in zip(names, answers, strict=True):
        if answer.status_code == 200:
            accepted[name] = 1
        else:
            problem_of(answer, "session_conflict")
    step = await read(api, session_id)
    assert step["data"] == {"a": 1, **accepted}
    assert step["version"] == 1 + len(accepted)


async def test_a_patch_cannot_grow_a_step_past_its_limit(serve: Callable[..., Any]) -> None:
    api = await serve(max_step_bytes=200)
    created = await api.post(f"{BASE}/session", json={"workspace_id": "w"})
    path = step_path(created.json()["session_id"], 1)
    answer_of(await api.put(path, json={"data": {"a": "x" * 150}}))

    problem_of(await api.patch(path, json={"b": "y" * 150}), "payload_too_large")

    assert answer_of(await api.get(path))["version"] == 1


# --- Several steps at once ------------------------------------------------------------------------


async def test_a_batch_saves_every_step(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id, 5)
    steps = {"10": {"x": 1}, "2": {"y": [2]}, "5": {"z": {}}}

    saved = answer_of(await api.post(f"{BASE}/{session_id}/steps", json={"steps": steps}))

    assert saved.keys() >= {"success", "session_id", "saved", "progress"}
    assert saved["success"] is True
    assert saved["session_id"] == session_id
    versions = {each["step_id"]: each["version"] for each in saved["saved"]}
    assert versions == {2: 1, 5: 2, 10: 1}
    check_progress(saved["progress"], saved=[2, 5, 10])
    assert saved["progress"]["highest_step"] == 10
    for number, data in steps.items():
        step = await read(api, session_id, int(number))
        assert step["data"] == data
        assert step["version"] == versions[int(number)]


async def test_a_batch_may_hold_every_step(api: AsyncClient, session_id: str) -> None:
    steps = {str(step_id): {"n": step_id} for step_id in ALL_STEPS}

    saved = answer_of(await api.post(f"{BASE}/{session_id}/steps", json={"steps": steps}))

    check_progress(saved["progress"], saved=ALL_STEPS)


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ({"1": {"a": 1}, "2": {}}, "invalid_step_data"),
        ({"1": {"a": 1}, "2": []}, "invalid_step_data"),
        ({"1": {"a": 1}, "2": None}, "invalid_step_data"),
        ({"1": {"a": 1}, "24": {"a": 1}}, "invalid_step_id"),
        ({"1": {"a": 1}, "0": {"a": 1}}, "invalid_step_id"),
        ({"1": {"a": 1}, "02": {"a": 1}}, "invalid_step_id"),
        ({"1": {"a": 1}, "": {"a": 1}}, "invalid_step_id"),
        ({"1": {"a": 1}, "x": {"a": 1}}, "invalid_step_id"),
        ({"1": {"a": 1}, "\uff12": {"a": 1}}, "invalid_step_id"),
        ({}, "invalid_step_data"),
        ([], "invalid_step_data"),
        (None, "invalid_step_data"),
        ([{"1": {"a": 1}}], "invalid_step_data"),
    ],
)
async def test_a_batch_with_one_fault_saves_nothing(
    api: AsyncClient, raw: Redis, session_id: str, steps: Any, code: str
) -> None:
    await save(api, session_id, 3)
    before = await dump(raw)

    response = await api.post(f"{BASE}/{session_id}/steps", json={"steps": steps})

    problem_of(response, code)
    assert await dump(raw) == before


async def test_a_batch_without_steps_is_refused(api: AsyncClient, session_id: str) -> None:
    response = await api.post(f"{BASE}/{session_id}/steps", json={"data": {"a": 1}})

    assert pointers_of(problem_of(response, "invalid_step_data")) == {"/steps"}


async def test_the_faults_of_a_batch_are_named_by_their_pointers(
    api: AsyncClient, session_id: str
) -> None:
    body = {"steps": {"1": {"a": 1}, "2": [], "3": "x"}}

    problem = problem_of(
        await api.post(f"{BASE}/{session_id}/steps", json=body), "invalid_step_data"
    )

    assert pointers_of(problem) == {"/steps/2", "/steps/3"}


async def test_a_batch_drops_the_drafts_of_its_steps(api: AsyncClient, session_id: str) -> None:
    answer_of(await PUT_DRAFT.send(api, session_id))

    answer_of(await BATCH.send(api, session_id))

    problem_of(await GET_DRAFT.send(api, session_id), "draft_not_found")


# --- GET /steps -----------------------------------------------------------------------------------


async def test_the_list_holds_each_saved_step_as_it_is_read_alone(
    api: AsyncClient, session_id: str
) -> None:
    for step_id in (7, 1, 1):
        await save(api, session_id, step_id, {"n": step_id})
    answer_of(await PUT_DRAFT.send(api, session_id))

    listed = answer_of(await GET_STEPS.send(api, session_id))

    assert listed.keys() >= {"session_id", "steps", "missing"}
    assert listed["session_id"] == session_id
    assert listed["missing"] == [step_id for step_id in ALL_STEPS if step_id not in {1, 7}]
    assert listed["steps"] == {
        "1": await read(api, session_id, 1),
        "7": await read(api, session_id, 7),
    }


async def test_the_list_of_an_empty_session_misses_every_step(
    api: AsyncClient, session_id: str
) -> None:
    listed = answer_of(await GET_STEPS.send(api, session_id))

    assert listed["steps"] == {}
    assert listed["missing"] == list(ALL_STEPS)


# --- A finalized session --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [SAVE, PUT, PATCH, DELETE_STEP, BATCH, PUT_DRAFT], ids=lambda call: call.name
)
async def test_a_finalized_session_takes_no_change_of_a_step(
    api: AsyncClient, raw: Redis, finalized_id: str, call: Call
) -> None:
    before = await dump(raw)

    problem_of(await call.send(api, finalized_id), "session_finalized")

    assert await dump(raw) == before


async def test_a_finalized_session_is_read_as_before(api: AsyncClient, finalized_id: str) -> None:
    assert (await read(api, finalized_id))["data"] == {"a": 1}
    assert answer_of(await GET_STEPS.send(api, finalized_id))["steps"].keys() == {"1"}
    check_progress(await progress_of(api, finalized_id), saved=[1])


# --- Events ---------------------------------------------------------------------------------------

EVENTS = [
    (SAVE, [("step_saved", "1", "2")]),
    (PUT, [("step_saved", "1", "2")]),
    (PATCH, [("step_saved", "1", "2")]),
    (PROMOTE, [("step_saved", "1", "2")]),
    (DELETE_STEP, [("step_deleted", "1", "1")]),
    (BATCH, [("step_saved", "1", "2"), ("step_saved", "2", "1")]),
    (PUT_DRAFT, []),
    (DELETE_DRAFT, []),
    (GET_STEP, []),
    (GET_STEPS, []),
]


@pytest.mark.parametrize(("call", "made"), EVENTS, ids=[call.name for call, _ in EVENTS])
async def test_a_change_of_a_step_makes_one_event_of_its_type(
    api: AsyncClient,
    raw: Redis,
    session_id: str,
    call: Call,
    made: list[tuple[str, str, str]],
) -> None:
    await save(api, session_id)
    answer_of(await PUT_DRAFT.send(api, session_id))
    before = await events_of(raw, session_id)

    answer_of(await call.send(api, session_id))

    events = await events_of(raw, session_id)
    assert events[: len(before)] == before
    new = [(each["type"], each["step_id"], each["version"]) for each in events[len(before) :]]
    assert new == made


async def test_a_step_saved_again_after_a_delete_is_told_with_its_next_version(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))
    await save(api, session_id)

    events = [(each["type"], each["version"]) for each in (await events_of(raw, session_id))[1:]]

    assert events == [("step_saved", "1"), ("step_deleted", "1"), ("step_saved", "2")]


async def test_a_damaged_step_is_an_error_and_the_others_still_read(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for step_id in (1, 2):
        await save(api, session_id, step_id)
    await raw.set(f"onboarding:{session_id}:step:1", b"\xff{", keepttl=True)

    problem_of(await GET_STEP.send(api, session_id), "corrupt_record")
    assert (await read(api, session_id, 2))["data"] == {"a": 1}
