"""Pages of lists: how long one may be, where it ends, and the cursor that goes on from there.

Lists stand in the order of the alphabet by places: when something was made, and its name. A place
stays where it is whatever comes and goes around it, what stands there included.
"""

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode

from app.errors import Fault, InvalidRequestError

DIGITS = 16
"""How long the time in a place is, so that places compare as times do; Unix ms have 13 digits."""


def place_of(created_ms: int, name: str) -> str:
    """Give the place of what was made at a time, in Unix milliseconds."""
    return f"{created_ms:0{DIGITS}d}:{name}"


def write_cursor(place: str) -> str:
    """Write a place so that nobody takes it for more than it is."""
    return urlsafe_b64encode(place.encode()).decode().rstrip("=")


def parse_cursor(cursor: str) -> str:
    """Read the place that a cursor was made of. Raises `InvalidRequestError`."""
    try:
        place = urlsafe_b64decode(cursor.encode("ascii") + b"==").decode("ascii")
    except ValueError:
        place = ""
    if not _PLACE.fullmatch(place) or write_cursor(place) != cursor:
        detail = "The next_cursor of the page before, as it came"
        fault = Fault(pointer="/cursor", code="cursor", detail=detail)
        raise InvalidRequestError("cursor is the next_cursor of the page before", [fault])
    return place


def parse_limit(text: str, most: int) -> int:
    """Read how long a page may be, 1 to `most`. Raises `InvalidRequestError`."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    limit = int(text) if is_number else 0
    check_limit(limit, most)
    return limit


def check_limit(limit: int, most: int) -> None:
    """Raise `InvalidRequestError` unless a page may be so long."""
    if not 1 <= limit <= most:
        fault = Fault(pointer="/limit", code="integer", detail=f"1 to {most}")
        raise InvalidRequestError(f"limit is 1 to {most}", [fault])


_PLACE = re.compile(rf"[0-9]{{{DIGITS}}}:[A-Za-z0-9._-]+")
