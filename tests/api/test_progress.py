import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from tests.api.helpers import (
    BATCH,
    DELETE_STEP,
    FINALIZE,
    GET_PROGRESS,
    GET_SESSION,
    GET_SUMMARY,
    PATCH,
    PUT_DRAFT,
    REOPEN,
    Call,
    answer_of,
    check_progress,
    create,
    is_time,
    problem_of,
    save,
)

PROGRESS_VIEW = {"session_id", "status", "progress", "finalized_at", "revision", "expires_at"}
SUMMARY = {
    *("session_id", "status", "language", "finalized_at", "revision", "progress"),
    *("metadata", "stats", "steps"),
}
STATS = {
    *("completed_steps", "total_steps", "completion_percentage", "session_age_seconds"),
    "last_updated",
}


async def test_the_progress_of_a_new_session(api: AsyncClient, session_id: str) -> None:
    shown = answer_of(await GET_PROGRESS.send(api, session_id))

    assert shown.keys() >= PROGRESS_VIEW
    assert shown["session_id"] == session_id
    assert shown["status"] == "pending"
    assert shown["finalized_at"] is None
    assert shown["revision"] == 0
    assert is_time(shown["expires_at"])
    check_progress(shown["progress"], saved=[])
    assert shown["progress"]["highest_step"] == 0


async def test_progress_session_and_summary_tell_the_same(
    api: AsyncClient, session_id: str
) -> None:
    await save(api, session_id, 3)
    for call in (BATCH, PATCH, PUT_DRAFT, DELETE_STEP, FINALIZE, REOPEN):
        answer_of(await call.send(api, session_id))
        progress, session, summary = [
            answer_of(await each.send(api, session_id))
            for each in (GET_PROGRESS, GET_SESSION, GET_SUMMARY)
        ]
        for name in ("session_id", "status", "progress", "finalized_at", "revision"):
            assert progress[name] == session[name] == summary[name], (call.name, name)
        assert progress["expires_at"] == session["expires_at"]


async def test_progress_shows_that_a_session_is_finalized(
    api: AsyncClient, finalized_id: str
) -> None:
    shown = answer_of(await GET_PROGRESS.send(api, finalized_id))

    assert is_time(shown["finalized_at"])
    assert shown["revision"] == 1
    check_progress(shown["progress"], saved=[1])


async def test_the_summary_is_complete_without_any_answer(api: AsyncClient) -> None:
    custom = {"plan": "pro"}
    session_id = await create(api, user_id="u1", language="de", metadata=custom)
    saved = await save(api, session_id, 2, {"secret": "an answer"})
    saved = await save(api, session_id, 2, {"secret": "an answer"})
    answer_of(await PUT_DRAFT.send(api, session_id))

    response = await GET_SUMMARY.send(api, session_id)
    summary = answer_of(response)

    assert summary.keys() >= SUMMARY
    assert summary["session_id"] == session_id
    assert summary["status"] == "pending"
    assert summary["language"] == "de"
    assert summary["revision"] == 0
    check_progress(summary["progress"], saved=[2])
    metadata = summary["metadata"]
    assert metadata.keys() >= {"user_id", "workspace_id", "started_at"}
    assert (metadata["user_id"], metadata["workspace_id"]) == ("u1", "w1")
    assert metadata["started_at"] == summary["progress"]["started_at"]
    assert b"an answer" not in response.content

    stats = summary["stats"]
    assert stats.keys() >= STATS
    assert stats["completed_steps"] == 1
    assert stats["total_steps"] == 23
    assert stats["completion_percentage"] == 4.35
    assert stats["session_age_seconds"] in range(10)
    assert stats["last_updated"] == saved["updated_at"]

    assert [step["step_id"] for step in summary["steps"]] == list(range(1, 24))
    for step in summary["steps"]:
        assert step.keys() >= {"step_id", "key", "title", "required", "has_draft"}
        assert ("version" in step) == ("saved_at" in step) == (step["step_id"] == 2)
        assert step["has_draft"] is (step["step_id"] == 1)
        assert step["required"] is (step["step_id"] not in {17, 21, 22})
    assert summary["steps"][1]["version"] == 2
    assert summary["steps"][1]["saved_at"] == saved["updated_at"]
    assert summary["steps"][1]["title"] == "Brand Synthesis"


async def test_a_deleted_step_is_unsaved_in_the_summary(api: AsyncClient, session_id: str) -> None:
    await save(api, session_id)
    answer_of(await DELETE_STEP.send(api, session_id))

    step = answer_of(await GET_SUMMARY.send(api, session_id))["steps"][0]

    assert "version" not in step
    assert "saved_at" not in step


async def test_the_summary_shows_that_a_session_is_finalized(
    api: AsyncClient, finalized_id: str
) -> None:
    summary = answer_of(await GET_SUMMARY.send(api, finalized_id))

    assert is_time(summary["finalized_at"])
    assert summary["revision"] == 1


@pytest.mark.parametrize("call", [GET_PROGRESS, GET_SUMMARY], ids=lambda call: call.name)
async def test_progress_that_cannot_be_read_is_an_error_and_not_zero(
    api: AsyncClient, raw: Redis, session_id: str, call: Call
) -> None:
    await save(api, session_id)
    await raw.hset(f"onboarding:{session_id}:progress", "saved", "x")

    problem_of(await call.send(api, session_id), "corrupt_record")
