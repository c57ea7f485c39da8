"""Services inside the accounts, as NIOSXaaS lists and deletes them."""

import json
from collections.abc import Mapping
from typing import Any

HOME = "home"
"""Key of the user's own account, which a session uses until it switches."""


class ServiceStore:
    def __init__(self) -> None:
        self._records: dict[str, list[Any]] = {}
        self._next_number = 1

    def replace_services(self, names: Mapping[str, list[Any]]) -> None:
        """Replace all services. `names` are lists by account; an item other than a string becomes a raw record."""
        self._records = {
            account.lower(): [self._build_record(name) for name in items] for account, items in names.items()
        }

    def list_services(self, account: str | None) -> list[Any]:
        return self._records.get(account or HOME, [])

    def delete_service(self, account: str | None, service_id: str) -> bool:
        """Delete a service. Return False if the account does not have it."""
        records = self.list_services(account)
        kept = [r for r in records if not isinstance(r, dict) or r.get("id") != _build_full_id(service_id)]
        records[:], deleted = kept, len(kept) < len(records)
        return deleted

    def dump_records(self) -> bytes:
        return json.dumps({"services": self._records}).encode()

    def _build_record(self, name: Any) -> Any:
        if not isinstance(name, str):
            return name
        self._next_number += 1
        return {"id": _build_full_id(f"sim{self._next_number:06d}"), "name": name}


def _build_full_id(service_id: str) -> str:
    return f"infra/universal_service/{service_id}"
