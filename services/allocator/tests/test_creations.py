"""Creation intents: granted within the stock rules, claimed by one run at a time, and ended once."""

import asyncio
import uuid
from typing import Any

import pytest

from allocator.handlers.creations import (
    claim_creations,
    end_creations,
    record_creation,
    record_creation_failure,
    resume_stock,
)
from allocator.routing import MAINTENANCE
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    ClaimCreations,
    EndCreations,
    ListedAccount,
    RecordCreation,
    RecordCreationFailure,
    ResumeStock,
)
from sandbox_broker.contract.replies import CreationsClaimed, DueCreation, ListingApplied, Recorded

from .allocator_harness import RUN, Pool, allocate, allocate_command, refusal_code, sync

OTHER_RUN = uuid.UUID(int=9)


@pytest.fixture
async def session(pool: Pool) -> WriteSession:
    return await pool.write_session(lane=MAINTENANCE)


async def send_claim(
    session: WriteSession,
    *,
    run: uuid.UUID = RUN,
    limit: int = 100,
    claim_sec: float = 60,
    received: tuple[int, ...] | None = None,
    dry_run: bool = False,
) -> CreationsClaimed:
    command = ClaimCreations(
        run_id=run, limit=limit, claim_sec=claim_sec, received=received, dry_run=dry_run, request_id="tick"
    )
    reply = await claim_creations(session, command)
    assert isinstance(reply, CreationsClaimed)
    return reply


async def claim(session: WriteSession, **options: Any) -> list[DueCreation]:
    return list((await send_claim(session, **options)).creations)


def names(due: list[DueCreation]) -> list[str]:
    return [creation.name for creation in due]


async def record(session: WriteSession, creation_id: int, external_id: str) -> bool:
    reply = await record_creation(session, RecordCreation(creation_id=creation_id, external_id=external_id))
    assert isinstance(reply, Recorded)
    return reply.changed


