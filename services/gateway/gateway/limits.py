"""How often one client address may ask: in this process, in windows that begin with a client's first request."""

import math
import re
import time
from dataclasses import dataclass

from cachetools import TTLCache

from gateway.errors import ApiError

MAX_ADDRESSES = 100_000
"""That are remembered. With more of them in one window, those not heard of for longest begin anew."""

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
    """Where an address is in its window."""

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
    """Counts by address."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._windows: TTLCache[str, _Window] = TTLCache(MAX_ADDRESSES, rate.window_sec, timer=time.time)

    def hit(self, address: str) -> Standing:
        window = self._windows.get(address)
        if window is None:
            window = self._windows[address] = _Window(time.time() + self._rate.window_sec)
        window.count += 1
        amount, count = self._rate.amount, window.count
        return Standing(amount, max(0, amount - count), math.ceil(window.ends), count > amount)


@dataclass(frozen=True, slots=True)
class Limits:
    requests: RateLimit
    failures: RateLimit
    """Requests without a known token."""


def of(rate: Rate) -> Limits:
    """A twentieth of the requests may lack a known token, 10 at least."""
    failures = max(_FAILED_AT_LEAST, rate.amount // _FAILED_SHARE)
    return Limits(RateLimit(rate), RateLimit(Rate(failures, rate.window_sec)))


def exceeded(standing: Standing, what: str) -> ApiError:
    wait = standing.retry_after
    return ApiError("RATE_LIMITED", f"{what} from this address. Try again in {wait} seconds.", retry_after=wait)
