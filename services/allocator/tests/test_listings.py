"""Listings of CSP: their effect on the pool, and refusals."""

import json
from datetime import UTC, datetime
from typing import Literal

import pytest

from allocator.handlers import deletions, purge
from allocator.handlers.listings import refresh_sandboxes
from allocator.routing import MAINTENANCE
from allocator.sql import listings
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    DeleteStale,
    ListedAccount,
    PurgeRecords,
    RecordDeletion,
    RefreshSandboxes,
)
from sandbox_broker.contract.replies import DeletionsClaimed, DueDeletion, ListingApplied, Purged, Reply
from sandbox_broker.database.schema import PROOF_GRACE

from .allocator_harness import (
    RUN,
    Pool,
    account,
    allocate,
    allocate_command,
    apply,
    begin,
    granted_lease,
    refresh,
    refusal_code,
    release,
    release_command,
    stage,
    sync,
)


def counts(reply: Reply) -> tuple[int, int, int, int]:
    assert isinstance(reply, ListingApplied), reply
    return reply.synced, reply.discovered, reply.restored, reply.marked_stale


async def test_new_accounts_become_available(pool: Pool) -> None:
    session = await pool.write_session()
    newer = account(1).model_copy(update={"created_at": datetime(2026, 2, 1, tzinfo=UTC), "sfdc_account_id": "s"})
    older = account(2).model_copy(update={"created_at": datetime(2026, 1, 1, tzinfo=UTC)})
    assert counts(await sync(session, [newer, older])) == (2, 2, 0, 0)
    assert await pool.column("SELECT status FROM sandboxes") == 2 * ["available"]
    assert await pool.value("SELECT sfdc_account_id FROM sandboxes WHERE sandbox_id = '1'") == "s"
    assert sorted(await pool.events()) == 2 * ["sandbox.discovered"] + ["sync.completed"]


async def test_a_repeated_listing_changes_nothing(pool: Pool) -> None:
    session = await pool.write_session()
    accounts = [account(number) for number in range(5)]
    await sync(session, accounts)
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(await sync(session, accounts)) == (5, 0, 0, 0)
    assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before


async def test_apply_listing_is_idempotent(pool: Pool) -> None:
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(1)])
    first = await apply(session, listing_id, 1)
    assert counts(first) == (1, 1, 0, 0)
    (sandbox_id,) = await pool.column("SELECT sandbox_id FROM sandboxes")
    await pool.execute("UPDATE sandboxes SET status = 'stale'")
    assert await apply(session, listing_id, 1) == first
    assert await pool.status(sandbox_id) == "stale"
    assert await pool.events() == ["sandbox.discovered", "sync.completed"]


async def test_names_and_account_ids_of_leased_sandboxes_are_corrected_too(pool: Pool) -> None:
    (free,) = await pool.fill(1)
    leased = await pool.lease("ann")
    session = await pool.write_session()
    await sync(
        session,
        [account(int(free), "renamed é", "moved-1"), account(int(leased), "renamed too", "moved-2")],
    )
    rows = await pool.column("SELECT name || '|' || external_id || '|' || status FROM sandboxes ORDER BY name")
    assert rows == ["renamed too|moved-2|allocated", "renamed é|moved-1|available"]
    (repeated,) = await allocate(session, allocate_command("ann"))
    assert granted_lease(repeated).external_id == "moved-2"


async def external_ids(pool: Pool, *sandbox_ids: str) -> list[str]:
    query = "SELECT external_id FROM sandboxes WHERE sandbox_id = $1"
    return [await pool.value(query, sandbox_id) for sandbox_id in sandbox_ids]


@pytest.mark.parametrize("third", ["available", "stale"])
async def test_swapped_accounts_are_corrected(pool: Pool, third: str) -> None:
    first, second = await pool.fill(1), [await pool.lease("ann")]
    ids = [*first, *second, *await pool.fill(1, third)]
    session = await pool.write_session()
    rotated = [f"account-{sandbox_id}" for sandbox_id in (*ids[1:], ids[0])]
    listed = [
        account(int(sandbox_id), external_id=external_id)
        for sandbox_id, external_id in zip(ids, rotated, strict=True)
    ]
    assert counts(await sync(session, listed))[2] == (third == "stale")
    assert await external_ids(pool, *ids) == rotated
    assert await pool.column("SELECT count(*) FROM sandboxes WHERE status = 'available'") == [2]


