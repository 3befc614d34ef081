"""Every call that may change something does so once, however often its replies are lost.

All calls are sent at once, each about a session and names of its own, first undisturbed and then
with a fault that hits every command of theirs; the answers and all that is in the store must be
alike. What differs by nature (ids, times, tokens) is masked.
"""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest
from httpx2 import Response
from redis.asyncio import Redis

from app.onboarding.access import Scope
from app.settings import load_settings
from app.store.scripts import load_script
from tests.access import AUTH
from tests.api.every_call import (
    ADMIN,
    WRITES,
    World,
    every_name,
    learn,
    name_of,
    operation_of,
    prepare,
    send,
)
from tests.api.helpers import problem_of
from tests.api.whole_store import mask, read_store, sort_out
from tests.conftest import QUICKLY, UNLIMITED
from tests.faults.proxy import Loss, Proxy
from tests.faults.servers import HOST, Valkey, follows, wait_until
from tests.service import serving
from tests.store.test_scripts import SCRIPTS, files_of

OPERATOR = "ok_a-key-with-every-scope"

MAY_ALL: dict[str, Any] = {
    **AUTH,
    "api_keys": f"all:{'+'.join(Scope)}:{hashlib.sha256(OPERATOR.encode()).hexdigest()}",
}

PATIENTLY = {"redis_timeout_s": 0.15, "retry_attempts": 12, "retry_base_s": 0.001}
"""Settings with which no lost reply costs much, and a busy machine makes nobody give up."""

STUBBORNLY = {"redis_timeout_s": 2, "retry_attempts": 3}
"""Settings for replies that never come."""

KEYED = [call for call in WRITES if operation_of(call).idempotency_key]


class Trouble:
    """Loses replies to the commands of calls.

    Of each command the first ones, in the ways of `losses`; where they are to be `lost_for_good`,
    every one of a script that changes a session.
    """

    def __init__(self, losses: Sequence[Loss] = (), *, lost_for_good: bool = False) -> None:
        self._losses = losses
        self._lost_for_good = lost_for_good
        self._calls: dict[bytes, str] = {}
        self.sent: Counter[tuple[bytes, ...]] = Counter()
        """How often each command was sent."""
        self.lost: Counter[str] = Counter()
        """How many replies were lost of each call."""

    @contextmanager
    def about(self, call: str, names: Sequence[str]) -> Iterator[None]:
        """Take commands that hold one of some names for those of a call."""
        own = [name.encode() for name in names]
        self._calls |= dict.fromkeys(own, call)
        yield
        for name in own:
            del self._calls[name]

    def __call__(self, frame: bytes) -> Loss | None:
        """Say how the reply to a command is lost."""
        call = next((call for name, call in self._calls.items() if name in frame), None)
        if call is None:
            return None
        what = words_of(frame)
        if what[0] in (b"EVALSHA", b"EVAL"):
            # The script and its keys; what else it is told differs from sending to sending.
            what = (what[1], *what[3 : 3 + int(what[2])])
        what = (call.encode(), *what)
        self.sent[what] += 1
        loss = None
        if self._lost_for_good:
            loss = Loss.RESET if what[1] in CHANGES else None
        elif self.sent[what] <= len(self._losses):
            loss = self._losses[self.sent[what] - 1]
        if loss is not None:
            self.lost[call] += 1
        return loss


NAMES = {f"PATCH {ADMIN}/config": ["max_sessions", "cleanup_interval_s"]}
"""What commands of a call hold that is about no session, task, or user."""

CHANGES = {load_script(name).sha.encode() for name in SCRIPTS if "session" in files_of(name)}
"""The scripts that change a session, by what the store knows them by."""


def words_of(frame: bytes) -> tuple[bytes, ...]:
    """Read the words of a command."""
    words, at = [], frame.index(b"\r\n") + 2
    while at < len(frame):
        end = frame.index(b"\r\n", at)
        size = int(frame[at + 1 : end])
        words.append(frame[end + 2 : end + 2 + size])
        at = end + size + 4
    return tuple(words)


