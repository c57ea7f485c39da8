"""Commands that are delivered twice, or in another order than they were sent in."""

import asyncio
import random
from contextlib import AsyncExitStack

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import open_channel
from tests.chaos.faults import Fault
from tests.chaos.stack import SERVICES, Chaos

LASTS_SEC = 6.0
TWICE_SEC = (0.0, 0.02)
"""From a command to its copy: in RabbitMQ, which lets the rest of its batch stay behind it, it is no more."""
REORDERED_SEC = (0.0, 1.0)
RECONNECTING = frozenset(
    {"RabbitMQ", *SERVICES.values(), *(f"link from {module} to RabbitMQ" for module in SERVICES.values())}
)
"""What makes a service connect to RabbitMQ anew, and declare the topology."""
BINDINGS = tuple(
    (binding.queue.name, binding.exchange.name) for binding in topology.BINDINGS if binding.exchange.commands
)
"""Of the queues for commands to the exchanges of the senders."""
AGAIN = "again."
"""Begins the routing key of what is sent on. It goes over the exchange that it came over, because the services ask
by which exchange a command came, and only the queue of its service takes it there."""


class _Tap:
    """A queue beside those for commands, or in their place, from which each command is sent on after a while."""

    def __init__(self, after_sec: tuple[float, float], *, instead: bool, chance: random.Random) -> None:
        self._after_sec = after_sec
        self._instead = instead
        self._chance = chance
        self._sending: set[asyncio.Task[None]] = set()
        self._open = AsyncExitStack()
        self._channel: Channel
        self._name = ""

    async def open(self, chaos: Chaos) -> None:
        if self._instead:  # whoever connected later would bind the queues again, and what follows would come twice
            await chaos.until_a_standby_is_there()
        connection = await self._open.enter_async_context(chaos.connected())
        self._channel = await open_channel(connection, confirms=True)
        declared = await self._channel.queue_declare(exclusive=True, auto_delete=True)
        self._name = declared.queue or ""
        await self._channel.basic_consume(self._name, self._delivered, no_ack=True)
        for queue, exchange in BINDINGS:
            await self._channel.queue_bind(queue, exchange, AGAIN + queue)
            await self._channel.queue_bind(self._name, exchange, queue)
            if self._instead:
                await self._channel.queue_unbind(queue, exchange, queue)

    async def close(self) -> None:
        for queue, exchange in BINDINGS:
            await self._channel.queue_bind(queue, exchange, queue)
            await self._channel.queue_unbind(self._name, exchange, queue)
        while (await self._channel.queue_declare(self._name, passive=True)).message_count:  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.01)
        while self._sending:
            await asyncio.wait(self._sending)
        for queue, exchange in BINDINGS:
            await self._channel.queue_unbind(queue, exchange, AGAIN + queue)
        await self._open.aclose()

    async def _delivered(self, message: DeliveredMessage) -> None:
        task = asyncio.create_task(self._send_on(message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_on(self, message: DeliveredMessage) -> None:
        await asyncio.sleep(self._chance.uniform(*self._after_sec))
        await self._channel.basic_publish(
            message.body,
            exchange=message.exchange or "",
            routing_key=f"{AGAIN}{message.routing_key}",
            properties=message.header.properties,
        )


def _fault(kind: str, tap: _Tap, touches: frozenset[str]) -> Fault:
    async def heal(_: Chaos) -> None:
        await tap.close()

    return Fault(
        kind=kind,
        name=kind,
        touches=touches,
        inject=tap.open,
        heal=heal,
        lasts_sec=LASTS_SEC,
        served_within_sec=3,
    )


def faults(chance: random.Random) -> list[Fault]:
    return [
        _fault("commands delivered twice", _Tap(TWICE_SEC, instead=False, chance=chance), frozenset({"RabbitMQ"})),
        _fault("commands reordered", _Tap(REORDERED_SEC, instead=True, chance=chance), RECONNECTING),
    ]
