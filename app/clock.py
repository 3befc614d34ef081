"""What time it is, and how a time is written. The only place that asks the system."""

import time
from datetime import UTC, datetime

LAST_MS = 253_402_300_799_999
"""The last moment of the year 9999 in Unix milliseconds, beyond which no date can be written."""


def now_ms() -> int:
    """Return the wall-clock time in Unix milliseconds."""
    return time.time_ns() // 1_000_000


def monotonic_s() -> float:
    """Return seconds from an arbitrary start that never run backwards, for durations."""
    return time.monotonic()


def rfc3339(at_ms: int) -> str:
    """Write Unix milliseconds as RFC 3339 in UTC: `2026-01-31T08:15:00.250Z`."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at_ms % 1000:03d}Z"
