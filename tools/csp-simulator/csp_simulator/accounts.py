"""The accounts the simulator has: listed, deleted, and kept in a file between two runs."""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

FIRST_CSP_ID = 2012224
# Listed beside the sandboxes, so that whoever reads the listing must tell them apart.
DECOYS = (("sandbox", "disabled"), ("sandbox", "pending"), ("standard", "active"), ("partner", "active"))
FIRST_DECOY_CSP_ID = 1000001

ID_PATTERN = re.compile(r"identity/accounts/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)


class StateError(Exception):
    """The state file cannot be read, understood or written; the message is one line."""


class Entry(NamedTuple):
    """One listed record. It is encoded once: joining texts keeps a listing of 100,000 cheap."""

    external_id: str | None  # bare uuid, lower case; None for a record whose id is not one
    counts: bool  # an active sandbox, which the API may delete
    encoded: str


class Accounts:
    """The listing and its changes; csp_ids are never used twice, not even after a reset."""

    def __init__(self, state_file: Path | None = None) -> None:
        """Start from `state_file` if it exists, else with the decoys alone.

        Raises StateError for a file that is damaged or cannot be used.
        """
        self._state_file = state_file
        self._next_csp_id = FIRST_CSP_ID
        self._next_numbers: dict[str, int] = {}
        self._entries: dict[int, Entry] = {}
        self._positions: dict[str, list[int]] = {}  # several, when raw records repeat an id
        self._next_position = 0
        self._listing: bytes | None = None
        if state_file is not None and state_file.exists():
            self._load(state_file)
        else:
            self._add_decoys()
            self._changed()

    def active_count(self) -> int:
        return sum(entry.counts for entry in self._entries.values())

    def listing(self, fraction: float = 1.0) -> bytes:
        """CSP's answer to a listing, of the first `fraction` (0 to 1) of the records."""
        if fraction < 1.0:
            return self._encode("results", list(self._encoded())[: int(len(self._entries) * fraction)])
        if self._listing is None:
            self._listing = self._encode("results", list(self._encoded()))
        return self._listing

    def dump(self) -> bytes:
        """All records as the control API shows them."""
        return self._encode("accounts", list(self._encoded()))

    def add(self, count: int, name_prefix: str) -> list[dict[str, Any]]:
        """Create `count` active sandboxes named prefix + number and return their records."""
        added = [self._new_sandbox(name_prefix) for _ in range(count)]
        for record in added:
            self._append(record)
        self._changed()
        return added

    def replace(self, records: list[Any]) -> None:
        """List exactly these records, whatever they are, from now on."""
        self._clear()
        for record in records:
            self._append(record)
        self._changed()

    def delete(self, external_id: str) -> bool:
        """Delete as the API does: False if no active sandbox has this id."""
        positions = self._positions.get(external_id.lower(), [])
        return any(self._entries[position].counts for position in positions) and self.drop(external_id)

    def drop(self, external_id: str) -> bool:
        """Take any record with this id out of the listing: False if there is none."""
        positions = self._positions.pop(external_id.lower(), [])
        for position in positions:
            del self._entries[position]
        if positions:
            self._changed()
        return bool(positions)

    def reset(self, count: int, name_prefix: str) -> None:
        """Forget all and start again with the decoys and `count` new sandboxes, numbered from 1."""
        self._clear()
        self._next_numbers.clear()
        self._add_decoys()
        self.add(count, name_prefix)

    def _new_sandbox(self, name_prefix: str) -> dict[str, Any]:
        csp_id = self._next_csp_id
        number = self._next_numbers.get(name_prefix, 1)
        self._next_csp_id += 1
        self._next_numbers[name_prefix] = number + 1
        return _record("sandbox", "active", f"{name_prefix}{number}", csp_id)

    def _add_decoys(self) -> None:
        for offset, (account_type, state) in enumerate(DECOYS):
            name = f"{account_type}-{state}"
            self._append(_record(account_type, state, name, FIRST_DECOY_CSP_ID + offset))

    def _append(self, record: Any) -> None:
        external_id, counts = None, False
        if isinstance(record, dict):
            match = ID_PATTERN.fullmatch(str(record.get("id")))
            external_id = match[1].lower() if match else None
            counts = (record.get("account_type"), record.get("state")) == ("sandbox", "active")
            if isinstance(record.get("csp_id"), int):
                self._next_csp_id = max(self._next_csp_id, record["csp_id"] + 1)
        self._entries[self._next_position] = Entry(external_id, counts, json.dumps(record))
        if external_id is not None:
            self._positions.setdefault(external_id, []).append(self._next_position)
        self._next_position += 1

    def _clear(self) -> None:
        self._entries.clear()
        self._positions.clear()

    def _encoded(self) -> Iterator[str]:
        return (entry.encoded for entry in self._entries.values())

    @staticmethod
    def _encode(key: str, records: list[str], head: str = "") -> bytes:
        return f'{{{head}"{key}": [{", ".join(records)}]}}'.encode()

    def _changed(self) -> None:
        self._listing = None
        if self._state_file is None:
            return
        numbers = json.dumps(self._next_numbers)
        head = f'"next_csp_id": {self._next_csp_id}, "next_numbers": {numbers}, '
        temporary = self._state_file.with_name(f".{self._state_file.name}.{os.getpid()}")
        try:
            temporary.write_bytes(self._encode("accounts", list(self._encoded()), head))
            temporary.replace(self._state_file)
        except OSError as error:
            raise StateError(f"cannot write the state file {self._state_file}: {error.strerror}") from error

    def _load(self, state_file: Path) -> None:
        try:
            state = json.loads(state_file.read_bytes())
            records = state["accounts"]
            self._next_csp_id = int(state["next_csp_id"])
            self._next_numbers = {name: int(number) for name, number in state["next_numbers"].items()}
            for record in records:
                self._append(record)
        except OSError as error:
            raise StateError(f"cannot read the state file {state_file}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(f"the state file {state_file} is damaged; delete it to start afresh") from error


def _record(account_type: str, state: str, name: str, csp_id: int) -> dict[str, Any]:
    return {
        "account_type": account_type,
        "state": state,
        "id": f"identity/accounts/{uuid.uuid4()}",
        "name": name,
        "csp_id": csp_id,
        "created_at": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        # One in five has none, as in CSP.
        "sfdc_account_id": None if csp_id % 5 == 0 else f"001SIM{csp_id:012d}",
    }


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
