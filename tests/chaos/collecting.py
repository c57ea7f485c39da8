"""Brings the evidence of a round together, once its faults are healed and the broker has come to rest."""

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg

from sandbox_broker.messaging.connection import opened
from tests.chaos.client import History
from tests.chaos.evidence import Deletion, Epoch, Event, Evidence, Lease, Recovery, Sandbox, Stall
from tests.chaos.stack import EVENTS_QUEUE, GRACE_SEC, Chaos
from tests.integration.stack import Stack, eventually

REST_SEC = 180.0
LOOK_SEC = 0.5
CONNECT_SEC = 3.0
TICK_SEC = 0.05
STALL_SEC = 0.02
"""So late everybody is now and then."""

AT_WORK = """
SELECT count(*) FROM (
    SELECT FROM sandboxes WHERE status = 'pending_deletion'
    UNION ALL SELECT FROM leases WHERE ended_at IS NULL
    UNION ALL SELECT FROM outbox
) open
"""


async def watch_epochs(database_url: str, epochs: list[Epoch]) -> None:
    """Looks at them all the time, for ever; while the database is away there is nothing to see."""
    while True:
        try:
            connection = await asyncpg.connect(database_url, timeout=CONNECT_SEC, command_timeout=CONNECT_SEC)
            try:
                while True:
                    seen_at = time.time()
                    for row in await connection.fetch("SELECT queue, epoch, backend_pid FROM allocator_epoch"):
                        epochs.append(Epoch(seen_at=seen_at, **row))
                    await asyncio.sleep(LOOK_SEC)
            finally:
                connection.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await asyncio.sleep(LOOK_SEC)


async def watch_machine(stalls: list[Stall]) -> None:
    """Looks at the clock all the time, for ever, and writes down when it came too late to that."""
    while True:
        due = time.time() + TICK_SEC
        await asyncio.sleep(TICK_SEC)
        if (now := time.time()) > due + STALL_SEC:
            stalls.append(Stall(since=due, until=now))


async def held(chaos: Chaos) -> list[tuple[str, str]]:
    """Which student holds which sandbox."""
    rows = await chaos.stack.database.fetch("SELECT holder, sandbox_id FROM leases WHERE ended_at IS NULL")
    return [(row["holder"], row["sandbox_id"]) for row in rows]


async def come_to_rest(chaos: Chaos) -> bool:
    """Waits until every lease has ended, every used sandbox is deleted and every event is published. False where
    that does not happen: the evidence shows what is left."""

    async def at_rest() -> bool:
        return bool(await chaos.stack.database.fetchval(AT_WORK) == 0)

    try:
        await eventually(at_rest, within_sec=REST_SEC)
    except AssertionError:
        return False
    return True


async def collect(
    chaos: Chaos, history: History, epochs: Sequence[Epoch], recoveries: Sequence[Recovery]
) -> Evidence:
    return await evidence(chaos.stack, chaos.rabbitmq.url, history, epochs, recoveries)


async def evidence(
    stack: Stack, amqp_url: str, history: History, epochs: Sequence[Epoch], recoveries: Sequence[Recovery]
) -> Evidence:
    database = stack.database
    leases = await database.fetch("SELECT * FROM leases")
    sandboxes = await database.fetch("SELECT sandbox_id, external_id, status FROM sandboxes")
    unpublished = await database.fetch("SELECT event_id FROM outbox ORDER BY outbox_id")
    calls = await stack.control("GET", "calls?method=DELETE")
    accounts = await stack.control("GET", "accounts")
    return Evidence(
        operations=history.operations,
        leases=[
            Lease(
                lease_id=row["lease_id"],
                sandbox_id=row["sandbox_id"],
                holder=row["holder"],
                idempotency_key=row["idempotency_key"],
                allocated_at=row["allocated_at"].timestamp(),
                expires_at=row["expires_at"].timestamp(),
                ended_at=None if row["ended_at"] is None else row["ended_at"].timestamp(),
                end_reason=row["end_reason"],
            )
            for row in leases
        ],
        sandboxes=[Sandbox(**row) for row in sandboxes],
        unpublished=[str(row["event_id"]) for row in unpublished],
        events=await _events(amqp_url),
        deletions=[
            Deletion(external_id=call["path"].rpartition("/")[2], began_at=call["at"], status=call.get("status"))
            for call in (*calls["calls"], *calls["running"])
        ],
        accounts=frozenset(record["id"].rpartition("/")[2] for record in accounts["accounts"]),
        epochs=epochs,
        recoveries=recoveries,
        stats=await stack.stats(),
        grace_sec=GRACE_SEC,
        looked_at=time.time(),
    )


async def _events(amqp_url: str) -> list[Event]:
    """All that the queue has taken."""
    events: list[Event] = []
    async with opened(amqp_url) as connection, connection.channel() as channel:
        await channel.set_qos(prefetch_count=500)
        queue = await channel.get_queue(EVENTS_QUEUE)
        left = queue.declaration_result.message_count or 0
        async with queue.iterator(no_ack=False) as messages:
            while len(events) < left:
                async with asyncio.timeout(60):
                    message = await anext(messages)
                events.append(_event(json.loads(message.body)))
                await message.ack()
    return events


def _event(body: dict[str, Any]) -> Event:
    return Event(
        event_id=body["id"],
        type=body["type"],
        sandbox_id=body.get("subject"),
        occurred_at=datetime.fromisoformat(body["time"]).timestamp(),
        data=body["data"],
    )