async def test_the_account_of_another_live_sandbox_is_not_taken(pool: Pool) -> None:
    first, second, third = await pool.fill(3)
    pending = await pool.pending()
    session = await pool.write_session()
    # The listing gives the first sandbox the account of the second, and the second the account of a pending
    # deletion.
    listed = [
        account(int(first), external_id=f"account-{second}"),
        account(int(second), external_id=f"account-{pending}"),
        account(int(third), external_id="free"),
        account(900, external_id=f"account-{first}"),  # a new record with the account of the first sandbox
    ]
    assert counts(await sync(session, listed)) == (4, 0, 0, 0)
    assert await external_ids(pool, first, second, third) == [f"account-{first}", f"account-{second}", "free"]
    assert await pool.status("900") is None


async def test_the_account_id_of_a_deleted_sandbox_can_be_used_again(pool: Pool) -> None:
    (gone,) = await pool.fill(1, "deleted")
    session = await pool.write_session()
    assert counts(await sync(session, [account(900, external_id=f"account-{gone}")])) == (1, 1, 0, 0)


async def test_an_unlisted_sandbox_becomes_stale_until_it_is_listed_again(pool: Pool) -> None:
    kept, lost = await pool.fill(2)
    session = await pool.write_session()
    assert counts(await sync(session, [account(int(kept))])) == (1, 0, 0, 1)
    assert await pool.status(lost) == "stale"
    both = [account(int(kept)), account(int(lost), "new name", "new-account")]
    assert counts(await sync(session, both)) == (2, 0, 1, 0)
    assert await pool.value("SELECT status || name || external_id FROM sandboxes WHERE sandbox_id = $1", lost) == (
        "availablenew namenew-account"
    )
    assert await pool.events(lost) == ["sandbox.stale", "sandbox.restored"]


async def test_a_missing_leased_sandbox_stays_leased_and_is_flagged(pool: Pool) -> None:
    leased = await pool.lease("ann")
    session = await pool.write_session()
    flag = "SELECT missing_since FROM sandboxes WHERE status = 'allocated'"
    await sync(session, [account(900)])
    since = await pool.value(flag)
    assert since is not None
    await sync(session, [account(900)])
    assert await pool.value(flag) == since
    await sync(session, [account(900), account(int(leased))])
    assert await pool.value(flag) is None


async def test_a_listing_does_not_change_sandboxes_in_deletion(pool: Pool) -> None:
    ids = [(await pool.fill(1, status))[0] for status in ("pending_deletion", "deletion_failed", "deleted")]
    session = await pool.write_session()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(
        await sync(session, [account(int(sandbox_id), "other", f"other-{sandbox_id}") for sandbox_id in ids])
    ) == (3, 0, 0, 0)
    assert counts(await sync(session, [account(900)])) == (1, 1, 0, 0)
    rows = "SELECT sandboxes::text FROM sandboxes WHERE sandbox_id <> '900' ORDER BY sandbox_id"
    assert await pool.column(rows) == before


async def apply_refused(pool: Pool, session: WriteSession, listing_id: int, total: int) -> str:
    before = await pool.state()
    code = refusal_code(await apply(session, listing_id, total))
    assert await pool.state() == before
    return code


async def test_an_incomplete_listing_is_refused(pool: Pool) -> None:
    await pool.fill(1)
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(1)])
    assert await apply_refused(pool, session, listing_id, 2) == "LISTING_OUTDATED"
    await stage(session, listing_id, [account(2)])
    assert counts(await apply(session, listing_id, 2)) == (2, 1, 0, 0)


async def test_an_account_staged_twice_counts_once(pool: Pool) -> None:
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(1), account(1), account(2)])
    await stage(session, listing_id, [account(2)])
    assert await apply_refused(pool, session, listing_id, 4) == "LISTING_OUTDATED"
    assert counts(await apply(session, listing_id, 2)) == (2, 2, 0, 0)


