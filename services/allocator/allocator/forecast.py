"""How long the available sandboxes last."""

import math
from collections import deque

WINDOW_SEC = 300.0


class Forecast:
    """From the rate of new leases in the last five minutes. Sandboxes that CSP may add meanwhile are not counted
    on: they come with a sync, in one piece or not at all."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def exhaustion_sec(self, now: float, available: int, leases: int) -> float:
        """`leases` is how many there have ever been, `now` any clock in seconds. Infinite while nobody
        allocates."""
        if self._seen and leases < self._seen[-1][1]:
            self._seen.clear()  # another database
        self._seen.append((now, leases))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_SEC:
            self._seen.popleft()
        since, before = self._seen[0]
        return available * (now - since) / (leases - before) if leases > before else math.inf