# --- Runs -----------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """An answer, masked."""

    status: int
    etag: str | None
    location: str | None
    body: str

    @classmethod
    def of(cls, response: Response, world: World) -> "Answered":
        etag, location = (response.headers.get(name) for name in ("etag", "location"))
        return cls(
            response.status_code,
            etag and mask(etag, world),
            location and mask(location, world),
            mask(response.text, world),
        )


class Run(NamedTuple):
    """What came of sending some calls: the answers, and what is in the store about each.

    `untrue` are event ids and tokens of answers of which the store knows nothing, `spared` the
    calls of which no reply was lost.
    """

    answers: dict[str, Answered]
    kept: dict[str, Counter[str]]
    untrue: dict[str, set[str]]
    spared: set[str]

    def unlike(self, other: "Run") -> dict[str, Any]:
        """Tell the calls of which something differs, and what."""
        found: dict[str, Any] = {}
        for call in self.kept:
            answers = self.answers.get(call), other.answers.get(call)
            more, less = self.kept[call] - other.kept[call], other.kept[call] - self.kept[call]
            if answers[0] != answers[1] or more or less:
                found[call] = {"answers": answers, "more": more, "less": less}
        return found

    def without(self, *words: str) -> "Run":
        """Leave out what of the store holds one of some words."""
        kept = {
            call: Counter(
                {line: n for line, n in lines.items() if not any(word in line for word in words)}
            )
            for call, lines in self.kept.items()
        }
        return self._replace(kept=kept)


Send = Callable[[World, str, Trouble], Any]


class Stage:
    """Sends calls to a service behind a proxy that loses replies."""

    def __init__(self, raw: Redis, port: int, **settings: Any) -> None:
        self.raw = raw
        self._port = port
        self._settings = settings

    async def run(
        self,
        calls: Sequence[str],
        trouble: Trouble,
        send_it: Send,
        *,
        key: str | None = None,
        one_by_one: bool = False,
    ) -> Run:
        """Send calls on an empty store, all at once or not; `key` is their Idempotency-Key."""
        await self.raw.flushdb()
        worlds: dict[str, World] = {}
        async with Proxy(self._port) as proxy:
            url = f"redis://{proxy.host}:{proxy.port}/0"
            chosen = {**MAY_ALL, **QUICKLY, **UNLIMITED, **PATIENTLY, **self._settings}
            settings = load_settings(**{**chosen, "redis_url": url})
            async with serving(settings) as api:
                for call in calls:
                    world = worlds[call] = World(api, self.raw)
                    world.sent = {"x-api-key": OPERATOR}
                    if settings.hash_tag:
                        world.prefix = "onboarding:{%s}:"
                await asyncio.gather(*(prepare(worlds[call], call) for call in calls))
                for world in worlds.values():
                    if key is not None:
                        world.sent["idempotency-key"] = key
                proxy.lose(trouble)
                sending = [send_it(world, call, trouble) for call, world in worlds.items()]
                if one_by_one:
                    done = [await each for each in sending]
                else:
                    done = await asyncio.gather(*sending)
            # What is written behind the requests has been written now.
        answers = {
            call: Answered.of(response, worlds[call])
            for call, response in zip(worlds, done, strict=True)
        }
        lines = await read_store(self.raw)
        known = told_in("\n".join(lines))
        untrue = {
            call: told
            for call, response in zip(worlds, done, strict=True)
            if (told := told_in(response.text) - known)
        }
        spared = {call for call in worlds if not trouble.lost[call]}
        return Run(answers, sort_out(lines, worlds), untrue, spared)


def told_in(text: str) -> set[str]:
    """Give the ids of events in a text, and the digests of tokens."""
    tokens = re.findall(r"\bo[rs]t_[\w-]+", text)
    digests = {hashlib.sha256(token.encode()).hexdigest() for token in tokens}
    return {*re.findall(r"\b\d{13}-\d+\b|\b[0-9a-f]{64}\b", text), *digests}


