"""What operators may ask for over HTTP: lists, numbers, clean-ups, bulk changes, recovery."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from itertools import count, product
from time import time
from typing import Any, NamedTuple

import pytest
import time_machine
from httpx2 import AsyncClient, Response
from redis.asyncio import Redis

from app.onboarding.retention import LONGEST_AGE_HOURS, LONGEST_INTERVAL_S, MOST_SESSIONS
from app.settings import Settings
from tests.api.helpers import (
    JSON,
    Answers,
    Claims,
    answer_of,
    ask,
    check_progress,
    commands,
    create,
    events_of,
    is_time,
    keys_of,
    pointers_of,
    problem_of,
    save,
    step_path,
    types_of,
    unknown_id,
)
from tests.service import BASE
from tests.store.test_stats import load_sessions

ADMIN = "/api/v1/admin"
NOBODY = "2c9f6d1e-0d3b-4f2a-9c55-3f6f3a1f7a10"
"""The id of a session that there is not, the same in every process that collects these tests."""

Serve = Callable[..., Awaitable[AsyncClient]]

ROW = {
    *("session_id", "status", "workspace_id", "user_id", "created_at", "last_activity"),
    *("age_hours", "progress"),
}
STATS = {
    *("total_sessions", "max_capacity", "utilization_percent", "status_breakdown"),
    *("age_distribution", "average_age_hours", "oldest_session_hours", "newest_session_hours"),
    *("funnel", "cleanup"),
}
HEALTH = {
    *("overall_health", "session_count", "utilization_percent", "stuck_sessions"),
    "cleanup_active",
}

GETS = ["/sessions", "/stats", "/health", "/config"]

CALLS: dict[str, tuple[str, Any]] = {
    "/sessions": ("GET", None),
    "/stats": ("GET", None),
    "/health": ("GET", None),
    "/cleanup": ("POST", {"all": True}),
    "/sessions/bulk": ("POST", {"session_ids": [unknown_id()], "set": {"status": "error"}}),
    f"/sessions/{NOBODY}/recover": ("POST", None),
    "/config": ("GET", None),
}
"""Every path with one of its methods and a body that it takes."""


@pytest.fixture
def later() -> Iterator[time_machine.Traveller]:
    """Give our clock, to be moved; the store's own stays."""
    with time_machine.travel(time(), tick=True) as traveller:
        yield traveller


async def get(api: AsyncClient, path: str, **query: Any) -> Answers:
    return answer_of(await api.get(ADMIN + path, params=query))


async def post(api: AsyncClient, path: str, body: Any = None) -> Response:
    if body is None:
        return await api.post(ADMIN + path)
    return await api.post(ADMIN + path, json=body)


async def clean(api: AsyncClient, **body: Any) -> Answers:
    done = answer_of(await post(api, "/cleanup", body))
    assert done.keys() == {"removed", "session_ids", "more"}
    assert done["removed"] == len(done["session_ids"]) == len(set(done["session_ids"]))
    return done


async def change(api: AsyncClient, session_ids: list[str], **what: Any) -> Answers:
    done = answer_of(await post(api, "/sessions/bulk", {"session_ids": session_ids, "set": what}))
    assert done.keys() == {"updated", "failed"}
    return done


async def set_status(api: AsyncClient, session_id: str, *statuses: str) -> None:
    for status in statuses:
        answer_of(await api.put(f"{BASE}/{session_id}/status", json={"status": status}))


async def listed(api: AsyncClient, **query: Any) -> list[str]:
    """Give the ids of every session that a list holds, page by page."""
    found: list[str] = []
    while True:
        page = await get(api, "/sessions", **query)
        found += [row["session_id"] for row in page["sessions"]]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CALLS)
async def test_no_call_is_stored_by_anybody_and_another_method_is_refused(
    api: AsyncClient, path: str
) -> None:
    method, body = CALLS[path]
    response = await api.request(method, ADMIN + path, json=body) if body else None
    response = response or await api.request(method, ADMIN + path)
    assert response.headers["cache-control"] == "no-store"
    refused = await api.request("DELETE", ADMIN + path)
    problem_of(refused, "method_not_allowed")
    allowed = {word.strip() for word in refused.headers["allow"].split(",")}
    assert method in allowed
    assert ("HEAD" in allowed) == ("GET" in allowed)
    assert "DELETE" not in allowed


@pytest.mark.parametrize("path", GETS)
async def test_head_answers_as_get_does_without_a_body(api: AsyncClient, path: str) -> None:
    response = await api.head(ADMIN + path)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-type"] == "application/json"


# --- GET /sessions --------------------------------------------------------------------------------


async def test_an_empty_list_ends_at_once(api: AsyncClient) -> None:
    assert await get(api, "/sessions") == {"sessions": [], "next_cursor": None}


async def test_a_listed_session_is_described_as_it_is(
    api: AsyncClient, later: time_machine.Traveller
) -> None:
    session_id = await create(api, workspace_id="w é/1", user_id="ada")
    later.shift(1800)
    await save(api, session_id, 2)
    later.shift(3600)
    bare = str(
        answer_of(await api.post("/api/v1/onboarding/session", json={"workspace_id": "w"}), 201)[
            "session_id"
        ]
    )

    newest, row = (await get(api, "/sessions"))["sessions"]
    assert newest["session_id"] == bare
    assert newest["user_id"] is None
    assert newest["age_hours"] == 0.0
    assert row.keys() == ROW
    assert (row["session_id"], row["status"]) == (session_id, "pending")
    assert (row["workspace_id"], row["user_id"]) == ("w é/1", "ada")
    assert row["age_hours"] == 1.5
    check_progress(row["progress"], [2])
    session = answer_of(await api.get(f"{BASE}/{session_id}"))
    assert row["created_at"] == session["created_at"]
    assert row["progress"] == session["progress"]
    assert row["last_activity"] == session["progress"]["last_updated"]
    assert is_time(row["last_activity"])


async def test_activity_is_an_accepted_write_and_no_read(
    api: AsyncClient, later: time_machine.Traveller
) -> None:
    session_id = await create(api)

    async def activity() -> str:
        [row] = (await get(api, "/sessions"))["sessions"]
        return str(row["last_activity"])

    begun = await activity()
    later.shift(60)
    await api.get(f"{BASE}/{session_id}/steps")
    await api.get(f"{BASE}/{session_id}/summary")
    await get(api, "/stats")
    refused = await api.put(f"{BASE}/{session_id}/status", json={"status": "complete"})
    assert refused.status_code == 409
    assert await activity() == begun
    answer_of(await api.put(f"{step_path(session_id, 3)}/draft", json={"data": {"a": 1}}))
    drafted = await activity()
    assert drafted > begun
    later.shift(60)
    answer_of(await api.put(f"{BASE}/{session_id}/language", json={"language": "en"}))
    assert await activity() > drafted


