"""Sync of the pool with CSP's listing."""

import asyncio

import pytest

from devstack.conditions import wait_until
from tests.integration.stack import Stack


async def test_new_accounts_become_available_and_missing_ones_stale_until_they_return(stack: Stack) -> None:
    (added,) = (await stack.control("POST", "accounts", {"count": 1, "name_prefix": "late-"}))["accounts"]
    synced = (await stack.sync()).json()
    assert (synced["status"], synced["synced"], synced["marked_stale"], synced["restored"]) == (
        "completed",
        51,
        0,
        0,
    )

    all_accounts = (await stack.control("GET", "accounts"))["accounts"]
    await stack.control("DELETE", f"accounts/{added['id'].rsplit('/', 1)[1]}")
    assert (await stack.sync()).json()["marked_stale"] == 1
    assert (await stack.stats())["stale"] == 1

    await stack.control("PUT", "accounts", {"accounts": all_accounts})
    assert (await stack.sync()).json()["restored"] == 1
    assert (await stack.stats())["available"] == 51


async def test_an_empty_listing_is_held_unless_forced(stack: Stack) -> None:
    await stack.control("PUT", "accounts", {"accounts": []})
    held = await stack.sync()
    assert (held.status_code, held.json()["detail"]["code"]) == (409, "SYNC_HELD")
    assert (await stack.stats())["available"] == 50
    assert (await stack.sync(force="true")).json()["marked_stale"] == 50
    assert (await stack.stats())["stale"] == 50


async def test_a_listing_without_a_third_of_the_pool_is_held(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.66})
    held = await stack.sync()
    assert (held.status_code, held.json()["detail"]["code"]) == (409, "SYNC_HELD")
    assert (await stack.stats())["available"] == 50


async def test_a_listing_of_more_than_twice_the_usual_size_is_held(stack: Stack) -> None:
    await stack.control("POST", "accounts", {"count": 51, "name_prefix": "colleague-"})
    held = await stack.sync()
    assert (held.status_code, held.json()["detail"]["code"]) == (409, "SYNC_HELD")
    assert (await stack.stats())["available"] == 50
    assert (await stack.sync(force="true")).json()["synced"] == 101
    assert (await stack.stats())["available"] == 101


async def test_a_failed_listing_does_not_change_the_pool(stack: Stack) -> None:
    for fault in ({"listing_cut_short": True}, {"fail_next_listings": 1}):
        await stack.control("PATCH", "behaviour", fault)
        failed = await stack.sync()
        assert (failed.status_code, failed.json()["detail"]["code"]) == (502, "CSP_UNAVAILABLE")
        assert (await stack.stats())["available"] == 50


async def test_a_student_keeps_a_sandbox_missing_in_csp(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.control("DELETE", f"accounts/{lease['external_id']}")
    assert (await stack.sync()).json()["marked_stale"] == 0
    assert (await stack.allocate("ada")).json() == lease
    missing = "SELECT missing_since IS NOT NULL FROM sandboxes WHERE sandbox_id = $1"
    assert await stack.database.fetchval(missing, lease["sandbox_id"]) is True


async def test_concurrent_syncs_share_one_listing(stack: Stack) -> None:
    await stack.control("DELETE", "calls")
    await stack.control("PATCH", "behaviour", {"listing_latency_sec": 1})
    responses = await asyncio.gather(*(stack.sync() for _ in range(5)))
    assert {response.status_code for response in responses} == {200}
    assert len((await stack.control("GET", "calls?method=GET"))["calls"]) == 1


async def test_a_held_sync_is_reported_until_a_sync_completes(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.5})
    await stack.sync()
    held = (await stack.admin("GET", "sync")).json()["held"]
    assert held["stale"]["count"] > 20
    assert len(held["stale"]["examples"]) == 20
    assert "are missing" in held["reason"]

    async def is_held_reported() -> bool:
        port = stack.environment["ALLOCATOR_PORT"]
        metrics = (await stack.client.get(f"http://127.0.0.1:{port}/metrics")).text
        return "broker_sync_held 1.0" in metrics

    await wait_until(is_held_reported)
    await stack.control("PATCH", "behaviour", {"listing_fraction": 1})
    assert (await stack.sync()).json()["synced"] == 50
    state = (await stack.admin("GET", "sync")).json()
    assert (state["held"], state["applied"]["synced"]) == (None, 50)


