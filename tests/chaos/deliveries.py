"""Commands that are delivered twice, or in another order than they were sent in."""

import asyncio
import random
from contextlib import AsyncExitStack

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel

from sandbox_broker import topology
from sandbox_broker.connection import open_channel
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
QUEUES = (
    topology.ALLOCATOR_COMMANDS.name,
    topology.ALLOCATOR_MAINTENANCE.name,
    topology.SYNCER_COMMANDS.name,
    topology.REAPER_COMMANDS.name,
)


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
        for name in QUEUES:
            await self._channel.queue_bind(self._name, topology.COMMANDS.name, name)
            if self._instead:
                await self._channel.queue_unbind(name, topology.COMMANDS.name, name)

    async def close(self) -> None:
        for name in QUEUES:
            await self._channel.queue_bind(name, topology.COMMANDS.name, name)
            await self._channel.queue_unbind(self._name, topology.COMMANDS.name, name)
        while (await self._channel.queue_declare(self._name, passive=True)).message_count:  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.01)
        while self._sending:
            await asyncio.wait(self._sending)
        await self._open.aclose()

    async def _delivered(self, message: DeliveredMessage) -> None:
        task = asyncio.create_task(self._send_on(message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_on(self, message: DeliveredMessage) -> None:
        await asyncio.sleep(self._chance.uniform(*self._after_sec))
        await self._channel.basic_publish(
            message.body, routing_key=message.routing_key or "", properties=message.header.properties
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
