"""How many calls a process may send again: a store that is away for long gets no storm on top."""

from app.clock import monotonic_s

REFILL_S = 60.0
"""How long a spent budget takes to be whole again, in seconds."""


class RetryBudget:
    """A bucket of repeats, refilled evenly.

    `size` is meant to be as many as all requests in flight may need, each for all of its tries: an
    outage that a request outlives never spends it. A longer one does, and from then on a call is
    sent again as seldom as the bucket fills, and the others fail at once instead of after seconds.
    """

    def __init__(self, size: int) -> None:
        """Begin with a full one."""
        self._size = size
        self._left = float(size)
        self._at_s = monotonic_s()

    def take(self) -> bool:
        """Take one repeat; say whether there was one."""
        now_s = monotonic_s()
        refilled = (now_s - self._at_s) * self._size / REFILL_S
        self._left = min(float(self._size), self._left + refilled)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
