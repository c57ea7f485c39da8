"""The accounts the simulator has: listed, deleted, disturbed, and kept in a file between two runs."""

import json
import os
import random
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from csp_simulator.records import DECOYS, damaged, external_id_of, is_active_sandbox, new_record

FIRST_CSP_ID = 2012224
FIRST_DECOY_CSP_ID = 1000001


class StateError(Exception):
    """The state file cannot be read, understood or written; the message is one line."""


class Entry(NamedTuple):
    """One listed record. It is encoded once: joining bytes keeps a listing of 100,000 cheap."""

    external_id: str | None
    counts: bool  # an active sandbox, which the API may delete
    encoded: bytes


class Accounts:
    """The listing and its changes; csp_ids are never used twice, not even after a reset."""

    def __init__(self, state_file: Path | None = None, seed: int | None = None) -> None:
        """Start from `state_file` if it exists, else with the decoys alone.

        `seed` makes the ids of new accounts repeatable, and what `disturb` picks. Raises StateError
        for a file that is damaged or cannot be used.
        """
        self._state_file = state_file
        self._seed_chance(seed)
        self._next_csp_id = FIRST_CSP_ID
        self._next_numbers: dict[str, int] = {}
        self._entries: dict[int, Entry] = {}
        self._positions: dict[str, list[int]] = {}  # several, when raw records repeat an id
        self._ghosts: dict[int, int | None] = {}  # deleted, and in so many listings still; None: in all
        self._next_position = 0
        self._listing: bytes | None = None
        if state_file is not None and state_file.exists():
            self._load(state_file)
        else:
            self._add_decoys()
            self._changed()

    def active_count(self) -> int:
        return len(self._active())

    def listing(self, fraction: float = 1.0, duplicates: int = 0, malformed: int = 0) -> bytes:
        """CSP's answer to a listing: the first `fraction` (0 to 1) of the records, the last `malformed`
        sandboxes of them damaged, and the first `duplicates` sandboxes once more at the end."""
        if (fraction, duplicates, malformed) == (1.0, 0, 0):
            if self._listing is None:
                self._listing = _encode("results", (entry.encoded for entry in self._entries.values()))
            body = self._listing
        else:
            entries = list(self._entries.values())[: int(len(self._entries) * fraction)]
            sandboxes = [index for index, entry in enumerate(entries) if entry.counts]
            listed = [entry.encoded for entry in entries]
            repeated = [listed[index] for index in sandboxes[:duplicates]]
            for number, index in enumerate(sandboxes[-malformed:] if malformed else ()):
                listed[index] = json.dumps(damaged(json.loads(listed[index]), number)).encode()
            body = _encode("results", listed + repeated)
        self._lay_ghosts()
        return body

    def dump(self) -> bytes:
        """All records there are, as the control API shows them; what is deleted is not among them."""
        return _encode("accounts", self._encoded())

    def add(self, count: int, name_prefix: str) -> list[dict[str, Any]]:
        """Create `count` active sandboxes named prefix + number and return their records."""
        added = [self._new_sandbox(name_prefix) for _ in range(count)]
        self.append(added)
        return added

    def append(self, records: list[Any]) -> None:
        """List these records too, whatever they are."""
        for record in records:
            self._append(record)
        self._changed()

    def replace(self, records: list[Any]) -> None:
        """List exactly these records, whatever they are, from now on."""
        self._clear()
        self.append(records)

    def delete(self, external_id: str, stay_listed: int | None = 0) -> bool:
        """Delete as the API does: False if no active sandbox has this id.

        It is in the next `stay_listed` listings all the same; None: in all of them.
        """
        positions = self._positions.get(external_id.lower(), [])
        if not any(self._entries[position].counts for position in positions):
            return False
        if stay_listed == 0:
            return self.drop(external_id)
        self._ghosts |= dict.fromkeys(self._positions.pop(external_id.lower()), stay_listed)
        self._changed()
        return True

    def drop(self, external_id: str) -> bool:
        """Take any record with this id out of the listing: False if there is none."""
        positions = self._positions.pop(external_id.lower(), [])
        for position in positions:
            del self._entries[position]
        if positions:
            self._changed()
        return bool(positions)

    def has(self, external_id: str) -> bool:
        """Whether an active sandbox has this id."""
        return any(self._entries[position].counts for position in self._positions.get(external_id.lower(), []))

    def change(self, external_id: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Change fields of the record with this id, its id included, and return it; None if there is none."""
        record = None
        for position in self._positions.pop(external_id.lower(), []):
            record = {**json.loads(self._entries[position].encoded), **changes}
            self._put(position, record)
        if record is not None:
            self._changed()
        return record

    def disturb(self, *, drop: int = 0, rename: int = 0, new_id: int = 0) -> dict[str, list[str]]:
        """Change as many sandboxes, picked by chance, none twice; returns the ids they had, by what was done."""
        active = list(dict.fromkeys(self._active()))
        picked = self._chance.sample(active, min(drop + rename + new_id, len(active)))
        done = {
            "drop": picked[:drop],
            "rename": picked[drop : drop + rename],
            "new_id": picked[drop + rename :],
        }
        for external_id in done["drop"]:
            self.drop(external_id)
        for external_id in done["rename"]:
            name = json.loads(self._entries[self._positions[external_id][0]].encoded).get("name")
            self.change(external_id, {"name": f"{name}-renamed"})
        for external_id in done["new_id"]:
            self.change(external_id, {"id": f"identity/accounts/{self._new_id(external_id)}"})
        return done

    def reset(self, count: int, name_prefix: str, seed: int | None = None) -> None:
        """Forget all and start again with the decoys and `count` new sandboxes, numbered from 1."""
        if seed is not None:
            self._seed_chance(seed)
        self._clear()
        self._next_numbers.clear()
        self._add_decoys()
        self.add(count, name_prefix)

    def _seed_chance(self, seed: int | None) -> None:
        self._seed = random.getrandbits(64) if seed is None else seed
        self._chance = random.Random(self._seed)

    def _new_id(self, what_for: object) -> uuid.UUID:
        # Made from what is never used twice, so that a restart with the same seed repeats no id either.
        return uuid.uuid5(uuid.NAMESPACE_OID, f"{self._seed}/{self._next_csp_id}/{what_for}")

    def _new_sandbox(self, name_prefix: str) -> dict[str, Any]:
        csp_id = self._next_csp_id
        number = self._next_numbers.get(name_prefix, 1)
        record = new_record("sandbox", "active", f"{name_prefix}{number}", csp_id, self._new_id(csp_id))
        self._next_csp_id += 1
        self._next_numbers[name_prefix] = number + 1
        return record

    def _add_decoys(self) -> None:
        for csp_id, (account_type, state) in enumerate(DECOYS, FIRST_DECOY_CSP_ID):
            name = f"{account_type}-{state}"
            self._append(new_record(account_type, state, name, csp_id, self._new_id(csp_id)))

    def _active(self) -> list[str]:
        return [
            entry.external_id
            for position, entry in self._entries.items()
            if entry.counts and entry.external_id is not None and position not in self._ghosts
        ]

    def _append(self, record: Any) -> None:
        self._put(self._next_position, record)
        self._next_position += 1

    def _put(self, position: int, record: Any) -> None:
        external_id = external_id_of(record)
        if isinstance(record, dict) and isinstance(record.get("csp_id"), int):
            self._next_csp_id = max(self._next_csp_id, record["csp_id"] + 1)
        self._entries[position] = Entry(external_id, is_active_sandbox(record), json.dumps(record).encode())
        if external_id is not None:
            self._positions.setdefault(external_id, []).append(position)

    def _lay_ghosts(self) -> None:
        for position, listings in list(self._ghosts.items()):
            if listings == 1:
                del self._ghosts[position], self._entries[position]
                self._listing = None
            elif listings is not None:
                self._ghosts[position] = listings - 1

    def _clear(self) -> None:
        self._entries.clear()
        self._positions.clear()
        self._ghosts.clear()

    def _encoded(self) -> Iterable[bytes]:
        return (entry.encoded for position, entry in self._entries.items() if position not in self._ghosts)

    def _changed(self) -> None:
        self._listing = None
        if self._state_file is None:
            return
        numbers = json.dumps(self._next_numbers)
        head = f'"next_csp_id": {self._next_csp_id}, "next_numbers": {numbers}, '
        temporary = self._state_file.with_name(f".{self._state_file.name}.{os.getpid()}")
        try:
            temporary.write_bytes(_encode("accounts", self._encoded(), head))
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


def _encode(key: str, records: Iterable[bytes], head: str = "") -> bytes:
    return b"".join((f'{{{head}"{key}": ['.encode(), b", ".join(records), b"]}"))
