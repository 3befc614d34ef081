"""Three hosts that can lose one another: a data server and a sentinel on each.

What goes from one to another is authenticated as the host that it comes from. So the way between
two can be cut, at once and in both directions, while clients, who are somebody else, reach all.
"""

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, Self

from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import TimeoutError as SlowServerError

from tests.faults.servers import (
    HOST,
    SET_READY_S,
    Directive,
    Valkey,
    _ServerSet,
    follows,
    wait_until,
)

SERVICE = "mymaster"
NAMES = ("host1", "host2", "host3")
CLIENTS = "clients"
SECRET = "a-secret-of-tests"


class Pace(NamedTuple):
    """How soon sentinels take a master for dead, and how often they look, in milliseconds.

    `ping_ms` is for whether a server answers, `info_ms` for how far it is.
    """

    down_after_ms: int
    ping_ms: int
    info_ms: int


AS_ADVISED = Pace(down_after_ms=2500, ping_ms=1000, info_ms=1000)
"""The first is what deploy/redis.md advises. By default `info_ms` is 10,000, and 1,000 once a
master is down: what was learned last is hardly ever as young, and so hardly ever in the way of
what is true."""

HURRIED = Pace(down_after_ms=800, ping_ms=250, info_ms=200)
"""Sooner in all, for where there is no time; the last look is younger than in what is advised."""

FAILOVER_TIMEOUT_MS = 3000
ELECTION_AGAIN_S = 2 * FAILOVER_TIMEOUT_MS / 1000 + 1
"""So long after an election no sentinel begins another one: it draws up to a second by lot."""


@dataclass(frozen=True)
class Host:
    """A machine: a data server, and a sentinel that knows of all."""

    name: str
    data: Valkey
    sentinel: Valkey

    def die(self) -> None:
        """End all that runs here at once."""
        self.data.kill()
        self.sentinel.kill()

    def come_back(self) -> None:
        """Start again with the files that are there."""
        self.data.restart()
        self.sentinel.restart()

    def shut_out(self, other: "Host") -> None:
        """Take nothing from another host any more. Replication goes first."""
        for server in (self.data, self.sentinel):
            server.command("ACL", "SETUSER", other.name, "off")
            server.command("CLIENT", "KILL", "USER", other.name)

    def let_in(self, other: "Host") -> None:
        """Take everything from another host again."""
        for server in (self.data, self.sentinel):
            server.command("ACL", "SETUSER", other.name, "on")
            # Who was refused keeps a connection that is nobody's.
            server.command("CLIENT", "KILL", "USER", "default")


