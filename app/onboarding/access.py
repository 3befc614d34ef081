"""Who may do what: the one table of principals, scopes, and whose a session is."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from functools import cached_property
from typing import NamedTuple

from app.errors import ForbiddenError, UnauthenticatedError
from app.onboarding.sessions import Owner


class Kind(StrEnum):
    """What somebody is, by what they showed."""

    NOBODY = "nobody"
    """Who showed nothing, or was not asked to."""

    ANYONE = "anyone"
    """Nobody in particular, who may do everything: access control is off."""

    WIZARD = "wizard"
    """A frontend with the token of one session."""

    USER = "user"
    """A person with a token of an identity provider."""

    MACHINE = "machine"
    """A service with an API key."""


class Scope(StrEnum):
    """What a machine may do."""

    SESSIONS = "sessions"
    GENERATOR = "generator"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who asks.

    `name` is the id of a wizard's session, of a user, or the name of a machine's key;
    `workspace_id` is that of a user, `scopes` are those of a machine.
    """

    kind: Kind
    name: str = ""
    workspace_id: str | None = None
    scopes: frozenset[Scope] = frozenset()

    def __str__(self) -> str:
        """Name them where it is kept who did something: `machine:bcm`."""
        return f"{self.kind}:{self.name}" if self.name else self.kind.value

    @cached_property
    def label(self) -> str:
        """Name them where no person is named, such as in the log."""
        return str(self) if self.kind is Kind.MACHINE else self.kind.value

    @cached_property
    def identity(self) -> str:
        """Tell them from everybody else; empty for who is not told from others."""
        if not self.name:
            return ""
        return f"{self}\n{self.workspace_id}" if self.kind is Kind.USER else str(self)


NOBODY = Principal(Kind.NOBODY)
ANYONE = Principal(Kind.ANYONE)


class Access(Enum):
    """What an operation asks of whoever calls it. Every operation has one of these.

    Where a session is named, it must be theirs as well: see `is_theirs`.
    """

    PUBLIC = auto()
    """Nothing, and nobody is counted: probes, documentation."""

    OPEN = auto()
    """Nothing: what is sent is what opens."""

    ANY = auto()
    """To be somebody: it is the same for all."""

    CREATE = auto()
    """Begin a session."""

    OWN = auto()
    """List one's own."""

    EDIT = auto()
    """The answers of a session, and its life."""

    FOLLOW = auto()
    """What a generator reads, and what becomes of it."""

    REPORT = auto()
    """What a generator says."""

    TASKS = auto()
    """The tasks beside the sessions."""

    OPERATE = auto()
    """Everything at once, by operators."""


MAY: Mapping[Access, frozenset[Kind | Scope]] = {
    access: frozenset(who)
    for access, who in {
        Access.ANY: (Kind.WIZARD, Kind.USER, *Scope),
        Access.CREATE: (Kind.USER, Scope.SESSIONS),
        Access.OWN: (Kind.USER,),
        Access.EDIT: (Kind.WIZARD, Kind.USER, Scope.SESSIONS),
        Access.FOLLOW: (Kind.WIZARD, Kind.USER, Scope.SESSIONS, Scope.GENERATOR),
        Access.REPORT: (Kind.WIZARD, Kind.USER, Scope.GENERATOR),
        Access.TASKS: (Scope.GENERATOR,),
        Access.OPERATE: (Scope.ADMIN,),
    }.items()
}
"""Who may: people by what they are, machines by a scope that they have."""


def check_access(access: Access, principal: Principal) -> None:
    """Raise `UnauthenticatedError` for nobody, `ForbiddenError` for somebody who may not."""
    if access in (Access.PUBLIC, Access.OPEN) or principal.kind is Kind.ANYONE:
        return
    if principal.kind is Kind.NOBODY:
        raise UnauthenticatedError
    who = MAY[access]
    if principal.kind in who or not who.isdisjoint(principal.scopes):
        return
    if principal.kind is Kind.MACHINE:
        scopes = " or ".join(sorted(each for each in who if isinstance(each, Scope)))
        raise ForbiddenError(f"This API key lacks a scope: {scopes or 'this is for users'}")
    able = [f"a {each}" if isinstance(each, Kind) else f"the scope {each}" for each in sorted(who)]
    raise ForbiddenError(f"Not with these credentials: this takes {' or '.join(able)}")


def is_theirs(principal: Principal, session_id: str, owner: Owner | None) -> bool:
    """Say whether somebody may know of a session.

    `owner` is asked for with users only, and None when it is not known: then it is nobody's.
    Machines, and everybody without access control, may know of any.
    """
    match principal.kind:
        case Kind.WIZARD:
            return principal.name == session_id
        case Kind.USER if owner is not None:
            told = owner.user_id, owner.workspace_id
            return told == (principal.name, principal.workspace_id)
        case _:
            return principal.kind in (Kind.MACHINE, Kind.ANYONE)


def claim(principal: Principal, wanted: Owner) -> Owner:
    """Give the owner of what somebody makes: a user cannot make it another's."""
    if principal.kind is not Kind.USER:
        return wanted
    return replace(wanted, user_id=principal.name, workspace_id=principal.workspace_id)


# --- The keys of machines -------------------------------------------------------------------------


class ApiKey(NamedTuple):
    """A key of a machine, of which only the SHA-256 is kept. Several may have one name."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes

    def __repr__(self) -> str:
        return f"ApiKey({self.name})"


def is_api_key_name(name: str) -> bool:
    """Say whether a machine may be called so: 1 to 64 of `A-Z a-z 0-9 . _ -`."""
    return _API_KEY_NAME.fullmatch(name) is not None


def write_api_key(name: str, scopes: Iterable[Scope], key: str) -> str:
    """Write what is kept of a key as `parse_api_keys` reads it."""
    return f"{name}:{'+'.join(scopes)}:{hashlib.sha256(key.encode()).hexdigest()}"


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Read keys, divided by commas or lines; empty lines and those that begin with # are left out.

    Raises `ValueError` naming the entry that is wrong by its number and not by what it holds, which
    may be a key that was put there by mistake.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    entries = [entry.strip() for line in lines for entry in line.split(",") if entry.strip()]
    keys = tuple(_parse_api_key(entry, number) for number, entry in enumerate(entries, start=1))
    first: dict[bytes, int] = {hashlib.sha256(b"").digest(): 0}
    for number, key in enumerate(keys, start=1):
        before = first.setdefault(key.digest, number)
        if before != number:
            what = f"is the one of entry {before}" if before else "is that of an empty key"
            raise ValueError(f"the SHA-256 of entry {number} {what}")
    return keys


def find_api_key(keys: Iterable[ApiKey], sent: bytes) -> ApiKey | None:
    """Find the key that was sent, in a time that tells nothing about those that are there."""
    digest = hashlib.sha256(sent).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def _parse_api_key(entry: str, number: int) -> ApiKey:
    name, _, rest = entry.partition(":")
    scopes, _, digest = rest.partition(":")
    if not is_api_key_name(name) or not _SHA256.fullmatch(digest):
        raise ValueError(f"entry {number} is not name:scope+scope:<sha256 of the key in hex>")
    try:
        granted = frozenset(map(Scope, scopes.split("+")))
    except ValueError:
        known = ", ".join(Scope)
        raise ValueError(
            f"entry {number} has a scope that there is not; there are {known}"
        ) from None
    return ApiKey(name, granted, bytes.fromhex(digest))


_API_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
