"""The shared connection in any order of calls, givings-up and breaks: whose the answers are."""

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.clock import monotonic_s
from app.store.faults import TooFewReplicasError
from tests.store.echo_server import EchoServer, Peer, until
from tests.store.test_multiplex import connected, send

SHORT_S = 0.03
LONG_S = 30.0

BROKEN = (LostConnectionError, InvalidResponse)
"""What a call may fail with at any time: the server closes connections, and says what is none."""

TIMEOUTS = (StoreTimeoutError, TimeoutError)
"""What it fails with that took too long: the answer, or the opening before it."""


class Connection(RuleBasedStateMachine):
    """Calls over one connection to a server that answers, breaks and stands still as it is told.

    What the server has counted is the model: what was acknowledged is a part of that, each number
    once. What it echoes is told to nobody else.
    """

    make_loop: Callable[[], asyncio.AbstractEventLoop]
    wait_ms: int | None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=type(self).make_loop)
        self.loop = self.runner.get_loop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.stack = AsyncExitStack()
        self.calls: dict[asyncio.Task[Any], tuple[str, str]] = {}
        self.given_up: set[asyncio.Task[Any]] = set()
        self.acknowledged: dict[bytes, list[int]] = defaultdict(list)
        self.asked = 0
        self.may_lack_replicas = False

    @initialize(limit_s=st.sampled_from([SHORT_S, LONG_S]), is_open=st.booleans())
    def begin(self, limit_s: float, is_open: bool) -> None:
        self.limit_s = limit_s

        async def enter() -> None:
            self.server = await self.stack.enter_async_context(EchoServer())
            self.shared = await self.stack.enter_async_context(
                connected(self.server, timeout_s=limit_s, open_s=2 * limit_s, wait_ms=self.wait_ms)
            )

            if is_open:
                assert await self.shared.send([("ECHO", "a")]) == b"a"

        self.run(enter())

    @rule(
        kinds=st.lists(st.sampled_from(["ECHO", "INCR", "FAIL"]), min_size=1, max_size=9),
        size=st.sampled_from([0, 0, 0, 300_000]),
        turns=st.integers(0, 12),
    )
    def ask(self, kinds: list[str], size: int, turns: int) -> None:
        """Call several times in one turn."""
        for kind in kinds:
            self.asked += 1
            told = f"k{self.asked % 3}" if kind == "INCR" else str(self.asked)
            if kind == "ECHO":
                told += "." * size
            call = self.loop.create_task(send(self.shared, [(kind, told)]))
            self.calls[call] = kind, told
        self.turn(turns)

    @rule(turns=st.integers(1, 40))
    def go_on(self, turns: int) -> None:
        self.turn(turns)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        waiting = [call for call in self.calls if not call.done()]
        for at in data.draw(st.sets(st.integers(0, max(len(waiting) - 1, 0)), max_size=3)):
            if waiting:
                waiting[at].cancel()
                self.given_up.add(waiting[at])

    @rule()
    def hold(self) -> None:
        self.server.is_holding = True

    @rule(count=st.none() | st.integers(1, 4))
    def answer(self, count: int | None) -> None:
        for peer in [*self.server.peers]:
            peer.release(count)

    @rule()
    def answer_all(self) -> None:
        self.server.release()

    @rule(size=st.sampled_from([None, 1, 2, 5, 100_000]))
    def split(self, size: int | None) -> None:
        self.server.piece = size

    @rule()
    def push(self) -> None:
        for peer in self.server.peers:
            peer.say(b">2\r\n+invalidate\r\n*1\r\n+key\r\n")

    @rule(how=st.sampled_from([Peer.reset, Peer.half_send, Peer.close]))
    def break_it(self, how: Callable[[Peer], None]) -> None:
        for peer in [*self.server.peers]:
            how(peer)

    @rule()
    def say_what_is_no_reply(self) -> None:
        for peer in self.server.peers:
            peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    @rule()
    def take_or_close(self) -> None:
        self.server.takes = not self.server.takes

    @rule()
    def leave(self) -> None:
        self.shared.leave(monotonic_s())

    @precondition(lambda self: self.limit_s == SHORT_S)
    @rule()
    def fall_silent(self) -> None:
        """Let what is open answer nothing any more, and wait until that is noticed."""
        for peer in self.server.peers:
            peer.is_silent = True
        self.run(asyncio.sleep(1.5 * SHORT_S))

    @precondition(lambda self: self.wait_ms is not None)
    @rule(count=st.integers(0, 2))
    def replicate(self, count: int) -> None:
        self.server.replicas = count
        self.may_lack_replicas |= count == 0

    @invariant()
    def everybody_has_their_own_answer(self) -> None:
        for call in [call for call in self.calls if call.done()]:
            kind, told = self.calls.pop(call)
            if call.cancelled():
                assert call in self.given_up
                continue
            failure = call.exception()
            if failure is None:
                assert kind != "FAIL"
                if kind == "ECHO":
                    assert call.result() == told.encode()
                else:
                    self.acknowledged[told.encode()].append(call.result())
            elif type(failure) is ResponseError:
                assert (kind, told) == ("FAIL", str(failure))
            elif isinstance(failure, TIMEOUTS):
                assert self.limit_s == SHORT_S
            elif type(failure) is TooFewReplicasError:
                assert self.may_lack_replicas
            else:
                assert type(failure) in BROKEN

    @invariant()
    def what_was_acknowledged_was_done_once(self) -> None:
        for key, numbers in self.acknowledged.items():
            assert len(numbers) == len(set(numbers))
            assert all(1 <= number <= self.server.counters[key] for number in numbers)

    @invariant()
    def nobody_complains(self) -> None:
        assert self.complaints == []

    def teardown(self) -> None:
        try:
            self.run(self.end())
            self.everybody_has_their_own_answer()
            self.what_was_acknowledged_was_done_once()
            assert self.calls == {}
            self.nobody_complains()
        finally:
            self.runner.close()

    async def end(self) -> None:
        """Nobody waits for ever, and the connection is as good as ever."""
        self.server.takes, self.server.piece, self.server.replicas = True, None, 1
        self.server.release()
        async with asyncio.timeout(5.0):
            while not all(call.done() for call in self.calls):
                await asyncio.sleep(0.001)
        async with asyncio.timeout(5.0):
            while True:
                try:
                    assert await self.shared.send([("ECHO", "a")]) == b"a"
                    break
                except (*BROKEN, *TIMEOUTS):
                    await asyncio.sleep(0.001)
        await until(lambda: self.shared.waiting == 0)
        await self.stack.aclose()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    def turn(self, turns: int) -> None:
        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(some())

    def run(self, doing: Coroutine[Any, Any, None]) -> None:
        self.runner.run(doing)


@pytest.mark.parametrize("wait_ms", [None, 10])
@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_every_reply_reaches_its_own_caller_or_nobody(
    make_loop: Callable[[], asyncio.AbstractEventLoop], wait_ms: int | None
) -> None:
    machine = type(
        "Connection", (Connection,), {"make_loop": staticmethod(make_loop), "wait_ms": wait_ms}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=40,
            deadline=None,
            derandomize="CI" in os.environ,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
