"""Collection of the evidence of a round: observers during the round, and queries at its end."""

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import asyncpg

from devstack.conditions import wait_until
from sandbox_broker.messaging.connection import open_connection
from tests.chaos.client import History
from tests.chaos.evidence import (
    Creation,
    Deletion,
    EpochObservation,
    Event,
    Evidence,
    Lease,
    Recovery,
    Sandbox,
    Stall,
    Token,
)
from tests.chaos.stack import EVENTS_QUEUE, GRACE_SEC, HOLD_SEC, ChaosBroker
from tests.integration.stack import Stack

IDLE_TIMEOUT_SEC = 600.0
POLL_INTERVAL_SEC = 0.5
CONNECT_SEC = 3.0
TICK_SEC = 0.05
STALL_SEC = 0.02
"""Shorter delays are normal scheduling jitter."""

COUNT_PENDING_WORK = """
SELECT count(*) FROM (
    SELECT FROM sandboxes WHERE status = 'pending_deletion'
    UNION ALL SELECT FROM leases WHERE ended_at IS NULL
    UNION ALL SELECT FROM outbox
    UNION ALL SELECT FROM creations WHERE in_flight
    UNION ALL SELECT FROM waiting
) pending
"""
# Without an import, the last entry of the history ended the flight.
SELECT_CREATIONS = """
SELECT name, state, external_id, extract(epoch FROM granted_at)::float AS granted_at,
    CASE WHEN NOT in_flight
        THEN coalesce(extract(epoch FROM imported_at), (history -> -1 ->> 'at')::numeric)::float
    END AS flight_ended_at
FROM creations
"""


async def record_epochs(broker: ChaosBroker, epochs: list[EpochObservation]) -> None:
    """Record the fencing epochs of the primary without end. Reconnect when the database was unavailable."""
    while True:
        primary = broker.postgres
        try:
            connection = await asyncpg.connect(primary.url, timeout=CONNECT_SEC, command_timeout=CONNECT_SEC)
            try:
                while broker.postgres is primary:
                    seen_at = time.time()
                    for row in await connection.fetch("SELECT queue, epoch, backend_pid FROM allocator_epoch"):
                        epochs.append(EpochObservation(seen_at=seen_at, **row))
                    await asyncio.sleep(POLL_INTERVAL_SEC)
            finally:
                connection.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await asyncio.sleep(POLL_INTERVAL_SEC)


async def record_stalls(stalls: list[Stall]) -> None:
    """Sleep for short ticks without end, and record a stall whenever a tick is late."""
    while True:
        due = time.time() + TICK_SEC
        await asyncio.sleep(TICK_SEC)
        if (now := time.time()) > due + STALL_SEC:
            stalls.append(Stall(since=due, until=now))


async def list_active_leases(broker: ChaosBroker) -> list[tuple[str, str]]:
    """Return student and sandbox id of each active lease."""
    rows = await broker.stack.database.fetch("SELECT holder, sandbox_id FROM leases WHERE ended_at IS NULL")
    return [(row["holder"], row["sandbox_id"]) for row in rows]


async def wait_until_idle(broker: ChaosBroker) -> bool:
    """Wait until all leases have ended, all used sandboxes are deleted, all events are published, no creation is in
    flight, and no student is in the waiting line.

    Return False after a time-out; the evidence then shows the remaining work.
    """

    async def is_idle() -> bool:
        return bool(await broker.stack.database.fetchval(COUNT_PENDING_WORK) == 0)

    try:
        await wait_until(is_idle, within_sec=IDLE_TIMEOUT_SEC)
    except AssertionError:
        return False
    return True


async def collect_evidence(
    broker: ChaosBroker, history: History, epochs: Sequence[EpochObservation], recoveries: Sequence[Recovery]
) -> Evidence:
    return await collect_stack_evidence(broker.stack, broker.rabbitmq.url, history, epochs, recoveries)


async def collect_stack_evidence(
    stack: Stack,
    amqp_url: str,
    history: History,
    epochs: Sequence[EpochObservation],
    recoveries: Sequence[Recovery],
) -> Evidence:
    database = stack.database
    leases = await database.fetch("SELECT * FROM leases")
    sandboxes = await database.fetch("SELECT sandbox_id, external_id, status FROM sandboxes")
    stats = await stack.stats()
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
                mode=row["mode"],
                policy=row["policy"],
                track_name=row["track_name"],
                name_prefix=row["name_prefix"],
                token=row["token"],
                secret_hash=None if row["secret_hash"] is None else row["secret_hash"].hex(),
            )
            for row in leases
        ],
        sandboxes=[Sandbox(**row) for row in sandboxes],
        unpublished=[str(row["event_id"]) for row in unpublished],
        events=await _read_events(amqp_url),
        deletions=[
            Deletion(external_id=call["path"].rpartition("/")[2], began_at=call["at"], status=call.get("status"))
            for call in (*calls["calls"], *calls["running"])
        ],
        accounts={record["id"].rpartition("/")[2]: record["name"] for record in accounts["accounts"]},
        epochs=epochs,
        recoveries=recoveries,
        stats=stats,
        grace_sec=GRACE_SEC,
        hold_sec=HOLD_SEC,
        collected_at=time.time(),
        tokens=[
            Token(**row) for row in await database.fetch("SELECT name, tracks, prefixes, max_active FROM tokens")
        ],
        creations=await read_creations(database),
    )


async def read_creations(database: asyncpg.Pool) -> list[Creation]:
    return [Creation(**row) for row in await database.fetch(SELECT_CREATIONS)]


async def _read_events(amqp_url: str) -> list[Event]:
    """Read all messages of the events queue."""
    events: list[Event] = []
    async with open_connection(amqp_url) as connection, connection.channel() as channel:
        await channel.set_qos(prefetch_count=500)
        queue = await channel.get_queue(EVENTS_QUEUE)
        left = queue.declaration_result.message_count or 0
        async with queue.iterator(no_ack=False) as messages:
            while len(events) < left:
                async with asyncio.timeout(60):
                    message = await anext(messages)
                events.append(_parse_event(json.loads(message.body)))
                await message.ack()
    return events


def _parse_event(body: dict[str, Any]) -> Event:
    return Event(
        event_id=body["id"],
        type=body["type"],
        sandbox_id=body.get("subject"),
        occurred_at=datetime.fromisoformat(body["time"]).timestamp(),
        data=body["data"],
    )
