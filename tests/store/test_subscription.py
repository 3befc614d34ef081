"""The one connection on which the store says which logs have grown: it may break, and is mended."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.clock import monotonic_s, now_ms
from app.errors import StoreUnavailableError
from app.onboarding.events import parse_event_id
from app.store import subscription as module
from app.store.connect import make_subscription
from app.store.subscription import Subscription
from tests.conftest import QUICKLY, known_settings
from tests.faults.proxy import Proxy
from tests.faults.servers import HOST, Valkey, free_ports
from tests.store.conftest import MakePlace
from tests.store.sessions import prepare

NAME = "onboarding-streams"
"""What CLIENT LIST shows of the connection."""


class Ear:
    """A listener that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def __call__(self, message: bytes) -> None:
        self.heard.append(message)

    @property
    def told(self) -> list[bytes]:
        """What was said; the empty messages, after which anything may have been missed, aside."""
        return [message for message in self.heard if message]


async def until(is_true: Callable[[], bool], limit_s: float = 10) -> None:
    async with asyncio.timeout(limit_s):
        while not is_true():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def subscribed_to(url: str, *, timeout_s: float = 1.0) -> AsyncIterator[Subscription]:
    """Give a subscription to the store at an address."""
    settings = known_settings(redis_url=url, redis_timeout_s=timeout_s, **QUICKLY)
    subscription = make_subscription(settings)
    try:
        yield subscription
    finally:
        await subscription.aclose()


