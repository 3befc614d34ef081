"""The end of a user over HTTP: whatever their id is made of, and nothing of them left."""

from urllib.parse import quote

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    Answers,
    answer_of,
    create,
    dump,
    exchange,
    pointers_of,
    problem_of,
    save,
)
from tests.service import BASE

USERS = "/api/v1/admin/users"


async def erase(api: AsyncClient, sent: str) -> Answers:
    """Erase a user whose id is sent exactly as it is here."""
    done = answer_of(await exchange(api, "DELETE", f"{USERS}/{sent}"))
    assert done.keys() == {"user_id", "removed", "tasks_removed", "more"}
    return done


@pytest.mark.parametrize(
    ("sent", "user_id"),
    [
        ("ada", "ada"),
        ("auth0%7C123", "auth0|123"),
        ("auth0|123", "auth0|123"),
        ("a%2Fb", "a/b"),
        ("a%2fb%2F", "a/b/"),
        ("%2F", "/"),
        ("%252F", "%2F"),
        ("a%2Fb%252Fc%25", "a/b%2Fc%"),
        ("a+b%20c", "a+b c"),
        ("%C3%A9%F0%9F%A6%8A", "é🦊"),
        ("a%3Fb%23c", "a?b#c"),
        ("%2E%2E", ".."),
        ("users", "users"),
        (quote("é" * 128), "é" * 128),
    ],
)
async def test_an_id_is_percent_encoded_and_may_hold_anything_that_can_be_read(
    api: AsyncClient, raw: Redis, sent: str, user_id: str
) -> None:
    mine = await create(api, user_id=user_id)
    other = await create(api, user_id=user_id[:-1] + "x")
    await save(api, mine)
    done = await erase(api, sent)
    assert done == {"user_id": user_id, "removed": 1, "tasks_removed": 0, "more": False}
    problem_of(await api.get(f"{BASE}/{mine}"), "session_not_found")
    answer_of(await api.get(f"{BASE}/{other}"))


async def test_a_query_is_no_part_of_the_id(api: AsyncClient) -> None:
    assert (await erase(api, "a%2Fb?c=d%2Fe"))["user_id"] == "a/b"


async def test_nothing_in_the_store_names_the_user_any_more(api: AsyncClient, raw: Redis) -> None:
    user_id = "find-me-7f3a"
    body = {"workspace_id": "w1", "user_id": user_id, "metadata": {"mail": user_id}}
    keyed = {"idempotency-key": "k1"}
    made = answer_of(await api.post(f"{BASE}/session", json=body, headers=keyed), 201)
    await save(api, made["session_id"], data={"name": user_id})
    answer_of(await api.post(f"{BASE}/{made['session_id']}/finalize"))
    task = {"task_type": "scenario_generation", "short_id": "s1", "user_id": user_id}
    answer_of(await api.post("/api/v1/sessions/task", json=task), 201)
    assert user_id in str(await dump(raw))

    done = await erase(api, user_id)
    assert (done["removed"], done["tasks_removed"]) == (1, 1)
    assert user_id not in str(await dump(raw))
    # Sent again, the beginning is a new one.
    again = answer_of(await api.post(f"{BASE}/session", json=body, headers=keyed), 201)
    assert again["session_id"] != made["session_id"]


async def test_an_unknown_user_has_nothing_to_lose(api: AsyncClient) -> None:
    nothing = {"user_id": "nobody", "removed": 0, "tasks_removed": 0, "more": False}
    assert await erase(api, "nobody") == nothing


@pytest.mark.parametrize("sent", ["a%00", "%0A", "a%0A", "a%C2%85", "x" * 129, "%ff", "%ED%A0%80"])
async def test_what_can_be_no_user_is_refused(api: AsyncClient, sent: str) -> None:
    response = await exchange(api, "DELETE", f"{USERS}/{sent}")
    assert pointers_of(problem_of(response, "invalid_request")) == {"/user_id"}


@pytest.mark.parametrize("sent", ["", "/", "/a", "a/", "a/b"])
async def test_what_names_no_one_user_is_no_call(api: AsyncClient, sent: str) -> None:
    problem_of(await exchange(api, "DELETE", f"{USERS}/{sent}"), "not_found")


async def test_a_user_can_only_be_erased(api: AsyncClient) -> None:
    refused = await api.get(f"{USERS}/ada")
    problem_of(refused, "method_not_allowed")
    assert refused.headers["allow"] == "DELETE"
