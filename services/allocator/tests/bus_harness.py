"""Allocators on a real RabbitMQ, and somebody who asks them."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue

from allocator.consumer import Consumer
from allocator.lanes import MAINTENANCE, STUDENTS
from allocator.outbox import Relay
from allocator.settings import Settings
from devstack.ports import free_port
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import ReplyEnvelope, encode_commands
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel

from .allocator_harness import until


@dataclass
class Allocator:
    """One allocator at work in this process."""

    publisher: Publisher
    relay: Relay
    consumer: Consumer
    """Of the students' lane."""
    running: list[asyncio.Task[None]]


@asynccontextmanager
async def allocator(
    amqp_url: str, database_url: str, *, publisher: Publisher | None = None
) -> AsyncIterator[Allocator]:
    """Runs as in main.py: what builds on something stops before it. A task that ends by itself fails the test."""
    settings = Settings(amqp_url=amqp_url, database_url=database_url, _env_file=None)
    publisher = publisher or Publisher(amqp_url, "allocator-test")
    relay = Relay(database_url, publisher)
    consumer, maintenance = (Consumer(lane, settings, publisher, relay) for lane in (STUDENTS, MAINTENANCE))
    tasks = (publisher.run, relay.run, maintenance.run, consumer.run)
    running = [asyncio.create_task(task()) for task in tasks]
    try:
        await publisher.wait_connected()
        yield Allocator(publisher, relay, consumer, running)
    finally:
        await stop(running)


async def stop(running: Sequence[asyncio.Task[None]]) -> None:
    """Cancels the tasks, the last first; one that has ended by itself fails the test."""
    for task in reversed(running):
        await cancel(task)
    for task in running:
        assert task.cancelled(), task.exception()


def exchange_for(commands: Sequence[Command]) -> topology.Exchange:
    def carried(exchange: topology.Exchange) -> int:
        return sum(topology.can_carry(exchange.name, command) for command in commands)

    return max(topology.EXCHANGES, key=carried)


class Client:
    """Sends envelopes to the allocator's queue and gathers the answers."""

    def __init__(self, connection: AbstractConnection, channel: AbstractChannel, replies: AbstractQueue) -> None:
        self.connection = connection
        self.channel = channel
        self.replies = replies
        self._answers: dict[str, list[tuple[Reply, ...]]] = defaultdict(list)
        self._arrived = asyncio.Condition()

    async def _answered(self, message: AbstractIncomingMessage) -> None:
        async with self._arrived:
            found = ReplyEnvelope.model_validate_json(message.body).replies
            self._answers[message.correlation_id or ""].append(found)
            self._arrived.notify_all()

    async def publish(
        self,
        commands: Sequence[Command] | bytes,
        *,
        reply_to: str | None = None,
        times: int = 1,
        queue: topology.Queue = topology.ALLOCATOR_COMMANDS,
        copy_of: str | None = None,
        exchange: topology.Exchange | None = None,
    ) -> str:
        """Puts an envelope into the queue, `times` over; returns its correlation id, which a copy shares. Without
        `exchange` it goes over the exchange that may carry most of its commands."""
        body = commands if isinstance(commands, bytes) else encode_commands(commands)
        correlation_id = copy_of or uuid.uuid4().hex
        if exchange is None:
            exchange = topology.COMMANDS if isinstance(commands, bytes) else exchange_for(commands)
        sender = await self.channel.get_exchange(exchange.name, ensure=False)
        for _ in range(times):
            message = aio_pika.Message(
                body,
                correlation_id=correlation_id,
                reply_to=reply_to or self.replies.name,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await sender.publish(message, queue.name)
        return correlation_id

    async def answers(self, correlation_id: str, *, times: int = 1, timeout_sec: float = 60) -> list[list[Reply]]:
        """The first `times` answers that have come to an envelope."""
        async with asyncio.timeout(timeout_sec), self._arrived:
            await self._arrived.wait_for(lambda: len(self._answers[correlation_id]) >= times)
            return [list(replies) for replies in self._answers[correlation_id]]

    async def ask(
        self,
        commands: Sequence[Command] | bytes,
        *,
        queue: topology.Queue = topology.ALLOCATOR_COMMANDS,
        exchange: topology.Exchange | None = None,
    ) -> list[Reply]:
        return (await self.answers(await self.publish(commands, queue=queue, exchange=exchange)))[0]

    async def ask_one(self, command: Command) -> Reply:
        (reply,) = await self.ask([command])
        return reply

    async def dead_letters(self, count: int) -> list[AbstractIncomingMessage]:
        """Waits for as many dead letters and takes them away."""
        queue = await self.channel.get_queue(topology.DEAD_LETTER_QUEUE.name)
        found: list[AbstractIncomingMessage] = []

        async def all_there() -> bool:
            message = await queue.get(no_ack=True, fail=False)
            if message is not None:
                found.append(message)
            return len(found) == count

        await until(all_there)
        return found

    async def hand_back(self, queue: topology.Queue) -> None:
        """Takes what is in the queue and gives it back, so that it is delivered again."""
        number = await self.waiting(queue.name)
        assert number
        async with self.connection.channel() as channel:
            taken: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
            await (await channel.get_queue(queue.name)).consume(taken.put)
            for _ in range(number):
                await taken.get()

    async def waiting(self, queue: str) -> int:
        """Messages of a queue that nobody has taken; what is unacknowledged comes back when its taker is gone."""
        declared = await self.channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


@asynccontextmanager
async def client(amqp_url: str) -> AsyncIterator[Client]:
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await aio_pika.connect(amqp_url))
        channel = await connection.channel()
        replies = await channel.declare_queue(exclusive=True)
        await replies.bind(topology.REPLIES.name, replies.name)
        asking = Client(connection, channel, replies)
        await replies.consume(asking._answered, no_ack=True)
        yield asking


@asynccontextmanager
async def events(amqp_url: str) -> AsyncIterator["asyncio.Queue[Any]"]:
    """The messages of broker.events, as they come."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(topology.EVENTS.name, "#")
        found: asyncio.Queue[Any] = asyncio.Queue()
        await queue.consume(found.put, no_ack=True)
        yield found


class Line:
    """A TCP line to RabbitMQ that can be cut and mended."""

    def __init__(self, amqp_url: str) -> None:
        self._target = urlsplit(amqp_url)
        self._server: asyncio.Server | None = None
        self._carrying: set[asyncio.Task[None]] = set()
        self._port = free_port()

    @property
    def url(self) -> str:
        user, _ = self._target.netloc.rsplit("@", 1)
        return self._target._replace(netloc=f"{user}@127.0.0.1:{self._port}").geturl()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._carrying:
            task.cancel()
        if self._carrying:
            await asyncio.wait(self._carrying)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port or 5672)
            try:
                await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
            finally:
                far_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