@pytest.fixture
async def subscription(raw: Redis, valkey: Valkey) -> AsyncIterator[Subscription]:
    async with subscribed_to(valkey.url) as subscription:
        yield subscription


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A store that may be frozen and stopped."""
    with Valkey.start(tmp_path_factory.mktemp("apart")) as running:
        yield running


def connections(server: Valkey) -> int:
    """Count the connections of subscriptions."""
    return str(server.command("CLIENT", "LIST", "TYPE", "pubsub")).count(NAME)


def listeners(server: Valkey, channel: str) -> int:
    """Ask how many connections listen to a channel."""
    return int(server.command("PUBSUB", "NUMSUB", channel)[1])


class TestAListener:
    async def test_hears_what_is_published_once_it_was_added(
        self, subscription: Subscription, raw: Redis
    ) -> None:
        ear = Ear()
        await subscription.add("a", ear)
        for number in range(1000):
            await raw.publish("a", str(number))
        await until(lambda: len(ear.told) == 1000)
        assert ear.told == [str(number).encode() for number in range(1000)]

    async def test_hears_nothing_of_other_channels_nor_after_it_was_removed(
        self, subscription: Subscription, raw: Redis
    ) -> None:
        ear, other = Ear(), Ear()
        await subscription.add("a", ear)
        await subscription.add("b", other)
        await raw.publish("b", "for b")
        await raw.publish("a", "for a")
        await until(lambda: bool(ear.told and other.told))
        assert (ear.told, other.told) == ([b"for a"], [b"for b"])

        subscription.remove("a", ear)
        subscription.remove("a", ear)
        await raw.publish("a", "late")
        await raw.publish("b", "later")
        await until(lambda: len(other.told) == 2)
        assert ear.told == [b"for a"]

    async def test_shares_its_channel_with_others(
        self, subscription: Subscription, raw: Redis, valkey: Valkey
    ) -> None:
        ears = [Ear() for _ in range(20)]
        await asyncio.gather(*(subscription.add("a", ear) for ear in ears))
        assert listeners(valkey, "a") == 1
        await raw.publish("a", "one")
        await until(lambda: all(ear.told for ear in ears))
        for ear in ears[1:]:
            subscription.remove("a", ear)
        await raw.publish("a", "two")
        await until(lambda: len(ears[0].told) == 2)
        assert [ear.told for ear in ears[1:]] == [[b"one"]] * 19

    async def test_hears_of_the_writes_of_a_session_and_of_its_end(
        self, subscription: Subscription, real: MakePlace
    ) -> None:
        place = real()
        session_id = await prepare(place.manager)
        ear = Ear()
        await subscription.add(place.gateway.keys.session(session_id).events, ear)
        await place.manager.save_steps(session_id, {1: {"a": 1}, 2: {"a": 1}})
        await place.manager.save_draft(session_id, 1, {"a": 1})
        newest = (await place.events.get_scene(session_id)).extent.newest
        assert newest is not None
        begun_ms = now_ms()
        await place.manager.delete_session(session_id)
        await until(lambda: len(ear.told) == 2)
        first, last = ear.told
        assert first == b"recorded"
        word, event_id, at_ms = last.decode().split()
        ended = parse_event_id(event_id)
        assert word == "deleted"
        assert ended is not None
        assert ended > newest
        assert begun_ms <= int(at_ms) <= now_ms()

    async def test_that_comes_and_goes_all_the_time_is_heard_in_the_end(
        self, subscription: Subscription, raw: Redis, valkey: Valkey
    ) -> None:
        chance = random.Random(7)
        stays, goes = Ear(), Ear()

        async def come_and_go(seed: int) -> None:
            ear = Ear()
            for _ in range(20):
                await subscription.add("a", ear)
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
                subscription.remove("a", ear)

        await asyncio.gather(*(come_and_go(seed) for seed in range(10)))
        await subscription.add("a", stays)
        await subscription.add("b", goes)
        subscription.remove("b", goes)
        await raw.publish("a", "x")
        await until(lambda: stays.told == [b"x"])
        await until(lambda: listeners(valkey, "b") == 0)
        assert listeners(valkey, "a") == 1
        subscription.remove("a", stays)
        await until(lambda: listeners(valkey, "a") == 0)


class TestTheConnection:
    async def test_is_one_for_a_thousand_channels(
        self, subscription: Subscription, raw: Redis, valkey: Valkey
    ) -> None:
        ears = {f"c{number}": Ear() for number in range(1000)}
        await asyncio.gather(*(subscription.add(name, ear) for name, ear in ears.items()))
        assert connections(valkey) == 1
        for name in ears:
            await raw.publish(name, name)
        await until(lambda: all(ear.told for ear in ears.values()))
        assert {name: ear.told for name, ear in ears.items()} == {
            name: [name.encode()] for name in ears
        }

    async def test_is_opened_by_the_first_listener_and_closed_at_the_end(
        self, valkey: Valkey
    ) -> None:
        async with subscribed_to(valkey.url) as subscription:
            assert connections(valkey) == 0
            await subscription.add("a", Ear())
            assert connections(valkey) == 1
        await until(lambda: connections(valkey) == 0)

    async def test_that_is_killed_is_opened_again_and_every_listener_hears_an_empty_message(
        self, subscription: Subscription, raw: Redis, valkey: Valkey
    ) -> None:
        ears = {f"c{number}": Ear() for number in range(50)}
        for name, ear in ears.items():
            await subscription.add(name, ear)
        for _ in range(3):
            for ear in ears.values():
                ear.heard.clear()
            assert valkey.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            await until(lambda: all(ear.heard for ear in ears.values()))
            assert all(set(ear.heard) == {b""} for ear in ears.values())
            for name in ears:
                await raw.publish(name, "again")
            await until(lambda: all(ear.told == [b"again"] for ear in ears.values()))
        assert connections(valkey) == 1

    async def test_that_is_killed_while_nobody_listens_is_there_for_the_next_one(
        self, subscription: Subscription, raw: Redis, valkey: Valkey
    ) -> None:
        ear = Ear()
        await subscription.add("a", ear)
        subscription.remove("a", ear)
        valkey.command("CLIENT", "KILL", "TYPE", "pubsub")
        await subscription.add("a", ear)
        await raw.publish("a", "x")
        await until(lambda: ear.told == [b"x"])

    async def test_that_breaks_while_listeners_come_loses_none_of_them(
        self, raw: Redis, proxy: Proxy
    ) -> None:
        async with subscribed_to(f"redis://{proxy.host}:{proxy.port}/0") as subscription:
            ears = {f"c{number}": Ear() for number in range(60)}
            adding = [
                asyncio.create_task(subscription.add(name, ear)) for name, ear in ears.items()
            ]
            for _ in range(3):
                proxy.commands.clear()
                await until(lambda: proxy.commands["SUBSCRIBE"] > 0)
                proxy.reset_all()
            await asyncio.gather(*adding)
            # What is said before the connection is there again is not passed on.
            async with asyncio.timeout(10):
                while not all(ear.told for ear in ears.values()):
                    for name in ears:
                        await raw.publish(name, "x")

    async def test_is_opened_again_when_the_store_was_started_anew(self, server: Valkey) -> None:
        async with subscribed_to(server.url) as subscription:
            ear = Ear()
            await subscription.add("a", ear)
            ear.heard.clear()
            server.restart()
            await until(lambda: ear.heard == [b""])
            server.command("PUBLISH", "a", "x")
            await until(lambda: ear.told == [b"x"])

    async def test_to_a_frozen_store_is_noticed_to_be_dead_and_comes_back(
        self, server: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "QUIET_S", 0.2)
        async with subscribed_to(server.url, timeout_s=0.2) as subscription:
            ear = Ear()
            await subscription.add("a", ear)
            ear.heard.clear()
            with capture_logs() as lines:
                server.freeze()
                try:
                    await until(lambda: any(e["event"] == "subscription_lost" for e in lines), 5)
                finally:
                    server.thaw()
            await until(lambda: b"" in ear.heard)
            server.command("PUBLISH", "a", "x")
            await until(lambda: ear.told == [b"x"])

    async def test_to_a_store_that_has_nothing_to_say_is_kept(
        self, subscription: Subscription, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "QUIET_S", 0.02)
        ear = Ear()
        await subscription.add("a", ear)
        pings = "cmdstat_ping"
        asked = valkey.command("INFO", "commandstats").get(pings, {"calls": 0})["calls"]
        ear.heard.clear()
        await until(
            lambda: (
                valkey.command("INFO", "commandstats").get(pings, {"calls": 0})["calls"]
                >= asked + 5
            )
        )
        assert ear.heard == []
        assert connections(valkey) == 1


class TestAListenerThatCannotBeAdded:
    async def test_is_told_after_two_seconds_at_the_latest_whatever_is_wrong_with_the_store(
        self, server: Valkey
    ) -> None:
        [port] = free_ports(1)

        async def is_told(url: str) -> float:
            async with subscribed_to(url) as subscription:
                begun_s = monotonic_s()
                with pytest.raises(StoreUnavailableError):
                    await subscription.add("a", Ear())
                return monotonic_s() - begun_s

        server.command("ACL", "SETUSER", "deaf", "on", ">p", "~*", "+@all", "-subscribe")
        server.command("ACL", "SETUSER", "nothing", "on", ">p", "~*", "+@all", "resetchannels")
        async with Proxy(server.port) as proxy:
            proxy.hold()
            took_s = await asyncio.gather(
                is_told(f"redis://{HOST}:{port}/0"),
                is_told(f"redis://{proxy.host}:{proxy.port}/0"),
                is_told(f"redis://deaf:p@{HOST}:{server.port}/0"),
                is_told(f"redis://nothing:p@{HOST}:{server.port}/0"),
                is_told(f"redis://nobody:p@{HOST}:{server.port}/0"),
            )
        assert all(1.9 <= each <= 4.0 for each in took_s), took_s

    async def test_is_forgotten_and_may_come_again(
        self, server: Valkey, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "CONFIRMED_WITHIN_S", 0.1)
        async with subscribed_to(server.url, timeout_s=0.2) as subscription:
            ear, late = Ear(), Ear()
            server.freeze()
            try:
                with pytest.raises(StoreUnavailableError):
                    await subscription.add("a", ear)
            finally:
                server.thaw()
            monkeypatch.setattr(module, "CONFIRMED_WITHIN_S", 10)
            await subscription.add("b", late)
            await until(lambda: listeners(server, "a") == 0)
            await subscription.add("a", ear)
            ear.heard.clear()
            server.command("PUBLISH", "a", "x")
            await until(lambda: ear.told == [b"x"])

    async def test_because_it_went_away_itself_leaves_nothing(
        self, valkey: Valkey, proxy: Proxy
    ) -> None:
        async with subscribed_to(f"redis://{proxy.host}:{proxy.port}/0") as subscription:
            await subscription.add("b", Ear())
            proxy.hold()
            adding = asyncio.create_task(subscription.add("a", Ear()))
            await until(lambda: proxy.commands["SUBSCRIBE"] == 2)
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            proxy.release()
            await until(lambda: proxy.commands["UNSUBSCRIBE"] == 1)
            await until(lambda: listeners(valkey, "a") == 0)
            assert listeners(valkey, "b") == 1


async def test_a_subscription_that_was_never_used_is_closed_in_peace(valkey: Valkey) -> None:
    async with subscribed_to(valkey.url) as subscription:
        assert subscription is not None


async def test_a_subscription_to_a_store_that_is_away_is_closed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CONFIRMED_WITHIN_S", 0.1)
    [port] = free_ports(1)
    async with subscribed_to(f"redis://{HOST}:{port}/0") as subscription:
        with pytest.raises(StoreUnavailableError):
            await subscription.add("a", Ear())
        begun_s = monotonic_s()
    assert monotonic_s() - begun_s < 1
