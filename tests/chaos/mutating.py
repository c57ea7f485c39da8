"""Runs an allocator with bugs planted into it: `python mutating.py allocator`.

PLANTED names them, comma-separated; with none it is the allocator as it is. It stops where it is told, as in
crashing.py, and has more patience with its statements, so that a test can look at one that waits.
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

from allocator import consumer, dead_letters, deletions, jobs, lanes, listings, purge, store
from devstack.crashes import CrashPoints
from sandbox_broker.messaging import publisher, subscription

PATIENCE_SEC = 30


def replaced(text: str, old: str, new: str) -> str:
    """Fails where the product no longer has what is to be broken."""
    assert old in text, f"nothing says {old!r}"
    return text.replace(old, new)


def is_of_student(delivery: Any) -> bool:
    """Not maintenance, which goes on all the time."""
    # Of what a chaos round sends again, the routing key only ends so: deliveries.AGAIN.
    return str(delivery.routing_key).endswith(lanes.STUDENTS.queue.name)


def no_skip_locked() -> None:
    store.ALLOCATE_ANY = replaced(store.ALLOCATE_ANY, "FOR UPDATE SKIP LOCKED", "FOR UPDATE")


def no_lock_and_no_look() -> None:
    """What was read as available is claimed, whatever has become of it."""
    unlocked = replaced(store.ALLOCATE_ANY, "FOR UPDATE SKIP LOCKED", "")
    store.ALLOCATE_ANY = replaced(unlocked, " AND s.status || '' = 'available'", "")


def no_epoch_guard() -> None:
    modules: Sequence[ModuleType] = (store, dead_letters, deletions, jobs, listings, purge)
    for module in modules:
        for name, text in list(vars(module).items()):
            if isinstance(text, str) and store.GUARD in text and text != store.GUARD:
                setattr(module, name, text.replace(store.GUARD, "guard AS (SELECT $1::bigint AS epoch)"))


def ack_before_commit() -> None:
    handle, ack = consumer.Consumer._handle, subscription.Subscription.ack

    async def ack_and_handle(self: Any, subscription: subscription.Subscription, deliveries: Sequence[Any]) -> None:
        await ack(subscription, deliveries[-1], all_before=True)
        await asyncio.sleep(0.1)  # until it has arrived
        await handle(self, subscription, deliveries)

    async def nothing(*_: object, **__: object) -> None:
        pass

    consumer.Consumer._handle = ack_and_handle  # type: ignore[method-assign]
    subscription.Subscription.ack = nothing  # type: ignore[method-assign]


def reply_before_commit() -> None:
    allocate, answer = store.allocate, consumer.answer  # type: ignore[attr-defined]
    begun: list[asyncpg.Connection] = []

    async def begin(connection: asyncpg.Connection, *arguments: Any) -> store.Rows:
        await connection.execute("BEGIN")
        begun.append(connection)
        return await allocate(connection, *arguments)

    async def answer_and_commit(publisher: publisher.Publisher, delivery: Any, replies: Any) -> None:
        await answer(publisher, delivery, replies)
        while begun and is_of_student(delivery):
            await begun.pop().execute("COMMIT")

    store.allocate = begin  # type: ignore[assignment]
    consumer.answer = answer_and_commit  # type: ignore[attr-defined]


def outbox_apart() -> None:
    """The event is written when the lease is committed, by a statement of its own."""
    store.ALLOCATE_ANY = replaced(
        store.ALLOCATE_ANY,
        "INSERT INTO outbox (type, subject, data)\n    SELECT 'sandbox.allocated'",
        "SELECT 'sandbox.allocated'",
    )
    allocate = store.allocate

    async def allocate_and_announce(
        connection: asyncpg.Connection, epoch: int, commands: Sequence[Any], lab_duration: Any
    ) -> store.Rows:
        rows = await allocate(connection, epoch, commands, lab_duration)
        for command, row in zip(commands, rows, strict=True):
            if row["outcome"] == "new":
                await connection.execute(
                    "INSERT INTO outbox (type, subject, data) "
                    "VALUES ('sandbox.allocated', $1, jsonb_build_object('holder', $2::text))",
                    row["sandbox_id"],
                    command.holder,
                )
        return rows

    store.allocate = allocate_and_announce


def no_tombstones() -> None:
    """What a listing contains and the pool does not count is new to it."""
    unknown = "AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.sandbox_id = a.sandbox_id"
    text = replaced(listings.APPLY_LISTING, f"{unknown})", f"{unknown} AND s.status <> 'deleted')")
    text = replaced(text, "AND NOT EXISTS (SELECT FROM leases l WHERE l.sandbox_id = a.sandbox_id)", "")
    listings.APPLY_LISTING = replaced(
        text,
        "ON CONFLICT DO NOTHING",
        "ON CONFLICT (sandbox_id) DO UPDATE SET status = 'available', status_since = now(), deleted_at = NULL",
    )


BUGS = {
    bug.__name__: bug
    for bug in (
        no_skip_locked,
        no_lock_and_no_look,
        no_epoch_guard,
        ack_before_commit,
        reply_before_commit,
        outbox_apart,
        no_tombstones,
    )
}

if __name__ == "__main__":
    module = sys.argv.pop(1)
    crashes = CrashPoints(Path(os.environ["STOP_AT"]), module)
    store.LOCK_TIMEOUT = f"{PATIENCE_SEC}s"
    lanes.STUDENTS = dataclasses.replace(lanes.STUDENTS, statement_timeout_sec=PATIENCE_SEC)
    store.allocate = crashes.wrap(store.allocate, "before commit", "after commit")
    answer = consumer.answer  # type: ignore[attr-defined]

    async def answer_and_stop(publisher: publisher.Publisher, delivery: Any, replies: Any) -> None:
        await answer(publisher, delivery, replies)
        if is_of_student(delivery):
            crashes.reach("after reply")

    consumer.answer = answer_and_stop  # type: ignore[attr-defined]
    for name in filter(None, os.environ["PLANTED"].split(",")):
        BUGS[name]()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
