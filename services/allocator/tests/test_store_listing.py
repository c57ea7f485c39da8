"""What a listing of CSP does to the pool, and when it does nothing."""

import json
from datetime import UTC, datetime
from typing import Literal

import pytest

from allocator import listings
from allocator.handlers import deletions, purge
from allocator.handlers.listings import refresh_sandboxes
from allocator.lanes import MAINTENANCE
from allocator.writer import Writer
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
    apply,
    ask,
    begin,
    done,
    granted,
    refresh,
    refusal,
    release,
    stage,
    sync,
)


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


async def test_applying_a_listing_twice_announces_it_once_and_gives_the_same_answer(pool: Pool) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(1)])
    first = await apply(writer, listing_id, 1)
    assert counts(first) == (1, 1, 0, 0)
    (sandbox_id,) = await pool.column("SELECT sandbox_id FROM sandboxes")
    await pool.execute("UPDATE sandboxes SET status = 'stale'")
    assert await apply(writer, listing_id, 1) == first
    assert await pool.status(sandbox_id) == "stale"
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


async def external_ids(pool: Pool, *sandbox_ids: str) -> list[str]:
    query = "SELECT external_id FROM sandboxes WHERE sandbox_id = $1"
    return [await pool.value(query, sandbox_id) for sandbox_id in sandbox_ids]


@pytest.mark.parametrize("third", ["available", "stale"])
async def test_sandboxes_that_have_changed_accounts_with_each_other_are_followed(pool: Pool, third: str) -> None:
    first, second = await pool.fill(1), [await pool.lease("ann")]
    ids = [*first, *second, *await pool.fill(1, third)]
    writer = await pool.writer()
    turned = [f"account-{one}" for one in (*ids[1:], ids[0])]
    listed = [account(int(one), external_id=moved) for one, moved in zip(ids, turned, strict=True)]
    assert counts(await sync(writer, listed))[2] == (third == "stale")
    assert await external_ids(pool, *ids) == turned
    assert await pool.column("SELECT count(*) FROM sandboxes WHERE status = 'available'") == [2]


async def test_an_account_that_another_live_sandbox_keeps_is_not_taken_over(pool: Pool) -> None:
    first, second, third = await pool.fill(3)
    pending = await pool.pending()
    writer = await pool.writer()
    # The first has the account of the second, that one the account of one which waits for its deletion.
    listed = [
        account(int(first), external_id=f"account-{second}"),
        account(int(second), external_id=f"account-{pending}"),
        account(int(third), external_id="free"),
        account(900, external_id=f"account-{first}"),  # nor has one account two records
    ]
    assert counts(await sync(writer, listed)) == (4, 0, 0, 0)
    assert await external_ids(pool, first, second, third) == [f"account-{first}", f"account-{second}", "free"]
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


@pytest.mark.parametrize("twin", [account(1, external_id="other"), account(2, external_id="account-1")])
async def test_a_listing_with_an_id_in_two_records_is_refused(pool: Pool, twin: ListedAccount) -> None:
    """The csp-syncer sends only the first of them; here is the net below it."""
    await pool.fill(1)
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(1), twin])
    assert await refused(pool, writer, listing_id, 2) == "LISTING_OUTDATED"
    assert counts(await apply(writer, listing_id, 1)) == (1, 0, 0, 0)


async def test_a_listing_that_a_later_one_has_passed_is_refused(pool: Pool) -> None:
    writer = await pool.writer()
    early, late = await begin(writer), await begin(writer)
    await stage(writer, early, [account(1)])
    await stage(writer, late, [account(2)])
    assert counts(await apply(writer, late, 1)) == (1, 1, 0, 0)
    assert await refused(pool, writer, early, 1) == "LISTING_OUTDATED"


async def test_of_two_listings_that_are_staged_at_once_the_later_wins(pool: Pool) -> None:
    writer = await pool.writer()
    early = await begin(writer)
    await stage(writer, early, [account(1, "early"), account(2, "early")])
    late = await begin(writer)
    await stage(writer, late, [account(1, "late")])
    await stage(writer, early, [account(3, "early")])
    assert await refused(pool, writer, early, 3) == "LISTING_OUTDATED"
    assert counts(await apply(writer, late, 1)) == (1, 1, 0, 0)
    assert await pool.column("SELECT name FROM sandboxes") == ["late"]


