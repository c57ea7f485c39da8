"""Deletion of sandboxes after the lab: retries, expiry, clean-up on demand."""

import asyncio
from datetime import timedelta
from pathlib import Path

from devstack.conditions import wait_until
from tests.integration.stack import Stack

WRONG_CLOCK = str(Path(__file__).with_name("wrong_clock.py"))


async def test_a_failed_deletion_is_retried_until_it_succeeds(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 3})
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    statuses = [call["status"] for call in await stack.deletions()]
    assert statuses == [500, 500, 500, 204]


async def test_a_deletion_is_retried_after_an_html_response(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 1, "delete_error_html": True})
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    assert len(await stack.deletions()) == 2


async def test_an_overdue_lease_expires_and_a_late_release_succeeds(stack: Stack) -> None:
    lease = (await stack.allocate("forgetful")).json()
    current = (await stack.allocate("present")).json()
    await stack.database.execute(
        "UPDATE leases SET expires_at = now() - interval '31 minutes' WHERE sandbox_id = $1", lease["sandbox_id"]
    )
    await stack.database.execute(
        "UPDATE leases SET expires_at = now() - interval '29 minutes' WHERE sandbox_id = $1", current["sandbox_id"]
    )

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    assert (await stack.stats())["allocated"] == 1  # within the grace period
    late = await stack.release(lease["sandbox_id"], "forgetful")
    assert (late.status_code, late.json()["status"]) == (200, "deleted")
    reason = "SELECT end_reason FROM leases WHERE sandbox_id = $1"
    assert await stack.database.fetchval(reason, lease["sandbox_id"]) == "expired"


async def test_exactly_the_released_sandboxes_are_deleted(stack: Stack) -> None:
    leases = [(await stack.allocate(f"student-{n}")).json() for n in range(20)]
    released = leases[:12]
    await asyncio.gather(*(stack.release(lease["sandbox_id"], f"student-{n}") for n, lease in enumerate(released)))

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 12

    await wait_until(is_deleted)
    deleted = {call["path"].rsplit("/", 1)[1] for call in await stack.deletions()}
    assert deleted == {lease["external_id"] for lease in released}
    remaining = {account["id"] for account in (await stack.control("GET", "accounts"))["accounts"]}
    assert all(f"identity/accounts/{lease['external_id']}" in remaining for lease in leases[12:])


async def test_a_killed_reaper_loses_no_deletion(stack: Stack) -> None:
    stack.processes.pop("reaper").kill()
    lease = (await stack.allocate("ada")).json()
    assert (await stack.release(lease["sandbox_id"], "ada")).status_code == 200
    await stack.start_service("reaper")

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)


async def test_a_clean_up_on_demand_deletes_postponed_sandboxes(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    stack.processes.pop("reaper").kill()
    await stack.release(lease["sandbox_id"], "ada")
    await stack.database.execute("UPDATE sandboxes SET deletion_due_at = now() + interval '1 hour'")
    await stack.start_service("reaper")
    response = await stack.admin("POST", "cleanup")
    assert response.status_code == 200, response.text
    assert (response.json()["status"], response.json()["deleted"]) == ("completed", 1)
    assert (await stack.stats())["deleted"] == 1
    job_id = await stack.database.fetchval("SELECT job_id FROM jobs WHERE kind = 'cleanup'")
    job = (await stack.admin("GET", f"jobs/{job_id}")).json()
    assert (job["state"], job["result"]["deleted"]) == ("completed", 1)


async def test_an_administrator_ends_a_lease_and_the_sandbox_is_deleted(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    first, again = [
        await stack.admin("POST", f"sandboxes/{lease['sandbox_id']}/release", reason="class is over") for _ in "12"
    ]
    assert (first.status_code, again.status_code) == (200, 200)

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    assert await stack.database.fetchval("SELECT (end_reason, end_note) = ('admin', 'class is over') FROM leases")
    assert (await stack.allocate("ada")).json()["sandbox_id"] != lease["sandbox_id"]


async def test_retry_deletion_deletes_a_failed_sandbox(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")

    async def is_deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await wait_until(is_deleted)
    await stack.database.execute("UPDATE sandboxes SET status = 'deletion_failed' WHERE status = 'deleted'")
    retry = f"sandboxes/{lease['sandbox_id']}/retry-deletion"
    assert (await stack.admin("POST", retry)).json()["status"] == "pending_deletion"
    await wait_until(is_deleted)
    assert (await stack.admin("POST", retry)).json()["detail"]["code"] == "NOT_DELETION_FAILED"


async def test_a_reaper_with_a_wrong_clock_expires_and_deletes_correctly(stack: Stack) -> None:
    stack.processes["reaper"].kill()
    await stack.start_service("reaper", launcher=(WRONG_CLOCK,))
    try:
        await stack.control("PATCH", "behaviour", {"fail_next_deletes": 2})
        overdue = (await stack.allocate("forgetful")).json()
        await stack.allocate("present")
        set_overdue = "UPDATE leases SET expires_at = now() - $2::interval WHERE holder = $1"
        await stack.database.execute(set_overdue, "present", timedelta(minutes=10))
        await stack.database.execute(set_overdue, "forgetful", timedelta(minutes=31))

        async def is_deleted() -> bool:
            return (await stack.stats())["deleted"] == 1

        await wait_until(is_deleted)
        assert (await stack.stats())["allocated"] == 1
        calls = await stack.deletions()
        assert {call["path"].rsplit("/", 1)[1] for call in calls} == {overdue["external_id"]}
        assert [call["status"] for call in calls] == [500, 500, 204]
    finally:
        stack.processes["reaper"].kill()
        await stack.start_service("reaper")
