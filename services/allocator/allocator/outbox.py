"""Brings the events from the outbox to RabbitMQ: at least once, and in order for each sandbox.

A row is written in the same statement as the change it tells of, and deleted when RabbitMQ has confirmed the
event. The rows of one sandbox are numbered in the order of its changes, because each change waits for the row
lock of the one before; the advisory lock lets one relay work at a time, so that nobody overtakes. A relay that
freezes with the lock in its hands loses its connection.
"""

import asyncio
import json

import asyncpg
import structlog
from pamqp.commands import Basic

from allocator import metrics, store
from sandbox_broker import db, topology
from sandbox_broker.bus import Disconnected, Publisher
from sandbox_broker.messages import Event
from sandbox_broker.service import uninterrupted

PIECE = 500
POLL_SEC = 1.0

TAKE = """
SELECT outbox_id, event_id, type, subject, occurred_at, data::text AS data,
    extract(epoch FROM now() - occurred_at)::float AS age
FROM outbox ORDER BY outbox_id LIMIT $1
"""
DELETE = "DELETE FROM outbox WHERE outbox_id = ANY($1::bigint[])"
SETTINGS = "SET idle_in_transaction_session_timeout = '20s'"
"""Well above the time that RabbitMQ has for its confirms."""
ONE_RELAY_AT_A_TIME = "SELECT pg_try_advisory_xact_lock(5914033)"

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
                connection = await db.connect(
                    self._database_url, application_name="allocator-outbox", statement_timeout_sec=10
                )
                try:
                    await connection.execute(SETTINGS)
                    await self._relay(connection)
                finally:
                    connection.terminate()
            except (*store.UNAVAILABLE, asyncpg.InvalidTransactionStateError) as error:
                log.warning("outbox.database_lost", error=db.reason(error))
                await asyncio.sleep(POLL_SEC)

    async def _relay(self, connection: asyncpg.Connection) -> None:
        while True:
            self._wake.clear()
            if await uninterrupted(self._publish_piece(connection)) < PIECE:
                try:
                    async with asyncio.timeout(POLL_SEC):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _publish_piece(self, connection: asyncpg.Connection) -> int:
        """Returns how many rows it has published and deleted."""
        async with connection.transaction():
            if not await connection.fetchval(ONE_RELAY_AT_A_TIME):
                return 0
            rows = await connection.fetch(TAKE, PIECE)
            metrics.OUTBOX_LAG.set(rows[0]["age"] if rows else 0)
            sent = rows[: await self._publish(rows)] if self._publisher.connected else []
            if sent:
                await connection.execute(DELETE, [row["outbox_id"] for row in sent])
            return len(sent)

    async def _publish(self, rows: list[asyncpg.Record]) -> int:
        """Writes all of them out in order, then waits for the confirms together. Returns how many of the first
        were confirmed; what comes after a gap is published again, behind it."""
        results = await asyncio.gather(*(self._publish_one(row) for row in rows), return_exceptions=True)
        for confirmed, result in enumerate(results):
            if isinstance(result, Disconnected):
                log.warning("outbox.not_confirmed", error=str(result))
                return confirmed
            if result is not None:
                raise result
        return len(results)

    async def _publish_one(self, row: asyncpg.Record) -> None:
        event = Event.model_validate(
            {
                "id": row["event_id"],
                "type": row["type"],
                "subject": row["subject"],
                "time": row["occurred_at"],
                "data": json.loads(row["data"]),
            }
        )
        await self._publisher.publish(
            topology.EVENTS.name,
            event.type,
            event.model_dump_json(exclude_none=True).encode(),
            Basic.Properties(
                content_type="application/cloudevents+json", delivery_mode=2, message_id=str(event.id)
            ),
            mandatory=False,
        )