@pytest.mark.parametrize("twin", [account(1, external_id="other"), account(2, external_id="account-1")])
async def test_a_listing_with_a_duplicate_id_is_refused(pool: Pool, twin: ListedAccount) -> None:
    """The csp-syncer sends only the first of duplicate records. This is the second line of defence."""
    await pool.fill(1)
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(1), twin])
    assert await apply_refused(pool, session, listing_id, 2) == "LISTING_OUTDATED"
    assert counts(await apply(session, listing_id, 1)) == (1, 0, 0, 0)


async def test_a_listing_older_than_the_applied_one_is_refused(pool: Pool) -> None:
    session = await pool.write_session()
    early, late = await begin(session), await begin(session)
    await stage(session, early, [account(1)])
    await stage(session, late, [account(2)])
    assert counts(await apply(session, late, 1)) == (1, 1, 0, 0)
    assert await apply_refused(pool, session, early, 1) == "LISTING_OUTDATED"


async def test_the_newer_of_two_concurrent_listings_wins(pool: Pool) -> None:
    session = await pool.write_session()
    early = await begin(session)
    await stage(session, early, [account(1, "early"), account(2, "early")])
    late = await begin(session)
    await stage(session, late, [account(1, "late")])
    await stage(session, early, [account(3, "early")])
    assert await apply_refused(pool, session, early, 3) == "LISTING_OUTDATED"
    assert counts(await apply(session, late, 1)) == (1, 1, 0, 0)
    assert await pool.column("SELECT name FROM sandboxes") == ["late"]


async def test_the_last_applied_listing_is_kept_until_the_next_is_applied(pool: Pool) -> None:
    session = await pool.write_session()
    kept = "SELECT DISTINCT listing_id FROM csp_accounts ORDER BY 1"
    applied = await begin(session)
    await stage(session, applied, [account(1)])
    await apply(session, applied, 1)
    for _ in range(3):
        await stage(session, await begin(session), [account(2)])  # as when the csp-syncer dies afterwards
    last = await begin(session)
    assert await pool.column(kept) == [applied]
    await stage(session, last, [account(1), account(2)])
    assert await pool.column(kept) == [applied, last]
    await apply(session, last, 2)
    await begin(session)
    assert await pool.column(kept) == [last]


async def test_a_listing_emptied_by_a_database_crash_is_refused(pool: Pool) -> None:
    """PostgreSQL empties unlogged tables after a crash. A duplicate command must not flag all leases as missing."""
    leased = await pool.lease("ann")
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(int(leased))])
    assert counts(await apply(session, listing_id, 1)) == (1, 0, 0, 0)
    await pool.execute("TRUNCATE csp_accounts")
    assert await apply_refused(pool, session, listing_id, 1) == "LISTING_OUTDATED"


async def test_old_listings_are_removed(pool: Pool) -> None:
    session = await pool.write_session()
    await sync(session, [account(1)])
    for _ in range(3):
        await begin(session)
    await pool.execute("UPDATE csp_listings SET begun_at = now() - interval '31 days'")
    await begin(session)
    assert await pool.column("SELECT count(*) FROM csp_listings") == [2]
    assert await pool.column("SELECT count(*) FROM csp_listings WHERE applied_at IS NOT NULL") == [1]


async def test_an_empty_listing_is_held_until_it_is_forced(pool: Pool) -> None:
    await pool.fill(3)
    session = await pool.write_session()
    assert refusal_code(await sync(session, [])) == "SYNC_HELD"
    assert await pool.column("SELECT DISTINCT status FROM sandboxes") == ["available"]
    assert await pool.events() == ["sync.held"]
    assert counts(await sync(session, [], force=True)) == (0, 0, 0, 3)
    assert await pool.column("SELECT DISTINCT status FROM sandboxes") == ["stale"]


