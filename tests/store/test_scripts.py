"""The Lua scripts: each opens with its contract, and answers as the contract says."""

import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import count

import pytest

from app.clock import now_ms
from app.onboarding.idempotency import IdempotentRequest
from app.store.gateway import Argument, Gateway
from app.store.scripts import load_script
from tests.store.sessions import keyed

SOURCES = {
    file.name.removesuffix(".lua"): file.read_text("utf-8")
    for file in sorted(files("app.store").joinpath("lua").iterdir(), key=lambda file: file.name)
}

INCLUDE = re.compile(r"-- include (\w+)\.lua\n")
WORD = re.compile(r"\{'([^']*)'")


def included_by(name: str) -> list[str]:
    """The files that a script asks for in its first lines."""
    found = re.match(rf"(?:{INCLUDE.pattern})*", SOURCES[name])
    return INCLUDE.findall(found[0]) if found else []


OPENINGS = {asked for name in SOURCES for asked in included_by(name)}
"""The files that are put before others; the rest are scripts that can be called."""

ANSWERING = ("sending", "session", "tokens")
"""Those that may answer before the script that asks for them begins."""

SCRIPTS = sorted(SOURCES.keys() - OPENINGS)


def body_of(name: str) -> str:
    return INCLUDE.sub("", SOURCES[name], count=len(included_by(name)))


def contract_of(name: str) -> str:
    """The comment that a script begins with, without its dashes."""
    lines = body_of(name).splitlines()
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

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_that_names_every_word_it_answers_with_and_no_other(self, name: str) -> None:
        pattern = r"^(?!--).*(?:return |answer\(|reply = ).*$"
        answers = re.findall(pattern, body_of(name), re.MULTILINE)
        answered = {word for line in answers for word in WORD.findall(line)}
        assert answered == set(WORD.findall(returned_by_contract(name)))

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_and_never_answers_a_bare_value(self, name: str) -> None:
        answers = re.findall(r"^ {0,4}return (.*)$", SOURCES[name], re.MULTILINE)
        assert answers
        for answer in answers:
            assert re.search(r"\{'[a-z_]+'|^answer\(|^reply$|^current ~= ''", answer), answer


def files_of(name: str) -> list[str]:
    """The files that make up a script, in their order, each once."""
    found = [file for asked in included_by(name) for file in files_of(asked)]
    return list(dict.fromkeys([*found, name]))


def test_an_opening_is_put_before_the_scripts_that_ask_for_it_and_counts_as_their_text() -> None:
    for name in SOURCES:
        script = load_script(name)
        assert script.text == "".join(SOURCES[file] for file in files_of(name))
        assert re.fullmatch(r"[0-9a-f]{40}", script.sha)
    assert len({load_script(name).sha for name in SOURCES}) == len(SOURCES)


def test_an_opening_may_ask_for_others_and_each_stands_there_once() -> None:
    assert sorted(OPENINGS) == [
        *("clock", "erase", "index", "parts", "room"),
        *("sending", "session", "status", "tasks", "tokens"),
    ]
    assert files_of("set_status") == [
        *("clock", "sending", "parts", "index", "session", "status", "set_status")
    ]
    assert files_of("create_session") == [
        *("clock", "parts", "index", "room", "erase", "sending", "session", "create_session")
    ]
    assert files_of("read_body") == ["clock", "parts", "read_body"]
    assert files_of("read_draft") == ["read_draft"]


def test_what_promises_something_opens_with_the_look_at_its_sending_and_nothing_else_does() -> None:
    looking = {name for name in SCRIPTS if "sending" in files_of(name)}
    assert looking == {name for name in SCRIPTS if load_script(name).is_promise}
    for name in looking:
        # Nothing is asked or written before it, the clock aside.
        before = load_script(name).text.partition(SOURCES["sending"])[0]
        assert re.findall(r"^(?!  |local function|--).*call\(", before, re.MULTILINE) == []


def test_an_opening_of_definitions_answers_nothing() -> None:
    assert re.findall(r"^return", SOURCES["parts"], re.MULTILINE) == []
    assert WORD.findall(SOURCES["parts"]) == []


