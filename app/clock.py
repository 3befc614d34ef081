"""What time it is, and how a time is written. The only place that asks the system."""

import time
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

    Put together from what is written already, since answers hold up to 30 times: 0.25 us, where
    strftime takes 2, and 0.06 for one that was asked for lately, as most were. Raises `ValueError`
    or `OverflowError` for what is beyond the calendar.
    """
    minutes, left_ms = divmod(at_ms, 60_000)
    day, minute = divmod(minutes, 1440)
    return (
        f"{_date(day)}{_MINUTES[minute]}{_SECONDS[left_ms // 1000]}{_MILLISECONDS[left_ms % 1000]}"
    )


@lru_cache(maxsize=512)
def _date(day: int) -> str:
    """Write a day, counted from 1970-01-01."""
    return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()


_MINUTES = [f"T{hour:02d}:{minute:02d}:" for hour in range(24) for minute in range(60)]
_SECONDS = [f"{second:02d}." for second in range(60)]
_MILLISECONDS = [f"{millisecond:03d}Z" for millisecond in range(1000)]
