"""What can be set while the simulator runs: every switch with its default, its rule and its meaning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

OPERATIONS = {
    "listing": "listings",
    "delete": "deletes",
    "sign_in": "sign_ins",
    "account_switch": "account_switches",
    "current_user": "current_users",
    "service_listing": "service_listings",
    "service_delete": "service_deletes",
}
"""What the APIs do, and the plural that `fail_next_…` ends in."""

HANG, CUT, BOMB, FLOOD, DRIP = NO_STATUS = "hang", "cut", "bomb", "flood", "drip"


@dataclass(frozen=True, slots=True)
class Switch:
    default: Any
    rule: str  # what follows the name of the switch in a complaint
    holds: Callable[[object], bool]
    meaning: str


def is_number(value: object, low: float, high: float) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and is_number(value, 0, 10**9)


def _is_status(value: object) -> bool:
    # 200 is among them for the proxy that answers with its own page and the server that lies.
    return value in NO_STATUS or (isinstance(value, int) and (value == 200 or is_number(value, 400, 599)))


def _are_statuses(value: object) -> bool:
    return _is_status(value) or (isinstance(value, list) and value != [] and all(map(_is_status, value)))


def _seconds(meaning: str, default: float = 0.0) -> Switch:
    return Switch(default, "must be seconds from 0 to 3600", lambda v: is_number(v, 0, 3600), meaning)


def _fraction(default: float, meaning: str) -> Switch:
    return Switch(default, "must be a number from 0 to 1", lambda v: is_number(v, 0, 1), meaning)


def _count(meaning: str) -> Switch:
    return Switch(0, "must be an integer from 0", is_count, meaning)


def _flag(meaning: str) -> Switch:
    return Switch(False, "must be true or false", lambda value: isinstance(value, bool), meaning)


PER_OPERATION: Mapping[str, Switch] = {
    "{one}_latency_sec": _seconds("how long a call takes"),
    "{one}_latency_spread_sec": _seconds("up to this much longer, by chance"),
    "{one}_error_rate": _fraction(0.0, "how many of the calls fail, by chance"),
    "{one}_error_status": Switch(
        500,
        f'must be 200, an error status from 400 to 599, "{HANG}", "{CUT}", "{BOMB}", "{FLOOD}", "{DRIP}", or a list'
        " of these",
        _are_statuses,
        f'how a call fails; "{HANG}" never answers, "{CUT}" ends the connection in the middle of the answer,'
        f' "{BOMB}" answers 200 with 255 KiB of gzip for 256 MiB, "{FLOOD}" and "{DRIP}" answer 200 with a body'
        " without end, as fast as the client reads or a byte every 50 ms; of a list, chance takes one",
    ),
    "{one}_error_html": _flag("failures carry an HTML page instead of JSON"),
    "fail_next_{many}": _count("as many calls fail, whatever the rate; counts down"),
}

COMMON: Mapping[str, Switch] = {
    "delete_error_after_effect": _flag("a deletion that fails has happened all the same"),
    "service_delete_error_after_effect": _flag("a deletion that fails has happened all the same"),
    "deleted_stay_listed": Switch(
        0,
        "must be an integer from 0, or null",
        lambda value: value is None or is_count(value),
        "in how many more listings an account appears that is deleted from now on; null: in all",
    ),
    "listing_fraction": _fraction(1.0, "only this first part of the accounts is listed; 0: an empty listing"),
    "listing_cut_short": _flag("a listing is half of its bytes, under a sound Content-Length"),
    "listing_duplicates": _count("the first so many sandboxes are listed once more at the end"),
    "listing_malformed": _count("the last so many sandboxes are listed with something missing or wrong"),
    "retry_after_sec": Switch(
        None,
        "must be seconds from 0 to 3600, or null",
        lambda value: value is None or is_number(value, 0, 3600),
        "goes out as Retry-After with failures of status 429 and 503",
    ),
    "account_switch_without_effect": _flag(
        "an account switch answers as if all were well, and the session stays in the account it was in"
    ),
    "reject_tokens": _flag("401 to every token and JWT, as after a rotation"),
    "jwt_lifetime_sec": _seconds("how long a JWT is accepted", default=3600.0),
}

SWITCHES: Mapping[str, Switch] = {
    **{
        name.format(one=one, many=many): replace(switch, meaning=f"{one}: {switch.meaning}")
        for one, many in OPERATIONS.items()
        for name, switch in PER_OPERATION.items()
    },
    **COMMON,
}


def problems(changes: Mapping[str, object]) -> list[str]:
    """What is wrong with these settings, each complaint beginning with the name."""
    return [
        f"{name} {SWITCHES[name].rule}" if name in SWITCHES else f"{name} is unknown"
        for name, value in changes.items()
        if name not in SWITCHES or not SWITCHES[name].holds(value)
    ]