STATUS_PATHS = {
    "pending": (),
    "processing": ("processing",),
    "complete": ("processing", "complete"),
    "error": ("error",),
}


async def test_filters_hold_alone_and_together_and_on_every_page(api: AsyncClient) -> None:
    made: list[tuple[str, str, str, str | None]] = []
    owners = product(STATUS_PATHS, ("w1", "w2"), ("ada", None, "bob"))
    for status, workspace, user in owners:
        names = {} if user is None else {"user_id": user}
        session_id = await create(api, workspace_id=workspace, **names)
        await set_status(api, session_id, *STATUS_PATHS[status])
        made.insert(0, (session_id, status, workspace, user))

    for asked_for in product(
        [None, *STATUS_PATHS], [None, "w1", "w2", "w3"], [None, "ada", "bob", "eve"]
    ):
        asked = dict(zip(("status", "workspace_id", "user_id"), asked_for, strict=True))
        query = {name: value for name, value in asked.items() if value is not None}
        expected = [
            row[0]
            for row in made
            if all(
                want is None or want == has
                for want, has in zip(asked.values(), row[1:], strict=True)
            )
        ]
        assert await listed(api, **query) == expected, query
        assert await listed(api, limit=2, **query) == expected, query


@pytest.mark.parametrize("query", [{}, {"workspace_id": "w1"}, {"user_id": "u0"}], ids=str)
async def test_a_session_that_is_there_throughout_is_listed_once_whatever_comes_and_goes(
    api: AsyncClient, query: dict[str, str]
) -> None:
    made = list(
        await asyncio.gather(*(create(api, workspace_id="w1", user_id="u0") for _ in range(40)))
    )
    throughout = set(made[10:])
    leaving = made[:10]
    found: list[str] = []
    cursor: dict[str, str] = {}
    number = count()
    while True:
        page = await get(api, "/sessions", limit=4, **query, **cursor)
        found += [row["session_id"] for row in page["sessions"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
        await create(api, workspace_id="w1", user_id="u0")
        # Those that were listed already and those that were not change their places.
        for at in (next(number), next(number)):
            session_id = made[10 + (at * 7) % 30]
            if at < 30:
                await set_status(api, session_id, "processing")
                await save(api, session_id)
        if leaving:
            await api.delete(f"{BASE}/{leaving.pop()}")
        # The one that the cursor was made after, too.
        if page["sessions"] and page["sessions"][-1]["session_id"] not in throughout:
            await api.delete(f"{BASE}/{page['sessions'][-1]['session_id']}")
    assert len(found) == len(set(found))
    assert throughout <= set(found)


async def test_a_session_that_moved_is_in_the_list_of_its_new_owner_alone(api: AsyncClient) -> None:
    session_id = await create(api, workspace_id="w1", user_id="ada")
    await change(api, [session_id], status="processing")
    assert await listed(api, status="pending") == []
    assert await listed(api, status="processing", workspace_id="w1") == [session_id]
    answer_of(await api.delete(f"{BASE}/{session_id}"))
    for query in ({}, {"status": "processing"}, {"workspace_id": "w1"}, {"user_id": "ada"}):
        assert await listed(api, **query) == []


BAD_QUERIES: list[tuple[str, str | None]] = [
    ("status=active", "/status"),
    ("status=", "/status"),
    ("status=Pending", "/status"),
    ("status=pending%00", "/status"),
    ("limit=0", "/limit"),
    ("limit=1001", "/limit"),
    ("limit=-1", "/limit"),
    ("limit=1.5", "/limit"),
    ("limit=", "/limit"),
    ("limit=%D9%A3", "/limit"),
    ("limit=1e2", "/limit"),
    ("limit=99999999999999999999", "/limit"),
    ("limit=%201", "/limit"),
    ("workspace_id=", "/workspace_id"),
    ("workspace_id=%00", "/workspace_id"),
    ("workspace_id=a%0Ab", "/workspace_id"),
    ("workspace_id=" + "x" * 129, "/workspace_id"),
    ("user_id=", "/user_id"),
    ("user_id=%7F", "/user_id"),
    ("user_id=%C2%85", "/user_id"),
    ("cursor=", "/cursor"),
    ("cursor=x", "/cursor"),
    ("cursor=%00", "/cursor"),
    ("cursor=%D9%A3", "/cursor"),
    ("cursor=MTIzNDU2Nzg5MDEyMzQ6%0A", "/cursor"),
    ("cursor=" + "A" * 5000, "/cursor"),
    ("status=pending&status=error", None),
    ("limit=5&limit=5", None),
    ("workspace_id=%FF", None),
]
"""What cannot be asked for, and what is at fault of it."""


async def test_a_query_that_cannot_be_is_refused_before_the_store_is_asked(
    api: AsyncClient, raw: Redis
) -> None:
    claims = Claims()
    await get(api, "/sessions")
    await ask(raw, "CONFIG", "RESETSTAT")
    for query, pointer in BAD_QUERIES:
        with claims.about(query):
            problem = problem_of(await api.get(f"{ADMIN}/sessions?{query}"), "invalid_request")
            if pointer is not None:
                assert pointers_of(problem) == {pointer}
    assert "cmdstat_zrevrangebylex" not in await commands(raw)
    claims.settle()


async def test_an_unknown_parameter_and_one_that_nobody_has_are_no_fault(api: AsyncClient) -> None:
    session_id = await create(api)
    assert await listed(api, order="asc") == [session_id]
    assert await listed(api, workspace_id="' OR 1=1 --") == []
    assert await listed(api, limit=1000) == [session_id]


async def test_a_session_that_cannot_be_read_is_listed_without_progress(
    api: AsyncClient, raw: Redis
) -> None:
    damaged, whole = await create(api), await create(api)
    await raw.hset(f"onboarding:{damaged}:progress", "saved", "nonsense")
    first, second = (await get(api, "/sessions"))["sessions"]
    assert (first["session_id"], first["progress"]["completed"]) == (whole, 0)
    assert (second["session_id"], second["progress"]) == (damaged, None)


# --- GET /stats -----------------------------------------------------------------------------------


async def test_the_statistics_of_nothing_have_every_member(api: AsyncClient) -> None:
    stats = await get(api, "/stats")
    assert stats.keys() >= STATS
    assert (stats["total_sessions"], stats["max_capacity"]) == (0, 0)
    assert stats["utilization_percent"] == 0
    assert stats["cleanup"].keys() >= {"last_run", "removed", "failures"}
    assert [step["step_id"] for step in stats["funnel"]] == [*range(1, 24)]
    assert all(
        step == {"step_id": step["step_id"], "saved": 0, "median_seconds_to_next": None}
        for step in stats["funnel"]
    )


async def test_the_statistics_count_what_there_is(
    serve: Serve, later: time_machine.Traveller
) -> None:
    api = await serve(max_sessions=8)
    later.shift(-30 * 3600)
    old = await create(api)
    await save(api, old, 1)
    later.shift(90)
    await save(api, old, 2)
    later.shift(20 * 3600 - 90)
    await set_status(api, await create(api), "processing")
    later.shift(8 * 3600)
    await set_status(api, await create(api), "error")
    later.shift(2 * 3600)
    await create(api)

    stats = await get(api, "/stats")
    assert stats["total_sessions"] == 4
    assert stats["max_capacity"] == 8
    assert stats["utilization_percent"] == 50.0
    assert stats["status_breakdown"] == {"pending": 2, "processing": 1, "complete": 0, "error": 1}
    assert stats["age_distribution"] == {
        "under_1h": 1,
        "1h_to_6h": 1,
        "6h_to_24h": 1,
        "over_24h": 1,
    }
    assert stats["oldest_session_hours"] == pytest.approx(30, abs=0.02)
    assert stats["newest_session_hours"] == pytest.approx(0, abs=0.02)
    assert stats["average_age_hours"] == pytest.approx((30 + 10 + 2 + 0) / 4, abs=0.02)
    first, second, *others = stats["funnel"]
    assert (first["saved"], second["saved"]) == (1, 1)
    assert first["median_seconds_to_next"] == pytest.approx(90, rel=0.2)
    assert second["median_seconds_to_next"] is None
    assert {step["saved"] for step in others} == {0}


# --- GET /health ----------------------------------------------------------------------------------


async def test_the_health_turns_at_70_and_at_90_percent(serve: Serve) -> None:
    api = await serve(max_sessions=10)
    seen = []
    for made in range(11):
        health = await get(api, "/health")
        assert health.keys() >= HEALTH
        assert health["session_count"] == made
        assert health["utilization_percent"] == 10 * made
        seen.append(health["overall_health"])
        if made < 10:
            await create(api)
    assert seen == ["healthy"] * 7 + ["warning"] * 2 + ["critical"] * 2
    problem = problem_of_capacity(await api.post(f"{BASE}/session", json={"workspace_id": "w1"}))
    assert "many" in problem["detail"]
    # Without a limit nothing is full.
    answer_of(await api.patch(f"{ADMIN}/config", json={"max_sessions": 0}))
    assert (await get(api, "/health"))["overall_health"] == "healthy"
    await create(api)


def problem_of_capacity(response: Response) -> Answers:
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    problem: Answers = response.json()
    assert problem["code"] == "capacity_reached"
    return problem


async def test_a_session_is_stuck_after_30_minutes_of_processing_without_activity(
    api: AsyncClient, later: time_machine.Traveller
) -> None:
    stuck, busy, done, failed, waiting = [await create(api) for _ in range(5)]
    await set_status(api, stuck, "processing")
    await set_status(api, busy, "processing")
    await set_status(api, done, "processing", "complete")
    await set_status(api, failed, "error")
    later.shift(30 * 60 - 5)
    assert (await get(api, "/health"))["stuck_sessions"] == 0
    report = {"stage": "s", "progress": 5}
    answer_of(await api.post(f"{BASE}/{busy}/events", json=report), 201)
    later.shift(10)
    # A look is no activity.
    answer_of(await api.get(f"{BASE}/{stuck}/status"))
    health = await get(api, "/health")
    assert health["stuck_sessions"] == 1
    assert health["stuck_session_ids"] == [stuck]
    assert health["overall_health"] == "healthy"
    await set_status(api, stuck, "error")
    assert (await get(api, "/health"))["stuck_sessions"] == 0
    assert waiting in await listed(api)


# --- POST /cleanup --------------------------------------------------------------------------------


BAD_CLEANUPS: list[tuple[Answers, str | None]] = [
    ({}, None),
    ({"dry_run": True}, None),
    ({"all": False}, None),
    ({"status": None, "older_than_hours": None}, None),
    ({"everything": True}, None),
    ({"all": "true"}, "/all"),
    ({"all": 1}, "/all"),
    ({"all": None}, "/all"),
    ({"all": True, "dry_run": "no"}, "/dry_run"),
    ({"all": True, "dry_run": None}, "/dry_run"),
    ({"status": "done"}, "/status"),
    ({"status": ""}, "/status"),
    ({"status": "pending\n"}, "/status"),
    ({"status": ["pending"]}, "/status"),
    ({"all": True, "status": "x"}, "/status"),
    ({"older_than_hours": "1"}, "/older_than_hours"),
    ({"older_than_hours": -1}, "/older_than_hours"),
    ({"older_than_hours": -0.001}, "/older_than_hours"),
    ({"older_than_hours": True}, "/older_than_hours"),
    ({"older_than_hours": LONGEST_AGE_HOURS + 1}, "/older_than_hours"),
    ({"older_than_hours": 1e300}, "/older_than_hours"),
    ({"older_than_hours": {}}, "/older_than_hours"),
]
"""Bodies that say no sessions, and what is at fault of them."""


async def test_a_clean_up_that_does_not_say_which_removes_nothing(
    api: AsyncClient, session_id: str
) -> None:
    claims = Claims()
    for body, pointer in BAD_CLEANUPS:
        with claims.about(body):
            problem = problem_of(await post(api, "/cleanup", body), "invalid_request")
            if pointer is not None:
                assert pointers_of(problem) == {pointer}
    assert await listed(api) == [session_id]
    claims.settle()


@pytest.mark.parametrize("path", ["/cleanup", "/sessions/bulk", "/config"])
async def test_a_body_that_is_none_is_refused(api: AsyncClient, session_id: str, path: str) -> None:
    method = "PATCH" if path == "/config" else "POST"

    async def send(content: bytes, **headers: str) -> Response:
        sent = headers or JSON
        return await api.request(method, ADMIN + path, content=content, headers=sent)

    for content in (b"", b"{", b'{"all":true', b"\xff", b'\xef\xbb\xbf{"all":true}', b"{'a':1}"):
        problem_of(await send(content), "malformed_json")
    for content in (b"[]", b"null", b'"all"', b'{"all":true,"all":true}', b'{"a":1e400}'):
        problem_of(await send(content), "invalid_request")
    plain = await send(b'{"all":true}', **{"content-type": "text/plain"})
    problem_of(plain, "unsupported_media_type")
    problem_of(await send(b'{"all":true,"x":"' + b"x" * 65_536 + b'"}'), "payload_too_large")
    assert await listed(api) == [session_id]


async def test_a_clean_up_takes_what_it_names_unexported_sessions_too(
    api: AsyncClient, raw: Redis, later: time_machine.Traveller
) -> None:
    later.shift(-25 * 3600)
    old_error, old = await create(api), await create(api)
    await set_status(api, old_error, "error")
    await save(api, old)
    later.shift(24 * 3600)
    error, held, drafted = await create(api), await create(api), await create(api)
    await set_status(api, error, "error")
    await save(api, held)
    answer_of(await api.put(f"{step_path(drafted, 1)}/draft", json={"data": {"a": 1}}))
    later.shift(3600)

    for body, expected in (
        ({"status": "complete"}, set()),
        ({"older_than_hours": 26}, set()),
        ({"older_than_hours": 24.5}, {old_error, old}),
        ({"status": "error", "older_than_hours": 2}, {old_error}),
        ({"status": "error"}, {old_error, error}),
        ({"all": True}, {old_error, old, error, held, drafted}),
        ({"all": True, "status": "pending"}, {old, held, drafted}),
        ({"older_than_hours": 0}, {old_error, old, error, held, drafted}),
    ):
        told = await clean(api, dry_run=True, **body)
        assert set(told["session_ids"]) == expected, body
        assert told["more"] is False
        assert len(await listed(api)) == 5

    done = await clean(api, status="error", older_than_hours=2, dry_run=False)
    assert done == {"removed": 1, "session_ids": [old_error], "more": False}
    assert await keys_of(raw, old_error) == []
    assert (await api.get(f"{BASE}/{old_error}")).status_code == 404
    assert set((await clean(api, older_than_hours=2))["session_ids"]) == {old}
    assert set((await clean(api, all=True))["session_ids"]) == {error, held, drafted}
    assert await listed(api) == []
    assert await clean(api, all=True) == {"removed": 0, "session_ids": [], "more": False}
    for session_id in (old, error, held, drafted):
        assert await keys_of(raw, session_id) == []
    assert (await get(api, "/stats"))["cleanup"]["removed"] == 5


@pytest.mark.parametrize("damage", ["progress", "saved", "events", "ops", "entry"])
async def test_a_clean_up_of_everything_leaves_no_key_of_a_damaged_session(
    api: AsyncClient, raw: Redis, session_id: str, damage: str
) -> None:
    await save(api, session_id, 2)
    answer_of(await api.put(f"{step_path(session_id, 23)}/draft", json={"data": {"a": 1}}))
    prefix = f"onboarding:{session_id}:"
    match damage:
        case "saved":
            await raw.hset(f"{prefix}progress", "saved", "")
        case "entry":
            await raw.hset("onboarding:index:sessions:entries", session_id, "nonsense")
        case key:
            await raw.delete(prefix + key)
            await raw.set(prefix + key, "nonsense", ex=100)
    done = await clean(api, all=True)
    assert done["session_ids"] == [session_id]
    assert await keys_of(raw, session_id) == []
    assert await listed(api) == []


async def test_a_clean_up_takes_a_thousand_at_most_and_says_that_there_are_more(
    api: AsyncClient, raw: Redis, settings: Settings
) -> None:
    names = await load_sessions(raw, settings, 1003)
    told = await clean(api, all=True, dry_run=True)
    assert (told["removed"], told["more"]) == (1000, True)
    assert (await get(api, "/health"))["session_count"] == 1003
    done = await clean(api, all=True)
    assert done == {"removed": 1000, "session_ids": names[:1000], "more": True}
    done = await clean(api, all=True)
    assert done == {"removed": 3, "session_ids": names[1000:], "more": False}
    assert (await get(api, "/stats"))["total_sessions"] == 0

    names = await load_sessions(raw, settings, 1000)
    assert (await clean(api, all=True))["more"] is False


# --- POST /sessions/bulk --------------------------------------------------------------------------


BAD_CHANGES: list[tuple[Answers, str | None]] = [
    ({}, None),
    ({"set": {"status": "error"}}, "/session_ids"),
    ({"session_ids": [], "set": {"status": "error"}}, "/session_ids"),
    ({"session_ids": "x", "set": {"status": "error"}}, "/session_ids"),
    ({"session_ids": None, "set": {"status": "error"}}, "/session_ids"),
    ({"session_ids": [None], "set": {"status": "error"}}, "/session_ids/0"),
    ({"session_ids": ["ID", 7], "set": {"status": "error"}}, "/session_ids/1"),
    ({"session_ids": ["a"] * 1001, "set": {"status": "error"}}, "/session_ids"),
    ({"session_ids": ["ID"]}, "/set"),
    ({"session_ids": ["ID"], "set": None}, "/set"),
    ({"session_ids": ["ID"], "set": []}, "/set"),
    ({"session_ids": ["ID"], "set": {}}, None),
    ({"session_ids": ["ID"], "set": {"revision": 4}}, None),
    ({"session_ids": ["ID"], "set": {"status": "done"}}, "/set/status"),
    ({"session_ids": ["ID"], "set": {"status": "error\n"}}, "/set/status"),
    ({"session_ids": ["ID"], "set": {"status": 1}}, "/set/status"),
    ({"session_ids": ["ID"], "set": {"status": None}}, "/set/status"),
    ({"session_ids": ["ID"], "set": {"language": "a b"}}, "/set/language"),
    ({"session_ids": ["ID"], "set": {"language": ""}}, "/set/language"),
    ({"session_ids": ["ID"], "set": {"language": None}}, "/set/language"),
    ({"session_ids": ["ID"], "set": {"language": 5}}, "/set/language"),
    ({"session_ids": ["ID"], "set": {"metadata": []}}, "/set/metadata"),
    ({"session_ids": ["ID"], "set": {"metadata": "{}"}}, "/set/metadata"),
    ({"session_ids": ["ID"], "set": {"metadata": None}}, None),
    ({"session_ids": ["ID"], "set": {"status": "error", "language": "?"}}, "/set/language"),
]
"""Bodies that cannot be taken, and what is at fault of them."""


async def test_a_bulk_change_that_no_session_could_take_changes_none(
    api: AsyncClient, session_id: str
) -> None:
    claims = Claims()
    before = answer_of(await api.get(f"{BASE}/{session_id}"))
    for bad, pointer in BAD_CHANGES:
        body = bad
        if isinstance(bad.get("session_ids"), list):
            ids = [session_id if each == "ID" else each for each in bad["session_ids"]]
            body = {**bad, "session_ids": ids}
        with claims.about(str(bad)[:100]):
            problem = problem_of(await post(api, "/sessions/bulk", body), "invalid_request")
            if pointer is not None:
                assert pointers_of(problem) == {pointer}
    assert answer_of(await api.get(f"{BASE}/{session_id}")) == before
    claims.settle()


async def test_a_bulk_change_changes_each_session_by_itself(api: AsyncClient, raw: Redis) -> None:
    pending, processing, done, error = [await create(api, metadata={"a": 1}) for _ in range(4)]
    await set_status(api, processing, "processing")
    await set_status(api, done, "processing", "complete")
    await set_status(api, error, "error")
    unknown = unknown_id()
    strange = ["", "a b", "onboarding:x", "task", "x\n", pending.upper(), "é", "*", "x" * 200]

    told = await change(
        api,
        [pending, unknown, processing, pending, *strange, done, error, processing],
        status="error",
        language="pt-BR",
    )
    assert told["updated"] == 3
    # In the order in which they were named.
    assert told["failed"] == [
        {"session_id": unknown, "code": "session_not_found"},
        *({"session_id": each, "code": "session_not_found"} for each in strange),
        {"session_id": done, "code": "invalid_transition"},
    ]
    for session_id in (pending, processing, error):
        session = answer_of(await api.get(f"{BASE}/{session_id}"))
        assert (session["status"], session["language"]) == ("error", "pt-BR")
        assert session["metadata"] == {"a": 1}
    # All or none of each.
    session = answer_of(await api.get(f"{BASE}/{done}"))
    assert (session["status"], session["language"]) == ("complete", "en")
    assert await types_of(raw, pending) == ["session_created", "language_changed", "status_changed"]
    assert await types_of(raw, error) == ["session_created", "status_changed", "language_changed"]


async def test_a_bulk_change_of_status_goes_by_the_transitions_that_there_are(
    api: AsyncClient,
) -> None:
    claims = Claims()
    allowed = {
        *(("pending", "processing"), ("pending", "error"), ("processing", "complete")),
        *(("processing", "error"), ("error", "processing"), ("complete", "processing")),
    }
    for status, wanted in product(STATUS_PATHS, STATUS_PATHS):
        session_id = await create(api)
        await set_status(api, session_id, *STATUS_PATHS[status])
        is_done = status == wanted or (status, wanted) in allowed
        failed = [{"session_id": session_id, "code": "invalid_transition"}]
        with claims.about((status, wanted)):
            told = await change(api, [session_id], status=wanted)
            assert told == {"updated": int(is_done), "failed": [] if is_done else failed}
            seen = answer_of(await api.get(f"{BASE}/{session_id}/status"))
            assert seen["status"] == (wanted if is_done else status)
            assert session_id in await listed(api, status=seen["status"])
    claims.settle()


async def test_metadata_of_a_bulk_change_is_kept_with_its_bytes(
    api: AsyncClient, raw: Redis
) -> None:
    ids = [await create(api, metadata={"before": 1}) for _ in range(2)]
    metadata = '{ "n" : 1.0e2, "t":"\\u00e9\\/", "deep":[[ ]], "set":{"status":"x"} }'
    body = f'{{"session_ids":{json.dumps(ids)}, "set" : {{"metadata": {metadata} }} }}'
    response = await api.post(f"{ADMIN}/sessions/bulk", content=body, headers=JSON)
    assert answer_of(response) == {"updated": 2, "failed": []}
    for session_id in ids:
        kept = await raw.hget(f"onboarding:{session_id}:metadata", "custom")
        assert kept == metadata.encode()
        session = answer_of(await api.get(f"{BASE}/{session_id}"))
        assert session["metadata"] == json.loads(metadata)
        assert await types_of(raw, session_id) == ["session_created", "metadata_changed"]
    assert (await change(api, ids, metadata={}))["updated"] == 2


async def test_a_bulk_change_takes_a_thousand_sessions(
    api: AsyncClient, raw: Redis, settings: Settings
) -> None:
    names = await load_sessions(raw, settings, 1000)
    assert await change(api, names, language="de") == {"updated": 1000, "failed": []}
    assert answer_of(await api.get(f"{BASE}/{names[999]}/language"))["language"] == "de"
    await raw.flushdb()  # sooner than every key's lifetime is looked at


async def test_a_bulk_change_reports_a_damaged_session_and_goes_on(
    api: AsyncClient, raw: Redis
) -> None:
    damaged, whole = await create(api), await create(api)
    await raw.hset(f"onboarding:{damaged}:progress", "saved", "nonsense")
    told = await change(api, [damaged, whole], language="de")
    assert told == {
        "updated": 1,
        "failed": [{"session_id": damaged, "code": "corrupt_record"}],
    }


# --- POST /sessions/{id}/recover ------------------------------------------------------------------

FOREIGN = b"\x93NUMPY\x01\x00\xff\xfe{}\x00"
"""What nobody here would write; no UTF-8."""

Spoil = Callable[[Redis, str], Awaitable[object]]


async def replace(raw: Redis, key: str, kind: str) -> None:
    """Put another type of value in the place of a key, with its lifetime."""
    until_ms = int(await ask(raw, "PEXPIRETIME", key))
    await raw.delete(key)
    parts = {
        "list": ("RPUSH", key, "x"),
        "string": ("SET", key, "x"),
        "hash": ("HSET", key, "x", "y"),
    }
    await ask(raw, *parts[kind])
    if until_ms > 0:
        await ask(raw, "PEXPIREAT", key, until_ms)


def as_type(name: str, kind: str) -> Spoil:
    return lambda raw, prefix: replace(raw, prefix + name, kind)


def as_bytes(name: str, value: bytes) -> Spoil:
    return lambda raw, prefix: ask(raw, "SET", prefix + name, value, "KEEPTTL")


def without(name: str) -> Spoil:
    return lambda raw, prefix: ask(raw, "DEL", prefix + name)


def field(name: str, field: str, value: bytes | None) -> Spoil:
    if value is None:
        return lambda raw, prefix: ask(raw, "HDEL", prefix + name, field)
    return lambda raw, prefix: ask(raw, "HSET", prefix + name, field, value)


class Damage(NamedTuple):
    """What is done to a session, what is then lost, and whether the session is finalized."""

    spoil: Spoil
    lost: set[str]
    finalized: bool = False


AT = b'"saved_at":"2026-01-01T12:00:00.000Z"'

DAMAGE: dict[str, dict[str, Damage]] = {
    "whole": {
        "nothing": Damage(without("nothing"), set()),
        "nothing, finalized": Damage(without("nothing"), set(), finalized=True),
    },
    "a step": {
        "a step of foreign bytes": Damage(as_bytes("step:2", FOREIGN), {"step:2"}),
        "a step of foreign bytes, finalized": Damage(as_bytes("step:2", FOREIGN), {"step:2"}, True),
        "an empty step": Damage(as_bytes("step:2", b""), {"step:2"}),
        "a step cut short": Damage(as_bytes("step:2", b'{"step_id":2,"version":1,'), {"step:2"}),
        "a step of foreign JSON": Damage(as_bytes("step:2", b'{"hello":"world"}'), {"step:2"}),
        "a step of another number": Damage(
            as_bytes("step:2", b'{"step_id":1,"version":1,' + AT + b',"data":{"a":1}}'), {"step:2"}
        ),
        "a step without a time": Damage(
            as_bytes("step:2", b'{"step_id":2,"version":1,"data":{"a":1}}'), {"step:2"}
        ),
        "a step that somebody spelled anew": Damage(
            as_bytes("step:2", b'{"data": {"a": 1}, "version": 1, "step_id": 2, ' + AT + b"}"),
            {"step:2"},
        ),
        "a step of version nought": Damage(
            as_bytes("step:2", b'{"step_id":2,"version":0,' + AT + b',"data":{"a":1}}'), {"step:2"}
        ),
        "a step that is a list": Damage(as_type("step:2", "list"), {"step:2"}),
        "a step that is a hash": Damage(as_type("step:2", "hash"), {"step:2"}),
        "a step that is gone": Damage(without("step:2"), {"step:2"}),
        "a step that nobody counted": Damage(
            lambda raw, prefix: ask(
                raw,
                *(
                    "SET",
                    f"{prefix}step:9",
                    b'{"step_id":9,"version":4,' + AT + b',"data":{"a":1}}',
                ),
                *("EX", 1000),
            ),
            {"progress"},
        ),
    },
    "the metadata": {
        "no metadata": Damage(without("metadata"), {"metadata"}),
        "metadata that is a string": Damage(as_type("metadata", "string"), {"metadata"}),
        "metadata of foreign bytes": Damage(field("metadata", "custom", FOREIGN), {"metadata"}),
        "metadata without a language": Damage(field("metadata", "language", None), {"metadata"}),
        "a workspace of foreign bytes": Damage(
            field("metadata", "workspace_id", FOREIGN), {"metadata"}
        ),
    },
    "the progress": {
        "no progress": Damage(without("progress"), {"progress"}),
        "no progress, finalized": Damage(without("progress"), {"progress"}, True),
        "progress that is a list": Damage(as_type("progress", "list"), {"progress"}),
        "an unknown status": Damage(field("progress", "status", b"asleep"), {"progress"}),
        "no status": Damage(field("progress", "status", None), {"progress"}),
        "steps of another alphabet": Damage(field("progress", "saved", b"1200000"), {"progress"}),
        "steps cut short": Damage(field("progress", "saved", b"11"), {"progress"}),
        "more steps than there are": Damage(field("progress", "saved", b"1" * 50), {"progress"}),
        "no steps": Damage(field("progress", "saved", None), {"progress"}),
        "a foreign mark": Damage(field("progress", "highest", FOREIGN), set()),
        "no version": Damage(field("progress", "v2", None), {"progress"}),
        "a foreign version": Damage(field("progress", "v2", FOREIGN), {"progress"}),
        "no count of changes": Damage(field("progress", "changes", None), {"progress"}),
        "a foreign count of changes": Damage(field("progress", "changes", FOREIGN), {"progress"}),
        "an unknown catalogue": Damage(field("progress", "catalogue", b"nonsense"), set()),
        "a foreign catalogue": Damage(field("progress", "catalogue", FOREIGN), set()),
        "a beginning beyond the calendar": Damage(
            field("progress", "created_at", b"9" * 30), set()
        ),
        "a deadline that is none": Damage(field("progress", "deadline", b"soon"), set()),
        "a percentage that is none": Damage(field("progress", "percent", b"half"), set()),
    },
    "the export": {
        "an export of foreign bytes": Damage(as_bytes("export", FOREIGN), {"export"}, True),
        "an export of foreign JSON": Damage(
            as_bytes("export", b'{"hello":"world"}'), {"export"}, True
        ),
        "an export that is a list": Damage(as_type("export", "list"), {"export"}, True),
        "an export that is gone": Damage(without("export"), {"export"}, True),
    },
    "the log": {
        "a log that is a string": Damage(as_type("events", "string"), {"events"}),
        "a log that is a hash": Damage(as_type("events", "hash"), {"events"}),
        "a log that is gone": Damage(without("events"), set()),
        "a log with a foreign entry": Damage(
            lambda raw, prefix: ask(
                raw, "XADD", f"{prefix}events", "*", "type", "progress", "at", "x"
            ),
            set(),
        ),
    },
    "the memory": {
        "a memory that is a list": Damage(as_type("ops", "list"), set()),
        "a memory that is a string": Damage(as_type("ops", "string"), set()),
        "a memory of foreign bytes": Damage(field("ops", "key:x", FOREIGN), set()),
        "a memory that is gone": Damage(without("ops"), set()),
    },
    "a draft or a result": {
        "a draft of foreign bytes": Damage(as_bytes("draft:4", FOREIGN), {"draft:4"}),
        "a draft that is a list": Damage(as_type("draft:4", "list"), {"draft:4"}),
        "a result that is a string": Damage(as_type("result", "string"), {"result"}),
        "a result of foreign bytes": Damage(field("result", "size", FOREIGN), {"result"}),
    },
}
"""What may be damaged, and how."""


async def prepare(api: AsyncClient, *, finalized: bool) -> str:
    """Make a session with something of everything, and give its id."""
    session_id = await create(api, user_id="ada", metadata={"source": "test"})
    for step in (1, 2, 3):
        await save(api, session_id, step, {"answer": step})
    answer_of(await api.put(f"{step_path(session_id, 4)}/draft", json={"data": {"typing": 1}}))
    plain = {"content-type": "text/plain"}
    stored = await api.put(f"{BASE}/{session_id}/result", content=b"PDF" * 20, headers=plain)
    answer_of(stored, 201)
    if finalized:
        answer_of(await api.post(f"{BASE}/{session_id}/finalize"))
    return session_id


async def read_everything(api: AsyncClient, session_id: str) -> dict[str, int]:
    """Read a session in every way; give the status of each answer."""
    paths = [
        *("", "/steps", "/progress", "/summary", "/status", "/events?limit=1000", "/language"),
        *("/export", "/result", "/upload"),
        *(f"/steps/{step}{draft}" for step in (1, 2, 3, 4, 9) for draft in ("", "/draft")),
    ]
    return {path: (await api.get(f"{BASE}/{session_id}{path}")).status_code for path in paths}


@pytest.mark.parametrize("part", DAMAGE)
async def test_what_can_be_read_of_a_damaged_session_is_kept_and_works_again(
    api: AsyncClient, raw: Redis, part: str
) -> None:
    claims = Claims()
    for what, damage in DAMAGE[part].items():
        await raw.flushdb()
        with claims.about(what):
            await recover(api, raw, what, damage)
    claims.settle()


async def recover(api: AsyncClient, raw: Redis, what: str, damage: Damage) -> None:
    session_id = await prepare(api, finalized=damage.finalized)
    prefix = f"onboarding:{session_id}:"
    events_before = await raw.xlen(f"{prefix}events")
    await damage.spoil(raw, prefix)

    told = answer_of(await post(api, f"/sessions/{session_id}/recover"))
    assert told.keys() == {"session_id", "status", "kept", "lost"}
    assert (told["session_id"], told["status"]) == (session_id, "error")
    # What says which steps there are is written anew when one of them is lost; a log may be mended,
    # a memory is of no interest to anybody.
    further = {"progress", "metadata", "ops", *(["events"] if "log" in what else [])}
    assert damage.lost <= set(told["lost"]) <= damage.lost | further
    assert not set(told["lost"]) & set(told["kept"])
    parts = {"step:1", "step:2", "step:3", "result", *(["export"] if damage.finalized else [])}
    assert parts - damage.lost <= set(told["kept"])

    # Everything reads: what is there, and what is gone is absent and no damage.
    statuses = await read_everything(api, session_id)
    assert set(statuses.values()) <= {200, 404}, statuses
    for path in ("", "/steps", "/progress", "/summary", "/status", "/language", "/steps/1"):
        assert statuses[path] == 200
    assert statuses["/steps/2"] == (404 if "step:2" in damage.lost else 200)
    assert statuses["/result"] == (404 if "result" in damage.lost else 200)
    assert statuses["/steps/4/draft"] == (404 if "draft:4" in damage.lost else 200)
    assert statuses["/export"] == (200 if damage.finalized and "export" not in damage.lost else 404)
    session = answer_of(await api.get(f"{BASE}/{session_id}"))
    assert session["status"] == "error"
    saved = {int(name[5:]) for name in told["kept"] if name.startswith("step:")}
    check_progress(session["progress"], saved)
    if "metadata" not in told["lost"] and "workspace" not in what:
        assert (session["user_id"], session["metadata"]) == ("ada", {"source": "test"})
    steps = answer_of(await api.get(f"{BASE}/{session_id}/steps"))["steps"]
    assert {int(step) for step in steps} == saved
    assert steps["3"]["data"] == {"answer": 3}

    # One event, in the log that was or in a new one.
    types = await types_of(raw, session_id)
    assert types.count("recovered") == 1
    assert types[-1] == "recovered"
    kept_log = "events" not in told["lost"] and what != "a log that is gone"
    assert len(types) >= events_before + 1 if kept_log else len(types) == 1
    event = (await events_of(raw, session_id))[-1]
    assert (int(event["kept"]), int(event["lost"])) == (len(told["kept"]), len(told["lost"]))

    await assert_one_deadline(raw, session_id)
    await assert_indexed(api, raw, session_id, progress=session["progress"])

    # And it goes on.
    if session["finalized_at"]:
        answer_of(await api.post(f"{BASE}/{session_id}/reopen"))
    await save(api, session_id, 7)
    await save(api, session_id, 2)
    assert 7 in answer_of(await api.get(f"{BASE}/{session_id}"))["progress"]["completed_steps"]
    await set_status(api, session_id, "processing", "complete")
    export = answer_of(await api.post(f"{BASE}/{session_id}/finalize"))["business_context"]
    assert set(map(int, export["steps"])) == saved | {2, 7}
    answer_of(await api.delete(f"{BASE}/{session_id}"))
    assert await keys_of(raw, session_id) == []


async def assert_one_deadline(raw: Redis, session_id: str) -> None:
    names = [name for name in await keys_of(raw, session_id) if f":{session_id}:" in name]
    ends = {name: int(await ask(raw, "PEXPIRETIME", name)) for name in names}
    own = {name: end for name, end in ends.items() if ":draft:" in name or ":idem:" in name}
    shared = {name: end for name, end in ends.items() if name not in own}
    assert min(ends.values()) > 0, ends
    assert max(shared.values()) - min(shared.values()) <= 1000, shared
    now_ms = int((await ask(raw, "TIME"))[0]) * 1000
    assert 604_800_000 - 2000 <= max(shared.values()) - now_ms <= 604_800_000 * 1.01 + 1000


async def assert_indexed(api: AsyncClient, raw: Redis, session_id: str, progress: Answers) -> None:
    [row] = (await get(api, "/sessions"))["sessions"]
    assert (row["session_id"], row["status"]) == (session_id, "error")
    assert row["progress"] == progress
    assert await listed(api, status="error") == [session_id]
    stats = await get(api, "/stats")
    assert stats["status_breakdown"] == {"pending": 0, "processing": 0, "complete": 0, "error": 1}
    index = "onboarding:index:sessions:"
    places = []
    async for key in raw.scan_iter(f"{index}*:*", _type="zset"):
        name = key.decode().removeprefix(index)
        members = [member.decode() for member in await ask(raw, "ZRANGE", key, 0, -1)]
        places += [name for member in members if member.endswith(session_id)]
    classes = {name.split(":")[2] for name in places if name.startswith(("created", "activity"))}
    assert len(classes) == 1, places
    assert len([name for name in places if name.startswith("created:")]) == 1
    assert len([name for name in places if name.startswith("activity:")]) == 1


async def test_a_session_of_which_nothing_can_be_read_is_removed(
    api: AsyncClient, raw: Redis
) -> None:
    session_id = await prepare(api, finalized=True)
    prefix = f"onboarding:{session_id}:"
    for key in await keys_of(raw, session_id):
        # Without both a result and the memory, nobody knows where the parts of the result are.
        if key.startswith(prefix) and ":result" not in key:
            await replace(raw, key, "list")
    await replace(raw, f"{prefix}result", "list")
    await raw.delete(*[key for key in await keys_of(raw, session_id) if ":result:" in key])
    told = answer_of(await post(api, f"/sessions/{session_id}/recover"))
    assert (told["session_id"], told["status"], told["kept"]) == (session_id, "error", [])
    assert told["lost"]
    assert await keys_of(raw, session_id) == []
    assert await listed(api) == []
    problem_of(await api.get(f"{BASE}/{session_id}"), "session_not_found")
    problem_of(await post(api, f"/sessions/{session_id}/recover"), "session_not_found")


async def test_a_session_of_which_only_a_draft_can_be_read_keeps_the_draft(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    answer_of(await api.put(f"{step_path(session_id, 4)}/draft", json={"data": {"typing": 1}}))
    prefix = f"onboarding:{session_id}:"
    for key in ("metadata", "progress", "events", "ops"):
        await replace(raw, prefix + key, "list")
    told = answer_of(await post(api, f"/sessions/{session_id}/recover"))
    assert told["kept"] == ["draft:4"]
    draft = answer_of(await api.get(f"{step_path(session_id, 4)}/draft"))
    assert draft["data"] == {"typing": 1}


async def test_a_session_that_there_is_not_cannot_be_recovered(api: AsyncClient) -> None:
    for session_id in (unknown_id(), "x", "short", unknown_id().upper(), "*", "%00"):
        response = await post(api, f"/sessions/{session_id}/recover")
        problem_of(response, "session_not_found")


async def test_the_version_of_a_deleted_step_goes_on_over_a_recovery(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    await save(api, session_id, 1)
    await save(api, session_id, 2)
    await save(api, session_id, 2)
    answer_of(await api.delete(step_path(session_id, 2)))
    await raw.set(f"onboarding:{session_id}:step:1", FOREIGN, keepttl=True)
    answer_of(await post(api, f"/sessions/{session_id}/recover"))
    assert (await save(api, session_id, 2))["version"] == 3
    assert (await save(api, session_id, 1))["version"] > 1


async def test_a_recovered_session_does_not_count_twice_in_the_funnel(
    api: AsyncClient, raw: Redis, session_id: str
) -> None:
    for step in (1, 2):
        await save(api, session_id, step)
    await raw.set(f"onboarding:{session_id}:step:2", FOREIGN, keepttl=True)
    answer_of(await post(api, f"/sessions/{session_id}/recover"))
    for step in (1, 2):
        await save(api, session_id, step)
    funnel = (await get(api, "/stats"))["funnel"]
    assert [step["saved"] for step in funnel[:3]] == [1, 1, 0]


# --- GET, PATCH /config ---------------------------------------------------------------------------


async def set_config(api: AsyncClient, **changes: Any) -> Answers:
    return answer_of(await api.patch(f"{ADMIN}/config", json=changes))


async def test_the_configuration_is_that_of_the_settings_until_it_is_changed(serve: Serve) -> None:
    api = await serve(max_sessions=5, cleanup_interval_s=120)
    assert await get(api, "/config") == {"max_sessions": 5, "cleanup_interval_s": 120}
    assert await set_config(api, max_sessions=7) == {"max_sessions": 7, "cleanup_interval_s": 120}
    told = await set_config(api, cleanup_interval_s=0.5)
    assert told == {"max_sessions": 7, "cleanup_interval_s": 0.5}
    assert await get(api, "/config") == told
    assert await set_config(api) == told
    assert await set_config(api, unknown="x") == told
    told = await set_config(api, max_sessions=None)
    assert told == {"max_sessions": 5, "cleanup_interval_s": 0.5}
    told = await set_config(api, max_sessions=0, cleanup_interval_s=None)
    assert told == {"max_sessions": 0, "cleanup_interval_s": 120}
    for largest in ({"max_sessions": MOST_SESSIONS}, {"cleanup_interval_s": LONGEST_INTERVAL_S}):
        assert (await set_config(api, **largest)).items() >= largest.items()


BAD_CONFIGS: list[tuple[Answers, str]] = [
    ({"max_sessions": -1}, "/max_sessions"),
    ({"max_sessions": 1.5}, "/max_sessions"),
    ({"max_sessions": 5.0}, "/max_sessions"),
    ({"max_sessions": "5"}, "/max_sessions"),
    ({"max_sessions": True}, "/max_sessions"),
    ({"max_sessions": MOST_SESSIONS + 1}, "/max_sessions"),
    ({"max_sessions": [1]}, "/max_sessions"),
    ({"cleanup_interval_s": 0}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": 0.09}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": -1}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": LONGEST_INTERVAL_S + 1}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": "60"}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": False}, "/cleanup_interval_s"),
    ({"cleanup_interval_s": {}}, "/cleanup_interval_s"),
    ({"max_sessions": 3, "cleanup_interval_s": 0}, "/cleanup_interval_s"),
]
"""Bodies that cannot be taken, and what is at fault of them."""


async def test_a_configuration_that_cannot_be_changes_nothing(api: AsyncClient) -> None:
    claims = Claims()
    before = await get(api, "/config")
    for body, pointer in BAD_CONFIGS:
        with claims.about(body):
            problem = problem_of(await api.patch(f"{ADMIN}/config", json=body), "invalid_request")
            assert pointers_of(problem) == {pointer}
    assert await get(api, "/config") == before
    claims.settle()


async def test_a_configuration_holds_at_once_for_a_second_service_with_other_settings(
    serve: Serve,
) -> None:
    one, other = await serve(max_sessions=5), await serve(max_sessions=50)
    told = await set_config(one, max_sessions=2, cleanup_interval_s=30)
    assert await get(other, "/config") == told
    await create(other)
    await create(one)
    for api in (one, other):
        problem_of_capacity(await api.post(f"{BASE}/session", json={"workspace_id": "w1"}))
        assert (await get(api, "/stats"))["max_capacity"] == 2
        assert (await get(api, "/health"))["overall_health"] == "critical"
    # Back to the settings: each goes by its own.
    await set_config(other, max_sessions=None)
    assert (await get(one, "/config"))["max_sessions"] == 5
    assert (await get(other, "/config"))["max_sessions"] == 50
    await create(one)


async def test_a_lower_limit_sweeps_at_once_and_loses_no_live_session(
    serve: Serve, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.sweeper.LOOK_EVERY_S", 0.05)
    api = await serve()
    async with asyncio.timeout(5):
        while (await get(api, "/stats"))["cleanup"]["last_run"] is None:
            await asyncio.sleep(0.01)
    assert is_time((await get(api, "/stats"))["cleanup"]["last_run"])
    assert (await get(api, "/health"))["cleanup_active"] is True
    live = [await create(api) for _ in range(4)]
    await save(api, live[0])
    [gone] = [await create(api)]
    names = [name for name in await keys_of(raw, gone) if name.startswith(f"onboarding:{gone}:")]
    await raw.delete(*names)
    await raw.zadd("onboarding:index:sessions:deadlines", {gone: 1})
    before = (await get(api, "/stats"))["cleanup"]

    assert (await set_config(api, max_sessions=2))["max_sessions"] == 2

    cleanup = (await get(api, "/stats"))["cleanup"]
    assert cleanup["last_run"] > before["last_run"]
    assert cleanup["failures"] == 0
    assert sorted(await listed(api)) == sorted(live)
    problem_of_capacity(await api.post(f"{BASE}/session", json={"workspace_id": "w1"}))
    assert (await get(api, "/stats"))["utilization_percent"] == 200.0
    # A higher one is no reason to sweep.
    await set_config(api, max_sessions=10)
    assert (await get(api, "/stats"))["cleanup"]["last_run"] == cleanup["last_run"]
    await create(api)
