"""CSP client against the simulator, or against mock answers that the simulator cannot give."""

import asyncio
import contextlib
import gzip
import json
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from csp_simulator.accounts import AccountStore
from csp_simulator.app import create_app
from csp_simulator.error_responses import build_gzip_bomb
from csp_simulator.testing import serving
from sandbox_broker.csp import client as csp_client
from sandbox_broker.csp import http as csp_http
from sandbox_broker.csp.client import Account, CspClient, CspUnauthorized, CspUnavailable, Skipped

from .shared_harness import PATIENCE_SEC, CannedTransport

TOKEN = "test-token-0123456789"
MIB = 1024 * 1024
UNKNOWN = "00000000-0000-4000-8000-00000000ffff"
EMPTY_OBJECT_GZIP = gzip.compress(b"{}", mtime=0)
"""A constant date, because the test names must be the same in all pytest workers."""


@pytest.fixture
async def simulator() -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client for the root of a running simulator with three sandboxes."""
    async with (
        serving(create_app(accounts=3, token=TOKEN)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as client,
    ):
        yield client


@pytest.fixture
async def csp(simulator: httpx.AsyncClient) -> AsyncIterator[CspClient]:
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN) as client:
        yield client


async def behave(simulator: httpx.AsyncClient, **switches: object) -> None:
    (await simulator.patch("/_control/behaviour", json=switches)).raise_for_status()


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> CspClient:
    return CspClient("http://csp.test/v2", TOKEN, transport=CannedTransport(respond))


def record(number: int, **changes: object) -> dict[str, Any]:
    return {
        "account_type": "sandbox",
        "state": "active",
        "id": f"identity/accounts/00000000-0000-4000-8000-{number:012d}",
        "name": f"lab-{number}",
        "csp_id": 3000000 + number,
        "created_at": "2025-03-27T16:53:47.605459Z",
        "sfdc_account_id": f"sfdc-{number}",
        **changes,
    }


def account(number: int) -> Account:
    return Account(
        sandbox_id=str(3000000 + number),
        external_id=f"00000000-0000-4000-8000-{number:012d}",
        name=f"lab-{number}",
        sfdc_account_id=f"sfdc-{number}",
        created_at=datetime(2025, 3, 27, 16, 53, 47, 605459, tzinfo=UTC),
    )


# Listing


async def test_active_sandboxes_are_listed_and_other_accounts_counted(csp: CspClient) -> None:
    listing = await csp.list_accounts()
    assert [(a.sandbox_id, a.name) for a in listing.accounts] == [
        ("2012224", "sandbox-1"),
        ("2012225", "sandbox-2"),
        ("2012226", "sandbox-3"),
    ]
    assert listing.accounts[1].sfdc_account_id is None
    assert (listing.skipped, listing.ignored) == ((), 4)


async def test_every_field_is_read(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    raw = [record(1, unknown={"deep": [1]}), record(2, csp_id="3000002")]
    raw[0]["id"] = raw[0]["id"].upper().replace("IDENTITY/ACCOUNTS", "identity/accounts")
    await simulator.put("/_control/accounts", json={"raw": raw})
    assert (await csp.list_accounts()).accounts == (account(1), account(2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "id is not identity/accounts/<uuid>"),
        ({"id": UNKNOWN}, "id is not identity/accounts/<uuid>"),
        ({"id": f"identity/accounts/{UNKNOWN}\n"}, "id is not identity/accounts/<uuid>"),
        ({"id": f"identity/accounts/{UNKNOWN}/../x"}, "id is not identity/accounts/<uuid>"),
        ({"name": None}, "name is blank"),
        ({"name": ""}, "name is blank"),
        ({"name": " \u00a0"}, "name is blank"),
        ({"name": 7}, "name is blank"),
        ({"name": "a\x00b"}, "control characters"),
        ({"name": "a\nb"}, "control characters"),
        ({"name": "a\ud800b"}, "control characters"),
        ({"name": "a" * 10_000}, "too long"),
        ({"state": None}, "state cannot be read"),
        ({"account_type": 7}, "account_type cannot be read"),
        ({"account_type": None, "state": ["active"]}, "account_type and state cannot be read"),
    ],
)
async def test_a_record_without_a_required_field_is_skipped_with_its_sandbox_id(
    changes: dict[str, object], reason: str
) -> None:
    body = json.dumps({"results": [record(1), record(2, **changes), record(3)]})
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        listing = await csp.list_accounts()
    assert listing.accounts == (account(1), account(3))
    [skipped] = listing.skipped
    assert skipped.sandbox_id == "3000002"
    assert skipped.reason.startswith("record 1: ")
    assert reason in skipped.reason
    assert len(skipped.reason) <= 200


@pytest.mark.parametrize(
    "csp_id", [None, True, 1.5, 0, -3, "12x", "١٢", "9" * 5000, 10**3000, 10**19, -(10**18), [1], {"a": 1}]
)
async def test_a_record_without_a_csp_id_is_skipped_without_a_sandbox_id(csp_id: object) -> None:
    body = json.dumps({"results": [record(1), record(2, csp_id=csp_id), record(3)]})
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        listing = await csp.list_accounts()
    assert listing.accounts == (account(1), account(3))
    reason = "record 1: csp_id is not a positive integer"
    assert listing.skipped == (Skipped(None, reason, "00000000-0000-4000-8000-000000000002"),)


@pytest.mark.parametrize("csp_id", ["5003", "5003.0", "5.003e3", '"5003"', '"0005003"'])
async def test_every_spelling_of_a_csp_id_names_the_same_sandbox(csp_id: str) -> None:
    body = json.dumps({"results": [record(1, csp_id="…")]}).replace('"\\u2026"', csp_id)
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        assert [account.sandbox_id for account in (await csp.list_accounts()).accounts] == ["5003"]


@pytest.mark.parametrize("csp_id", ["5003.5", "1e16", "1e400", "-5003.0", '" 5003 "', '"5003.0"', "null"])
async def test_a_record_with_an_unusable_csp_id_keeps_its_uuid(csp_id: str) -> None:
    body = json.dumps({"results": [record(1, csp_id="…")]}).replace('"\\u2026"', csp_id)
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        [skipped] = (await csp.list_accounts()).skipped
    assert (skipped.sandbox_id, skipped.external_id) == (None, "00000000-0000-4000-8000-000000000001")


async def test_a_number_too_long_for_int_affects_only_its_record() -> None:
    odd = json.dumps(record(2)).replace("3000002", "9" * 5000)
    body = f'{{"results": [{odd}, {json.dumps(record(1))}]}}'
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        listing = await csp.list_accounts()
    assert listing.accounts == (account(1),)
    assert [skipped.sandbox_id for skipped in listing.skipped] == [None]


async def test_records_that_are_not_objects_are_skipped(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await simulator.put("/_control/accounts", json={"raw": [None, [], "x", 5, record(1), {}]})
    listing = await csp.list_accounts()
    assert listing.accounts == (account(1),)
    assert listing.skipped == (
        *(Skipped(None, f"record {index}: not an object") for index in range(4)),
        Skipped(None, "record 5: account_type and state cannot be read"),
    )
    assert listing.ignored == 0


@pytest.mark.parametrize("other", [{"state": "disabled"}, {"account_type": "partner"}])
@pytest.mark.parametrize("missing", [{}, {"csp_id": None}, {"account_type": None}, {"state": None}])
async def test_records_of_another_type_or_state_are_ignored(
    other: dict[str, object], missing: dict[str, object]
) -> None:
    body = {"results": [record(1), record(2, **{**missing, **other})]}
    async with answering(lambda _: httpx.Response(200, json=body)) as csp:
        listing = await csp.list_accounts()
    assert (len(listing.accounts), listing.skipped, listing.ignored) == (1, (), 1)


@pytest.mark.parametrize(
    ("repeated", "sandbox_id"),
    [
        (record(1, name="other"), "3000001"),
        (record(2, csp_id=3000001), "3000001"),
        (record(2, csp_id="03000001"), "3000001"),
        (record(2, id=record(1)["id"]), "3000002"),
    ],
)
async def test_the_first_of_two_records_with_one_id_is_kept(
    csp: CspClient, simulator: httpx.AsyncClient, repeated: dict[str, Any], sandbox_id: str
) -> None:
    await simulator.put("/_control/accounts", json={"raw": [record(1), repeated, record(3)]})
    listing = await csp.list_accounts()
    assert listing.accounts == (account(1), account(3))
    assert listing.skipped == (Skipped(sandbox_id, "record 1: the csp_id or the uuid was listed before"),)


async def test_invalid_and_duplicate_records_keep_every_readable_csp_id(
    csp: CspClient, simulator: httpx.AsyncClient
) -> None:
    await simulator.post("/_control/reset", json={"accounts": 20})
    before = [account.sandbox_id for account in (await csp.list_accounts()).accounts]
    await behave(simulator, listing_duplicates=3, listing_malformed=7)
    listing = await csp.list_accounts()
    assert [account.sandbox_id for account in listing.accounts] == before[:13]
    skipped_ids = [skipped.sandbox_id for skipped in listing.skipped]
    assert skipped_ids == [*before[13:17], None, None, None, *before[:3]]
    assert listing.ignored == 4


@pytest.mark.parametrize("value", [None, 5, "", " ", "a\x00", "\ud800", "x" * 256])
async def test_an_unusable_sfdc_account_id_counts_as_none(value: object) -> None:
    body = json.dumps({"results": [record(1, sfdc_account_id=value)]})
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        assert (await csp.list_accounts()).accounts[0].sfdc_account_id is None


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2025-03-27T16:53:47Z", datetime(2025, 3, 27, 16, 53, 47, tzinfo=UTC)),
        ("2025-03-27T18:53:47+02:00", datetime(2025, 3, 27, 16, 53, 47, tzinfo=UTC)),
        ("2025-03-27T16:53:47", datetime(2025, 3, 27, 16, 53, 47, tzinfo=UTC)),
        ("0001-01-01T00:00:00+10:00", None),
        ("yesterday", None),
        (1743094427, None),
        (None, None),
    ],
)
async def test_creation_times_are_utc_or_none(value: object, moment: datetime | None) -> None:
    body = {"results": [record(1, created_at=value)]}
    async with answering(lambda _: httpx.Response(200, json=body)) as csp:
        assert (await csp.list_accounts()).accounts[0].created_at == moment


async def test_an_empty_listing_is_valid(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await simulator.put("/_control/accounts", json={"accounts": []})
    listing = await csp.list_accounts()
    assert (listing.accounts, listing.skipped, listing.ignored) == ((), (), 0)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"results": null}',
        '{"results": {}}',
        '"results"',
        "oops",
        "[" * 100_000,
        "<html></html>",
    ],
)
async def test_a_body_without_results_is_refused(body: str) -> None:
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.list_accounts()
    assert caught.value.status == 200
    assert len(str(caught.value)) < 300


async def test_a_listing_with_invalid_utf_8_is_refused() -> None:
    async with answering(lambda _: httpx.Response(200, content=b'{"results": ["\xff"]}')) as csp:
        with pytest.raises(CspUnavailable):
            await csp.list_accounts()


async def test_a_truncated_listing_is_refused(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, listing_cut_short=True)
    with pytest.raises(CspUnavailable):
        await csp.list_accounts()


async def test_an_html_page_as_listing_is_refused(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_listings=1, listing_error_status=200, listing_error_html=True)
    with pytest.raises(CspUnavailable):
        await csp.list_accounts()


# Pages


@pytest.mark.parametrize("form", ["total", "token", "next", "header"])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 8, 100])
async def test_a_listing_in_pages_is_read_to_its_end(
    csp: CspClient, simulator: httpx.AsyncClient, form: str, size: int
) -> None:
    whole = await csp.list_accounts()
    await behave(simulator, listing_page_size=size, listing_page_form=form)
    assert await csp.list_accounts() == whole


@pytest.mark.parametrize("form", ["total", "token", "next", "header"])
async def test_a_listing_without_its_last_page_is_refused(
    csp: CspClient, simulator: httpx.AsyncClient, form: str
) -> None:
    await behave(simulator, listing_page_size=3, listing_page_form=form, listing_pages_missing=1)
    with pytest.raises(CspUnavailable, match="incomplete"):
        await csp.list_accounts()


def page(*records: object, **fields: object) -> httpx.Response:
    return httpx.Response(200, json={"results": records, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"page": {"total_size": 3}},
        {"page": {"total_size": 3, "page_token": "next"}},
        {"total": 3},
        {"meta": {"total_count": 3}},
        {"page": {"page_token": "again"}},
        {"pagination": {"next_page_token": "again"}},
        {"next": "/v2/current_user/accounts?page=2"},
        {"links": {"next": "?page=2"}},
        {"_links": {"next": {"href": "accounts?page=2"}}},
        {"has_more": True},
        {"page": {"is_last_page": False}},
    ],
)
async def test_a_listing_whose_further_pages_repeat_the_first_is_refused(fields: dict[str, object]) -> None:
    async with answering(lambda _: page(record(1), record(2), **fields)) as csp:
        with pytest.raises(CspUnavailable, match="incomplete"):
            await csp.list_accounts()


async def test_a_listing_that_changes_between_two_pages_is_refused() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if "_offset" in request.url.params:
            return page(record(3), page={"total_size": 3})
        return page(record(1), record(2), page={"total_size": 4})

    async with answering(respond) as csp:
        with pytest.raises(CspUnavailable, match="changed between two pages"):
            await csp.list_accounts()


@pytest.mark.parametrize(
    "link",
    [
        "https://other.test/v2/current_user/accounts?page=2",
        "//other.test/v2/current_user/accounts?page=2",
        "http://csp.test@other.test/v2?page=2",
        "http://csp.test.other.test/",
        "http://csp.test:port/",
    ],
)
async def test_a_link_to_another_host_is_refused(link: str) -> None:
    hosts = []

    def respond(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return page(record(1), next=link)

    async with answering(respond) as csp:
        with pytest.raises(CspUnavailable, match="link to the next page"):
            await csp.list_accounts()
    assert hosts == ["csp.test"]


@pytest.mark.parametrize("link", ["https://csp.test:8443/v2/list?page=2", "http://CSP.test/v2/list?page=2"])
async def test_a_link_is_followed_at_the_origin_of_the_base_url(link: str) -> None:
    urls: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        return page(record(2)) if "page" in request.url.params else page(record(1), next=link)

    async with answering(respond) as csp:
        assert (await csp.list_accounts()).accounts == (account(1), account(2))
    assert urls[1] == "http://csp.test/v2/list?page=2"


async def test_a_listing_ends_at_the_bounds_of_its_pages_bytes_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10_000))

    def respond(request: httpx.Request) -> httpx.Response:
        number = next(numbers)
        return page(record(number), page={"page_token": str(number)})

    async with answering(respond) as csp:
        monkeypatch.setattr("sandbox_broker.csp.client.MAX_PAGES", 5)
        with pytest.raises(CspUnavailable, match="more than 5 pages"):
            await csp.list_accounts()
        monkeypatch.setattr(csp_http, "MAX_BODY_BYTES", {**csp_http.MAX_BODY_BYTES, "list_accounts": 800})
        monkeypatch.setattr("sandbox_broker.csp.client.MAX_BODY_BYTES", csp_http.MAX_BODY_BYTES)
        with pytest.raises(CspUnavailable, match="more than 800 bytes"):
            await csp.list_accounts()
        monkeypatch.setattr("sandbox_broker.csp.client.MAX_LISTING_SEC", 0)
        with pytest.raises(CspUnavailable, match="no time was left"):
            await csp.list_accounts()


async def test_unused_fields_take_no_memory() -> None:
    extra = {f"field_{number}": {"deep": [number, {"deeper": "x"}]} for number in range(50)}
    body = json.dumps({"results": [record(number, **extra) for number in range(2000)]}).encode()
    async with answering(lambda _: httpx.Response(200, content=body)) as csp:
        tracemalloc.start()
        try:
            listing = await csp.list_accounts()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(listing.accounts) == 2000
    # The body twice, as bytes and as text. A fully decoded body would take ten times as much.
    assert peak < 4 * len(body)


@pytest.mark.parametrize("step", ["_needed", "_read_record"])
async def test_parsing_a_listing_does_not_block_the_event_loop(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, loop_ran = asyncio.get_running_loop(), threading.Event()
    parse = getattr(csp_client, step)

    def parse_after_loop_ran(part: Any) -> Any:
        """Wait in this step of the parser until the event loop has run a callback."""
        loop.call_soon_threadsafe(loop_ran.set)
        assert loop_ran.wait(PATIENCE_SEC), "the parser blocks the event loop"
        return parse(part)

    monkeypatch.setattr(csp_client, step, parse_after_loop_ran)
    body = json.dumps({"results": [record(1), record(2)]}).encode()
    async with answering(lambda _: httpx.Response(200, content=body)) as csp:
        assert (await csp.list_accounts()).accounts == (account(1), account(2))


# Deleting


async def test_a_deleted_account_is_not_listed(csp: CspClient) -> None:
    first, *others = (await csp.list_accounts()).accounts
    assert await csp.delete_account(first.external_id) == "deleted"
    assert (await csp.list_accounts()).accounts == tuple(others)


async def test_deletion_of_a_missing_account_succeeds(csp: CspClient) -> None:
    assert await csp.delete_account(UNKNOWN) == "already_gone"


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200),
        httpx.Response(204),
        httpx.Response(200, text="ok"),
        httpx.Response(200, json={"deleted": True}),
    ],
)
async def test_200_and_204_are_success_with_any_body(response: httpx.Response) -> None:
    async with answering(lambda _: response) as csp:
        assert await csp.delete_account(UNKNOWN) == "deleted"


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "text/plain"])
async def test_an_html_page_with_status_200_is_not_a_deletion(content_type: str) -> None:
    page = httpx.Response(200, text=" \n<!doctype html><p>Sign in</p>", headers={"Content-Type": content_type})
    async with answering(lambda _: page) as csp:
        with pytest.raises(CspUnavailable, match="200"):
            await csp.delete_account(UNKNOWN)


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "text/plain"])
async def test_an_html_page_with_status_404_is_not_already_gone(content_type: str) -> None:
    page = httpx.Response(404, text="<html>Not Found</html>", headers={"Content-Type": content_type})
    async with answering(lambda _: page) as csp:
        with pytest.raises(CspUnavailable, match="404") as caught:
            await csp.delete_account(UNKNOWN)
    assert caught.value.status == 404


@pytest.mark.parametrize("content", [b"", b'{"error": [{"message": "account not found"}]}', b"{}", b"not found"])
async def test_any_other_404_is_already_gone(content: bytes) -> None:
    async with answering(lambda _: httpx.Response(404, content=content)) as csp:
        assert await csp.delete_account(UNKNOWN) == "already_gone"


async def test_a_retry_after_a_lost_answer_finds_the_account_deleted(
    csp: CspClient, simulator: httpx.AsyncClient
) -> None:
    account = (await csp.list_accounts()).accounts[0]
    await behave(simulator, fail_next_deletes=1, delete_error_after_effect=True)
    with pytest.raises(CspUnavailable):
        await csp.delete_account(account.external_id)
    assert await csp.delete_account(account.external_id) == "already_gone"


@pytest.mark.parametrize("external_id", ["", "..", "a/b", f"{UNKNOWN}\n", f"identity/accounts/{UNKNOWN}"])
async def test_delete_account_accepts_only_a_uuid(csp: CspClient, external_id: str) -> None:
    with pytest.raises(ValueError, match="must be a uuid"):
        await csp.delete_account(external_id)


# Failures


@pytest.mark.parametrize("status", [400, 405, 409, 429, 500, 502, 503])
@pytest.mark.parametrize("html", [True, False])
async def test_errors_of_csp_raise_csp_unavailable(
    csp: CspClient, simulator: httpx.AsyncClient, status: int, html: bool
) -> None:
    switches = {"fail_next_deletes": 1, "delete_error_status": status, "delete_error_html": html}
    await behave(simulator, **switches)
    with pytest.raises(CspUnavailable, match=f"CSP answered DELETE with {status}") as caught:
        await csp.delete_account(UNKNOWN)
    assert caught.value.status == status
    assert caught.value.retry_after is None


async def test_404_for_the_listing_raises_csp_unavailable() -> None:
    async with answering(lambda _: httpx.Response(404)) as csp:
        with pytest.raises(CspUnavailable):
            await csp.list_accounts()


async def test_redirects_are_not_followed() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "csp.test"
        return httpx.Response(302, headers={"Location": "http://elsewhere.test/"})

    async with answering(respond) as csp:
        with pytest.raises(CspUnavailable, match="302"):
            await csp.delete_account(UNKNOWN)
        with pytest.raises(CspUnavailable, match="302"):
            await csp.list_accounts()


async def test_a_rejected_token_raises_csp_unauthorized(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, reject_tokens=True)
    with pytest.raises(CspUnauthorized) as listing:
        await csp.list_accounts()
    with pytest.raises(CspUnauthorized) as deletion:
        await csp.delete_account(UNKNOWN)
    assert listing.value.status == deletion.value.status == 401


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("html", [True, False])
async def test_401_and_403_raise_csp_unauthorized_with_any_body(
    csp: CspClient, simulator: httpx.AsyncClient, status: int, html: bool
) -> None:
    switches = {"delete_error_status": status, "listing_error_status": status}
    await behave(simulator, fail_next_deletes=1, fail_next_listings=1, delete_error_html=html, **switches)
    with pytest.raises(CspUnauthorized):
        await csp.delete_account(UNKNOWN)
    with pytest.raises(CspUnauthorized):
        await csp.list_accounts()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-1", 0),
        ("nan", 0),
        ("inf", 86400),
        ("9" * 400, 86400),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_seconds(header: str, seconds: float | None, status: int) -> None:
    async with answering(lambda _: httpx.Response(status, headers={"Retry-After": header})) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.delete_account(UNKNOWN)
    assert caught.value.retry_after == seconds


async def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    async with answering(lambda _: httpx.Response(429, headers={"Retry-After": date})) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.delete_account(UNKNOWN)
    assert caught.value.retry_after == pytest.approx(60, abs=5)


async def test_retry_after_of_the_simulator_is_read(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_listings=1, listing_error_status=429, retry_after_sec=12)
    with pytest.raises(CspUnavailable) as caught:
        await csp.list_accounts()
    assert caught.value.retry_after == 12


async def test_a_hanging_csp_times_out(simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_deletes=1, delete_error_status="hang")
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN, timeout_sec=0.1) as csp:
        with pytest.raises(CspUnavailable, match=r"no answer to DELETE within 0\.1 s") as caught:
            await csp.delete_account(UNKNOWN)
        assert caught.value.status is None


async def test_a_truncated_answer_raises_csp_unavailable(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_listings=1, listing_error_status="cut")
    with pytest.raises(CspUnavailable, match="GET did not get through to CSP: RemoteProtocolError"):
        await csp.list_accounts()
    assert len((await csp.list_accounts()).accounts) == 3


async def test_a_refused_or_lost_connection_raises_csp_unavailable() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with CspClient(url, TOKEN) as csp:
        with pytest.raises(CspUnavailable, match="did not get through") as lost:
            await csp.list_accounts()
        server.close()
        await server.wait_closed()
        with pytest.raises(CspUnavailable, match="ConnectError") as refused:
            await csp.delete_account(UNKNOWN)
    assert lost.value.status is refused.value.status is None


async def test_a_cancelled_call_raises_cancelled_error(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_deletes=1, delete_error_status="hang")
    call = asyncio.create_task(csp.delete_account(UNKNOWN))
    async with asyncio.timeout(PATIENCE_SEC):
        while not (await simulator.get("/_control/calls")).json()["running"]:  # noqa: ASYNC110 (no event exists)
            await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_call_imports_no_module(csp: CspClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dependency of httpx tries to import a missing optional module several times per call."""
    looked_for: list[str] = []

    class Watch:
        def find_spec(self, name: str, *_: object) -> None:
            looked_for.append(name)

    await csp.list_accounts()
    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    await csp.list_accounts()
    assert looked_for == []


