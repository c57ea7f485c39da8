"""Event payloads match their documented models."""

from typing import get_args

from allocator.handlers import creations, deletions, lease_changes, leases, logins, policies, tokens, waiting
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ApplyPolicies,
    ClaimAccess,
    ClaimCreations,
    ClaimDeletions,
    ClaimLease,
    EndLease,
    EndPlay,
    ExpireLeases,
    ExtendLease,
    IssueToken,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordCreation,
    RecordCreationFailure,
    RecordDeletion,
    RecordDeletionFailure,
    ReplaceSandbox,
    ResumeStock,
    RetryDeletion,
    ServeWaiting,
)
from sandbox_broker.contract.event_payloads import EVENT_DATA
from sandbox_broker.contract.events import EventType
from sandbox_broker.contract.policies import Policy
from sandbox_broker.contract.replies import AccessClaimed, CreationsClaimed, DueAccess
from sandbox_broker.contract.tokens import TokenGrant
from sandbox_broker.contract.types import MAX_TIME

from .allocator_harness import (
    RUN,
    Pool,
    account,
    allocate,
    allocate_command,
    granted_lease,
    refusal_code,
    release,
    release_command,
    sync,
)


async def test_every_event_matches_its_documented_payload(pool: Pool) -> None:
    session = await pool.write_session()
    accounts = [account(number) for number in range(1, 8)]
    await sync(session, accounts)
    replies = await allocate(
        session,
        allocate_command("ann", track="lab"),
        allocate_command("bob"),
        allocate_command("cleo"),
        allocate_command("eva"),
        allocate_command("dan", prefix="none"),
    )
    ann, bob, cleo, _ = [granted_lease(reply).sandbox_id for reply in replies[:4]]
    assert refusal_code(replies[4]) == "POOL_EXHAUSTED"

    (reply,) = await allocate(session, AllocateSandbox(request_id="request", holder="setup", mode="standby"))
    standby = granted_lease(reply).sandbox_id
    await lease_changes.claim_lease(
        session, [ClaimLease(request_id="request", sandbox_id=standby, holder="setup", new_holder="eve")]
    )
    extension = {"request_id": "request", "sandbox_id": standby, "extension_sec": 60, "note": "exam"}
    await lease_changes.extend_lease(session, [ExtendLease(extension_id=RUN, **extension)])
    await lease_changes.replace_sandbox(
        session, [ReplaceSandbox(request_id="request", sandbox_id=standby, holder="eve", reason="no DNS")]
    )

    await release(session, release_command(ann, "ann"))
    await pool.execute("UPDATE leases SET expires_at = now() - interval '1 day' WHERE holder = 'bob'")
    await leases.end_play(session, [EndPlay(request_id="request", holder="eva", ended_at=MAX_TIME)])
    await leases.expire_leases(session, ExpireLeases(grace_sec=0, limit=10))
    await leases.end_lease(session, EndLease(request_id="request", sandbox_id=cleo, note="left"))

    await deletions.claim_deletions(session, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    await deletions.record_deletion(session, RecordDeletion(sandbox_id=ann))
    await deletions.record_deletion_failure(
        session, RecordDeletionFailure(run_id=RUN, sandbox_id=bob, attempts=0, error="500")
    )
    await deletions.retry_deletion(session, RetryDeletion(request_id="request", sandbox_id=bob))

    await pool.stock_rule("lab-", 2, 2)
    reply = await creations.claim_creations(session, ClaimCreations(run_id=RUN, limit=2, claim_sec=60))
    assert isinstance(reply, CreationsClaimed)
    first, second = reply.creations
    await creations.record_creation(
        session, RecordCreation(creation_id=first.creation_id, external_id="account-99")
    )
    await creations.record_creation_failure(
        session,
        RecordCreationFailure(run_id=RUN, creation_id=second.creation_id, attempts=0, error="quota", refused=True),
    )
    await creations.resume_stock(session, ResumeStock(request_id="request", name_prefix="lab-"))
    await end_logins(pool, session)
    policies_command = ApplyPolicies(request_id="request", policies=(Policy(name="lab"),))
    await policies.apply_policies(session, policies_command)
    await tokens.issue_token(
        session,
        IssueToken(
            request_id="request",
            key_id="0123456789abcdef",
            token_hash="ab" * 32,
            grant=TokenGrant(name="lab", role="track"),
        ),
    )

    assert refusal_code(await sync(session, [])) == "SYNC_HELD"
    await sync(session, accounts[:-1])
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '1 hour' WHERE status = 'deleted'")
    await sync(session, accounts)

    for holder in ("gus", "hal"):
        await allocate(session, allocate_command(holder, "none-", wait_sec=60))
    await pool.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status) VALUES ('99', 'new', 'none-1', 'available')"
    )
    await waiting.serve_waiting(session, [ServeWaiting()])
    await allocate(session, allocate_command("hal", "none-", wait_sec=0))

    events = await pool.rows("SELECT type, data FROM outbox")
    assert {row["type"] for row in events} == set(get_args(EventType))
    data = [EVENT_DATA[row["type"]].model_validate_json(row["data"]) for row in events]
    reasons = {event.model_dump().get("reason") for event in data}
    assert {"student", "expired", "broken", "play_ended", "admin"} <= reasons
    assert any(event.model_dump().get("reopened") is True for event in data)


async def end_logins(pool: Pool, session: WriteSession) -> None:
    """Let two logins fail, become ready, and end with their leases: one by a removal, one with its account."""
    for number in (97, 98):
        await pool.execute(
            "INSERT INTO sandboxes (sandbox_id, external_id, name, status) "
            "VALUES ($1, 'account-' || $1, 'login-' || $1, 'available')",
            str(number),
        )
        await allocate(session, allocate_command(f"student-{number}", "login-", access="user"))
    for due in await claim_logins(session):
        await logins.record_access_failure(
            session,
            RecordAccessFailure(
                sandbox_id=due.sandbox_id, claim_id=due.claim_id, error="503", retry_in_sec=0, failed=True
            ),
        )
    for due in await claim_logins(session):
        await logins.record_access(
            session, RecordAccess(sandbox_id=due.sandbox_id, claim_id=due.claim_id, user_id="user-1")
        )
        await leases.end_lease(session, EndLease(request_id="request", sandbox_id=due.sandbox_id, note="left"))
    first, second = await claim_logins(session)
    await logins.record_access_removal(
        session, RecordAccessRemoval(sandbox_id=first.sandbox_id, claim_id=first.claim_id)
    )
    await deletions.record_deletion(session, RecordDeletion(sandbox_id=second.sandbox_id))


async def claim_logins(session: WriteSession) -> tuple[DueAccess, ...]:
    command = ClaimAccess(limit=9, max_running=9, claim_sec=60, email_domain="labs", removal_wait_sec=0)
    reply = await logins.claim_access(session, command)
    assert isinstance(reply, AccessClaimed)
    return reply.logins
