"""The simulator as the broker sees it: the CSP API under /v2."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from csp_simulator.app import DEFAULT_TOKEN, create_app

from .simulator_harness import LISTING, behave, client_of, eventually, path_of, results, running, sandboxes


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(accounts=3, seed=1)) as client:
        yield client


async def test_lists_active_sandboxes_with_all_the_fields_csp_sends(csp: httpx.AsyncClient) -> None:
    accounts = await sandboxes(csp)
    assert [(a["csp_id"], a["name"]) for a in accounts] == [
        (2012224, "sandbox-1"),
        (2012225, "sandbox-2"),
        (2012226, "sandbox-3"),
    ]
    for account in accounts:
        assert re.fullmatch(r"identity/accounts/[0-9a-f-]{36}", account["id"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", account["created_at"])
    assert [a["sfdc_account_id"] is None for a in accounts] == [False, True, False]


async def test_lists_accounts_that_do_not_count_among_the_others(csp: httpx.AsyncClient) -> None:
    kinds = {(r["account_type"], r["state"]) for r in await results(csp)}
    assert ("sandbox", "disabled") in kinds
    assert ("standard", "active") in kinds


@pytest.mark.parametrize("header", [None, "Token wrong", f"Bearer {DEFAULT_TOKEN}", DEFAULT_TOKEN])
async def test_a_missing_or_wrong_token_is_401_in_json(csp: httpx.AsyncClient, header: str | None) -> None:
    del csp.headers["Authorization"]
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", LISTING), ("DELETE", "/v2/sandbox/accounts/x")):
        response = await csp.request(method, path, headers=headers)
        assert response.status_code == 401
        assert "token" in response.json()["error"][0]["message"]


async def test_a_deleted_account_is_listed_no_more(csp: httpx.AsyncClient) -> None:
    first, *others = await sandboxes(csp)
    assert (await csp.delete(path_of(first))).status_code == 204
    assert await sandboxes(csp) == others
    assert (await csp.delete(path_of(first))).status_code == 404


async def test_an_id_in_upper_case_is_the_same_account(csp: httpx.AsyncClient) -> None:
    account = (await sandboxes(csp))[0]
    external_id = account["id"].removeprefix("identity/accounts/").upper()
    assert (await csp.delete(f"/v2/sandbox/accounts/{external_id}")).status_code == 204


async def test_only_active_sandboxes_can_be_deleted(csp: httpx.AsyncClient) -> None:
    decoy = next(r for r in await results(csp) if r["state"] == "disabled")
    assert (await csp.delete(path_of(decoy))).status_code == 404
    assert decoy in await results(csp)


async def test_an_account_stays_listed_until_its_deletion_is_answered(csp: httpx.AsyncClient) -> None:
    await behave(csp, delete_latency_sec=0.5)
    account = (await sandboxes(csp))[0]
    deletion = asyncio.create_task(csp.delete(path_of(account)))
    await eventually(lambda: running(csp))
    assert account in await sandboxes(csp)
    assert (await deletion).status_code == 204
    assert account not in await sandboxes(csp)


async def test_of_two_deletions_at_once_the_second_finds_it_gone(csp: httpx.AsyncClient) -> None:
    await behave(csp, delete_latency_sec=0.05)
    path = path_of((await sandboxes(csp))[0])
    responses = await asyncio.gather(csp.delete(path), csp.delete(path))
    assert sorted(r.status_code for r in responses) == [204, 404]


async def test_the_next_n_deletions_fail_and_then_it_works_again(csp: httpx.AsyncClient) -> None:
    await behave(csp, fail_next_deletes=2, delete_error_html=True)
    path = path_of((await sandboxes(csp))[0])
    responses = [await csp.delete(path) for _ in range(3)]
    assert [r.status_code for r in responses] == [500, 500, 204]
    assert responses[0].headers["content-type"].startswith("text/html")
    assert responses[0].text.startswith("<html>")


async def test_the_next_n_listings_fail_with_the_status_asked_for(csp: httpx.AsyncClient) -> None:
    await behave(csp, fail_next_listings=1, listing_error_status=429, retry_after_sec=7)
    response = await csp.get(LISTING)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert (await csp.get(LISTING)).status_code == 200


async def test_an_error_rate_of_one_fails_always_and_changes_nothing(csp: httpx.AsyncClient) -> None:
    before = await sandboxes(csp)
    await behave(csp, delete_error_rate=1, delete_error_status=200, delete_error_html=True)
    for account in before:
        response = await csp.delete(path_of(account))
        assert (response.status_code, response.text[:6]) == (200, "<html>")
    assert await sandboxes(csp) == before


async def test_error_rates_repeat_with_the_seed() -> None:
    async def statuses(seed: int) -> list[int]:
        async with client_of(create_app(accounts=0, seed=seed)) as csp:
            await behave(csp, listing_error_rate=0.5)
            return [(await csp.get(LISTING)).status_code for _ in range(40)]

    first = await statuses(1)
    assert set(first) == {200, 500}
    assert await statuses(1) == first
    assert await statuses(2) != first


async def test_listing_latency_is_waited_out(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_latency_sec=0.1)
    start = asyncio.get_running_loop().time()
    await sandboxes(csp)
    assert asyncio.get_running_loop().time() - start >= 0.1


async def test_a_half_listing_is_either_short_or_cut_off(csp: httpx.AsyncClient) -> None:
    whole = await results(csp)
    await behave(csp, listing_fraction=0.5)
    assert await results(csp) == whole[: len(whole) // 2]
    await behave(csp, listing_fraction=1, listing_cut_short=True)
    cut = await csp.get(LISTING)
    assert cut.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        cut.json()


async def test_every_token_can_be_rejected(csp: httpx.AsyncClient) -> None:
    await behave(csp, reject_tokens=True)
    assert (await csp.get(LISTING)).status_code == 401


async def test_unknown_routes_and_methods_are_answered_in_json(csp: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v2/nothing", 404), ("POST", LISTING, 405)):
        response = await csp.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]