class Hosts(_ServerSet):
    """A master and two replicas, with a sentinel beside each. Two sentinels must agree.

    The first host begins as the master; `master()` says who is it now.
    """

    def __init__(self, stack: ExitStack, hosts: tuple[Host, ...], pace: Pace) -> None:
        super().__init__(stack)
        self.hosts = hosts
        self.pace = pace
        self._settled_on = hosts[0]

    @classmethod
    def start(cls, directory: Path, pace: Pace, **config: Directive) -> Self:
        """Start all of it, and wait until every sentinel knows every server.

        `config` is for the data servers.
        """
        with ExitStack() as stack:
            hosts = tuple(_start_host(stack, directory / name, name, config) for name in NAMES)
            master, *replicas = (host.data for host in hosts)
            for replica in replicas:
                replica.command("REPLICAOF", HOST, master.port)
            for host in hosts:
                # Who comes back is known to the others, and knows them.
                host.data.command("CONFIG", "REWRITE")
            for replica in replicas:
                wait_until(partial(follows, replica), SET_READY_S, "a replica follows its master")
            for host in hosts:
                _watch(host, master, pace)
            made = cls(stack, hosts, pace)
            made.settle()
            made._stack = stack.pop_all()
            return made

    @property
    def url(self) -> str:
        """The URL with all three sentinels and database 0, for clients."""
        nodes = ",".join(f"{HOST}:{host.sentinel.port}" for host in self.hosts)
        shown = f"sentinel_username={CLIENTS}&sentinel_password={SECRET}"
        return f"redis+sentinel://{CLIENTS}:{SECRET}@{nodes}/{SERVICE}/0?{shown}"

    def master(self) -> Host:
        """Give the host that most sentinels name."""
        named = [port for host in self.hosts if (port := _named_by(host))]
        port = max(named, key=named.count)
        return next(host for host in self.hosts if host.data.port == port)

    def wait_for_another(self, old: Host) -> None:
        """Wait until most sentinels name another master than the old one."""
        wait_until(lambda: self.master() is not old, SET_READY_S, "another one is the master")

    def others(self) -> list[Host]:
        """Give the hosts that are not the master's."""
        master = self.master()
        return [host for host in self.hosts if host is not master]

    def cut(self, one: Host, other: Host) -> None:
        """Let nothing pass between two hosts any more."""
        one.shut_out(other)
        other.shut_out(one)

    def heal(self) -> None:
        """Let everything pass again."""
        for one, other in combinations(self.hosts, 2):
            one.let_in(other)
            other.let_in(one)

    def ask(self, *question: str | int) -> list[Any]:
        """Ask every sentinel."""
        return [host.sentinel.command("SENTINEL", *question) for host in self.hosts]

    def settle(self) -> None:
        """Wait until every sentinel knows one master with two replicas, and may elect another one.

        Meanwhile they look and speak more often than usual.
        """
        begun_s = time.monotonic()
        self.ask("DEBUG", "publish-period", 200, "info-period", 200)
        wait_until(self._is_settled, SET_READY_S, "the hosts have settled")
        periods = ("ping-period", self.pace.ping_ms, "info-period", self.pace.info_ms)
        self.ask("DEBUG", "publish-period", 2000, *periods)
        if self.master() is not self._settled_on:
            self._settled_on = self.master()
            time.sleep(max(0.0, begun_s + ELECTION_AGAIN_S - time.monotonic()))

    def _is_settled(self) -> bool:
        master = str(self.master().data.port)
        for known in self.ask("MASTER", SERVICE):
            told = [known[name] for name in ("port", "flags", "num-other-sentinels", "num-slaves")]
            if told != [master, "master", "2", "2"]:
                return False
        replicas = [each for told in self.ask("REPLICAS", SERVICE) for each in told]
        sentinels = [each for told in self.ask("SENTINELS", SERVICE) for each in told]
        return not any("s_down" in each["flags"] for each in sentinels) and all(
            (each["flags"], each["master-port"], each["master-link-status"])
            == ("slave", master, "ok")
            for each in replicas
        )


def _start_host(stack: ExitStack, directory: Path, name: str, config: dict[str, Directive]) -> Host:
    locked: dict[str, Directive] = {"requirepass": SECRET}
    data = {
        **locked,
        "masteruser": name,
        "masterauth": SECRET,
        "repl_diskless_sync_delay": 0,
        **config,
    }
    host = Host(
        name,
        stack.enter_context(Valkey._start(directory / "data", 0, data)),
        stack.enter_context(Valkey._start(directory / "sentinel", 0, locked, "--sentinel")),
    )
    for server in (host.data, host.sentinel):
        for each in (*NAMES, CLIENTS):
            server.command("ACL", "SETUSER", each, "on", f">{SECRET}", "~*", "&*", "+@all")
    return host


def _watch(host: Host, master: Valkey, pace: Pace) -> None:
    sentinel = partial(host.sentinel.command, "SENTINEL")
    sentinel("CONFIG", "SET", "sentinel-user", host.name, "sentinel-pass", SECRET)
    # They introduce themselves to each other every 2 s by default.
    sentinel("DEBUG", "publish-period", 200)
    sentinel("MONITOR", SERVICE, HOST, master.port, 2)
    sentinel("SET", SERVICE, "auth-user", host.name, "auth-pass", SECRET)
    sentinel("SET", SERVICE, "down-after-milliseconds", pace.down_after_ms)
    sentinel("SET", SERVICE, "failover-timeout", FAILOVER_TIMEOUT_MS)


def _named_by(host: Host) -> int:
    with suppress(LostConnectionError, SlowServerError):
        return int(host.sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
    return 0
