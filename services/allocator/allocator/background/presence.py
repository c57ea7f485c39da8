"""Presence of the allocators, to detect a second broker on the same database.

Each allocator has an exclusive queue in RabbitMQ and reports it in the table `allocators`. It reports only while
RabbitMQ confirms the queue. So an allocator that goes on reporting a queue that does not exist here belongs to
another broker: to another RabbitMQ or virtual host with the same database. The two brokers would fence each other
with every command. The allocator that started later stops, before it takes commands. The other one warns the
operator.
"""

import asyncio
import contextlib
import math
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource, ChannelNotFoundEntity
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import metrics
from sandbox_broker.database import connections
from sandbox_broker.messaging.connection import open_channel, run_with_reconnect, translating_errors
from sandbox_broker.messaging.subscription import SUBSCRIBE_TIMEOUT_SEC
from sandbox_broker.runtime.service import run_uninterrupted

REPORT_SEC = 0.5
ANSWER_TIMEOUT_SEC = 1.0
REPORTS_OF_ANOTHER_BROKER = 2
"""Reports after the first time that the queue was missing. The first of them may have been confirmed before."""
LAST_REPORTS = 6
"""Reports before this allocator stops, so that the other broker notices it, too."""
WARNING_SEC = 600.0

# started_at and the id order the allocators in the same way for all of them.
REPORT = """
WITH reported AS (
    INSERT INTO allocators AS a (allocator_id, presence_queue) VALUES (:id, :queue)
    ON CONFLICT (allocator_id) DO UPDATE SET presence_queue = :queue, reports = a.reports + 1, seen_at = now(),
        other_broker_at = CASE WHEN :has_seen_other THEN now() ELSE a.other_broker_at END
    RETURNING started_at
),
expired AS (
    DELETE FROM allocators WHERE seen_at < now() - interval '1 hour'
)
SELECT o.allocator_id, o.presence_queue, o.reports,
    (o.started_at, o.allocator_id) < (reported.started_at, :id) AS is_older
FROM reported, allocators o WHERE o.allocator_id <> :id AND o.seen_at > now() - interval '2 seconds'
"""
LEAVE = "DELETE FROM allocators WHERE allocator_id = :id AND other_broker_at IS NULL"

log = structlog.get_logger()


class OtherBroker(Exception):
    """An allocator of another broker was there first."""


class Presence:
    def __init__(self, amqp_url: str, engine: AsyncEngine) -> None:
        self._amqp_url = amqp_url
        self._engine = engine
        self._id = uuid.uuid4()
        self._checked = asyncio.Event()
        self._found: set[str] = set()
        """Queues of other allocators of this broker."""
        self._missing: dict[str, int] = {}
        """Reported queues that do not exist here, with the reports of their allocators at the first time."""
        self._seen_other_at = -math.inf
        self._is_newcomer = False
        self._last_reports = 0

    @property
    def is_checked(self) -> bool:
        return self._checked.is_set()

    async def wait_checked(self) -> None:
        """Wait until no other allocator is suspected to belong to another broker, or this cannot be found out."""
        await self._checked.wait()

    async def run(self) -> None:
        """Report and check until cancelled. Return if this allocator must stop."""
        try:
            await run_with_reconnect(self._amqp_url, "allocator-presence", self._session)
        except OtherBroker:
            log.critical(
                "allocator.other_broker",
                action="This allocator stops, because another broker uses the same database. "
                "Give each broker its own DATABASE_URL, or the same AMQP_URL.",
            )
        finally:
            with contextlib.suppress(*connections.CONNECTION_ERRORS):
                await run_uninterrupted(self._leave())

    async def _session(self, connection: AbstractConnection) -> None:
        with translating_errors():
            channel = await open_channel(connection, confirms=False)
            try:
                async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):  # a node without a majority declares no queue
                    queue = (await channel.queue_declare(exclusive=True, auto_delete=True)).queue or ""
            except ChannelAccessRefused as error:
                log.warning("presence.not_permitted", error=str(error))
                self._checked.set()
                await asyncio.Event().wait()
            while True:
                async with asyncio.timeout(ANSWER_TIMEOUT_SEC):
                    await channel.queue_declare(queue, passive=True)
                await self._report_and_check(connection, queue)
                await asyncio.sleep(REPORT_SEC)

    async def _report_and_check(self, connection: AbstractConnection, queue: str) -> None:
        try:
            others = await run_uninterrupted(self._report(queue))
        except (*connections.CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            log.debug("presence.not_reported", error=connections.describe_error(error))
            self._checked.set()
            return
        missing: dict[str, int] = {}
        for other in others:
            name = other.presence_queue
            # A queue that was found once is not asked for again, because RabbitMQ logs each such question.
            if name in self._found or await _has_queue(connection, name):
                self._found.add(name)
                continue
            missing[name] = self._missing.get(name, other.reports)
            if other.reports - missing[name] >= REPORTS_OF_ANOTHER_BROKER:
                self._notice(other.allocator_id, is_older=other.is_older)
        self._missing = missing
        now = asyncio.get_running_loop().time()
        metrics.OTHER_BROKER.set(now - self._seen_other_at < WARNING_SEC)
        if self._is_newcomer:
            self._last_reports += 1
            if self._last_reports == LAST_REPORTS:
                raise OtherBroker
        elif not missing:
            self._checked.set()

    def _notice(self, other: uuid.UUID, *, is_older: bool) -> None:
        self._seen_other_at = asyncio.get_running_loop().time()
        self._is_newcomer |= is_older
        if not is_older:
            log.error(
                "allocator.other_broker",
                allocator_id=str(other),
                action="An allocator of another broker has started with the same database and stops. Correct its "
                "DATABASE_URL or AMQP_URL.",
            )

    async def _report(self, queue: str) -> Sequence[Any]:
        has_seen_other = asyncio.get_running_loop().time() - self._seen_other_at < 2 * REPORT_SEC
        values = {"id": self._id, "queue": queue, "has_seen_other": has_seen_other}
        async with self._engine.begin() as database:
            return (await database.execute(text(REPORT), values)).all()

    async def _leave(self) -> None:
        async with self._engine.begin() as database:
            await database.execute(text(LEAVE), {"id": self._id})


async def _has_queue(connection: AbstractConnection, queue: str) -> bool:
    """Return whether the queue of another allocator exists here. True without an answer in time, because RabbitMQ
    does not answer for a queue on an unreachable node."""
    channel = await open_channel(connection, confirms=False)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_SEC):
            await channel.queue_declare(queue, passive=True)
    except ChannelNotFoundEntity:
        return False
    except (ChannelLockedResource, TimeoutError):
        return True  # exclusive to its allocator
    finally:
        if not channel.is_closed:
            await channel.close()
    return True
