"""A key that somebody else wrote over: an error of what needs it, named in the log, until it is
recovered; everything else of the session reads."""

from collections.abc import Collection
from typing import NamedTuple

import pytest
from httpx2 import AsyncClient
from redis.asyncio import Redis

from app.api.routes import OPERATIONS
from tests.api.conftest import Log
from tests.api.helpers import (
    ASK,
    CREATE_TOKEN,
    FINALIZE,
    PUT_RESULT,
    SAVE,
    Claims,
    answer_of,
    ask,
    keys_of,
    problem_of,
    save,
    step_path,
)
from tests.service import BASE

FOREIGN = b"\x93NUMPY\x01\x00\xff\xfe{}\x00"
"""What nobody here would write; no UTF-8."""


class Damaged(NamedTuple):
    """A key of a session: the reads that need it, and what is absent once it is recovered.

    `also` may need it, too, by how it is damaged.
    """

    reads: set[str]
    absent: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()


_FILE = frozenset({"/result", "/api/download"})

KEYS: dict[str, Damaged] = {
    "metadata": Damaged({"", "/steps", "/summary", "/language", "/events/stream"}),
    "progress": Damaged(
        {"", "/steps", "/progress", "/summary", "/status", "/api/status", "/events/stream"},
        also=frozenset({"/steps/4/draft"}),
    ),
    "events": Damaged({"/events"}, also=frozenset({"/events/stream"})),
    "ops": Damaged(set()),
    "step:2": Damaged({"/steps/2", "/steps"}, frozenset({"/steps/2"})),
    "draft:4": Damaged({"/steps/4/draft"}, frozenset({"/steps/4/draft"})),
    "export": Damaged({"/export"}, frozenset({"/export"})),
    "history": Damaged({"/history"}),
    "result": Damaged({*_FILE}, _FILE),
    "result:": Damaged({*_FILE}, _FILE),
    "upload": Damaged({"/upload"}, frozenset({"/upload"})),
    "upload:": Damaged({"/upload"}, frozenset({"/upload"})),
    "idem:": Damaged(set()),
    "token": Damaged({"/resume-tokens"}),
}
"""Every kind of key of a session; one whose name goes on ends with a colon here."""


async def prepare(api: AsyncClient) -> str:
    """Make a session that has every kind of key, and give its id."""
    files = {"file": ("a.txt", b"a file", "text/plain")}
    uploaded = await api.post("/api/upload", files=files, data={"language": "de"})
    session_id = str(answer_of(uploaded, 201)["session_id"])
    for step_id in (1, 2):
        await save(api, session_id, step_id)
    answer_of(await SAVE.send(api, session_id, idempotency_key="once"))
    answer_of(await api.put(f"{step_path(session_id, 4)}/draft", json={"data": {"typing": 1}}))
    answer_of(await ASK.send(api, session_id))
    answer_of(await CREATE_TOKEN.send(api, session_id), 201)
    answer_of(await PUT_RESULT.send(api, session_id), 201)
    answer_of(await FINALIZE.send(api, session_id))
    return session_id


async def key_named(raw: Redis, session_id: str, name: str) -> str:
    """Give the whole name of a key that `KEYS` has."""
    begin = f"onboarding:{name}:" if name == "token" else f"onboarding:{session_id}:{name}"
    found = [
        key
        for key in await keys_of(raw, session_id)
        if key == begin or (begin.endswith(":") and key.startswith(begin))
    ]
    [key] = found
    return key


async def overwrite(raw: Redis, key: str, how: str) -> None:
    """Put a list in the place of a key (a string where it is one), or foreign bytes into it."""
    kind = (await ask(raw, "TYPE", key)).decode()
    if how == "type":
        until_ms = await ask(raw, "PEXPIRETIME", key)
        await raw.delete(key)
        await ask(raw, *(("SET", key, "x") if kind == "list" else ("RPUSH", key, "x")))
        await ask(raw, "PEXPIREAT", key, until_ms)
    elif kind == "string":
        await ask(raw, "SET", key, FOREIGN, "KEEPTTL")
    elif kind == "hash":
        for name in await ask(raw, "HKEYS", key):
            await ask(raw, "HSET", key, name, FOREIGN)
    elif kind == "list":
        await ask(raw, "LSET", key, 0, FOREIGN)
    else:
        await ask(raw, "XADD", key, "*", "type", FOREIGN, "at", "1")


def reads() -> list[str]:
    """Give every path of a session that is read, without the id; steps and drafts by number."""
    found: list[str] = []
    for operation in OPERATIONS:
        path = operation.path
        if "GET" in operation.methods and "{id}" in path:
            path = path.replace("{n}/draft", "4/draft")
            found += [path.replace("{n}", str(n)) for n in (1, 2)] if "{n}" in path else [path]
    return found


def short(path: str) -> str:
    return path.removeprefix(BASE).replace("/{id}", "", 1)


async def read_all(
    api: AsyncClient, session_id: str, only: Collection[str] | None = None
) -> dict[str, str]:
    """Read a session in every way, or in some; give the codes of the answers that are none."""
    codes: dict[str, str] = {}
    for path in reads():
        if only is not None and short(path) not in only:
            continue
        async with api.stream("GET", path.replace("{id}", session_id)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                codes[short(path)] = answer.json()["code"]
                problem_of(answer, codes[short(path)])
    return codes


async def test_a_session_has_no_other_kind_of_key(api: AsyncClient, raw: Redis) -> None:
    session_id = await prepare(api)
    whole = {await key_named(raw, session_id, name) for name in KEYS}
    others = set(await keys_of(raw, session_id)) - whole
    assert others == {f"onboarding:{session_id}:step:1"}
    assert await read_all(api, session_id) == {}


@pytest.mark.parametrize("how", ["type", "bytes"])
async def test_damage_is_an_error_of_that_part_and_ends_with_a_recovery(
    api: AsyncClient, raw: Redis, log: Log, how: str
) -> None:
    claims = Claims()
    for name, damaged in KEYS.items():
        with claims.about(name):
            session_id = await prepare(api)
            key = await key_named(raw, session_id, name)
            await overwrite(raw, key, how)
            log.lines()

            codes = await read_all(api, session_id)
            assert damaged.reads <= codes.keys() <= damaged.reads | damaged.also
            assert set(codes.values()) <= {"corrupt_record"}
            if name == "idem:":
                repeat = await SAVE.send(api, session_id, idempotency_key="once")
                codes["a repeat"] = problem_of(repeat, "corrupt_record")["code"]
            # A part of a file is told of as the file.
            told = key.rsplit(":", 2)[0] if name in {"result:", "upload:"} else key
            reported = [
                line["key"] for line in log.lines() if line["event"] == "corrupt_record_found"
            ]
            assert len(reported) == len(codes)
            assert all(told in line.split() for line in reported)

            answer_of(await api.post(f"/api/v1/admin/sessions/{session_id}/recover"))
            codes = await read_all(api, session_id, codes)
            assert codes.keys() == damaged.absent
            assert all(code.endswith("_not_found") for code in codes.values())
            await api.post(f"{BASE}/{session_id}/reopen")
            assert (await save(api, session_id, 7))["version"] == 1
    claims.settle()
