"""Runner of a service with planted bugs: `python mutating.py MODULE`, for the allocator or the provisioner.

PLANTED is a comma-separated list of bugs, and may be empty. Like crash_runner.py it can stop the service at a
point. Statements get a longer time-out, so that a test can observe a blocked one. The provisioner has shorter
time-outs, so that the claims of a killed one end soon.
"""

import asyncio
import dataclasses
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import asyncpg

from allocator import consumer, routing, token_book, write_session
from allocator import main as allocator_main
from allocator.handlers import waiting as waiting_handlers
from allocator.sql import (
    allocations,
    audit,
    creations,
    dead_letters,
    deletions,
    jobs,
    lease_changes,
    leases,
    listings,
    logins,
    personal_data,
    policies,
    purge,
    tokens,
    waiting,
)
from devstack.crashes import CrashPoints
from provisioner import creation, refill
from provisioner import main as provisioner_main
from sandbox_broker.csp import client as csp_client
from sandbox_broker.messaging import publisher, subscription

STATEMENT_TIMEOUT_SEC = 30
UNGUARDED = "guard AS (SELECT $1::bigint AS epoch, policy_version FROM allocator_epoch LIMIT 1)"
"""In the place of the epoch guard: it selects a row for every epoch."""


def replace_required(text: str, old: str, new: str) -> str:
    """Replace `old`. Fail if the product no longer contains it, because the bug would then have no effect."""
    assert old in text, f"{old!r} is missing"
    return text.replace(old, new)


def is_of_student(delivery: Any) -> bool:
    """Return False for maintenance commands, which arrive continuously."""
    # A command that a chaos round resends has a prefix before this routing key: delivery_faults.RESEND_PREFIX.
    return str(delivery.routing_key).endswith(routing.STUDENTS.queue.name)


def no_skip_locked() -> None:
    allocations.ALLOCATE_ANY = replace_required(allocations.ALLOCATE_ANY, "FOR UPDATE SKIP LOCKED", "FOR UPDATE")


def no_lock_and_no_recheck() -> None:
    """Claim a sandbox without locking its row and without checking its status again."""
    unlocked = replace_required(allocations.ALLOCATE_ANY, "FOR UPDATE SKIP LOCKED", "")
    allocations.ALLOCATE_ANY = replace_required(unlocked, " AND s.status || '' = 'available'", "")


def no_epoch_guard() -> None:
    modules: Sequence[ModuleType] = (
        allocations,
        leases,
        logins,
        lease_changes,
        waiting,
        policies,
        creations,
        dead_letters,
        deletions,
        jobs,
        listings,
        personal_data,
        purge,
        tokens,
        audit,
    )
    for module in modules:
        for name, text in list(vars(module).items()):
            if isinstance(text, str) and write_session.GUARD in text and text != write_session.GUARD:
                setattr(module, name, text.replace(write_session.GUARD, UNGUARDED))


def ack_before_commit() -> None:
    handle, ack = consumer.Consumer._handle_batch, subscription.Subscription.ack

    async def ack_and_handle(self: Any, subscription: subscription.Subscription, deliveries: Sequence[Any]) -> None:
        await ack(subscription, deliveries[-1], all_before=True)
        await asyncio.sleep(0.1)  # until RabbitMQ has received the acknowledgement
        await handle(self, subscription, deliveries)

    async def do_nothing(*_: object, **__: object) -> None:
        pass

    consumer.Consumer._handle_batch = ack_and_handle  # type: ignore[method-assign]
    subscription.Subscription.ack = do_nothing  # type: ignore[method-assign]


def reply_before_commit() -> None:
    allocate, answer = allocations.allocate, consumer.publish_replies  # type: ignore[attr-defined]
    open_transactions: list[asyncpg.Connection] = []

    async def begin(
        session: write_session.WriteSession, commands: Sequence[Any]
    ) -> list[allocations.AllocationRow]:
        await session.connection.execute("BEGIN")
        open_transactions.append(session.connection)
        return await allocate(session, commands)

    async def answer_and_commit(publisher: publisher.Publisher, delivery: Any, replies: Any) -> None:
        await answer(publisher, delivery, replies)
        while open_transactions and is_of_student(delivery):
            await open_transactions.pop().execute("COMMIT")

    allocations.allocate = begin
    consumer.publish_replies = answer_and_commit  # type: ignore[attr-defined]


