"""Limits: how much a caller may ask for, counted in the store and mostly known here.

A command to the store for every request would double what most of them cost. So tokens are taken
some at a time and spent here; what a process holds and does not spend is lost to the others until
the bucket has filled again, and nobody is let through without a token as long as the store answers.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from math import ceil

import structlog

from app.clock import monotonic_s
from app.errors import OverloadedError, RateLimitedError, StoreError
from app.metrics import REFUSALS
from app.onboarding.limits import Limit, Policy, Standing, describe_refusal
from app.settings import Settings
from app.store.gateway import Gateway
from app.store.limits import LimitStore, Taken

log = structlog.get_logger()

AHEAD = 20
"""Which part of a quota is taken at a time for requests: a twentieth, so that few tokens lie about
in processes that do not spend them."""

MOST_CALLERS = 10_000
"""How many callers are remembered for each limit. Whoever was longest away is forgotten first, and
loses what was taken for them."""

TRANSFERS_OF_ONE = 8
"""How many files of one session a process takes and gives at once: as many as it has connections
for their parts."""

PAUSE_S = 1.0
"""How long the store is left alone once it did not answer, in seconds."""


class LimitReachedError(RateLimitedError):
    """A caller has asked for as much as they may; `standing` says how they stand."""

    def __init__(self, standing: Standing) -> None:
        super().__init__(describe_refusal(standing), standing.reset_s)
        self.standing = standing


Take = Callable[[Policy, str, Limit, int], Awaitable[Taken | None]]


@dataclass(slots=True)
class _Purse:
    """What this process holds of one caller's tokens, and what it knows of the rest.

    `left` is what the store had beside them, `next_s` when it has one more. Times are those of
    `clock.monotonic_s`.
    """

    held: int = 0
    good_until_s: float = 0.0
    left: int = 0
    next_s: float = 0.0
    refused_until_s: float = 0.0
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)


class _Allowance:
    """One limit, for every caller."""

    def __init__(self, policy: Policy, limit: Limit, at_a_time: int, take: Take) -> None:
        self._policy = policy
        self._limit = limit
        self._at_a_time = at_a_time
        self._take = take
        self._refill_s = limit.window_s / limit.quota
        self._purses: OrderedDict[str, _Purse] = OrderedDict()
        self._refusals = REFUSALS.labels(policy.value)

    def spend_held(self, caller: str) -> Standing | None:
        """Spend a token that this process holds; None when it holds none."""
        purse = self._purses.get(caller)
        if purse is None or not purse.held:
            return None
        now_s = monotonic_s()
        if now_s >= purse.good_until_s:
            return None
        self._purses.move_to_end(caller)
        return self._use(purse, now_s)

    async def spend(self, caller: str) -> Standing | None:
        """Spend one token; None when it is not known whether there is one.

        Raises `RateLimitedError` when there is none.
        """
        standing = self.spend_held(caller)
        if standing is not None:
            return standing
        purse = self._purse_of(caller)
        async with purse.taking:
            # Whoever was here before may have taken enough for all who waited.
            now_s = monotonic_s()
            if not purse.held or now_s >= purse.good_until_s:
                self._check(purse, now_s)
                taken = await self._take(self._policy, caller, self._limit, self._at_a_time)
                if taken is None:
                    return None
                self._fill(purse, taken, now_s)
            return self._use(purse, monotonic_s())

    def refuse(self, caller: str) -> None:
        """Let a caller through no more until the store has another token."""
        purse = self._purse_of(caller)
        purse.refused_until_s = purse.next_s

    def is_refusing(self, caller: str) -> bool:
        """Say whether `check` has to be asked about a caller."""
        purse = self._purses.get(caller)
        return purse is not None and purse.refused_until_s > monotonic_s()

    def check(self, caller: str) -> None:
        """Raise `RateLimitedError` for a caller of whom it is known that there is no token."""
        purse = self._purses.get(caller)
        if purse is not None and purse.refused_until_s:
            self._check(purse, monotonic_s())

    def _purse_of(self, caller: str) -> _Purse:
        purse = self._purses.get(caller)
        if purse is None:
            purse = self._purses[caller] = _Purse()
            if len(self._purses) > MOST_CALLERS:
                self._purses.popitem(last=False)
        else:
            self._purses.move_to_end(caller)
        return purse

    def _check(self, purse: _Purse, now_s: float) -> None:
        if now_s < purse.refused_until_s:
            raise self._refusal(purse.refused_until_s - now_s)

    def _refusal(self, wait_s: float) -> RateLimitedError:
        self._refusals.inc()
        retry_after_s = max(1, ceil(wait_s))
        return LimitReachedError(Standing(self._policy, self._limit, 0, retry_after_s))

    def _fill(self, purse: _Purse, taken: Taken, asked_s: float) -> None:
        """Put in what was taken. Raises `RateLimitedError` when it is nothing."""
        purse.held, purse.left = taken.granted, taken.left
        purse.next_s = monotonic_s() + taken.next_ms / 1000
        # By then the bucket has filled again, whether these were spent or not.
        purse.good_until_s = asked_s + self._limit.window_s
        if not taken.granted:
            purse.refused_until_s = purse.next_s
            raise self._refusal(taken.next_ms / 1000)

    def _use(self, purse: _Purse, now_s: float) -> Standing:
        purse.held -= 1
        reset_s = purse.next_s - now_s
        if reset_s < 0:
            # That one has come, and others after it.
            reset_s %= self._refill_s
        return Standing(self._policy, self._limit, purse.held + purse.left, ceil(reset_s))


class Limiter:
    """Counts what callers ask for, each by a name: of who they are, or of where they come from.

    A limit that is off is None, and lets everybody through; so does a store that does not answer.
    """

    def __init__(
        self,
        store: LimitStore,
        requests: Limit | None,
        creations: Limit | None,
        misses: Limit | None,
    ) -> None:
        self._store = store
        self._is_away = False
        self._asked_again_s = 0.0
        ahead = max(1, requests.quota // AHEAD) if requests else 1
        self._requests = self._allow(Policy.REQUESTS, requests, ahead)
        self._creations = self._allow(Policy.CREATIONS, creations)
        self._misses = self._allow(Policy.MISSES, misses)

    def admit_at_once(self, caller: str) -> Standing | None:
        """Count a request with what this process holds.

        None when `check_misses` and `admit` have to be asked, and nothing was counted.
        """
        if self._requests is None or (
            self._misses is not None and self._misses.is_refusing(caller)
        ):
            return None
        return self._requests.spend_held(caller)

    async def admit(self, caller: str) -> Standing | None:
        """Count a request, and say how its caller stands; None when that is not known.

        Raises `RateLimitedError`. One round trip for every twentieth of the quota, none for a
        refusal that was to be expected.
        """
        return None if self._requests is None else await self._requests.spend(caller)

    async def admit_creation(self, caller: str) -> Standing | None:
        """Count a session that is about to be made, as `admit` counts requests. One round trip."""
        return None if self._creations is None else await self._creations.spend(caller)

    async def count_miss(self, caller: str) -> None:
        """Count an id that is not there. Raises `RateLimitedError`. One round trip.

        After the last one that may be, and after each further one, `check_misses` refuses the
        caller until there may be another.
        """
        if self._misses is None:
            return
        standing = await self._misses.spend(caller)
        if standing is not None and standing.left == 0:
            self._misses.refuse(caller)

    def check_misses(self, caller: str) -> None:
        """Raise `RateLimitedError` for a caller who guessed too often, before a guess is looked up.

        So nobody can tell a hit from a miss by which of them is refused.
        """
        if self._misses is not None:
            self._misses.check(caller)

    def _allow(self, policy: Policy, limit: Limit | None, at_a_time: int = 1) -> _Allowance | None:
        return None if limit is None else _Allowance(policy, limit, at_a_time, self._take)

    async def _take(self, policy: Policy, caller: str, limit: Limit, wanted: int) -> Taken | None:
        """Ask the store; None when it does not answer, or did not a moment ago."""
        if self._is_away:
            if monotonic_s() < self._asked_again_s:
                return None
            # One asks whether it is back, and the others do not wait for the answer.
            self._asked_again_s = monotonic_s() + PAUSE_S
        try:
            taken = await self._store.take(policy, caller, limit, wanted)
        except StoreError as failure:
            # A limit that cannot be looked up must not be what stops people.
            if not self._is_away:
                log.warning("limits_unavailable", code=failure.code)
            self._is_away = True
            self._asked_again_s = monotonic_s() + PAUSE_S
            return None
        self._is_away = False
        return taken


class InFlight:
    """Counts what a process is serving: so much at once, and so much of it for one of many.

    What was entered must be left. What is nobody's, `whose` is empty, has no share.
    """

    def __init__(self, most: int, share: int | None = None) -> None:
        self._most = most
        self._share = share
        self._count = 0
        self._of: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many are being served."""
        return self._count

    @property
    def is_full(self) -> bool:
        """Whether as much is being served as may be."""
        return self._count >= self._most

    def check(self) -> None:
        """Raise `OverloadedError` when it is full."""
        if self._count >= self._most:
            raise OverloadedError

    def enter(self, whose: str = "") -> None:
        """Count one more. Raises `OverloadedError`."""
        self.check()
        if whose and self._share is not None:
            if self._of[whose] >= self._share:
                raise OverloadedError
            self._of[whose] += 1
        self._count += 1

    def leave(self, whose: str = "") -> None:
        """Count one less."""
        self._count -= 1
        if whose in self._of:
            self._of[whose] -= 1
            if not self._of[whose]:
                del self._of[whose]


def make_limiter(gateway: Gateway, settings: Settings) -> Limiter:
    """Make a limiter over a gateway, by the settings."""
    return Limiter(
        LimitStore(gateway), settings.rate_limit, settings.create_limit, settings.miss_limit
    )
