"""Test harness of the allocator on a real RabbitMQ: running allocators, a client, a TCP proxy."""

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

from allocator.background.outbox_relay import OutboxRelay
from allocator.consumer import Consumer
from allocator.newest_lease import NewestLease
from allocator.routing import MAINTENANCE, STUDENTS
from allocator.settings import Settings
from devstack.conditions import wait_until
from devstack.ports import free_port
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import ReplyEnvelope, encode_commands
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel_and_wait


@dataclass
class Allocator:
    """Allocator in this process."""

    publisher: Publisher
    relay: OutboxRelay
    consumer: Consumer
    """Consumer of the lane for students."""
    running: list[asyncio.Task[None]]


@asynccontextmanager
async def run_allocator(
    amqp_url: str, database_url: str, *, publisher: Publisher | None = None
) -> AsyncIterator[Allocator]:
    """Run an allocator wired like in main.py. A task must not end by itself."""
    settings = Settings(amqp_url=amqp_url, database_url=database_url, _env_file=None)
    publisher = publisher or Publisher(amqp_url, "allocator-test")
    primary = Primary(database_url)
    relay = OutboxRelay(primary, publisher, NewestLease(amqp_url))
    consumer, maintenance = (
        Consumer(lane, settings, primary, publisher, relay) for lane in (STUDENTS, MAINTENANCE)
    )
    tasks = (publisher.run, relay.run, maintenance.run, consumer.run)
    running = [asyncio.create_task(task()) for task in tasks]
    try:
        await publisher.wait_connected()
        yield Allocator(publisher, relay, consumer, running)
    finally:
        await stop(running)


async def stop(running: Sequence[asyncio.Task[None]]) -> None:
    """Cancel the tasks in reverse order. A task must not have ended by itself."""
    for task in reversed(running):
        await cancel_and_wait(task)
    for task in running:
        assert task.cancelled(), task.exception()


def exchange_for(commands: Sequence[Command]) -> topology.Exchange:
    """Return the exchange with rights for most of the commands."""

    def count_allowed(exchange: topology.Exchange) -> int:
        return sum(topology.can_carry(exchange.name, command) for command in commands)

    return max(topology.EXCHANGES, key=count_allowed)


class Client:
    """Client of the allocator: sends envelopes and collects the replies."""

    def __init__(self, connection: AbstractConnection, channel: AbstractChannel, replies: AbstractQueue) -> None:
        self.connection = connection
        self.channel = channel
        self.replies = replies
        self._replies: dict[str, list[tuple[Reply, ...]]] = defaultdict(list)
        self._arrived = asyncio.Condition()

    async def _collect(self, message: AbstractIncomingMessage) -> None:
        async with self._arrived:
            replies = ReplyEnvelope.model_validate_json(message.body).replies
            self._replies[message.correlation_id or ""].append(replies)
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
        """Publish an envelope `times` times; return its correlation id, which a copy shares.

        Without `exchange`, publish it to the exchange with rights for most of its commands.
        """
        body = commands if isinstance(commands, bytes) else encode_commands(commands)
        correlation_id = copy_of or uuid.uuid4().hex
        if exchange is None:
            exchange = topology.COMMANDS if isinstance(commands, bytes) else exchange_for(commands)
        target = await self.channel.get_exchange(exchange.name, ensure=False)
        for _ in range(times):
            message = aio_pika.Message(
                body,
                correlation_id=correlation_id,
                reply_to=reply_to or self.replies.name,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await target.publish(message, queue.name)
        return correlation_id

    async def replies_to(
        self, correlation_id: str, *, times: int = 1, timeout_sec: float = 60
    ) -> list[list[Reply]]:
        """Wait for `times` replies to an envelope; return all of them."""
        async with asyncio.timeout(timeout_sec), self._arrived:
            await self._arrived.wait_for(lambda: len(self._replies[correlation_id]) >= times)
            return [list(replies) for replies in self._replies[correlation_id]]

    async def request(
        self,
        commands: Sequence[Command] | bytes,
        *,
        queue: topology.Queue = topology.ALLOCATOR_COMMANDS,
        exchange: topology.Exchange | None = None,
    ) -> list[Reply]:
        return (await self.replies_to(await self.publish(commands, queue=queue, exchange=exchange)))[0]

    async def request_one(self, command: Command) -> Reply:
        (reply,) = await self.request([command])
        return reply

    async def dead_letters(self, count: int) -> list[AbstractIncomingMessage]:
        """Wait for `count` dead letters and remove them from their queue."""
        queue = await self.channel.get_queue(topology.DEAD_LETTER_QUEUE.name)
        letters: list[AbstractIncomingMessage] = []

        async def are_complete() -> bool:
            message = await queue.get(no_ack=True, fail=False)
            if message is not None:
                letters.append(message)
            return len(letters) == count

        await wait_until(are_complete)
        return letters

    async def requeue_all(self, queue: topology.Queue) -> None:
        """Consume all messages of the queue and return them; RabbitMQ then marks them as redelivered."""
        count = await self.message_count(queue.name)
        assert count
        async with self.connection.channel() as channel:
            taken: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
            await (await channel.get_queue(queue.name)).consume(taken.put)
            for _ in range(count):
                await taken.get()

    async def message_count(self, queue: str) -> int:
        """Return the number of ready messages. Unacknowledged ones become ready when their consumer is gone."""
        declared = await self.channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


@asynccontextmanager
async def connect_client(amqp_url: str) -> AsyncIterator[Client]:
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await aio_pika.connect(amqp_url))
        channel = await connection.channel()
        replies = await channel.declare_queue(exclusive=True)
        await replies.bind(topology.REPLIES.name, replies.name)
        client = Client(connection, channel, replies)
        await replies.consume(client._collect, no_ack=True)
        yield client


@asynccontextmanager
async def subscribe_events(amqp_url: str) -> AsyncIterator["asyncio.Queue[Any]"]:
    """Subscribe to all messages of broker.events."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(topology.EVENTS.name, "#")
        messages: asyncio.Queue[Any] = asyncio.Queue()
        await queue.consume(messages.put, no_ack=True)
        yield messages


class TcpProxy:
    """TCP proxy in front of RabbitMQ, for disconnections."""

    def __init__(self, amqp_url: str) -> None:
        self._target = urlsplit(amqp_url)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = free_port()

    @property
    def url(self) -> str:
        user, _ = self._target.netloc.rsplit("@", 1)
        return self._target._replace(netloc=f"{user}@127.0.0.1:{self._port}").geturl()

    async def connect(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def disconnect(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port or 5672)
            try:
                await asyncio.gather(_forward(reader, far_writer), _forward(far_reader, writer))
            finally:
                far_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
