"""The connection that everybody shares: whose the replies are, and what becomes of who waits."""

import asyncio
import gc
import os
import select
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
import uvloop
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as StoreTimeoutError

from app.address import parse_store_url, unix_address
from app.clock import monotonic_s
from app.store.client import Command, close_client, make_client
from app.store.faults import TooFewReplicasError, TooMuchAtOnceError
from app.store.multiplex import ONCE_MORE_S, SharedConnection
from tests.faults.servers import HOST
from tests.store.echo_server import EchoServer, Peer, until

SHORT_S = 0.1
"""A limit that is reached on purpose. No other one is."""

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def in_each_loop(test: Callable[[Any, EchoServer], Awaitable[None]]) -> Callable[..., None]:
    """Give a test a server, run it in each kind of loop, and see that it leaves nothing behind."""

    async def run(owner: Any) -> None:
        complaints: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(10.0), EchoServer() as server:
            await test(owner, server)
            await until(lambda: not server.peers)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        gc.collect()
        assert complaints == []

    @pytest.mark.parametrize("loop", LOOPS)
    def test_in_each_loop(self: Any, loop: str) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(run(self))

    return cast("Callable[..., None]", test_in_each_loop)


@asynccontextmanager
async def connected(
    server: EchoServer, url: str = "", *, timeout_s: float = 5.0, open_s: float = 5.0, **how: Any
) -> AsyncIterator[SharedConnection]:
    if server.path is not None:
        address = unix_address(str(server.path))
    else:
        address = parse_store_url(url or f"redis://{HOST}:{server.port}")
    client: Any = make_client(address, timeout_s=5.0, max_connections=1, client_name="echo")
    make_connection = client.connection_pool.make_connection
    how = {"callbacks": {}, **how}
    shared = SharedConnection(make_connection, timeout_s=timeout_s, open_s=open_s, **how)
    try:
        yield shared
    finally:
        await shared.aclose()
        await close_client(client)
        assert shared.waiting == 0


async def send(shared: SharedConnection, row: list[Command], *, asking: bool = False) -> Any:
    """Send commands and wait for the answer, as a task can."""
    return await shared.send(row, asking=asking)


def ask(shared: SharedConnection, *words: str | bytes | int) -> asyncio.Task[Any]:
    return asyncio.create_task(send(shared, [words]))


async def all_of(*asked: Awaitable[Any]) -> list[Any]:
    """The answers, failures among them."""
    return await asyncio.gather(*asked, return_exceptions=True)


async def hello(shared: SharedConnection) -> None:
    """Have the connection opened, and used."""
    assert await shared.send([("ECHO", "hello")]) == b"hello"


async def works(shared: SharedConnection) -> None:
    texts = [b"%d" % number for number in range(20)]
    assert await all_of(*(ask(shared, "ECHO", text) for text in texts)) == texts


async def are(failures: list[Any], kind: type[Exception]) -> None:
    assert [type(each) for each in failures] == [kind] * len(failures)
    assert len({id(each) for each in failures}) == len(failures)


