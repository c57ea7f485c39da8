"""Rate limit: how many requests a client may send, in windows that begin with its first request. Counted in this
process."""

import math
import re
import time
from collections import OrderedDict
from dataclasses import dataclass

from gateway.api.errors import ApiError

MAX_COUNTERS = 100_000
"""Counters that a RateLimit keeps. When there are more, the oldest one starts again."""

_FAILED_SHARE = 20
_FAILED_AT_LEAST = 10

_RATE = re.compile(r"([0-9]{1,9}) ?(?:/|per) ?([0-9]{1,5} )?(second|minute|hour|day)s?")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True, slots=True)
class Rate:
    amount: int
    window_sec: int


def rate(text: str) -> Rate:
    """From "2000/5 minutes". Raises ValueError."""
    found = _RATE.fullmatch(text)
    amount, windows = (int(found[1]), int(found[2] or 1)) if found else (0, 0)
    if found is None or amount < 1 or windows < 1:
        raise ValueError("must be like 2000/5 minutes, or empty")
    return Rate(amount, windows * _SECONDS[found[3]])


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a client is in its window."""

    limit: int
    remaining: int
    reset: int
    """Unix seconds, when the window ends."""
    over: bool

    @property
    def retry_after(self) -> int:
        return max(1, math.ceil(self.reset - time.time()))


class _Window:
    __slots__ = ("count", "ends")

    def __init__(self, ends: float) -> None:
        self.count = 0
        self.ends = ends


class RateLimit:
    """Counts requests by key: the address of a client, or a token and a student."""

    def __init__(self, rate: Rate, *, max_counters: int = MAX_COUNTERS) -> None:
        self._rate = rate
        self._max_counters = max_counters
        # In the order of their starts, which is the order of their ends, because all windows are equally long.
        self._windows: OrderedDict[bytes | str, _Window] = OrderedDict()

    def hit(self, key: bytes | str) -> Standing:
        """Count a request."""
        now = time.time()
        window = self._windows.get(key)
        if window is None or window.ends <= now:
            window = self._open(key, now)
        window.count += 1
        amount, count = self._rate.amount, window.count
        return Standing(amount, max(0, amount - count), math.ceil(window.ends), count > amount)

    def _open(self, key: bytes | str, now: float) -> _Window:
        windows = self._windows
        windows.pop(key, None)
        # Two for each new one: the table shrinks, and no request pays for a whole class whose windows ended.
        for _ in range(2):
            oldest = next(iter(windows), None)
            if oldest is None or (len(windows) < self._max_counters and windows[oldest].ends > now):
                break
            del windows[oldest]
        window = windows[key] = _Window(now + self._rate.window_sec)
        return window


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests with a known token and requests without one have counters of their own, so that clients without a
    token can neither use up nor push out the counter of a client with one."""

    students: RateLimit
    """Requests with a known token, by token and student."""
    addresses: RateLimit
    """Requests without a known token, by client address."""
    failures: RateLimit
    """Those among them that were refused for lack of a known token, by client address."""


def build_rate_limits(rate: Rate) -> Limits:
    """The limit of failures is a twentieth of `rate`, and at least 10 requests."""
    failures = max(_FAILED_AT_LEAST, rate.amount // _FAILED_SHARE)
    return Limits(RateLimit(rate), RateLimit(rate), RateLimit(Rate(failures, rate.window_sec)))


def exceeded(standing: Standing, *, known_token: bool) -> ApiError:
    wait = standing.retry_after
    clients = "with this token for one student" if known_token else "without a known token from this address"
    return ApiError("RATE_LIMITED", f"Too many requests {clients}. Try again in {wait} seconds.", retry_after=wait)
