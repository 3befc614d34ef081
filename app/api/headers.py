"""Headers to values, and back: tags, Idempotency-Key, media types, file names, request ids."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote, unquote

from app.errors import InvalidHeaderError, InvalidIdempotencyKeyError, UnsupportedMediaTypeError
from app.onboarding.files import ANY_TYPE, is_media_type
from app.onboarding.limits import Limit, Policy, Standing
from app.onboarding.steps import Tags


@dataclass(frozen=True, slots=True)
class EntityTags:
    """If-Match or If-None-Match: `*`, or the opaque parts of the tags (RFC 9110 section 8.8.3)."""

    any: bool
    strong: frozenset[str]
    weak: frozenset[str]

    def match_weakly(self, opaque: str) -> bool:
        """Compare as If-None-Match does: `W/"1"` and `"1"` are the same."""
        return self.any or opaque in self.strong or opaque in self.weak

    def versions(self, *, weakly: bool) -> Tags:
        """Keep the tags that can be a step's version; others match nothing."""
        opaque = self.strong | self.weak if weakly else self.strong
        numbers = frozenset(int(tag) for tag in opaque if _VERSION.fullmatch(tag))
        return Tags(any_version=self.any, versions=numbers)


LONGEST_DISPOSITION = 4096
"""Longest Content-Disposition that is read, in bytes."""


def parse_entity_tags(name: str, lines: list[str]) -> EntityTags | None:
    """Read If-Match or If-None-Match; None when it was not sent. Raises `InvalidHeaderError`."""
    if not lines:
        return None
    value = ", ".join(lines).strip(" \t")
    if value == "*":
        return EntityTags(any=True, strong=frozenset(), weak=frozenset())
    if not _TAG_LIST.fullmatch(value):
        raise InvalidHeaderError(f'{name} is *, or tags in double quotes such as "3" or "3", "4"')
    found = _TAG.findall(value)
    return EntityTags(
        any=False,
        strong=frozenset(opaque for weak, opaque in found if not weak),
        weak=frozenset(opaque for weak, opaque in found if weak),
    )


def parse_idempotency_key(lines: list[str]) -> str | None:
    """Read an Idempotency-Key: a structured-field string, or the same bare; None when not sent.

    Raises `InvalidIdempotencyKeyError`. (draft-ietf-httpapi-idempotency-key-header-07, RFC 8941.)
    """
    if not lines:
        return None
    if len(lines) == 1:
        value = lines[0].strip(" \t")
        if _BARE_KEY.fullmatch(value):
            return value
        if _QUOTED_KEY.fullmatch(value):
            return re.sub(r"\\(.)", r"\1", value[1:-1])
    raise InvalidIdempotencyKeyError(
        "An Idempotency-Key is one string of 1 to 255 visible ASCII characters in double quotes,"
        " or A-Z a-z 0-9 . _ ~ - without them"
    )


