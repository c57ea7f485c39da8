"""Consumer: receives batches of envelopes, publishes the replies, acknowledges.

A batch consists of all waiting envelopes, up to a limit. The acknowledgement comes last: after commit and
replies. After a crash the next allocator gets the batch again, finds each command done or not done, and
gives the same replies.
"""

import asyncio
import random
import secrets
from collections.abc import Sequence
from datetime import timedelta

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from allocator import domain, spans
from allocator.background.outbox_relay import OutboxRelay
from allocator.dispatcher import Dispatcher
from allocator.newest_lease import NewestLease
from allocator.policy_book import PolicyBook, default_terms
from allocator.redelivery import SeenEnvelopes
from allocator.routing import Lane
from allocator.settings import Settings
from allocator.waiting_line import WaitingLimits, WaitingLine
from allocator.write_session import Fenced, WriteSession
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope
from sandbox_broker.contract.commands import Command
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.connection import run_with_reconnect, translating_errors
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription, decode_delivery, publish_replies
from sandbox_broker.observability import log_context, logging
from sandbox_broker.runtime.access_keys import parse_access_keys
from sandbox_broker.runtime.service import run_uninterrupted

MAX_PAUSE_SEC = 0.1
"""Longest pause after a batch of a lane with low priority."""

log = structlog.get_logger()


class Consumer:
    """Consumer of the queue of one lane."""

    def __init__(
        self, lane: Lane, settings: Settings, primary: Primary, publisher: Publisher, relay: OutboxRelay
    ) -> None:
        self._lane = lane
        self._queue = lane.queue.name
        self._amqp_url = settings.amqp_url
        self._publisher = publisher
        self._relay = relay
        self._session = WriteSession(
            primary,
            lane.queue.name,
            publisher,
            policies=PolicyBook(default_terms(settings)),
            waiting_line=WaitingLine(WaitingLimits(settings.waiting_ttl_sec, settings.waiting_max)),
            broken_hold=timedelta(hours=settings.broken_hold_hours),
            access_keys=parse_access_keys(settings.access_keys),
            pseudonym_key=settings.pseudonym_key.get_secret_value().encode(),
            statement_timeout_sec=lane.statement_timeout_sec,
            planner_settings=lane.planner_settings,
            newest_lease=NewestLease(settings.amqp_url),
            needs_all_leases=lane.grants_leases,
        )
        self._dispatcher = Dispatcher(lane, self._session, publisher)
        self._seen_envelopes = SeenEnvelopes()

    @property
    def epoch(self) -> int:
        """Fencing epoch of the writes; 0 on standby."""
        return self._session.epoch

    async def run(self) -> None:
        try:
            await run_with_reconnect(self._amqp_url, self._queue, self._consume)
        finally:
            self._session.close()

    async def _consume(self, connection: AbstractConnection) -> None:
        limit = self._lane.max_batch
        subscription = await Subscription.open(connection, self._lane.queue, prefetch=2 * limit)
        # RabbitMQ does not announce the active consumer. The first delivery shows it, so the epoch is raised then.
        self._session.stand_by()
        while deliveries := await subscription.batch(limit):
            started = asyncio.get_running_loop().time()
            try:
                await run_uninterrupted(self._handle_batch(subscription, deliveries))
            except Fenced:
                log.warning("allocator.fenced", queue=self._queue, epoch=self.epoch)
                with translating_errors():
                    await connection.close()  # returns the unacknowledged messages to the queue
                await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 (jitter)
                return
            if self._lane.low_priority:
                duration = asyncio.get_running_loop().time() - started
                await asyncio.sleep(min(2 * duration, MAX_PAUSE_SEC))

    async def _handle_batch(self, subscription: Subscription, deliveries: Sequence[DeliveredMessage]) -> None:
        """Handle one batch. `run_uninterrupted` runs it in its own task, so the log context of the batch ends with
        it."""
        log_context.bind(batch_id=secrets.token_hex(6), epoch=self.epoch)
        envelopes: list[tuple[DeliveredMessage, list[Command | InvalidCommand]]] = []
        for delivery in deliveries:
            try:
                commands = decode_delivery(delivery)
            except InvalidEnvelope as error:
                log.error("message.rejected", queue=self._queue, reason=str(error))
                await subscription.reject(delivery)
                continue
            if self._seen_envelopes.is_redelivery(delivery):
                commands = domain.mark_redelivered(commands)
            else:
                self._seen_envelopes.remember(delivery)
            envelopes.append((delivery, commands))
        if not envelopes:
            return
        entries = [entry for _, commands in envelopes for entry in commands]
        with spans.batch_spans(self._queue, entries) as batch_spans:
            replies = iter(await self._dispatcher.dispatch(entries, batch_spans))
            self._relay.wake()
            answers = [(delivery, [next(replies) for _ in commands]) for delivery, commands in envelopes]
            logging.flush()  # before the replies, because a restored backup is repaired from the lines of leases
            await asyncio.gather(*(publish_replies(self._publisher, *envelope) for envelope in answers))
            await subscription.ack(envelopes[-1][0], all_before=True)
