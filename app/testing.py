"""For the tests of others: a ready manager on a store that is thrown away, and sessions.

    async with create_test_session_manager(max_sessions=2) as manager:
        session_id = await create_mock_session(manager, steps=3, status="error", age_hours=2)
        await manager.retention.cleanup_failed_sessions()
        await wait_for_cleanup(manager, session_id)

The store is the real one that comes with the package, in a directory of its own, and knows nothing
of the environment: a test that goes wrong harms no other data.
"""

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.clock import monotonic_s, now_ms
from app.errors import SessionNotFoundError
from app.onboarding.documents import Document
from app.onboarding.retention import HOUR_MS
from app.onboarding.sessions import Owner, SessionStatus, check_owner, parse_status
from app.services.assistant import AssistantService, make_assistant
from app.services.files import make_file_service
from app.services.generation import GenerationService
from app.services.manager import OnboardingSessionManager, make_rules
from app.services.retention import RetentionService, make_retention_service
from app.services.stats import StatsService, make_stats_service
from app.services.tasks import TaskService
from app.settings import Settings, load_settings
from app.store.catalogue import CatalogueStore
from app.store.connect import connect, make_probe
from app.store.embedded import EmbeddedStore
from app.store.gateway import Gateway
from app.store.generation import GenerationStore
from app.store.sessions import NewSession, SessionStore
from app.store.steps import StepStore

__all__ = [
    "TryoutManager",
    "create_mock_session",
    "create_test_session_manager",
    "wait_for_cleanup",
]

POLL_S = 0.02
"""Pause between two looks whether a session is gone, in seconds."""


class TryoutManager(OnboardingSessionManager):
    """A manager with everything else that works on its store."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        super().__init__(
            gateway, lambda: make_probe(settings), settings.catalogue, make_rules(settings)
        )
        self.gateway = gateway
        self.settings = settings
        self.tasks = TaskService(gateway, settings.task_rules)
        self.retention: RetentionService = make_retention_service(gateway, self.tasks, settings)
        self.assistant: AssistantService = make_assistant(gateway, settings)
        self.stats: StatsService = make_stats_service(gateway, settings)
        self.generation = GenerationService(gateway, make_file_service(gateway, self, settings))


@asynccontextmanager
async def create_test_session_manager(**settings: Any) -> AsyncIterator[TryoutManager]:
    """Give a manager on a store of its own, which is gone at the end of the block.

    `settings` are fields of `app.settings.Settings`: `max_sessions`, `session_ttl_s`, ... Call it
    from the main thread. Raises `SettingsError`, and `EmbeddedStoreError` where the store cannot
    run.
    """
    with tempfile.TemporaryDirectory(prefix="onboarding-") as directory:
        store = EmbeddedStore.start(Path(directory))
        try:
            url = f"unix://{quote(store.socket_path)}"
            chosen = load_settings(**{"environment": "development", **settings, "redis_url": url})
            manager = TryoutManager(connect(chosen), chosen)
            try:
                yield manager
            finally:
                await manager.retention.shutdown()
                await manager.generation.aclose()
        finally:
            store.stop()


async def create_mock_session(
    manager: TryoutManager,
    *,
    steps: int = 0,
    finalized: bool = False,
    status: SessionStatus | str = SessionStatus.PENDING,
    age_hours: float = 0.0,
    workspace_id: str | None = "test-workspace",
    user_id: str | None = "test-user",
    language: str = "en",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Make a session as it would be after `age_hours`, and return its id.

    Its first `steps` steps are saved, it is finalized (now) and its generation brought to `status`,
    as wished. Raises `InvalidRequestError` for what no session can be.
    """
    wanted = parse_status(status)
    check_owner(workspace_id, user_id, language, workspace_required=False)
    session_id, at_ms = str(uuid.uuid4()), int(now_ms() - age_hours * HOUR_MS)
    owner = Owner(workspace_id, user_id, language, Document.of(metadata or {}).text)
    sessions, catalogue = SessionStore(manager.gateway), manager.catalogue
    await CatalogueStore(manager.gateway, catalogue).keep_current()
    await sessions.create(NewSession(session_id, owner, catalogue, at_ms))
    if steps:
        answers = {number: Document.of({"answer": number}) for number in range(1, steps + 1)}
        await StepStore(manager.gateway, sessions).save(
            session_id, answers, pin=catalogue.pin, at_ms=at_ms
        )
    if finalized:
        await manager.finalize(session_id, force=True)
    generation = GenerationStore(manager.gateway, sessions)
    for each in _WAY[wanted]:
        await generation.set_status(session_id, each, "", run="", at_ms=at_ms)
    return session_id


async def wait_for_cleanup(
    manager: TryoutManager, *session_ids: str, timeout_s: float = 10.0
) -> None:
    """Sweep until sessions are gone. Raises `TimeoutError` when they are not in time."""
    until_s = monotonic_s() + timeout_s
    left = list(session_ids)
    while left:
        await manager.retention.sweep()
        left = [each for each in left if await _is_there(manager, each)]
        if left and monotonic_s() > until_s:
            raise TimeoutError(f"still there after {timeout_s} s: {', '.join(left)}")
        await asyncio.sleep(POLL_S if left else 0)


_WAY = {
    SessionStatus.PENDING: (),
    SessionStatus.PROCESSING: (SessionStatus.PROCESSING,),
    SessionStatus.COMPLETE: (SessionStatus.PROCESSING, SessionStatus.COMPLETE),
    SessionStatus.ERROR: (SessionStatus.ERROR,),
}
"""Through which statuses a generation comes to one."""


async def _is_there(manager: TryoutManager, session_id: str) -> bool:
    try:
        await manager.get_session(session_id)
    except SessionNotFoundError:
        return False
    return True
