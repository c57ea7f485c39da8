"""Circuit breaker: stop calling CSP while it keeps failing, then try it with one call."""

import time
from dataclasses import dataclass
from enum import IntEnum

from prometheus_client import Gauge

UNAUTHORIZED = Gauge(
    "broker_csp_unauthorized", "1 while CSP refuses the broker's token, and deletions or creations wait"
)


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


class CspCircuit:
    """Decides by two circuit breakers whether a service calls CSP: one for failures, and one for refusals of the
    token, which the first refusal opens."""

    def __init__(self, threshold: int, timeout_sec: float) -> None:
        self._failures = CircuitBreaker(threshold, timeout_sec)
        self._refusals = CircuitBreaker(1, timeout_sec)

    @property
    def state(self) -> State:
        """CLOSED: call CSP within the throttles. HALF_OPEN: call it once. OPEN: do not call it."""
        now = time.monotonic()
        return max(self._failures.state(now), self._refusals.state(now))

    @property
    def seconds_until_half_open(self) -> float:
        now = time.monotonic()
        return max(self._failures.seconds_until_half_open(now), self._refusals.seconds_until_half_open(now))

    @property
    def obstacle(self) -> str:
        """The reason why the circuit is not closed."""
        if self._refusals.state(time.monotonic()) is not State.CLOSED:
            return "CSP refuses the broker's token"
        return "CSP keeps failing"

    def record_success(self) -> None:
        now = time.monotonic()
        self._failures.record_success(now)
        self._refusals.record_success(now)
        UNAUTHORIZED.set(0)

    def record_failure(self) -> None:
        self._failures.record_failure(time.monotonic())

    def record_unauthorized(self) -> None:
        self._refusals.record_failure(time.monotonic())
        UNAUTHORIZED.set(1)
