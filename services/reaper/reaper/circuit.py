"""Leaves alone for a while what keeps failing."""

from dataclasses import dataclass
from enum import IntEnum


class State(IntEnum):
    CLOSED = 0
    HALF_OPEN = 1
    """One call may find out whether it works again."""
    OPEN = 2


@dataclass(slots=True)
class Circuit:
    """Opens after `threshold` failures in a row, for `timeout_sec`; then it is half open, until a success closes
    it or a failure opens it again. Time is whatever clock the caller gives, in seconds."""

    threshold: int
    timeout_sec: float
    _failures: int = 0
    _open_until: float | None = None

    def state(self, now: float) -> State:
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if now < self._open_until else State.HALF_OPEN

    def half_open_in_sec(self, now: float) -> float:
        return 0 if self._open_until is None else max(0, self._open_until - now)

    def succeeded(self, now: float) -> None:
        if self.state(now) is not State.OPEN:  # else it was asked before the circuit opened
            self._failures, self._open_until = 0, None

    def failed(self, now: float) -> None:
        self._failures += 1
        state = self.state(now)
        if state is State.HALF_OPEN or (state is State.CLOSED and self._failures >= self.threshold):
            self._open_until = now + self.timeout_sec
