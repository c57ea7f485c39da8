"""Account records of the listing: build them, validate them, or damage them."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

# Accounts listed beside the active sandboxes, because a client must filter them out.
DECOYS = (("sandbox", "disabled"), ("sandbox", "pending"), ("standard", "active"), ("partner", "active"))

ID_PATTERN = re.compile(r"identity/accounts/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)


def build_record(account_type: str, state: str, name: str, csp_id: int, external_id: object) -> dict[str, Any]:
    return {
        "account_type": account_type,
        "state": state,
        "id": f"identity/accounts/{external_id}",
        "name": name,
        "csp_id": csp_id,
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        # One account in five has no Salesforce id, as in CSP.
        "sfdc_account_id": None if csp_id % 5 == 0 else f"001SIM{csp_id:012d}",
    }


def is_sandbox(record: object) -> bool:
    return isinstance(record, dict) and record.get("account_type") == "sandbox"


def is_active_sandbox(record: object) -> bool:
    type_and_state = (record.get("account_type"), record.get("state")) if isinstance(record, dict) else None
    return type_and_state == ("sandbox", "active")


def extract_external_id(record: object) -> str | None:
    """Return the UUID of the record's id in lower case, or None if the id is malformed."""
    match = ID_PATTERN.fullmatch(str(record.get("id"))) if isinstance(record, dict) else None
    return match[1].lower() if match else None


def damage_record(record: dict[str, Any], number: int) -> object:
    """Return a damaged copy of the record. `number` selects one of seven kinds of damage."""
    variants: tuple[object, ...] = (
        {**record, "name": None},
        {**record, "id": str(record.get("id")).rpartition("/")[2]},
        {key: value for key, value in record.items() if key != "id"},
        {key: value for key, value in record.items() if key != "state"},
        {**record, "csp_id": f"id-{record.get('csp_id')}"},
        {key: value for key, value in record.items() if key != "csp_id"},
        None,
    )
    return variants[number % len(variants)]


def find_problem(records: list[Any]) -> str | None:
    """Return the first problem if the records are not a valid listing."""
    seen_keys: set[object] = set()
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            return f"accounts[{index}] must be an object"
        for name, (rule, is_valid) in RECORD_RULES.items():
            if not is_valid(record.get(name)):
                return f"accounts[{index}].{name} {rule}"
        keys = {record["id"].lower(), record["csp_id"]}
        if keys & seen_keys:
            return f"accounts[{index}] repeats an earlier id or csp_id"
        seen_keys |= keys
    return None


def _is_nonblank_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


RECORD_RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "account_type": ("must be a non-blank string", _is_nonblank_text),
    "state": ("must be a non-blank string", _is_nonblank_text),
    "id": ("must be identity/accounts/<uuid>", lambda v: ID_PATTERN.fullmatch(str(v)) is not None),
    "name": ("must be a non-blank string", _is_nonblank_text),
    "csp_id": ("must be a positive integer", lambda v: type(v) is int and v > 0),
    "created_at": ("must be a non-blank string", _is_nonblank_text),
    "sfdc_account_id": ("must be a string or null", lambda v: isinstance(v, str | None)),
}
