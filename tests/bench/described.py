"""The same calls as the described system would have them: one command after the other.

FastAPI with pydantic models, tenacity around every use case, a pool of redis-py. A save takes 27
commands: the progress is read, the step and the progress are written, and each of the other 24 keys
of the session gets its lifetime anew.
"""

import json
import os
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

import redis.asyncio
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

TOTAL = 23
TTL_S = 7 * 24 * 3600


class CreateSession(BaseModel):
    """What a session is made with."""

    workspace_id: str
    user_id: str | None = None


class NewSession(BaseModel):
    """The answer to it."""

    session_id: str


class SaveStep(BaseModel):
    """The answers of a step."""

    data: dict[str, Any]


class Progress(BaseModel):
    """How far a session is."""

    completed: int
    total: int
    percentage: float
    completed_steps: list[int]
    started_at: str
    last_updated: str


class SavedStep(BaseModel):
    """The answer to a save."""

    success: bool
    session_id: str
    step_id: int
    progress: Progress
    updated_at: str


class Step(BaseModel):
    """A saved step."""

    session_id: str
    step_id: int
    data: dict[str, Any]
    saved_at: str


class ProgressView(BaseModel):
    """The answer to a look at the progress."""

    session_id: str
    progress: Progress


class StepSummary(BaseModel):
    """One line of a summary."""

    step_id: int
    saved_at: str | None


class Summary(BaseModel):
    """A session at a glance."""

    session_id: str
    progress: Progress
    metadata: dict[str, Any]
    steps: list[StepSummary]


def now() -> str:
    """Say what time it is."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


retried = retry(
    stop=stop_after_attempt(4),
    wait=wait_exponential(multiplier=1, max=4),
    retry=retry_if_exception_type((RedisConnectionError, RedisTimeoutError)),
    reraise=True,
)


class SessionManager:
    """Keeps sessions in Redis."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.redis = client

    def key(self, session_id: str, name: object) -> str:
        return f"onboarding:{session_id}:{name}"

    @retried
    async def create(self, wanted: CreateSession) -> str:
        """Begin a session."""
        session_id, at = str(uuid.uuid4()), now()
        metadata = {**wanted.model_dump(), "started_at": at}
        progress = Progress(
            completed=0,
            total=TOTAL,
            percentage=0,
            completed_steps=[],
            started_at=at,
            last_updated=at,
        )
        await self.redis.set(self.key(session_id, "metadata"), json.dumps(metadata), ex=TTL_S)
        await self.redis.set(self.key(session_id, "progress"), progress.model_dump_json(), ex=TTL_S)
        return session_id

    @retried
    async def save_step(self, session_id: str, step_id: int, data: dict[str, Any]) -> SavedStep:
        """Save a step, count it, and give every key of the session its lifetime anew."""
        progress = await self._read_progress(session_id)
        at = now()
        step = {"step_id": step_id, "data": data, "saved_at": at}
        await self.redis.set(self.key(session_id, f"step:{step_id}"), json.dumps(step))
        saved = sorted({*progress.completed_steps, step_id})
        progress = Progress(
            completed=len(saved),
            total=TOTAL,
            percentage=round(100 * len(saved) / TOTAL, 2),
            completed_steps=saved,
            started_at=progress.started_at,
            last_updated=at,
        )
        await self.redis.set(self.key(session_id, "progress"), progress.model_dump_json(), ex=TTL_S)
        await self.redis.expire(self.key(session_id, "metadata"), TTL_S)
        for number in range(1, TOTAL + 1):
            await self.redis.expire(self.key(session_id, f"step:{number}"), TTL_S)
        return SavedStep(
            success=True, session_id=session_id, step_id=step_id, progress=progress, updated_at=at
        )

    @retried
    async def get_step(self, session_id: str, step_id: int) -> Step:
        """Read a step."""
        text = await self.redis.get(self.key(session_id, f"step:{step_id}"))
        if text is None:
            raise HTTPException(404, "Step not found")
        return Step(session_id=session_id, **json.loads(text))

    @retried
    async def get_progress(self, session_id: str) -> ProgressView:
        """Read how far a session is."""
        return ProgressView(session_id=session_id, progress=await self._read_progress(session_id))

    @retried
    async def get_summary(self, session_id: str) -> Summary:
        """Read everything, and say what is there."""
        metadata = await self.redis.get(self.key(session_id, "metadata"))
        if metadata is None:
            raise HTTPException(404, "Session not found")
        progress = await self._read_progress(session_id)
        steps = []
        for number in range(1, TOTAL + 1):
            text = await self.redis.get(self.key(session_id, f"step:{number}"))
            saved_at = json.loads(text)["saved_at"] if text else None
            steps.append(StepSummary(step_id=number, saved_at=saved_at))
        return Summary(
            session_id=session_id, progress=progress, metadata=json.loads(metadata), steps=steps
        )

    async def _read_progress(self, session_id: str) -> Progress:
        text = await self.redis.get(self.key(session_id, "progress"))
        if text is None:
            raise HTTPException(404, "Session not found")
        return Progress(**json.loads(text))


app = FastAPI()
manager = SessionManager(
    redis.asyncio.Redis.from_url(
        os.environ.get("REDIS_URL", "redis://"), decode_responses=True, max_connections=300
    )
)


def get_manager() -> SessionManager:
    """Give the manager to whoever depends on it."""
    return manager


Manager = Annotated[SessionManager, Depends(get_manager)]


@app.get("/livez")
async def live() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@app.post("/api/v1/onboarding/session", status_code=201)
async def create_session(wanted: CreateSession, sessions: Manager) -> NewSession:
    """Begin a session."""
    return NewSession(session_id=await sessions.create(wanted))


@app.post("/api/v1/onboarding/{session_id}/steps/{step_id}")
async def save_step(session_id: str, step_id: int, body: SaveStep, sessions: Manager) -> SavedStep:
    """Save a step."""
    if not 1 <= step_id <= TOTAL:
        raise HTTPException(422, "Unknown step")
    return await sessions.save_step(session_id, step_id, body.data)


@app.get("/api/v1/onboarding/{session_id}/steps/{step_id}")
async def get_step(session_id: str, step_id: int, sessions: Manager) -> Step:
    """Read a step."""
    return await sessions.get_step(session_id, step_id)


@app.get("/api/v1/onboarding/{session_id}/progress")
async def get_progress(session_id: str, sessions: Manager) -> ProgressView:
    """Read how far a session is."""
    return await sessions.get_progress(session_id)


@app.get("/api/v1/onboarding/{session_id}/summary")
async def get_summary(session_id: str, sessions: Manager) -> Summary:
    """Read a session at a glance."""
    return await sessions.get_summary(session_id)
