"""Fencing: an allocator with a stale epoch changes no row and blocks no successor."""

import asyncio
import importlib
import pkgutil
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from allocator import handlers
from allocator.routing import MAINTENANCE, STUDENTS
from allocator.sql import listings
from allocator.write_session import UNAVAILABLE, Fenced, WriteSession
from sandbox_broker.contract.commands import (
    ApplyListing,
    ApplyPolicies,
    BeginListing,
    ClaimAccess,
    ClaimCreations,
    ClaimDeletions,
    ClaimLease,
    Command,
    ConfirmRestore,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndCreations,
    EndLease,
    EndPlay,
    EndTokenLeases,
    ExpireLeases,
    ExtendLease,
    ForgetStudent,
    HurryDeletions,
    IssueToken,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordCreation,
    RecordCreationFailure,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RecordTokenUses,
    RefreshSandboxes,
    ReplaceSandbox,
    ReplayDeadLetter,
    ResumeStock,
    RetryDeletion,
    RevokeToken,
    RotateAccessKeys,
    ServeWaiting,
    StageListing,
    SuspendToken,
)
from sandbox_broker.contract.policies import Policy
from sandbox_broker.contract.tokens import Sender, TokenGrant
from sandbox_broker.contract.types import MAX_TIME
from sandbox_broker.runtime.access_keys import AccessKeys

from .allocator_harness import (
    ACCESS_KEY,
    RUN,
    Pool,
    account,
    allocate,
    allocate_command,
    begin,
    granted_lease,
    release,
    release_command,
    stage,
)

LAB_TOKEN = "00000000000000ab"
"""Key id of the token of the lab."""
HANDLERS = {**STUDENTS.handlers, **MAINTENANCE.handlers}


