"""Client of the CSP API: list the accounts, delete an account. Its errors are defined in csp/http.py."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self, TypeGuard

import httpx

from sandbox_broker.csp.http import (
    ACCOUNT_ID,
    EXTERNAL_ID,
    UNSTORABLE,
    CspError,
    CspHttp,
    CspUnauthorized,
    CspUnavailable,
)

__all__ = ["Account", "CspClient", "CspError", "CspUnauthorized", "CspUnavailable", "Listing", "Skipped"]

MAX_TEXT = 255  # of a name, because a name too long for an index entry would fail its whole batch

_CSP_ID = re.compile(r"0*[1-9][0-9]{0,18}")
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Account:
    sandbox_id: str  # CSP's csp_id
    external_id: str  # the bare account uuid, lower case
    name: str
    sfdc_account_id: str | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that cannot be read as an account, although CSP may have that account."""

    sandbox_id: str | None  # None if the csp_id cannot be read
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    accounts: tuple[Account, ...]  # no sandbox_id and no external_id twice
    skipped: tuple[Skipped, ...]  # records without required fields, and duplicates
    ignored: int  # records of another type or state


class CspClient:
    """CSP client with one attempt per call. Retries, throttling and the circuit breaker belong to the caller."""

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        timeout_sec: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_sec` bounds a whole call, from connecting to the last byte of the answer.

        `transport` replaces the network in tests. Raises ValueError for a token that no header can carry.
        """
        if not _TOKEN.fullmatch(token):
            raise ValueError("the CSP token must be printable ASCII without spaces")
        self._http = CspHttp(
            base_url,
            secrets=(token,),
            headers={"Authorization": f"Token {token}"},
            timeout_sec=timeout_sec,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def list_accounts(self) -> Listing:
        """Fetch all accounts. An invalid record is skipped and does not affect the others.

        Raises CspUnavailable or CspUnauthorized. A listing is never partial.
        """
        answer = await self._http.ask("GET", "/current_user/accounts", operation="list_accounts", what="GET")
        if answer.status != 200 or answer.is_html:
            raise self._http.failure(answer, what="GET")
        # In a thread, because a large listing takes a second to parse and heartbeats must go on.
        listing = await asyncio.to_thread(_read_listing, answer.body)
        if listing is None:
            raise self._http.failure(answer, what="GET")
        return listing

    async def delete_account(self, external_id: str) -> Literal["deleted", "already_gone"]:
        """Delete one account. Return "already_gone" if CSP does not know it.

        Raises CspUnavailable (the deletion may still have happened) or CspUnauthorized, and ValueError if
        `external_id` is not a uuid.
        """
        if not EXTERNAL_ID.fullmatch(external_id):
            raise ValueError("external_id must be a uuid")
        answer = await self._http.ask(
            "DELETE", f"/sandbox/accounts/{external_id.lower()}", operation="delete_account", what="DELETE"
        )
        # An HTML page comes from a proxy, so CSP may not have seen the call. With status 404 it means a wrong base
        # URL, not a deleted account.
        if answer.status not in (200, 204, 404) or answer.is_html:
            raise self._http.failure(answer, what="DELETE")
        return "already_gone" if answer.status == 404 else "deleted"


def _read_listing(body: bytes) -> Listing | None:
    """Parse and sort the records of a listing. Return None if the body is not a listing."""
    try:
        document = json.loads(body, object_hook=_needed, parse_int=_whole_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        return None
    accounts: list[Account] = []
    skipped: list[Skipped] = []
    ignored = 0
    seen: set[str] = set()  # csp_ids and uuids in one set, because their formats differ
    for index, record in enumerate(document["results"]):
        result = _read_record(record)
        if isinstance(result, Account) and not seen.isdisjoint((result.sandbox_id, result.external_id)):
            result = Skipped(result.sandbox_id, "the csp_id or the uuid was listed before")
        match result:
            case Account():
                seen.update((result.sandbox_id, result.external_id))
                accounts.append(result)
            case Skipped():
                skipped.append(Skipped(result.sandbox_id, f"record {index}: {result.reason}"))
            case None:
                ignored += 1
    return Listing(tuple(accounts), tuple(skipped), ignored)


def _needed(document: dict[str, Any]) -> dict[str, Any]:
    """Drop unused fields during decoding, because CSP may send any number of them."""
    return {key: document[key] for key in _READ if key in document}


_READ = ("results", "account_type", "state", "csp_id", "id", "name", "sfdc_account_id", "created_at")


def _whole_number(digits: str) -> int | str:
    """Return long numbers as text, because int() refuses thousands of digits and would fail the whole listing."""
    return int(digits) if len(digits) < 20 else digits


def _read_record(record: object) -> Account | Skipped | None:
    """Return the account, or the reason why it is skipped, or None for another type or state."""
    if not isinstance(record, dict):
        return Skipped(None, "not an object")
    sandbox_id = _sandbox_id(record.get("csp_id"))
    wanted = {"account_type": "sandbox", "state": "active"}
    other = [key for key, value in wanted.items() if record.get(key) != value]
    if not other:
        return _read_sandbox(record, sandbox_id)
    if any(isinstance(record.get(key), str) for key in other):
        return None
    # Without a readable type or state, the record may be a sandbox of the pool.
    return Skipped(sandbox_id, f"{' and '.join(other)} cannot be read")


def _read_sandbox(record: Mapping[str, Any], sandbox_id: str | None) -> Account | Skipped:
    if sandbox_id is None:
        return Skipped(None, "csp_id is not a positive integer")
    account_id, name, sfdc_account_id = (record.get(key) for key in ("id", "name", "sfdc_account_id"))
    match = ACCOUNT_ID.fullmatch(account_id) if isinstance(account_id, str) else None
    if match is None:
        return Skipped(sandbox_id, "id is not identity/accounts/<uuid>")
    if not _is_text(name):
        return Skipped(sandbox_id, "name is blank, too long, or has control characters")
    return Account(
        sandbox_id=sandbox_id,
        external_id=match[1].lower(),
        name=name,
        sfdc_account_id=sfdc_account_id if _is_text(sfdc_account_id) else None,
        created_at=_moment(record.get("created_at")),
    )


def _sandbox_id(csp_id: object) -> str | None:
    if isinstance(csp_id, bool) or not isinstance(csp_id, int | str) or not _CSP_ID.fullmatch(str(csp_id)):
        return None
    return str(csp_id).lstrip("0")


def _is_text(value: object) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_TEXT
        and not value.isspace()
        and UNSTORABLE.search(value) is None
    )


def _moment(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        return moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