async def test_a_listing_that_lacks_too_many_sandboxes_is_held_until_it_is_forced(pool: Pool) -> None:
    ids = await pool.fill(3)
    leased = await pool.lease("ann")
    session = await pool.write_session()
    listed = [account(int(ids[0])), account(int(leased))]
    assert refusal_code(await sync(session, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert await pool.column("SELECT count(*) FROM sandboxes WHERE status = 'available'") == [3]
    assert "2 of 4" in await pool.value("SELECT data->>'reason' FROM outbox WHERE type = 'sync.held'")
    assert counts(await sync(session, listed, max_stale_fraction=0.5))[3] == 2


async def test_a_listing_with_too_many_new_accounts_is_held_until_it_is_forced(pool: Pool) -> None:
    session = await pool.write_session()
    usual = [account(number) for number in range(1, 31)]
    assert counts(await sync(session, usual, max_growth_fraction=1))[1] == 30  # the first listing
    grown = [account(number) for number in range(1, 62)]
    assert refusal_code(await sync(session, grown, max_growth_fraction=1)) == "SYNC_HELD"
    assert "31 accounts" in await pool.value("SELECT data->>'reason' FROM outbox WHERE type = 'sync.held'")
    assert await pool.column("SELECT count(*) FROM sandboxes") == [30]
    assert counts(await sync(session, grown[:-1], max_growth_fraction=1))[1] == 30
    assert counts(await sync(session, grown, max_growth_fraction=1, force=True))[1] == 1


async def test_a_used_up_pool_is_refilled_to_its_usual_size(pool: Pool) -> None:
    session = await pool.write_session()
    await sync(session, [account(number) for number in range(1, 31)])
    await sync(session, [account(1)], force=True)
    refilled = [account(number) for number in range(101, 131)]
    assert counts(await sync(session, refilled, max_growth_fraction=1))[1] == 30


async def test_a_listing_skips_locked_rows(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1)
    other = await pool.lease("bob")
    student, syncer = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    listing_id = await begin(syncer)
    transaction = student.connection.transaction()
    await transaction.start()
    granted_lease((await allocate(student, allocate_command("ann")))[0])
    await release(student, release_command(other, "bob"))
    assert counts(await apply(syncer, listing_id, 0, force=True)) == (0, 0, 0, 0)
    await transaction.commit()
    assert await pool.status(sandbox_id) == "allocated"
    assert await pool.value("SELECT missing_since FROM sandboxes WHERE sandbox_id = $1", other) is None
    await pool.assert_sound()
    await sync(syncer, [], force=True)
    assert await pool.value("SELECT missing_since FROM sandboxes WHERE sandbox_id = $1", sandbox_id) is not None


async def test_name_corrections_lock_at_most_half_of_the_pool(pool: Pool) -> None:
    ids = await pool.fill(8)
    student, syncer = await pool.write_session(), await pool.write_session(lane=MAINTENANCE)
    listing_id = await begin(syncer)
    await stage(syncer, listing_id, [account(int(sandbox_id), "renamed") for sandbox_id in ids])
    await apply(syncer, listing_id, 8)
    transaction = syncer.connection.transaction()
    await transaction.start()
    await refresh_sandboxes(syncer, RefreshSandboxes(listing_id=listing_id, limit=500))
    granted_now = await allocate(student, *(allocate_command(f"student-{number}") for number in range(4)))
    assert all(granted_lease(reply).new for reply in granted_now)
    await transaction.commit()
    await refresh(syncer, listing_id)
    assert await pool.column("SELECT DISTINCT name FROM sandboxes") == ["renamed"]


async def test_names_are_corrected_in_batches(pool: Pool) -> None:
    ids = await pool.fill(20)
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(int(sandbox_id), "renamed") for sandbox_id in ids])
    await apply(session, listing_id, 20)
    assert await refresh(session, listing_id, limit=7) == 3
    assert await pool.column("SELECT DISTINCT name FROM sandboxes") == ["renamed"]


STATEMENTS = {
    "assess": (listings.ASSESS_LISTING, ()),
    "hold": (listings.HOLD_LISTING, ("reason",)),
    "apply": (listings.APPLY_LISTING, (PROOF_GRACE,)),
    "flag": (listings.FLAG_MISSING, (PROOF_GRACE,)),
    "refresh": (listings.REFRESH_SANDBOXES, ("", 500)),
}