async def commands(pool: Pool, session: WriteSession) -> dict[str, Command]:
    """Return one command per type; each would change the database."""
    await pool.fill(1)
    leased, pending = await pool.lease("ann"), await pool.pending()
    removing = await pool.pending()
    standby = await pool.lease("setup")
    await pool.execute("UPDATE leases SET mode = 'standby' WHERE holder = 'setup'")
    (failed,) = await pool.fill(1, "deletion_failed")
    await pool.overdue("bob")
    await pool.execute("UPDATE sandboxes SET deletion_claim = $2 WHERE sandbox_id = $1", pending, RUN)
    await pool.execute("UPDATE cleanup_duty SET run_id = $1", RUN)
    await pool.fill(1, "stale")
    await pool.stock_rule("lab-", 1, 5)
    await pool.execute("INSERT INTO creations (name, name_prefix, claim) VALUES ('lab-1', 'lab-', $1)", RUN)
    await pool.execute(
        "INSERT INTO stock_prefixes (name_prefix, next_number, stopped_at, stop_cause) "
        "VALUES ('lab-', 2, now(), 'failures')"
    )
    await pool.execute("UPDATE creation_duty SET run_id = $1", RUN)
    await pool.token("lab", LAB_TOKEN)
    await pool.execute("INSERT INTO audit (actor, action, outcome) VALUES ('a', 'b', 'done')")
    await pool.execute("UPDATE leases SET token = 'lab' WHERE holder = 'ann'")
    listing_id = await begin(session)
    await stage(session, listing_id, [account(900), account(int(leased), "renamed")])
    await allocate(session, allocate_command("dan", "waits-", wait_sec=900))
    await pool.fill(["waits-1"])
    creation_id = await pool.value("SELECT creation_id FROM creations")
    await pool.execute(
        "INSERT INTO accesses (sandbox_id, groups, claim, email, first_claimed_at, due_at, state, ended_at, "
        "password, password_key) VALUES ($1, '[]', $3, 'ann@labs', now(), now(), 'pending', NULL, $4, 'old'), "
        "($2, '[]', $3, 'gone@labs', now(), now(), 'removing', now(), NULL, NULL)",
        leased,
        removing,
        RUN,
        AccessKeys(ACCESS_KEY).encrypt("password"),
    )
    result: list[Command] = [
        ServeWaiting(),
        allocate_command("cid"),
        release_command(leased, "ann"),
        EndPlay(request_id="request", holder="ann", ended_at=MAX_TIME),
        ClaimLease(request_id="request", sandbox_id=standby, holder="setup"),
        ExtendLease(request_id="request", sandbox_id=leased, holder="ann", extension_id=RUN, extension_sec=60),
        ReplaceSandbox(request_id="request", sandbox_id=leased, holder="ann", reason="broken"),
        ExpireLeases(grace_sec=0, limit=10),
        EndLease(request_id="request", sandbox_id=leased, note="why"),
        ClaimDeletions(run_id=RUN, limit=10, claim_sec=60),
        HurryDeletions(run_id=RUN, limit=10, claim_sec=60),
        EndCleanup(run_id=RUN),
        RecordDeletion(sandbox_id=pending),
        RecordDeletionFailure(run_id=RUN, sandbox_id=pending, attempts=0, error="", retry_in_sec=None),
        RetryDeletion(request_id="request", sandbox_id=failed),
        ClaimCreations(run_id=RUN, limit=10, claim_sec=60),
        EndCreations(run_id=RUN),
        RecordCreation(creation_id=creation_id, external_id="account-901"),
        RecordCreationFailure(run_id=RUN, creation_id=creation_id, attempts=0, error="503"),
        ResumeStock(request_id="request", name_prefix="lab-"),
        ClaimAccess(limit=1, max_running=9, claim_sec=60, email_domain="labs", removal_wait_sec=1),
        RecordAccess(sandbox_id=leased, claim_id=RUN, user_id="user-1"),
        RecordAccessFailure(sandbox_id=leased, claim_id=RUN, error="503", retry_in_sec=1),
        RecordAccessRemoval(sandbox_id=removing, claim_id=RUN),
        RotateAccessKeys(request_id="request", limit=10),
        BeginListing(),
        StageListing(listing_id=listing_id, accounts=(account(901),)),
        ApplyListing(listing_id=listing_id, total=2, max_stale_fraction=0, force=True),
        RefreshSandboxes(listing_id=listing_id, limit=10),
        DeleteStale(stale_for_sec=0, limit=10),
        PurgeRecords(status="deletion_failed", limit=10),
        RecordJob(job_id=uuid.uuid4(), kind="sync"),
        # The holder has had a lease since, so the replay publishes no command.
        ReplayDeadLetter(request_id="request", dead_letter_id=await pool.dead_letter(allocate_command("ann"))),
        ApplyPolicies(request_id="request", policies=(Policy(name="lab"),)),
        IssueToken(
            request_id="request",
            key_id="0123456789abcdef",
            token_hash="ab" * 32,
            grant=TokenGrant(name="new", role="track"),
            sender=Sender(actor="$BROKER_ADMIN_TOKEN"),
        ),
        RevokeToken(request_id="request", name="lab"),
        SuspendToken(request_id="request", name="lab"),
        EndTokenLeases(request_id="request", name="lab", note="leaked", limit=10),
        RecordTokenUses(uses={LAB_TOKEN: 1_728_060_000}),
        ForgetStudent(request_id="request", student="gone"),
        PurgeAudit(for_sec=0, limit=10),
        PurgePersonalData(for_sec=0, limit=10),
        DropDeadLetter(request_id="request", dead_letter_id=await pool.dead_letter(allocate_command("bob"))),
    ]
    return {type(command).__name__: command for command in result}


# ConfirmRestore changes no row: it empties a queue.
@pytest.mark.parametrize("kind", [kind.__name__ for kind in HANDLERS if kind is not ConfirmRestore])
async def test_a_fenced_allocator_changes_nothing(pool: Pool, kind: str) -> None:
    session = await pool.write_session()
    command = (await commands(pool, session))[kind]
    handle = HANDLERS[type(command)]
    successor = await pool.write_session()
    await successor.raise_epoch()
    before = await pool.state()
    with pytest.raises(Fenced):
        await handle(session, [command])
    assert await pool.state() == before
    await handle(successor, [command])
    assert await pool.state() != before


