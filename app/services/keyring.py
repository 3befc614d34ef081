"""Verify the tokens of users, by keys that are fetched beside the requests."""

import asyncio
from contextvars import Context

import structlog
from httpx2 import AsyncClient, HTTPStatusError

from app.clock import monotonic_s, now_ms
from app.errors import KeysUnavailableError, UnauthenticatedError
from app.onboarding.jwt import (
    TokenRules,
    Verified,
    VerifyingKey,
    find_key,
    parse_jwks,
    parse_jwt_key,
    read_claims,
    read_header,
)
from app.settings import Settings
from app.store.client import end_task

log = structlog.get_logger()

REFRESH_EVERY_S = 600.0
"""Pause between two looks at the provider's keys, in seconds: so long one that was withdrawn may
still be taken."""

RETRY_AFTER_S = 15.0
"""Pause after a look that failed, in seconds."""

ASK_AGAIN_S = 60.0
"""How often a token with an unknown key may ask for a look at most, in seconds: anybody can make
one up."""

WAIT_S = 2.0
"""Longest wait of a request for a look that is under way, in seconds."""

FETCH_S = 3.0
"""Longest look, in seconds."""

MOST_BYTES = 1024 * 1024
"""Longest answer of a provider, in bytes."""


class Provider:
    """Where the keys are that somebody publishes."""

    def __init__(self, url: str) -> None:
        self._url = url
        # Answers come as they are, so that nothing is unpacked whose length nobody knows.
        self._client = AsyncClient(timeout=FETCH_S, headers={"Accept-Encoding": "identity"})

    async def download(self) -> bytes:
        """Fetch what is there. Raises `HTTPError`, `TimeoutError`, and `ValueError` for too much.

        Redirects are not followed: where the keys are is for the deployer to say.
        """
        body = bytearray()
        async with asyncio.timeout(FETCH_S), self._client.stream("GET", self._url) as response:
            response.raise_for_status()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise ValueError("longer than any set of keys")
        return bytes(body)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()


class Keyring:
    """Verifies tokens, with one key that was chosen or with those that a provider publishes.

    `generation` grows whenever the keys have changed: what was verified before may not be so now.
    """

    def __init__(
        self, rules: TokenRules, key: VerifyingKey | None = None, provider: Provider | None = None
    ) -> None:
        self.generation = 0
        self._rules = rules
        self._keys: tuple[VerifyingKey, ...] = () if key is None else (key,)
        self._provider = provider
        self._look: asyncio.Task[None] | None = None
        self._looking_on: asyncio.Task[None] | None = None
        self._pause_s = RETRY_AFTER_S
        self._not_before_s = 0.0

    async def start(self) -> None:
        """Fetch the keys, and go on doing so beside the requests.

        A provider that cannot be reached is logged: it may come later.
        """
        if self._rules.issuer is None and self._rules.audience is None:
            # Whatever this provider signs for any service is then taken here.
            log.warning("tokens_not_bound")
        if self._provider is not None:
            await self._begin_look(self._provider)
            self._looking_on = asyncio.create_task(self._look_on(self._provider), name="jwks")

    async def aclose(self) -> None:
        """End what goes on."""
        for task in (self._looking_on, self._look):
            if task is not None:
                await end_task(task)
        if self._provider is not None:
            await self._provider.aclose()

    async def verify(self, token: str) -> Verified:
        """Say whom a token names.

        Raises `UnauthenticatedError` for whatever is wrong with it, and `KeysUnavailableError` as
        long as there was no key to verify any with. Takes about 0.1 ms, but for one with an unknown
        key, which waits for a look that may find it: the provider may have begun to sign with a new
        one.
        """
        header = read_header(token, self._rules)
        key = find_key(self._keys, header)
        if key is None and self._provider is not None:
            await self._look_again(self._provider)
            key = find_key(self._keys, header)
        if key is None and not self._keys:
            raise KeysUnavailableError
        if key is None:
            raise UnauthenticatedError("The token is signed with a key that is not known here")
        return read_claims(token, key, self._rules, now_ms())

    async def _look_again(self, provider: Provider) -> None:
        if self._look is None or self._look.done():
            if monotonic_s() < self._not_before_s:
                return
            self._not_before_s = monotonic_s() + ASK_AGAIN_S
        # A request that is given up gives up its wait; the look is everybody's.
        await asyncio.wait([self._begin_look(provider)], timeout=WAIT_S)

    async def _look_on(self, provider: Provider) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            await self._begin_look(provider)

    def _begin_look(self, provider: Provider) -> asyncio.Task[None]:
        """Begin a look, unless one is under way."""
        if self._look is None or self._look.done():
            # In a world of its own: its lines are of no request.
            self._look = asyncio.create_task(self._fetch(provider), context=Context())
        return self._look

    async def _fetch(self, provider: Provider) -> None:
        """Look at the provider's keys once; those that are here stay when that fails."""
        self._pause_s = RETRY_AFTER_S
        try:
            keys = parse_jwks(await provider.download(), self._rules.algorithms)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the next look may be better
            status = failure.response.status_code if isinstance(failure, HTTPStatusError) else None
            log.warning("jwks_fetch_failed", exception=type(failure).__name__, status=status)
            # Whoever has a new key should not have to wait for it longer than for the next look.
            self._not_before_s = min(self._not_before_s, monotonic_s() + RETRY_AFTER_S)
            return
        self._pause_s = REFRESH_EVERY_S
        if not keys:
            log.warning("jwks_found_unfit")
        if set(keys) != set(self._keys):
            self._keys = keys
            self.generation += 1
            log.info("jwks_changed", keys=len(keys))


def make_keyring(settings: Settings) -> Keyring | None:
    """Make what verifies the tokens of users; None when there is nothing to verify them with."""
    rules = TokenRules(
        frozenset(settings.jwt_algorithms), settings.jwt_issuer, settings.jwt_audience
    )
    if settings.jwt_jwks_url is not None:
        return Keyring(rules, provider=Provider(settings.jwt_jwks_url))
    if settings.jwt_key is not None:
        return Keyring(rules, parse_jwt_key(settings.jwt_key.get_secret_value(), rules.algorithms))
    return None
