"""Callbacks over processes: what one process does to a session, another one is told."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from app.onboarding.tasks import TASK_RULES
from app.services.retention import make_retention_service
from app.services.tasks import TaskService
from app.settings import Settings
from app.store.connect import connect
from tests.faults.servers import Valkey, ends_with_us
from tests.process.service_process import REPOSITORY, environment_for

WORKER = """
import asyncio
from app.services.manager import get_onboarding_session_manager
from app.services.retention import atomic_session_update, register_session_callback, shutdown

async def main():
    manager = get_onboarding_session_manager()
    heard = asyncio.Event()
    await register_session_callback("language_changed", lambda event: heard.set())
    for number in range(3):
        session_id = await manager.create_session(user_id=f"u{number}")
        await manager.save_step(session_id, 1, {"company_name": "Test Corp"})
        await atomic_session_update(session_id, {"status": "error"})
        print("MADE", session_id, flush=True)
    await asyncio.wait_for(heard.wait(), 20)
    await manager.delete_session(session_id)
    assert await shutdown(timeout=5)
    await manager.aclose()

asyncio.run(main())
"""


async def test_a_callback_hears_what_another_process_does_and_the_other_one_hears_us(
    raw: Redis, valkey: Valkey, settings: Settings, tmp_path: Path
) -> None:
    gateway = connect(settings)
    service = make_retention_service(gateway, TaskService(gateway, TASK_RULES), settings)
    heard: list[dict[str, Any]] = []
    for event_type in ("session_created", "step_saved", "status_changed", "deleted"):
        await service.register_session_callback(event_type, heard.append)

    async def hears(event_type: str, count: int) -> list[str]:
        async with asyncio.timeout(20):
            while True:
                found = [each["session_id"] for each in heard if each["type"] == event_type]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.01)

    worker = subprocess.Popen(
        ends_with_us([sys.executable, "-c", WORKER]),
        cwd=REPOSITORY,
        env=environment_for(tmp_path / "data", REDIS_URL=valkey.url, PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        made = await hears("session_created", 3)
        assert await hears("status_changed", 3) == made
        assert await hears("step_saved", 3) == made
        # Said here, heard there.
        await service.atomic_session_update(made[0], {"language": "de"})
        assert await hears("deleted", 1) == [made[2]]
        out, err = await asyncio.to_thread(worker.communicate, timeout=20)
        assert worker.returncode == 0, err
        assert [line[5:] for line in out.splitlines() if line.startswith("MADE ")] == made
    finally:
        worker.kill()
        worker.wait()
        assert await service.shutdown(timeout=5) is True
