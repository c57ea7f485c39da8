"""How the simulator misbehaves: one flat set of switches, and the chance that applies them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from starlette.responses import HTMLResponse, JSONResponse, Response

ERROR_PAGE = "<html><head><title>Error</title></head><body><h1>upstream error</h1></body></html>"


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _rule(text: str, holds: Callable[[object], bool]) -> Mapping[str, Any]:
    return {"rule": text, "holds": holds}


SECONDS = _rule("must be seconds from 0 to 3600", lambda value: _number(value, 0, 3600))
OPTIONAL_SECONDS = _rule("must be seconds from 0 to 3600, or null", lambda v: v is None or _number(v, 0, 3600))
RATE = _rule("must be a number from 0 to 1", lambda value: _number(value, 0, 1))
COUNT = _rule("must be an integer from 0", lambda v: isinstance(v, int) and _number(v, 0, 10**9))
# 200 is among them for the proxy that answers with its own page and the server that lies.
STATUS = _rule(
    "must be 200 or an error status from 400 to 599",
    lambda v: isinstance(v, int) and (v == 200 or _number(v, 400, 599)),
)
FLAG = _rule("must be true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The switches; as they stand here, the simulator does everything right and at once.

    An injected error never changes an account. `fail_next_*` counts down, one a call, and comes
    before the error rate. `retry_after_sec` goes out as Retry-After with injected 429 and 503.
    `listing_fraction` serves only the first part of the accounts, as sound JSON; `listing_cut_short`
    sends half of the bytes. `reject_tokens` answers 401 to every token, as after a rotation.
    A hang is a latency longer than the client waits.
    """

    delete_latency_sec: float = field(default=0.0, metadata=SECONDS)
    delete_error_rate: float = field(default=0.0, metadata=RATE)
    delete_error_status: int = field(default=500, metadata=STATUS)
    delete_error_html: bool = field(default=False, metadata=FLAG)
    fail_next_deletes: int = field(default=0, metadata=COUNT)
    listing_latency_sec: float = field(default=0.0, metadata=SECONDS)
    listing_error_rate: float = field(default=0.0, metadata=RATE)
    listing_error_status: int = field(default=500, metadata=STATUS)
    listing_error_html: bool = field(default=False, metadata=FLAG)
    fail_next_listings: int = field(default=0, metadata=COUNT)
    listing_fraction: float = field(default=1.0, metadata=RATE)
    listing_cut_short: bool = field(default=False, metadata=FLAG)
    retry_after_sec: float | None = field(default=None, metadata=OPTIONAL_SECONDS)
    reject_tokens: bool = field(default=False, metadata=FLAG)


RULES = {switch.name: switch.metadata for switch in fields(Behaviour)}


class Faults:
    """The behaviour in force, and the decision for each call as it arrives."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Behave well again, and begin the seeded chance anew."""
        self.behaviour = Behaviour()
        self._random = random.Random(self._seed)

    def patch(self, changes: Mapping[str, Any]) -> None:
        """Set these switches, all or none; ValueError says which is unknown or wrong."""
        problems = [f"{name} is unknown" for name in changes if name not in RULES]
        problems += [
            f"{name} {RULES[name]['rule']}"
            for name, value in changes.items()
            if name in RULES and not RULES[name]["holds"](value)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.behaviour = replace(self.behaviour, **changes)

    def for_delete(self) -> Response | None:
        """The error to answer this deletion with, or None."""
        now = self.behaviour
        if now.fail_next_deletes > 0:
            self.behaviour = replace(now, fail_next_deletes=now.fail_next_deletes - 1)
        elif self._random.random() >= now.delete_error_rate:
            return None
        return self._error(now.delete_error_status, html=now.delete_error_html)

    def for_listing(self) -> Response | None:
        """The error to answer this listing with, or None."""
        now = self.behaviour
        if now.fail_next_listings > 0:
            self.behaviour = replace(now, fail_next_listings=now.fail_next_listings - 1)
        elif self._random.random() >= now.listing_error_rate:
            return None
        return self._error(now.listing_error_status, html=now.listing_error_html)

    def _error(self, status: int, *, html: bool) -> Response:
        headers = {}
        if self.behaviour.retry_after_sec is not None and status in (429, 503):
            headers["Retry-After"] = f"{self.behaviour.retry_after_sec:g}"
        if html:
            return HTMLResponse(ERROR_PAGE, status, headers)
        return JSONResponse({"error": "injected by the simulator"}, status, headers)