async def test_no_cookie_is_stored() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert "Cookie" not in request.headers
        return httpx.Response(204, headers={"Set-Cookie": "session=1; Path=/"})

    async with answering(respond) as csp:
        for _ in range(2):
            await csp.delete_account(UNKNOWN)


async def test_messages_are_one_short_line_without_the_token() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        seen = request.headers["Authorization"]
        assert seen == f"Token {TOKEN}"
        return httpx.Response(500, text=f"a\r\n\tb\x1b[31m {seen} " + "x" * 170 + seen * 1000)

    async with answering(respond) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.delete_account(UNKNOWN)
        assert TOKEN not in repr(csp)
    message = str(caught.value)
    assert message.startswith("CSP answered DELETE with 500: a b [31m Token *** xxx")
    assert TOKEN[:6] not in message
    assert len(message) < 250
    assert message.isprintable()


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "tøken"])
def test_an_invalid_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="the CSP token must be printable ASCII without spaces"):
        CspClient("http://csp.test", token)


# Bounds


@pytest.fixture(scope="module")
def bomb() -> None:
    """Let the simulator create its gzip bomb before memory is measured."""
    build_gzip_bomb()


async def call(csp: CspClient, operation: str) -> object:
    return await (csp.list_accounts() if operation == "listing" else csp.delete_account(UNKNOWN))


