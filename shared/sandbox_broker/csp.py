"""The client of the CSP API: list the accounts, delete one.

    CspError                 base; `status` is the HTTP status, None if there was no answer
    ├── CspUnavailable       no usable answer, another try can help; `retry_after` in seconds or None:
    │                        time-out, lost connection, 429, 5xx, any status not known here,
    │                        an HTML page, a listing that is not JSON or has no results
    └── CspUnauthorized      401 or 403: the token is wrong, and trying again cannot help

Messages are one line, bounded, and never hold the token.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Self, TypeGuard

import httpx

MAX_EXCERPT = 200
MAX_TEXT = 255  # of a name: one that no index entry can hold would fail its whole batch
MAX_RETRY_AFTER_SEC = 86_400.0

_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_EXTERNAL_ID = re.compile(_UUID)
_ACCOUNT_ID = re.compile(f"identity/accounts/({_UUID})")
_CSP_ID = re.compile(r"0*[1-9][0-9]{0,18}")
# Surrogates come from broken JSON escapes; neither they nor NUL can be stored in the database.
_UNSTORABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_TOKEN = re.compile(r"[!-~]+")


class CspError(Exception):
    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class CspUnavailable(CspError):
    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class CspUnauthorized(CspError):
    pass


@dataclass(frozen=True, slots=True)
class Account:
    sandbox_id: str  # CSP's csp_id
    external_id: str  # the bare account uuid, lower case
    name: str
    sfdc_account_id: str | None
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class Listing:
    accounts: tuple[Account, ...]
    skipped: tuple[str, ...]  # a reason for each active sandbox that lacks what we need
    ignored: int  # records of another type or state


class CspClient:
    """Makes one attempt per call; trying again, throttling and the circuit are the caller's."""

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        timeout_sec: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_sec` bounds a whole call, from connecting to the last byte of the answer.

        `transport` takes the place of the network. Raises ValueError for a token no header can carry.
        """
        if not _TOKEN.fullmatch(token):
            raise ValueError("the CSP token must be printable ASCII without spaces")
        self._token = token
        self._timeout_sec = timeout_sec
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Token {token}", "Accept": "application/json"},
            timeout=timeout_sec,
            follow_redirects=False,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def list_accounts(self) -> Listing:
        """Fetch all accounts; a record that is wrong is skipped and never stops the rest.

        Raises CspUnavailable or CspUnauthorized; there is no half listing.
        """
        response = await self._send("GET", "/current_user/accounts")
        if response.status_code != 200 or _is_html(response):
            raise self._failure(response)
        # A large listing takes a second to read: in a thread, so that heartbeats go on meanwhile.
        listing = await asyncio.to_thread(_read_listing, response.content)
        if listing is None:
            raise self._failure(response)
        return listing

    async def delete_account(self, external_id: str) -> Literal["deleted", "already_gone"]:
        """Delete one account; "already_gone" if CSP does not know it.

        Raises CspUnavailable (the deletion may have happened all the same) or CspUnauthorized, and
        ValueError if `external_id` is not a uuid.
        """
        if not _EXTERNAL_ID.fullmatch(external_id):
            raise ValueError("external_id must be a uuid")
        response = await self._send("DELETE", f"/sandbox/accounts/{external_id.lower()}")
        if response.status_code == 404:
            return "already_gone"
        # A page under 200 was written by a proxy; CSP may never have seen the call.
        if response.status_code not in (200, 204) or _is_html(response):
            raise self._failure(response)
        return "deleted"

    async def _send(self, method: str, path: str) -> httpx.Response:
        try:
            # httpx's own limits are for each read: an answer that drips in would never end.
            async with asyncio.timeout(self._timeout_sec):
                return await self._http.request(method, path)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise CspUnavailable(f"CSP gave no answer to {method} within {self._timeout_sec:g} s") from error
        except httpx.HTTPError as error:
            reason = self._excerpt(f"{type(error).__name__} {error}")
            raise CspUnavailable(f"{method} did not get through to CSP: {reason}") from error

    def _failure(self, response: httpx.Response) -> CspError:
        status = response.status_code
        message = f"CSP answered {response.request.method} with {status}: {self._excerpt(response.text)}"
        if status in (401, 403):
            return CspUnauthorized(message, status)
        return CspUnavailable(message, status, _retry_after(response.headers.get("Retry-After")))

    def _excerpt(self, text: str) -> str:
        # The token goes first: cutting could leave a part of it that no longer matches.
        clean = text.replace(self._token, "***")[: 10 * MAX_EXCERPT]
        line = " ".join(_UNSTORABLE.sub(" ", clean).split())
        return line if len(line) <= MAX_EXCERPT else f"{line[:MAX_EXCERPT]}…"


def _is_html(response: httpx.Response) -> bool:
    declared = response.headers.get("Content-Type", "").lower().startswith("text/html")
    return declared or response.content[:MAX_EXCERPT].lstrip().startswith(b"<")


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait: the header is either that or an HTTP date; None if it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
            seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    # Written so that "nan" and negative numbers come out as 0.
    return min(seconds, MAX_RETRY_AFTER_SEC) if seconds > 0 else 0.0


def _read_listing(body: bytes) -> Listing | None:
    """Sort the records of a listing; None if it is no listing at all."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        return None
    accounts: list[Account] = []
    skipped: list[str] = []
    ignored = 0
    seen: set[str] = set()  # csp_ids and uuids, which cannot be mistaken for each other
    for index, record in enumerate(document["results"]):
        if not isinstance(record, dict):
            skipped.append(f"record {index}: not an object")
        elif (record.get("account_type"), record.get("state")) != ("sandbox", "active"):
            ignored += 1
        elif isinstance(account := _read_account(record), str):
            skipped.append(f"record {index}: {account}")
        elif account.sandbox_id in seen or account.external_id in seen:
            skipped.append(f"record {index}: csp_id {account.sandbox_id} or its uuid was listed before")
        else:
            seen.update((account.sandbox_id, account.external_id))
            accounts.append(account)
    return Listing(tuple(accounts), tuple(skipped), ignored)


def _read_account(record: Mapping[str, Any]) -> Account | str:
    """The account, or what is wrong with the record."""
    csp_id, account_id, name = record.get("csp_id"), record.get("id"), record.get("name")
    if isinstance(csp_id, bool) or not isinstance(csp_id, int | str) or not _CSP_ID.fullmatch(str(csp_id)):
        return "csp_id is not a positive integer"
    sandbox_id = str(csp_id).lstrip("0")
    match = _ACCOUNT_ID.fullmatch(account_id) if isinstance(account_id, str) else None
    if match is None:
        return f"csp_id {sandbox_id}: id is not identity/accounts/<uuid>"
    if not _is_text(name):
        return f"csp_id {sandbox_id}: name is blank, too long, or has control characters"
    sfdc_account_id = record.get("sfdc_account_id")
    return Account(
        sandbox_id=sandbox_id,
        external_id=match[1].lower(),
        name=name,
        sfdc_account_id=sfdc_account_id if _is_text(sfdc_account_id) else None,
        created_at=_moment(record.get("created_at")),
    )


def _is_text(value: object) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_TEXT
        and not value.isspace()
        and _UNSTORABLE.search(value) is None
    )


def _moment(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        return moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
