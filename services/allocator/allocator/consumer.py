"""One batch after the other: receive → handle → commit → reply → acknowledge, all in `_handle`.

A batch is what has gathered in the queue meanwhile; its commands of one kind share statements. A process that
dies anywhere before the acknowledgement leaves the batch to the next allocator, which finds the work done or
not done and gives the same answers.
"""

import asyncio
import json
import math
import random
import secrets
from collections.abc import Sequence
from datetime import timedelta

import asyncpg
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from allocator import domain, metrics, spans, store
from allocator.lanes import Handler, Lane
from allocator.outbox import Relay
from allocator.settings import Settings
from allocator.writer import Overtaken, Writer
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Refused, Reply
from sandbox_broker.database import connections
from sandbox_broker.messaging import dead_letters
from sandbox_broker.messaging.connection import keep_connected, losses
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription, answer, decode_delivery
from sandbox_broker.observability import log_context
from sandbox_broker.runtime.service import uninterrupted

MAX_TRIES = 5
LONGEST_REST_SEC = 0.1
"""After a batch of a lane that gives way."""
DATABASE_PAUSE_SEC = 1.0
"""How long a database that does not answer is left alone; commands are refused at once meanwhile."""
REMEMBERED = 20_000
"""Envelopes, the last ones: more than come in the time that a student waits for an answer."""

UNAVAILABLE = Refused(
    code="ALLOCATOR_UNAVAILABLE",
    message="The allocator cannot reach its database. Nothing is lost: try again in a few seconds.",
)
FAILED = Refused(
    code="INTERNAL_ERROR",
    message="The allocator could not process this request; the operators can see why among the dead letters.",
)

# Another allocator was faster, or two met in the middle: the same statement, run again, sees what it did.
_RACES = (Overtaken, asyncpg.UniqueViolationError, asyncpg.TransactionRollbackError)
# Whether it was done before the connection broke, the same statement tells on a new one.
_BROKEN = (
    ConnectionError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)

log = structlog.get_logger()


