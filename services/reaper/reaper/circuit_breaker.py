"""Circuit breaker: stop calling a service that keeps failing, then try it with one call."""

from dataclasses import dataclass
from enum import IntEnum


class State(IntEnum):
    CLOSED = 0
    HALF_OPEN = 1
    """One call may find out whether the service works again."""
    OPEN = 2


@dataclass(slots=True)
class CircuitBreaker:
    """Opens for `timeout_sec` after `threshold` failures in a row. Afterwards it is half open until the next call:
    a success closes it, a failure opens it again. The caller passes the time, in seconds of any one clock."""

    threshold: int
    timeout_sec: float
    _failures: int = 0
    _open_until: float | None = None

    def state(self, now: float) -> State:
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if now < self._open_until else State.HALF_OPEN

    def seconds_until_half_open(self, now: float) -> float:
        return 0 if self._open_until is None else max(0, self._open_until - now)

    def record_success(self, now: float) -> None:
        # A success while open belongs to a call that began before the breaker opened.
        if self.state(now) is not State.OPEN:
            self._failures, self._open_until = 0, None

    def record_failure(self, now: float) -> None:
        self._failures += 1
        state = self.state(now)
        if state is State.HALF_OPEN or (state is State.CLOSED and self._failures >= self.threshold):
            self._open_until = now + self.timeout_sec