@pytest.mark.parametrize("status", ["bomb", "flood"])
@pytest.mark.parametrize(("operation", "bound"), [("listing", 64 * MIB), ("delete", MIB)])
async def test_an_answer_over_its_bound_raises_csp_unavailable_and_takes_little_memory(
    csp: CspClient, simulator: httpx.AsyncClient, bomb: None, operation: str, bound: int, status: str
) -> None:
    await call(csp, operation)
    await behave(simulator, **{f"{operation}_error_rate": 1, f"{operation}_error_status": status})
    tracemalloc.start()
    try:
        with pytest.raises(CspUnavailable, match=f" with more than {bound} bytes$") as caught:
            await call(csp, operation)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.status == 200
    # The growing body and its copy, or one decoded network chunk. The rest belongs to the simulator and the test.
    assert peak < 2 * bound + 8 * MIB


async def test_a_gzip_bomb_as_answer_to_a_deletion_takes_little_memory(
    simulator: httpx.AsyncClient, bomb: None
) -> None:
    await behave(simulator, delete_error_rate=1, delete_error_status="bomb")
    program = f"""
import asyncio, contextlib, pathlib
from sandbox_broker.csp.client import CspClient, CspUnavailable
def peak_kib():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
async def main():
    async with CspClient("{simulator.base_url.join("/v2")}", "{TOKEN}") as csp:
        await csp.list_accounts()
        before = peak_kib()
        with contextlib.suppress(CspUnavailable):
            await csp.delete_account("{UNKNOWN}")
        print(peak_kib() - before)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert int(output) < 40 * 1024


@pytest.mark.parametrize("operation", ["listing", "delete"])
async def test_a_slow_answer_ends_at_the_total_time_out(simulator: httpx.AsyncClient, operation: str) -> None:
    await behave(simulator, **{f"{operation}_error_rate": 1, f"{operation}_error_status": "drip"})
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN, timeout_sec=0.3) as csp:
        with pytest.raises(CspUnavailable, match=r"no answer to (GET|DELETE) within 0\.3 s"):
            await call(csp, operation)
    async with asyncio.timeout(PATIENCE_SEC):
        while (await simulator.get("/_control/calls")).json()["running"]:  # noqa: ASYNC110 (no event exists)
            await asyncio.sleep(0.01)


async def test_an_endless_head_raises_csp_unavailable() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\n")
            while True:
                writer.write(b"X-Filler: 0123456789\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, CspClient(f"http://127.0.0.1:{port}", TOKEN, timeout_sec=PATIENCE_SEC) as csp:
        with pytest.raises(CspUnavailable, match="did not get through to CSP: RemoteProtocolError"):
            await csp.delete_account(UNKNOWN)
        await asyncio.wait_for(gone.wait(), PATIENCE_SEC)


def in_chunks(*chunks: bytes, status: int = 200, **headers: str) -> httpx.Response:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, content=stream())


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
async def test_a_gzip_listing_is_read_with_any_chunk_size(encoding: str, size: int) -> None:
    body = gzip.compress(json.dumps({"results": [record(1), record(2)]}).encode())
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    async with answering(lambda _: in_chunks(*chunks, Content_Encoding=encoding)) as csp:
        assert (await csp.list_accounts()).accounts == (account(1), account(2))


async def test_only_gzip_is_offered() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert request.headers.get_list("Accept-Encoding") == ["gzip"]
        return httpx.Response(204)

    async with answering(respond) as csp:
        await csp.delete_account(UNKNOWN)


@pytest.mark.parametrize(
    ("encoding", "body", "found"),
    [
        ("br", b"x", "a body in the encoding br; gzip was offered"),
        ("deflate", b"x", "a body in the encoding deflate; gzip was offered"),
        ("gzip, gzip", EMPTY_OBJECT_GZIP, "a body in the encoding gzip, gzip; gzip was offered"),
        (TOKEN, b"x", "a body in the encoding ***; gzip was offered"),
        ("gzip", b"{}", "a body that is not valid gzip"),
        ("gzip", EMPTY_OBJECT_GZIP[:-8] + bytes(8), "a body that is not valid gzip"),
        ("gzip", EMPTY_OBJECT_GZIP + b"x", "data after the end of its gzip body"),
    ],
)
@pytest.mark.parametrize("status", [200, 429])
async def test_an_undecodable_body_raises_csp_unavailable(
    encoding: str, body: bytes, found: str, status: int
) -> None:
    headers = {"Content_Encoding": encoding, "Retry_After": "7"}
    async with answering(lambda _: in_chunks(body, status=status, **headers)) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.delete_account(UNKNOWN)
    assert str(caught.value) == f"CSP answered DELETE with {found}"
    assert (caught.value.status, caught.value.retry_after) == (status, 7)


@pytest.mark.parametrize("encoding", ["br", "gzip", ""])
async def test_an_answer_without_a_body_may_name_any_encoding(encoding: str) -> None:
    async with answering(lambda _: in_chunks(status=204, Content_Encoding=encoding)) as csp:
        assert await csp.delete_account(UNKNOWN) == "deleted"


async def test_a_listing_of_100_000_accounts_is_far_below_its_bound() -> None:
    accounts = AccountStore()
    accounts.create_sandboxes(10_000, "sandbox-")
    assert 10 * len(accounts.build_listing()) < csp_http.MAX_BODY_BYTES["list_accounts"] / 2.5


# Metrics


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        (httpx.Response(204), "ok"),
        (httpx.Response(404), "not_found"),
        (httpx.Response(401), "unauthorized"),
        (httpx.Response(429), "throttled"),
        (httpx.Response(503), "server_error"),
        (httpx.Response(500, html="<html>"), "html"),
        (httpx.Response(418), "other"),
        (httpx.ReadTimeout("late"), "timeout"),
        (httpx.ConnectError("nobody there"), "unreachable"),
    ],
)
async def test_calls_are_measured_by_operation_and_outcome(
    response: httpx.Response | httpx.HTTPError, outcome: str
) -> None:
    def respond(_: httpx.Request) -> httpx.Response:
        if isinstance(response, httpx.HTTPError):
            raise response
        return response

    def count() -> float:
        labels = {"operation": "delete_account", "outcome": outcome}
        return REGISTRY.get_sample_value("broker_csp_request_seconds_count", labels) or 0.0

    before = count()
    async with answering(respond) as csp:
        with contextlib.suppress(CspUnavailable, CspUnauthorized):
            await csp.delete_account(UNKNOWN)
    assert count() == before + 1
