"""A command that cannot be carried out is put among the dead letters with the reason, so that it blocks nothing.

What is no envelope at all is rejected instead: RabbitMQ moves it there itself, and that cannot be lost.
"""

import asyncio
import uuid
from datetime import UTC, datetime

import structlog
from pamqp.commands import Basic
from pamqp.common import FieldTable

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.observability.metrics import DEAD_LETTERED

PATIENCE_SEC = 3.0
PAUSE_SEC = 0.1
MAX_REASON = 500
"""Characters; headers have to fit one frame."""

MAX_LOGGED = 2000
"""Characters of a command that could not be kept."""

log = structlog.get_logger()


async def keep(publisher: Publisher, queue: str, command: str, reason: str) -> None:
    """Keeps one command, as JSON, of an envelope that came to `queue`; in an envelope of its own, so that it can be
    put back as it is. If RabbitMQ does not take it in time, the log has it."""
    headers: FieldTable = {
        "x-first-death-reason": "rejected",
        "x-first-death-queue": queue,
        "x-reason": reason[:MAX_REASON],
    }
    properties = Basic.Properties(
        content_type="application/json",
        delivery_mode=2,
        message_id=uuid.uuid4().hex,
        timestamp=datetime.now(UTC),
        headers=headers,
    )
    body = f'{{"commands":[{command}]}}'.encode()
    try:
        async with asyncio.timeout(PATIENCE_SEC):
            while True:
                try:
                    await publisher.publish(topology.DEAD_LETTERS.name, queue, body, properties)
                    return DEAD_LETTERED.labels(queue).inc()
                except Disconnected as error:
                    log.info("dead_letter.delayed", error=str(error))
                    await asyncio.sleep(PAUSE_SEC)
    except (TimeoutError, Unroutable) as error:
        log.error("dead_letter.lost", queue=queue, reason=reason, error=str(error), body=body.decode()[:MAX_LOGGED])