PIN, AT, AT_MS = "p1", "2026-01-01T12:00:00.000Z", 1_767_268_800_000
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
        head: list[Argument] = [f"op{next(self._operations)}", 600_000, AT_MS]
        if request is not None:
            all_keys.append(self.keys.idempotency(request.scope))
        head.append("" if request is None else request.fingerprint)
        return await self._send(name, all_keys, [*head, *args])

    async def call(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> str:
        return await self._send(name, keys, args)

    async def _send(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> str:
        script = load_script(name)
        if script.is_promise:
            args = [f"{now_ms()} 60000", *args]
        answer = await self.gateway.command("EVAL", script.text, len(keys), *keys, *args)
        assert isinstance(answer, list), name
        assert isinstance(answer[0], bytes), name
        word = answer[0].decode()
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", word), name
        self.words.add((name, word))
        return word

    def create(self, *, pin: str = PIN) -> list[Argument]:
        return [self.id, pin, 3, *ROOM, "0a", "5e", 0, "language", "en", "custom", "{}"]

    def save(
        self, *, pin: str = PIN, match: str = "", version: str = "", draft: str = ""
    ) -> list[Argument]:
        return [pin, match, "", version, draft, AT, 1, '{"a":1}']

    def finalize(self, changes: Argument, *, queued: str = "") -> list[Argument]:
        return [changes, EXPORT, queued]


STEP = ["step:1", "draft:1"]
DRAFT: list[Argument] = [PIN, 1, AT, 60_000, '{"a":1}']
BODY = ["result", "result:t:1"]
STORE: list[Argument] = ["result_stored", "", 4, "transfer", "t", "parts", 1, "size", 1]
PROCESS: list[Argument] = ["processing", "|pending|error|complete|", "", "run", "status", "percent"]
REPORT: list[Argument] = ["stage", 10, "message", "id-1", ""]
LET_IN: list[Argument] = ["0b", 100]
HAND_OVER: list[Argument] = ["f0", "0c", 60_000, 1, 100, ""]
RESUME: list[Argument] = ["f0", "0c", "0d", 60_000, 100]
ASKED: list[Argument] = ['{"question":"a"}', 5, 10]
UPDATE: list[Argument] = ["", "", "", "", 2, "user_id", "u"]
ROOM: list[Argument] = [0, "refuse"]
DELETE: list[Argument] = [1, 3, AT_MS, "deleted", "request", "", "", 0, "", ""]


async def drive_tasks(session: Session) -> None:
    """Let a task come and go: every script about tasks, every word."""
    keys, entry, life_ms = session.gateway.keys, "0001767268800000:t", 600_000
    task, short, everything = keys.task("t"), keys.short("s"), keys.tasks()
    whole = [task, *short, *everything]
    create: list[Argument] = ["op", life_ms, entry, 1, "status", "active"]
    change: list[Argument] = [1, "op", life_ms, entry, 1, "completed", "|active|", AT_MS]
    remove: list[Argument] = [1, "op", entry, "|active|"]
    assert await session.call("change_task", whole, change) == "not_found"
    assert await session.call("change_task", whole, [2, *change[1:]]) == "ok"
    assert await session.call("remove_task", whole, remove) == "not_found"
    assert await session.call("remove_task", whole, [2, *remove[1:]]) == "ok"
    assert await session.call("create_task", whole, create) == "ok"
    assert await session.call("create_task", whole, create) == "ok"
    assert await session.call("create_task", whole, ["another", *create[1:]]) == "exists"
    assert await session.call("enlist_task", short, [life_ms, entry, 1]) == "ok"
    fields: list[Argument] = ["onboarding:task:", "status"]
    assert await session.call("list_tasks", short, ["", 10, *fields]) == "ok"
    old: list[Argument] = [life_ms, 0, 10, *fields]
    assert await session.call("list_old_tasks", everything[1:], old) == "ok"
    assert await session.call("change_task", whole, change) == "ok"
    assert await session.call("change_task", whole, change) == "invalid_transition"
    assert await session.call("remove_task", whole, remove) == "invalid_transition"
    await session.gateway.command("HDEL", task, "status")
    assert await session.call("change_task", whole, change) == "damaged"
    assert await session.call("remove_task", whole, remove) == "damaged"
    await session.gateway.command("HSET", task, "status", "active")
    assert await session.call("remove_task", whole, remove) == "ok"
    assert await session.call("delist_tasks", everything, [entry]) == "ok"
    assert await session.gateway.command("EXISTS", *whole) == 0


async def drive_index(session: Session) -> None:
    """Let the index be asked and changed from beside it: every script of it, every word."""
    keys, entries = session.gateway.keys, [session.gateway.keys.index("entries")]
    of_session = list(session.keys[:3])
    reserve: list[Argument] = ["s", AT_MS, 600_000, 1, "refuse", PIN, ""]
    assert await session.call("reserve_session", entries, reserve) == "ok"
    assert await session.call("reserve_session", entries, reserve) == "ok"
    another: list[Argument] = ["s2", *reserve[1:]]
    assert await session.call("reserve_session", entries, another) == "capacity_reached"
    assert await session.call("release_room", entries, ["s2"]) == "ok"
    unplace: list[Argument] = ["s", "expired", "lifetime", AT_MS]
    assert await session.call("unplace_session", entries, [*unplace, AT_MS - 1]) == "spared"
    assert await session.call("read_facts", of_session, ["-"]) == "not_found"
    facts: list[Argument] = [AT_MS, "pending:held", "", "100", 3, "w", "u", AT_MS, AT_MS, PIN]
    place: list[Argument] = ["s", "-", "1-1", *facts, 3, AT_MS, "", "", 4, "type", "x", "at", 1]
    assert await session.call("place_session", entries, place) == "ok"
    assert await session.call("place_session", entries, place) == "superseded"
    due: list[Argument] = ["created", "pending:held", AT_MS, 0, 10]
    assert await session.call("list_due", entries, due) == "ok"
    page: list[Argument] = ["", 10, 10, "", "", "", "onboarding:", 1, "status", "workspace:w"]
    assert await session.call("page_sessions", entries, page) == "ok"
    assert await session.call("count_sessions", entries, [0, PIN, AT_MS]) == "ok"
    assert await session.call("count_capacity", entries, [0, AT_MS, 10, 1000]) == "ok"
    assert await session.call("unplace_session", entries, [*unplace, AT_MS]) == "ok"
    assert await session.call("unplace_session", entries, [*unplace, AT_MS]) == "absent"
    assert await session.call("reclaim_sessions", entries, [10]) == "ok"
    assert await session.call("repair_index", entries, ["0", 10]) == "ok"
    for _ in range(2):
        assert await session.call("write_mark", [keys.mark("s")], [1000]) == "ok"
    assert await session.call("claim_sweep", entries, ["me", 9_000, 9_000, ""]) == "ok"
    assert await session.call("claim_sweep", entries, ["me", 9_000, 9_000, ""]) == "ok"
    assert await session.call("claim_sweep", entries, ["you", 9_000, 9_000, "1"]) == "taken"
    assert await session.call("finish_sweep", entries, ["you", 0, 0]) == "lost"
    assert await session.call("finish_sweep", entries, ["me", 0, 0]) == "ok"
    assert await session.call("claim_sweep", entries, ["you", 9_000, 9_000, ""]) == "not_due"
    assert await session.call("read_remains", of_session, [3]) == "ok"
    await session.gateway.command("HSET", session.keys.progress, "changes", 5)
    assert await session.call("read_facts", of_session, ["-"]) == "damaged"
    mend: list[Argument] = ["op", 600_000, AT_MS, 5, 1, "step:1", 0, 2, "saved", "000"]
    mend += ["custom", "{}"]
    hashes = list(session.keys[:4])
    assert await session.call("mend_session", hashes, [*mend[:3], 4, *mend[4:]]) == "changed"
    assert await session.call("mend_session", hashes, mend) == "ok"
    assert await session.call("mend_session", hashes, mend) == "ok"
    assert await session.call("delete_session", hashes, [*DELETE[:-2], "1", ""]) == "spared"
    assert await session.call("delete_session", hashes, [*DELETE[:-1], "u"]) == "spared"
    assert await session.call("delist_user", entries, ["u", f"000{AT_MS}:s"]) == "ok"
    assert await session.call("delete_session", hashes, DELETE) == "ok"
    await session.gateway.command("DEL", *await session.gateway.command("KEYS", keys.index("*")))


async def drive_audit(session: Session) -> None:
    """Let something be done and refused: every script of the record, every word."""
    keys = [session.gateway.keys.audit(part) for part in ("batch:w", "done", "refused")]
    batch: list[Argument] = [1, 10, 600_000]
    batch += [
        1,
        AT_MS,
        "u",
        "finalize",
        "done",
        "s",
        2,
        AT_MS,
        "u",
        "get_session",
        "forbidden",
        "",
    ]
    assert await session.call("add_audit", keys, batch) == "ok"
    assert await session.call("add_audit", keys, batch) == "repeated"
    assert await session.call("read_audit", keys[1:], ["0-0", 10]) == "ok"
    assert await session.gateway.command("DEL", *keys) == 3


async def drive_tokens(session: Session) -> None:
    """Hand a session over that is there: every script about tokens, every word."""
    tokens = [*session.keys[:2], session.keys.tokens]
    assert await session.change("add_session_token", args=LET_IN) == "ok"
    assert await session.change("use_resume_token", args=RESUME) == "resume_token_not_found"
    assert await session.change("revoke_resume_token", args=["f0"]) == "resume_token_not_found"
    assert await session.change("create_resume_token", args=HAND_OVER) == "ok"
    assert await session.change("create_resume_token", args=["f1", *HAND_OVER[1:]]) == "too_many"
    other: list[Argument] = ["f0", "0e", *RESUME[2:]]
    assert await session.change("use_resume_token", args=other) == "resume_token_not_found"
    assert await session.change("use_resume_token", args=RESUME) == "ok"
    assert await session.change("use_resume_token", args=RESUME) == "ok"
    assert await session.call("read_tokens", tokens, []) == "ok"
    assert await session.change("revoke_resume_token", args=["f0"]) == "ok"
    await session.gateway.command("HSET", session.keys.tokens, "resume:f0", "x")
    assert await session.change("create_resume_token", args=HAND_OVER) == "damaged"
    assert await session.change("use_resume_token", args=RESUME) == "damaged"
    assert await session.change("revoke_resume_token", args=["f0"]) == "damaged"
    await session.gateway.command("SET", session.keys.tokens, "x")
    assert await session.change("add_session_token", args=LET_IN) == "damaged"
    await session.gateway.command("DEL", session.keys.tokens)


async def drive_room(session: Session) -> None:
    """Make a session where there is room for none but one of its name."""
    index = session.gateway.keys.index
    await session.gateway.command("ZADD", index("deadlines"), "inf", "another")
    full = [*session.create()[:3], 1, "refuse", *session.create()[5:]]
    assert await session.change("create_session", args=full) == "capacity_reached"
    assert await session.call("read_facts", list(session.keys[:3]), ["-"]) == "not_found"
    assert await session.change("create_session", args=session.create()) == "ok"
    assert await session.call("read_facts", list(session.keys[:3]), ["-"]) == "ok"
    assert await session.call("delete_session", list(session.keys[:4]), DELETE) == "ok"
    await session.gateway.command("DEL", *await session.gateway.command("KEYS", index("*")))


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
        ("update_session", [], UPDATE),
        ("record_recovery", [], [1, 0]),
        ("finalize_session", ["export"], session.finalize("1")),
        ("reopen_session", [], []),
        ("set_status", [], PROCESS),
        ("add_event", [], REPORT),
        ("store_body", BODY, STORE),
        ("add_answer", ["history"], ASKED),
        ("add_session_token", [], LET_IN),
        ("create_resume_token", [], HAND_OVER),
        ("use_resume_token", [], RESUME),
        ("revoke_resume_token", [], ["f0"]),
    ]
    for name, keys, args in calls:
        assert await session.change(name, keys, args) == "not_found"
    assert await session.call("read_session", [metadata, progress], [0]) == "not_found"
    assert await session.call("read_draft", [progress, "d", metadata], [1]) == "not_found"
    hashes = [metadata, progress]
    events, part = session.keys.events, session.keys.prefix + BODY[1]
    body = [*hashes, session.keys.prefix + BODY[0]]
    kept = [progress, session.keys.ops, part]
    assert await session.call("read_events", [*hashes, events], ["0-0", 0, 0]) == "not_found"
    assert await session.call("save_part", kept, ["x", 1000]) == "not_found"
    assert await session.call("read_body", body, []) == "not_found"
    history = [*hashes, session.keys.history]
    assert await session.call("read_history", history, []) == "not_found"
    tokens = [*hashes, session.keys.tokens]
    assert await session.call("read_tokens", tokens, []) == "not_found"
    assert await session.call("delete_session", list(session.keys[:4]), DELETE) == "not_found"
    assert await session.call("delete_session", list(session.keys[:4]), [2, *DELETE[1:]]) == "ok"
    with_file = [*session.create()[:7], 2, "parts", 1, *session.create()[8:]]
    lost = await session.change("create_session", ["upload", "upload:t:1"], with_file)
    assert lost == "part_lost"
    assert await gateway.command("KEYS", "*") == []
    assert await session.call("run_command", [gateway.keys.canary], ["SET", "a"]) == "ok"
    assert await session.call("run_command", [gateway.keys.canary], ["DEL"]) == "ok"
    await drive_index(session)
    await drive_room(session)
    await drive_audit(session)

    # It is made and changed.
    assert await session.change("create_session", args=session.create()) == "ok"
    assert await session.change("create_session", args=session.create()) == "exists"
    assert await session.call("read_session", [metadata, progress], [0]) == "ok"
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
    assert await session.change("update_session", args=["0", *UPDATE[1:]]) == "changed"
    assert await session.change("update_session", args=["", "complete", "|error|", "", 0]) == (
        "invalid_transition"
    )
    assert await session.change("update_session", args=[*UPDATE, "workspace_id"]) == "ok"
    assert await session.change("record_recovery", args=[1, 0]) == "ok"
    assert await session.change("add_answer", ["history"], ASKED) == "ok"
    assert await session.call("read_history", history, []) == "ok"
    await drive_tokens(session)
    await gateway.command("HSET", progress, "request_count", "x")
    assert await session.change("add_answer", ["history"], ASKED) == "damaged"
    await gateway.command("HDEL", progress, "request_count")
    assert await session.call("claim_ask", [gateway.keys.asks], [1]) == "ok"
    assert await session.call("claim_ask", [gateway.keys.asks], [1]) == "too_many"
    bucket = gateway.keys.bucket("requests", "0f")
    assert await session.call("take_tokens", [bucket], [1, 60_000, 1]) == "ok"
    assert await session.change("save_draft", ["draft:2"], [PIN, 2, *DRAFT[2:]]) == "ok"
    assert await session.change("reopen_session") == "not_finalized"
    assert await session.change("finalize_session", ["export"], session.finalize("0")) == "changed"

    # It is finalized and opened again.
    [changes] = await gateway.command("HMGET", progress, "changes")
    queued = session.finalize(changes, queued=session.id)
    assert await session.change("finalize_session", ["export", "jobs"], queued) == "ok"
    calls = [
        ("finalize_session", ["export"], session.finalize(changes)),
        ("save_steps", STEP, session.save()),
        ("save_draft", ["draft:1"], DRAFT),
        ("delete_draft", ["draft:2"], [2]),
        ("delete_step", ["step:1"], [1, ""]),
    ]
    for name, keys, args in calls:
        assert await session.change(name, keys, args) == "finalized"
    complete: list[Argument] = ["complete", "|processing|", "", "", "status", "percent"]
    another: list[Argument] = ["error", "|processing|", "", "another run", "status"]
    assert await session.change("set_status", args=complete) == "invalid_transition"
    assert await session.change("set_status", args=PROCESS) == "ok"
    assert await session.change("set_status", args=PROCESS) == "unchanged"
    assert await session.change("set_status", args=another) == "superseded"
    assert await session.change("reopen_session") == "generation_running"
    assert await session.change("add_event", args=REPORT) == "ok"
    assert await session.change("add_event", args=REPORT) == "repeated"
    assert await session.change("add_event", args=["x", 1, "", "", "another run"]) == "superseded"
    assert await session.call("read_events", [*hashes, events], ["0-0", 0, 0]) == "ok"

    # Its result comes, first without its only part; a generator is given the work.
    assert await session.call("read_body", body, []) == "body_not_found"
    assert await session.change("store_body", BODY, STORE) == "part_lost"
    assert await session.call("save_part", kept, ["x", 1000]) == "ok"
    assert await session.change("store_body", BODY, [STORE[0], "x", *STORE[2:]]) == "superseded"
    assert await session.change("store_body", BODY, STORE) == "ok"
    assert await session.call("read_body", body, []) == "ok"
    await gateway.command("DEL", part)
    assert await session.call("read_body", body, []) == "damaged"
    jobs = session.keys.prefix + "jobs"
    await gateway.command("XGROUP", "CREATE", jobs, "g", "0")
    read = ("XREADGROUP", "GROUP", "g", "worker", "COUNT", 1, "STREAMS", jobs, ">")
    await gateway.command(*read)
    [[job, *_]] = await gateway.command("XRANGE", jobs, "-", "+")
    add: list[Argument] = ["another", 1, 1000, 600_000]
    assert await session.call("add_job", [jobs], add) == "ok"
    assert await session.call("add_job", [jobs], add) == "known"
    assert await session.call("keep_job", [jobs], ["g", "worker", job]) == "ok"
    assert await session.call("keep_job", [jobs], ["g", "another", job]) == "lost"
    assert await session.call("finish_job", [jobs], ["g", "another", job]) == "lost"
    assert await session.call("leave_queue", [jobs], ["g", "worker"]) == "busy"
    assert await session.call("finish_job", [jobs], ["g", "worker", job]) == "ok"
    assert await session.call("leave_queue", [jobs], ["g", "worker"]) == "ok"
    assert await session.call("keep_job", [jobs], ["g", "worker", job]) == "lost"
    await gateway.command("DEL", jobs)
    assert await session.change("set_status", args=complete) == "ok"
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
    one: list[Argument] = [claimed[0], "a", 9_000, 90_000, ""]
    two: list[Argument] = [claimed[0], "b", *one[2:]]
    assert await session.call("claim_key", [claim], one) == "ok"
    assert await session.call("claim_key", [claim], one) == "ok"
    assert await session.call("claim_key", [claim], two) == "claimed"
    assert await session.call("claim_key", [claim], [*two[:4], "a"]) == "claimed"
    other_body: list[Argument] = [claimed[1], *two[1:]]
    assert await session.call("claim_key", [claim], other_body) == "idempotency_mismatch"
    await gateway.command("SET", claim, claimed[0] + '["ok","a"]', "KEEPTTL")
    assert await session.call("claim_key", [claim], two) == "replayed"
    for key in (claim, record):
        await gateway.command("SET", key, "of somebody else", "KEEPTTL")
    assert await session.call("claim_key", [claim], two) == "damaged"
    assert await session.call("recall_answer", [record], [first.fingerprint]) == "damaged"
    assert await session.change("raise_progress", args=mark, request=first) == "damaged"

    await drive_tasks(session)

    # It goes, first by half.
    await gateway.command("RENAME", metadata, f"{metadata}-away")
    assert await session.call("read_session", [metadata, progress], [0]) == "damaged"
    await gateway.command("RENAME", f"{metadata}-away", metadata)
    await gateway.command("HDEL", progress, "status", "saved")
    assert await session.call("read_draft", [progress, draft_key, metadata], [1]) == "damaged"
    assert await session.change("raise_progress", args=mark) == "damaged"
    await gateway.command("RENAME", progress, f"{progress}-away")
    assert await session.call("read_events", [*hashes, events], ["0-0", 0, 0]) == "damaged"
    assert await session.call("read_history", history, []) == "damaged"
    assert await session.call("read_tokens", tokens, []) == "damaged"
    await gateway.command("RENAME", f"{progress}-away", progress)
    assert await session.call("delete_session", list(session.keys[:4]), DELETE) == "ok"
    assert await gateway.command("KEYS", f"{session.keys.prefix}*") == []

    words_of = {each: set(WORD.findall(returned_by_contract(each))) for each in ANSWERING}
    for name in SCRIPTS:
        shared = {word for each in ANSWERING if each in files_of(name) for word in words_of[each]}
        answered = {word for of, word in session.words if of == name}
        assert answered - shared == set(WORD.findall(returned_by_contract(name))) - shared, name