class Consumer:
    """Handles what comes to one lane's queue."""

    def __init__(self, lane: Lane, settings: Settings, publisher: Publisher, relay: Relay) -> None:
        self._lane = lane
        self._queue = lane.queue.name
        self._settings = settings
        self._publisher = publisher
        self._relay = relay
        self._connection: asyncpg.Connection | None = None
        self._epoch = 0
        self._unavailable_until = -math.inf
        self._remembered: dict[tuple[str | None, str], None] = {}
        self._spans: spans.Spans = {}

    @property
    def epoch(self) -> int:
        """Under which it writes; 0 while it stands by."""
        return self._epoch

    async def run(self) -> None:
        try:
            await keep_connected(self._settings.amqp_url, self._queue, self._session)
        finally:
            self._drop_connection()

    async def _session(self, connection: AbstractConnection) -> None:
        limit = self._lane.max_batch
        subscription = await Subscription.open(connection, self._lane.queue, prefetch=2 * limit)
        # Only the first delivery tells that this consumer is the active one.
        self._epoch = 0
        metrics.EPOCH.labels(self._queue).set(0)
        while deliveries := await subscription.batch(limit):
            began = asyncio.get_running_loop().time()
            try:
                await uninterrupted(self._handle(subscription, deliveries))
            except store.Fenced:
                log.warning("allocator.fenced", queue=self._queue, epoch=self._epoch)
                with losses():
                    await connection.close()  # gives back what is unacknowledged
                await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 (jitter)
                return
            if self._lane.gives_way:
                took = asyncio.get_running_loop().time() - began
                await asyncio.sleep(min(2 * took, LONGEST_REST_SEC))

    async def _handle(self, subscription: Subscription, deliveries: Sequence[DeliveredMessage]) -> None:
        """In a task of its own, so that the lines of a batch have its id, and no others."""
        log_context.bind(batch_id=secrets.token_hex(6), epoch=self._epoch)
        envelopes: list[tuple[DeliveredMessage, list[Command | InvalidCommand]]] = []
        for delivery in deliveries:
            try:
                commands = decode_delivery(delivery)
                if self._came_before(delivery):
                    commands = domain.delivered_again(commands)
                envelopes.append((delivery, commands))
            except InvalidEnvelope as error:
                log.error("message.rejected", queue=self._queue, reason=str(error))
                await subscription.reject(delivery)
        if not envelopes:
            return
        entries = [entry for _, commands in envelopes for entry in commands]
        with spans.of_batch(self._queue, entries) as self._spans:
            replies = iter(await self._replies(entries))
            self._relay.wake()
            answers = [(delivery, [next(replies) for _ in commands]) for delivery, commands in envelopes]
            await asyncio.gather(*(answer(self._publisher, delivery, given) for delivery, given in answers))
            await subscription.ack(envelopes[-1][0], all_before=True)

    def _came_before(self, delivery: DeliveredMessage) -> bool:
        """RabbitMQ tells of what it delivers again, not of a copy that was sent on its way: that one is known here,
        unless another allocator had the first."""
        properties = delivery.header.properties
        if delivery.redelivered:
            return True
        if properties.correlation_id is None:
            return False
        envelope = (properties.reply_to, properties.correlation_id)
        if envelope in self._remembered:
            return True
        self._remembered[envelope] = None
        if len(self._remembered) > REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return False

    async def _replies(self, entries: Sequence[Command | InvalidCommand]) -> list[Reply]:
        """A reply for each entry, in order."""
        metrics.BATCH_SIZE.labels(self._queue).observe(len(entries))
        if self._lane.together:
            groups = domain.segments(entries)
            return [reply for group in groups for reply in await self._replies_together(group)]
        replies: list[Reply] = []
        for entry in entries:
            with log_context.bound(request_id=_request_id(entry)):
                replies += await self._replies_together([entry])
        return replies

    async def _replies_together(self, entries: Sequence[Command | InvalidCommand]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        for kind, handle in self._lane.handlers.items():
            of_kind = {place: entry for place, entry in enumerate(entries) if isinstance(entry, kind)}
            if of_kind:
                replies.update(zip(of_kind, await self._run(handle, list(of_kind.values())), strict=True))
        for place, entry in enumerate(entries):
            if place not in replies:
                replies[place] = await self._refuse(entry)
        return [replies[place] for place in range(len(entries))]

    async def _run(self, handle: Handler, commands: Sequence[Command]) -> list[Reply]:
        """Runs one handler. What fails for good is halved until the culprit stands alone: that is kept among the
        dead letters."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._unavailable_until:
            return _unavailable(commands)
        try:
            return await self._run_with_retries(handle, commands)
        except (ArithmeticError, ValueError, Overtaken) as error:  # no parameter for SQL; asyncpg's is both
            culprit: Exception = error
        except store.UNAVAILABLE as error:
            log.error("database.lost", error=connections.reason(error))
            self._drop_connection()
            self._unavailable_until = loop.time() + DATABASE_PAUSE_SEC
            return _unavailable(commands)
        except store.Fenced:
            raise
        except Exception as error:  # noqa: BLE001 (delivered again, it would fail again and hold up what is behind it)
            culprit = error
        if len(commands) > 1:
            half = len(commands) // 2
            return [*await self._run(handle, commands[:half]), *await self._run(handle, commands[half:])]
        log.error("command.failed", command=commands[0].type, request_id=commands[0].request_id, exc_info=culprit)
        await dead_letters.keep(
            self._publisher,
            self._queue,
            commands[0].model_dump_json(),
            f"{type(culprit).__name__}: {connections.reason(culprit)}",
        )
        return [FAILED]

    async def _run_with_retries(self, handle: Handler, commands: Sequence[Command]) -> list[Reply]:
        for _ in range(MAX_TRIES - 1):
            fresh = self._connection is None
            try:
                return await self._timed(handle, await self._writer(), commands)
            except _RACES as error:
                log.info("allocator.raced", error=connections.reason(error))
            except _BROKEN as error:
                if fresh:
                    raise
                log.warning("database.reconnecting", error=connections.reason(error))
                self._drop_connection()
        return await self._timed(handle, await self._writer(), commands)

    async def _timed(self, handle: Handler, writer: Writer, commands: Sequence[Command]) -> list[Reply]:
        with metrics.COMMIT.labels(commands[0].type).time(), spans.commit(self._spans, commands, writer.epoch):
            return await handle(writer, commands)

    async def _writer(self) -> Writer:
        if self._connection is None or self._connection.is_closed():
            self._connection = await store.connect(
                self._settings.database_url,
                self._queue,
                statement_timeout_sec=self._lane.statement_timeout_sec,
                plans=self._lane.plans,
            )
        if self._epoch == 0:
            self._epoch = await store.raise_epoch(self._connection, self._queue)
            metrics.EPOCH.labels(self._queue).set(self._epoch)
            log_context.bind(epoch=self._epoch)
            log.info("allocator.active", queue=self._queue)
        lab_duration = timedelta(hours=self._settings.lab_duration_hours)
        return Writer(self._connection, self._epoch, lab_duration, self._publisher)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _refuse(self, entry: Command | InvalidCommand) -> Reply:
        if isinstance(entry, InvalidCommand):
            raw, reason = json.dumps(entry.raw), str(entry)
        else:
            raw, reason = entry.model_dump_json(), f"{entry.type} is not for {self._queue}"
        log.error("command.rejected", queue=self._queue, request_id=_request_id(entry), reason=reason)
        await dead_letters.keep(self._publisher, self._queue, raw, reason)
        return Refused(code="INVALID_COMMAND", message=f"The allocator refuses this command: {reason}")


def _request_id(entry: Command | InvalidCommand) -> str | None:
    if isinstance(entry, InvalidCommand):
        found = entry.raw.get("request_id") if isinstance(entry.raw, dict) else None
        return found if isinstance(found, str) else None
    return entry.request_id


def _unavailable(commands: Sequence[Command]) -> list[Reply]:
    request_ids = [command.request_id for command in commands if command.request_id is not None]
    for piece in log_context.by_line(request_ids):
        log.info("commands.refused", code=UNAVAILABLE.code, command=commands[0].type, request_ids=piece)
    return [UNAVAILABLE] * len(commands)
