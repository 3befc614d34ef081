"""The way to the store: one round trip a call, and the only place that sends again.

The happy path enters no retry machinery: a call is sent, and only its failure is judged. What is
transient is sent again 1, 2 and 4 seconds later, each with a random part, as long as the request's
deadline and the budget of the process allow; every sending of a write carries the same operation
id, by which the script recognises it.

Where a write counts only once a replica has it, WAIT follows the script on its connection, in the
same round trip. WAIT vouches for nothing but what its connection wrote, and a script that answers
from memory writes nothing: wherever it may, a mark is written before WAIT. Those who wait do so on
connections of their own, so that nobody who reads waits for one.

What is given up may still be on its way, and arrive when others have gone on from there. So every
sending of a script that promises something says when it was sent by the store's clock and for how
long it is waited for, and later it does nothing (`lua/sending.lua`). Where it is found late, the
store says what its clock shows, and it is sent again at once: no host's clock needs to be right.
"""

import asyncio
import math
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, TypeVar

import structlog
from redis.exceptions import NoScriptError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)
from tenacity.stop import stop_base

from app.clock import monotonic_s, now_ms
from app.context import get_context
from app.errors import IdempotencyMismatchError, StoreError
from app.metrics import STORE_ERRORS, STORE_RETRIES, STORE_RETRIES_DENIED, STORE_TALLY
from app.onboarding.idempotency import IdempotentRequest
from app.store.faults import Fault, Remedy, TooLateError, corrupt, judge
from app.store.index import IndexFollower
from app.store.keys import Keys, SessionKeys
from app.store.links import Link, Way
from app.store.retry_budget import RetryBudget
from app.store.scripts import Script, load_script

log = structlog.get_logger()

MARK_MS = 60_000
"""How long a mark lives, in milliseconds. Most find the one before it."""