@pytest.mark.parametrize("name", STATEMENTS)
async def test_no_statement_scans_the_listing_per_sandbox(pool: Pool, name: str) -> None:
    """The plans are made without statistics, as right after staging. A scan per sandbox would take minutes."""
    ids = await pool.fill(3000)
    session = await pool.write_session(lane=MAINTENANCE)
    listing_id = await begin(session)
    for start in range(0, len(ids), 1000):
        await stage(session, listing_id, [account(int(sandbox_id)) for sandbox_id in ids[start : start + 1000]])
    statement, arguments = STATEMENTS[name]
    rows = await session.connection.fetch(
        f"EXPLAIN (ANALYZE, FORMAT TEXT) {statement}", session.epoch, listing_id, *arguments
    )
    repeated = [
        row[0] for row in rows if "Seq Scan" in row[0] and "loops=1)" not in row[0] and "never" not in row[0]
    ]
    assert not repeated


async def test_a_staged_batch_may_be_empty(pool: Pool) -> None:
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [])
    await stage(session, listing_id, [account(1)])
    assert counts(await apply(session, listing_id, 1)) == (1, 1, 0, 0)


async def test_an_unreadable_record_still_lists_its_sandbox(pool: Pool) -> None:
    ids = [*await pool.fill(2), *await pool.fill(1, "stale")]
    leased = await pool.lease("ann")
    session = await pool.write_session()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(await sync(session, [account(int(ids[0]))], [*ids[1:], leased, "900"])) == (1, 0, 0, 0)
    assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before


async def test_an_unreadable_record_lists_the_sandbox_of_its_account(pool: Pool) -> None:
    ids = [*await pool.fill(2), *await pool.fill(1, "stale")]
    leased = await pool.lease("ann")
    session = await pool.write_session()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    unreadable = [f"account account-{sandbox_id}" for sandbox_id in (*ids[1:], leased, "900")]
    for _ in range(2):
        assert counts(await sync(session, [account(int(ids[0]))], unreadable)) == (1, 0, 0, 0)
        assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before


async def delete(pool: Pool, sandbox_id: str) -> None:
    await deletions.record_deletion(await pool.write_session(), RecordDeletion(sandbox_id=sandbox_id))


async def test_a_listing_begun_before_a_deletion_does_not_restore_the_sandbox(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(int(sandbox_id))])
    await delete(pool, sandbox_id)
    assert counts(await apply(session, listing_id, 1)) == (1, 0, 0, 0)
    assert await pool.status(sandbox_id) == "deleted"


@pytest.mark.parametrize("status", ["deleted", "deletion_failed"])
async def test_a_listing_does_not_restore_a_used_sandbox_with_a_purged_record(
    pool: Pool, status: Literal["deleted", "deletion_failed"]
) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = $1", status)
    session = await pool.write_session()
    assert await purge.purge_records(session, PurgeRecords(status=status, limit=10)) == Purged(count=1)
    reply = await sync(session, [account(int(sandbox_id))])
    assert counts(reply) == (1, 0, 0, 0)
    assert isinstance(reply, ListingApplied)
    assert reply.leaked == 1
    assert await pool.status(sandbox_id) is None


async def deleted_long_ago(pool: Pool, minutes: int = 10) -> str:
    sandbox_id = await pool.pending()
    await delete(pool, sandbox_id)
    await pool.execute("UPDATE sandboxes SET status_since = now() - $1 * interval '1 minute'", minutes)
    await pool.execute("TRUNCATE outbox")
    return sandbox_id


async def test_a_deletion_missing_in_csp_is_reopened(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool)
    session = await pool.write_session()
    reply = await sync(session, [account(int(sandbox_id), external_id="moved")])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (1, 0)
    assert await pool.status(sandbox_id) == "pending_deletion"
    assert await pool.events(sandbox_id) == ["sandbox.deletion_requested"]
    assert json.loads(await pool.value("SELECT data FROM outbox WHERE subject = $1", sandbox_id)) == {
        "sandbox_id": sandbox_id,
        "external_id": "moved",
        "name": f"sandbox-{sandbox_id}",
        "reason": "student",
        "reopened": True,
    }
    claimed = await deletions.claim_deletions(session, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(claimed, DeletionsClaimed)
    assert [(due.sandbox_id, due.external_id, due.attempts) for due in claimed.deletions] == [
        (sandbox_id, "moved", 0)
    ]
    await delete(pool, sandbox_id)
    assert await pool.status(sandbox_id) == "deleted"


async def test_a_recent_deletion_is_not_reopened(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool, minutes=2)
    reply = await sync(await pool.write_session(), [account(int(sandbox_id))])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 0)
    assert await pool.status(sandbox_id) == "deleted"


