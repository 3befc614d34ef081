"""Tokens in the store: only digests, in one hash that lives and goes with its session."""

import uuid

import pytest
import time_machine
from redis.asyncio import Redis

from app.clock import now_ms
from app.errors import CorruptRecordError, SessionConflictError, SessionNotFoundError
from app.onboarding.sessions import Owner
from app.onboarding.tokens import MAX_SESSION_TOKENS
from app.store.catalogue import CatalogueStore
from app.store.gateway import Gateway
from app.store.recovery import RecoveryStore
from tests.proxy import Proxy
from tests.store.conftest import MakePlace
from tests.store.sessions import (
    Place,
    count_events,
    deadlines_ms,
    keyed,
    names_of_keys,
    prepare,
)

OWNER = Owner("w1", "u1", "en")
ALL_OF_A_NEW_SESSION = {"metadata", "progress", "events", "ops", "tokens"}


async def begin(place: Place, digest: str | None = "0a", seed: str | None = "5e") -> str:
    """Make a session with a token, and give its id."""
    view = await place.manager.begin_session(OWNER, token_digest=digest, seed=seed)
    return view["session_id"]


async def add(place: Place, session_id: str, digest: str) -> None:
    await place.tokens.add_session_token(session_id, digest, at_ms=now_ms())


async def changes_of(gateway: Gateway, session_id: str) -> bytes:
    [changes] = await gateway.command("HMGET", gateway.keys.session(session_id).progress, "changes")
    assert isinstance(changes, bytes)
    return changes


@pytest.fixture(params=["off", "on"])
def tagged_or_not(request: pytest.FixtureRequest, real: MakePlace) -> Place:
    """Give a place on the real store, without hash tags and with them."""
    return real(key_hash_tag=request.param)


# --- Session tokens -------------------------------------------------------------------------------


async def test_a_session_may_begin_with_a_token(place: Place) -> None:
    session_id = await begin(place)
    assert await place.tokens.is_session_token(session_id, "0a")
    assert not await place.tokens.is_session_token(session_id, "0b")
    assert await place.tokens.get_seed(session_id) == "5e"
    assert await names_of_keys(place.gateway, session_id) == ALL_OF_A_NEW_SESSION
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1


async def test_a_session_that_begins_without_one_has_no_tokens_at_all(place: Place) -> None:
    session_id = await begin(place, None, None)
    assert not await place.tokens.is_session_token(session_id, "0a")
    assert await place.tokens.get_seed(session_id) is None
    assert "tokens" not in await names_of_keys(place.gateway, session_id)


async def test_nothing_opens_an_unknown_session(place: Place) -> None:
    unknown = str(uuid.uuid4())
    assert not await place.tokens.is_session_token(unknown, "0a")
    assert await place.tokens.get_seed(unknown) is None
    with pytest.raises(SessionNotFoundError):
        await add(place, unknown, "0a")
    assert await names_of_keys(place.gateway, unknown) == set()


async def test_a_session_whose_id_is_known_before_is_made_once(place: Place) -> None:
    wanted = str(uuid.uuid4())
    view = await place.manager.begin_session(OWNER, session_id=wanted, token_digest="0a")
    assert view["session_id"] == wanted
    with pytest.raises(SessionConflictError):
        await place.manager.begin_session(OWNER, session_id=wanted, token_digest="0b")
    assert not await place.tokens.is_session_token(wanted, "0b")


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_session_whose_reply_was_lost_has_the_token_of_the_first_sending(
    wired: Place, proxy: Proxy, lost: int
) -> None:
    await prepare(wired.manager)
    proxy.drop_replies(lost, to="EVALSHA")
    session_id = await begin(wired)
    assert await wired.tokens.is_session_token(session_id, "0a")


async def test_a_replay_of_the_making_changes_no_token(tagged_or_not: Place) -> None:
    place = tagged_or_not
    first = await place.manager.begin_session(OWNER, request=keyed(), token_digest="0a", seed="5e")
    again = await place.manager.begin_session(OWNER, request=keyed(), token_digest="0b", seed="5f")
    session_id = first["session_id"]
    assert again["session_id"] == session_id
    assert await place.tokens.is_session_token(session_id, "0a")
    assert not await place.tokens.is_session_token(session_id, "0b")
    assert await place.tokens.get_seed(session_id) == "5e"


