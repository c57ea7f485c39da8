"""The CSP API under /v2, which the broker uses."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from csp_simulator.app import DEFAULT_TOKEN, create_app
from devstack.conditions import wait_until

from .simulator_harness import (
    LISTING,
    connect_in_process,
    fetch_records,
    fetch_running_calls,
    fetch_sandboxes,
    get_account_path,
    set_behaviour,
)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=3, seed=1)) as client:
        yield client


async def test_active_sandboxes_are_listed_with_all_fields_of_csp(csp: httpx.AsyncClient) -> None:
    accounts = await fetch_sandboxes(csp)
    assert [(a["csp_id"], a["name"]) for a in accounts] == [
        (2012224, "sandbox-1"),
        (2012225, "sandbox-2"),
        (2012226, "sandbox-3"),
    ]
    for account in accounts:
        assert re.fullmatch(r"identity/accounts/[0-9a-f-]{36}", account["id"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", account["created_at"])
    assert [a["sfdc_account_id"] is None for a in accounts] == [False, True, False]


async def test_other_account_types_and_states_are_listed_too(csp: httpx.AsyncClient) -> None:
    kinds = {(r["account_type"], r["state"]) for r in await fetch_records(csp)}
    assert ("sandbox", "disabled") in kinds
    assert ("standard", "active") in kinds


@pytest.mark.parametrize("header", [None, "Token wrong", f"Bearer {DEFAULT_TOKEN}", DEFAULT_TOKEN])
async def test_missing_or_wrong_token_is_401_in_json(csp: httpx.AsyncClient, header: str | None) -> None:
    del csp.headers["Authorization"]
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", LISTING), ("DELETE", "/v2/sandbox/accounts/x")):
        response = await csp.request(method, path, headers=headers)
        assert response.status_code == 401
        assert "token" in response.json()["error"][0]["message"]


@pytest.mark.parametrize("form", ["token", "next", "header"])
async def test_pages_name_the_next_one_and_contain_all_records(csp: httpx.AsyncClient, form: str) -> None:
    records = await fetch_records(csp)
    await set_behaviour(csp, listing_page_size=3, listing_page_form=form)
    url: str | None = LISTING
    found: list[Any] = []
    while url:
        answer = await csp.get(url)
        found += answer.json()["results"]
        token = answer.json().get("page", {}).get("page_token", "null")
        link = answer.json().get("next") or answer.links.get("next", {}).get("url")
        url = f"{LISTING}?_page_token={token}" if token != "null" else link
    assert found == records


async def test_pages_may_state_more_records_than_they_contain(csp: httpx.AsyncClient) -> None:
    records = await fetch_records(csp)
    await set_behaviour(csp, listing_page_size=3, listing_pages_missing=1)
    page = (await csp.get(LISTING, params={"_offset": 3})).json()
    assert page == {"results": records[3 : len(records) - 3], "page": {"total_size": len(records), "offset": 3}}


async def test_deleted_account_is_not_listed(csp: httpx.AsyncClient) -> None:
    first, *others = await fetch_sandboxes(csp)
    assert (await csp.delete(get_account_path(first))).status_code == 204
    assert await fetch_sandboxes(csp) == others
    assert (await csp.delete(get_account_path(first))).status_code == 404


async def test_account_id_is_case_insensitive(csp: httpx.AsyncClient) -> None:
    account = (await fetch_sandboxes(csp))[0]
    external_id = account["id"].removeprefix("identity/accounts/").upper()
    assert (await csp.delete(f"/v2/sandbox/accounts/{external_id}")).status_code == 204


async def test_only_active_sandboxes_can_be_deleted(csp: httpx.AsyncClient) -> None:
    decoy = next(r for r in await fetch_records(csp) if r["state"] == "disabled")
    assert (await csp.delete(get_account_path(decoy))).status_code == 404
    assert decoy in await fetch_records(csp)


async def test_account_stays_listed_until_its_deletion_is_answered(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, delete_latency_sec=0.5)
    account = (await fetch_sandboxes(csp))[0]
    deletion = asyncio.create_task(csp.delete(get_account_path(account)))
    await wait_until(lambda: fetch_running_calls(csp))
    assert account in await fetch_sandboxes(csp)
    assert (await deletion).status_code == 204
    assert account not in await fetch_sandboxes(csp)


async def test_later_of_two_concurrent_deletions_is_404(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, delete_latency_sec=0.05)
    path = get_account_path((await fetch_sandboxes(csp))[0])
    responses = await asyncio.gather(csp.delete(path), csp.delete(path))
    assert sorted(r.status_code for r in responses) == [204, 404]


async def test_fail_next_deletes_counts_down(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, fail_next_deletes=2, delete_error_html=True)
    path = get_account_path((await fetch_sandboxes(csp))[0])
    responses = [await csp.delete(path) for _ in range(3)]
    assert [r.status_code for r in responses] == [500, 500, 204]
    assert responses[0].headers["content-type"].startswith("text/html")
    assert responses[0].text.startswith("<html>")


async def test_fail_next_listings_uses_the_error_status(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, fail_next_listings=1, listing_error_status=429, retry_after_sec=7)
    response = await csp.get(LISTING)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert (await csp.get(LISTING)).status_code == 200


async def test_error_rate_1_fails_every_deletion_without_effect(csp: httpx.AsyncClient) -> None:
    before = await fetch_sandboxes(csp)
    await set_behaviour(csp, delete_error_rate=1, delete_error_status=200, delete_error_html=True)
    for account in before:
        response = await csp.delete(get_account_path(account))
        assert (response.status_code, response.text[:6]) == (200, "<html>")
    assert await fetch_sandboxes(csp) == before


async def test_seed_makes_error_rates_repeatable() -> None:
    async def fetch_statuses(seed: int) -> list[int]:
        async with connect_in_process(create_app(accounts=0, seed=seed)) as csp:
            await set_behaviour(csp, listing_error_rate=0.5)
            return [(await csp.get(LISTING)).status_code for _ in range(40)]

    first = await fetch_statuses(1)
    assert set(first) == {200, 500}
    assert await fetch_statuses(1) == first
    assert await fetch_statuses(2) != first


async def test_listing_latency_delays_the_response(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_latency_sec=0.1)
    start = asyncio.get_running_loop().time()
    await fetch_sandboxes(csp)
    assert asyncio.get_running_loop().time() - start >= 0.1


async def test_listing_can_be_shortened_or_truncated(csp: httpx.AsyncClient) -> None:
    whole = await fetch_records(csp)
    await set_behaviour(csp, listing_fraction=0.5)
    assert await fetch_records(csp) == whole[: len(whole) // 2]
    await set_behaviour(csp, listing_fraction=1, listing_cut_short=True)
    truncated = await csp.get(LISTING)
    assert truncated.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        truncated.json()


async def test_reject_tokens_applies_to_the_csp_api(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, reject_tokens=True)
    assert (await csp.get(LISTING)).status_code == 401


async def test_unknown_routes_and_methods_are_answered_in_json(csp: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v2/nothing", 404), ("POST", LISTING, 405)):
        response = await csp.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]
