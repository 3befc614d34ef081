"""Limits in the store: one bucket of tokens for each caller, shared by all processes."""

from typing import NamedTuple

from app.onboarding.limits import Limit, Policy, digest_caller
from app.store.gateway import Gateway

TAKE_S = 0.25
"""How long the store may take to say how many there are, in seconds."""


class Taken(NamedTuple):
    """What came out of a bucket: `left` stayed in it, `next_ms` is when there is one more."""

    granted: int
    left: int
    next_ms: int


class LimitStore:
    """Gives tokens away, never more than a limit allows. A call is one round trip, tried once."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def take(self, policy: Policy, caller: str, limit: Limit, wanted: int) -> Taken:
        """Take up to `wanted` tokens of a caller, at least 1. Raises a `StoreError`."""
        key = self._gateway.keys.bucket(policy, digest_caller(caller))
        args = [limit.quota, limit.window_s * 1000, wanted]
        reply = await self._gateway.evaluate_once("take_tokens", [key], args, limit_s=TAKE_S)
        return Taken(*reply.values)
