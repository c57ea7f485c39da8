"""Check for a database that went back in time, for example after the restore of an older backup.

RabbitMQ keeps the newest event of a new lease (topology.NEWEST_LEASE). Leases are never removed, so a database
without this lease has lost it, and the allocator would lease sandboxes in use to other students. The check runs on
every new connection, before its first write and before the relay publishes an older event.
"""

import asyncio
import json

import asyncpg
import structlog
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, QueueEmpty
from aiormq.exceptions import ChannelAccessRefused

from allocator import metrics
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_connection

ANSWER_TIMEOUT_SEC = 3.0
READS = 10
READ_PAUSE_SEC = 0.05
"""Another allocator holds the message for a moment while it reads it."""

IS_USED = "SELECT EXISTS (SELECT FROM leases)"
HAS_LEASE = "SELECT EXISTS (SELECT FROM leases WHERE sandbox_id = $1)"
# For the status report.
RECORD_BEHIND = """
UPDATE allocator_epoch SET database_behind_at = CASE WHEN $2 THEN now() END
WHERE queue = $1 AND ($2 OR database_behind_at IS NOT NULL)
"""

log = structlog.get_logger()


class DatabaseBehind(Exception):
    """The database lacks the newest lease. An operator must confirm the restore."""


class NewestLease:
    def __init__(self, amqp_url: str) -> None:
        self._amqp_url = amqp_url

    async def check(self, database: asyncpg.Connection) -> None:
        """Raises DatabaseBehind if the database lacks the newest lease, and ConnectionError if RabbitMQ does not
        answer.

        A database without leases is a new installation. It is accepted without a question to RabbitMQ."""
        sandbox_id = await self._read(remove=False) if await database.fetchval(IS_USED) else None
        is_behind = sandbox_id is not None and not await database.fetchval(HAS_LEASE, sandbox_id)
        metrics.DATABASE_BEHIND.set(is_behind)
        await database.execute(RECORD_BEHIND, topology.ALLOCATOR_COMMANDS.name, is_behind)
        if is_behind:
            log.critical(
                "database.behind",
                sandbox_id=sandbox_id,
                action="The database is an older backup without the newest lease. Import the lost leases as in "
                "the runbook, or run brokerctl restore confirm.",
            )
            raise DatabaseBehind

    async def forget(self) -> bool:
        """Accept the database as it is; return whether a newest lease was known. Raises ConnectionError if RabbitMQ
        does not answer."""
        return await self._read(remove=True) is not None

    async def _read(self, *, remove: bool) -> str | None:
        """Return the sandbox of the newest lease, None if it is missing or this user may not read it."""
        try:
            async with (
                asyncio.timeout(ANSWER_TIMEOUT_SEC),
                open_connection(self._amqp_url) as connection,
                connection.channel() as channel,
            ):
                queue = await channel.get_queue(topology.NEWEST_LEASE.name, ensure=False)
                for _ in range(READS):
                    try:
                        message = await queue.get(no_ack=remove)
                    except QueueEmpty:
                        await asyncio.sleep(READ_PAUSE_SEC)
                        continue
                    if not remove:
                        await message.reject(requeue=True)
                    return str(json.loads(message.body)["subject"])
                return None
        except (ChannelAccessRefused, ChannelNotFoundEntity) as error:
            log.warning("newest_lease.not_readable", error=str(error))
            return None
        except (AMQPError, TimeoutError) as error:
            raise ConnectionError(f"RabbitMQ did not answer for {topology.NEWEST_LEASE.name}: {error}") from error
