"""Depletion forecast: how long the available sandboxes last."""

import math
from collections import deque

WINDOW_SEC = 300.0


class DepletionForecast:
    """Estimate from the rate of new leases within the last five minutes.

    The estimate ignores future sandboxes of CSP, because a sync adds them in one step or not at all.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def exhaustion_sec(self, now: float, available: int, leases: int) -> float:
        """Return the seconds until the pool is empty; infinity without new leases.

        `now` is any monotonic clock in seconds, `leases` the number of leases ever granted.
        """
        if self._samples and leases < self._samples[-1][1]:
            self._samples.clear()  # the count never decreases, so this is another database
        self._samples.append((now, leases))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_SEC:
            self._samples.popleft()
        window_start, leases_at_start = self._samples[0]
        granted = leases - leases_at_start
        return available * (now - window_start) / granted if granted > 0 else math.inf
