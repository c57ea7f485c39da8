"""What events hold is what subscribers were promised."""

from typing import get_args

from allocator.handlers import deletions, leases
from sandbox_broker.contract.commands import (
    ClaimDeletions,
    EndLease,
    ExpireLeases,
    RecordDeletion,
    RecordDeletionFailure,
    RetryDeletion,
)
from sandbox_broker.contract.event_payloads import EVENT_DATA
from sandbox_broker.contract.events import EventType

from .allocator_harness import RUN, Pool, account, allocate, ask, done, granted, refusal, release, sync


async def test_the_data_of_every_event_is_as_documented(pool: Pool) -> None:
    writer = await pool.writer()
    accounts = [account(number) for number in range(1, 6)]
    await sync(writer, accounts)
    replies = await allocate(writer, ask("ann", track="lab"), ask("bob"), ask("cleo"), ask("dan", prefix="none"))
    ann, bob, cleo = [granted(reply).sandbox_id for reply in replies[:3]]
    assert refusal(replies[3]) == "POOL_EXHAUSTED"

    await release(writer, done(ann, "ann"))
    await pool.execute("UPDATE leases SET expires_at = now() - interval '1 day' WHERE holder = 'bob'")
    await leases.expire_leases(writer, ExpireLeases(grace_sec=0, limit=10))
    await leases.end_lease(writer, EndLease(request_id="request", sandbox_id=cleo, note="left"))

    await deletions.claim_deletions(writer, ClaimDeletions(run_id=RUN, limit=10, claim_sec=60))
    await deletions.record_deletion(writer, RecordDeletion(sandbox_id=ann))
    await deletions.record_deletion_failure(
        writer, RecordDeletionFailure(run_id=RUN, sandbox_id=bob, attempts=0, error="500")
    )
    await deletions.retry_deletion(writer, RetryDeletion(request_id="request", sandbox_id=bob))

    assert refusal(await sync(writer, [])) == "SYNC_HELD"
    await sync(writer, accounts[:4])
    await pool.execute("UPDATE sandboxes SET status_since = now() - interval '1 hour' WHERE status = 'deleted'")
    await sync(writer, accounts)

    told = await pool.rows("SELECT type, data FROM outbox")
    assert {row["type"] for row in told} == set(get_args(EventType))
    data = [EVENT_DATA[row["type"]].model_validate_json(row["data"]) for row in told]
    reasons = {event.model_dump().get("reason") for event in data}
    assert {"student", "expired", "admin"} <= reasons
    assert any(event.model_dump().get("reopened") is True for event in data)