class TestEveryReplyReachesItsOwnCaller:
    async def mixed(self, shared: SharedConnection, calls: int) -> None:
        asked = [
            ask(shared, *[("ECHO", number), ("FAIL", number), ("INCR", number)][number % 3])
            for number in range(calls)
        ]
        for number, answer in enumerate(await all_of(*asked)):
            match number % 3:
                case 0:
                    assert answer == b"%d" % number
                case 1:
                    assert type(answer) is ResponseError
                    assert str(answer) == str(number)
                case 2:
                    assert answer == 1

    @in_each_loop
    async def test_of_many_at_once(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await self.mixed(shared, 600)
            assert server.opened == 1

    @in_each_loop
    async def test_wherever_replies_are_split(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            for server.piece in (1, 2, 3, 7):
                server.counters.clear()
                await self.mixed(shared, 30)

    @in_each_loop
    async def test_with_large_ones_between(self, server: EchoServer) -> None:
        large = os.urandom(5_000_000)
        async with connected(server) as shared:
            for server.piece in (None, 100_000):
                answers = await all_of(
                    ask(shared, "ECHO", "a"),
                    ask(shared, "ECHO", large),
                    ask(shared, "ECHO", "b"),
                    ask(shared, "FILL", 9_000_000),
                    ask(shared, "ECHO", "c"),
                )
                assert answers == [b"a", large, b"b", b"x" * 9_000_000, b"c"]

    @in_each_loop
    async def test_past_messages_that_nobody_asked_for(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            for server.piece in (None, 1):
                server.is_holding = True
                asked = [ask(shared, "ECHO", text) for text in "ab"]
                await until(lambda: len(server.peer.kept) == 2)
                for _ in asked:
                    server.peer.say(b">2\r\n+invalidate\r\n*1\r\n+key\r\n")
                    server.peer.release(1)
                server.peer.say(b">1\r\n+goodbye\r\n")
                server.release()
                assert await all_of(*asked) == [b"a", b"b"]
            assert server.opened == 1

    @in_each_loop
    async def test_in_the_shape_that_callers_know(self, server: EchoServer) -> None:
        def refuse(_: Any) -> None:
            raise ValueError("not a number")

        async with connected(server, callbacks={"INCR": str, "ECHO": refuse}) as shared:
            assert await shared.send([("INCR", "a")]) == "1"
            with pytest.raises(ValueError, match="not a number"):
                await shared.send([("ECHO", "a")])
            assert await shared.send([("FILL", 1)]) == b"x"

    @in_each_loop
    async def test_after_asking_too(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            asked = [
                asyncio.create_task(send(shared, [("ECHO", text)], asking=text == "b"))
                for text in "abc"
            ]
            assert await all_of(*asked) == [b"a", b"b", b"c"]
            assert [words[0] for words in server.commands] == [b"ECHO", b"ASKING", b"ECHO", b"ECHO"]


class TestCommandsOfOneTurn:
    @in_each_loop
    async def test_leave_in_one_write_and_in_order(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await works(shared)
            await works(shared)
            texts = [[b"ECHO", b"%d" % number] for number in range(20)]
            assert server.said == [texts, texts]

    @in_each_loop
    async def test_those_of_the_next_turn_do_not_wait_for_an_answer(
        self, server: EchoServer
    ) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = []
            for number in range(3):
                asked.append(ask(shared, "ECHO", number))
                await server.got(2 + number)
            server.release()
            assert await all_of(*asked) == [b"0", b"1", b"2"]

    @in_each_loop
    async def test_what_cannot_be_sent_is_not_sent_by_half(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            asked = [ask(shared, "ECHO", text) for text in ("a", "\ud800", "b")]
            answers = await all_of(*asked)
            assert answers[::2] == [b"a", b"b"]
            assert type(answers[1]) is UnicodeEncodeError


class TestWhoGivesUp:
    async def give_up(self, *calls: asyncio.Task[Any]) -> None:
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)

    @in_each_loop
    async def test_before_the_connection_is_open_sends_nothing(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            first, second, third = (ask(shared, "ECHO", text) for text in "abc")
            await asyncio.sleep(0)
            await self.give_up(second)
            assert await all_of(first, third) == [b"a", b"c"]
            assert server.commands == [[b"ECHO", b"a"], [b"ECHO", b"c"]]

    @in_each_loop
    async def test_before_it_is_open_and_alone_leaves_it_open(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            call = ask(shared, "ECHO", "a")
            await asyncio.sleep(0)
            await self.give_up(call)
            await until(lambda: shared.is_open)
            await hello(shared)
            assert server.commands == [[b"ECHO", b"hello"]]
            assert server.opened == 1

    @in_each_loop
    async def test_in_the_turn_in_which_they_asked_sends_nothing(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)

            async def change_of_mind() -> None:
                call = asyncio.current_task()
                assert call is not None
                asyncio.get_running_loop().call_soon(call.cancel)
                await shared.send([("INCR", "a")])

            call = asyncio.create_task(change_of_mind())
            assert await ask(shared, "ECHO", "b") == b"b"
            assert call.cancelled()
            assert server.counters[b"a"] in (0, 1)
            await works(shared)

    @in_each_loop
    async def test_on_the_way_leaves_every_other_its_own_answer(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", number) for number in range(9)]
            await server.got(10)
            await self.give_up(asked[0], asked[4], asked[5], asked[8])
            assert shared.waiting == 9
            server.release()
            kept = [asked[at] for at in (1, 2, 3, 6, 7)]
            assert await all_of(*kept) == [b"1", b"2", b"3", b"6", b"7"]
            await works(shared)
            assert shared.waiting == 0
            assert server.opened == 1

    @in_each_loop
    async def test_when_the_answer_is_just_there_takes_nobody_elses(
        self, server: EchoServer
    ) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True

            async def cancel_the_next() -> Any:
                answer = await shared.send([("ECHO", "a")])
                # Its answer came with the same bytes, and it has not had a turn since.
                second.cancel()
                failing.cancel()
                return answer

            first = asyncio.create_task(cancel_the_next())
            second, failing = ask(shared, "ECHO", "b"), ask(shared, "FAIL", "c")
            third = ask(shared, "ECHO", "d")
            await server.got(5)
            server.release()
            assert await all_of(first, third) == [b"a", b"d"]
            await asyncio.wait([second, failing])
            assert second.cancelled()
            assert failing.cancelled()

    @in_each_loop
    async def test_all_of_them_leave_the_connection_in_order(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "INCR", "a") for _ in range(50)]
            await server.got(51)
            await self.give_up(*asked)
            server.release()
            await works(shared)
            assert server.counters[b"a"] == 50
            assert server.opened == 1


class TestAnOverdueReply:
    @in_each_loop
    async def test_drops_the_connection_and_everybody_who_waits(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            silent = server.peer
            server.is_holding = True
            begun_s = monotonic_s()
            first = [ask(shared, "INCR", "a") for _ in range(3)]
            await server.got(4)
            later = [ask(shared, "INCR", "a") for _ in range(3)]
            await server.got(7)
            server.is_holding = False
            failures = await all_of(*first, *later)
            assert monotonic_s() - begun_s >= SHORT_S
            await are(failures, StoreTimeoutError)
            await until(lambda: silent not in server.peers)
            # What was lost is not sent again here, and who comes next gets nothing of it.
            assert await shared.send([("INCR", "a")]) == 7
            assert server.opened == 2

    @in_each_loop
    async def test_is_one_of_those_that_were_given_up_too(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            server.is_holding = True
            given_up, waiting = ask(shared, "ECHO", "a"), ask(shared, "ECHO", "b")
            await server.got(3)
            given_up.cancel()
            await are(await all_of(waiting), StoreTimeoutError)

    @in_each_loop
    async def test_is_no_matter_to_who_waits_to_be_sent(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S, wait_ms=10) as shared:
            await hello(shared)
            server.is_holding = True
            lost = ask(shared, "INCR", "a")
            await server.got(4)
            queued = ask(shared, "INCR", "a")
            server.is_holding = False
            await are(await all_of(lost), StoreTimeoutError)
            assert await queued == 2
            assert server.opened == 2

    @in_each_loop
    async def test_is_looked_for_behind_what_was_answered(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", text) for text in "ab"]
            await server.got(3)
            server.peer.release(1)
            answers = await all_of(*asked)
            assert answers[0] == b"a"
            await are(answers[1:], StoreTimeoutError)

    @in_each_loop
    async def test_is_not_one_that_was_here_while_the_loop_was_held_up(
        self, server: EchoServer
    ) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(2)
            arrive(server.peer)
            time.sleep(2 * SHORT_S)
            assert await asked == b"a"
            assert server.opened == 1

    @in_each_loop
    async def test_nor_one_for_which_it_was_held_up_once_more(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            server.is_holding = True
            begun_s = monotonic_s()

            async def hold_up() -> Any:
                answer = await shared.send([("ECHO", "a")])
                arrive(server.peer)
                time.sleep(max(2 * ONCE_MORE_S, begun_s + 3 * SHORT_S - monotonic_s()))
                return answer

            first = asyncio.create_task(hold_up())
            await server.got(2)
            second = ask(shared, "ECHO", "b")
            await server.got(3)
            arrive(server.peer, 1)
            time.sleep(2 * SHORT_S)
            assert await all_of(first, second) == [b"a", b"b"]
            assert server.opened == 1

    @in_each_loop
    async def test_nor_one_of_many_that_are_still_being_read(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            server.is_holding = True

            async def fill(size: int) -> int:
                answer = await shared.send([("FILL", size)])
                time.sleep(ONCE_MORE_S / 2)
                return len(answer)

            asked = []
            for number in range(8):
                asked.append(asyncio.create_task(fill(500_000 + number)))
                await server.got(2 + number)
            arriving = threading.Thread(target=arrive, args=[server.peer])
            arriving.start()
            time.sleep(2 * SHORT_S)
            assert await all_of(*asked) == [500_000 + number for number in range(8)]
            arriving.join()
            assert server.opened == 1

    @in_each_loop
    async def test_nor_one_that_was_sent_after_the_loop_was_held_up(
        self, server: EchoServer
    ) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            await hello(shared)
            time.sleep(2 * SHORT_S)
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(3)
            await asyncio.sleep(SHORT_S / 2)
            server.release()
            assert await asked == b"a"
            assert server.opened == 1


def arrive(peer: Peer, count: int | None = None) -> None:
    """Put answers that were kept back where they are read, with no turn of the loop."""
    answers = [peer.kept.popleft() for _ in range(len(peer.kept) if count is None else count)]
    left = memoryview(b"".join(answers))
    link = peer.transport.get_extra_info("socket").fileno()
    while left:
        select.select([], [link], [], 5.0)
        left = left[os.write(link, left) :]


class TestAConnectionThatBreaks:
    @in_each_loop
    async def test_fails_all_that_is_on_its_way_once(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            for number, how in enumerate((Peer.reset, Peer.half_send, Peer.close)):
                await hello(shared)
                sent = len(server.commands)
                server.is_holding = True
                asked = [ask(shared, "INCR", number) for _ in range(5)]
                await server.got(sent + 5)
                server.is_holding = False
                how(server.peer)
                await are(await all_of(*asked), LostConnectionError)
                await works(shared)
                assert server.counters[b"%d" % number] == 5

    @in_each_loop
    async def test_is_opened_again_at_once(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            for opened in (2, 3):
                server.peer.reset()
                await until(lambda opened=opened: server.opened == opened)  # type: ignore[misc]
                await until(lambda: shared.is_open)
                await hello(shared)

    @in_each_loop
    async def test_is_not_opened_again_and_again(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.takes = False
            server.peer.reset()
            await until(lambda: server.opened == 2)
            await asyncio.sleep(0.02)
            assert server.opened == 2
            await are(
                await all_of(*(ask(shared, "ECHO", "a") for _ in range(3))), LostConnectionError
            )
            assert server.opened == 3
            server.takes = True
            await works(shared)
            assert server.opened == 4

    @in_each_loop
    async def test_nor_when_it_ends_as_soon_as_it_is_open(self, server: EchoServer) -> None:
        parting: list[tuple[bytes, type[Exception]]] = [
            (b"", LostConnectionError),
            (b">1\r\n+goodbye\r\n", LostConnectionError),
            (b"$5\r\nhel", LostConnectionError),
            (b"HTTP/1.1 400 Bad Request\r\n", InvalidResponse),
        ]
        server.is_holding = True
        for (says, kind), delay_s in product(parting, (0, 0.002)):
            opened = server.opened

            def leave(peer: Peer, says: bytes = says) -> None:
                peer.say(says)
                peer.transport.close()

            def leave_soon(peer: Peer, leave: Any = leave, delay_s: float = delay_s) -> None:
                if delay_s:
                    asyncio.get_running_loop().call_later(delay_s, leave, peer)
                else:
                    leave(peer)

            server.on_open = leave_soon
            async with connected(server) as shared:
                failures = await all_of(*(ask(shared, "ECHO", "a") for _ in range(3)))
                assert {type(each) for each in failures} <= {kind, LostConnectionError}
                await asyncio.sleep(0.02)
                assert server.opened == opened + 1

    @in_each_loop
    async def test_for_one_that_cannot_be_opened_everybody_who_waits_for_it_hears_so(
        self, server: EchoServer
    ) -> None:
        async with connected(server) as shared:
            await hello(shared)
            await server.stop_listening()
            server.peer.reset()
            await until(lambda: not server.peers)
            for _ in range(2):
                asked = [ask(shared, "ECHO", "a") for _ in range(3)]
                await are(await all_of(*asked), LostConnectionError)
            await server.listen()
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_one_is_opened_at_a_time(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            asked = []
            for number in range(200):
                asked.append(ask(shared, "ECHO", number))
                if number % 10 == 0:
                    await asyncio.sleep(0)
            assert await all_of(*asked) == [b"%d" % number for number in range(200)]
            assert server.opened == 1

    @in_each_loop
    async def test_an_attempt_that_takes_too_long_is_given_up(self, server: EchoServer) -> None:
        async with connected(server, open_s=SHORT_S) as shared:
            server.greets = False
            await are(await all_of(*(ask(shared, "ECHO", "a") for _ in range(3))), TimeoutError)
            assert server.opened == 1
            await until(lambda: not shared.is_open)
            server.greets = True
            await works(shared)

    @in_each_loop
    async def test_whatever_ends_an_attempt_nobody_waits_on(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            server.greets = False
            asked = [ask(shared, "ECHO", "a") for _ in range(3)]
            await until(lambda: server.opened == 1)
            (opening,) = (t for t in asyncio.all_tasks() if t.get_name() == "shared-connection")
            opening.cancel()
            await are(await all_of(*asked), LostConnectionError)
            server.greets = True
            await works(shared)

    @in_each_loop
    async def test_what_is_refused_on_opening_is_told(self, server: EchoServer) -> None:
        def make_connection() -> Any:
            raise ValueError("no such address")

        shared = SharedConnection(make_connection, callbacks={}, timeout_s=1.0, open_s=1.0)
        for _ in range(2):
            await are(await all_of(ask(shared, "ECHO", "a"), ask(shared, "ECHO", "b")), ValueError)
        await shared.aclose()
        assert server.opened == 0


class TestWhatNobodyAskedFor:
    @in_each_loop
    async def test_an_answer_ends_the_connection(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            odd = server.peer
            odd.say(b"+extra\r\n+more\r\n")
            await until(lambda: odd not in server.peers)
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_one_too_many_goes_to_nobody(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(2)
            server.peer.kept.append(b"+extra\r\n")
            server.release()
            assert await asked == b"a"
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_what_is_no_reply_fails_everybody_behind_it(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", text) for text in "abc"]
            await server.got(4)
            server.peer.release(1)
            server.peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            server.is_holding = False
            answers = await all_of(*asked)
            assert answers[0] == b"a"
            await are(answers[1:], InvalidResponse)
            await works(shared)


class TestMoreThanMayWait:
    @in_each_loop
    async def test_is_refused_and_the_rest_is_answered(self, server: EchoServer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.store.multiplex.MOST_WAITING", 10)
            async with connected(server) as shared:
                for _ in range(2):
                    # At first while it is being opened, then while it is in use.
                    server.is_holding = True
                    asked = [ask(shared, "ECHO", number) for number in range(10)]
                    await asyncio.sleep(0)
                    with pytest.raises(TooMuchAtOnceError):
                        await shared.send([("INCR", "a")])
                    await until(lambda: len(server.peers) == 1 and len(server.peer.kept) == 10)
                    with pytest.raises(TooMuchAtOnceError):
                        await shared.send([("INCR", "a")])
                    server.release()
                    assert await all_of(*asked) == [b"%d" % number for number in range(10)]
                await hello(shared)
                assert server.counters[b"a"] == 0

    @in_each_loop
    async def test_is_refused_by_what_has_not_left_yet(self, server: EchoServer) -> None:
        text = b"x" * 1_000_000
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.store.multiplex.MOST_BYTES", 4_000_000)
            async with connected(server) as shared:
                await hello(shared)
                server.peer.transport.pause_reading()
                asked: list[asyncio.Task[Any]] = []
                while not (asked and asked[-1].done()):
                    asked.append(ask(shared, "ECHO", text))
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                await are(await all_of(asked.pop()), TooMuchAtOnceError)
                assert len(asked) >= 4
                server.peer.transport.resume_reading()
                assert await all_of(*asked) == [text] * len(asked)
                await works(shared)
                assert server.opened == 1

    @in_each_loop
    async def test_is_one_command_that_is_too_large(self, server: EchoServer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.store.multiplex.MOST_BYTES", 1000)
            async with connected(server) as shared:
                with pytest.raises(TooMuchAtOnceError):
                    await shared.send([("ECHO", b"x" * 1000)])
                await hello(shared)


class TestLeave:
    @in_each_loop
    async def test_what_is_on_its_way_finishes_and_what_comes_goes_elsewhere(
        self, server: EchoServer
    ) -> None:
        async with connected(server) as shared:
            await hello(shared)
            old = server.peer
            server.is_holding = True
            before = [ask(shared, "ECHO", text) for text in "ab"]
            await server.got(3)
            shared.leave(monotonic_s())
            after = [ask(shared, "ECHO", text) for text in "cd"]
            await until(lambda: server.opened == 2 and len(server.peer.kept) == 2)
            assert len(old.kept) == 2
            server.peer.release()
            assert await all_of(*after) == [b"c", b"d"]
            old.release(1)
            assert await before[0] == b"a"
            assert old in server.peers
            old.release()
            assert await before[1] == b"b"
            await until(lambda: old not in server.peers)
            server.release()
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_one_that_nobody_uses_is_closed_at_once(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            shared.leave(monotonic_s())
            await hello(shared)
            old = server.peer
            shared.leave(monotonic_s())
            assert not shared.is_open
            await until(lambda: old not in server.peers)
            assert server.opened == 1
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_one_that_is_younger_is_kept_until_it_answers(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            since_s = monotonic_s()
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(1)
            shared.leave(since_s)
            assert shared.is_open
            server.release()
            assert await asked == b"a"
            # What it answered may be why it is to be left.
            shared.leave(since_s)
            assert not shared.is_open
            await works(shared)
            assert server.opened == 2

    @in_each_loop
    async def test_one_that_was_left_may_break(self, server: EchoServer) -> None:
        async with connected(server, timeout_s=SHORT_S) as shared:
            await hello(shared)
            for how, kind in ((Peer.reset, LostConnectionError), (id, StoreTimeoutError)):
                server.is_holding = True
                sent, opened = len(server.commands), server.opened
                lost = ask(shared, "ECHO", "a")
                await server.got(sent + 1)
                shared.leave(monotonic_s())
                how(server.peer)
                await are(await all_of(lost), kind)
                server.is_holding = False
                assert server.opened == opened
                await works(shared)

    @in_each_loop
    async def test_who_waits_to_be_sent_goes_elsewhere(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=10) as shared:
            await hello(shared)
            old = server.peer
            server.is_holding = True
            first = ask(shared, "INCR", "a")
            await server.got(4)
            queued = ask(shared, "INCR", "b")
            await asyncio.sleep(0.005)
            server.is_holding = False
            shared.leave(monotonic_s())
            assert await queued == 1
            old.release()
            assert await first == 1
            assert server.opened == 2


class TestWait:
    @in_each_loop
    async def test_one_vouches_for_all_of_a_turn(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            first = ask(shared, "INCR", "a")
            await server.got(4)
            # The server is held until that is answered, and these share the next one.
            later = [ask(shared, "INCR", key) for key in "bc"]
            await asyncio.sleep(0)
            later.append(ask(shared, "INCR", "a"))
            await asyncio.sleep(0.01)
            assert len(server.commands) == 4
            server.release()
            assert await all_of(first, *later) == [1, 1, 1, 2]
            wait = [b"WAIT", b"1", b"70"]
            assert server.said[1:] == [
                [[b"INCR", b"a"], wait],
                [[b"INCR", b"b"], [b"INCR", b"c"], [b"INCR", b"a"], wait],
            ]

    @in_each_loop
    async def test_nobody_is_answered_before_it_is(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", text) for text in "ab"]
            await server.got(5)
            server.peer.release(2)
            done, _ = await asyncio.wait(asked, timeout=0.01)
            assert done == set()
            server.release()
            assert await all_of(*asked) == [b"a", b"b"]

    @in_each_loop
    async def test_too_few_replicas_are_told_to_all(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            server.replicas = 0
            asked = [ask(shared, "INCR", "a") for _ in range(3)]
            await are(await all_of(*asked), TooFewReplicasError)
            server.replicas = 2
            assert await shared.send([("INCR", "a")]) == 4
            assert server.opened == 1

    @in_each_loop
    async def test_an_error_reaches_who_caused_it(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            rows: list[list[Command]] = [
                [("ECHO", "a"), ("ECHO", "mark")],
                [("FAIL", "b"), ("ECHO", "mark")],
                [("ECHO", "c"), ("FAIL", "mark")],
                [("ECHO", "d")],
            ]
            answers = await all_of(*(asyncio.create_task(send(shared, row)) for row in rows))
            assert answers[::3] == [b"a", b"d"]
            assert [(type(each), str(each)) for each in answers[1:3]] == [
                (ResponseError, "b"),
                (ResponseError, "mark"),
            ]

    @in_each_loop
    async def test_its_own_error_is_everybodys(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", "a"), ask(shared, "FAIL", "b")]
            await server.got(5)
            server.peer.kept[-1] = b"-ERR no WAIT here\r\n"
            server.release()
            failures = await all_of(*asked)
            await are(failures, ResponseError)
            assert [str(each) for each in failures] == ["no WAIT here", "b"]

    @in_each_loop
    async def test_an_answer_that_it_does_not_vouch_for_is_lost(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "INCR", key) for key in "ab"]
            await server.got(5)
            server.peer.release(2)
            await asyncio.sleep(0.01)
            server.peer.reset()
            server.is_holding = False
            await are(await all_of(*asked), LostConnectionError)
            await works(shared)

    @in_each_loop
    async def test_who_gives_up_leaves_the_others_theirs(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            asked = [ask(shared, "ECHO", number) for number in range(4)]
            await server.got(7)
            queued = [ask(shared, "ECHO", number) for number in range(4, 8)]
            await asyncio.sleep(0)
            given_up = [asked[0], asked[3], queued[0], queued[3]]
            for each in given_up:
                each.cancel()
            server.release()
            assert await all_of(*asked[1:3], *queued[1:3]) == [b"1", b"2", b"5", b"6"]
            assert all(each.cancelled() for each in given_up)
            assert [b"ECHO", b"4"] not in server.commands

    @in_each_loop
    async def test_nothing_is_sent_for_those_who_all_gave_up(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            asked = [ask(shared, "ECHO", "a") for _ in range(2)]
            await asyncio.sleep(0)
            for each in asked:
                each.cancel()
            await asyncio.wait(asked)
            await hello(shared)
            assert len(server.commands) in (4, 6)


class TestClose:
    @in_each_loop
    async def test_everybody_who_waits_hears_so(self, server: EchoServer) -> None:
        async with connected(server, wait_ms=70) as shared:
            await hello(shared)
            server.is_holding = True
            on_the_way = ask(shared, "ECHO", "a")
            await server.got(4)
            queued = ask(shared, "ECHO", "b")
            await asyncio.sleep(0)
            await shared.aclose()
            await shared.aclose()
            await are(await all_of(on_the_way, queued), LostConnectionError)
            assert (shared.is_open, shared.waiting) == (False, 0)
            await until(lambda: not server.peers)

    @in_each_loop
    async def test_while_it_is_being_opened(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            server.greets = False
            asked = [ask(shared, "ECHO", "a") for _ in range(3)]
            await until(lambda: server.opened == 1)
            await shared.aclose()
            await are(await all_of(*asked), LostConnectionError)
            await until(lambda: not server.peers)

    @in_each_loop
    async def test_before_it_is_used_and_for_good(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await shared.aclose()
            for _ in range(2):
                await are(await all_of(ask(shared, "ECHO", "a")), LostConnectionError)
            assert server.opened == 0

    @in_each_loop
    async def test_with_those_that_were_left(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(2)
            shared.leave(monotonic_s())
            await shared.aclose()
            await are(await all_of(asked), LostConnectionError)
            await until(lambda: not server.peers)

    @in_each_loop
    async def test_the_garbage_collector_closes_none(self, server: EchoServer) -> None:
        async with connected(server) as shared:
            await hello(shared)
            server.is_holding = True
            asked = ask(shared, "ECHO", "a")
            await server.got(2)
            for _ in range(3):
                gc.collect()
                await asyncio.sleep(0)
            server.release()
            assert await asked == b"a"
            assert server.opened == 1


class TestWhereItLeads:
    async def everything(self, server: EchoServer, url: str = "") -> None:
        server.on_open = Peer.close
        async with connected(server, url) as shared:
            call = ask(shared, "ECHO", "a")
            await asyncio.sleep(0)
            call.cancel()
            await until(lambda: server.opened == 1 and not server.peers)
            await until(lambda: not shared.is_open)
        server.on_open, server.opened = lambda _: None, 0
        large = os.urandom(3_000_000)
        async with connected(server, url) as shared:
            await works(shared)
            assert await all_of(
                ask(shared, "ECHO", large), ask(shared, "ECHO", "a"), ask(shared, "FILL", 5_000_000)
            ) == [large, b"a", b"x" * 5_000_000]
            server.piece = 1
            await works(shared)
            server.peer.reset()
            await until(lambda: server.opened == 2)
            server.piece = None
            await works(shared)
            server.is_holding = True
            sent = len(server.commands)
            asked = ask(shared, "ECHO", "a")
            await server.got(sent + 1)
            shared.leave(monotonic_s())
            server.release()
            assert await asked == b"a"
            await until(lambda: not server.peers)
            await works(shared)

    @pytest.mark.parametrize("loop", LOOPS)
    def test_tls(self, certificate: Path, loop: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

        async def run() -> None:
            async with EchoServer(tls=context) as server:
                url = f"rediss://localhost:{server.port}?ssl_ca_certs={quote(str(certificate))}"
                await self.everything(server, url)

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(run())

    @pytest.mark.parametrize("loop", LOOPS)
    def test_a_unix_socket(self, tmp_path: Path, loop: str) -> None:
        async def run() -> None:
            async with EchoServer(path=tmp_path / "echo.sock") as server:
                await self.everything(server)

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(run())
