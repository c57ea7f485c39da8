"""Commands delivered twice or out of order."""

import asyncio
import random
from contextlib import AsyncExitStack

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_channel
from tests.chaos.faults import Fault
from tests.chaos.stack import SERVICES, ChaosBroker

DURATION_SEC = 6.0
DUPLICATE_DELAY_SEC = (0.0, 0.02)
"""Delay of a copy. It is short, because RabbitMQ too redelivers a message before the messages behind it."""
REORDER_DELAY_SEC = (0.0, 1.0)
RECONNECTING = frozenset(
    {"RabbitMQ", *SERVICES.values(), *(f"link from {module} to RabbitMQ" for module in SERVICES.values())}
)
"""Components excluded from a second fault, because a service declares the topology again when it reconnects."""
BINDINGS = tuple(
    (binding.queue.name, binding.exchange.name) for binding in topology.BINDINGS if binding.exchange.commands
)
"""Bindings of the command queues to the command exchanges of the senders, as (queue name, exchange name)."""
RESEND_PREFIX = "again."
"""Prefix of the routing key of a resent command.

The command goes through its original exchange, because the services check the exchange of a command. The prefix
routes it to the queue of the service only, not to the relay queue again.
"""


class _DelayedRelay:
    """Relay queue: it forwards each command after a delay, beside the original queues or in place of them."""

    def __init__(self, delay_sec: tuple[float, float], *, replace_queues: bool, rng: random.Random) -> None:
        self._delay_sec = delay_sec
        self._replaces_queues = replace_queues
        self._rng = rng
        self._resending: set[asyncio.Task[None]] = set()
        self._open = AsyncExitStack()
        self._channel: Channel
        self._name = ""

    async def open(self, broker: ChaosBroker) -> None:
        if self._replaces_queues:
            # A service that connects later binds the queues again, and would receive each command twice.
            await broker.wait_for_standby()
        connection = await self._open.enter_async_context(broker.connect_to_rabbitmq())
        self._channel = await open_channel(connection, confirms=True)
        declared = await self._channel.queue_declare(exclusive=True, auto_delete=True)
        self._name = declared.queue or ""
        await self._channel.basic_consume(self._name, self._schedule_resend, no_ack=True)
        for queue, exchange in BINDINGS:
            await self._channel.queue_bind(queue, exchange, RESEND_PREFIX + queue)
            await self._channel.queue_bind(self._name, exchange, queue)
            if self._replaces_queues:
                await self._channel.queue_unbind(queue, exchange, queue)

    async def close(self) -> None:
        for queue, exchange in BINDINGS:
            await self._channel.queue_bind(queue, exchange, queue)
            await self._channel.queue_unbind(self._name, exchange, queue)
        while (await self._channel.queue_declare(self._name, passive=True)).message_count:  # noqa: ASYNC110 (RabbitMQ sends no event when a queue is empty)
            await asyncio.sleep(0.01)
        while self._resending:
            await asyncio.wait(self._resending)
        for queue, exchange in BINDINGS:
            await self._channel.queue_unbind(queue, exchange, RESEND_PREFIX + queue)
        await self._open.aclose()

    async def _schedule_resend(self, message: DeliveredMessage) -> None:
        task = asyncio.create_task(self._resend(message))
        self._resending.add(task)
        task.add_done_callback(self._resending.discard)

    async def _resend(self, message: DeliveredMessage) -> None:
        await asyncio.sleep(self._rng.uniform(*self._delay_sec))
        await self._channel.basic_publish(
            message.body,
            exchange=message.exchange or "",
            routing_key=f"{RESEND_PREFIX}{message.routing_key}",
            properties=message.header.properties,
        )


def _build_fault(kind: str, relay: _DelayedRelay, affects: frozenset[str]) -> Fault:
    async def heal(_: ChaosBroker) -> None:
        await relay.close()

    return Fault(
        kind=kind,
        name=kind,
        affects=affects,
        inject=relay.open,
        heal=heal,
        duration_sec=DURATION_SEC,
        served_within_sec=3,
    )


def list_faults(rng: random.Random) -> list[Fault]:
    return [
        _build_fault(
            "commands delivered twice",
            _DelayedRelay(DUPLICATE_DELAY_SEC, replace_queues=False, rng=rng),
            frozenset({"RabbitMQ"}),
        ),
        _build_fault(
            "commands reordered", _DelayedRelay(REORDER_DELAY_SEC, replace_queues=True, rng=rng), RECONNECTING
        ),
    ]