async def test_what_was_listed_is_kept_until_the_next_listing_is_applied_and_no_longer(pool: Pool) -> None:
    writer = await pool.writer()
    kept = "SELECT DISTINCT listing_id FROM csp_accounts ORDER BY 1"
    applied = await begin(writer)
    await stage(writer, applied, [account(1)])
    await apply(writer, applied, 1)
    for _ in range(3):
        await stage(writer, await begin(writer), [account(2)])  # and then the csp-syncer dies
    last = await begin(writer)
    assert await pool.column(kept) == [applied]
    await stage(writer, last, [account(1), account(2)])
    assert await pool.column(kept) == [applied, last]
    await apply(writer, last, 2)
    await begin(writer)
    assert await pool.column(kept) == [last]


async def test_a_listing_that_a_crash_of_the_database_has_emptied_flags_nothing(pool: Pool) -> None:
    """PostgreSQL empties unlogged tables after a crash. The command comes again, and what it has applied stays."""
    leased = await pool.lease("ann")
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(int(leased))])
    assert counts(await apply(writer, listing_id, 1)) == (1, 0, 0, 0)
    await pool.execute("TRUNCATE csp_accounts")
    assert await refused(pool, writer, listing_id, 1) == "LISTING_OUTDATED"


async def test_listings_of_long_ago_are_forgotten(pool: Pool) -> None:
    writer = await pool.writer()
    await sync(writer, [account(1)])
    for _ in range(3):
        await begin(writer)
    await pool.execute("UPDATE csp_listings SET begun_at = now() - interval '31 days'")
    await begin(writer)
    assert await pool.column("SELECT count(*) FROM csp_listings") == [2]
    assert await pool.column("SELECT count(*) FROM csp_listings WHERE applied_at IS NOT NULL") == [1]


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
    leased = await pool.lease("ann")
    writer = await pool.writer()
    listed = [account(int(ids[0])), account(int(leased))]
    assert refusal(await sync(writer, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert await pool.column("SELECT count(*) FROM sandboxes WHERE status = 'available'") == [3]
    assert "2 of 4" in await pool.value("SELECT data->>'reason' FROM outbox WHERE type = 'sync.held'")
    assert counts(await sync(writer, listed, max_stale_fraction=0.5))[3] == 2


async def test_a_listing_passes_over_what_is_being_leased_and_waits_for_nobody(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1)
    other = await pool.lease("bob")
    student, syncer = await pool.writer(), await pool.writer(lane=MAINTENANCE)
    listing_id = await begin(syncer)
    transaction = student.connection.transaction()
    await transaction.start()
    granted((await allocate(student, ask("ann")))[0])
    await release(student, done(other, "bob"))
    assert counts(await apply(syncer, listing_id, 0, force=True)) == (0, 0, 0, 0)
    await transaction.commit()
    assert await pool.status(sandbox_id) == "allocated"
    assert await pool.value("SELECT missing_since FROM sandboxes WHERE sandbox_id = $1", other) is None
    await pool.sound()
    await sync(syncer, [], force=True)
    assert await pool.value("SELECT missing_since FROM sandboxes WHERE sandbox_id = $1", sandbox_id) is not None


async def test_while_names_are_corrected_students_still_find_half_of_the_pool(pool: Pool) -> None:
    ids = await pool.fill(8)
    student, syncer = await pool.writer(), await pool.writer(lane=MAINTENANCE)
    listing_id = await begin(syncer)
    await stage(syncer, listing_id, [account(int(one), "renamed") for one in ids])
    await apply(syncer, listing_id, 8)
    transaction = syncer.connection.transaction()
    await transaction.start()
    await refresh_sandboxes(syncer, RefreshSandboxes(listing_id=listing_id, limit=500))
    granted_now = await allocate(student, *(ask(f"student-{number}") for number in range(4)))
    assert all(granted(reply).new for reply in granted_now)
    await transaction.commit()
    await refresh(syncer, listing_id)
    assert await pool.column("SELECT DISTINCT name FROM sandboxes") == ["renamed"]


async def test_names_are_corrected_in_pieces(pool: Pool) -> None:
    ids = await pool.fill(20)
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(int(one), "renamed") for one in ids])
    await apply(writer, listing_id, 20)
    assert await refresh(writer, listing_id, limit=7) == 3
    assert await pool.column("SELECT DISTINCT name FROM sandboxes") == ["renamed"]


