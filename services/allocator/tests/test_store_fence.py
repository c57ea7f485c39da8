"""An allocator that another one has succeeded changes nothing more, and holds nobody up."""

import asyncio
import dataclasses
import importlib
import pkgutil
import uuid

import pytest

from allocator import handlers, listings, store
from allocator.lanes import MAINTENANCE, STUDENTS
from allocator.writer import Writer
from sandbox_broker.contract.commands import (
    ApplyListing,
    BeginListing,
    ClaimDeletions,
    Command,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndLease,
    ExpireLeases,
    HurryDeletions,
    PurgeRecords,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RefreshSandboxes,
    ReplayDeadLetter,
    RetryDeletion,
    StageListing,
)
from sandbox_broker.database.schema import PROOF_GRACE

from .allocator_harness import RUN, Pool, account, allocate, ask, begin, done, granted, release, stage

HANDLERS = {**STUDENTS.handlers, **MAINTENANCE.handlers}
STUDENTS_QUEUE = STUDENTS.queue.name


async def commands(pool: Pool, writer: Writer) -> dict[str, Command]:
    """One of each kind, all of which would change something."""
    await pool.fill(1)
    leased, pending = await pool.lease("ann"), await pool.pending()
    (failed,) = await pool.fill(1, "deletion_failed")
    await pool.overdue("bob")
    await pool.execute("UPDATE sandboxes SET deletion_claim = $2 WHERE sandbox_id = $1", pending, RUN)
    await pool.execute("UPDATE cleanup_duty SET run_id = $1", RUN)
    await pool.fill(1, "stale")
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(900), account(int(leased), "renamed")])
    found: list[Command] = [
        ask("cid"),
        done(leased, "ann"),
        ExpireLeases(grace_sec=0, limit=10),
        EndLease(request_id="request", sandbox_id=leased, note="why"),
        ClaimDeletions(run_id=RUN, limit=10, claim_sec=60),
        HurryDeletions(run_id=RUN, limit=10, claim_sec=60),
        EndCleanup(run_id=RUN),
        RecordDeletion(sandbox_id=pending),
        RecordDeletionFailure(run_id=RUN, sandbox_id=pending, attempts=0, error="", retry_in_sec=None),
        RetryDeletion(request_id="request", sandbox_id=failed),
        BeginListing(),
        StageListing(listing_id=listing_id, accounts=(account(901),)),
        ApplyListing(listing_id=listing_id, total=2, max_stale_fraction=0, force=True),
        RefreshSandboxes(listing_id=listing_id, limit=10),
        DeleteStale(stale_for_sec=0, limit=10),
        PurgeRecords(status="deletion_failed", limit=10),
        RecordJob(job_id=uuid.uuid4(), kind="sync"),
        # Of an allocation of somebody who has had a sandbox since nothing is put back.
        ReplayDeadLetter(request_id="request", dead_letter_id=await pool.dead_letter(ask("ann"))),
        DropDeadLetter(request_id="request", dead_letter_id=await pool.dead_letter(ask("bob"))),
    ]
    return {type(command).__name__: command for command in found}


@pytest.mark.parametrize("kind", [kind.__name__ for kind in HANDLERS])
async def test_a_fenced_allocator_changes_nothing(pool: Pool, kind: str) -> None:
    writer = await pool.writer()
    command = (await commands(pool, writer))[kind]
    handle = HANDLERS[type(command)]
    successor = await pool.writer()
    epoch = await store.raise_epoch(successor.connection, STUDENTS_QUEUE)
    before = await pool.state()
    with pytest.raises(store.Fenced):
        await handle(writer, [command])
    assert await pool.state() == before
    await handle(dataclasses.replace(successor, epoch=epoch), [command])
    assert await pool.state() != before


