"""Injected faults: in deletions, in listings, on the connection."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from csp_simulator.app import create_app
from devstack.conditions import wait_until

from .simulator_harness import (
    LISTING,
    connect_in_process,
    fetch_calls,
    fetch_records,
    fetch_running_calls,
    fetch_sandboxes,
    get_account_path,
    get_external_id,
    serve_and_connect,
    set_behaviour,
)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with connect_in_process(create_app(accounts=10, seed=1)) as client:
        yield client


# Failures


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
async def test_failure_has_the_configured_status(csp: httpx.AsyncClient, status: int) -> None:
    await set_behaviour(csp, fail_next_listings=1, listing_error_status=status)
    response = await csp.get(LISTING)
    assert (response.status_code, response.json()) == (
        status,
        {"error": [{"message": "injected by the simulator"}]},
    )
    assert "retry-after" not in response.headers


async def test_deletions_of_undeletable_accounts_always_fail(csp: httpx.AsyncClient) -> None:
    first, second, *_ = await fetch_sandboxes(csp)
    await set_behaviour(csp, undeletable=[get_external_id(first)])
    statuses = [(await csp.delete(get_account_path(account))).status_code for account in (first, first, second)]
    assert statuses == [500, 500, 204]
    assert first in await fetch_sandboxes(csp)


async def test_error_status_is_chosen_from_a_list_at_random(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_error_rate=1, listing_error_status=[500, 502, 503])
    statuses = [(await csp.get(LISTING)).status_code for _ in range(60)]
    assert set(statuses) == {500, 502, 503}
    assert any(later != earlier for earlier, later in pairwise(statuses))


async def test_faults_of_deletions_do_not_depend_on_listings() -> None:
    async def fetch_statuses(listings: int) -> list[int]:
        async with connect_in_process(create_app(accounts=0, seed=7)) as csp:
            await set_behaviour(csp, delete_error_rate=0.5, listing_error_rate=0.5)
            statuses = []
            for _ in range(30):
                statuses.append((await csp.delete("/v2/sandbox/accounts/none")).status_code)
                for _ in range(listings):
                    await csp.get(LISTING)
            return statuses

    assert await fetch_statuses(0) == await fetch_statuses(3)


async def test_seed_makes_account_ids_repeatable_also_after_a_reset() -> None:
    async def fetch_ids(seed: int) -> list[str]:
        async with connect_in_process(create_app(accounts=3, seed=seed)) as csp:
            first = [r["id"] for r in await fetch_records(csp)]
            await csp.post("/_control/reset", json={"accounts": 3})
            return first + [r["id"] for r in await fetch_records(csp)]

    first_run = await fetch_ids(1)
    assert await fetch_ids(1) == first_run
    assert len(set(first_run)) == len(first_run)
    assert set(await fetch_ids(2)).isdisjoint(first_run)


async def test_reset_can_change_the_seed(csp: httpx.AsyncClient) -> None:
    async def fetch_statuses(seed: int) -> list[int]:
        await csp.post("/_control/reset", json={"seed": seed})
        await set_behaviour(csp, listing_error_rate=0.5)
        return [(await csp.get(LISTING)).status_code for _ in range(40)]

    assert await fetch_statuses(5) == await fetch_statuses(5)
    assert await fetch_statuses(5) != await fetch_statuses(6)


async def test_latency_spread_is_random(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_latency_sec=0.02, listing_latency_spread_sec=0.05)
    for _ in range(5):
        await csp.get(LISTING)
    durations = [call["duration_ms"] for call in await fetch_calls(csp)]
    assert min(durations) >= 19.9
    assert len({round(ms) for ms in durations}) > 1


# Deletions


@pytest.mark.parametrize("status", [500, 503, 200])
async def test_failed_deletion_can_take_effect(csp: httpx.AsyncClient, status: int) -> None:
    first, *others = await fetch_sandboxes(csp)
    await set_behaviour(csp, fail_next_deletes=1, delete_error_status=status, delete_error_after_effect=True)
    assert (await csp.delete(get_account_path(first))).status_code == status
    assert await fetch_sandboxes(csp) == others
    assert (await csp.delete(get_account_path(first))).status_code == 404


async def test_hanging_deletion_can_take_effect() -> None:
    async with serve_and_connect(accounts=3) as csp:
        first, *others = await fetch_sandboxes(csp)
        await set_behaviour(csp, fail_next_deletes=1, delete_error_status="hang", delete_error_after_effect=True)
        deletion = asyncio.create_task(csp.delete(get_account_path(first)))

        async def is_deleted() -> bool:
            return await fetch_sandboxes(csp) == others

        await wait_until(is_deleted)
        assert [call["method"] for call in await fetch_running_calls(csp)] == ["DELETE"]
        deletion.cancel()

        async def fetch_deletions() -> list[dict[str, Any]]:
            return await fetch_calls(csp, method="DELETE")

        await wait_until(fetch_deletions)
        assert [call["status"] for call in await fetch_deletions()] == [None]


@pytest.mark.parametrize("listings", [1, 3])
async def test_deleted_account_can_stay_listed_for_some_listings(csp: httpx.AsyncClient, listings: int) -> None:
    before = await fetch_records(csp)
    first, second, *_ = await fetch_sandboxes(csp)
    await set_behaviour(csp, deleted_stay_listed=listings)
    assert (await csp.delete(get_account_path(first))).status_code == 204
    await set_behaviour(csp, deleted_stay_listed=0)
    assert (await csp.delete(get_account_path(second))).status_code == 204
    for _ in range(listings):
        assert await fetch_records(csp) == [r for r in before if r != second]
    assert await fetch_records(csp) == [r for r in before if r not in (first, second)]


async def test_deleted_account_can_stay_listed_for_ever(csp: httpx.AsyncClient) -> None:
    before = await fetch_records(csp)
    first = (await fetch_sandboxes(csp))[0]
    await set_behaviour(csp, deleted_stay_listed=None)
    assert (await csp.delete(get_account_path(first))).status_code == 204
    for _ in range(5):
        assert await fetch_records(csp) == before
    assert (await csp.delete(get_account_path(first))).status_code == 404
    assert first not in (await csp.get("/_control/accounts")).json()["accounts"]
    await csp.post("/_control/reset", json={"accounts": 1})
    assert first not in await fetch_records(csp)


# Listings


async def test_listing_can_be_empty(csp: httpx.AsyncClient) -> None:
    await set_behaviour(csp, listing_fraction=0)
    assert (await csp.get(LISTING)).json() == {"results": []}


async def test_first_sandboxes_can_be_listed_twice(csp: httpx.AsyncClient) -> None:
    before, first = await fetch_records(csp), (await fetch_sandboxes(csp))[:2]
    await set_behaviour(csp, listing_duplicates=2)
    assert await fetch_records(csp) == before + first
    await set_behaviour(csp, listing_duplicates=1000)
    assert len(await fetch_records(csp)) == len(before) + 10


async def test_last_sandboxes_can_be_damaged_in_seven_ways(csp: httpx.AsyncClient) -> None:
    before = await fetch_records(csp)
    await set_behaviour(csp, listing_malformed=7)
    after = await fetch_records(csp)
    changed = [(original, listed) for original, listed in zip(before, after, strict=True) if original != listed]
    assert [original for original, _ in changed] == before[-7:]
    damage = [
        None if listed is None else tuple(key for key in original if listed.get(key) != original[key])
        for original, listed in changed
    ]
    assert damage == [("name",), ("id",), ("id",), ("state",), ("csp_id",), ("csp_id",), None]
    await set_behaviour(csp, listing_malformed=0)
    assert await fetch_records(csp) == before


async def test_raw_record_can_be_damaged(csp: httpx.AsyncClient) -> None:
    raw = [{"account_type": "sandbox", "state": "active", "id": [1]}] * 7
    await csp.put("/_control/accounts", json={"raw": raw})
    await set_behaviour(csp, listing_malformed=7)
    assert len(await fetch_records(csp)) == 7


async def test_cut_closes_the_connection_in_the_middle_of_the_body() -> None:
    async with serve_and_connect(accounts=3) as csp:
        await set_behaviour(csp, listing_error_status="cut", delete_error_status="cut")
        await set_behaviour(csp, fail_next_listings=1, fail_next_deletes=1)
        account = (await csp.get("/_control/accounts")).json()["accounts"][-1]
        for method, path in (("GET", LISTING), ("DELETE", get_account_path(account))):
            with pytest.raises(httpx.RemoteProtocolError):
                await csp.request(method, path)
        assert account in await fetch_records(csp)


async def test_hang_ends_when_the_client_disconnects() -> None:
    async with serve_and_connect(accounts=3) as csp:
        await set_behaviour(csp, fail_next_listings=1, listing_error_status="hang")
        with pytest.raises(httpx.ReadTimeout):
            await csp.get(LISTING, timeout=0.2)

        async def is_idle() -> bool:
            return not await fetch_running_calls(csp)

        await wait_until(is_idle)
        (call,) = await fetch_calls(csp)
        assert call["status"] is None
        assert call["duration_ms"] >= 150


async def test_bomb_decodes_to_a_thousand_times_its_size_regardless_of_accept_encoding() -> None:
    async with serve_and_connect(accounts=3) as csp:
        await set_behaviour(csp, fail_next_listings=1, listing_error_status="bomb")
        async with csp.stream("GET", LISTING, headers={"Accept-Encoding": "identity"}) as response:
            sent = [chunk async for chunk in response.aiter_raw()]
        assert (response.status_code, response.headers["Content-Encoding"]) == (200, "gzip")
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
        size = sum(len(decoder.decompress(chunk)) for chunk in sent)
        assert (size, decoder.eof) == (256 * 1024 * 1024, True)
        assert sum(map(len, sent)) < size / 1000


@pytest.mark.parametrize(("status", "sufficient_bytes"), [("flood", 4 * 1024 * 1024), ("drip", 2)])
async def test_endless_body_ends_when_the_client_disconnects(status: str, sufficient_bytes: int) -> None:
    async with serve_and_connect(accounts=3) as csp:
        await set_behaviour(csp, fail_next_listings=1, listing_error_status=status)
        async with csp.stream("GET", LISTING) as response:
            assert response.status_code == 200
            received = 0
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received >= sufficient_bytes:
                    break

        async def is_idle() -> bool:
            return not await fetch_running_calls(csp)

        await wait_until(is_idle)
        assert [call["status"] for call in await fetch_calls(csp)] == [200]


# Accounts


async def test_renamed_account_keeps_its_position(csp: httpx.AsyncClient) -> None:
    before = await fetch_records(csp)
    account = before[5]
    changed = await csp.patch(f"/_control/accounts/{get_external_id(account)}", json={"name": "other", "more": 1})
    assert changed.json() == {**account, "name": "other", "more": 1}
    assert await fetch_records(csp) == [*before[:5], changed.json(), *before[6:]]


async def test_account_can_change_its_id(csp: httpx.AsyncClient) -> None:
    account = (await fetch_sandboxes(csp))[0]
    new = {**account, "id": "identity/accounts/00000000-0000-4000-8000-00000000ABCD"}
    await csp.patch(f"/_control/accounts/{get_external_id(account)}", json={"id": new["id"]})
    assert (await csp.delete(get_account_path(account))).status_code == 404
    assert new in await fetch_sandboxes(csp)
    assert (await csp.delete(get_account_path(new))).status_code == 204
    assert new not in await fetch_sandboxes(csp)


async def test_change_of_an_unknown_account_is_404(csp: httpx.AsyncClient) -> None:
    response = await csp.patch("/_control/accounts/none", json={"name": "other"})
    assert response.status_code == 404


async def test_raw_records_can_be_added_to_valid_ones(csp: httpx.AsyncClient) -> None:
    before = await fetch_records(csp)
    response = await csp.post("/_control/accounts", json={"raw": [None, {"id": 5}]})
    assert response.status_code == 201
    assert await fetch_records(csp) == [*before, None, {"id": 5}]


async def test_disturb_changes_different_sandboxes(csp: httpx.AsyncClient) -> None:
    before = {a["csp_id"]: a for a in await fetch_sandboxes(csp)}
    counts = {"drop": 2, "rename": 3, "new_id": 1}
    picked = (await csp.post("/_control/accounts/disturb", json=counts)).json()
    assert {kind: len(ids) for kind, ids in picked.items()} == counts
    after = {a["csp_id"]: a for a in await fetch_sandboxes(csp)}
    changed = {kind: {c for c, a in before.items() if get_external_id(a) in ids} for kind, ids in picked.items()}
    assert before.keys() - after.keys() == changed["drop"]
    assert {c for c, a in after.items() if a["name"] != before[c]["name"]} == changed["rename"]
    assert {c for c, a in after.items() if a["id"] != before[c]["id"]} == changed["new_id"]


async def test_disturb_is_limited_by_the_number_of_sandboxes(csp: httpx.AsyncClient) -> None:
    picked = (await csp.post("/_control/accounts/disturb", json={"drop": 8, "rename": 8})).json()
    assert {kind: len(ids) for kind, ids in picked.items()} == {"drop": 8, "rename": 2, "new_id": 0}


# Size


async def test_100_000_accounts_are_listed_and_deleted(csp: httpx.AsyncClient) -> None:
    await csp.post("/_control/accounts", json={"count": 100_000})
    first = (await csp.get(LISTING)).content
    assert len(json.loads(first)["results"]) == 100_014
    assert (await csp.delete(get_account_path(json.loads(first)["results"][50_000]))).status_code == 204
    after = await fetch_records(csp)
    assert len(after) == 100_013
