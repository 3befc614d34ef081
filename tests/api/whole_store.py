"""All that is in the store, in lines that are alike where the same was done."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from tests.api.every_call import World
from tests.api.helpers import ask

MASKS = [
    (re.compile(r"\bo[rs]t_[\w-]+"), "<token>"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT[\d:.]+Z"), "<time>"),
    # Ids, digests, times in milliseconds; not which steps are saved.
    (re.compile(r"\b(?![01]{23}\b)[0-9a-f]{8,}(-[0-9a-f]+)*(\.\d+)?\b"), "<id>"),
    (re.compile(r"(processing(?:_time)?_ms\W+)\d+"), r"\1<took>"),
]

UNLIKE = (
    "onboarding:canary",
    "onboarding:rate:",
    "onboarding:mark",
    ":batch:",
    " gap:",
    " last_run",
)
"""What of the store depends on when it was asked."""


def mask(text: str, world: World | None = None) -> str:
    """Put words in the place of what differs between two runs."""
    for number, name in enumerate(world.names if world else []):
        text = text.replace(name, f"<own {number}>")
    for pattern, word in MASKS:
        text = pattern.sub(word, text)
    return text


async def read_store(raw: Redis) -> list[str]:
    """Give all that is in the store, in lines."""
    lines: list[str] = []
    async for key in raw.scan_iter(count=1000):
        name = key.decode()
        kind = (await ask(raw, "TYPE", key)).decode()
        match kind:
            case "string":
                entries = [await ask(raw, "GET", key)]
            case "hash":
                entries = [*(await raw.hgetall(key)).items()]
            case "stream":
                entries = await ask(raw, "XRANGE", key, "-", "+")
            case "set":
                entries = [*await raw.smembers(key)]
            case "zset":
                entries = await raw.zrange(key, 0, -1, withscores=True)
            case "list":
                entries = await ask(raw, "LRANGE", key, 0, -1)
        lines += [f"{name} {flatten(entry)}" for entry in entries]
    return [line for line in lines if not any(each in line for each in UNLIKE)]


def flatten(entry: Any) -> str:
    match entry:
        case bytes() if len(entry) > 4000:
            return f"{len(entry)} bytes"
        case bytes():
            return entry.decode()
        case dict():
            return flatten([*entry.items()])
        case list() | tuple():
            return " ".join(map(flatten, entry))
    return str(entry)


def sort_out(lines: Sequence[str], worlds: Mapping[str, World]) -> dict[str, Counter[str]]:
    """Say which lines are about which call, and mask them; the rest is about all."""
    kept: dict[str, Counter[str]] = {call: Counter() for call in [*worlds, "all"]}
    owners = {name: call for call, world in worlds.items() for name in world.names}
    for line in lines:
        own = next(
            (
                owners[name]
                for name in re.findall(r"[0-9a-f]{32}|[0-9a-f-]{36}", line)
                if name in owners
            ),
            "all",
        )
        kept[own][mask(line, worlds.get(own))] += 1
    return kept
