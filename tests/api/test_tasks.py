"""Tasks over HTTP: every call, every way it can be refused, and what it costs."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.onboarding.tasks import TASK_LIFE_MS, TASK_RULES
from tests.api.helpers import (
    JSON,
    Answers,
    answer_of,
    ask,
    commands,
    dump,
    exchange,
    is_time,
    pointers_of,
    problem_of,
    unknown_id,
)
from tests.faults.servers import HOST, free_ports

TASKS = "/api/v1/sessions"

TASK = {
    *("short_id", "task_type", "task_id", "user_id", "session_id", "status"),
    *("created_at", "updated_at"),
}


def task_path(task_id: str) -> str:
    return f"{TASKS}/task/{task_id}"


async def create(api: AsyncClient, **fields: Any) -> Answers:
    """Begin a task that is tracked, and give the answer."""
    body = {"task_type": "image_analysis", "short_id": "s1", **fields}
    return answer_of(await api.post(f"{TASKS}/task", json=body), 201)


async def set_status(api: AsyncClient, task_id: str, status: Any) -> Response:
    return await api.patch(task_path(task_id), json={"status": status})


async def ids(api: AsyncClient, path: str = "", **query: Any) -> list[str]:
    """Give the ids of a list, whose count must be right."""
    found = answer_of(await api.get(TASKS + path, params=query))
    assert found["total_sessions"] == len(found["sessions"])
    assert all(task.keys() == TASK for task in found["sessions"])
    assert is_time(found["timestamp"])
    return [task["task_id"] for task in found["sessions"]]


async def fill(raw: Redis, first: int, last: int) -> None:
    """Put tasks with these numbers, of one user, into the store, each with a short of its own."""
    now_ms = int((await ask(raw, "TIME"))[0]) * 1000
    script = """
    for n = tonumber(ARGV[4]), tonumber(ARGV[1]) do
      local created = string.format('%.0f', ARGV[2] + n)
      local id, place = 't' .. n, string.format('%016.0f:t%d', ARGV[2] + n, n)
      redis.call('HSET', 'onboarding:task:' .. id, 'task_type', 'image_analysis', 'short_id',
        's' .. n, 'user_id', 'u1', 'status', 'active', 'created_at', created, 'updated_at', created,
        'operation', '0a')
      redis.call('PEXPIRE', 'onboarding:task:' .. id, ARGV[3])
      for _, list in ipairs({'all', 'of:u1'}) do
        redis.call('ZADD', 'onboarding:index:tasks:' .. list, 0, place)
      end
      for _, list in ipairs({'all-ends', 'of-ends:u1'}) do
        redis.call('ZADD', 'onboarding:index:tasks:' .. list, ARGV[2] + ARGV[3], place)
      end
    end"""
    await ask(raw, "EVAL", script, 0, last, now_ms, TASK_LIFE_MS, first)


# --- POST /task -----------------------------------------------------------------------------------


async def test_a_task_begins_active(api: AsyncClient) -> None:
    session_id = unknown_id()
    whole = {"user_id": "ada", "task_id": "t.1", "session_id": session_id}
    task = await create(api, **whole)
    assert task.keys() == TASK
    assert task == {
        "task_type": "image_analysis",
        "short_id": "s1",
        "status": "active",
        **whole,
        **{name: task[name] for name in ("created_at", "updated_at")},
    }
    assert is_time(task["created_at"])
    assert task["created_at"] == task["updated_at"]
    assert answer_of(await api.get(task_path("t.1"))) == task

    bare = await create(api)
    assert bare["user_id"] is None
    assert bare["session_id"] is None
    assert answer_of(await api.get(task_path(bare["task_id"]))) == bare


async def test_every_type_is_taken_and_tracked_when_it_is_to_be(
    api: AsyncClient, raw: Redis
) -> None:
    for task_type in TASK_RULES:
        for fields in ({}, {"short_id": None}, {"short_id": "s1", "task_id": task_type}):
            response = await api.post(f"{TASKS}/task", json={"task_type": task_type, **fields})
            if fields.get("short_id") and task_type != "scraping":
                assert answer_of(response, 201)["task_id"] == task_type
                answer_of(await api.delete(task_path(task_type)))
                continue
            told = answer_of(response)
            assert told == {"tracked": False, "task_id": told["task_id"]}
            assert told["task_id"] == fields.get("task_id", told["task_id"])
            assert await dump(raw) == {}


async def test_an_id_that_is_taken_is_refused(api: AsyncClient, raw: Redis) -> None:
    await create(api, task_id="t1")
    before = await dump(raw)
    again = {"task_type": "scenario_generation", "short_id": "s2", "task_id": "t1"}
    problem_of(await api.post(f"{TASKS}/task", json=again), "task_exists")
    assert await dump(raw) == before


BAD_MEMBERS: list[tuple[Answers, str]] = [
    ({"task_type": "no_type"}, "/task_type"),
    ({"task_type": ""}, "/task_type"),
    ({"task_type": None}, "/task_type"),
    ({"task_type": ["scraping"]}, "/task_type"),
    ({"short_id": "task"}, "/short_id"),
    ({"short_id": ""}, "/short_id"),
    ({"short_id": "a b"}, "/short_id"),
    ({"short_id": "s" * 129}, "/short_id"),
    ({"short_id": 1}, "/short_id"),
    ({"task_id": "a/b"}, "/task_id"),
    ({"task_id": ""}, "/task_id"),
    ({"task_id": "t\n"}, "/task_id"),
    ({"task_id": "t" * 129}, "/task_id"),
    ({"user_id": ""}, "/user_id"),
    ({"user_id": "u" * 129}, "/user_id"),
    ({"user_id": "a\x7fb"}, "/user_id"),
    ({"user_id": True}, "/user_id"),
    ({"session_id": ""}, "/session_id"),
    ({"session_id": "{a}"}, "/session_id"),
    ({"session_id": "task"}, "/session_id"),
]


async def test_what_can_be_no_task_is_refused_by_its_member(api: AsyncClient, raw: Redis) -> None:
    for wrong, pointer in BAD_MEMBERS:
        body = {"task_type": "image_analysis", "short_id": "s1", **wrong}
        told = problem_of(await api.post(f"{TASKS}/task", json=body), "invalid_request")
        assert pointers_of(told) == {pointer}, wrong
        assert pointer[1:] in told["detail"], wrong
    assert await dump(raw) == {}


async def test_a_type_that_is_none_is_refused_with_those_that_there_are(api: AsyncClient) -> None:
    response = await api.post(f"{TASKS}/task", json={"task_type": "image", "short_id": "s1"})
    told = problem_of(response, "invalid_request")
    assert all(task_type in told["detail"] for task_type in TASK_RULES)


BAD_BODIES = [
    (b"{", JSON, "malformed_json"),
    (b"[]", JSON, "invalid_request"),
    (b"", JSON, "malformed_json"),
    (b"{}", JSON, "invalid_request"),
    (b"{}", {"content-type": "text/plain"}, "unsupported_media_type"),
    (b'{"task_type":"' + b"x" * 70_000 + b'"}', JSON, "payload_too_large"),
    (b'{"task_type":"scraping","task_type":"scraping"}', JSON, "invalid_request"),
]


async def test_a_body_that_is_no_task_is_refused(api: AsyncClient, raw: Redis) -> None:
    for content, headers, code in BAD_BODIES:
        problem_of(await api.post(f"{TASKS}/task", content=content, headers=headers), code)
    assert await dump(raw) == {}


async def test_members_that_are_not_known_are_ignored(api: AsyncClient) -> None:
    assert (await create(api, status="failed", more=[1]))["status"] == "active"


async def test_a_type_of_the_deployer_is_taken(serve: Callable[..., Any]) -> None:
    api = await serve(task_types='{"mine": {"kept_until_released": true}}')
    task = await create(api, task_type="mine")
    answer_of(await set_status(api, task["task_id"], "completed"))
    assert await ids(api, "/s1", task_type="mine", status="completed") == [task["task_id"]]


# --- /task/{task_id} ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_a_task_that_ends_is_answered_once_more_and_gone(
    api: AsyncClient, raw: Redis, status: str
) -> None:
    task = await create(api, user_id="ada", task_id="t1")
    ended = answer_of(await set_status(api, "t1", status))
    assert ended == {**task, "status": status, "updated_at": ended["updated_at"]}
    problem_of(await api.get(task_path("t1")), "task_not_found")
    problem_of(await set_status(api, "t1", status), "task_not_found")
    assert await ids(api) == await ids(api, "/s1") == []
    assert await dump(raw) == {}


async def test_a_scenario_that_ends_stays_until_it_is_saved(api: AsyncClient, raw: Redis) -> None:
    for number in range(3):
        await create(api, task_type="scenario_generation", task_id=f"t{number}")
    await create(api, task_id="other")
    await create(api, task_type="scenario_generation", short_id="s2", task_id="elsewhere")
    ended = answer_of(await set_status(api, "t0", "completed"))
    answer_of(await set_status(api, "t1", "failed"))
    assert answer_of(await api.get(task_path("t0"))) == ended
    assert await ids(api, "/s1", status="completed") == ["t0"]

    saved = await api.post(f"{TASKS}/s1/scenario-saved")
    assert answer_of(saved) == {"short_id": "s1", "removed": 3}
    assert await ids(api, "/s1") == ["other"]
    assert await ids(api, "/s2") == ["elsewhere"]
    for short_id in ("s1", "unknown"):
        again = await api.post(f"{TASKS}/{short_id}/scenario-saved")
        assert answer_of(again) == {"short_id": short_id, "removed": 0}


async def test_the_same_status_again_renews_the_life_of_a_task(
    api: AsyncClient, raw: Redis
) -> None:
    task = await create(api, task_type="scenario_generation", task_id="t1")
    for status in ("active", "completed"):
        await raw.pexpire("onboarding:task:t1", 60_000)
        said = answer_of(await set_status(api, "t1", status))
        assert said["status"] == status
        assert said["created_at"] == task["created_at"]
        assert await raw.pttl("onboarding:task:t1") > TASK_LIFE_MS - 60_000
    assert answer_of(await set_status(api, "t1", "completed"))["status"] == "completed"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_what_has_ended_does_not_end_otherwise(api: AsyncClient, end: str) -> None:
    await create(api, task_type="scenario_generation", task_id="t1")
    ended = answer_of(await set_status(api, "t1", end))
    for status in {"active", "completed", "failed", "cancelled"} - {end}:
        told = problem_of(await set_status(api, "t1", status), "invalid_transition")
        assert told["detail"] == f"A task that is {end} cannot become {status}"
    assert answer_of(await api.get(task_path("t1"))) == ended


async def test_another_word_is_no_status(api: AsyncClient) -> None:
    task = await create(api, task_id="t1")
    for status in ("done", "", "ACTIVE", None, 1, ["active"]):
        told = problem_of(await set_status(api, "t1", status), "invalid_request")
        assert pointers_of(told) == {"/status"}
        assert "completed" in str(told["errors"])
    assert answer_of(await api.get(task_path("t1"))) == task


async def test_a_task_is_removed_in_any_status(api: AsyncClient, raw: Redis) -> None:
    await create(api, task_id="t1", user_id="ada")
    await create(api, task_id="t2", task_type="scenario_generation")
    answer_of(await set_status(api, "t2", "failed"))
    for task_id in ("t1", "t2"):
        removed = answer_of(await api.delete(task_path(task_id)))
        assert removed == {"success": True, "task_id": task_id}
        problem_of(await api.delete(task_path(task_id)), "task_not_found")
    assert await dump(raw) == {}


BAD_IDS = ["a b", "a:b", "{t1}", "*", "t1\n", "ä", "a%2fb", "x" * 129, "t1 "]


async def test_what_is_no_task_id_answers_like_an_unknown_one(api: AsyncClient, raw: Redis) -> None:
    await create(api, task_id="t1")
    unknown = problem_of(await exchange(api, "GET", task_path("unknown")), "task_not_found")
    before = await commands(raw)
    for task_id in BAD_IDS:
        target = task_path(quote(task_id, safe="%"))
        for method in ("GET", "PATCH", "DELETE"):
            told = problem_of(await exchange(api, method, target), "task_not_found")
            assert told["detail"] == unknown["detail"]
    assert await commands(raw) == before


async def test_the_path_is_looked_at_before_the_body(api: AsyncClient) -> None:
    problem_of(await api.patch(task_path("a:b"), content=b"{", headers=JSON), "task_not_found")
    problem_of(await api.patch(task_path("t1"), content=b"{", headers=JSON), "malformed_json")
    problem_of(await api.patch(task_path("t1"), json={}), "invalid_request")
    problem_of(await set_status(api, "t1", "active"), "task_not_found")


async def test_a_task_may_be_called_like_a_part_of_a_path(api: AsyncClient) -> None:
    for task_id in ("task", "scenario-saved", ".."):
        task = await create(api, task_id=task_id)
        target = task_path(task_id.replace(".", "%2e"))
        assert json.loads((await exchange(api, "GET", target)).content) == task


# --- GET /{short_id} ------------------------------------------------------------------------------


async def test_a_short_lists_its_tasks_by_what_they_are(api: AsyncClient) -> None:
    await create(api, task_id="t0", user_id="u1")
    await create(api, task_id="t1", user_id="u1", task_type="scenario_generation")
    await create(api, task_id="t2", task_type="scenario_generation")
    await create(api, task_id="t3", short_id="s2", user_id="u1")
    answer_of(await set_status(api, "t1", "failed"))
    whole = answer_of(await api.get(f"{TASKS}/s1"))
    assert whole.keys() == {"short_id", "sessions", "total_sessions", "timestamp"}
    assert whole["short_id"] == "s1"
    assert sorted(await ids(api, "/s1")) == ["t0", "t1", "t2"]
    assert sorted(await ids(api, "/s1", user_id="u1")) == ["t0", "t1"]
    assert sorted(await ids(api, "/s1", task_type="scenario_generation")) == ["t1", "t2"]
    assert await ids(api, "/s1", status="failed") == ["t1"]
    assert await ids(api, "/s1", status="active", user_id="u1") == ["t0"]
    assert await ids(api, "/s1", user_id="nobody") == []
    assert await ids(api, "/unknown") == []


BAD_FILTERS = [
    ("task_type=no_type", "image_analysis"),
    ("task_type=", "image_analysis"),
    ("status=done", "active, completed, failed, cancelled"),
    ("status=", "active, completed, failed, cancelled"),
    ("user_id=", "user_id"),
    ("user_id=%00", "user_id"),
    ("user_id=" + "u" * 129, "user_id"),
    ("status=active&status=active", "once"),
    ("user_id=%ff", "percent-encoded"),
]


async def test_a_filter_that_fits_no_task_is_refused_with_what_would(api: AsyncClient) -> None:
    for query, told in BAD_FILTERS:
        response = await api.get(f"{TASKS}/s1?{query}")
        assert told in problem_of(response, "invalid_request")["detail"], query


async def test_what_is_no_short_id_is_refused(api: AsyncClient, raw: Redis) -> None:
    before = await commands(raw)
    for short_id in BAD_IDS:
        target = f"{TASKS}/{quote(short_id, safe='%')}"
        for method, path in (("GET", target), ("POST", f"{target}/scenario-saved")):
            told = problem_of(await exchange(api, method, path), "invalid_request")
            assert "A-Z a-z 0-9" in told["detail"]
    assert await commands(raw) == before


async def test_the_word_task_is_no_short(api: AsyncClient) -> None:
    for method, path, allowed in (
        ("GET", "/task", "POST"),
        ("POST", "/task/scenario-saved", "DELETE, GET, HEAD, PATCH"),
    ):
        refused = await api.request(method, TASKS + path)
        assert refused.status_code == 405
        assert refused.headers["allow"] == allowed


# --- GET ------------------------------------------------------------------------------------------


async def test_all_tasks_are_listed_newest_first_page_by_page(api: AsyncClient) -> None:
    made = [(await create(api, short_id=f"s{n}", user_id=f"u{n % 2}"))["task_id"] for n in range(7)]
    whole = answer_of(await api.get(TASKS))
    assert whole.keys() == {"sessions", "total_sessions", "timestamp", "next_cursor"}
    assert whole["next_cursor"] is None
    assert sorted(await ids(api)) == sorted(made)
    times = [task["created_at"] for task in whole["sessions"]]
    assert times == sorted(times, reverse=True)
    assert sorted(await ids(api, user_id="u1")) == sorted(made[1::2])
    assert await ids(api, user_id="nobody") == []

    seen: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while query.get("cursor", "") is not None:
        page = answer_of(await api.get(TASKS, params=query))
        assert page["total_sessions"] == 7
        seen += [task["task_id"] for task in page["sessions"]]
        query["cursor"] = page["next_cursor"]
    assert seen == [task["task_id"] for task in whole["sessions"]]


BAD_QUERIES = [
    *("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=%D9%A1"),
    *("cursor=", "cursor=x", "cursor=t1", "cursor=KzA", "user_id=", "limit=1&limit=1"),
]


async def test_a_query_that_cannot_be_is_refused(api: AsyncClient) -> None:
    for query in BAD_QUERIES:
        problem_of(await api.get(f"{TASKS}?{query}"), "invalid_request")


async def test_a_list_costs_the_same_however_many_tasks_there_are(
    api: AsyncClient, raw: Redis
) -> None:
    async def cost(target: str) -> dict[str, int]:
        before = await commands(raw)
        page = answer_of(await api.get(target))
        after = await commands(raw)
        assert len(page["sessions"]) == 50
        counted = {name: calls - before.get(name, 0) for name, calls in after.items()}
        return {name: calls for name, calls in counted.items() if calls}

    targets = [f"{TASKS}?limit=50", f"{TASKS}?limit=50&user_id=u1"]
    costs = {}
    for first, count in ((1, 100), (101, 5_000)):
        await fill(raw, first, count)
        for target in targets:
            await api.get(target)  # the store learns the script
            costs[target, count] = await cost(target)
    for target in targets:
        assert costs[target, 100] == costs[target, 5_000]
        # One round trip, and inside it one command for each task of the answer.
        assert costs[target, 100]["cmdstat_evalsha"] == 1
        assert costs[target, 100]["cmdstat_hmget"] == 50

    whole = answer_of(await api.get(TASKS))
    assert (len(whole["sessions"]), whole["total_sessions"]) == (1000, 5_000)
    assert whole["sessions"][0]["task_id"] == "t5000"
    rest = answer_of(await api.get(TASKS, params={"cursor": whole["next_cursor"]}))
    assert rest["sessions"][0]["task_id"] == "t4000"


# --- Every call -----------------------------------------------------------------------------------

CALLS = [
    ("POST", "/task", {"task_type": "image_analysis", "short_id": "s1"}),
    ("GET", "/task/t1", None),
    ("PATCH", "/task/t1", {"status": "active"}),
    ("DELETE", "/task/t1", None),
    ("GET", "", None),
    ("GET", "/s1", None),
    ("POST", "/s1/scenario-saved", None),
]


async def test_every_path_answers_the_methods_it_has_and_no_other(api: AsyncClient) -> None:
    paths = {path: set[str]() for _, path, _ in CALLS}
    for method, path, _ in CALLS:
        paths[path] |= {method, "HEAD"} if method == "GET" else {method}
    for path, methods in paths.items():
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - methods:
            refused = await exchange(api, method, TASKS + path)
            assert refused.status_code == 405
            assert refused.headers["allow"] == ", ".join(sorted(methods))
    for path in ("/", "/s1/", "/task/t1/", "/s1/other", "/task/t1/other"):
        problem_of(await api.get(TASKS + path), "not_found")


async def test_a_look_without_a_body_is_the_same(api: AsyncClient) -> None:
    await create(api, task_id="t1")
    for path in ("", "/s1", "/task/t1"):
        looked, read = await api.head(TASKS + path), await api.get(TASKS + path)
        assert looked.status_code == 200
        assert looked.content == b""
        assert looked.headers["content-length"] == read.headers["content-length"]
        assert looked.headers["cache-control"] == "no-store"
    assert (await api.head(task_path("unknown"))).status_code == 404


async def test_of_a_task_that_is_not_tracked_the_store_is_not_told(
    serve: Callable[..., Any],
) -> None:
    [port] = free_ports(1)
    api = await serve(redis_url=f"redis://{HOST}:{port}/0", retry_attempts=1)
    untracked = await api.post(f"{TASKS}/task", json={"task_type": "scraping", "short_id": "s1"})
    assert answer_of(untracked)["tracked"] is False


async def test_a_damaged_task_is_an_error_and_no_absence(api: AsyncClient, raw: Redis) -> None:
    await create(api, task_id="t1")
    await create(api, task_id="t2")
    await ask(raw, "HDEL", "onboarding:task:t1", "created_at")
    told = problem_of(await api.get(task_path("t1")), "corrupt_record")
    assert "onboarding:" not in told["detail"]
    problem_of(await set_status(api, "t1", "active"), "corrupt_record")
    for path in ("", "/s1"):
        page = answer_of(await api.get(TASKS + path))
        assert [task["task_id"] for task in page["sessions"]] == ["t2"]
    answer_of(await api.delete(task_path("t1")))
    assert await ids(api) == await ids(api, "/s1") == ["t2"]


async def test_20_at_once_with_one_id_make_one_task(api: AsyncClient) -> None:
    body = {"task_type": "image_analysis", "short_id": "s1", "task_id": "t1"}
    sent = [api.post(f"{TASKS}/task", json=body) for _ in range(20)]
    statuses = sorted([each.status_code for each in await asyncio.gather(*sent)])
    assert statuses == [201] + [409] * 19
    assert await ids(api, "/s1") == ["t1"]
