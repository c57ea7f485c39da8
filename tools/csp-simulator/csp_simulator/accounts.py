"""Accounts of the simulator. A state file keeps them between runs."""

import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from csp_simulator.records import (
    DECOYS,
    build_record,
    damage_record,
    extract_external_id,
    is_active_sandbox,
    is_sandbox,
)

FIRST_CSP_ID = 2012224
FIRST_DECOY_CSP_ID = 1000001


class StateError(Exception):
    """The state file cannot be read, parsed or written. The message is one line."""


class Entry(NamedTuple):
    """Listed record. It is encoded once, because joining bytes keeps a listing of 100,000 accounts cheap."""

    external_id: str | None
    is_active: bool  # an active sandbox, which the API can delete
    encoded: bytes


class NewAccount(NamedTuple):
    """Times in Unix seconds from which a created account is listed and is active."""

    listed_at: float
    usable_at: float


class AccountStore:
    """All accounts, in the order of the listing. A csp_id is never used again, not even after a reset."""

    def __init__(
        self, state_file: Path | None = None, seed: int | None = None, now: Callable[[], float] = time.time
    ) -> None:
        """Load `state_file` if it exists; otherwise start with the decoys only.

        `seed` makes the ids of new accounts and the choices of `disturb_sandboxes` repeatable. Raises
        `StateError` for a damaged or unusable file.
        """
        self._state_file = state_file
        self._now = now
        self._seed_random(seed)
        self._next_csp_id = FIRST_CSP_ID
        self._next_numbers: dict[str, int] = {}
        self._entries: dict[int, Entry] = {}
        self._positions: dict[str, list[int]] = {}  # several if raw records repeat an id
        self._listings_left: dict[int, int | None] = {}  # of deleted accounts that stay listed; None: unlimited
        self._new: dict[int, NewAccount] = {}
        self._next_position = 0
        self._cached_listing: bytes | None = None
        if state_file is not None and state_file.exists():
            self._load(state_file)
        else:
            self._add_decoys()
            self._save()

    def count_sandboxes(self) -> int:
        """Count the active sandboxes, and the created ones that are not active yet."""
        self._advance()
        pending = (position for position in self._new if not self._entries[position].is_active)
        return len(self._list_active_ids()) + sum(1 for _ in pending)

    def count_active(self) -> int:
        return len(self._list_active_ids())

    def build_listing(self, fraction: float = 1.0, duplicates: int = 0, malformed: int = 0) -> bytes:
        """Build the response body of a listing.

        It contains the first `fraction` (0 to 1) of the records. The last `malformed` sandboxes are damaged. The
        first `duplicates` sandboxes are repeated at the end.
        """
        self._advance()
        if (fraction, duplicates, malformed) == (1.0, 0, 0) and not self._new:
            if self._cached_listing is None:
                self._cached_listing = _encode("results", (entry.encoded for entry in self._entries.values()))
            body = self._cached_listing
        else:
            entries = list(self._listed_entries())
            entries = entries[: int(len(entries) * fraction)]
            sandboxes = [index for index, entry in enumerate(entries) if entry.is_active]
            listed = [entry.encoded for entry in entries]
            repeated = [listed[index] for index in sandboxes[:duplicates]]
            for number, index in enumerate(sandboxes[-malformed:] if malformed else ()):
                listed[index] = json.dumps(damage_record(json.loads(listed[index]), number)).encode()
            body = _encode("results", listed + repeated)
        self._count_down_listings()
        return body

    def dump_records(self) -> bytes:
        """Return all records, without deleted ones, as the JSON body of the control API."""
        self._advance()
        return _encode("accounts", self._encoded_records())

    def create_account(self, name: str, *, listed_after_sec: float = 0, usable_after_sec: float = 0) -> str:
        """Create one sandbox and return its UUID. It is pending until it is usable."""
        csp_id = self._next_csp_id
        external_id = str(self._derive_uuid(csp_id))
        now = self._now()
        self._new[self._next_position] = NewAccount(now + listed_after_sec, now + usable_after_sec)
        self._append_record(build_record("sandbox", "pending", name, csp_id, external_id))
        self._advance()
        self._save()
        return external_id

    def find_sandboxes(self, name: str) -> list[dict[str, Any]]:
        """Return the records of the sandboxes with this name, also of pending and unlisted ones."""
        self._advance()
        records = map(json.loads, self._encoded_records())
        return [record for record in records if is_sandbox(record) and record.get("name") == name]

    def create_sandboxes(self, count: int, name_prefix: str) -> list[dict[str, Any]]:
        """Create `count` active sandboxes, named prefix plus number, and return their records."""
        created = [self._build_sandbox(name_prefix) for _ in range(count)]
        self.append_records(created)
        return created

    def append_records(self, records: list[Any]) -> None:
        """Append raw records to the listing, valid or not."""
        for record in records:
            self._append_record(record)
        self._save()

    def replace_records(self, records: list[Any]) -> None:
        """Replace the whole listing with raw records, valid or not."""
        self._clear()
        self.append_records(records)

    def delete_sandbox(self, external_id: str, stay_listed: int | None = 0) -> bool:
        """Delete an active sandbox. Return False for an unknown id.

        The sandbox stays in the next `stay_listed` listings (None: in all).
        """
        self._advance()
        positions = self._positions.get(external_id.lower(), [])
        if not any(self._entries[position].is_active for position in positions):
            return False
        if stay_listed == 0:
            return self.remove_account(external_id)
        self._listings_left |= dict.fromkeys(self._positions.pop(external_id.lower()), stay_listed)
        self._save()
        return True

    def remove_account(self, external_id: str) -> bool:
        """Remove all records with this id. Return False for an unknown id."""
        positions = self._positions.pop(external_id.lower(), [])
        for position in positions:
            del self._entries[position]
        if positions:
            self._save()
        return bool(positions)

    def has_active_sandbox(self, external_id: str) -> bool:
        self._advance()
        return any(self._entries[position].is_active for position in self._positions.get(external_id.lower(), []))

    def update_account(self, external_id: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Change fields of an account, also its id. Return the new record, or None for an unknown id."""
        record = None
        for position in self._positions.pop(external_id.lower(), []):
            record = {**json.loads(self._entries[position].encoded), **changes}
            self._store_record(position, record)
        if record is not None:
            self._save()
        return record

    def disturb_sandboxes(self, *, drop: int = 0, rename: int = 0, new_id: int = 0) -> dict[str, list[str]]:
        """Remove, rename or change the ids of random sandboxes. Return the old ids by kind of change."""
        active_ids = list(dict.fromkeys(self._list_active_ids()))
        picked = self._random.sample(active_ids, min(drop + rename + new_id, len(active_ids)))
        changed = {
            "drop": picked[:drop],
            "rename": picked[drop : drop + rename],
            "new_id": picked[drop + rename :],
        }
        for external_id in changed["drop"]:
            self.remove_account(external_id)
        for external_id in changed["rename"]:
            name = json.loads(self._entries[self._positions[external_id][0]].encoded).get("name")
            self.update_account(external_id, {"name": f"{name}-renamed"})
        for external_id in changed["new_id"]:
            self.update_account(external_id, {"id": f"identity/accounts/{self._derive_uuid(external_id)}"})
        return changed

    def reset(self, count: int, name_prefix: str, seed: int | None = None) -> None:
        """Remove all accounts, then create the decoys and `count` new sandboxes, numbered from 1."""
        if seed is not None:
            self._seed_random(seed)
        self._clear()
        self._next_numbers.clear()
        self._add_decoys()
        self.create_sandboxes(count, name_prefix)

    def _seed_random(self, seed: int | None) -> None:
        self._seed = random.getrandbits(64) if seed is None else seed
        self._random = random.Random(self._seed)

    def _derive_uuid(self, purpose: object) -> uuid.UUID:
        # Derived from the next csp_id, which is never used again: a restart with the same seed repeats no id.
        return uuid.uuid5(uuid.NAMESPACE_OID, f"{self._seed}/{self._next_csp_id}/{purpose}")

    def _build_sandbox(self, name_prefix: str) -> dict[str, Any]:
        csp_id = self._next_csp_id
        number = self._next_numbers.get(name_prefix, 1)
        record = build_record("sandbox", "active", f"{name_prefix}{number}", csp_id, self._derive_uuid(csp_id))
        self._next_csp_id += 1
        self._next_numbers[name_prefix] = number + 1
        return record

    def _add_decoys(self) -> None:
        for csp_id, (account_type, state) in enumerate(DECOYS, FIRST_DECOY_CSP_ID):
            name = f"{account_type}-{state}"
            self._append_record(build_record(account_type, state, name, csp_id, self._derive_uuid(csp_id)))

    def _advance(self) -> None:
        """Activate the created accounts that have become usable."""
        now = self._now()
        ended = [
            position for position, new in self._new.items() if max(new) <= now or position not in self._entries
        ]
        for position, new in self._new.items():
            if position in self._entries and new.usable_at <= now and not self._entries[position].is_active:
                record = {**json.loads(self._entries[position].encoded), "state": "active"}
                self._entries[position] = _build_entry(record)
        for position in ended:
            del self._new[position]
        if ended:
            self._save()

    def _listed_entries(self) -> Iterator[Entry]:
        now = self._now()
        for position, entry in self._entries.items():
            if position not in self._new or self._new[position].listed_at <= now:
                yield entry

    def _list_active_ids(self) -> list[str]:
        return [
            entry.external_id
            for position, entry in self._entries.items()
            if entry.is_active and entry.external_id is not None and position not in self._listings_left
        ]

    def _append_record(self, record: Any) -> None:
        self._store_record(self._next_position, record)
        self._next_position += 1

    def _store_record(self, position: int, record: Any) -> None:
        if isinstance(record, dict) and isinstance(record.get("csp_id"), int):
            self._next_csp_id = max(self._next_csp_id, record["csp_id"] + 1)
        entry = self._entries[position] = _build_entry(record)
        if entry.external_id is not None:
            self._positions.setdefault(entry.external_id, []).append(position)

    def _count_down_listings(self) -> None:
        """Remove deleted accounts after the last listing that still contains them."""
        for position, listings in list(self._listings_left.items()):
            if listings == 1:
                del self._listings_left[position], self._entries[position]
                self._cached_listing = None
            elif listings is not None:
                self._listings_left[position] = listings - 1

    def _clear(self) -> None:
        self._entries.clear()
        self._positions.clear()
        self._listings_left.clear()
        self._new.clear()

    def _encoded_records(self) -> Iterable[bytes]:
        return (entry.encoded for position, entry in self._entries.items() if position not in self._listings_left)

    def _save(self) -> None:
        """Drop the cached listing, and write the state file atomically."""
        self._cached_listing = None
        if self._state_file is None:
            return
        numbers = json.dumps(self._next_numbers)
        new = json.dumps({self._entries[position].external_id: times for position, times in self._new.items()})
        head = f'"next_csp_id": {self._next_csp_id}, "next_numbers": {numbers}, "new": {new}, '
        temporary = self._state_file.with_name(f".{self._state_file.name}.{os.getpid()}")
        try:
            temporary.write_bytes(_encode("accounts", self._encoded_records(), head))
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
                self._append_record(record)
            for external_id, (listed_at, usable_at) in state.get("new", {}).items():
                self._new[self._positions[external_id][0]] = NewAccount(float(listed_at), float(usable_at))
        except OSError as error:
            raise StateError(f"cannot read the state file {state_file}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise StateError(
                f"the state file {state_file} is damaged; delete it to start with new accounts"
            ) from error


def _build_entry(record: Any) -> Entry:
    return Entry(extract_external_id(record), is_active_sandbox(record), json.dumps(record).encode())


def _encode(key: str, records: Iterable[bytes], head: str = "") -> bytes:
    return b"".join((f'{{{head}"{key}": ['.encode(), b", ".join(records), b"]}"))
