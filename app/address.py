"""Where the store is: the environment's URL forms, parsed into one record.

Pure, and without the Redis library: what a form means is decided here, how to connect to it in
`app/store/client.py`. The texts of the errors are shown to the operator and end up in logs, so
they name parts of a URL and never quote one: no password, no host, no URL.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from typing import Literal
from urllib.parse import unquote

REDIS_PORT = 6379
SENTINEL_PORT = 26379


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the store is and what it takes to get in.

    `nodes` holds (host, port) pairs: one for standalone, the sentinels, or the nodes of a Cluster
    that are asked for the others; it is empty for a unix socket. `service` is the name under which
    the sentinels know their master. `options` are the URL's further settings as text, names as in
    redis-py, Booleans as `true` or `false`; they may hold the sentinels' password.
    """

    mode: Literal["standalone", "sentinel", "cluster"]
    nodes: tuple[tuple[str, int], ...] = ()
    unix_socket: str | None = None
    service: str | None = None
    db: int = 0
    username: str | None = field(default=None, repr=False)  # may be a password in the wrong place
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    options: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)


def parse_store_url(url: str) -> StoreAddress:
    """Parse the value of REDIS_URL.

    User names, passwords, socket paths, service names and the values of query parameters are
    percent-decoded. Raises ValueError that says which part is wrong and what would be right.
    """
    url = url.strip()
    if not url.isprintable():
        raise ValueError("it holds a control character; percent-encode it")
    scheme, separator, rest = url.partition("://")
    form = _FORMS.get(scheme.lower())
    if not separator or form is None:
        raise ValueError("it begins with no known scheme; known are " + ", ".join(_FORMS))
    if "#" in rest:
        raise ValueError("it holds a #; percent-encode it as %23")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    # A raw / or ? ends the host part early, and what is left of a password would look like a path
    # or the name of a parameter.
    if "@" in query or ("@" in path and scheme.lower() != "unix"):
        raise ValueError(
            "it holds an @ after the host; in a user name or password percent-encode"
            " / as %2F, ? as %3F and # as %23, elsewhere @ as %40"
        )
    return form(authority, slash + path, query)


def upstash_address(url: str, token: str) -> StoreAddress:
    """Read the pair UPSTASH_REDIS_URL and UPSTASH_REDIS_TOKEN.

    `https://host`, the address of Upstash's REST interface, means the same host's Redis port. The
    token is the password of the user `default`. Raises ValueError like `parse_store_url`.
    """
    token = token.strip()
    if not token:
        raise ValueError("the token is empty; it is the password of the database")
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if scheme in ("http", "redis"):
        raise ValueError(
            "it would send the token in the clear; write https://<host> or rediss://<host>:<port>"
        )
    if not separator or scheme not in ("https", "rediss"):
        raise ValueError("it is of no known form; write https://<host> or rediss://<host>:<port>")
    address = parse_store_url(f"rediss://{rest}")
    if scheme == "https" and address.nodes[0][1] != REDIS_PORT:
        raise ValueError(
            "https:// names the REST interface and takes no port;"
            " write https://<host> or rediss://<host>:<port>"
        )
    if address.username not in (None, "default") or address.password not in (None, token):
        raise ValueError("it names another user or password than `default` and the token")
    return replace(address, username="default", password=token)


def unix_address(path: str) -> StoreAddress:
    """Give the address of a server that listens on a unix socket, database 0, no password."""
    return StoreAddress("standalone", unix_socket=path)


# --- The forms: (authority, path with its slash, query) -------------------------------------------


def _plain(authority: str, path: str, query: str, *, tls: bool = False) -> StoreAddress:
    options = _options(query, ("db", "protocol", *(_TLS_OPTIONS if tls else ())))
    username, password, hosts = _credentials(authority)
    if "," in hosts:
        raise ValueError("it names several hosts; write redis+sentinel:// or redis+cluster://")
    return StoreAddress(
        "standalone",
        nodes=(_node(hosts, REDIS_PORT),),
        db=_database(path[1:], options.pop("db", "")),
        username=username,
        password=password,
        tls=tls,
        options=options,
    )


def _tls(authority: str, path: str, query: str) -> StoreAddress:
    return _plain(authority, path, query, tls=True)


def _unix(authority: str, path: str, query: str) -> StoreAddress:
    options = _options(query, ("db", "username", "password", "protocol"))
    username, password, host = _credentials(authority)
    if host or len(path) < 2:
        raise ValueError("it names no absolute path; write unix:///<path>")
    return StoreAddress(
        "standalone",
        unix_socket=_decoded(path),
        db=_database("", options.pop("db", "")),
        username=options.pop("username", username),
        password=options.pop("password", password),
        options=options,
    )