async def test_force_applies_to_one_sync(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.5})
    assert (await stack.sync(force="true")).status_code == 200
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.1})
    assert (await stack.sync()).status_code == 409


async def test_a_malformed_record_does_not_make_a_sandbox_stale(stack: Stack) -> None:
    records = (await stack.control("GET", "accounts"))["accounts"]
    for record in records:
        record["name"] = None
    await stack.control("PUT", "accounts", {"raw": records})
    synced = (await stack.sync()).json()
    assert (synced["synced"], synced["marked_stale"]) == (0, 0)
    assert (await stack.stats())["available"] == 50


async def test_records_with_an_unusable_csp_id_do_not_change_their_sandboxes(stack: Stack) -> None:
    records = (await stack.control("GET", "accounts"))["accounts"]
    unusable: list[object] = [None, 1.5, f" {records[2]['csp_id']} ", {}]
    csp_ids = {record["id"]: record["csp_id"] for record in records}
    for record, csp_id in zip(records, unusable * 20, strict=False):
        record["csp_id"] = csp_id
    for record in records[-20:-10]:
        record["csp_id"] = float(csp_ids[record["id"]])
    await stack.control("PUT", "accounts", {"raw": records})
    lease = (await stack.allocate("ada")).json()
    synced = (await stack.sync()).json()
    assert synced["marked_stale"] == 0
    assert (await stack.stats())["available"] == 49
    missing = "SELECT missing_since IS NULL FROM sandboxes WHERE sandbox_id = $1"
    assert await stack.database.fetchval(missing, lease["sandbox_id"]) is True


@pytest.mark.parametrize("form", ["total", "token", "next", "header"])
async def test_a_listing_in_pages_is_applied_completely_or_not_at_all(stack: Stack, form: str) -> None:
    await stack.control("PATCH", "behaviour", {"listing_page_size": 16, "listing_page_form": form})
    synced = (await stack.sync()).json()
    assert (synced["synced"], synced["marked_stale"]) == (50, 0)
    await stack.control("PATCH", "behaviour", {"listing_pages_missing": 1})
    incomplete = await stack.sync()
    assert (incomplete.status_code, incomplete.json()["detail"]["code"]) == (502, "CSP_UNAVAILABLE")
    assert (await stack.stats())["available"] == 50


async def test_a_released_sandbox_missing_in_csp_is_deleted_without_a_csp_request(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.control("DELETE", f"accounts/{lease['external_id']}")
    await stack.sync()
    assert (await stack.stats())["missing"] == 1
    (leak,) = (await stack.admin("GET", "leaks")).json()["leaks"]
    assert (leak["sandbox_id"], leak["kind"]) == (lease["sandbox_id"], "missing")
    await stack.release(lease["sandbox_id"], "ada")
    await wait_until(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == 1
    assert await stack.deletions() == []
    assert (await stack.admin("GET", "leaks")).json()["leaks"] == []


async def test_a_deletion_is_repeated_if_csp_still_lists_the_sandbox(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"deleted_stay_listed": None})
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")
    await wait_until(stack.nothing_pending)
    await stack.sync()
    assert (await stack.stats())["deleted"] == 1  # within the grace period, because the listing may be outdated

    end_grace_period = "UPDATE sandboxes SET status_since = now() - interval '10 minutes' WHERE status = 'deleted'"
    await stack.database.execute(end_grace_period)
    await stack.control("DELETE", "calls")
    assert (await stack.sync()).status_code == 200

    async def is_deleted_again() -> bool:
        return len(await stack.deletions()) > 0 and await stack.nothing_pending()

    await wait_until(is_deleted_again)
    assert (await stack.stats())["deleted"] == 1
    assert (await stack.stats())["available"] == 49