async def fail(session: WriteSession, due: DueCreation, retry_in_sec: float | None = 0, **options: Any) -> bool:
    options = {"run_id": RUN, "attempts": due.attempts, "error": "CSP said 503", **options}
    command = RecordCreationFailure(creation_id=due.creation_id, retry_in_sec=retry_in_sec, **options)
    reply = await record_creation_failure(session, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def resume(session: WriteSession, name_prefix: str = "lab-") -> bool:
    reply = await resume_stock(session, ResumeStock(request_id="request", name_prefix=name_prefix))
    assert isinstance(reply, Recorded)
    return reply.changed


def listed(number: int, name: str, external_id: str | None = None) -> ListedAccount:
    return ListedAccount(sandbox_id=f"csp-{number}", external_id=external_id or f"uuid-{number}", name=name)


async def state(pool: Pool, name: str) -> tuple[str, bool]:
    (row,) = await pool.rows("SELECT state, in_flight FROM creations WHERE name = $1", name)
    return row["state"], row["in_flight"]


async def level(pool: Pool, name_prefix: str = "lab-") -> dict[str, Any]:
    (row,) = await pool.rows("SELECT * FROM stock_levels WHERE name_prefix = $1", name_prefix)
    return dict(row)


async def age_failed_attempts(pool: Pool) -> None:
    """Move all ends of intents an hour back, before the grace of a listing."""
    await pool.execute("UPDATE creations SET ended_at = ended_at - interval '1 hour' WHERE ended_at IS NOT NULL")


async def test_a_claim_grants_the_missing_intents_with_numbered_names(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 3, 10, admin_user={"email": "lab@example.com", "name": "Lab"})
    due = await claim(session, limit=2)
    assert names(due) == ["lab-1", "lab-2"]
    assert due[0].admin_user == {"email": "lab@example.com", "name": "Lab"}
    assert (due[0].attempts, due[0].claimed_before, due[0].request_id) == (0, False, "tick")
    assert names(await claim(session)) == ["lab-3"]
    reply = await send_claim(session)
    assert reply.creations == ()
    assert reply.next_in_sec is not None
    assert reply.next_in_sec > 0


async def test_a_claim_whose_reply_was_lost_is_due_at_once(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 2, 2)
    assert names(await claim(session, limit=1, received=())) == ["lab-1"]
    due = await claim(session, received=())
    assert {creation.name: (creation.attempts, creation.claimed_before) for creation in due} == {
        "lab-1": (0, True),
        "lab-2": (0, False),
    }
    received = tuple(creation.creation_id for creation in due)
    assert names(await claim(session, received=(received[0],))) == [due[1].name]
    assert await claim(session, received=received) == []
    assert await claim(session) == []  # a provisioner of an earlier version
    await pool.execute("UPDATE creation_duty SET until = now()")
    assert await claim(session, run=OTHER_RUN, received=()) == []


async def test_available_sandboxes_fill_the_stock_and_leased_ones_count_for_max(
    pool: Pool, session: WriteSession
) -> None:
    await pool.fill([f"lab-{number}" for number in range(1, 4)])
    await pool.stock_rule("lab-", 3, 4)
    assert await claim(session) == []
    students = await pool.write_session()
    await allocate(students, *(allocate_command(holder, "lab-") for holder in ("ann", "bob")))
    assert names(await claim(session)) == ["lab-4"]  # max, not min
    assert (await level(pool))["missing"] == 0


async def test_numbers_begin_behind_all_known_ones_and_skip_names_made_by_hand(
    pool: Pool, session: WriteSession
) -> None:
    await pool.fill(["lab-7", "lab-x99", "lab-8b", "other-50"])
    assert isinstance(await sync(session, [listed(1, "lab-20"), listed(2, "lab-007")]), ListingApplied)
    await pool.stock_rule("lab-", 100, 100)
    due = await claim(session, limit=1)
    assert names(due) == ["lab-21"]
    await pool.execute("DELETE FROM creations")
    await pool.execute("UPDATE stock_prefixes SET next_number = 5")
    assert names(await claim(session, limit=3)) == ["lab-5", "lab-6", "lab-8"]


async def test_a_block_of_known_names_longer_than_the_window_is_passed(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 9999)
    await claim(session)
    await pool.execute("DELETE FROM creations")
    await pool.execute(
        "INSERT INTO csp_accounts (listing_id, sandbox_id, external_id, name) "
        "SELECT 1, 'csp-' || n, 'uuid-' || n, 'lab-' || n FROM generate_series(2, 1500) n"
    )
    assert names(await claim(session)) == ["lab-1501"]


async def test_the_dry_run_returns_the_names_and_writes_nothing(pool: Pool, session: WriteSession) -> None:
    await pool.fill(["lab-1"])
    await pool.stock_rule("lab-", 3, 10)
    before = await pool.state()
    due = await claim(session, dry_run=True)
    assert [(each.creation_id, each.name) for each in due] == [(0, "lab-2"), (0, "lab-3")]
    assert await pool.state() == before


async def test_rules_of_nested_prefixes_respect_both_limits(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 4, 5)
    await pool.stock_rule("lab-adv-", 4, 9)
    due = await claim(session)
    assert sorted(names(due)) == ["lab-1", "lab-2", "lab-3", "lab-4", "lab-adv-1"]


async def test_waiting_students_raise_the_target_up_to_max(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 0, 3)
    assert await claim(session) == []
    students = await pool.write_session()
    await allocate(
        students,
        allocate_command("ann", "lab-", wait_sec=900),
        allocate_command("bob", "la", wait_sec=900),
        allocate_command("cid", "other-", wait_sec=900),
        allocate_command("dan", "lab-advanced-", wait_sec=900),
    )
    assert (await level(pool))["waiting"] == 2  # the broker does not create lab-advanced-… here
    assert names(await claim(session)) == ["lab-1", "lab-2"]
    await allocate(students, *(allocate_command(holder, "lab-", wait_sec=900) for holder in ("eve", "fay")))
    assert names(await claim(session)) == ["lab-3"]


async def test_two_allocators_never_grant_more_than_max_together(pool: Pool) -> None:
    """The second statement has read the levels before the first one commits."""
    await pool.stock_rule("lab-", 5, 5)
    first, second = await pool.write_session(lane=MAINTENANCE), await pool.write_session(lane=MAINTENANCE)
    await send_claim(first, limit=1)
    await pool.execute("DELETE FROM creations")
    transaction = first.connection.transaction()
    await transaction.start()
    await send_claim(first, limit=1)
    other = asyncio.create_task(second.run(lambda: send_claim(second, limit=1)))
    await pool.until_waiting(second)
    await transaction.commit()
    await other
    assert await pool.value("SELECT count(*) FROM creations") == 5


async def test_a_grant_from_an_old_snapshot_is_refused_and_repeated(pool: Pool) -> None:
    """Without the leader lease between them, the conditional write on `next_number` protects `max`."""
    await pool.stock_rule("lab-", 5, 5)
    first, second = await pool.write_session(lane=MAINTENANCE), await pool.write_session(lane=MAINTENANCE)
    await send_claim(first, limit=1)
    await pool.execute("DELETE FROM creations; UPDATE creation_duty SET run_id = NULL, until = 'epoch'")
    transaction = pool.transaction()
    await transaction.start()
    await pool.execute("UPDATE stock_prefixes SET next_number = next_number + 5")
    await pool.execute(
        "INSERT INTO creations (name, name_prefix) SELECT 'lab-' || n, 'lab-' FROM generate_series(6, 10) n"
    )
    other = asyncio.create_task(second.run(lambda: send_claim(second)))
    await pool.until_waiting(second)
    await transaction.commit()
    assert names(list((await other).creations)) == [f"lab-{number}" for number in range(6, 11)]
    assert await pool.value("SELECT count(*) FROM creations") == 5


async def test_one_run_at_a_time_claims(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 2, 2)
    await claim(session, limit=1)
    other = await send_claim(session, run=OTHER_RUN)
    assert (other.creations, other.on_duty) == ((), False)
    assert other.next_in_sec is not None
    assert 0 < other.next_in_sec <= 60
    reply = await end_creations(session, EndCreations(run_id=RUN))
    assert reply == Recorded(changed=True)
    assert await end_creations(session, EndCreations(run_id=RUN)) == Recorded(changed=False)
    assert names(await claim(session, run=OTHER_RUN)) == ["lab-2"]


async def test_a_claim_ends_by_itself_and_comes_back_as_claimed_before(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 1)
    await claim(session)
    await pool.execute("UPDATE creations SET due_at = now()")
    (again,) = await claim(session)
    assert (again.name, again.claimed_before) == ("lab-1", True)


async def test_the_emptiest_prefix_is_claimed_first_and_prefixes_take_turns(
    pool: Pool, session: WriteSession
) -> None:
    await pool.fill(["full-1", "full-2"])
    await pool.stock_rule("full-", 4, 4)
    await pool.stock_rule("empty-", 4, 4)
    claimed = [names(await claim(session, limit=1))[0] for _ in range(6)]
    assert claimed[:2] == ["empty-1", "empty-2"]
    assert {name.split("-")[0] for name in claimed[2:4]} == {"full", "empty"}


async def test_a_created_account_counts_until_its_sync_and_becomes_available(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    assert await record(session, due.creation_id, "uuid-1")
    assert not await record(session, due.creation_id, "uuid-1")
    reply = await send_claim(session)
    assert (reply.creations, reply.awaited, reply.next_in_sec) == ((), 1, None)
    assert reply.awaited_sec is not None
    assert reply.awaited_sec >= 0
    assert await state(pool, "lab-1") == ("created", True)
    await sync(session, [listed(1, "renamed by hand", "uuid-1")])
    assert await state(pool, "lab-1") == ("created", False)
    assert await pool.status("csp-1") == "available"
    assert await pool.events() == ["sandbox.created", "sandbox.discovered", "sync.completed"]
    assert (await send_claim(session)).awaited == 0


async def test_a_sync_concludes_an_intent_whose_creation_was_not_recorded(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    await sync(session, [listed(1, "lab-1")])
    assert await state(pool, "lab-1") == ("created", False)
    assert not await record(session, due.creation_id, "uuid-1")
    assert not await fail(session, due)
    assert sorted(await pool.events()) == ["sandbox.created", "sandbox.discovered", "sync.completed"]
    history = await pool.value("SELECT array_agg(e->>'what') FROM creations, jsonb_array_elements(history) e")
    assert history == ["granted", "claimed", "imported"]


async def test_a_creation_that_was_recorded_after_its_import_under_another_name_is_not_in_flight(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    await sync(session, [listed(1, "renamed by hand")])
    assert await state(pool, "lab-1") == ("pending", True)
    assert await record(session, due.creation_id, "uuid-1")
    assert await state(pool, "lab-1") == ("created", False)


async def test_two_accounts_of_one_name_conclude_one_intent(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    await record(session, due.creation_id, "uuid-2")
    await sync(session, [listed(1, "lab-1"), listed(2, "lab-1")])
    assert await pool.value("SELECT external_id FROM creations") == "uuid-2"


async def test_an_account_renamed_to_the_name_of_another_intent_does_not_stop_the_sync(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 2, 2)
    first, _ = await claim(session)
    await record(session, first.creation_id, "uuid-1")
    reply = await sync(session, [listed(1, "lab-2", "uuid-1")])
    assert isinstance(reply, ListingApplied)
    assert [await state(pool, name) for name in ("lab-1", "lab-2")] == [("created", False), ("pending", True)]


async def test_accounts_of_the_stock_do_not_hold_a_sync_for_its_growth(pool: Pool, session: WriteSession) -> None:
    await pool.fill(1)
    await pool.stock_rule("lab-", 60, 60)
    await claim(session)
    account = ListedAccount(sandbox_id="1", external_id="account-1", name="sandbox-1")
    mine = [listed(number, f"lab-{number}") for number in range(1, 61)]
    assert isinstance(await sync(session, [account, *mine], max_growth_fraction=0.5), ListingApplied)
    foreign = [listed(number, f"foreign-{number}") for number in range(100, 160)]
    reply = await sync(session, [account, *mine, *foreign], max_growth_fraction=0.5)
    assert refusal_code(reply) == "SYNC_HELD"


async def test_a_failure_postpones_the_intent_and_counts_once(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    assert await fail(session, due, retry_in_sec=30)
    assert not await fail(session, due, retry_in_sec=30)
    reply = await send_claim(session)
    assert reply.creations == ()
    assert reply.next_in_sec is not None
    assert 0 < reply.next_in_sec <= 30
    await pool.execute("UPDATE creations SET due_at = now()")
    (again,) = await claim(session)
    assert (again.attempts, again.claimed_before) == (1, True)
    assert not await fail(session, again, run_id=OTHER_RUN)
    assert (await level(pool))["failures"] == 1
    assert await record(session, due.creation_id, "uuid-1")
    assert ((await level(pool))["failures"], (await level(pool))["last_error"]) == (0, "CSP said 503")


async def test_a_failed_intent_counts_for_max_until_a_later_listing_lacks_it(
    pool: Pool, session: WriteSession
) -> None:
    """CSP may create an account and answer with an error."""
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    assert await fail(session, due, retry_in_sec=None)
    assert await state(pool, "lab-1") == ("failed", True)
    await sync(session, [listed(9, "other")])
    assert await claim(session) == []
    await age_failed_attempts(pool)
    await sync(session, [listed(9, "other")])
    assert await state(pool, "lab-1") == ("failed", False)
    assert names(await claim(session)) == ["lab-2"]
    assert "creation.failed" in await pool.events()


async def test_an_account_that_appears_after_the_failure_ends_the_intent_as_created(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    await fail(session, due, retry_in_sec=None)
    await age_failed_attempts(pool)
    await sync(session, [listed(1, "lab-1")])
    assert await state(pool, "lab-1") == ("created", False)
    assert await claim(session) == []


async def test_consecutive_failures_stop_the_prefix_until_it_is_resumed(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 2, 2)
    await pool.stock_rule("other-", 1, 1)
    first, second = [due for due in await claim(session) if due.name_prefix == "lab-"]
    await fail(session, first, max_failures=2)
    assert (await level(pool))["stopped_at"] is None
    await fail(session, second, max_failures=2)
    stopped = await level(pool)
    assert (stopped["stop_cause"], stopped["stop_reason"]) == ("failures", "CSP said 503")
    await pool.execute("UPDATE creations SET due_at = now() WHERE name_prefix = 'other-'")
    assert names(await claim(session)) == ["other-1"]
    assert (await pool.events()).count("stock.stopped") == 1

    assert await resume(session)
    assert not await resume(session)
    assert names(await claim(session)) == ["lab-1", "lab-2"]
    assert (await pool.events()).count("stock.resumed") == 1


async def test_a_refusal_stops_the_prefix_at_once_and_keeps_the_intent(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 5)
    (due,) = await claim(session)
    await fail(session, due, retry_in_sec=600, refused=True, error="quota of 50 accounts")
    stopped = await level(pool)
    assert (stopped["stop_cause"], stopped["stop_reason"]) == ("refused", "quota of 50 accounts")
    await pool.stock_rule("lab-", 3, 5)
    assert await claim(session) == []
    assert await pool.value("SELECT count(*) FROM creations") == 1
    await resume(session)
    again = await claim(session)
    assert names(again) == ["lab-1", "lab-2", "lab-3"]
    assert [due.claimed_before for due in again] == [True, False, False]


async def test_an_unknown_prefix_cannot_be_resumed(pool: Pool, session: WriteSession) -> None:
    reply = await resume_stock(session, ResumeStock(request_id="request", name_prefix="lab-"))
    assert refusal_code(reply) == "STOCK_RULE_NOT_FOUND"
    await pool.stock_rule("lab-", 1, 1)
    assert not await resume(session)


async def test_unclaimed_intents_are_abandoned_when_they_are_not_needed(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 5, 5)
    await claim(session, limit=2)
    await pool.stock_rule("lab-", 3, 5)
    await send_claim(session, limit=1)
    states = await pool.column("SELECT state FROM creations ORDER BY creation_id")
    assert states == ["pending", "pending", "pending", "abandoned", "abandoned"]
    await pool.execute("DELETE FROM policies")
    await send_claim(session, limit=1)
    states = await pool.column("SELECT state FROM creations WHERE in_flight ORDER BY creation_id")
    assert states == ["pending", "pending", "pending"]  # claimed ones may have an account
    await pool.execute("UPDATE creations SET due_at = now() - interval '1 hour'")
    await sync(session, [listed(1, "lab-1")])
    assert await state(pool, "lab-1") == ("created", False)
    assert [await state(pool, name) for name in ("lab-2", "lab-3")] == [("abandoned", False)] * 2


async def test_a_created_account_that_csp_never_lists_is_abandoned_after_a_day(
    pool: Pool, session: WriteSession
) -> None:
    await pool.stock_rule("lab-", 1, 1)
    (due,) = await claim(session)
    await record(session, due.creation_id, "uuid-1")
    await sync(session, [listed(9, "other")])
    assert await state(pool, "lab-1") == ("created", True)
    await pool.execute("UPDATE creations SET created_at = created_at - interval '25 hours'")
    await sync(session, [listed(9, "other")])
    assert await state(pool, "lab-1") == ("abandoned", False)


async def test_the_history_keeps_the_grant_and_the_newest_entries(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 1)
    for _ in range(60):
        await claim(session)
        await pool.execute("UPDATE creations SET due_at = now()")
    whats = await pool.column("SELECT e->>'what' FROM creations, jsonb_array_elements(history) e")
    assert whats == ["granted", *["claimed"] * 49]


async def test_the_forecast_takes_the_higher_rate_of_now_and_a_week_ago(pool: Pool, session: WriteSession) -> None:
    await pool.fill([f"lab-{number}" for number in range(1, 41)])
    await pool.stock_rule("lab-", 1, 100)
    students = await pool.write_session()

    async def forecast() -> dict[str, Any]:
        (row,) = await pool.rows("SELECT * FROM stock_forecasts")
        return dict(row)

    assert (await forecast())["exhaustion_sec"] is None
    await allocate(students, *(allocate_command(f"student-{number}", "lab-") for number in range(10)))
    assert (await forecast())["exhaustion_sec"] == pytest.approx(30 / (10 / 300))
    await pool.execute("UPDATE leases SET allocated_at = allocated_at - interval '7 days' + interval '10 minutes'")
    assert (await forecast())["recent_leases_per_sec"] == 0
    assert (await forecast())["exhaustion_sec"] == pytest.approx(30 / (10 / 3600))


async def test_the_measured_creation_times_are_those_of_the_last_imports(pool: Pool, session: WriteSession) -> None:
    await pool.stock_rule("lab-", 1, 1)
    await pool.execute(
        "INSERT INTO creations (name, name_prefix, state, in_flight, first_claimed_at, imported_at, ended_at) "
        "SELECT 'lab-' || n, 'lab-', 'created', false, now() - n * interval '1 second', now(), now() "
        "FROM generate_series(100, 200, 10) n"
    )
    (row,) = await pool.rows("SELECT * FROM stock_forecasts")
    assert (row["creations"], row["creation_p50_sec"], row["creation_p90_sec"]) == (11, 150, 190)