async def test_further_tokens_open_a_session_beside_the_first(tagged_or_not: Place) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    await add(place, session_id, "0b")
    await add(place, session_id, "0b")
    for digest in ("0a", "0b"):
        assert await place.tokens.is_session_token(session_id, digest)
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1
    await place.manager.delete_session(session_id)
    assert not await place.tokens.is_session_token(session_id, "0a")
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_the_oldest_token_goes_where_there_are_too_many(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake()
    session_id = await begin(place, "first")
    for number in range(MAX_SESSION_TOKENS):
        assert await place.tokens.is_session_token(session_id, "first")
        clock.shift(1)
        await add(place, session_id, f"{number}")
        # One that is there already takes nobody's place.
        await add(place, session_id, f"{number}")
    assert not await place.tokens.is_session_token(session_id, "first")
    for number in range(MAX_SESSION_TOKENS):
        assert await place.tokens.is_session_token(session_id, f"{number}")
    assert await place.tokens.get_seed(session_id) == "5e"


async def test_a_token_is_no_event_and_no_change_but_renews_the_life(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await begin(place)
    events = await count_events(place.gateway, session_id)
    changes = await changes_of(place.gateway, session_id)
    for _ in range(3):
        clock.shift(900)
        await add(place, session_id, "0b")
    assert await count_events(place.gateway, session_id) == events
    assert await changes_of(place.gateway, session_id) == changes
    assert len(set((await deadlines_ms(place.gateway, session_id)).values())) == 1


async def test_the_tokens_end_with_the_life_of_their_session(
    fake: MakePlace, clock: time_machine.Traveller
) -> None:
    place = fake(session_ttl_s=1000)
    session_id = await begin(place)
    clock.shift(1011)
    assert not await place.tokens.is_session_token(session_id, "0a")
    with pytest.raises(SessionNotFoundError):
        await add(place, session_id, "0b")
    assert await names_of_keys(place.gateway, session_id) == set()


# --- Damage ---------------------------------------------------------------------------------------


async def test_what_are_no_tokens_is_an_error_that_names_them_and_of_nothing_else(
    place: Place,
) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    await place.gateway.command("SET", key, "x", "PX", 60_000)
    for call in (
        place.tokens.is_session_token(session_id, "0a"),
        place.tokens.get_seed(session_id),
        add(place, session_id, "0b"),
    ):
        with pytest.raises(CorruptRecordError) as damage:
            await call
        assert damage.value.key == key
    await place.manager.save_step(session_id, 1, {"a": 1})
    await place.manager.delete_session(session_id)
    assert await names_of_keys(place.gateway, session_id) == set()


async def test_a_seed_that_is_no_text_is_an_error(place: Place) -> None:
    session_id = await begin(place)
    key = place.gateway.keys.session(session_id).tokens
    await place.gateway.command("HSET", key, "seed", b"\xff")
    with pytest.raises(CorruptRecordError):
        await place.tokens.get_seed(session_id)


async def recover(place: Place, session_id: str) -> tuple[list[str], list[str]]:
    """Recover a session; give what was kept and what was lost."""
    recovery = RecoveryStore(place.gateway, CatalogueStore(place.gateway, place.manager.catalogue))
    remains = await recovery.recover(session_id, at_ms=now_ms())
    return remains.kept, remains.lost


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_recovered_session_keeps_its_tokens_if_they_can_be_read(
    tagged_or_not: Place, *, is_whole: bool
) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    keys = place.gateway.keys.session(session_id)
    if not is_whole:
        await place.gateway.command("SET", keys.tokens, "x", "PX", 60_000)
    await place.gateway.command("HSET", keys.progress, "saved", "damaged")
    kept, lost = await recover(place, session_id)
    assert ("tokens" in kept) is is_whole
    assert ("tokens" in lost) is not is_whole
    assert await place.tokens.is_session_token(session_id, "0a") is is_whole
    deadlines = await deadlines_ms(place.gateway, session_id)
    assert set(deadlines.values()) == {deadlines["progress"]}


async def test_tokens_alone_keep_no_session(tagged_or_not: Place, raw: Redis) -> None:
    place = tagged_or_not
    session_id = await begin(place)
    keys = place.gateway.keys.session(session_id)
    await place.gateway.command("DEL", keys.metadata, keys.events, keys.ops)
    await place.gateway.command("HSET", keys.progress, "saved", "damaged")
    assert (await recover(place, session_id))[0] == []
    assert await names_of_keys(place.gateway, session_id) == set()
    assert await raw.keys(f"*{session_id}*") == []
