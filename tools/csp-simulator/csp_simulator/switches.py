"""Switches of the simulator: default, validation rule and meaning of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

OPERATIONS = {
    "listing": "listings",
    "create": "creates",
    "find": "finds",
    "delete": "deletes",
    "sign_in": "sign_ins",
    "account_switch": "account_switches",
    "current_user": "current_users",
    "service_listing": "service_listings",
    "service_delete": "service_deletes",
    "group_listing": "group_listings",
    "user_create": "user_creates",
    "user_find": "user_finds",
    "user_password": "user_passwords",
    "user_delete": "user_deletes",
}
"""Operations of the APIs, each with the plural for its `fail_next_…` switch."""

PAGE_FORMS = ("total", "token", "next", "header")

HANG, CUT, BOMB, FLOOD, DRIP = SPECIAL_STATUSES = "hang", "cut", "bomb", "flood", "drip"


@dataclass(frozen=True, slots=True)
class Switch:
    default: Any
    rule: str  # follows the name of the switch in an error message
    is_valid: Callable[[object], bool]
    meaning: str


def is_number(value: object, low: float, high: float) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and is_number(value, 0, 10**9)


def _is_status(value: object) -> bool:
    # 200 simulates a proxy that answers with its own page, or a server that reports success without an effect.
    return value in SPECIAL_STATUSES or (isinstance(value, int) and (value == 200 or is_number(value, 400, 599)))


def _is_status_or_list(value: object) -> bool:
    return _is_status(value) or (isinstance(value, list) and value != [] and all(map(_is_status, value)))


def _seconds_switch(meaning: str, default: float = 0.0) -> Switch:
    return Switch(default, "must be seconds from 0 to 3600", lambda v: is_number(v, 0, 3600), meaning)


def _fraction_switch(default: float, meaning: str) -> Switch:
    return Switch(default, "must be a number from 0 to 1", lambda v: is_number(v, 0, 1), meaning)


def _count_switch(meaning: str) -> Switch:
    return Switch(0, "must be an integer from 0", is_count, meaning)


def _flag_switch(meaning: str) -> Switch:
    return Switch(False, "must be true or false", lambda value: isinstance(value, bool), meaning)


PER_OPERATION: Mapping[str, Switch] = {
    "{operation}_latency_sec": _seconds_switch("duration of a call"),
    "{operation}_latency_spread_sec": _seconds_switch("upper bound of a random extra duration"),
    "{operation}_error_rate": _fraction_switch(0.0, "probability of a failure"),
    "{operation}_error_status": Switch(
        500,
        f'must be 200, an error status from 400 to 599, "{HANG}", "{CUT}", "{BOMB}", "{FLOOD}", "{DRIP}", or a list'
        " of these",
        _is_status_or_list,
        f'kind of failure; "{HANG}" never answers, "{CUT}" closes the connection in the middle of the response,'
        f' "{BOMB}" answers 200 with 255 KiB of gzip that decode to 256 MiB, "{FLOOD}" and "{DRIP}" answer 200 with'
        " an endless body, as fast as the client reads or one byte every 50 ms; from a list, one is chosen at"
        " random",
    ),
    "{operation}_error_html": _flag_switch("failures have an HTML body instead of JSON"),
    "fail_next_{plural}": _count_switch("number of next calls to fail, regardless of the rate; counts down"),
}

COMMON: Mapping[str, Switch] = {
    "create_error_after_effect": _flag_switch("a failed creation takes effect"),
    "create_usable_after_sec": _seconds_switch(
        "time from the creation of an account until it is active; before, its state is pending; applies to new"
        " creations"
    ),
    "create_listed_after_sec": _seconds_switch(
        "time from the creation of an account until the listing contains it; a look-up by name finds it at once;"
        " applies to new creations"
    ),
    "create_quota": Switch(
        None,
        "must be an integer from 0, or null",
        lambda value: value is None or is_count(value),
        "number of sandbox accounts at which creations are refused; null: no quota",
    ),
    "create_quota_status": Switch(
        403,
        "must be an error status from 400 to 499",
        lambda value: isinstance(value, int) and is_number(value, 400, 499),
        "status of a refused creation",
    ),
    "delete_error_after_effect": _flag_switch("a failed deletion takes effect"),
    "undeletable": Switch(
        [],
        "must be a list of account UUIDs",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "accounts whose deletions always fail",
    ),
    "service_delete_error_after_effect": _flag_switch("a failed deletion takes effect"),
    "deleted_stay_listed": Switch(
        0,
        "must be an integer from 0, or null",
        lambda value: value is None or is_count(value),
        "number of listings that still contain an account after its deletion; null: all; applies to new deletions",
    ),
    "listing_fraction": _fraction_switch(
        1.0, "fraction of the accounts to list, from the first; 0: an empty listing"
    ),
    "listing_cut_short": _flag_switch("truncate the listing to half its bytes, with a matching Content-Length"),
    "listing_duplicates": _count_switch("number of sandboxes, from the first, to list again at the end"),
    "listing_malformed": _count_switch("number of sandboxes, from the last, to list with a missing or wrong field"),
    "listing_page_size": _count_switch(
        "records on a page of the listing, 0: one page; the parameter _offset or _page_token asks for another page,"
        " and each page counts as a listing"
    ),
    "listing_page_form": Switch(
        "total",
        f"must be one of {', '.join(PAGE_FORMS)}",
        lambda value: value in PAGE_FORMS,
        "how a page names the next one: the total number of records only, a page_token, or a link in the field next"
        " or in the header Link",
    ),
    "listing_pages_missing": _count_switch("number of last pages that the listing states and does not contain"),
    "retry_after_sec": Switch(
        None,
        "must be seconds from 0 to 3600, or null",
        lambda value: value is None or is_number(value, 0, 3600),
        "value of Retry-After in failures with status 429 or 503",
    ),
    "account_switch_without_effect": _flag_switch(
        "answer account switches with success, but leave the session in its account"
    ),
    "account_switch_ready_after_sec": _seconds_switch(
        "time from the first switch into an account until switches into it succeed"
    ),
    "account_switch_not_ready_status": Switch(
        403,
        "must be an error status from 400 to 599",
        lambda value: isinstance(value, int) and is_number(value, 400, 599),
        "status of a switch before that time",
    ),
    "user_create_error_after_effect": _flag_switch("a failed creation of a user takes effect"),
    "user_password_error_after_effect": _flag_switch("a failed change of a password takes effect"),
    "user_delete_error_after_effect": _flag_switch("a failed deletion of a user takes effect"),
    "reject_sign_ins": _flag_switch("answer 401 to every sign-in, as after a change of the password"),
    "reject_tokens": _flag_switch("answer 401 to every token and JWT, as after a rotation"),
    "jwt_lifetime_sec": _seconds_switch("lifetime of a JWT", default=3600.0),
}

SWITCHES: Mapping[str, Switch] = {
    **{
        name.format(operation=operation, plural=plural): replace(switch, meaning=f"{operation}: {switch.meaning}")
        for operation, plural in OPERATIONS.items()
        for name, switch in PER_OPERATION.items()
    },
    **COMMON,
}


def find_problems(changes: Mapping[str, object]) -> list[str]:
    """Return one error message per unknown or invalid switch. Each begins with the switch's name."""
    return [
        f"{name} {SWITCHES[name].rule}" if name in SWITCHES else f"{name} is unknown"
        for name, value in changes.items()
        if name not in SWITCHES or not SWITCHES[name].is_valid(value)
    ]
