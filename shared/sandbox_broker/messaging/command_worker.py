"""Worker for long commands. Each command runs in its own task, so that a later command can join its work."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply, refuse
from sandbox_broker.messaging import dead_letters
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.subscription import Subscription, decode_delivery, publish_replies
from sandbox_broker.observability import log_context, tracing

MAX_AT_ONCE = 100

log = structlog.get_logger()

FAILED = refuse("INTERNAL_ERROR", cause="dead_letter")

Handle = Callable[[Command], Awaitable[Reply | None]]
"""Handler of a command. It returns None if the command is not for this service."""


async def serve_commands(
    connection: AbstractConnection, queue: topology.Queue, publisher: Publisher, handle: Handle
) -> None:
    """Carry out the commands of the queue and publish their replies, until the connection is lost. A delivery is
    acknowledged after its replies, so that RabbitMQ redelivers it if the process dies."""
    subscription = await Subscription.open(connection, queue, prefetch=MAX_AT_ONCE)
    handling: set[asyncio.Task[None]] = set()

    async def serve_one(delivery: DeliveredMessage) -> None:
        try:
            commands = decode_delivery(delivery)
        except InvalidEnvelope as error:
            log.error("message.rejected", queue=queue.name, reason=str(error))
            await subscription.reject(delivery)
            return
        replies = [await _reply(publisher, queue, command, handle) for command in commands]
        await publish_replies(publisher, delivery, replies)
        await subscription.ack(delivery)

    async with asyncio.TaskGroup() as group:
        while deliveries := await subscription.batch(MAX_AT_ONCE):
            for delivery in deliveries:
                task = group.create_task(serve_one(delivery))
                handling.add(task)
                task.add_done_callback(handling.discard)
        # The connection is lost. RabbitMQ redelivers the commands, and they join the work that still runs.
        for task in handling:
            task.cancel()


async def _reply(
    publisher: Publisher, queue: topology.Queue, command: Command | InvalidCommand, handle: Handle
) -> Reply:
    """Return the reply to one command. Failed and refused commands go to the dead letters."""
    if isinstance(command, InvalidCommand):
        raw, reason = json.dumps(command.raw), str(command)
    else:
        raw = command.model_dump_json()
        try:
            with (
                log_context.bound(request_id=command.request_id),
                tracing.child_span(f"process {command.type}", "consumer", parent=command.traceparent),
            ):
                if (reply := await handle(command)) is not None:
                    return reply
        except Exception as error:  # because a redelivery would fail again and end the process each time
            log.error(
                "command.failed",
                queue=queue.name,
                command=command.type,
                request_id=command.request_id,
                exc_info=error,
            )
            await dead_letters.publish_dead_letter(publisher, queue.name, raw, f"{type(error).__name__}: {error}")
            return FAILED
        reason = f"{command.type} is not for {queue.name}"
    log.error("command.rejected", queue=queue.name, reason=reason)
    await dead_letters.publish_dead_letter(publisher, queue.name, raw, reason)
    return refuse("INVALID_COMMAND", reason=reason)