@pytest.mark.parametrize("statement", [listings.HOLD_LISTING, listings.APPLY_LISTING, listings.FLAG_MISSING])
async def test_an_allocator_fenced_between_weighing_and_applying_changes_nothing(
    pool: Pool, statement: str
) -> None:
    writer = await pool.writer()
    listing_id = await begin(writer)
    await stage(writer, listing_id, [account(900)])
    await store.raise_epoch(writer.connection, STUDENTS_QUEUE)
    before = await pool.state()
    argument = "reason" if statement == listings.HOLD_LISTING else PROOF_GRACE
    with pytest.raises(store.Fenced):
        await store.one(writer.connection, statement, writer.epoch, listing_id, argument)
    assert await pool.state() == before


async def test_every_epoch_is_raised_once(pool: Pool) -> None:
    connections = [(await pool.writer()).connection for _ in range(4)]
    epochs = await asyncio.gather(*(store.raise_epoch(one, STUDENTS_QUEUE) for one in connections))
    assert len(set(epochs)) == 4


async def test_raising_the_epoch_waits_for_a_statement_at_work(pool: Pool) -> None:
    await pool.fill(1)
    writer, successor = await pool.writer(), await pool.writer()
    transaction = writer.connection.transaction()
    await transaction.start()
    lease = granted((await allocate(writer, ask("ann")))[0])
    raising = asyncio.create_task(store.raise_epoch(successor.connection, STUDENTS_QUEUE))
    await pool.until_waiting(successor)
    await transaction.commit()
    epoch = await raising
    (again,) = await allocate(dataclasses.replace(successor, epoch=epoch), ask("ann"))
    assert again == lease.model_copy(update={"new": False})


async def test_a_statement_that_waits_while_the_epoch_is_raised_is_fenced(pool: Pool) -> None:
    await pool.fill(1)
    writer, successor = await pool.writer(), await pool.writer()
    transaction = successor.connection.transaction()
    await transaction.start()
    await store.raise_epoch(successor.connection, STUDENTS_QUEUE)
    waiting = asyncio.create_task(allocate(writer, ask("ann")))
    await pool.until_waiting(writer)
    await transaction.commit()
    with pytest.raises(store.Fenced):
        await waiting
    assert await pool.value("SELECT count(*) FROM leases") == 0


@pytest.mark.parametrize("reconnected", [False, True])
async def test_a_predecessor_that_is_frozen_in_its_statement_loses_its_connection(
    pool: Pool, reconnected: bool
) -> None:
    await pool.fill(1)
    frozen = await pool.writer()
    epoch = await store.raise_epoch(frozen.connection, STUDENTS_QUEUE)
    if reconnected:  # the epoch was raised on a connection that it no longer has
        frozen = await pool.writer(epoch)
    await frozen.connection.execute("BEGIN")
    granted((await allocate(dataclasses.replace(frozen, epoch=epoch), ask("ann")))[0])
    bystander = await pool.writer()
    successor = await pool.writer()
    raised = await store.raise_epoch(successor.connection, STUDENTS_QUEUE)
    assert raised > epoch
    with pytest.raises(store.UNAVAILABLE):
        await frozen.connection.execute("COMMIT")
    assert await bystander.connection.fetchval("SELECT 1") == 1
    assert await pool.value("SELECT count(*) FROM leases") == 0


async def test_a_row_that_an_operator_locks_is_not_waited_for_long(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    writer = await pool.writer()
    await pool.execute("BEGIN")
    await pool.execute("SELECT FROM leases FOR UPDATE")
    with pytest.raises(store.UNAVAILABLE):
        await release(writer, done(sandbox_id, "ann"))
    await pool.execute("ROLLBACK")
    assert (await release(writer, done(sandbox_id, "ann")))[0].type == "SandboxReleased"


async def test_every_command_has_a_handler_under_its_name() -> None:
    modules = [
        importlib.import_module(f"{handlers.__name__}.{found.name}")
        for found in pkgutil.iter_modules(handlers.__path__)
    ]
    for kind in HANDLERS:
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__)[1:]
        assert any(callable(getattr(module, snake, None)) for module in modules)
