"""The Lua scripts: each opens with its contract, and answers as the contract says."""

import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import count

import pytest

from app.onboarding.idempotency import IdempotentRequest
from app.store.gateway import Argument, Gateway
from app.store.scripts import load_script
from tests.store.sessions import keyed

SOURCES = {
    file.name.removesuffix(".lua"): file.read_text("utf-8")
    for file in sorted(files("app.store").joinpath("lua").iterdir(), key=lambda file: file.name)
}

INCLUDE = "-- include session.lua\n"
WORD = re.compile(r"\{'([^']*)'")


def contract_of(name: str) -> str:
    """The comment that a script begins with, without its dashes."""
    lines = SOURCES[name].removeprefix(INCLUDE).splitlines()
    opening = []
    for line in lines:
        if not line.startswith("--"):
            break
        opening.append(line.removeprefix("--").removeprefix(" "))
    return "\n".join(opening)


def returned_by_contract(name: str) -> str:
    found = re.search(
        r"^Returns\b.*?(?=^\s*$|^Safe|\Z)", contract_of(name), re.DOTALL | re.MULTILINE
    )
    assert found, name
    return found[0]


class TestEveryScriptOpensWithItsContract:
    @pytest.mark.parametrize("name", SOURCES)
    def test_that_says_what_it_does(self, name: str) -> None:
        first = contract_of(name).splitlines()[0]
        assert re.match(r"[A-Z][a-z]+ .*\w", first), first

    @pytest.mark.parametrize("name", SOURCES)
    def test_that_says_its_keys_its_arguments_its_answers_and_why_it_may_be_sent_twice(
        self, name: str
    ) -> None:
        found = re.findall(
            r"^(KEYS|ARGV|Returns|Safe to send twice)\b[: ]", contract_of(name), re.MULTILINE
        )
        assert found == ["KEYS", "ARGV", "Returns", "Safe to send twice"]

    @pytest.mark.parametrize("name", [name for name in SOURCES if name != "session"])
    def test_that_names_every_word_it_answers_with_and_no_other(self, name: str) -> None:
        body = SOURCES[name].removeprefix(INCLUDE)
        answers = re.findall(r"^(?!--).*(?:return |answer\(|reply = ).*$", body, re.MULTILINE)
        answered = {word for line in answers for word in WORD.findall(line)}
        assert answered == set(WORD.findall(returned_by_contract(name)))

    @pytest.mark.parametrize("name", [name for name in SOURCES if name != "session"])
    def test_and_never_answers_a_bare_value(self, name: str) -> None:
        answers = re.findall(r"^ {0,4}return (.*)$", SOURCES[name], re.MULTILINE)
        assert answers
        for answer in answers:
            assert re.search(r"\{'[a-z_]+'|^answer\(|^current ~= ''", answer), answer


def test_the_opening_is_put_before_the_scripts_that_ask_for_it_and_counts_as_their_text() -> None:
    for name, source in SOURCES.items():
        script = load_script(name)
        assert script.text.endswith(source)
        asks = source.startswith(INCLUDE)
        assert script.text == (SOURCES["session"] + source if asks else source)
        assert re.fullmatch(r"[0-9a-f]{40}", script.sha)
    assert len({load_script(name).sha for name in SOURCES}) == len(SOURCES)


PIN, AT = "p1", "2026-01-01T12:00:00.000Z"
EXPORT = '{"version":"2.0"}'


