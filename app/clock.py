"""What time it is, and how a time is written. The only place that asks the system."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache

LAST_MS = 253_402_300_799_999
"""The last moment of the year 9999 in Unix milliseconds, beyond which no date can be written."""


def now_ms() -> int:
    """Return the wall-clock time in Unix milliseconds."""
    return time.time_ns() // 1_000_000


monotonic_s = time.monotonic
"""Return seconds from an arbitrary start that never run backwards, for durations."""


@lru_cache(maxsize=4096)
def rfc3339(at_ms: int) -> str:
    """Write Unix milliseconds as RFC 3339 in UTC: `2026-01-31T08:15:00.250Z`.

    Put together from what is written already: 0.2 us, where strftime takes 2, and 0.06 for one that
    was asked for lately, as most were. Raises `ValueError` or `OverflowError` for what is beyond
    the calendar.
    """
    hour, left_ms = divmod(at_ms, _HOUR_MS)
    return f"{_hour(hour)}{_SECONDS[left_ms // 1000]}{_MILLISECONDS[left_ms % 1000]}"


def rfc3339_each(times_ms: Iterable[int]) -> list[str]:
    """Write each of these as `rfc3339` does.

    For those that lie close together, as when the steps of a session were saved, and that nobody
    may ask for again: 0.1 us for each, where `rfc3339` takes 0.3 to write one and to remember it.
    """
    texts = []
    hour_ms, hour = 0, _hour(0)
    for at_ms in times_ms:
        left_ms = at_ms - hour_ms
        if not 0 <= left_ms < _HOUR_MS:
            number, left_ms = divmod(at_ms, _HOUR_MS)
            hour_ms, hour = number * _HOUR_MS, _hour(number)
        texts.append(f"{hour}{_SECONDS[left_ms // 1000]}{_MILLISECONDS[left_ms % 1000]}")
    return texts


@lru_cache(maxsize=4096)
def _hour(number: int) -> str:
    """Write an hour, counted from 1970-01-01, up to where its minutes come: `2026-01-31T08:`."""
    return datetime.fromtimestamp(number * 3600, UTC).isoformat()[:14]


_HOUR_MS = 3_600_000
_SECONDS = [f"{minute:02d}:{second:02d}." for minute in range(60) for second in range(60)]
_MILLISECONDS = [f"{millisecond:03d}Z" for millisecond in range(1000)]
