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
from allocator.write_session import GENERIC_PLANS, UNAVAILABLE
from sandbox_broker.contract import topology
from sandbox_broker.contract.events import EVENT_CONTENT_TYPE, SYNC_EVENT_TYPES, encode_event
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import OutboundMessage, Publisher
from sandbox_broker.runtime.service import run_uninterrupted

BATCH_SIZE = 100
"""Events per batch. Encoding a batch blocks the event loop, and with it the requests of students."""
SYNC_BATCH_SIZE = 50
"""Events of syncs in a batch that begins with other events."""
BUSY_SEC = 1.0
"""Time after an event of a student in which the relay rests after events of syncs."""
REST_FACTOR = 2
"""Length of a rest, as a multiple of the duration of the batch before it."""
MAX_REST_SEC = 0.1
POLL_SEC = 1.0
GATHER_SEC = 0.01
"""Delay between a wake-up and the next read of the outbox. Under load one read then serves many changes, and the
replies to the students go out first."""
COUNTER_PERIOD_SEC = 1.0
STATEMENT_TIMEOUT_SEC = 10

_COLUMNS = """
outbox_id, event_id::text, type, subject, occurred_at, data::text AS data,
    extract(epoch FROM now() - occurred_at)::float AS age
"""
SELECT_EVENTS = f"SELECT {_COLUMNS} FROM outbox ORDER BY outbox_id LIMIT $1"  # noqa: S608 (a constant)
# The conditions on the type are those of the indexes outbox_without_syncs and outbox_of_syncs.
_SYNC_TYPES = f"'{{{','.join(SYNC_EVENT_TYPES)}}}'::text[]"
# first: the first events that no sync has written. "0 +" hides the primary key, which the planner could take while
# the outbox is empty. It would then read all events of a sync for each of the first events. UNION in place of UNION
# ALL would have the same effect on PostgreSQL 18, which reads the primary key for the order of the ids.
SELECT_EVENTS_AHEAD = f"""
WITH first AS MATERIALIZED (
    SELECT outbox_id, subject FROM outbox WHERE type <> ALL ({_SYNC_TYPES}) ORDER BY outbox_id LIMIT $1
),
earlier AS (
    SELECT of_sync.outbox_id FROM first CROSS JOIN LATERAL (
        SELECT outbox_id FROM outbox
        WHERE type = ANY ({_SYNC_TYPES}) AND subject = first.subject AND 0 + outbox_id < first.outbox_id
    ) of_sync
)
SELECT {_COLUMNS} FROM outbox
WHERE outbox_id = ANY (ARRAY(SELECT outbox_id FROM first UNION ALL SELECT outbox_id FROM earlier))
ORDER BY outbox_id
"""  # noqa: S608 (all parts are constants)
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
SESSION_SETTINGS = f"SET idle_session_timeout = '20s'; {GENERIC_PLANS}"
"""The timeout is longer than that of publisher confirms. A working relay queries once per second. A plan made for
an empty outbox would scan and sort it, which takes 0.5 s for each batch of 100,000 events."""
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
        self._student_event_at = -math.inf
        self._rests_until = -math.inf
        """Until then, no events of syncs."""

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
            pause_sec = await run_uninterrupted(self._publish_batch(connection))
            if pause_sec > 0:
                try:
                    async with asyncio.timeout(pause_sec):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(GATHER_SEC)

    async def _publish_batch(self, connection: asyncpg.Connection) -> float:
        """Publish one batch and move the confirmed rows to the history. Return the time in seconds until the next
        batch, unless the relay is woken.

        The first unconfirmed event and all events behind it stay. This keeps the order on a retry.
        """
        now = asyncio.get_running_loop().time
        began = now()
        oldest = await connection.fetch(SELECT_EVENTS, BATCH_SIZE)
        metrics.OUTBOX_LAG.set(oldest[0]["age"] if oldest else 0)
        if not oldest:
            return POLL_SEC
        if not any(row["type"] in SYNC_EVENT_TYPES for row in oldest):
            return 0 if await self._publish(connection, oldest) >= BATCH_SIZE else POLL_SEC
        ahead = await connection.fetch(SELECT_EVENTS_AHEAD, BATCH_SIZE)
        if ahead:
            self._student_event_at = began
        first = {row["outbox_id"] for row in ahead}
        of_syncs = [row for row in oldest if row["outbox_id"] not in first]
        if began < self._rests_until:
            of_syncs = []
        elif ahead:
            of_syncs = of_syncs[:SYNC_BATCH_SIZE]
        batch = [*ahead, *of_syncs]
        # A client that continues after this number misses no event of the syncs.
        published_until = oldest[0]["outbox_id"] - 1
        if batch and await self._publish(connection, batch, len(ahead), published_until) < len(batch):
            return POLL_SEC
        if of_syncs and now() - self._student_event_at < BUSY_SEC:
            self._rests_until = now() + min(REST_FACTOR * (now() - began), MAX_REST_SEC)
        return 0 if len(ahead) >= BATCH_SIZE else max(0, self._rests_until - now())

    async def _publish(
        self,
        connection: asyncpg.Connection,
        rows: Sequence[asyncpg.Record],
        ahead: int = 0,
        published_until: int = 0,
    ) -> int:
        """Publish the events, move the confirmed ones to the history, and return their number.

        The first `ahead` events overtake others; all events up to `published_until` have been published."""
        messages = _messages(rows, ahead, published_until)
        try:
            confirmed = await self._publisher.publish_all(topology.EVENTS.name, messages)
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


def _messages(rows: Sequence[asyncpg.Record], ahead: int, published_until: int) -> list[OutboundMessage]:
    """Return the events as messages, the first `ahead` with `published_until`. The last new lease also goes to the
    queue of the newest lease. Sending all leases there would double the work of RabbitMQ."""
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
                resume_after=published_until if index < ahead else None,
            ),
            row["event_id"],
            EVENT_CONTENT_TYPE,
            hidden_routing_key=topology.NEWEST_LEASE.name if index == newest else None,
        )
        for index, row in enumerate(rows)
    ]
