"""What a listing of CSP does to the pool, and when it does nothing."""

import asyncio
from datetime import UTC, datetime

import pytest

from allocator import store
from allocator.handlers import Writer
from sandbox_broker.messages import ListingApplied, Reply

from .allocator_harness import Pool, account, allocate, apply, ask, begin, granted, refusal, stage, sync


def counts(reply: Reply) -> tuple[int, int, int, int]:
    assert isinstance(reply, ListingApplied), reply
    return reply.synced, reply.discovered, reply.restored, reply.marked_stale


async def test_new_accounts_become_available_the_oldest_first(pool: Pool) -> None:
    writer = await pool.writer()
    newer = account(1).model_copy(update={"created_at": datetime(2026, 2, 1, tzinfo=UTC), "sfdc_account_id": "s"})
    older = account(2).model_copy(update={"created_at": datetime(2026, 1, 1, tzinfo=UTC)})
    assert counts(await sync(writer, [newer, older])) == (2, 2, 0, 0)
    assert await pool.column("SELECT status FROM sandboxes") == 2 * ["available"]
    assert await pool.value("SELECT sfdc_account_id FROM sandboxes WHERE sandbox_id = '1'") == "s"
    assert sorted(await pool.events()) == 2 * ["sandbox.discovered"] + ["sync.completed"]


async def test_the_same_listing_again_changes_nothing(pool: Pool) -> None:
    writer = await pool.writer()
    accounts = [account(number) for number in range(5)]
    await sync(writer, accounts)
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(await sync(writer, accounts)) == (5, 0, 0, 0)
    assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before


async def test_applying_a_listing_twice_announces_it_once(pool: Pool) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(1)])
    await apply(writer, listing_id, 1)
    assert counts(await apply(writer, listing_id, 1)) == (1, 0, 0, 0)
    assert await pool.events() == ["sandbox.discovered", "sync.completed"]


async def test_names_and_account_ids_are_refreshed_also_while_a_student_holds_the_sandbox(pool: Pool) -> None:
    (free,) = await pool.fill(1)
    leased = await pool.lease("ann")
    writer = await pool.writer()
    await sync(
        writer,
        [account(int(free), "renamed é", "moved-1"), account(int(leased), "renamed too", "moved-2")],
    )
    rows = await pool.column("SELECT name || '|' || external_id || '|' || status FROM sandboxes ORDER BY name")
    assert rows == ["renamed too|moved-2|allocated", "renamed é|moved-1|available"]
    (again,) = await allocate(writer, ask("ann"))
    assert granted(again).external_id == "moved-2"


async def test_an_account_id_that_another_live_sandbox_has_is_not_taken_over(pool: Pool) -> None:
    first, second = await pool.fill(2)
    writer = await pool.writer()
    # CSP says that the first has the second's account; the second is listed no more, but not gone yet.
    assert counts(await sync(writer, [account(int(first), external_id=f"account-{second}")])) == (1, 0, 0, 1)
    assert await pool.value("SELECT external_id FROM sandboxes WHERE sandbox_id = $1", first) == f"account-{first}"
    # A sandbox nobody knows, with an account that is known: not a second record of it.
    assert counts(await sync(writer, [account(900, external_id=f"account-{first}")], force=True))[1] == 0
    assert await pool.status("900") is None


async def test_the_account_id_of_a_deleted_sandbox_is_free_again(pool: Pool) -> None:
    (gone,) = await pool.fill(1, "deleted")
    writer = await pool.writer()
    assert counts(await sync(writer, [account(900, external_id=f"account-{gone}")])) == (1, 1, 0, 0)


async def test_what_is_listed_no_more_goes_stale_and_comes_back_when_it_is_listed_again(pool: Pool) -> None:
    kept, lost = await pool.fill(2)
    writer = await pool.writer()
    assert counts(await sync(writer, [account(int(kept))])) == (1, 0, 0, 1)
    assert await pool.status(lost) == "stale"
    both = [account(int(kept)), account(int(lost), "new name", "new-account")]
    assert counts(await sync(writer, both)) == (2, 0, 1, 0)
    assert await pool.value("SELECT status || name || external_id FROM sandboxes WHERE sandbox_id = $1", lost) == (
        "availablenew namenew-account"
    )
    assert await pool.events(lost) == ["sandbox.stale", "sandbox.restored"]


async def test_a_leased_sandbox_that_is_missing_stays_with_its_student_and_is_flagged(pool: Pool) -> None:
    leased = await pool.lease("ann")
    writer = await pool.writer()
    flag = "SELECT missing_since FROM sandboxes WHERE status = 'allocated'"
    await sync(writer, [account(900)])
    since = await pool.value(flag)
    assert since is not None
    await sync(writer, [account(900)])
    assert await pool.value(flag) == since
    await sync(writer, [account(900), account(int(leased))])
    assert await pool.value(flag) is None


async def test_a_listing_touches_nothing_that_is_on_its_way_out(pool: Pool) -> None:
    ids = [(await pool.fill(1, status))[0] for status in ("pending_deletion", "deletion_failed", "deleted")]
    writer = await pool.writer()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(await sync(writer, [account(int(one), "other", f"other-{one}") for one in ids])) == (3, 0, 0, 0)
    assert counts(await sync(writer, [account(900)])) == (1, 1, 0, 0)
    rows = "SELECT sandboxes::text FROM sandboxes WHERE sandbox_id <> '900' ORDER BY sandbox_id"
    assert await pool.column(rows) == before


