"""People, generators and operators who use everything that a session has, some of them hasty."""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Self

from httpx2 import AsyncClient, Limits, Response, TransportError

from tests.api.helpers import (
    ADD_EVENT,
    ASK,
    BATCH,
    CREATE,
    CREATE_TOKEN,
    DELETE_SESSION,
    DELETE_STEP,
    FINALIZE,
    GET_DRAFT,
    GET_EVENTS,
    GET_EXPORT,
    GET_HISTORY,
    GET_PROGRESS,
    GET_RESULT,
    GET_SESSION,
    GET_STATUS,
    GET_STEP,
    GET_STEPS,
    GET_SUMMARY,
    GET_TOKENS,
    PATCH,
    PROMOTE,
    PUT_DRAFT,
    PUT_RESULT,
    REOPEN,
    SAVE,
    SET_LANGUAGE,
    SET_STATUS,
    Call,
)
from tests.faults.load import PATIENCE_S
from tests.service import BASE

HASTY = 0.1
"""How many of the calls are cancelled by whoever sent them, within 30 ms."""

LIFE: list[Call] = [
    *(SAVE, GET_STEP, PATCH, PUT_DRAFT, GET_DRAFT, PROMOTE, BATCH, DELETE_STEP, BATCH, GET_STEPS),
    *(GET_PROGRESS, GET_SUMMARY, ASK, GET_HISTORY, CREATE_TOKEN, GET_TOKENS, SET_LANGUAGE),
    *(FINALIZE, GET_EXPORT, REOPEN, SET_STATUS, ADD_EVENT, GET_STATUS, GET_EVENTS, GET_SESSION),
    *(PUT_RESULT, GET_RESULT),
    Call("PUT", BASE + "/{id}/result", ["x" * 300_000]),
    GET_RESULT,
    Call("GET", "/api/v1/admin/sessions?limit=50"),
    Call("GET", "/api/v1/admin/stats"),
    Call("GET", "/api/v1/sessions/a-short"),
    Call("POST", "/api/v1/sessions/task", {"task_type": "scraping", "task_id": "untracked"}),
]
"""What becomes of a session, one call after the other."""

STREAMS = [
    Call("GET", BASE + "/{id}/events/stream"),
    Call("POST", BASE + "/{id}/ask-stream", {"question": "What is a draft?"}),
]


class Mix:
    """So many users who go through `LIFE` with one session after the other.

    `asked` counts the calls, `cancelled` those that were given up, `refused` the answers that only
    a fault explains (503) by their codes, and `wrong` whatever nothing explains.
    """

    def __init__(self, url: str, *, users: int = 4, pause_s: float = 0.2) -> None:
        self.asked = self.cancelled = 0
        self.refused: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._url = url
        self._users = users
        self._pause_s = pause_s
        self._random = random.Random(1)
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        limits = Limits(max_connections=None)
        self._client = AsyncClient(
            base_url=self._url, timeout=PATIENCE_S, limits=limits, trust_env=False
        )
        self._tasks = [asyncio.create_task(self._use(user)) for user in range(self._users)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)
        await self._client.aclose()

    async def _use(self, user: int) -> None:
        turn = 0
        while not self._ending:
            turn += 1
            created = await self._ask(CREATE, is_patient=True)
            if created is None:
                continue
            session_id = created.json()["session_id"]
            await self._live(session_id, f"task-{user}-{turn}")
            # The next one begins as this one did.
            await self._ask(DELETE_SESSION, session_id, is_patient=True)

    async def _live(self, session_id: str, task_id: str) -> None:
        """Go through it; whatever follows from a call that failed says nothing."""
        task = f"/api/v1/sessions/task/{task_id}"
        body = {"task_type": "image_analysis", "short_id": "a-short", "task_id": task_id}
        calls = [
            *LIFE,
            Call("POST", "/api/v1/sessions/task", {**body, "session_id": session_id}),
            Call("GET", task),
            Call("PATCH", task, {"status": "completed"}),
        ]
        is_whole = True
        for call in calls:
            if self._ending:
                return
            answer = await self._ask(call, session_id)
            is_whole = is_whole and answer is not None
            if is_whole and answer is not None and not answer.is_success:
                self.wrong[f"{answer.status_code} to {call.name}"] += 1
        for stream in STREAMS:
            await self._listen(stream, session_id)
        await self._upload()

    async def _listen(self, call: Call, session_id: str) -> None:
        """Open a stream, take what comes first, and leave."""
        self.asked += 1
        path = call.target.replace("{id}", session_id)
        try:
            async with self._client.stream(call.method, path, json=call.body) as answer:
                if not answer.is_success:
                    await answer.aread()
                    self._note(answer, call.name)
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        return
        except TransportError as broken:
            self.wrong[f"{type(broken).__name__} in {call.name}"] += 1

    async def _upload(self) -> None:
        self.asked += 1
        files = {"file": ("a.txt", b"y" * 100_000, "text/plain")}
        try:
            answer = await self._client.post("/api/upload", files=files, data={"language": "de"})
        except TransportError as broken:
            self.wrong[f"{type(broken).__name__} in an upload"] += 1
            return
        self._note(answer, "an upload")
        if answer.is_success:
            await self._ask(DELETE_SESSION, answer.json()["session_id"], is_patient=True)

    async def _ask(
        self, call: Call, session_id: str = "", *, is_patient: bool = False
    ) -> Response | None:
        """Ask, and give the answer; None when there is none, or one that a fault explains."""
        self.asked += 1
        await asyncio.sleep(self._pause_s * self._random.random() * 2)
        is_hasty = not is_patient and self._random.random() < HASTY
        try:
            async with asyncio.timeout(self._random.uniform(0, 0.03) if is_hasty else None):
                answer = await call.send(self._client, session_id)
        except TimeoutError:
            self.cancelled += 1
            return None
        except TransportError as broken:
            self.wrong[f"{type(broken).__name__} in {call.name}"] += 1
            return None
        return answer if self._note(answer, call.name) else None

    def _note(self, answer: Response, name: str) -> bool:
        """Count what a fault explains; say whether it is none of that."""
        if answer.status_code < 500:
            return True
        code = "no problem"
        with suppress(ValueError, KeyError):
            code = answer.json()["code"]
        if answer.status_code == 503:
            self.refused[f"503 {code}"] += 1
        else:
            self.wrong[f"{answer.status_code} {code} to {name}"] += 1
        return False