@pytest.mark.parametrize(
    "step",
    [partial(listings.hold_listing, reason="reason"), listings.apply_listing, listings.flag_missing],
    ids=["hold", "apply", "flag"],
)
async def test_an_allocator_fenced_within_apply_listing_changes_nothing(
    pool: Pool, step: Callable[..., Awaitable[object]]
) -> None:
    session = await pool.write_session()
    listing_id = await begin(session)
    await stage(session, listing_id, [account(900)])
    await (await pool.write_session()).raise_epoch()
    before = await pool.state()
    with pytest.raises(Fenced):
        await step(session, listing_id=listing_id)
    assert await pool.state() == before


async def test_concurrent_epochs_are_distinct(pool: Pool) -> None:
    sessions = [await pool.write_session() for _ in range(4)]
    await asyncio.gather(*(session.raise_epoch() for session in sessions))
    assert len({session.epoch for session in sessions}) == 4


async def test_raising_the_epoch_waits_for_a_running_statement(pool: Pool) -> None:
    await pool.fill(1)
    session, successor = await pool.write_session(), await pool.write_session()
    transaction = session.connection.transaction()
    await transaction.start()
    lease = granted_lease((await allocate(session, allocate_command("ann")))[0])
    raising = asyncio.create_task(successor.raise_epoch())
    await pool.until_waiting(successor)
    await transaction.commit()
    await raising
    (repeated,) = await allocate(successor, allocate_command("ann"))
    assert repeated == lease.model_copy(update={"new": False})


async def test_a_statement_that_waits_for_a_new_epoch_is_fenced(pool: Pool) -> None:
    await pool.fill(1)
    session, successor = await pool.write_session(), await pool.write_session()
    transaction = successor.connection.transaction()
    await transaction.start()
    await successor.raise_epoch()
    waiting = asyncio.create_task(allocate(session, allocate_command("ann")))
    await pool.until_waiting(session)
    await transaction.commit()
    with pytest.raises(Fenced):
        await waiting
    assert await pool.value("SELECT count(*) FROM leases") == 0


@pytest.mark.parametrize("reconnected", [False, True])
async def test_a_predecessor_frozen_in_a_statement_loses_its_connection(pool: Pool, reconnected: bool) -> None:
    await pool.fill(1)
    frozen = await pool.write_session()
    await frozen.raise_epoch()
    if reconnected:  # the predecessor raised the epoch on an earlier connection
        frozen = await pool.write_session(frozen.epoch)
    await frozen.connection.execute("BEGIN")
    granted_lease((await allocate(frozen, allocate_command("ann")))[0])
    bystander = await pool.write_session()
    successor = await pool.write_session()
    await successor.raise_epoch()
    assert successor.epoch > frozen.epoch
    with pytest.raises(UNAVAILABLE):
        await frozen.connection.execute("COMMIT")
    assert await bystander.connection.fetchval("SELECT 1") == 1
    assert await pool.value("SELECT count(*) FROM leases") == 0


async def test_the_lock_timeout_ends_the_wait_for_a_row_of_an_operator(pool: Pool) -> None:
    sandbox_id = await pool.lease("ann")
    session = await pool.write_session()
    await pool.execute("BEGIN")
    await pool.execute("SELECT FROM leases FOR UPDATE")
    with pytest.raises(UNAVAILABLE):
        await release(session, release_command(sandbox_id, "ann"))
    await pool.execute("ROLLBACK")
    assert (await release(session, release_command(sandbox_id, "ann")))[0].type == "SandboxReleased"


async def test_every_command_has_a_handler_of_its_name() -> None:
    modules = [
        importlib.import_module(f"{handlers.__name__}.{module.name}")
        for module in pkgutil.iter_modules(handlers.__path__)
    ]
    for kind in HANDLERS:
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__)[1:]
        assert any(callable(getattr(module, snake, None)) for module in modules)