async def refused(pool: Pool, writer: Writer, listing_id: int, total: int) -> str:
    before = await pool.state()
    code = refusal(await apply(writer, listing_id, total))
    assert await pool.state() == before
    return code


async def test_an_incomplete_listing_is_refused(pool: Pool) -> None:
    await pool.fill(1)
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(1)])
    assert await refused(pool, writer, listing_id, 2) == "LISTING_OUTDATED"
    await stage(writer, listing_id, [account(2)])
    assert counts(await apply(writer, listing_id, 2)) == (2, 1, 0, 0)


async def test_an_account_that_is_staged_twice_counts_once(pool: Pool) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(1), account(1), account(2)])
    await stage(writer, listing_id, [account(2)])
    assert await refused(pool, writer, listing_id, 4) == "LISTING_OUTDATED"
    assert counts(await apply(writer, listing_id, 2)) == (2, 2, 0, 0)


async def test_two_accounts_with_one_sandbox_id_make_one_sandbox(pool: Pool) -> None:
    writer = await pool.writer()
    assert counts(await sync(writer, [account(1), account(1, external_id="other")])) == (2, 1, 0, 0)
    assert counts(await sync(writer, [account(1), account(1, external_id="other")], max_stale_fraction=0))[3] == 0


async def test_a_listing_that_a_later_one_has_passed_is_refused(pool: Pool) -> None:
    writer = await pool.writer()
    early, late = await begin(writer), await begin(writer)
    await stage(writer, early, [account(1)])
    await stage(writer, late, [account(2)])
    assert counts(await apply(writer, late, 1)) == (1, 1, 0, 0)
    assert await refused(pool, writer, early, 1) == "LISTING_OUTDATED"


async def test_of_two_listings_that_are_staged_at_once_the_later_wins(pool: Pool) -> None:
    writer = await pool.writer()
    early, late = await begin(writer), await begin(writer)
    await stage(writer, early, [account(1, "early"), account(2, "early")])
    await stage(writer, late, [account(1, "late")])
    await stage(writer, early, [account(1, "early")])
    assert await refused(pool, writer, early, 2) == "LISTING_OUTDATED"
    assert counts(await apply(writer, late, 1)) == (1, 1, 0, 0)
    assert await pool.column("SELECT name FROM sandboxes") == ["late"]


async def test_an_empty_listing_is_held_until_it_is_forced(pool: Pool) -> None:
    await pool.fill(3)
    writer = await pool.writer()
    assert refusal(await sync(writer, [])) == "SYNC_HELD"
    assert await pool.column("SELECT DISTINCT status FROM sandboxes") == ["available"]
    assert await pool.events() == ["sync.held"]
    assert counts(await sync(writer, [], force=True)) == (0, 0, 0, 3)
    assert await pool.column("SELECT DISTINCT status FROM sandboxes") == ["stale"]


async def test_a_listing_that_would_make_too_much_of_the_pool_stale_is_held_until_it_is_forced(pool: Pool) -> None:
    ids = await pool.fill(3)
    await pool.lease("ann")  # counts for the pool, and does not go stale
    writer = await pool.writer()
    listed = [account(int(ids[0]))]
    assert refusal(await sync(writer, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert await pool.column("SELECT count(*) FROM sandboxes WHERE status = 'available'") == [3]
    assert "2 of 4" in await pool.value("SELECT data->>'reason' FROM outbox WHERE type = 'sync.held'")
    assert counts(await sync(writer, listed, max_stale_fraction=0.5))[3] == 2


async def test_a_listing_does_not_take_back_what_is_being_leased(pool: Pool) -> None:
    """The listing waits for the allocation that has begun, and then sees a leased sandbox, not a free one."""
    (sandbox_id,) = await pool.fill(1)
    student, syncer = await pool.writer(), await pool.writer()
    listing_id = await begin(syncer)
    transaction = student.connection.transaction()
    await transaction.start()
    granted((await allocate(student, ask("ann")))[0])
    waiting = asyncio.create_task(apply(syncer, listing_id, 0, force=True))
    await pool.until_waiting(syncer)
    await transaction.commit()
    assert counts(await waiting) == (0, 0, 0, 0)
    assert await pool.status(sandbox_id) == "allocated"
    await pool.sound()


@pytest.mark.parametrize(("statement", "look_ups"), [(store.WEIGH_LISTING, 1), (store.APPLY_LISTING, 2)])
async def test_what_a_listing_lacks_is_looked_up_in_a_hash(pool: Pool, statement: str, look_ups: int) -> None:
    """Also where the planner takes the listing for short; else a large pool takes minutes."""
    await pool.fill(2000)
    await pool.execute("VACUUM ANALYZE sandboxes, csp_accounts")
    plan = "\n".join(await pool.column(f"EXPLAIN {statement}", 1, 1))
    assert plan.count("NOT (hashed SubPlan") == look_ups


async def test_a_piece_of_a_listing_may_be_empty(pool: Pool) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [])
    await stage(writer, listing_id, [account(1)])
    assert counts(await apply(writer, listing_id, 1)) == (1, 1, 0, 0)
