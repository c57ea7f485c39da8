"""Dead-letter collector: moves messages from the dead-letter queue into a table.

Reading a queue takes messages out, so a queue cannot serve an administrator who lists dead letters and replays or
drops them one by one. Any number of allocators collect concurrently: a dead letter has the same id in every
delivery and is stored once.
"""

import asyncio
import hashlib
import math
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import asyncpg
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import domain
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope, decode_commands
from sandbox_broker.database import connections, schema
from sandbox_broker.messaging.connection import run_with_reconnect
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.runtime.service import run_uninterrupted

PREFETCH = 20
MAX_STORED = 100_000
"""Above this limit the oldest are deleted, because a fault of every command must not fill the disk."""
TRIM_PERIOD_SEC = 60.0
PAUSE_SEC = 1.0
MAX_TEXT = 1000
MAX_TYPES = 10

DELETE_OLDEST = """
DELETE FROM dead_letters WHERE dead_letter_id IN (
    SELECT dead_letter_id FROM dead_letters ORDER BY died_at DESC, dead_letter_id DESC OFFSET :stored
)
"""

INSERT_PROBE = """
INSERT INTO dead_letters (dead_letter_id, died_at, queue, reason, commands, body)
VALUES (gen_random_uuid(), now(), 'probe', 'probe', '{}', '')
"""

REFUSALS = (*connections.CONNECTION_ERRORS, asyncpg.PostgresError)
"""Errors after which the collector waits and tries again: a dead letter must survive each of them."""

log = structlog.get_logger()


class DeadLetterCollector:
    """Consumer of the dead-letter queue."""

    def __init__(self, amqp_url: str, engine: AsyncEngine) -> None:
        self._amqp_url = amqp_url
        self._engine = engine
        self._trimmed_at = -math.inf

    async def run(self) -> None:
        await run_with_reconnect(self._amqp_url, "allocator-dead-letters", self._consume)

    async def _consume(self, connection: AbstractConnection) -> None:
        # RabbitMQ 4 drops a dead letter that was returned 20 times, because its queue has no dead-letter exchange.
        # So subscribe only while the database accepts writes, and never return a delivery that it refuses.
        await _retry_until_done(self._check_writable)
        subscription = await Subscription.open(connection, topology.DEAD_LETTER_QUEUE, prefetch=PREFETCH)
        while deliveries := await subscription.batch(PREFETCH):
            await _retry_until_done(partial(self._store, deliveries))
            await subscription.ack(deliveries[-1], all_before=True)

    async def _check_writable(self) -> bool:
        """Insert a row and roll back, because a full disk refuses only real writes."""
        try:
            async with self._engine.connect() as connection:
                await connection.execute(text(INSERT_PROBE))
                await connection.rollback()
        except REFUSALS as error:
            log.warning("dead_letters.postponed", error=connections.describe_error(error))
            return False
        return True

    async def _store(self, deliveries: Sequence[DeliveredMessage]) -> bool:
        """Insert the dead letters; return whether the transaction committed."""
        letters = [build_row(delivery) for delivery in deliveries]
        now = asyncio.get_running_loop().time()
        try:
            async with self._engine.begin() as connection:
                await connection.execute(insert(schema.dead_letters).on_conflict_do_nothing(), letters)
                if now - self._trimmed_at >= TRIM_PERIOD_SEC:
                    deleted = (await connection.execute(text(DELETE_OLDEST), {"stored": MAX_STORED})).rowcount
                    self._trimmed_at = now
                    if deleted:
                        log.warning("dead_letters.forgotten", count=deleted)
        except REFUSALS as error:
            log.warning("dead_letters.postponed", error=connections.describe_error(error))
            return False
        for letter in letters:
            fields = {name: letter[name] for name in ("queue", "reason", "commands")}
            log.error("dead_letter.kept", dead_letter_id=str(letter["dead_letter_id"]), **fields)
        return True


async def _retry_until_done(attempt: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    while True:
        if await run_uninterrupted(attempt()):
            return
        await asyncio.sleep(PAUSE_SEC)


def build_row(delivery: DeliveredMessage) -> dict[str, Any]:
    """Return the table row of a message from the dead-letter queue. The message may contain anything."""
    properties = delivery.header.properties
    headers = properties.headers or {}
    queue = _to_text(headers.get("x-first-death-queue") or delivery.routing_key)
    died_at = _died_at(headers) or properties.timestamp or datetime.now(UTC)
    body = bytes(delivery.body)
    identity = (
        queue,
        died_at.isoformat(),
        properties.message_id,
        properties.correlation_id,
        hashlib.sha256(body).digest(),
    )
    return {
        "dead_letter_id": uuid.UUID(bytes=hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()),
        "died_at": died_at,
        "queue": queue,
        "reason": _reason(headers, queue, body),
        "commands": _command_types(body),
        "message_id": properties.message_id and _to_text(properties.message_id),
        "correlation_id": properties.correlation_id and _to_text(properties.correlation_id),
        "content_type": properties.content_type and _to_text(properties.content_type),
        "body": body,
    }


def _died_at(headers: Mapping[str, Any]) -> datetime | None:
    """Return the time of the newest death from the header of RabbitMQ. The newest comes first."""
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    at = newest.get("time") if isinstance(newest, dict) else None
    return at if isinstance(at, datetime) else None


def _reason(headers: Mapping[str, Any], queue: str, body: bytes) -> str:
    if reason := headers.get("x-reason"):
        return _to_text(reason)
    if headers.get("x-first-death-reason") == "delivery_limit":
        return "The delivery limit was reached: at each delivery the consumer died or lost its connection."
    try:
        entries = decode_commands(body)
    except InvalidEnvelope as error:
        return _to_text(f"The message is not an envelope of commands: {error}")
    problems = (str(entry) for entry in entries if isinstance(entry, InvalidCommand))
    return _to_text(
        next(problems, f"The message was rejected. See the log of the {topology.owner_of(queue)} for the cause.")
    )


def _command_types(body: bytes) -> list[str]:
    commands = domain.raw_commands(body)
    types = dict.fromkeys(_to_text(command["type"]) for command in commands if isinstance(command.get("type"), str))
    return list(types)[:MAX_TYPES]


def _to_text(value: object) -> str:
    """Return the text as PostgreSQL can store it, cut to MAX_TEXT."""
    return str(value)[:MAX_TEXT].replace("\0", "").encode(errors="replace").decode()
