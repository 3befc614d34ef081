"""A Cluster of three masters with a replica each, and who serves what in it now."""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from redis.exceptions import ConnectionError as LostConnectionError

from tests.faults.servers import (
    SET_READY_S,
    ClusterSet,
    Valkey,
    _is_complete,
    _ServerSet,
    follows,
    wait_until,
)


class Shards(_ServerSet):
    """Six servers. A master counts as dead 2 s after its last answer."""

    def __init__(self, stack: ExitStack, cluster: ClusterSet) -> None:
        super().__init__(stack)
        self.url = cluster.url
        self._servers = [*cluster.nodes, *cluster.replicas]

    @classmethod
    def start(cls, directory: Path) -> Self:
        """Start them; what they acknowledged they keep over their own death."""
        with ExitStack() as stack:
            cluster = ClusterSet.start(
                directory, replicas=1, appendonly=True, repl_diskless_sync_delay=0
            )
            stack.enter_context(cluster)
            return cls(stack.pop_all(), cluster)

    def masters(self) -> dict[Valkey, range]:
        """Say who serves which slots, as the first server that runs sees it."""
        for server in self._servers:
            try:
                return self._seen_by(server)
            except LostConnectionError:
                continue
        raise RuntimeError("no server runs")

    def wait_for_another(self, dead: Valkey) -> None:
        """Wait until somebody else serves the slots of a master."""
        wait_until(lambda: dead not in self.masters(), SET_READY_S, "its replica is promoted")

    def settle(self) -> None:
        """Wait until every server serves or follows, and all agree."""
        wait_until(self._is_settled, SET_READY_S, "the Cluster has settled")

    def _is_settled(self) -> bool:
        masters = self.masters()
        return all(
            self._seen_by(server) == masters
            and _is_complete(server)
            and (server in masters or _is_replica(server))
            for server in self._servers
        )

    def _seen_by(self, server: Valkey) -> dict[Valkey, range]:
        by_port = {each.port: each for each in self._servers}
        return {
            by_port[owner[1]]: range(first, last + 1)
            for first, last, owner, *_ in server.command("CLUSTER", "SLOTS")
        }


def _is_replica(server: Valkey) -> bool:
    return server.command("ROLE")[0] == "slave" and follows(server)
