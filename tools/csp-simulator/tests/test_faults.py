"""What can go wrong: in deletions, in listings, on the connection."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from csp_simulator.app import create_app

from .simulator_harness import (
    LISTING,
    behave,
    calls,
    client_of,
    eventually,
    external_id,
    path_of,
    results,
    running,
    sandboxes,
    served,
)


@pytest.fixture
async def csp() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(accounts=10, seed=1)) as client:
        yield client


# Failures


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
async def test_a_call_fails_with_the_status_that_was_chosen(csp: httpx.AsyncClient, status: int) -> None:
    await behave(csp, fail_next_listings=1, listing_error_status=status)
    response = await csp.get(LISTING)
    assert (response.status_code, response.json()) == (
        status,
        {"error": [{"message": "injected by the simulator"}]},
    )
    assert "retry-after" not in response.headers


async def test_of_several_statuses_chance_takes_one_each_time(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_error_rate=1, listing_error_status=[500, 502, 503])
    statuses = [(await csp.get(LISTING)).status_code for _ in range(60)]
    assert set(statuses) == {500, 502, 503}
    assert any(later != earlier for earlier, later in pairwise(statuses))


async def test_what_deletions_meet_does_not_depend_on_the_listings_between() -> None:
    async def statuses(listings: int) -> list[int]:
        async with client_of(create_app(accounts=0, seed=7)) as csp:
            await behave(csp, delete_error_rate=0.5, listing_error_rate=0.5)
            found = []
            for _ in range(30):
                found.append((await csp.delete("/v2/sandbox/accounts/none")).status_code)
                for _ in range(listings):
                    await csp.get(LISTING)
            return found

    assert await statuses(0) == await statuses(3)


async def test_a_seed_repeats_the_ids_of_accounts_and_what_a_reset_makes() -> None:
    async def ids(seed: int) -> list[str]:
        async with client_of(create_app(accounts=3, seed=seed)) as csp:
            first = [r["id"] for r in await results(csp)]
            await csp.post("/_control/reset", json={"accounts": 3})
            return first + [r["id"] for r in await results(csp)]

    once = await ids(1)
    assert await ids(1) == once
    assert len(set(once)) == len(once)
    assert set(await ids(2)).isdisjoint(once)


async def test_a_reset_can_choose_another_seed(csp: httpx.AsyncClient) -> None:
    async def statuses(seed: int) -> list[int]:
        await csp.post("/_control/reset", json={"seed": seed})
        await behave(csp, listing_error_rate=0.5)
        return [(await csp.get(LISTING)).status_code for _ in range(40)]

    assert await statuses(5) == await statuses(5)
    assert await statuses(5) != await statuses(6)


async def test_latency_is_spread_by_chance(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_latency_sec=0.02, listing_latency_spread_sec=0.05)
    for _ in range(5):
        await csp.get(LISTING)
    took = [call["duration_ms"] for call in await calls(csp)]
    assert min(took) >= 19.9
    assert len({round(ms) for ms in took}) > 1


# Deletions


@pytest.mark.parametrize("status", [500, 503, 200])
async def test_a_deletion_that_fails_may_have_happened_all_the_same(csp: httpx.AsyncClient, status: int) -> None:
    first, *others = await sandboxes(csp)
    await behave(csp, fail_next_deletes=1, delete_error_status=status, delete_error_after_effect=True)
    assert (await csp.delete(path_of(first))).status_code == status
    assert await sandboxes(csp) == others
    assert (await csp.delete(path_of(first))).status_code == 404


async def test_a_deletion_that_hangs_may_have_happened_all_the_same() -> None:
    async with served(accounts=3) as csp:
        first, *others = await sandboxes(csp)
        await behave(csp, fail_next_deletes=1, delete_error_status="hang", delete_error_after_effect=True)
        deletion = asyncio.create_task(csp.delete(path_of(first)))

        async def gone() -> bool:
            return await sandboxes(csp) == others

        await eventually(gone)
        assert [call["method"] for call in await running(csp)] == ["DELETE"]
        deletion.cancel()

        async def ended() -> list[dict[str, Any]]:
            return await calls(csp, method="DELETE")

        await eventually(ended)
        assert [call["status"] for call in await ended()] == [None]


@pytest.mark.parametrize("listings", [1, 3])
async def test_a_deleted_account_can_stay_listed_for_a_while(csp: httpx.AsyncClient, listings: int) -> None:
    before = await results(csp)
    first, second, *_ = await sandboxes(csp)
    await behave(csp, deleted_stay_listed=listings)
    assert (await csp.delete(path_of(first))).status_code == 204
    await behave(csp, deleted_stay_listed=0)
    assert (await csp.delete(path_of(second))).status_code == 204
    for _ in range(listings):
        assert await results(csp) == [r for r in before if r != second]
    assert await results(csp) == [r for r in before if r not in (first, second)]


async def test_a_deleted_account_can_stay_listed_for_ever_and_is_gone_all_the_same(csp: httpx.AsyncClient) -> None:
    before = await results(csp)
    first = (await sandboxes(csp))[0]
    await behave(csp, deleted_stay_listed=None)
    assert (await csp.delete(path_of(first))).status_code == 204
    for _ in range(5):
        assert await results(csp) == before
    assert (await csp.delete(path_of(first))).status_code == 404
    assert first not in (await csp.get("/_control/accounts")).json()["accounts"]
    await csp.post("/_control/reset", json={"accounts": 1})
    assert first not in await results(csp)


# Listings


async def test_a_listing_can_be_empty(csp: httpx.AsyncClient) -> None:
    await behave(csp, listing_fraction=0)
    assert (await csp.get(LISTING)).json() == {"results": []}


async def test_the_first_sandboxes_can_be_listed_twice(csp: httpx.AsyncClient) -> None:
    before, first = await results(csp), (await sandboxes(csp))[:2]
    await behave(csp, listing_duplicates=2)
    assert await results(csp) == before + first
    await behave(csp, listing_duplicates=1000)
    assert len(await results(csp)) == len(before) + 10


async def test_the_last_sandboxes_can_be_listed_damaged_each_in_its_own_way(csp: httpx.AsyncClient) -> None:
    before = await results(csp)
    await behave(csp, listing_malformed=7)
    after = await results(csp)
    changed = [(sound, listed) for sound, listed in zip(before, after, strict=True) if sound != listed]
    assert [sound for sound, _ in changed] == before[-7:]
    damage = [
        None if listed is None else tuple(key for key in sound if listed.get(key) != sound[key])
        for sound, listed in changed
    ]
    assert damage == [("name",), ("id",), ("id",), ("state",), ("csp_id",), ("csp_id",), None]
    await behave(csp, listing_malformed=0)
    assert await results(csp) == before


async def test_a_raw_record_can_be_damaged_too(csp: httpx.AsyncClient) -> None:
    raw = [{"account_type": "sandbox", "state": "active", "id": [1]}] * 7
    await csp.put("/_control/accounts", json={"raw": raw})
    await behave(csp, listing_malformed=7)
    assert len(await results(csp)) == 7


async def test_a_body_can_end_in_the_middle_with_its_connection() -> None:
    async with served(accounts=3) as csp:
        await behave(csp, listing_error_status="cut", delete_error_status="cut")
        await behave(csp, fail_next_listings=1, fail_next_deletes=1)
        account = (await csp.get("/_control/accounts")).json()["accounts"][-1]
        for method, path in (("GET", LISTING), ("DELETE", path_of(account))):
            with pytest.raises(httpx.RemoteProtocolError):
                await csp.request(method, path)
        assert account in await results(csp)


async def test_a_hang_ends_when_the_client_goes() -> None:
    async with served(accounts=3) as csp:
        await behave(csp, fail_next_listings=1, listing_error_status="hang")
        with pytest.raises(httpx.ReadTimeout):
            await csp.get(LISTING, timeout=0.2)

        async def nothing_runs() -> bool:
            return not await running(csp)

        await eventually(nothing_runs)
        (call,) = await calls(csp)
        assert call["status"] is None
        assert call["duration_ms"] >= 150


async def test_a_bomb_decodes_to_a_thousand_times_its_size_whatever_was_accepted() -> None:
    async with served(accounts=3) as csp:
        await behave(csp, fail_next_listings=1, listing_error_status="bomb")
        async with csp.stream("GET", LISTING, headers={"Accept-Encoding": "identity"}) as response:
            sent = [chunk async for chunk in response.aiter_raw()]
        assert (response.status_code, response.headers["Content-Encoding"]) == (200, "gzip")
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
        size = sum(len(decoder.decompress(chunk)) for chunk in sent)
        assert (size, decoder.eof) == (256 * 1024 * 1024, True)
        assert sum(map(len, sent)) < size / 1000


@pytest.mark.parametrize(("status", "enough"), [("flood", 4 * 1024 * 1024), ("drip", 2)])
async def test_a_body_without_end_ends_when_the_client_goes(status: str, enough: int) -> None:
    async with served(accounts=3) as csp:
        await behave(csp, fail_next_listings=1, listing_error_status=status)
        async with csp.stream("GET", LISTING) as response:
            assert response.status_code == 200
            received = 0
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received >= enough:
                    break

        async def nothing_runs() -> bool:
            return not await running(csp)

        await eventually(nothing_runs)
        assert [call["status"] for call in await calls(csp)] == [200]


# Accounts


async def test_an_account_can_be_renamed_and_keeps_its_place(csp: httpx.AsyncClient) -> None:
    before = await results(csp)
    account = before[5]
    changed = await csp.patch(f"/_control/accounts/{external_id(account)}", json={"name": "other", "more": 1})
    assert changed.json() == {**account, "name": "other", "more": 1}
    assert await results(csp) == [*before[:5], changed.json(), *before[6:]]


async def test_an_account_can_change_its_id_and_is_deleted_under_the_new_one(csp: httpx.AsyncClient) -> None:
    account = (await sandboxes(csp))[0]
    new = {**account, "id": "identity/accounts/00000000-0000-4000-8000-00000000ABCD"}
    await csp.patch(f"/_control/accounts/{external_id(account)}", json={"id": new["id"]})
    assert (await csp.delete(path_of(account))).status_code == 404
    assert new in await sandboxes(csp)
    assert (await csp.delete(path_of(new))).status_code == 204
    assert new not in await sandboxes(csp)


async def test_only_an_account_that_is_there_can_be_changed(csp: httpx.AsyncClient) -> None:
    response = await csp.patch("/_control/accounts/none", json={"name": "other"})
    assert response.status_code == 404


async def test_raw_records_can_be_added_to_sound_ones(csp: httpx.AsyncClient) -> None:
    before = await results(csp)
    response = await csp.post("/_control/accounts", json={"raw": [None, {"id": 5}]})
    assert response.status_code == 201
    assert await results(csp) == [*before, None, {"id": 5}]


async def test_disturbing_drops_renames_and_changes_ids_of_different_sandboxes(csp: httpx.AsyncClient) -> None:
    before = {a["csp_id"]: a for a in await sandboxes(csp)}
    counts = {"drop": 2, "rename": 3, "new_id": 1}
    picked = (await csp.post("/_control/accounts/disturb", json=counts)).json()
    assert {what: len(ids) for what, ids in picked.items()} == counts
    after = {a["csp_id"]: a for a in await sandboxes(csp)}
    changed = {what: {c for c, a in before.items() if external_id(a) in ids} for what, ids in picked.items()}
    assert before.keys() - after.keys() == changed["drop"]
    assert {c for c, a in after.items() if a["name"] != before[c]["name"]} == changed["rename"]
    assert {c for c, a in after.items() if a["id"] != before[c]["id"]} == changed["new_id"]


async def test_no_more_are_disturbed_than_there_are(csp: httpx.AsyncClient) -> None:
    picked = (await csp.post("/_control/accounts/disturb", json={"drop": 8, "rename": 8})).json()
    assert {what: len(ids) for what, ids in picked.items()} == {"drop": 8, "rename": 2, "new_id": 0}


# Size


async def test_a_hundred_thousand_accounts_are_listed_from_memory(csp: httpx.AsyncClient) -> None:
    await csp.post("/_control/accounts", json={"count": 100_000})
    first = (await csp.get(LISTING)).content
    assert len(json.loads(first)["results"]) == 100_014
    assert (await csp.delete(path_of(json.loads(first)["results"][50_000]))).status_code == 204
    after = await results(csp)
    assert len(after) == 100_013
