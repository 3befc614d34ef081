"""What the package brings for the tests of others."""

from pathlib import Path

import pytest

from app.errors import InvalidRequestError, SessionCapacityError
from app.testing import create_mock_session, create_test_session_manager, wait_for_cleanup


async def test_a_manager_works_on_a_store_of_its_own_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    async with create_test_session_manager(max_sessions=1) as manager:
        session_id = await manager.create_session(workspace_id="w")
        with pytest.raises(SessionCapacityError):
            await manager.create_session(workspace_id="w")
        await manager.save_step(session_id, 1, {"a": 1})
        assert await manager.stats.get_session_count() == 1
    async with create_test_session_manager() as another:
        assert await another.stats.get_session_count() == 0


async def test_nothing_is_left_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async with create_test_session_manager() as manager:
        address = manager.settings.store_address
        assert address is not None
        assert address.unix_socket is not None
        assert Path(address.unix_socket).exists()
    assert not Path(address.unix_socket).exists()


async def test_sessions_are_made_in_any_state_and_at_any_age_and_swept_by_the_rules() -> None:
    rules = '[{"status": "error", "older_than_hours": 1, "since": "ended"}]'
    async with create_test_session_manager(expiry_rules=rules) as manager:
        old = await create_mock_session(manager, status="error", age_hours=2)
        young = await create_mock_session(manager, status="error", age_hours=0.5)
        held = await create_mock_session(manager, steps=2, status="error", age_hours=2)
        done = await create_mock_session(manager, steps=23, finalized=True, status="complete")
        busy = await create_mock_session(manager, status="processing", metadata={"plan": "b"})
        await wait_for_cleanup(manager, old)

        rows = await manager.stats.get_all_sessions_info()
        assert {row["session_id"] for row in rows} == {young, held, done, busy}
        assert await manager.get_export(done) is not None
        assert (await manager.get_session(busy))["metadata"] == {"plan": "b"}
        with pytest.raises(TimeoutError, match=held):
            await wait_for_cleanup(manager, held, timeout_s=0.05)


async def test_what_no_session_can_be_is_refused() -> None:
    async with create_test_session_manager() as manager:
        with pytest.raises(InvalidRequestError):
            await create_mock_session(manager, status="ended")
        with pytest.raises(InvalidRequestError):
            await create_mock_session(manager, language="no language")
        assert await manager.stats.get_session_count() == 0
