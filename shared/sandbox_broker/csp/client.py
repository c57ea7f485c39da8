"""Client of the CSP API: list, create, find and delete accounts. Its errors are defined in csp/http.py."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Self, TypeGuard

import httpx

from sandbox_broker.csp import pages
from sandbox_broker.csp.http import (
    ACCOUNT_ID,
    EXTERNAL_ID,
    MAX_BODY_BYTES,
    UNSTORABLE,
    Answer,
    CspError,
    CspHttp,
    CspRefused,
    CspUnauthorized,
    CspUnavailable,
)

__all__ = [
    "Account",
    "CspClient",
    "CspError",
    "CspRefused",
    "CspUnauthorized",
    "CspUnavailable",
    "Listing",
    "Skipped",
]

MAX_LISTING_SEC = 300.0
MAX_PAGES = 2000
MAX_EXACT_FLOAT = 2.0**53
FIND_PAGE_SIZE = 100
MAX_FIND_PAGES = 20
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
    external_id: str | None = None  # of a record without a readable csp_id


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
        """`timeout_sec` bounds a call, from connecting to the last byte of the answer, and each page of a listing.

        `transport` replaces the network in tests. Raises ValueError for a token that no header can carry.
        """
        if not _TOKEN.fullmatch(token):
            raise ValueError("the CSP token must be printable ASCII without spaces")
        self._timeout_sec = timeout_sec
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
        """Fetch all accounts, page by page. An invalid record is skipped and does not affect the others.

        Raises CspUnavailable or CspUnauthorized. A listing is never partial: if it lacks a page, exceeds a bound,
        or changes between two pages, this raises CspUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + MAX_LISTING_SEC
        reader = _ListingReader()
        url: httpx.URL | None = self._http.base_url.join("current_user/accounts")
        fetched: set[httpx.URL] = set()
        size, total = 0, None
        while url is not None:
            fetched.add(url)
            deadline = min(until, loop.time() + self._timeout_sec)
            answer = await self._http.ask("GET", url, operation="list_accounts", what="GET", deadline=deadline)
            if answer.status != 200 or answer.is_html:
                raise self._http.failure(answer, what="GET")
            size += len(answer.body)
            if size > MAX_BODY_BYTES["list_accounts"]:
                raise _incomplete(f"it has more than {MAX_BODY_BYTES['list_accounts']} bytes")
            # In a thread, because a large listing takes a second to parse and heartbeats must go on.
            document = await asyncio.to_thread(reader.read, answer.body)
            if document is None:
                raise self._http.failure(answer, what="GET")
            stated = pages.read_total(document)
            if reader.repeated or (len(fetched) > 1 and stated != total):
                raise _incomplete("it changed between two pages, or CSP repeats a page")
            total = stated
            try:
                url = pages.find_next(
                    url, document, answer.headers.get("Link"), received=reader.records, total=total
                )
            except pages.InvalidLink as error:
                raise _incomplete(str(error)) from None
            if url in fetched:
                raise _incomplete("CSP names a page again that was read before")
            if len(fetched) == MAX_PAGES:
                raise _incomplete(f"it has more than {MAX_PAGES} pages")
        return Listing(tuple(reader.accounts), tuple(reader.skipped), reader.ignored)

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

    async def create_account(
        self, name: str, *, description: str, tags: Mapping[str, str], admin_user: Mapping[str, str] | None = None
    ) -> str:
        """Create a sandbox account and return its uuid. CSP takes minutes until the account is usable.

        `admin_user` is the administrator of the account (`email`, `name`). Raises CspUnavailable (the account may
        still have been created, so look its name up before the next attempt), CspUnauthorized, or CspRefused with
        CSP's own reason. Raises ValueError for an invalid name.
        """
        _require_name(name)
        body = {"name": name, "description": description, "state": "active", "tags": dict(tags)}
        if admin_user is not None:
            body["admin_user"] = dict(admin_user)
        answer = await self._http.ask(
            "POST", "/sandbox/accounts", operation="create_account", what="POST", json=body
        )
        if answer.status not in (200, 201, 202) or answer.is_html:
            raise self._creation_failure(answer)
        result = (answer.read_object() or {}).get("result")
        external_id = _external_id(result.get("id")) if isinstance(result, dict) else None
        if external_id is None:
            raise CspUnavailable("CSP answered POST without the id of the account", answer.status)
        return external_id

    def _creation_failure(self, answer: Answer) -> CspError:
        """Return the error for an answer that created no account, or may have created one."""
        # CSP may use 403 for a quota. A token without the right to create accounts needs an operator, too.
        if answer.is_html or answer.status not in _REFUSALS:
            return self._http.failure(answer, what="POST")
        reason = self._http.line(_read_reason(answer) or answer.body.decode(errors="replace"))
        return CspRefused(f"CSP refused the creation with {answer.status}: {reason}", answer.status)

    async def find_account_by_name(self, name: str) -> str | None:
        """Return the uuid of the sandbox account with exactly this name, in any state. None without one.

        Raises CspUnavailable or CspUnauthorized, and ValueError for an invalid name.
        """
        _require_name(name)
        # In Infoblox's filter grammar a doubled quote stands for the quote, and no other character is special.
        quoted = name.replace('"', '""')
        offset = 0
        deadline = asyncio.get_running_loop().time() + self._timeout_sec
        for _ in range(MAX_FIND_PAGES):
            query = {"_filter": f'name=="{quoted}"', "_limit": str(FIND_PAGE_SIZE), "_offset": str(offset)}
            url = self._http.base_url.join("sandbox/accounts").copy_merge_params(query)
            answer = await self._http.ask("GET", url, operation="find_account", what="GET", deadline=deadline)
            document = answer.read_object()
            records = document.get("results") if document is not None else None
            if answer.status != 200 or answer.is_html or not isinstance(records, list):
                raise self._http.failure(answer, what="GET")
            for record in records:
                # CSP could ignore the filter or compare without case. An account of another name is not ours.
                if isinstance(record, dict) and record.get("name") == name:
                    external_id = _external_id(record.get("id"))
                    if external_id is None:
                        raise CspUnavailable(f"CSP listed {self._http.line(name)} without a readable id", 200)
                    return external_id
            # Until an empty page, because CSP may send shorter pages than asked for.
            if not records:
                return None
            offset += len(records)
        raise CspUnavailable(f"CSP listed more than {MAX_FIND_PAGES} pages of accounts with other names", 200)


