"""Every kind of mutation, while the store's replies are lost: one effect, and the first answer."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from httpx2 import AsyncClient

from tests.faults.conftest import Begin, Runs
from tests.faults.proxy import Loss
from tests.faults.report import Row
from tests.faults.servers import Valkey
from tests.faults.wire import wired
from tests.service import BASE

TASKS = "/api/v1/sessions"

QUICKLY = {
    "ONBOARDING_REDIS_TIMEOUT_S": "0.15",
    "ONBOARDING_RETRY_ATTEMPTS": "12",
    "ONBOARDING_RETRY_BASE_S": "0.005",
    "ONBOARDING_RETRY_JITTER_S": "0.005",
}
"""Settings with which a lost reply costs little, and twelve in a row are not to be expected. On a
busy machine one may take 0.1 s that is not lost."""


class Mutation(NamedTuple):
    """What is sent, the status and the members that answer it, and the events that it makes.

    `{s}`, `{id}` and `{token}` stand for what was learned before, `{own}` for the life's own name.
    """

    method: str
    target: str
    body: Any = None
    status: int = 200
    answer: Mapping[str, Any] = {}
    events: tuple[tuple[Any, ...], ...] = ()
    headers: Mapping[str, str] = {}


def saved(step_id: int, version: int) -> tuple[tuple[Any, ...], ...]:
    return (("step_saved", step_id, version),)


def answers(number: int) -> dict[str, Any]:
    return {"data": {"number": number}}


LIFE = [
    Mutation("POST", "{s}/steps/1", answers(1), answer={"version": 1}, events=saved(1, 1)),
    Mutation("PATCH", "{s}/steps/1", {"b": 2}, answer={"version": 2}, events=saved(1, 2)),
    Mutation("PUT", "{s}/steps/2/draft", answers(3), answer={"version": None, "is_draft": True}),
    Mutation("POST", "{s}/steps/2/draft/promote", answer={"version": 1}, events=saved(2, 1)),
    Mutation(
        *("POST", "{s}/steps"),
        {"steps": {"3": {"a": 4}, "4": {"a": 5}}},
        answer={"saved": [{"step_id": 3, "version": 1}, {"step_id": 4, "version": 1}]},
        events=saved(3, 1) + saved(4, 1),
    ),
    Mutation("PUT", "{s}/steps/5/draft", answers(6), answer={"version": None}),
    Mutation("DELETE", "{s}/steps/5/draft", answer={"success": True}),
    Mutation("DELETE", "{s}/steps/1", answer={"success": True}, events=(("step_deleted", 1, 2),)),
    Mutation(
        *("POST", "{s}/steps/1", answers(7)),
        answer={"version": 3},
        events=saved(1, 3),
        headers={"If-None-Match": "*"},
    ),
    Mutation(
        *("PUT", "{s}/steps/1", answers(8)),
        answer={"version": 4},
        events=saved(1, 4),
        headers={"If-Match": '"3"'},
    ),
    Mutation(
        *("PUT", "{s}/language", {"language": "de"}),
        answer={"language": "de"},
        events=(("language_changed",),),
    ),
    Mutation(
        *("POST", "{s}/events", {"stage": "one", "progress": 1, "event_id": "e"}, 201),
        answer={"stage": "one"},
        events=(("progress",),),
    ),
    Mutation("POST", "{s}/events", {"stage": "x", "progress": 9, "event_id": "e"}, 200),
    Mutation(
        *("POST", "{s}/events", {"stage": "two", "progress": 2}, 201),
        answer={"stage": "two"},
        events=(("progress",),),
    ),
    Mutation(
        *("POST", "{s}/finalize"),
        answer={"completed_steps": 4},
        events=(("finalized",),),
    ),
    Mutation(
        *("PUT", "{s}/status", {"status": "processing"}),
        answer={"status": "processing"},
        events=(("status_changed",),),
    ),
    Mutation("PUT", "{s}/result", b"x" * 1_200_000, 201, events=(("result_stored",),)),
    Mutation(
        *("PUT", "{s}/status", {"status": "complete"}),
        answer={"status": "complete"},
        events=(("status_changed",),),
    ),
    Mutation("POST", "{s}/reopen", answer={"status": "pending"}, events=(("reopened",),)),
    Mutation(
        *("POST", "{s}/steps/1", answers(9)),
        answer={"version": 5},
        events=saved(1, 5),
        headers={"Idempotency-Key": "k"},
    ),
    Mutation(
        *("POST", "{s}/steps/1", answers(9)),
        answer={"version": 5},
        headers={"Idempotency-Key": "k"},
    ),
    Mutation("POST", "{s}/finalize", answer={"completed_steps": 4}, events=(("finalized",),)),
    Mutation("POST", "{s}/ask", {"question": "What is the Evidence Vault?"}),
    Mutation("POST", "{s}/resume-tokens", status=201),
    Mutation("POST", BASE + "/resume", {"token": "{token}"}),
    Mutation("POST", "{s}/resume-tokens", status=201),
    Mutation("DELETE", "{s}/resume-tokens/{token_id}"),
    Mutation(
        *("POST", "/api/v1/admin/sessions/bulk"),
        {"session_ids": ["{id}"], "set": {"language": "fr"}},
        answer={"updated": 1, "failed": []},
        events=(("language_changed",),),
    ),
    Mutation(
        *("POST", TASKS + "/task"),
        {"task_type": "image_analysis", "short_id": "{own}", "task_id": "{own}-a"},
        201,
        {"status": "active"},
    ),
    Mutation(
        *("PATCH", TASKS + "/task/{own}-a", {"status": "completed"}),
        answer={"status": "completed"},
    ),
    Mutation(
        *("POST", TASKS + "/task"),
        {"task_type": "scenario_generation", "short_id": "{own}", "task_id": "{own}-b"},
        201,
        {"status": "active"},
    ),
    Mutation(
        *("PATCH", TASKS + "/task/{own}-b", {"status": "completed"}),
        answer={"status": "completed"},
    ),
    Mutation("POST", TASKS + "/{own}/scenario-saved", answer={"removed": 1}),
    Mutation(
        *("POST", TASKS + "/task"),
        {"task_type": "save_scenario", "short_id": "{own}", "task_id": "{own}-c"},
        201,
        {"status": "active"},
    ),
    Mutation("DELETE", TASKS + "/task/{own}-c", answer={"success": True}),
]
"""What happens to a session between its making and its end, in this order."""


@dataclass
class Life:
    """A session from its making to its end, whose answers and whose log are compared."""

    client: AsyncClient
    own: str = field(default_factory=lambda: uuid4().hex)
    known: dict[str, str] = field(default_factory=dict)
    done: int = 0
    wrong: list[str] = field(default_factory=list)

    async def live(self) -> None:
        """Make the session, and let everything happen to it, one after the other."""
        self.known["own"] = self.own
        answer = await self._send(
            Mutation("POST", BASE + "/session", {"workspace_id": "w", "user_id": self.own}, 201)
        )
        self.known |= {"id": answer["session_id"], "s": f"{BASE}/{answer['session_id']}"}
        for mutation in LIFE:
            answer = await self._send(mutation)
            self.known |= {
                name: value for name in ("token", "token_id") if (value := answer.get(name))
            }

    async def read_back(self, row: Row) -> None:
        """Compare the log, and what stands in none, with what should be there once."""
        wanted: Counter[tuple[Any, ...]] = Counter([("session_created",)])
        for mutation in LIFE:
            wanted.update(mutation.events)
        log = await self._get("{s}/events?limit=1000")
        there: Counter[tuple[Any, ...]] = Counter(
            (each["type"], each["step_id"], each["version"])
            if "step_id" in each
            else (each["type"],)
            for each in log["events"]
        )
        mine = await self._get(BASE + "/mine?user_id={own}")
        tasks = await self._get(TASKS + "/{own}")
        tokens = await self._get("{s}/resume-tokens")
        history = await self._get("{s}/history")
        for what, found, once in (
            ("session", len(mine["sessions"]), 1),
            ("task", tasks["total_sessions"], 0),
            ("token", len(tokens["resume_tokens"]), 1),
            ("question", len(history["history"]), 1),
        ):
            there[what,] += found
            wanted[what,] += once
        row.lost += (wanted - there).total()
        row.duplicated += (there - wanted).total()

    async def end(self) -> None:
        """Delete it, and find nothing more."""
        await self._send(Mutation("DELETE", "{s}", answer={"success": True}))
        gone = await self.client.get(self._fill("{s}"))
        if gone.status_code != 404:
            self.wrong.append("the session is there after its end")

    async def _send(self, mutation: Mutation) -> Any:
        target, body = self._fill(mutation.target), mutation.body
        content = body if isinstance(body, bytes) else None
        answer = await self.client.request(
            mutation.method,
            target,
            content=content,
            json=None if content else self._fill(body),
            headers=dict(mutation.headers),
        )
        self.done += answer.is_success
        told = answer.json()
        wanted = dict(mutation.answer)
        if answer.status_code != mutation.status or {n: told.get(n) for n in wanted} != wanted:
            self.wrong.append(f"{mutation.method} {target}: {answer.status_code} {told}")
        return told

    async def _get(self, target: str) -> Any:
        answer = await self.client.get(self._fill(target))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _fill(self, value: Any) -> Any:
        match value:
            case str():
                try:
                    return value.format(**self.known)
                except KeyError as unknown:
                    raise AssertionError(f"{unknown} was not learned: {self.wrong}") from None
            case dict():
                return {name: self._fill(each) for name, each in value.items()}
            case list():
                return [self._fill(each) for each in value]
        return value


async def test_a_mutation_whose_replies_are_lost_takes_effect_once(
    tmp_path: Path, store: Valkey, report: Begin, runs: Runs
) -> None:
    row = report("30 % of all replies silenced, reset or half-sent")
    row.runs = 1
    async with wired(tmp_path, store, **QUICKLY) as here:
        lives = [Life(here.client) for _ in range(1 + runs(27))]
        here.proxy.lose_some(0.3, seed=6)
        await asyncio.gather(*(life.live() for life in lives))
        # What is read afterwards is to show what is there, and not how reads fare.
        here.proxy.lose_none()
        await asyncio.gather(*(life.read_back(row) for life in lives))
        here.proxy.lose_some(0.3, seed=7)
        await asyncio.gather(*(life.end() for life in lives))
    row.acknowledged = sum(life.done for life in lives)
    row.errors = Counter(wrong for life in lives for wrong in life.wrong)
    row.beside = {
        "mutations": f"{len(lives) * (len(LIFE) + 2):,}",
        "replies lost": f"{here.proxy.lost.total():,}",
    }
    assert (row.errors, row.lost, row.duplicated) == ({}, 0, 0)
    assert row.acknowledged == len(lives) * (len(LIFE) + 2)
    assert here.proxy.lost.keys() == {*Loss}
