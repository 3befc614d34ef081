"""Who asks, and whose a session is: what is looked up, what is remembered, and for how long."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import time_machine

from app.clock import monotonic_s
from app.context import Meter, RequestContext, get_context, learn, reset_context, set_context
from app.errors import (
    NotTheirsError,
    SessionNotFoundError,
    UnauthenticatedError,
)
from app.onboarding.access import ANYONE, NOBODY, ApiKey, Kind, Principal, Scope
from app.onboarding.idempotency import IdempotentRequest
from app.onboarding.jwt import Verified
from app.onboarding.sessions import Owner
from app.services.access import KEPT_MS, REMEMBERED, AccessService, make_access_service
from app.services.keyring import Keyring, make_keyring
from app.services.manager import make_manager
from app.services.tokens import TokenService
from app.store.gateway import Gateway
from tests.access import AUTH, user
from tests.conftest import fake_gateway, known_settings

ADA = Principal(Kind.USER, "ada", "acme")


class House:
    """A fake store with sessions, and who looks at who comes."""

    def __init__(self, access: AccessService, gateway: Gateway) -> None:
        self.access = access
        self.gateway = gateway
        self.manager = make_manager(gateway, known_settings())
        self.tokens = TokenService(gateway, self.manager)

    async def begin(self, user_id: str = "ada") -> tuple[str, bytes]:
        """Make a session; give its id, and its token as it is shown."""
        view = await self.tokens.begin_session(Owner("acme", user_id, "en"), credential=b"x")
        return view["session_id"], b"Bearer " + view["session_token"].encode()


@pytest.fixture
def house() -> House:
    gateway = fake_gateway()
    return House(make_access_service(gateway, known_settings(**AUTH)), gateway)


@contextmanager
def counting() -> Iterator[Meter]:
    """Count the commands that go to the store."""
    context = RequestContext("r", monotonic_s() + 60)
    token = set_context(context)
    yield context.meter
    reset_context(token)


def shown(value: bytes, name: bytes = b"authorization") -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (name, value), (b"accept", b"*/*")]


def as_bytes(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def test_without_access_control_everybody_is_anyone_whatever_they_show() -> None:
    access = make_access_service(fake_gateway(), known_settings())
    for headers in ([], shown(b"Bearer x"), shown(b"x") * 2):
        assert await access.identify(headers) is ANYONE


async def test_who_shows_nothing_is_nobody_and_who_shows_two_things_is_refused(
    house: House,
) -> None:
    assert await house.access.identify([(b"host", b"x")]) is NOBODY
    _, token = await house.begin()
    good = [shown(token), as_bytes(user())]
    for headers in (good[0] + good[1], good[0] * 2, good[0] + shown(b"x", b"x-api-key")):
        with pytest.raises(UnauthenticatedError, match="one credential"):
            await house.access.identify(headers)


async def test_what_was_verified_costs_no_command_until_its_time_is_over(
    house: House, clock: time_machine.Traveller
) -> None:
    session_id, token = await house.begin()
    wizard = Principal(Kind.WIZARD, session_id)
    for commands in (1, 0, 0):
        with counting() as meter:
            assert await house.access.identify(shown(token)) == wizard
        assert meter.commands == commands
    clock.shift(KEPT_MS / 1000)
    with counting() as meter:
        assert await house.access.identify(shown(token)) == wizard
    assert meter.commands == 1
    house.access.forget_tokens(session_id)
    with counting() as meter:
        await house.access.identify(shown(token))
    assert meter.commands == 1


async def test_the_token_of_a_user_is_remembered_until_it_expires_and_no_longer(
    house: House, clock: time_machine.Traveller
) -> None:
    headers = as_bytes(user("ada", "acme"))
    assert await house.access.identify(headers) == ADA
    clock.shift(299)
    assert await house.access.identify(headers) == ADA
    clock.shift(1)
    with pytest.raises(UnauthenticatedError, match="expired"):
        await house.access.identify(headers)


async def test_what_is_good_in_one_header_is_nothing_in_the_other(house: House) -> None:
    _, token = await house.begin()
    [(_, key)] = as_bytes({"x-api-key": "ok_a-key-with-the-scope-admin"})
    assert (await house.access.identify(shown(key, b"x-api-key"))).kind is Kind.MACHINE
    assert (await house.access.identify(shown(token))).kind is Kind.WIZARD
    for headers in (shown(key), shown(token, b"x-api-key")):
        with pytest.raises(UnauthenticatedError):
            await house.access.identify(headers)
    # White space around a field is none of it (RFC 9110 section 5.5).
    assert (await house.access.identify(shown(key + b" ", b"x-api-key"))).kind is Kind.MACHINE
    assert (await house.access.identify(shown(token + b"\t"))).kind is Kind.WIZARD


class Turning(Keyring):
    """Knows one user until its keys change."""

    async def verify(self, token: str) -> Verified:
        if self.generation or not token:
            raise UnauthenticatedError("signed with a key that was withdrawn")
        return Verified(ADA, 4e9)


async def test_what_was_verified_with_keys_that_were_withdrawn_counts_no_more() -> None:
    keyring = make_keyring(known_settings(**AUTH))
    assert keyring is not None
    turning = Turning(keyring._rules)
    access = AccessService(fake_gateway(), enabled=True, keyring=turning)
    assert await access.identify(shown(b"Bearer x.y.z")) == ADA
    turning.generation += 1
    with pytest.raises(UnauthenticatedError):
        await access.identify(shown(b"Bearer x.y.z"))


async def test_a_damaged_record_of_tokens_lets_nobody_in(house: House) -> None:
    session_id, token = await house.begin()
    key = house.gateway.keys.session(session_id).tokens
    await house.gateway.command("SET", key, "x")
    with pytest.raises(UnauthenticatedError):
        await house.access.identify(shown(token))


async def test_whose_a_session_is_is_remembered_for_its_user_and_looked_up_for_others(
    house: House, clock: time_machine.Traveller
) -> None:
    session_id, _ = await house.begin()
    await house.manager.get_session(session_id)  # the store knows the script
    for commands in (1, 0):
        with counting() as meter:
            await house.access.check_session(ADA, session_id)
        assert meter.commands == commands
    for stranger in (Principal(Kind.USER, "bob", "acme"), Principal(Kind.USER, "ada", "other")):
        for _ in range(2):
            with counting() as meter, pytest.raises(NotTheirsError):
                await house.access.check_session(stranger, session_id)
            assert meter.commands == 1
    with counting() as meter, pytest.raises(SessionNotFoundError):
        await house.access.check_session(ADA, "00000000-0000-4000-8000-000000000000")
    assert meter.commands == 1
    await house.manager.set_metadata(session_id, "bob", "acme")
    clock.shift(KEPT_MS / 1000)
    with pytest.raises(NotTheirsError):
        await house.access.check_session(ADA, session_id)


async def test_wizards_and_machines_are_judged_without_a_look(house: House) -> None:
    session_id, _ = await house.begin()
    with counting() as meter:
        await house.access.check_session(Principal(Kind.WIZARD, session_id), session_id)
        for principal in (ANYONE, Principal(Kind.MACHINE, "m", scopes=frozenset({Scope.SESSIONS}))):
            await house.access.check_session(principal, session_id)
        for principal in (Principal(Kind.WIZARD, "another"), NOBODY):
            with pytest.raises(NotTheirsError):
                await house.access.check_session(principal, session_id)
    assert meter.commands == 0


async def test_a_session_whose_owner_cannot_be_read_is_no_users(house: House) -> None:
    session_id, _ = await house.begin()
    key = house.gateway.keys.session(session_id).metadata
    await house.gateway.command("HSET", key, "user_id", b"\xff")
    with pytest.raises(NotTheirsError):
        await house.access.check_session(ADA, session_id)


async def test_many_credentials_take_no_more_than_their_place() -> None:
    keys = [b"key %d" % number for number in range(REMEMBERED + 10)]
    known = [ApiKey("m", frozenset(Scope), hashlib.sha256(keys[0]).digest())]
    access = AccessService(fake_gateway(), enabled=True, api_keys=known)
    for key in keys:
        access._verified.put(key, NOBODY, 1)
    assert len(access._verified._known) == REMEMBERED
    assert (await access.identify(shown(keys[0], b"x-api-key"))).name == "m"


def test_a_world_is_replaced_and_never_changed_and_gone_afterwards() -> None:
    first = RequestContext("r", 1.0)
    token = set_context(first)
    learn(principal=ADA)
    learn(session_id="s")
    known = get_context()
    assert first == RequestContext("r", 1.0, first.meter)
    assert known == RequestContext("r", 1.0, first.meter, ADA, "s")
    reset_context(token)
    learn(session_id="t")
    assert get_context() is None


async def test_a_token_that_is_good_for_longer_than_any_calendar_is_taken(house: House) -> None:
    assert await house.access.identify(as_bytes(user("ada", "acme", exp=1e308))) == ADA


async def test_a_repeat_tells_the_token_again_to_whose_the_session_is_still(house: House) -> None:
    ada = Owner("acme", "ada", "en")

    async def begin(credential: bytes = b"x") -> dict[str, str | None]:
        request = IdempotentRequest("scope", "0f" * 32)
        view = await house.tokens.begin_session(ada, credential=credential, request=request)
        return {"session_id": view["session_id"], "token": view.get("session_token")}

    first = await begin()
    assert first["token"]
    assert await begin() == first
    # Who shows something newer gets another token, which is as good.
    other = await begin(b"y")
    assert other["session_id"] == first["session_id"]
    assert other["token"] not in (None, first["token"])
    for told in (first, other):
        shown_token = f"Bearer {told['token']}".encode()
        assert (await house.access.identify(shown(shown_token))).name == first["session_id"]
    await house.manager.set_metadata(str(first["session_id"]), "bob", "acme")
    assert await begin() == {"session_id": first["session_id"], "token": None}
