"""Dead letters: publish a command that cannot be carried out, with the reason, so that it does not block its queue.

Messages without a valid envelope are rejected instead: RabbitMQ then dead-letters them itself, and cannot lose
them.
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
"""Maximum length in characters, because headers must fit into one frame."""

MAX_LOGGED = 2000
"""Maximum length, in characters, of a lost command in the log."""

log = structlog.get_logger()


async def publish_dead_letter(publisher: Publisher, queue: str, command: str, reason: str) -> None:
    """Publish one command from `queue`, as JSON, to the dead letters. Retry for PATIENCE_SEC after a disconnect,
    then write the command to the log. The command gets its own envelope, so that it can be replayed unchanged."""
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