Argument = str | bytes | int
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a call may take, how often and when one that failed is sent again.

    `send_s` is how long a sending counts: what reaches the store later does nothing, and one over a
    connection of its own is given up. Over the shared one, which may have to be opened, it takes as
    long to open it at most, and as long again as one reply may take.

    `attempts` counts the first sending. The wait before the n-th repeat is `base_s` * 2^(n-1) plus
    a random part of up to `jitter_s`: full jitter would give up within a two-second outage in 15 %
    of the calls. No repeat begins later than `deadline_s` after the call did, where the request
    has no deadline of its own. All in seconds. `budget` is how many repeats all calls together may
    have had in vain, see `RetryBudget`.
    """

    send_s: float = 1.5
    attempts: int = 4
    base_s: float = 1.0
    jitter_s: float = 0.5
    deadline_s: float = 15.0
    budget: int = 768


class Vouch(Enum):
    """What a replica must have before a call is answered, where one is waited for at all."""

    NOTHING = auto()
    """It reads, or writes what may be lost."""

    WRITTEN = auto()
    """What it writes."""

    SEEN = auto()
    """All that it may have seen, too: its answer can be that of an earlier write."""


class Reply(NamedTuple):
    """What a script answered: a word first, then its values as bytes."""

    word: str
    values: list[Any]


class Gateway:
    """Sends commands and scripts to one store."""

    def __init__(
        self,
        make_link: Callable[[Way], Link],
        *,
        keys: Keys,
        lifetime_ms: int,
        mode: str,
        policy: RetryPolicy,
        replica_wait_ms: int | None = None,
    ) -> None:
        """Take what makes a way to the store, one for each event loop that asks.

        `lifetime_ms` is how long a session lives after a write; `mode` is what health reports.
        `replica_wait_ms` is how long one sending of a write waits for a replica; None = for none.
        """
        self.keys = keys
        self.lifetime_ms = lifetime_ms
        self.mode = mode
        self._make_link = make_link
        self._policy = policy
        self._budget = RetryBudget(policy.budget)
        self._send_ms = math.ceil(policy.send_s * 1000)
        self._replica_wait_ms = replica_wait_ms
        self._ahead_ms = 0
        self._links: dict[Way, dict[asyncio.AbstractEventLoop, Link]] = {way: {} for way in Way}
        self._shared = self._links[Way.SHARED]
        self._sending: set[asyncio.Task[Any]] = set()
        self._failures: deque[float] = deque(maxlen=10_000)
        self._follower = IndexFollower(self) if keys.hash_tag else None

    async def command(self, *parts: Argument, key: str | None = None) -> Any:
        """Send a command that only reads, or may be repeated and lost. Raises a `StoreError`.

        `key` says what it is about, where that is not its first argument.
        """
        about = str(parts[1]) if key is None and len(parts) > 1 else key or ""
        begun_s = monotonic_s()
        try:
            return await self._execute(parts, about)
        except Exception as failure:  # noqa: BLE001 - judged, and raised unless the table knows it
            first = failure
        return await self._recover(
            str(parts[0]), parts[1:2], lambda _: self._execute(parts, about), first, begun_s
        )

    async def command_that_waits(self, *parts: Argument) -> Any:
        """Send one that keeps the server waiting until something happens. Raises a `StoreError`."""
        link = self._link(Way.LENT)
        return await self._deliver(str(parts[0]), (), lambda _: link.send("", [parts]))

    async def command_everywhere(self, *parts: Argument) -> list[Any]:
        """Send a command about no key to every server that takes writes. Raises a `StoreError`."""
        link = self._link(Way.SHARED)
        return await self._deliver(str(parts[0]), (), lambda _: link.send_to_all(parts))

    async def write(self, name: str, key: str, *args: Argument) -> None:
        """Send a command that writes to one key what must not be lost, and may be repeated.

        Raises a `StoreError`.
        """
        await self.evaluate("run_command", [key], [name, *args])

    async def evaluate(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[Argument] = (),
        *,
        is_promise: bool = False,
    ) -> Reply:
        """Run a script that only reads or knows its repeats by itself. Raises a `StoreError`.

        `is_promise` says of one that reads that its answer tells of a write as done.
        """
        script = load_script(name)
        vouch = Vouch.SEEN if is_promise or script.is_promise else Vouch.NOTHING
        return _reply(
            await self._deliver(name, keys, lambda _: self._run(script, keys, args, vouch))
        )

    async def evaluate_once(
        self, name: str, keys: Sequence[str], args: Sequence[Argument] = (), *, limit_s: float
    ) -> Reply:
        """Run a script that is of use at once or not at all: nothing is sent again, or logged.

        `limit_s` is how long it may take, in seconds. Raises a `StoreError`.
        """
        script = load_script(name)
        # A task of its own: a cancellation may be lost in the client, and then only the task would
        # wait on for it, and not who asks.
        sending = asyncio.create_task(
            self._attempt(1, lambda _: self._run(script, keys, args, Vouch.NOTHING))
        )
        self._sending.add(sending)
        sending.add_done_callback(self._forget)
        try:
            if not (await asyncio.wait([sending], timeout=limit_s))[0]:
                raise TimeoutError  # noqa: TRY301 - judged as what the client raises
            return _reply(sending.result())
        except Exception as failure:
            fault = judge(failure)
            if fault is None:
                raise
            self._count(fault)
            raise _error_of(fault, keys) from None
        finally:
            sending.cancel()

    def _forget(self, sending: asyncio.Task[Any]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled():
            # Nobody may ask any more; it must not be told as one that nobody looked at.
            sending.exception()

    async def remove(self, name: str, keys: Sequence[str], args: Sequence[Argument] = ()) -> Reply:
        """Run a script that takes the number of the attempt before its other arguments."""
        script = load_script(name)

        def send(attempt: int) -> Awaitable[Any]:
            vouch = Vouch.WRITTEN if attempt == 1 else Vouch.SEEN
            return self._run(script, keys, [attempt, *args], vouch)

        return _reply(await self._deliver(name, keys, send))

    async def change(
        self,
        name: str,
        session: SessionKeys,
        keys: Sequence[str] = (),
        args: Sequence[Argument] = (),
        *,
        at_ms: int,
        request: IdempotentRequest | None = None,
        record: str | None = None,
    ) -> Reply:
        """Run a script that changes a session, exactly once however often it has to be sent.

        `at_ms` is the caller's time. `request` is the Idempotency-Key, if one came, and `record`
        the key that keeps its answer, if not the session's own. Raises a `StoreError` or
        `IdempotencyMismatchError`.
        """
        script = load_script(name)
        all_keys = [*session[:4], *keys]
        if request is not None:
            all_keys.append(record or session.idempotency(request.scope))
        fingerprint = "" if request is None else request.fingerprint
        all_args = [new_operation(), self.lifetime_ms, at_ms, fingerprint, *args]
        # What answers ok to a first sending without a key has written something.
        vouch = Vouch.WRITTEN if request is None else Vouch.SEEN
        begun_s = monotonic_s()
        try:
            try:
                answer = await self._run(script, all_keys, all_args, vouch)
            except Exception as failure:  # noqa: BLE001 - judged, as in `command`
                answer = await self._recover(
                    name,
                    all_keys,
                    lambda _: self._run(script, all_keys, all_args, Vouch.SEEN),
                    failure,
                    begun_s,
                )
        finally:
            # What got no answer may have been done all the same.
            if self._follower is not None:
                self._follower.note(session.session_id)
        reply = _reply(answer)
        return reply if request is None else unwrap_replay(reply, request)

    async def recall(self, session: SessionKeys, request: IdempotentRequest) -> Reply | None:
        """Return the first answer to an Idempotency-Key, for what must know it before it begins."""
        key = session.idempotency(request.scope)
        reply = await self.evaluate("recall_answer", [key], [request.fingerprint], is_promise=True)
        return None if reply.word == "unknown" else unwrap_replay(reply, request)

    @property
    def deadline_ms(self) -> int:
        """How long a call is sent again at most, in milliseconds."""
        return int(self._policy.deadline_s * 1000)

    @property
    def failures_last_minute(self) -> int:
        """How many sendings failed in the last 60 seconds."""
        since = monotonic_s() - 60
        return sum(at > since for at in self._failures)

    def describe_pool(self) -> dict[str, int]:
        """Count what this event loop has: open `connections`, and calls that are `waiting`."""
        counts = [link.describe() for link in self._links_here()]
        return {name: sum(each[name] for each in counts) for name in ("connections", "waiting")}

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        if self._follower is not None:
            await self._follower.aclose()
        loop = asyncio.get_running_loop()
        for links in self._links.values():
            link = links.pop(loop, None)
            if link is not None:
                await link.aclose()

    async def _deliver(
        self, what: str, keys: Sequence[Argument], send: Callable[[int], Awaitable[T]]
    ) -> T:
        """Send by a way that is told the number of the attempt. Raises a `StoreError`."""
        begun_s = monotonic_s()
        try:
            return await send(1)
        except Exception as failure:  # noqa: BLE001 - judged, and raised unless the table knows it
            first = failure
        return await self._recover(what, keys, send, first, begun_s)

    async def _recover(
        self,
        what: str,
        keys: Sequence[Argument],
        send: Callable[[int], Awaitable[T]],
        first: Exception,
        begun_s: float,
    ) -> T:
        """Go on from the failure of what was sent first, at `begun_s`. Raises a `StoreError`.

        The calls that are made all day send by themselves and come here only then: another
        coroutine around each took 0.5 us.
        """
        await self._turn_away(first, begun_s)
        context = get_context()
        until_s = begun_s + self._policy.deadline_s if context is None else context.deadline_s
        try:
            return await self._send_again(what, first, send, until_s - monotonic_s())
        except Exception as failure:
            fault = judge(failure)
            if fault is None:
                raise
            log.error("store_call_failed", call=what, fault=fault.kind)
            raise _error_of(fault, keys) from None

    async def _send_again(
        self, what: str, first: Exception, send: Callable[[int], Awaitable[T]], left_s: float
    ) -> T:
        """Go on from a first failure: raise it if it is final, else repeat after the waits."""
        context = get_context()

        def note(state: RetryCallState) -> None:
            failure = state.outcome and state.outcome.exception()
            fault = judge(failure) if isinstance(failure, Exception) else None
            kind = fault.kind if fault else "unknown"
            log.warning("store_call_retried", call=what, fault=kind, attempt=state.attempt_number)
            STORE_RETRIES.inc()
            if context is not None:
                context.meter.retries += 1

        repeats = _Repeats(self._budget)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._policy.attempts)
            | stop_before_delay(max(0.0, left_s))
            | repeats,
            wait=wait_exponential(multiplier=self._policy.base_s)
            + wait_random(0, self._policy.jitter_s),
            retry=retry_if_exception(self._is_transient),
            before_sleep=note,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    number = attempt.retry_state.attempt_number
                    if number == 1:
                        raise first
                    answer = await self._attempt(number, send)
                    repeats.give_back()
                    return answer
        except asyncio.CancelledError:
            # Nobody knows whether they would have been in vain.
            repeats.give_back()
            raise
        raise AssertionError("tenacity reraises the last failure")

    async def _attempt(self, number: int, send: Callable[[int], Awaitable[T]]) -> T:
        begun_s = monotonic_s()
        try:
            return await send(number)
        except Exception as failure:
            await self._turn_away(failure, begun_s)
            raise

    async def _turn_away(self, failure: Exception, begun_s: float) -> None:
        """Use connections that were open then no more, if a failure says that they lead astray."""
        fault = judge(failure)
        if fault is not None and fault.elsewhere:
            for each in self._links_here():
                await each.leave(begun_s)

    def _is_transient(self, failure: BaseException) -> bool:
        fault = judge(failure) if isinstance(failure, Exception) else None
        if fault is None:
            return False
        self._count(fault)
        return fault.remedy is Remedy.RETRY

    def _count(self, fault: Fault) -> None:
        self._failures.append(monotonic_s())
        STORE_ERRORS.labels(fault.kind).inc()

    async def _run(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], vouch: Vouch
    ) -> Any:
        """Run a script, with the sending before its arguments where it promises something."""
        for _ in range(2):
            begun_ms = now_ms()
            command: tuple[Argument, ...]
            if script.is_promise:
                sending = f"{begun_ms + self._ahead_ms} {self._send_ms}"
                command = ("EVALSHA", script.sha, len(keys), *keys, sending, *args)
            else:
                command = ("EVALSHA", script.sha, len(keys), *keys, *args)
            try:
                answer = await self._execute(command, keys[0], vouch)
            except NoScriptError:
                # After a restart, a failover or SCRIPT FLUSH. EVAL runs the script and keeps it.
                command = ("EVAL", script.text, *command[2:])
                answer = await self._execute(command, keys[0], vouch)
            if answer[0] != b"late":
                return answer
            # The store read its clock between the two: what it is taken for is corrected as far as
            # that asks for. Nobody gets a turn before it is used, who may have met another node.
            told_ms = int(answer[1])
            least, most = told_ms - now_ms(), told_ms - begun_ms
            self._ahead_ms = min(max(self._ahead_ms, least), most)
        raise TooLateError

    def _execute(
        self, command: tuple[Argument, ...], key: str, vouch: Vouch = Vouch.NOTHING
    ) -> Awaitable[Any]:
        """Send a command about the slot of a key, once."""
        commands = [command]
        if vouch is Vouch.NOTHING or self._replica_wait_ms is None:
            link = self._shared.get(asyncio.get_running_loop()) or self._link(Way.SHARED)
        else:
            link = self._link(Way.CONFIRMED)
            if vouch is Vouch.SEEN:
                mark = self.keys.mark(key)
                commands.append(("EVAL", load_script("write_mark").text, 1, mark, MARK_MS))
        context = get_context()
        if context is not None:
            context.meter.commands += len(commands)
        STORE_TALLY.commands += len(commands)
        return link.send(key, commands)

    def _link(self, way: Way) -> Link:
        loop = asyncio.get_running_loop()
        link = self._links[way].get(loop)
        if link is None:
            # Connections belong to an event loop; those of loops that are closed are gone.
            for links in self._links.values():
                for closed in [each for each in links if each.is_closed()]:
                    del links[closed]
            link = self._links[way][loop] = self._make_link(way)
        return link

    def _links_here(self) -> list[Link]:
        loop = asyncio.get_running_loop()
        return [links[loop] for links in self._links.values() if loop in links]


class _Repeats(stop_base):
    """The repeats of one call: stops it when the budget has nothing left."""

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget
        self._taken = 0

    def __call__(self, retry_state: RetryCallState) -> bool:  # noqa: ARG002 - tenacity's name
        if self._budget.take():
            self._taken += 1
            return False
        STORE_RETRIES_DENIED.inc()
        return True

    def give_back(self) -> None:
        """Give back what the call has taken: it has not been in vain."""
        self._budget.give_back(self._taken)


class _Operations:
    """Names operations by 96 random bits; to ask the system for each took 0.7 us.

    A process that was forked begins with others, or two would name alike.
    """

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Begin with others."""
        self._draw = random.Random(os.urandom(32)).getrandbits  # noqa: S311 - a name is no secret

    def new(self) -> str:
        """Name one: hexadecimal digits."""
        return f"{self._draw(96):024x}"


new_operation = _Operations().new
"""Name an operation, as no other of any process is named."""


def unwrap_replay(reply: Reply, request: IdempotentRequest) -> Reply:
    """Take the first answer out of a replayed one and note that it is one.

    Raises `IdempotencyMismatchError`.
    """
    if reply.word == "replayed":
        request.replayed = True
        return _reply(reply.values[0])
    if reply.word == "idempotency_mismatch":
        raise IdempotencyMismatchError(
            "This Idempotency-Key was used with another request; take a new key for a new request"
        )
    return reply


def _error_of(fault: Fault, keys: Sequence[Argument]) -> StoreError:
    # Which of the keys a record is that cannot be read, the store does not say.
    return corrupt(" ".join(map(str, keys))) if fault.error is None else fault.error()


def _reply(raw: list[Any]) -> Reply:
    word = raw[0]
    if word == b"damaged":
        raise corrupt(raw[1].decode())
    return Reply(word.decode(), raw[1:])