STATEMENTS = {
    "weigh": (listings.WEIGH_LISTING, ()),
    "hold": (listings.HOLD_LISTING, ("reason",)),
    "apply": (listings.APPLY_LISTING, (PROOF_GRACE,)),
    "flag": (listings.FLAG_MISSING, (PROOF_GRACE,)),
    "refresh": (listings.REFRESH_SANDBOXES, ("", 500)),
}


@pytest.mark.parametrize("name", STATEMENTS)
async def test_no_statement_scans_a_listing_for_every_sandbox(pool: Pool, name: str) -> None:
    """Planned without statistics, as it is right after the staging; else a large pool takes minutes."""
    ids = await pool.fill(3000)
    writer = await pool.writer(lane=MAINTENANCE)
    listing_id = await begin(writer)
    for start in range(0, len(ids), 1000):
        await stage(writer, listing_id, [account(int(one)) for one in ids[start : start + 1000]])
    statement, more = STATEMENTS[name]
    rows = await writer.connection.fetch(
        f"EXPLAIN (ANALYZE, FORMAT TEXT) {statement}", writer.epoch, listing_id, *more
    )
    repeated = [
        row[0] for row in rows if "Seq Scan" in row[0] and "loops=1)" not in row[0] and "never" not in row[0]
    ]
    assert not repeated


async def test_a_piece_of_a_listing_may_be_empty(pool: Pool) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [])
    await stage(writer, listing_id, [account(1)])
    assert counts(await apply(writer, listing_id, 1)) == (1, 1, 0, 0)


async def test_a_sandbox_in_a_record_that_cannot_be_read_is_listed_all_the_same(pool: Pool) -> None:
    ids = [*await pool.fill(2), *await pool.fill(1, "stale")]
    leased = await pool.lease("ann")
    writer = await pool.writer()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    assert counts(await sync(writer, [account(int(ids[0]))], [*ids[1:], leased, "900"])) == (1, 0, 0, 0)
    assert await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id") == before


async def delete(pool: Pool, sandbox_id: str) -> None:
    await deletions.record_deletion(await pool.writer(), RecordDeletion(sandbox_id=sandbox_id))


async def test_a_listing_begun_before_a_deletion_does_not_bring_the_sandbox_back(pool: Pool) -> None:
    sandbox_id = await pool.pending()
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(int(sandbox_id))])
    await delete(pool, sandbox_id)
    assert counts(await apply(writer, listing_id, 1)) == (1, 0, 0, 0)
    assert await pool.status(sandbox_id) == "deleted"


@pytest.mark.parametrize("status", ["deleted", "deletion_failed"])
async def test_what_was_leased_does_not_come_back_when_its_record_has_been_forgotten(
    pool: Pool, status: Literal["deleted", "deletion_failed"]
) -> None:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = $1", status)
    writer = await pool.writer()
    assert await purge.purge_records(writer, PurgeRecords(status=status, limit=10)) == Purged(count=1)
    reply = await sync(writer, [account(int(sandbox_id))])
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


async def test_a_deletion_that_csp_has_not_done_is_reopened_and_never_available(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool)
    writer = await pool.writer()
    reply = await sync(writer, [account(int(sandbox_id), external_id="moved")])
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
    claimed = await deletions.claim_deletions(writer, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(claimed, DeletionsClaimed)
    assert [(due.sandbox_id, due.external_id, due.attempts) for due in claimed.deletions] == [
        (sandbox_id, "moved", 0)
    ]
    await delete(pool, sandbox_id)
    assert await pool.status(sandbox_id) == "deleted"


async def test_a_listing_that_lags_a_little_behind_a_deletion_reopens_nothing(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool, minutes=2)
    reply = await sync(await pool.writer(), [account(int(sandbox_id))])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 0)
    assert await pool.status(sandbox_id) == "deleted"