async def test_a_sandbox_deleted_as_stale_is_a_leak_and_not_reopened(pool: Pool) -> None:
    """The sandbox was never used, and CSP did not list its account for a day. The broker must not delete it."""
    (sandbox_id,) = await pool.fill(1, "stale")
    session = await pool.write_session()
    assert await purge.delete_stale(session, DeleteStale(stale_for_sec=3600, limit=10)) == Purged(count=1)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '10 minutes'")
    reply = await sync(session, [account(int(sandbox_id))])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 1)
    assert await pool.status(sandbox_id) == "deleted"


async def test_a_deletion_is_not_reopened_if_another_sandbox_has_its_account(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool)
    (other,) = await pool.fill(1)
    listed = [account(int(sandbox_id), external_id=f"account-{other}")]
    reply = await sync(await pool.write_session(), listed, [other])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 1)


async def test_a_held_listing_describes_its_changes(pool: Pool) -> None:
    ids = await pool.fill(25)
    (stale,) = await pool.fill(1, "stale")
    leased = await pool.lease("ann")
    session = await pool.write_session()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    listed = [account(900), account(int(stale)), account(int(ids[0]), external_id="moved")]
    assert refusal_code(await sync(session, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before
    plan = json.loads(await pool.value("SELECT outcome FROM csp_listings WHERE held_at IS NOT NULL"))
    assert "26 of 26" in plan.pop("reason")
    assert {kind: change["count"] for kind, change in plan.items()} == {
        "stale": 24,
        "missing": 1,
        "moved": 1,
        "discovered": 1,
        "restored": 1,
    }
    assert len(plan["stale"]["examples"]) == listings.MAX_EXAMPLES
    assert plan["missing"]["examples"] == [{"sandbox_id": leased, "name": f"sandbox-{leased}"}]
    assert plan["discovered"]["examples"] == [{"sandbox_id": "900", "name": "sandbox-900"}]


async def test_hold_listing_is_idempotent(pool: Pool) -> None:
    await pool.fill(1)
    session = await pool.write_session()
    listing_id = await begin(session)
    assert refusal_code(await apply(session, listing_id, 0)) == "SYNC_HELD"
    assert refusal_code(await apply(session, listing_id, 0)) == "SYNC_HELD"
    assert await pool.events() == ["sync.held"]


async def test_missing_leased_sandboxes_count_once(pool: Pool) -> None:
    """A listing with half of the pool is held even if all missing sandboxes are leased."""
    leased = [await pool.lease(f"student-{number}") for number in range(3)]
    (free,) = await pool.fill(1)
    session = await pool.write_session()
    listed = [account(int(sandbox_id)) for sandbox_id in (free, leased[0])]
    assert refusal_code(await sync(session, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert counts(await sync(session, listed, force=True)) == (2, 0, 0, 0)
    assert counts(await sync(session, listed, max_stale_fraction=0.25)) == (2, 0, 0, 0)


async def claim_due(session: WriteSession) -> list[DueDeletion]:
    reply = await deletions.claim_deletions(session, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(reply, DeletionsClaimed)
    return list(reply.deletions)


async def test_the_claim_of_a_missing_sandbox_says_so_until_csp_lists_it_again(pool: Pool) -> None:
    leased = await pool.lease("ann")
    session = await pool.write_session()
    await sync(session, [account(900)])
    await release(session, release_command(leased, "ann"))
    (due,) = await claim_due(session)
    assert (due.sandbox_id, due.missing) == (leased, True)
    await sync(session, [account(900), account(int(leased))])
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now() WHERE status = 'pending_deletion'")
    (due,) = await claim_due(session)
    assert (due.sandbox_id, due.missing) == (leased, False)


async def test_a_missing_sandbox_listed_after_its_deletion_is_reopened(pool: Pool) -> None:
    leased = await pool.lease("ann")
    session = await pool.write_session()
    await sync(session, [account(900)])
    await release(session, release_command(leased, "ann"))
    await delete(pool, leased)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '10 minutes'")
    await sync(session, [account(900), account(int(leased))])
    (due,) = await claim_due(session)
    assert (due.sandbox_id, due.missing) == (leased, False)
