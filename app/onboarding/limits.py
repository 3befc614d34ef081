"""How much a caller may ask for within a time, whose count it is, and how that is told."""

import hashlib
import re
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

MOST = 1_000_000
"""Highest number that a limit can have."""

KNOWN_ADDRESSES = 4096
"""How many addresses are remembered with the caller they stand for: to read one takes 3 us."""

LONGEST_ADDRESS = 64
"""Longest text that is looked at as an address, in characters: IPv6 with a zone."""

WINDOWS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
"""The times that a limit can be for, in seconds."""


class Limit(NamedTuple):
    """So many at once, and over the time so many in `window_s` seconds.

    It is a bucket of `quota` tokens that is filled again at an even pace, from empty to full in
    `window_s` seconds.
    """

    quota: int
    window_s: int


class Policy(StrEnum):
    """What is limited, by the name that callers see in headers."""

    REQUESTS = "requests"
    CREATIONS = "creations"
    MISSES = "misses"


class Standing(NamedTuple):
    """How a caller stands with a limit.

    `left` is how much may be asked for at once, `reset_s` in how many seconds there is more.
    """

    policy: Policy
    limit: Limit
    left: int
    reset_s: int


_LIMIT = re.compile(rf"([1-9][0-9]{{0,6}})/({'|'.join(WINDOWS_S)})")

_TOO_MUCH = {
    Policy.REQUESTS: "Too much is being asked",
    Policy.CREATIONS: "Too many sessions are being made",
    # Said to hits and misses alike, so it must not say which this one was.
    Policy.MISSES: "Too much was asked for that is not there",
}


def parse_limit(text: str) -> Limit | None:
    """Read a limit such as `600/minute`; None for `off`. Raises `ValueError`."""
    if text == "off":
        return None
    found = _LIMIT.fullmatch(text)
    if found is None or int(found[1]) > MOST:
        windows = ", ".join(WINDOWS_S)
        raise ValueError(f"a number of 1 to {MOST} per {windows}, such as 600/minute, or off")
    return Limit(int(found[1]), WINDOWS_S[found[2]])


def describe_refusal(standing: Standing) -> str:
    """Say to a caller what there was too much of."""
    unit = "second" if standing.reset_s == 1 else "seconds"
    return f"{_TOO_MUCH[standing.policy]}; ask again in {standing.reset_s} {unit}"


def digest_caller(caller: str) -> str:
    """Give what stands for a caller in the name of a key: no name of a user, no address."""
    return hashlib.sha256(caller.encode(errors="surrogatepass")).hexdigest()[:32]


def caller_of_address(host: str | None) -> str:
    """Name the caller at an address, as nobody else is named; None, a unix socket, is one caller.

    IPv6 is told apart by /64: no site gets less (RFC 6177), so every host has 2^64 to choose from.
    All that is no address, as a proxy may say, is one caller.
    """
    if host is None:
        return "address:local"
    # What is longer is no address, and would only be remembered.
    return "address:unknown" if len(host) > LONGEST_ADDRESS else _site_of(host)


@lru_cache(maxsize=KNOWN_ADDRESSES)
def _site_of(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return "address:unknown"
    if isinstance(address, IPv4Address):
        return f"address:{address}"
    if address.ipv4_mapped is not None:
        return f"address:{address.ipv4_mapped}"
    return f"address:{IPv6Address(int(address) >> 64 << 64)}/64"