# 408, 425 and 429 ask for a later attempt. 409 says that the name exists, so the next attempt finds it. 404 and 405
# come from a wrong base URL.
_REFUSALS = frozenset(range(400, 500)) - {401, 404, 405, 408, 409, 425, 429}


def _require_name(name: str) -> None:
    if not _is_text(name):
        raise ValueError("the name is blank, too long, or has control characters")


def _read_reason(answer: Answer) -> str | None:
    """Return CSP's reason from an error body like {"error": [{"message": …}]}, None if it has another form."""
    errors = (answer.read_object() or {}).get("error")
    first = errors[0] if isinstance(errors, list) and errors else errors
    reason = first.get("message") if isinstance(first, dict) else None
    return reason if isinstance(reason, str) and reason.strip() else None


def _incomplete(reason: str) -> CspUnavailable:
    return CspUnavailable(f"CSP's listing is incomplete: {reason}", 200)


class _ListingReader:
    """Parses and sorts the records of a listing, page by page."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []
        self.skipped: list[Skipped] = []
        self.ignored = 0
        self.records = 0
        self.repeated = False
        """Whether a page repeats an account of an earlier page, or brings no record."""
        self._seen: set[str] = set()  # csp_ids and uuids in one set, because their formats differ

    def read(self, body: bytes) -> dict[str, Any] | None:
        """Add the records of a page. Return the fields that describe the page, None if the body is no page."""
        try:
            document = json.loads(body, object_hook=_needed, parse_int=_whole_number)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or not isinstance(document.get("results"), list):
            return None
        records = document.pop("results")
        self.repeated = self.records > 0 and not records
        listed: set[str] = set()
        for index, record in enumerate(records, self.records):
            result = _read_record(record)
            if isinstance(result, Account):
                keys = {result.sandbox_id, result.external_id}
                self.repeated |= not self._seen.isdisjoint(keys)
                if not listed.isdisjoint(keys):
                    result = Skipped(result.sandbox_id, "the csp_id or the uuid was listed before")
            match result:
                case Account():
                    listed |= {result.sandbox_id, result.external_id}
                    self.accounts.append(result)
                case Skipped():
                    self.skipped.append(replace(result, reason=f"record {index}: {result.reason}"))
                case None:
                    self.ignored += 1
        self._seen |= listed
        self.records += len(records)
        return document


def _needed(document: dict[str, Any]) -> dict[str, Any]:
    """Drop unused fields during decoding, because CSP may send any number of them."""
    return {key: document[key] for key in document.keys() & _READ}


_READ = pages.KEYS | {
    "results",
    "account_type",
    "state",
    "csp_id",
    "id",
    "name",
    "sfdc_account_id",
    "created_at",
}


def _whole_number(digits: str) -> int | str:
    """Return long numbers as text, because int() refuses thousands of digits and would fail the whole listing."""
    return int(digits) if len(digits) < 20 else digits


def _read_record(record: object) -> Account | Skipped | None:
    """Return the account, or the reason why it is skipped, or None for another type or state."""
    if not isinstance(record, dict):
        return Skipped(None, "not an object")
    sandbox_id, external_id = _sandbox_id(record.get("csp_id")), _external_id(record.get("id"))
    wanted = {"account_type": "sandbox", "state": "active"}
    other = [key for key, value in wanted.items() if record.get(key) != value]
    if not other:
        return _read_sandbox(record, sandbox_id, external_id)
    if any(isinstance(record.get(key), str) for key in other):
        return None
    # Without a readable type or state, the record may be a sandbox of the pool.
    return _skip(f"{' and '.join(other)} cannot be read", sandbox_id, external_id)


def _skip(reason: str, sandbox_id: str | None, external_id: str | None) -> Skipped:
    return Skipped(sandbox_id, reason, external_id if sandbox_id is None else None)


def _read_sandbox(record: Mapping[str, Any], sandbox_id: str | None, external_id: str | None) -> Account | Skipped:
    if sandbox_id is None:
        return _skip("csp_id is not a positive integer", sandbox_id, external_id)
    if external_id is None:
        return Skipped(sandbox_id, "id is not identity/accounts/<uuid>")
    name, sfdc_account_id = record.get("name"), record.get("sfdc_account_id")
    if not _is_text(name):
        return Skipped(sandbox_id, "name is blank, too long, or has control characters")
    return Account(
        sandbox_id=sandbox_id,
        external_id=external_id,
        name=name,
        sfdc_account_id=sfdc_account_id if _is_text(sfdc_account_id) else None,
        created_at=_moment(record.get("created_at")),
    )


def _sandbox_id(csp_id: object) -> str | None:
    if isinstance(csp_id, float) and csp_id.is_integer() and csp_id < MAX_EXACT_FLOAT:
        csp_id = int(csp_id)
    if isinstance(csp_id, bool) or not isinstance(csp_id, int | str) or not _CSP_ID.fullmatch(str(csp_id)):
        return None
    return str(csp_id).lstrip("0")


def _external_id(account_id: object) -> str | None:
    match = ACCOUNT_ID.fullmatch(account_id) if isinstance(account_id, str) else None
    return match[1].lower() if match else None


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
