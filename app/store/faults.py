"""What a failure of the store means: one table, asked by the gateway and by nobody else."""

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple, TypeGuard

import structlog
from redis import exceptions as redis_errors

from app.errors import (
    CorruptRecordError,
    OverloadedError,
    StoreError,
    StoreFullError,
    StoreReadonlyError,
    StoreUnavailableError,
)

log = structlog.get_logger()


class TooFewReplicasError(Exception):
    """A write that no replica has confirmed in time; the server itself may have it."""


class TooLateError(Exception):
    """A sending that came too late by the store's clock, which had just been learnt from it."""


class TooMuchAtOnceError(Exception):
    """More is waiting to be sent, or to be answered, than may; this was not sent."""


class Remedy(Enum):
    """What to do about a failure."""

    RETRY = auto()
    """Transient: send again, after a wait."""

    GIVE_UP = auto()
    """It would fail the same way again."""


class Fault(NamedTuple):
    """A failure, judged: its name for logs and counts, the remedy, the error for the caller.

    No `error` stands for a record that cannot be read: only who asked knows which. After one
    `elsewhere` another server may be the master by now, and the connections lead to the old one.
    """

    kind: str
    remedy: Remedy
    error: Callable[[], StoreError] | None
    elsewhere: bool = False


def judge(failure: Exception) -> Fault | None:
    """Judge an exception of the client; None for one that the store has nothing to do with."""
    if isinstance(failure, redis_errors.RedisClusterException) and _is_refusal(failure.__cause__):
        # A Cluster client that no node lets in says only that it reached none.
        failure = failure.__cause__
    for kinds, text, fault in _TABLE:
        if isinstance(failure, kinds) and text in str(failure):
            return fault
    return None


def corrupt(key: str, part: str = "the session") -> CorruptRecordError:
    """Report a record that cannot be read, and return the error for the caller.

    `part` says in the caller's words what it holds: "step 4".
    """
    log.error("corrupt_record_found", key=key)
    return CorruptRecordError(key, part)


def _is_refusal(failure: BaseException | None) -> TypeGuard[Exception]:
    return isinstance(failure, redis_errors.AuthenticationError | redis_errors.AuthorizationError)


def _transient(kind: str, *, elsewhere: bool = False) -> Fault:
    return Fault(kind, Remedy.RETRY, StoreUnavailableError, elsewhere)


def _permanent(kind: str, error: Callable[[], StoreError] | None = StoreUnavailableError) -> Fault:
    return Fault(kind, Remedy.GIVE_UP, error)


# The class, a part of the text ("" = any), what it means. Read from the top, first match wins:
# several classes that must not be retried are children of ConnectionError, and NOREPLICAS, BUSY
# and MISCONF are known by their text alone. redis-py drops the code where it has a class for it.
_TABLE: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, Fault], ...] = (
    (redis_errors.AuthenticationError, "", _permanent("authentication")),
    (redis_errors.AuthenticationWrongNumberOfArgsError, "", _permanent("authentication")),
    (redis_errors.AuthorizationError, "", _permanent("authorization")),
    (redis_errors.NoPermissionError, "", _permanent("authorization")),
    (redis_errors.MaxConnectionsError, "", _permanent("pool_exhausted", OverloadedError)),
    # Nobody was asked. A store that is frozen holds every connection until its time limit, and
    # those who wait for one meanwhile are no more at fault than those who have one.
    (
        redis_errors.ConnectionError,
        "No connection available",
        Fault("pool_exhausted", Remedy.RETRY, OverloadedError),
    ),
    (TooMuchAtOnceError, "", Fault("backlog_full", Remedy.RETRY, OverloadedError)),
    (redis_errors.BusyLoadingError, "", _transient("loading")),
    # A replica that was the master: the new one may be found in time.
    (
        redis_errors.ReadOnlyError,
        "",
        Fault("readonly", Remedy.RETRY, StoreReadonlyError, elsewhere=True),
    ),
    # The same, as redis-py reports it where sentinels watch.
    (redis_errors.ConnectionError, "is now a slave", _transient("demoted", elsewhere=True)),
    # A master without its replicas may be on the wrong side of a partition.
    (TooFewReplicasError, "", _transient("too_few_replicas", elsewhere=True)),
    # It went astray between two stores, or took too long.
    (TooLateError, "", _transient("late")),
    # A key that lacks its hash tag: ours to mend, not to send again.
    (redis_errors.RedisClusterException, "key slot", _permanent("cross_slot")),
    (redis_errors.ClusterDownError, "", _transient("cluster_down")),
    (redis_errors.TryAgainError, "", _transient("try_again")),
    # A slot that moves just now. A client follows by itself where it sends a single command.
    (redis_errors.AskError, "", _transient("cluster_moving")),
    # "TTL exhausted.": sent on from node to node too often, and carried out by none.
    (redis_errors.ClusterError, "", _transient("cluster_moving")),
    (redis_errors.SlotNotCoveredError, "", _transient("cluster_down")),
    (redis_errors.RedisClusterException, "", _transient("cluster_unreachable")),
    (redis_errors.OutOfMemoryError, "", _permanent("out_of_memory", StoreFullError)),
    (redis_errors.ResponseError, "OOM", _permanent("out_of_memory", StoreFullError)),
    (redis_errors.ResponseError, "MISCONF", _permanent("misconfigured", StoreReadonlyError)),
    (redis_errors.ResponseError, "WRONGTYPE", _permanent("wrong_type", None)),
    (redis_errors.ResponseError, "NOREPLICAS", _transient("no_replicas", elsewhere=True)),
    (redis_errors.ResponseError, "BUSY ", _transient("busy")),
    (redis_errors.ResponseError, "CLUSTERDOWN", _transient("cluster_down")),
    (redis_errors.ResponseError, "MASTERDOWN", _transient("master_down")),
    (redis_errors.ResponseError, "TRYAGAIN", _transient("try_again")),
    (redis_errors.ResponseError, "UNBLOCKED", _transient("readonly", elsewhere=True)),
    # Whoever answers there speaks another protocol.
    (redis_errors.InvalidResponse, "", _permanent("protocol")),
    # A key that its script derives, in a slot that moves just now.
    (redis_errors.ResponseError, "non local key", _transient("cluster_moving")),
    # A script stumbles only over a record that somebody else wrote.
    (redis_errors.ResponseError, "user_script", _permanent("script_failed", None)),
    (redis_errors.TimeoutError, "", _transient("timeout")),
    (redis_errors.ConnectionError, "", _transient("connection")),
    (TimeoutError, "", _transient("timeout")),
    (OSError, "", _transient("connection")),
)
