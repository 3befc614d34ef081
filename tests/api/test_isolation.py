"""Requests beside each other: nobody ever sees anything of another one."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from httpx2 import AsyncClient
from starlette.types import Message, Receive, Scope, Send

from app.api.middleware import RequestMiddleware
from app.context import RequestContext, get_context, learn
from tests.access import AUTH, user
from tests.agents import AGENT
from tests.api.conftest import Log
from tests.api.helpers import answer_of
from tests.service import BASE

AT_ONCE = 200


async def test_200_requests_at_once_each_live_in_a_world_of_their_own(
    log: Log, serve: Callable[..., Any]
) -> None:
    asking = {"agent": AGENT, "max_concurrent_asks": AT_ONCE, "asks_per_second": 1000}
    api: AsyncClient = await serve(**AUTH, **asking)

    async def live(number: int) -> tuple[str, str]:
        own = user(f"user-{number}")
        made = await api.post(f"{BASE}/session", json={"workspace_id": "w1"}, headers=own)
        session_id = str(answer_of(made, 201)["session_id"])
        for step in (1, 2, 3):
            named = {**own, "x-request-id": f"save-{number}-{step}"}
            path = f"{BASE}/{session_id}/steps/{step}"
            saved = await api.post(path, json={"data": {"of": number}}, headers=named)
            assert answer_of(saved)["session_id"] == session_id
            assert answer_of(await api.get(path, headers=own))["data"] == {"of": number}
        named = {**own, "x-request-id": f"ask-{number}"}
        path = f"{BASE}/{session_id}/ask"
        asked = await api.post(path, json={"question": "who asks"}, headers=named)
        return session_id, str(answer_of(asked)["answer"])

    lived = await asyncio.gather(*map(live, range(AT_ONCE)))

    assert [answer for _, answer in lived] == [
        f"user:user-{number} ask-{number} True" for number in range(AT_ONCE)
    ]
    told = {line["request_id"]: line for line in log.requests()}
    for number, (session_id, _) in enumerate(lived):
        for request_id in (f"ask-{number}", *(f"save-{number}-{step}" for step in (1, 2, 3))):
            assert told[request_id]["session_id"] == session_id
            assert told[request_id]["principal"] == "user"


async def test_a_world_is_gone_when_its_request_is_however_that_ended() -> None:
    seen: list[RequestContext | None] = []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        learn(session_id=scope["path"])
        seen.append(get_context())
        if scope["path"] == "/fails":
            raise RuntimeError
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def ignore(_: Message) -> None:
        """Take an answer."""

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    middleware = RequestMiddleware(app, deadline_s=1.0)
    for path in ("/first", "/fails"):
        scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        with suppress(RuntimeError):
            # In this very task: what it leaves behind would be here.
            await middleware(scope, leave, ignore)
        assert get_context() is None
    assert [context and context.session_id for context in seen] == ["/first", "/fails"]
