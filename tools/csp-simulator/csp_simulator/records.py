"""What a record of the listing looks like: sound, checked, or damaged on purpose."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

# Listed beside the sandboxes, so that whoever reads the listing must tell them apart.
DECOYS = (("sandbox", "disabled"), ("sandbox", "pending"), ("standard", "active"), ("partner", "active"))

ID_PATTERN = re.compile(r"identity/accounts/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)


def new_record(account_type: str, state: str, name: str, csp_id: int, external_id: object) -> dict[str, Any]:
    return {
        "account_type": account_type,
        "state": state,
        "id": f"identity/accounts/{external_id}",
        "name": name,
        "csp_id": csp_id,
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        # One in five has none, as in CSP.
        "sfdc_account_id": None if csp_id % 5 == 0 else f"001SIM{csp_id:012d}",
    }


def is_active_sandbox(record: object) -> bool:
    kind = (record.get("account_type"), record.get("state")) if isinstance(record, dict) else None
    return kind == ("sandbox", "active")


def external_id_of(record: object) -> str | None:
    """The bare uuid in lower case; None for a record whose id is not one."""
    match = ID_PATTERN.fullmatch(str(record.get("id"))) if isinstance(record, dict) else None
    return match[1].lower() if match else None


def damaged(record: dict[str, Any], number: int) -> object:
    """The record with something missing or wrong, in one of seven ways."""
    ways: tuple[object, ...] = (
        {**record, "name": None},
        {**record, "id": str(record.get("id")).rpartition("/")[2]},
        {key: value for key, value in record.items() if key != "id"},
        {key: value for key, value in record.items() if key != "state"},
        {**record, "csp_id": f"id-{record.get('csp_id')}"},
        {key: value for key, value in record.items() if key != "csp_id"},
        None,
    )
    return ways[number % len(ways)]


def problem_with(records: list[Any]) -> str | None:
    """Say what stops these records from being a sound listing, or None."""
    seen: set[object] = set()
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            return f"accounts[{index}] must be an object"
        for name, (rule, holds) in RECORD_RULES.items():
            if not holds(record.get(name)):
                return f"accounts[{index}].{name} {rule}"
        keys = {record["id"].lower(), record["csp_id"]}
        if keys & seen:
            return f"accounts[{index}] repeats an earlier id or csp_id"
        seen |= keys
    return None


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


RECORD_RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "account_type": ("must be a text that is not blank", _is_filled),
    "state": ("must be a text that is not blank", _is_filled),
    "id": ("must be identity/accounts/<uuid>", lambda v: ID_PATTERN.fullmatch(str(v)) is not None),
    "name": ("must be a text that is not blank", _is_filled),
    "csp_id": ("must be a positive integer", lambda v: type(v) is int and v > 0),
    "created_at": ("must be a text that is not blank", _is_filled),
    "sfdc_account_id": ("must be a text or null", lambda v: isinstance(v, str | None)),
}