class Session:
    """Drives the scripts over the key of one session, and notes every word they answer."""

    def __init__(self, gateway: Gateway, session_id: str) -> None:
        self.gateway = gateway
        self.id = session_id
        self.keys = gateway.keys.session(session_id)
        self.words: set[tuple[str, str]] = set()
        self._operations = count()

    async def change(
        self,
        name: str,
        keys: Sequence[str] = (),
        args: Sequence[Argument] = (),
        request: IdempotentRequest | None = None,
    ) -> str:
        all_keys = [*self.keys[:4], *(self.keys.prefix + key for key in keys)]
        head: list[Argument] = [f"op{next(self._operations)}", 1, 600_000, 1_767_268_800_000]
        if request is not None:
            all_keys.append(self.keys.idempotency(request.scope))
        head.append("" if request is None else request.fingerprint)
        return await self._send(name, all_keys, [*head, *args])

    async def call(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> str:
        return await self._send(name, keys, args)

    async def _send(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> str:
        answer = await self.gateway.command("EVAL", load_script(name).text, len(keys), *keys, *args)
        assert isinstance(answer, list), name
        assert isinstance(answer[0], bytes), name
        word = answer[0].decode()
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", word), name
        self.words.add((name, word))
        return word

    def create(self, *, pin: str = PIN) -> list[Argument]:
        return [self.id, pin, 3, "language", "en", "custom", "{}"]

    def save(
        self, *, pin: str = PIN, match: str = "", version: str = "", draft: str = ""
    ) -> list[Argument]:
        return [pin, match, "", version, draft, AT, 1, '{"a":1}']


STEP = ["step:1", "draft:1"]
DRAFT: list[Argument] = [PIN, 1, AT, 60_000, '{"a":1}']


async def test_every_script_answers_every_word_of_its_contract_and_no_other(
    gateway: Gateway,
) -> None:
    session = Session(gateway, "s")
    metadata, progress = session.keys.metadata, session.keys.progress
    mark: list[Argument] = [1]

    # Nothing is there.
    calls: list[tuple[str, Sequence[str], Sequence[Argument]]] = [
        ("save_steps", STEP, session.save()),
        ("save_draft", ["draft:1"], DRAFT),
        ("delete_draft", ["draft:1"], [1]),
        ("delete_step", ["step:1"], [1, ""]),
        ("raise_progress", [], mark),
        ("set_metadata", [], [1, "user_id", "u"]),
        ("finalize_session", ["export"], ["1", EXPORT]),
        ("reopen_session", [], []),
    ]
    for name, keys, args in calls:
        assert await session.change(name, keys, args) == "not_found"
    assert await session.call("read_session", [metadata, progress], ["values"]) == "not_found"
    assert await session.call("read_draft", [progress, "d", metadata], [1]) == "not_found"
    assert await session.call("delete_session", list(session.keys[:4]), [1, 3]) == "not_found"
    assert await session.call("delete_session", list(session.keys[:4]), [2, 3]) == "ok"
    assert await gateway.command("KEYS", "*") == []

    # It is made and changed.
    assert await session.change("create_session", args=session.create()) == "ok"
    assert await session.change("create_session", args=session.create()) == "exists"
    assert await session.call("read_session", [metadata, progress], ["values"]) == "ok"
    assert await session.change("delete_step", ["step:1"], [1, ""]) == "step_not_found"
    assert await session.change("delete_draft", ["draft:1"], [1]) == "draft_not_found"
    assert await session.change("delete_step", ["step:4"], [4, ""]) == "out_of_range"
    assert await session.change("delete_draft", ["draft:4"], [4]) == "out_of_range"
    assert await session.call("read_draft", [progress, "d", metadata], [4]) == "out_of_range"
    draft_key = session.keys.draft(1)
    assert (
        await session.call("read_draft", [progress, draft_key, metadata], [1]) == "draft_not_found"
    )
    assert await session.change("save_draft", ["draft:1"], ["p2", *DRAFT[1:]]) == "other_catalogue"
    assert await session.change("save_draft", ["draft:1"], DRAFT) == "ok"
    assert await session.call("read_draft", [progress, draft_key, metadata], [1]) == "ok"
    assert await session.change("save_steps", STEP, session.save(pin="p2")) == "other_catalogue"
    assert await session.change("save_steps", STEP, session.save(match="*")) == "conflict"
    assert await session.change("save_steps", STEP, session.save(version="1")) == "changed"
    assert await session.change("save_steps", STEP, session.save(draft="0f")) == "changed"
    assert await session.change("save_steps", STEP, session.save()) == "ok"
    await gateway.command("HDEL", progress, "v1")
    assert await session.change("save_steps", STEP, session.save()) == "damaged"
    await gateway.command("HSET", progress, "v1", 1)
    assert await session.change("delete_step", ["step:1"], [1, "|2|"]) == "conflict"
    assert await session.change("raise_progress", args=[4]) == "out_of_range"
    assert await session.change("raise_progress", args=[3]) == "ok"
    assert await session.change("set_metadata", args=[1, "user_id", "u", "workspace_id"]) == "ok"
    assert await session.change("save_draft", ["draft:2"], [PIN, 2, *DRAFT[2:]]) == "ok"
    assert await session.change("reopen_session") == "not_finalized"
    assert await session.change("finalize_session", ["export"], ["0", EXPORT]) == "changed"

    # It is finalized and opened again.
    [changes] = await gateway.command("HMGET", progress, "changes")
    assert await session.change("finalize_session", ["export"], [changes, EXPORT]) == "ok"
    calls = [
        ("finalize_session", ["export"], [changes, EXPORT]),
        ("save_steps", STEP, session.save()),
        ("save_draft", ["draft:1"], DRAFT),
        ("delete_draft", ["draft:2"], [2]),
        ("delete_step", ["step:1"], [1, ""]),
    ]
    for name, keys, args in calls:
        assert await session.change(name, keys, args) == "finalized"
    await gateway.command("HSET", progress, "status", "processing")
    assert await session.change("reopen_session") == "generation_running"
    await gateway.command("HSET", progress, "status", "complete")
    assert await session.change("reopen_session") == "ok"
    assert await session.change("delete_draft", ["draft:2"], [2]) == "ok"
    assert await session.change("delete_step", ["step:1"], [1, "|1|"]) == "ok"

    # An Idempotency-Key comes again, with the same request and with another.
    first, other = keyed("k"), keyed("k", b"other")
    record = session.keys.idempotency(first.scope)
    assert await session.call("recall_answer", [record], [first.fingerprint]) == "unknown"
    assert await session.change("raise_progress", args=mark, request=first) == "ok"
    assert await session.change("raise_progress", args=mark, request=keyed("k")) == "replayed"
    mismatch = await session.change("raise_progress", args=mark, request=other)
    assert mismatch == "idempotency_mismatch"
    assert await session.call("recall_answer", [record], [first.fingerprint]) == "replayed"
    recalled = await session.call("recall_answer", [record], [other.fingerprint])
    assert recalled == "idempotency_mismatch"
    claim, claimed = gateway.keys.creation(first.scope), (first.fingerprint, other.fingerprint)
    assert await session.call("claim_key", [claim], [claimed[0], "a", 9_000]) == "ok"
    assert await session.call("claim_key", [claim], [claimed[0], "a", 9_000]) == "ok"
    assert await session.call("claim_key", [claim], [claimed[0], "b", 9_000]) == "in_progress"
    assert (
        await session.call("claim_key", [claim], [claimed[1], "b", 9_000]) == "idempotency_mismatch"
    )
    await gateway.command("SET", claim, claimed[0] + '["ok","a"]', "KEEPTTL")
    assert await session.call("claim_key", [claim], [claimed[0], "b", 9_000]) == "replayed"

    # It goes, first by half.
    await gateway.command("RENAME", metadata, f"{metadata}-away")
    assert await session.call("read_session", [metadata, progress], ["values"]) == "damaged"
    await gateway.command("RENAME", f"{metadata}-away", metadata)
    await gateway.command("HDEL", progress, "status", "saved")
    assert await session.call("read_draft", [progress, draft_key, metadata], [1]) == "damaged"
    assert await session.change("raise_progress", args=mark) == "damaged"
    assert await session.call("delete_session", list(session.keys[:4]), [1, 3]) == "ok"
    assert await gateway.command("KEYS", f"{session.keys.prefix}*") == []

    of_the_opening = set(WORD.findall(returned_by_contract("session")))
    assert of_the_opening <= {word for _, word in session.words}
    for name, source in SOURCES.items():
        shared = of_the_opening if source.startswith(INCLUDE) else set()
        answered = {word for of, word in session.words if of == name}
        if name != "session":
            assert answered - shared == set(WORD.findall(returned_by_contract(name))) - shared, name
