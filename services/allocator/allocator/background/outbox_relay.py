"""Outbox relay: publishes the events of the outbox to RabbitMQ, at least once and in order for each sandbox.

Each change of a sandbox and its event row are one statement. When RabbitMQ has confirmed the event, the relay
moves the row to the history of the sandbox. Concurrent changes of one sandbox wait for its row lock, so the row
numbers follow the order of the changes. An advisory lock admits one relay at a time, so no relay overtakes another.
PostgreSQL closes the connection of a relay frozen with the lock.

Only one relay runs at a time, so the relay also adds the changes logged by the triggers on `sandboxes` to the
pool counters.
"""

import asyncio
import math
from collections.abc import Sequence

import asyncpg
import structlog

from allocator import metrics
from allocator.newest_lease import DatabaseBehind, NewestLease
from allocator.write_session import UNAVAILABLE
from sandbox_broker.contract import topology
from sandbox_broker.contract.events import EVENT_CONTENT_TYPE, encode_event
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import OutboundMessage, Publisher
from sandbox_broker.runtime.service import run_uninterrupted

BATCH_SIZE = 100
"""Events per batch. Encoding a batch blocks the event loop, and with it the requests of students."""
POLL_SEC = 1.0
GATHER_SEC = 0.01
"""Delay between a wake-up and the next read of the outbox. Under load one read then serves many changes, and the
replies to the students go out first."""
COUNTER_PERIOD_SEC = 1.0
STATEMENT_TIMEOUT_SEC = 10

SELECT_EVENTS = """
SELECT outbox_id, event_id::text, type, subject, occurred_at, data::text AS data,
    extract(epoch FROM now() - occurred_at)::float AS age
FROM outbox ORDER BY outbox_id LIMIT $1
"""
MOVE_TO_HISTORY = """
WITH published AS (
    DELETE FROM outbox WHERE outbox_id = ANY($1::bigint[])
    RETURNING subject, outbox_id, type, occurred_at, data, event_id
)
INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data, event_id)
SELECT subject, outbox_id, type, occurred_at, data, event_id FROM published WHERE subject IS NOT NULL
"""
# One statement deletes the logged changes and adds them, so each change counts once.
UPDATE_COUNTERS = """
WITH taken AS (
    DELETE FROM pool_changes RETURNING status, stem, track_name, number
)
INSERT INTO pool_counts AS counted (kind, value, status, number)
SELECT kind, value, status, sum(number)
FROM taken CROSS JOIN LATERAL (
    VALUES ('pool', ''), ('name_prefix', stem), ('track_name', track_name)
) kinds (kind, value)
WHERE value IS NOT NULL
GROUP BY kind, value, status HAVING sum(number) <> 0
ON CONFLICT (kind, value, status) DO UPDATE SET number = counted.number + excluded.number
"""
DELETE_ZERO_COUNTERS = "DELETE FROM pool_counts WHERE number = 0"
SESSION_SETTINGS = "SET idle_session_timeout = '20s'"
"""Longer than the timeout of publisher confirms. A working relay queries once per second."""
TRY_LOCK = "SELECT pg_try_advisory_lock(5914033)"

log = structlog.get_logger()


class OutboxRelay:
    """Publisher of outbox events. It reads the outbox after each `wake` and at least once per second, so a lost
    wake-up delays an event by at most one second."""

    def __init__(self, primary: Primary, publisher: Publisher, newest_lease: NewestLease | None = None) -> None:
        self._primary = primary
        self._newest_lease = newest_lease
        self._publisher = publisher
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                connection = await connections.connect(
                    self._primary,
                    application_name="allocator-outbox",
                    statement_timeout_sec=STATEMENT_TIMEOUT_SEC,
                )
                try:
                    await connection.execute(SESSION_SETTINGS)
                    if self._newest_lease is not None:
                        await self._newest_lease.check(connection)
                    await self._relay(connection)
                finally:
                    connection.terminate()
            except UNAVAILABLE as error:
                log.warning("outbox.database_lost", error=connections.describe_error(error))
                await asyncio.sleep(POLL_SEC)
            except DatabaseBehind:
                await asyncio.sleep(POLL_SEC)

    async def _relay(self, connection: asyncpg.Connection) -> None:
        while not await connection.fetchval(TRY_LOCK):  # noqa: ASYNC110 (PostgreSQL sends no notification)
            await asyncio.sleep(POLL_SEC)
        counted_at = -math.inf
        while True:
            now = asyncio.get_running_loop().time()
            if now - counted_at >= COUNTER_PERIOD_SEC:
                await run_uninterrupted(_update_counters(connection))
                counted_at = now
            self._wake.clear()
            if await run_uninterrupted(self._publish_batch(connection)) < BATCH_SIZE:
                try:
                    async with asyncio.timeout(POLL_SEC):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(GATHER_SEC)

    async def _publish_batch(self, connection: asyncpg.Connection) -> int:
        """Publish one batch, move the confirmed rows to the history, and return their number.

        The first unconfirmed event and all events behind it stay. This keeps the order on a retry.
        """
        rows = await connection.fetch(SELECT_EVENTS, BATCH_SIZE)
        metrics.OUTBOX_LAG.set(rows[0]["age"] if rows else 0)
        if not rows:
            return 0
        try:
            confirmed = await self._publisher.publish_all(topology.EVENTS.name, _messages(rows))
        except Disconnected:
            confirmed = 0
        if confirmed < len(rows):
            log.warning("outbox.not_confirmed", events=len(rows) - confirmed)
        if confirmed:
            await connection.execute(MOVE_TO_HISTORY, [row["outbox_id"] for row in rows[:confirmed]])
        return confirmed


async def _update_counters(connection: asyncpg.Connection) -> None:
    await connection.execute(UPDATE_COUNTERS)
    await connection.execute(DELETE_ZERO_COUNTERS)


def _messages(rows: Sequence[asyncpg.Record]) -> list[OutboundMessage]:
    """Return the events as messages. The last new lease also goes to the queue of the newest lease. Sending all
    leases there would double the work of RabbitMQ."""
    leases = (index for index in reversed(range(len(rows))) if rows[index]["type"] == "sandbox.allocated")
    newest = next(leases, None)
    return [
        OutboundMessage(
            row["type"],
            encode_event(
                row["event_id"],
                row["type"],
                row["subject"],
                row["occurred_at"],
                row["data"],
                sequence=row["outbox_id"],
            ),
            row["event_id"],
            EVENT_CONTENT_TYPE,
            hidden_routing_key=topology.NEWEST_LEASE.name if index == newest else None,
        )
        for index, row in enumerate(rows)
    ]
