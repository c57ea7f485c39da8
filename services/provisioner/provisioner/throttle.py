"""Throttle of creations: at most `limit` starts within any minute."""

from collections import deque
from dataclasses import dataclass, field

WINDOW_SEC = 60.0


@dataclass(slots=True)
class Throttle:
    """The caller passes the time, in seconds of any one clock."""

    limit: int
    _starts: deque[float] = field(default_factory=deque)

    def record_start(self, now: float) -> None:
        self._starts.append(now)

    def seconds_until_free(self, now: float) -> float:
        """Return the seconds until another start is allowed."""
        self._forget(now)
        if len(self._starts) < self.limit:
            return 0
        return self._starts[-self.limit] + WINDOW_SEC - now

    def seconds_until_empty(self, now: float) -> float:
        """Return the seconds until no start lies within the last minute."""
        self._forget(now)
        return self._starts[-1] + WINDOW_SEC - now if self._starts else 0

    def _forget(self, now: float) -> None:
        while self._starts and self._starts[0] + WINDOW_SEC <= now:
            self._starts.popleft()
