"""What happens to sandboxes after the lab."""

import asyncio

from tests.integration.stack import Stack, eventually


async def test_a_deletion_that_csp_refuses_is_tried_again_until_it_succeeds(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 3})
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
    statuses = [call["status"] for call in await stack.deletions()]
    assert statuses == [500, 500, 500, 204]


async def test_html_instead_of_an_answer_does_not_lose_the_deletion(stack: Stack) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 1, "delete_error_html": True})
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
    assert len(await stack.deletions()) == 2


async def test_an_overdue_lease_ends_by_itself_and_the_late_clean_up_is_still_a_success(stack: Stack) -> None:
    lease = (await stack.allocate("forgetful")).json()
    current = (await stack.allocate("present")).json()
    await stack.database.execute(
        "UPDATE leases SET expires_at = now() - interval '31 minutes' WHERE sandbox_id = $1", lease["sandbox_id"]
    )
    await stack.database.execute(
        "UPDATE leases SET expires_at = now() - interval '29 minutes' WHERE sandbox_id = $1", current["sandbox_id"]
    )

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
    assert (await stack.stats())["allocated"] == 1  # within the grace period
    late = await stack.release(lease["sandbox_id"], "forgetful")
    assert (late.status_code, late.json()["status"]) == (200, "deleted")
    reason = "SELECT end_reason FROM leases WHERE sandbox_id = $1"
    assert await stack.database.fetchval(reason, lease["sandbox_id"]) == "expired"


async def test_all_that_was_released_is_deleted_and_nothing_else(stack: Stack) -> None:
    leases = [(await stack.allocate(f"student-{n}")).json() for n in range(20)]
    released = leases[:12]
    await asyncio.gather(*(stack.release(lease["sandbox_id"], f"student-{n}") for n, lease in enumerate(released)))

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 12

    await eventually(deleted)
    called = {call["path"].rsplit("/", 1)[1] for call in await stack.deletions()}
    assert called == {lease["external_id"] for lease in released}
    left = {account["id"] for account in (await stack.control("GET", "accounts"))["accounts"]}
    assert all(f"identity/accounts/{lease['external_id']}" in left for lease in leases[12:])


async def test_a_killed_reaper_loses_no_deletion(stack: Stack) -> None:
    stack.processes.pop("reaper").kill()
    lease = (await stack.allocate("ada")).json()
    assert (await stack.release(lease["sandbox_id"], "ada")).status_code == 200
    await stack.start_service("reaper")

    async def deleted() -> bool:
        return (await stack.stats())["deleted"] == 1

    await eventually(deleted)
