"""The services inside the accounts, which NIOSXaaS lists and deletes."""

import json
from collections.abc import Mapping
from typing import Any

HOME = "home"
"""Stands for the user's own account, where a client is that has not switched."""


class Services:
    def __init__(self) -> None:
        self._records: dict[str, list[Any]] = {}
        self._next_number = 1

    def replace(self, names: Mapping[str, list[Any]]) -> None:
        """Have these and no others: names by account; what is no name is listed as it is."""
        self._records = {account.lower(): [self._record(name) for name in all] for account, all in names.items()}

    def listing(self, account: str | None) -> list[Any]:
        return self._records.get(account or HOME, [])

    def delete(self, account: str | None, service_id: str) -> bool:
        """False if this account has no such service."""
        records = self.listing(account)
        kept = [r for r in records if not isinstance(r, dict) or r.get("id") != _full_id(service_id)]
        records[:], found = kept, len(kept) < len(records)
        return found

    def dump(self) -> bytes:
        return json.dumps({"services": self._records}).encode()

    def _record(self, name: Any) -> Any:
        if not isinstance(name, str):
            return name
        self._next_number += 1
        return {"id": _full_id(f"sim{self._next_number:06d}"), "name": name}


def _full_id(service_id: str) -> str:
    return f"infra/universal_service/{service_id}"