def check_media_type(content_type: str | None, codings: list[str], *, patch: bool) -> None:
    """Raise `UnsupportedMediaTypeError` unless a body is JSON in UTF-8, not compressed.

    `codings` are the values of Content-Encoding and Transfer-Encoding.
    """
    accepted = _PATCH_TYPES if patch else _JSON_TYPES
    wanted = " or ".join(sorted(accepted))
    check_codings(codings)
    if content_type is None:
        raise UnsupportedMediaTypeError(f"Send a body with Content-Type: {wanted}")
    media_type, *parameters = content_type.split(";")
    if media_type.strip().lower() not in accepted:
        raise UnsupportedMediaTypeError(f"The body must be {wanted}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip(' \t"').lower() != "utf-8":
            raise UnsupportedMediaTypeError("The charset must be utf-8")


def check_codings(codings: list[str]) -> None:
    """Raise `UnsupportedMediaTypeError` for a body that is compressed.

    `codings` are the values of Content-Encoding and Transfer-Encoding.
    """
    if any(coding.strip().lower() not in {"identity", "chunked"} for coding in codings):
        raise UnsupportedMediaTypeError("Send the body as it is: no Content-Encoding, no gzip")


def parse_content_type(value: str | None) -> str:
    """Read the type of a body that may be anything. Raises `InvalidHeaderError`."""
    if value is None or not value.strip():
        return ANY_TYPE
    if not is_media_type(value.strip()):
        raise InvalidHeaderError("Content-Type is a media type, such as application/pdf")
    return value.strip()


def parse_filename(disposition: str | None) -> str | None:
    """Read the file name of a Content-Disposition; None when there is none.

    `filename*` (RFC 8187) beats `filename`, of which bytes beyond ASCII are taken for UTF-8, as
    browsers send them (RFC 7578 section 4.2). Raises `InvalidHeaderError`.
    """
    if disposition is None:
        return None
    if len(disposition) > LONGEST_DISPOSITION:
        raise InvalidHeaderError(f"A Content-Disposition has at most {LONGEST_DISPOSITION} bytes")
    found: dict[str, str] = {}
    for name, value in _PARAMETER.findall(disposition):
        found.setdefault(name.lower(), value)
    extended = _EXTENDED.fullmatch(found.get("filename*", "").strip())
    if extended:
        charset = "utf-8" if extended[1].lower() == "utf-8" else "latin-1"
        return unquote(extended[2], charset, "replace")
    plain = found.get("filename", "").strip()
    if plain.startswith('"'):
        plain = re.sub(r'\\(["\\])', r"\1", plain[1:-1])
    with suppress(UnicodeError):
        plain = plain.encode("latin-1").decode()
    return plain or None


def format_disposition(filename: str) -> str:
    """Write a Content-Disposition that has a file saved under a name (RFC 6266 appendix D)."""
    plain = re.sub(r"[^ !#-\[\]-~]|%", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def is_request_id(value: str) -> bool:
    """Say whether a caller's X-Request-ID can be taken over."""
    return _REQUEST_ID.fullmatch(value) is not None


_JSON_TYPES = frozenset({"application/json"})
_PATCH_TYPES = _JSON_TYPES | {"application/merge-patch+json"}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_VERSION = re.compile(r"[1-9][0-9]{0,14}")
_BARE_KEY = re.compile(r"[A-Za-z0-9._~-]{1,255}")
_QUOTED_KEY = re.compile(r'"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\]){1,255}"')

_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
# Empty elements are allowed in a list (RFC 9110 section 5.6.1.2). Possessive groups are not needed:
# every part begins with a character of its own, so there is nothing to backtrack into.
_TAG_LIST = re.compile(rf"(?:,[ \t]*)*{_TAG.pattern}(?:[ \t]*,(?:[ \t]*{_TAG.pattern})?)*")

_PARAMETER = re.compile(r';[ \t]*([^\s=;"]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^;"]*)')
_EXTENDED = re.compile(r"(?i)(utf-8|iso-8859-1)'[^']*'(\S*)")


# The fields are those of draft-ietf-httpapi-ratelimit-headers-10: lists of strings with parameters
# (RFC 9651). Its t is the time until there is more, not until all is there again.


def describe_policies(standings: Iterable[Standing]) -> str:
    """Write the field RateLimit-Policy: `"requests";q=600;w=60`."""
    return ", ".join(f'"{p}";q={limit.quota};w={limit.window_s}' for p, limit, _, _ in standings)


def describe_standings(standings: Iterable[Standing]) -> str:
    """Write the field RateLimit: `"requests";r=597;t=1`."""
    return ", ".join(f'"{policy}";r={left};t={t}' for policy, _, left, t in standings)


def describe_limits(standings: Sequence[Standing]) -> str:
    """Write both fields as they are sent, each with the end of its line."""
    if len(standings) == 1:
        # As for nearly every request.
        policy, limit, left, reset_s = standings[0]
        return f"{_describe_policy(policy, limit)}{left};t={reset_s}\r\n"
    policies, told = describe_policies(standings), describe_standings(standings)
    return f"ratelimit-policy: {policies}\r\nratelimit: {told}\r\n"


@cache
def _describe_policy(policy: Policy, limit: Limit) -> str:
    """Write both fields up to what is left."""
    q = f'ratelimit-policy: "{policy}";q={limit.quota};w={limit.window_s}\r\n'
    return f'{q}ratelimit: "{policy}";r='