async def test_what_was_deleted_because_it_was_stale_is_a_leak_and_not_deleted_in_csp(pool: Pool) -> None:
    """Nobody has used it; an account that CSP did not list for a day is not ours to delete."""
    (sandbox_id,) = await pool.fill(1, "stale")
    writer = await pool.writer()
    assert await purge.delete_stale(writer, DeleteStale(stale_for_sec=3600, limit=10)) == Purged(count=1)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '10 minutes'")
    reply = await sync(writer, [account(int(sandbox_id))])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 1)
    assert await pool.status(sandbox_id) == "deleted"


async def test_a_deletion_whose_account_another_sandbox_has_now_is_not_reopened(pool: Pool) -> None:
    sandbox_id = await deleted_long_ago(pool)
    (other,) = await pool.fill(1)
    listed = [account(int(sandbox_id), external_id=f"account-{other}")]
    reply = await sync(await pool.writer(), listed, [other])
    assert isinstance(reply, ListingApplied)
    assert (reply.reopened, reply.leaked) == (0, 1)


async def test_a_held_listing_tells_what_it_would_do(pool: Pool) -> None:
    ids = await pool.fill(25)
    (stale,) = await pool.fill(1, "stale")
    leased = await pool.lease("ann")
    writer = await pool.writer()
    before = await pool.column("SELECT sandboxes::text FROM sandboxes ORDER BY sandbox_id")
    listed = [account(900), account(int(stale)), account(int(ids[0]), external_id="moved")]
    assert refusal(await sync(writer, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
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
    assert len(plan["stale"]["examples"]) == listings.EXAMPLES
    assert plan["missing"]["examples"] == [{"sandbox_id": leased, "name": f"sandbox-{leased}"}]
    assert plan["discovered"]["examples"] == [{"sandbox_id": "900", "name": "sandbox-900"}]


async def test_holding_a_listing_twice_announces_it_once(pool: Pool) -> None:
    await pool.fill(1)
    writer = await pool.writer()
    listing_id = await begin(writer)
    assert refusal(await apply(writer, listing_id, 0)) == "SYNC_HELD"
    assert refusal(await apply(writer, listing_id, 0)) == "SYNC_HELD"
    assert await pool.events() == ["sync.held"]


async def test_students_sandboxes_that_a_listing_lacks_count_as_lost_once(pool: Pool) -> None:
    """Half a listing must be held also when all that it lacks is leased."""
    leased = [await pool.lease(f"student-{number}") for number in range(3)]
    (free,) = await pool.fill(1)
    writer = await pool.writer()
    listed = [account(int(one)) for one in (free, leased[0])]
    assert refusal(await sync(writer, listed, max_stale_fraction=0.25)) == "SYNC_HELD"
    assert counts(await sync(writer, listed, force=True)) == (2, 0, 0, 0)
    assert counts(await sync(writer, listed, max_stale_fraction=0.25)) == (2, 0, 0, 0)


async def claimed(writer: Writer) -> list[DueDeletion]:
    reply = await deletions.claim_deletions(writer, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    assert isinstance(reply, DeletionsClaimed)
    return list(reply.deletions)


async def test_the_deletion_of_a_missing_sandbox_is_claimed_as_such_until_csp_lists_it_again(pool: Pool) -> None:
    leased = await pool.lease("ann")
    writer = await pool.writer()
    await sync(writer, [account(900)])
    await release(writer, done(leased, "ann"))
    (due,) = await claimed(writer)
    assert (due.sandbox_id, due.missing) == (leased, True)
    await sync(writer, [account(900), account(int(leased))])
    await pool.execute("UPDATE sandboxes SET deletion_due_at = now() WHERE status = 'pending_deletion'")
    (due,) = await claimed(writer)
    assert (due.sandbox_id, due.missing) == (leased, False)


async def test_what_was_missing_and_is_listed_after_its_deletion_is_deleted_in_csp(pool: Pool) -> None:
    leased = await pool.lease("ann")
    writer = await pool.writer()
    await sync(writer, [account(900)])
    await release(writer, done(leased, "ann"))
    await delete(pool, leased)
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '10 minutes'")
    await sync(writer, [account(900), account(int(leased))])
    (due,) = await claimed(writer)
    assert (due.sandbox_id, due.missing) == (leased, False)