def outbox_in_separate_statement() -> None:
    """Write the event by a second statement, after the lease is committed."""
    allocations.ALLOCATE_ANY = replace_required(
        allocations.ALLOCATE_ANY,
        "INSERT INTO outbox (type, subject, data)\n    SELECT 'sandbox.allocated'",
        "SELECT 'sandbox.allocated'",
    )
    allocate = allocations.allocate

    async def allocate_then_write_event(
        session: write_session.WriteSession, commands: Sequence[Any]
    ) -> list[allocations.AllocationRow]:
        rows = await allocate(session, commands)
        for command, row in zip(commands, rows, strict=True):
            if row["outcome"] == "new":
                await session.connection.execute(
                    "INSERT INTO outbox (type, subject, data) "
                    "VALUES ('sandbox.allocated', $1, jsonb_build_object('holder', $2::text))",
                    row["sandbox_id"],
                    command.holder,
                )
        return rows

    allocations.allocate = allocate_then_write_event


def no_tombstones() -> None:
    """Import a listed account as new if its sandbox is deleted."""
    unknown = "AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.sandbox_id = a.sandbox_id"
    text = replace_required(listings.APPLY_LISTING, f"{unknown})", f"{unknown} AND s.status <> 'deleted')")
    text = replace_required(text, "AND NOT EXISTS (SELECT FROM leases l WHERE l.sandbox_id = a.sandbox_id)", "")
    listings.APPLY_LISTING = replace_required(
        text,
        "ON CONFLICT DO NOTHING",
        "ON CONFLICT (sandbox_id) DO UPDATE SET status = 'available', status_since = now(), deleted_at = NULL",
    )


def no_token_scope_in_release() -> None:
    leases.RELEASE = replace_required(leases.RELEASE, leases.is_in_scope("l", "r.scope"), "true")


def no_token_quota() -> None:
    """Run the statement without quotas, although the token has a limit."""
    token_book.Token.has_quota = False  # type: ignore[method-assign, assignment]


def no_secret_of_a_place() -> None:
    """Let each request keep the place of its student in line."""
    waiting_handlers._refuse_stranger = lambda *_: None


def no_look_up_by_name() -> None:
    """Create the account of each claimed intent, although an earlier attempt may have created it."""

    async def find_nothing(*_: object) -> None:
        pass

    creation.Creator._find = find_nothing  # type: ignore[method-assign, assignment]


BUGS = {
    bug.__name__: bug
    for bug in (
        no_skip_locked,
        no_lock_and_no_recheck,
        no_epoch_guard,
        ack_before_commit,
        reply_before_commit,
        outbox_in_separate_statement,
        no_tombstones,
        no_token_scope_in_release,
        no_token_quota,
        no_secret_of_a_place,
        no_look_up_by_name,
    )
}

if __name__ == "__main__":
    module = sys.argv.pop(1)
    crashes = CrashPoints(Path(os.environ["STOP_AT"]), module)
    write_session.LOCK_TIMEOUT = f"{STATEMENT_TIMEOUT_SEC}s"
    students = dataclasses.replace(routing.STUDENTS, statement_timeout_sec=STATEMENT_TIMEOUT_SEC)
    routing.STUDENTS = allocator_main.STUDENTS = students  # type: ignore[attr-defined]
    allocations.allocate = crashes.wrap(allocations.allocate, "before commit", "after commit")
    answer = consumer.publish_replies  # type: ignore[attr-defined]

    async def answer_and_stop(publisher: publisher.Publisher, delivery: Any, replies: Any) -> None:
        await answer(publisher, delivery, replies)
        if is_of_student(delivery):
            crashes.reach("after reply")

    consumer.publish_replies = answer_and_stop  # type: ignore[attr-defined]
    creation.LOOK_UP_TIMEOUT_SEC = 1
    provisioner_main.REQUEST_TIMEOUT_SEC = 0.5
    refill.CLAIM_MARGIN_SEC = 0.3
    client = csp_client.CspClient
    client.create_account = crashes.wrap(client.create_account, None, "after CSP")  # type: ignore[method-assign]
    for name in filter(None, os.environ["PLANTED"].split(",")):
        BUGS[name]()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
