"""Watch of the waiting line: measures it, and has it served while students wait.

Every allocator sends ServeWaiting to the lane for students, on standby too, because an allocator learns with its
first command that it is the active one. The command serves the table, so repeated commands do no harm.
"""

import structlog
from pamqp.commands import Basic
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import metrics
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import ServeWaiting
from sandbox_broker.database import connections
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.runtime import service

PERIOD_SEC = 0.5
"""A sandbox that becomes available is leased to the line within 2 s."""
EXPIRATION_MS = 1500
"""Later commands have taken its place by then."""

MEASURE = """
SELECT count(*) AS waiting, coalesce(extract(epoch FROM now() - min(waiting_since)), 0)::float AS oldest_sec
FROM waiting
"""

log = structlog.get_logger()


class WaitingLineWatch:
    def __init__(self, publisher: Publisher, engine: AsyncEngine) -> None:
        self._publisher = publisher
        self._engine = engine

    async def run(self) -> None:
        await service.run_periodically(PERIOD_SEC, self._measure_and_serve)

    async def _measure_and_serve(self) -> None:
        try:
            async with self._engine.connect() as connection:
                line = (await connection.execute(text(MEASURE))).one()
        except connections.CONNECTION_ERRORS as error:
            log.warning("waiting.not_measured", error=connections.describe_error(error))
            return
        metrics.WAITING.set(line.waiting)
        metrics.WAITING_OLDEST.set(line.oldest_sec)
        if not line.waiting:
            return
        properties = Basic.Properties(
            content_type="application/json", delivery_mode=2, expiration=str(EXPIRATION_MS)
        )
        try:
            await self._publisher.publish(
                topology.COMMANDS.name,
                topology.ALLOCATOR_COMMANDS.name,
                encode_commands([ServeWaiting()]),
                properties,
            )
        except (Disconnected, Unroutable) as error:
            log.info("waiting.command_not_sent", error=str(error))
