"""Dead letters: carried from their queue into a table, where a person looks through them.

A queue is read by taking messages out, so what is to be listed, and put back or dropped one by one, cannot lie in
one. Any number of allocators carry at once: the same letter has the same id however often it is delivered, and is
kept once.
"""

import asyncio
import hashlib
import math
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import store
from allocator.store import GUARD
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope, decode_commands
from sandbox_broker.database import connections, schema
from sandbox_broker.messaging.connection import keep_connected
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.runtime.service import uninterrupted

PREFETCH = 20
MAX_KEPT = 100_000
"""Of more the oldest are forgotten: a fault that kills every command must not fill the disk."""
FORGET_PERIOD_SEC = 60.0
PAUSE_SEC = 1.0
MAX_TEXT = 1000
MAX_TYPES = 10

FORGET = """
DELETE FROM dead_letters WHERE dead_letter_id IN (
    SELECT dead_letter_id FROM dead_letters ORDER BY died_at DESC, dead_letter_id DESC OFFSET :kept
)
"""
FIND = f"""
WITH {GUARD}
SELECT guard.epoch AS writing, d.* FROM guard LEFT JOIN dead_letters d ON d.dead_letter_id = $2
"""
# A student waits for seconds, so who was served after the hour before it died was served after asking.
SERVED = f"""
WITH {GUARD}
SELECT epoch, ARRAY(
    SELECT holder FROM unnest($2::text[]) asked (holder) WHERE EXISTS (
        SELECT FROM leases l
        WHERE '' || l.holder = asked.holder AND l.allocated_at >= $3::timestamptz - interval '1 hour'
    )
) AS holders
FROM guard
"""
DROP = f"""
WITH {GUARD}, dropped AS (
    DELETE FROM dead_letters d USING guard WHERE d.dead_letter_id = $2 RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM dropped) AS changed FROM guard
"""
COUNT = "SELECT count(*) FROM dead_letters"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    dead_letter_id: uuid.UUID
    died_at: datetime
    queue: str
    body: bytes
    properties: Basic.Properties