async def send_once(world: World, call: str, trouble: Trouble) -> Response:
    """Send a call, of which replies may be lost."""
    with trouble.about(call, [*world.names, *NAMES.get(call, ())]):
        response = await send(world, call)
    learn(world, response)
    return response


async def send_twice(world: World, call: str, trouble: Trouble) -> Response:
    """Send a call that fails, and then once more."""
    with trouble.about(call, world.names):
        problem_of(await send(world, call), "store_unavailable")
    return await send_once(world, call, Trouble())


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """Run a master with a replica."""
    directory = tmp_path_factory.mktemp("replicated")
    with ExitStack() as stack:
        master = stack.enter_context(Valkey.start(directory / "master", repl_diskless_sync_delay=0))
        replica = stack.enter_context(
            Valkey.start(directory / "replica", replicaof=(HOST, master.port))
        )
        wait_until(lambda: follows(replica), 10, "the replica follows its master")
        yield master


def test_these_are_all_calls_that_may_change_something() -> None:
    assert {name_of(call) for call in WRITES} == {
        name for name in every_name() if not name.startswith("GET ")
    }


SILENT, BREAKS = "no reply comes", "the connection breaks, twice in a row"
FAULTS = {SILENT: [Loss.SILENCE], BREAKS: [Loss.RESET, Loss.RESET]}


def expect_success(run: Run, calls: Iterable[str]) -> None:
    assert {call: run.answers[call].status for call in calls} == {
        call: WRITES[call].status for call in calls
    }


async def check_once(stage: Stage, *faults: str) -> None:
    """Check that the same comes of all calls, whatever happens to them on their way."""
    undisturbed = await stage.run([*WRITES], Trouble(), send_once)
    assert undisturbed.untrue == {}
    expect_success(undisturbed, WRITES)
    for fault in faults:
        disturbed = await stage.run([*WRITES], Trouble(FAULTS[fault]), send_once)
        assert (disturbed.spared, disturbed.untrue) == (set(), {}), fault
        assert disturbed.unlike(undisturbed) == {}, fault


async def test_what_is_sent_again_is_done_once_and_answered_as_the_first_time(
    raw: Redis, valkey: Valkey
) -> None:
    await check_once(Stage(raw, valkey.port), *FAULTS)


async def test_also_where_keys_have_hash_tags(raw: Redis, valkey: Valkey) -> None:
    await check_once(Stage(raw, valkey.port, key_hash_tag="on"), BREAKS)


async def test_also_where_a_replica_has_to_confirm(replicated: Valkey) -> None:
    async with Redis(host=replicated.host, port=replicated.port) as raw:
        stage = Stage(raw, replicated.port, durability="replicated")
        await check_once(stage, BREAKS)


@pytest.mark.parametrize("key_hash_tag", ["off", "on"])
async def test_who_is_told_503_and_asks_again_with_the_same_key_gets_the_first_answer(
    raw: Redis, valkey: Valkey, key_hash_tag: str
) -> None:
    stage = Stage(raw, valkey.port, key_hash_tag=key_hash_tag, **STUBBORNLY)
    # Each reply that is lost breaks the connection, for all who share it.
    how: dict[str, Any] = {"key": "k1", "one_by_one": True}
    undisturbed = await stage.run(KEYED, Trouble(), send_once, **how)
    expect_success(undisturbed, KEYED)
    disturbed = await stage.run(KEYED, Trouble(lost_for_good=True), send_twice, **how)
    assert (disturbed.spared, disturbed.untrue) == (set(), {})
    # That somebody asked twice is on record, and the second asking is told the first one's token.
    # Where the index follows behind, it does so over the connection that breaks, and what it gives
    # up on is left to the sweeper.
    beside = (":audit", ":{audit}", ":ops ", "active_at", ":index:{sessions}:")
    assert disturbed.without(*beside).unlike(undisturbed.without(*beside)) == {}
