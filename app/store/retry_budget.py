"""How many calls a process may send again: a store that is away for long gets no storm on top."""

from app.clock import monotonic_s

REFILL_S = 60.0
"""How long a spent budget takes to be whole again by itself, in seconds."""


class RetryBudget:
    """A number of repeats, from which those are taken that were in vain.

    `size` is meant to be as many as all requests in flight may need, each for all of its tries, and
    a call that ends well gives its repeats back: an outage that requests outlive never spends the
    budget, however soon the next one comes. A longer one does, and from then on calls are sent
    again as seldom as the budget fills, and the others fail at once instead of after seconds.
    """

    def __init__(self, size: int) -> None:
        """Begin with a full one."""
        self._size = float(size)
        self._left = self._size
        self._at_s = monotonic_s()

    def take(self) -> bool:
        """Take one repeat; say whether there was one."""
        now_s = monotonic_s()
        refilled = (now_s - self._at_s) * self._size / REFILL_S
        self._left = min(self._size, self._left + refilled)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def give_back(self, repeats: int) -> None:
        """Put back what a call took that ended well."""
        self._left = min(self._size, self._left + repeats)
