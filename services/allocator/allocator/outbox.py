"""Brings the events from the outbox to RabbitMQ: at least once, and in order for each sandbox.

A row is written in the same statement as the change it tells of, and moved to the history of its sandbox when
RabbitMQ has confirmed the event. The rows of one sandbox are numbered in the order of its changes, because each
change waits for the row lock of the one before; the advisory lock lets one relay work at a time, so that nobody
overtakes. A relay that freezes with the lock in its hands loses its connection.

Being the only one of its kind, the relay also adds up what the triggers on sandboxes have logged for the counters.
"""

import asyncio
import math

import asyncpg
import structlog

from allocator import metrics, store
from sandbox_broker.contract import topology
from sandbox_broker.contract.events import EVENT_CONTENT_TYPE, encode_event
from sandbox_broker.database import connections
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Outgoing, Publisher
from sandbox_broker.runtime.service import uninterrupted

PIECE = 100
"""Events that are encoded at a stretch, while students wait."""
POLL_SEC = 1.0
GATHER_SEC = 0.01
"""From a wake to the look at the outbox: under load one look serves many changes, and none of them competes with
the answer to the student who has made it."""
COUNT_PERIOD_SEC = 1.0
STATEMENT_TIMEOUT_SEC = 10

TAKE = """
SELECT outbox_id, event_id::text, type, subject, occurred_at, data::text AS data,
    extract(epoch FROM now() - occurred_at)::float AS age
FROM outbox ORDER BY outbox_id LIMIT $1
"""
MOVE = """
WITH published AS (
    DELETE FROM outbox WHERE outbox_id = ANY($1::bigint[]) RETURNING subject, outbox_id, type, occurred_at, data
)
INSERT INTO history (sandbox_id, outbox_id, type, occurred_at, data)
SELECT subject, outbox_id, type, occurred_at, data FROM published WHERE subject IS NOT NULL
"""
# Each logged change is added once, since it is deleted with that.
COUNT = """
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
DROP_ZEROS = "DELETE FROM pool_counts WHERE number = 0"
SETTINGS = "SET idle_session_timeout = '20s'"
"""Well above the time that RabbitMQ has for its confirms; a relay that lives asks once a second."""
ONE_RELAY_AT_A_TIME = "SELECT pg_try_advisory_lock(5914033)"

log = structlog.get_logger()


class Relay:
    """Publishes what is in the outbox. `wake` says that there is something new; it looks once a second anyway,
    so a wake that is lost costs a second."""

    def __init__(self, database_url: str, publisher: Publisher) -> None:
        self._database_url = database_url
        self._publisher = publisher
        self._wake = asyncio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                connection = await connections.connect(
                    self._database_url,
                    application_name="allocator-outbox",
                    statement_timeout_sec=STATEMENT_TIMEOUT_SEC,
                )
                try:
                    await connection.execute(SETTINGS)
                    await self._relay(connection)
                finally:
                    connection.terminate()
            except store.UNAVAILABLE as error:
                log.warning("outbox.database_lost", error=connections.reason(error))
                await asyncio.sleep(POLL_SEC)

    async def _relay(self, connection: asyncpg.Connection) -> None:
        while not await connection.fetchval(ONE_RELAY_AT_A_TIME):  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(POLL_SEC)
        counted_at = -math.inf
        while True:
            now = asyncio.get_running_loop().time()
            if now - counted_at >= COUNT_PERIOD_SEC:
                await uninterrupted(_count(connection))
                counted_at = now
            self._wake.clear()
            if await uninterrupted(self._publish_piece(connection)) < PIECE:
                try:
                    async with asyncio.timeout(POLL_SEC):
                        await self._wake.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(GATHER_SEC)

    async def _publish_piece(self, connection: asyncpg.Connection) -> int:
        """Returns how many rows it has published and moved. What comes after one that was not confirmed is
        published again, behind it."""
        rows = await connection.fetch(TAKE, PIECE)
        metrics.OUTBOX_LAG.set(rows[0]["age"] if rows else 0)
        if not rows:
            return 0
        try:
            confirmed = await self._publisher.publish_all(topology.EVENTS.name, [_message(row) for row in rows])
        except Disconnected:
            confirmed = 0
        if confirmed < len(rows):
            log.warning("outbox.not_confirmed", events=len(rows) - confirmed)
        if confirmed:
            await connection.execute(MOVE, [row["outbox_id"] for row in rows[:confirmed]])
        return confirmed


async def _count(connection: asyncpg.Connection) -> None:
    await connection.execute(COUNT)
    await connection.execute(DROP_ZEROS)


def _message(row: asyncpg.Record) -> Outgoing:
    body = encode_event(row["event_id"], row["type"], row["subject"], row["occurred_at"], row["data"])
    return Outgoing(row["type"], body, row["event_id"], EVENT_CONTENT_TYPE)