class Collector:
    """Carries what comes to the dead-letter queue into the table."""

    def __init__(self, amqp_url: str, engine: AsyncEngine) -> None:
        self._amqp_url = amqp_url
        self._engine = engine
        self._forgot_at = -math.inf

    async def run(self) -> None:
        await keep_connected(self._amqp_url, "allocator-dead-letters", self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        # Nothing is taken before it can be written down: from RabbitMQ 4 on it counts how often it takes a message
        # back.
        while (problem := await connections.ping(self._engine)) is not None:
            log.warning("dead_letters.postponed", error=problem)
            await asyncio.sleep(PAUSE_SEC)
        subscription = await Subscription.open(connection, topology.DEAD_LETTER_QUEUE, prefetch=PREFETCH)
        while deliveries := await subscription.batch(PREFETCH):
            if not await uninterrupted(self._keep(deliveries)):
                return
            await subscription.ack(deliveries[-1], all_before=True)

    async def _keep(self, deliveries: Sequence[DeliveredMessage]) -> bool:
        """Whether they are committed."""
        letters = [read(delivery) for delivery in deliveries]
        now = asyncio.get_running_loop().time()
        try:
            async with self._engine.begin() as connection:
                await connection.execute(insert(schema.dead_letters).on_conflict_do_nothing(), letters)
                if now - self._forgot_at >= FORGET_PERIOD_SEC:
                    forgotten = (await connection.execute(text(FORGET), {"kept": MAX_KEPT})).rowcount
                    self._forgot_at = now
                    if forgotten:
                        log.warning("dead_letters.forgotten", count=forgotten)
        except connections.CONNECTION_ERRORS as error:
            log.warning("dead_letters.postponed", error=connections.reason(error))
            return False
        for letter in letters:
            shown = {name: letter[name] for name in ("queue", "reason", "commands")}
            log.error("dead_letter.kept", dead_letter_id=str(letter["dead_letter_id"]), **shown)
        return True


def read(delivery: DeliveredMessage) -> dict[str, Any]:
    """The row of a message from the dead-letter queue, whatever it holds."""
    properties = delivery.header.properties
    headers = properties.headers or {}
    queue = _text(headers.get("x-first-death-queue") or delivery.routing_key)
    died_at = _died_at(headers) or properties.timestamp or datetime.now(UTC)
    body = bytes(delivery.body)
    name = (
        queue,
        died_at.isoformat(),
        properties.message_id,
        properties.correlation_id,
        hashlib.sha256(body).digest(),
    )
    return {
        "dead_letter_id": uuid.UUID(bytes=hashlib.blake2b(repr(name).encode(), digest_size=16).digest()),
        "died_at": died_at,
        "queue": queue,
        "reason": _reason(headers, queue, body),
        "commands": _types(body),
        "message_id": properties.message_id and _text(properties.message_id),
        "correlation_id": properties.correlation_id and _text(properties.correlation_id),
        "content_type": properties.content_type and _text(properties.content_type),
        "body": body,
    }


def _died_at(headers: Mapping[str, Any]) -> datetime | None:
    """As RabbitMQ has written it down; the newest death is the first of the list."""
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    at = newest.get("time") if isinstance(newest, dict) else None
    return at if isinstance(at, datetime) else None


def _reason(headers: Mapping[str, Any], queue: str, body: bytes) -> str:
    if given := headers.get("x-reason"):
        return _text(given)
    if headers.get("x-first-death-reason") == "delivery_limit":
        return "Delivered again and again in vain: whoever took it died, or lost its connection, each time."
    try:
        entries = decode_commands(body)
    except InvalidEnvelope as error:
        return _text(f"It is no envelope of commands: {error}")
    wrong = (str(entry) for entry in entries if isinstance(entry, InvalidCommand))
    return _text(next(wrong, f"It was rejected; the log of {queue.partition('.')[0]} says why."))


def _types(body: bytes) -> list[str]:
    found = dict.fromkeys(_text(entry["type"]) for entry in _entries(body) if isinstance(entry.get("type"), str))
    return list(found)[:MAX_TYPES]


def _entries(body: bytes) -> Iterator[dict[str, Any]]:
    """The commands of an envelope, or the event that it is, as far as it is anything."""
    try:
        read = orjson.loads(body)
    except ValueError:
        return
    commands = read.get("commands", [read]) if isinstance(read, dict) else []
    yield from (entry for entry in (commands if isinstance(commands, list) else []) if isinstance(entry, dict))


def _text(value: object) -> str:
    """As PostgreSQL stores it."""
    return str(value)[:MAX_TEXT].replace("\0", "").encode(errors="replace").decode()


async def find(connection: asyncpg.Connection, epoch: int, dead_letter_id: uuid.UUID) -> DeadLetter | None:
    row = await store.one(connection, FIND, epoch, dead_letter_id)
    if row["queue"] is None:
        return None
    properties = Basic.Properties(
        content_type=row["content_type"],
        delivery_mode=2,
        message_id=row["message_id"],
        correlation_id=row["correlation_id"],
    )
    return DeadLetter(row["dead_letter_id"], row["died_at"], row["queue"], row["body"], properties)


def has_replayable(letter: DeadLetter) -> bool:
    """Whether a replay can carry out a command of the letter. A replay goes over the exchange of the gateway, so
    that no command gains rights by it. Commands that only the reaper or the csp-syncer may send are refused there.
    """
    try:
        entries = decode_commands(letter.body)
    except InvalidEnvelope:
        return True
    return any(
        isinstance(entry, InvalidCommand) or topology.can_carry(topology.COMMANDS.name, entry) for entry in entries
    )


async def served(connection: asyncpg.Connection, epoch: int, letter: DeadLetter) -> frozenset[str]:
    """Of the students whose allocations are in the letter: who has had a sandbox since, from whichever request."""
    asked = [holder for entry in _entries(letter.body) if (holder := _allocating(entry)) is not None]
    if not asked:
        return frozenset()
    row = await store.one(connection, SERVED, epoch, asked, letter.died_at)
    return frozenset(row["holders"])


def _allocating(entry: Mapping[str, Any]) -> str | None:
    holder = entry.get("holder")
    return (
        holder
        if entry.get("type") == "AllocateSandbox" and isinstance(holder, str) and "\0" not in holder
        else None
    )


def without_allocations(body: bytes, holders: Collection[str]) -> tuple[bytes | None, int]:
    """What is left of an envelope without the allocations of these students, None if nothing is; and how many those
    are. A student who has given the sandbox back would be given a second one."""
    if not holders:
        return body, 0
    read = orjson.loads(body)
    left = [entry for entry in read["commands"] if not (isinstance(entry, dict) and _allocating(entry) in holders)]
    skipped = len(read["commands"]) - len(left)
    return orjson.dumps({**read, "commands": left}) if left else None, skipped


async def drop(connection: asyncpg.Connection, epoch: int, dead_letter_id: uuid.UUID) -> bool:
    """Whether it was there."""
    changed: bool = (await store.one(connection, DROP, epoch, dead_letter_id))["changed"]
    return changed
