"""The CSP client, against the simulator where it can misbehave so, else against a canned answer."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from csp_simulator.app import create_app
from csp_simulator.testing import serving
from sandbox_broker.csp import Account, CspClient, CspUnauthorized, CspUnavailable

TOKEN = "test-token-0123456789"
UNKNOWN = "00000000-0000-4000-8000-00000000ffff"


@pytest.fixture
async def simulator() -> AsyncIterator[httpx.AsyncClient]:
    """The root of a running simulator with three sandboxes."""
    async with (
        serving(create_app(accounts=3, token=TOKEN)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        yield client


@pytest.fixture
async def csp(simulator: httpx.AsyncClient) -> AsyncIterator[CspClient]:
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN) as client:
        yield client


async def behave(simulator: httpx.AsyncClient, **switches: object) -> None:
    (await simulator.patch("/_control/behaviour", json=switches)).raise_for_status()


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> CspClient:
    return CspClient("http://csp.test/v2", TOKEN, transport=httpx.MockTransport(respond))


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


async def test_every_field_is_taken_over(csp: CspClient, simulator: httpx.AsyncClient) -> None:
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
        ({"csp_id": None}, "csp_id is not a positive integer"),
        ({"csp_id": True}, "csp_id is not a positive integer"),
        ({"csp_id": 1.5}, "csp_id is not a positive integer"),
        ({"csp_id": 0}, "csp_id is not a positive integer"),
        ({"csp_id": -3}, "csp_id is not a positive integer"),
        ({"csp_id": "12x"}, "csp_id is not a positive integer"),
        ({"csp_id": "١٢"}, "csp_id is not a positive integer"),
        ({"csp_id": "9" * 5000}, "csp_id is not a positive integer"),
        ({"csp_id": [1]}, "csp_id is not a positive integer"),
        ({"name": None}, "name is blank"),
        ({"name": ""}, "name is blank"),
        ({"name": " \u00a0"}, "name is blank"),
        ({"name": 7}, "name is blank"),
        ({"name": "a\x00b"}, "control characters"),
        ({"name": "a\nb"}, "control characters"),
        ({"name": "a\ud800b"}, "control characters"),
        ({"name": "a" * 10_000}, "too long"),
    ],
)
async def test_a_record_that_lacks_what_we_need_is_skipped_with_a_reason(
    changes: dict[str, object], reason: str
) -> None:
    body = json.dumps({"results": [record(1), record(2, **changes), record(3)]})
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        listing = await csp.list_accounts()
    assert listing.accounts == (account(1), account(3))
    [skipped] = listing.skipped
    assert skipped.startswith("record 1: ")
    assert reason in skipped
    assert len(skipped) <= 200


async def test_records_that_are_no_objects_are_skipped(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await simulator.put("/_control/accounts", json={"raw": [None, [], "x", 5, record(1), {}]})
    listing = await csp.list_accounts()
    assert listing.accounts == (account(1),)
    assert listing.skipped == tuple(f"record {index}: not an object" for index in range(4))
    assert listing.ignored == 1


@pytest.mark.parametrize(
    "repeated",
    [
        record(1, name="other"),
        record(2, csp_id=3000001),
        record(2, csp_id="03000001"),
        record(2, id=record(1)["id"]),
    ],
)
async def test_the_first_of_two_records_with_one_id_is_kept(
    csp: CspClient, simulator: httpx.AsyncClient, repeated: dict[str, Any]
) -> None:
    await simulator.put("/_control/accounts", json={"raw": [record(1), repeated, record(3)]})
    listing = await csp.list_accounts()
    assert listing.accounts == (account(1), account(3))
    assert len(listing.skipped) == 1
    assert "was listed before" in listing.skipped[0]


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


async def test_an_empty_listing_is_a_listing(csp: CspClient, simulator: httpx.AsyncClient) -> None:
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
async def test_a_body_without_results_is_no_listing(body: str) -> None:
    async with answering(lambda _: httpx.Response(200, text=body)) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await csp.list_accounts()
    assert caught.value.status == 200
    assert len(str(caught.value)) < 300


async def test_a_listing_in_broken_utf_8_is_no_listing() -> None:
    async with answering(lambda _: httpx.Response(200, content=b'{"results": ["\xff"]}')) as csp:
        with pytest.raises(CspUnavailable):
            await csp.list_accounts()


async def test_a_listing_that_is_cut_short_is_no_listing(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, listing_cut_short=True)
    with pytest.raises(CspUnavailable):
        await csp.list_accounts()


async def test_an_html_page_is_no_listing(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_listings=1, listing_error_status=200, listing_error_html=True)
    with pytest.raises(CspUnavailable):
        await csp.list_accounts()


async def test_a_large_listing_leaves_the_event_loop_free() -> None:
    async def longest_pause() -> float:
        longest = 0.0
        while not done.is_set():
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - start)
        return longest

    body = json.dumps({"results": [record(number) for number in range(100_000)]}).encode()
    done = asyncio.Event()
    pause = asyncio.create_task(longest_pause())
    async with answering(lambda _: httpx.Response(200, content=body)) as csp:
        await asyncio.sleep(0.01)  # the watcher must be under way
        start = time.perf_counter()
        listing = await csp.list_accounts()
        total = time.perf_counter() - start
    done.set()
    assert len(listing.accounts) == 100_000
    # Only the JSON decoder keeps the interpreter to itself, about a quarter of the whole.
    assert await pause < 0.7 * total


# Deleting


async def test_a_deletion_takes_the_account_out_of_the_listing(csp: CspClient) -> None:
    first, *others = (await csp.list_accounts()).accounts
    assert await csp.delete_account(first.external_id) == "deleted"
    assert (await csp.list_accounts()).accounts == tuple(others)


async def test_deleting_what_is_gone_is_success(csp: CspClient) -> None:
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
async def test_200_and_204_are_success_whatever_the_body(response: httpx.Response) -> None:
    async with answering(lambda _: response) as csp:
        assert await csp.delete_account(UNKNOWN) == "deleted"


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "text/plain"])
async def test_a_page_under_200_is_not_a_deletion(content_type: str) -> None:
    page = httpx.Response(200, text=" \n<!doctype html><p>Sign in</p>", headers={"Content-Type": content_type})
    async with answering(lambda _: page) as csp:
        with pytest.raises(CspUnavailable, match="200"):
            await csp.delete_account(UNKNOWN)


@pytest.mark.parametrize("external_id", ["", "..", "a/b", f"{UNKNOWN}\n", f"identity/accounts/{UNKNOWN}"])
async def test_only_a_uuid_is_ever_put_into_the_path(csp: CspClient, external_id: str) -> None:
    with pytest.raises(ValueError, match="must be a uuid"):
        await csp.delete_account(external_id)


# Failures


@pytest.mark.parametrize("status", [400, 405, 409, 429, 500, 502, 503])
@pytest.mark.parametrize("html", [True, False])
async def test_errors_of_csp_are_unavailability(
    csp: CspClient, simulator: httpx.AsyncClient, status: int, html: bool
) -> None:
    switches = {"fail_next_deletes": 1, "delete_error_status": status, "delete_error_html": html}
    await behave(simulator, **switches)
    with pytest.raises(CspUnavailable, match=f"CSP answered DELETE with {status}") as caught:
        await csp.delete_account(UNKNOWN)
    assert caught.value.status == status
    assert caught.value.retry_after is None


async def test_404_for_the_listing_is_unavailability() -> None:
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


async def test_a_rejected_token_is_its_own_error(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, reject_tokens=True)
    with pytest.raises(CspUnauthorized) as listing:
        await csp.list_accounts()
    with pytest.raises(CspUnauthorized) as deletion:
        await csp.delete_account(UNKNOWN)
    assert listing.value.status == deletion.value.status == 401


async def test_403_is_a_rejected_token_too() -> None:
    async with answering(lambda _: httpx.Response(403)) as csp:
        with pytest.raises(CspUnauthorized):
            await csp.delete_account(UNKNOWN)


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


async def test_retry_after_of_the_simulator_arrives(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, fail_next_listings=1, listing_error_status=429, retry_after_sec=12)
    with pytest.raises(CspUnavailable) as caught:
        await csp.list_accounts()
    assert caught.value.retry_after == 12


async def test_a_hanging_csp_is_given_up_after_the_time_out(simulator: httpx.AsyncClient) -> None:
    await behave(simulator, delete_latency_sec=1)
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN, timeout_sec=0.1) as csp:
        start = time.monotonic()
        with pytest.raises(CspUnavailable, match=r"no answer to DELETE within 0\.1 s") as caught:
            await csp.delete_account(UNKNOWN)
        assert time.monotonic() - start < 0.9
        assert caught.value.status is None


async def test_an_answer_that_drips_in_is_given_up_as_well() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, CspClient(f"http://127.0.0.1:{port}", TOKEN, timeout_sec=0.3) as csp:
        start = time.monotonic()
        with pytest.raises(CspUnavailable, match="no answer"):
            await csp.list_accounts()
        assert time.monotonic() - start < 3
        await asyncio.wait_for(gone.wait(), 5)


async def test_a_connection_that_is_refused_or_lost_is_unavailability() -> None:
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


async def test_a_cancelled_call_stays_cancelled(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, delete_latency_sec=0.5)
    call = asyncio.create_task(csp.delete_account(UNKNOWN))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


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
def test_a_token_no_header_can_carry_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ValueError, match="the CSP token must be printable ASCII without spaces"):
        CspClient("http://csp.test", token)