def _sentinel(authority: str, path: str, query: str) -> StoreAddress:
    own = ("sentinel_username", "sentinel_password")
    options = _options(query, ("db", "protocol", "ssl", *_TLS_OPTIONS, *own))
    username, password, hosts = _credentials(authority)
    service, _, db = path[1:].partition("/")
    if not service:
        raise ValueError(
            "it names no service; write redis+sentinel://<host>:<port>,.../<service>/<db>"
        )
    return StoreAddress(
        "sentinel",
        nodes=tuple(_node(host, SENTINEL_PORT) for host in hosts.split(",")),
        service=_decoded(service),
        db=_database(db, options.pop("db", "")),
        username=username,
        password=password,
        tls=_takes_tls(options),
        options=options,
    )


def _cluster(authority: str, path: str, query: str) -> StoreAddress:
    options = _options(query, ("protocol", "ssl", *_TLS_OPTIONS))
    username, password, hosts = _credentials(authority)
    if path not in ("", "/", "/0"):
        raise ValueError("it names a database; a Cluster has only database 0, leave it out")
    return StoreAddress(
        "cluster",
        nodes=tuple(_node(host, REDIS_PORT) for host in hosts.split(",")),
        username=username,
        password=password,
        tls=_takes_tls(options),
        options=options,
    )


_FORMS: Mapping[str, Callable[[str, str, str], StoreAddress]] = {
    "redis": _plain,
    "rediss": _tls,
    "valkey": _plain,
    "valkeys": _tls,
    "unix": _unix,
    "redis+sentinel": _sentinel,
    "redis+cluster": _cluster,
}

_TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)

_CHOICES = {
    "protocol": ("2", "3"),
    "ssl_cert_reqs": ("none", "optional", "required"),
}

_BOOLEANS = ("ssl", "ssl_check_hostname")
_TRUE = ("true", "yes", "1")
_FALSE = ("false", "no", "0")


# --- The parts ------------------------------------------------------------------------------------


def _options(query: str, known: tuple[str, ...]) -> dict[str, str]:
    """Decode and check the query. A plus sign stays one: these are paths and passwords."""
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, raw = part.partition("=")
        if name not in known:
            # What is not spelled like a name, or follows a password, may be a part of one.
            is_name = re.fullmatch("[a-z_]{1,40}", name) and not any(map(_is_secret, options))
            shown = f"the query parameter `{name}`" if is_name else "a query parameter"
            hint = "; TLS is rediss:// or valkeys://" if name.startswith("ssl") else ""
            raise ValueError(f"{shown} is unknown here; known are {', '.join(known)}{hint}")
        if name in options:
            raise ValueError(f"its query parameter `{name}` is given twice")
        options[name] = _option(name, _decoded(raw))
    return options


def _is_secret(name: str) -> bool:
    return name.endswith("password")


def _option(name: str, value: str) -> str:
    if name in _BOOLEANS:
        if value.lower() not in _TRUE + _FALSE:
            raise ValueError(f"its query parameter `{name}` is neither true nor false")
        return "true" if value.lower() in _TRUE else "false"
    if value not in _CHOICES.get(name, (value,)):
        raise ValueError(f"its query parameter `{name}` is none of {', '.join(_CHOICES[name])}")
    if not value:
        raise ValueError(f"its query parameter `{name}` has no value")
    return value


def _takes_tls(options: dict[str, str]) -> bool:
    tls = options.pop("ssl", "false") == "true"
    if not tls and any(name in options for name in _TLS_OPTIONS):
        raise ValueError("it has TLS parameters without TLS; add ssl=true to the query")
    return tls


def _credentials(authority: str) -> tuple[str | None, str | None, str]:
    """Split `user:password@hosts`; the last @ counts, so a raw one in a password does no harm."""
    secret, _, hosts = authority.rpartition("@")
    username, _, password = secret.partition(":")
    return _decoded(username) or None, _decoded(password) or None, hosts


def _node(text: str, default_port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::([^:]*))?", text)
    if match is None:
        raise ValueError("its host is not <host>:<port>; an IPv6 address stands in brackets")
    ipv6, name, port = match.groups()
    if ipv6 is not None and not _is_ipv6(ipv6):
        raise ValueError("what stands in brackets is no IPv6 address")
    if ipv6 is None and not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError("it names no host, or one with more than letters, digits and . _ -")
    if not port:
        return ipv6 or name, default_port
    number = _number(port, 65_535)
    if not number:
        raise ValueError("its port is no number from 1 to 65535")
    return ipv6 or name, number


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _database(in_path: str, in_query: str) -> int:
    if in_path and in_query:
        raise ValueError("it names the database twice, in the path and as db=")
    number = _number(in_path or in_query or "0", 2**31 - 1)
    if number is None:
        raise ValueError("its database is no number; write /0 or leave it out")
    return number


def _number(text: str, highest: int) -> int | None:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > highest:
        return None
    return int(text)


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        pass  # the error holds the bytes, so ours is raised outside of it
    raise ValueError("its percent-encoding is not UTF-8")
