"""RPC client: sends commands and waits for their replies.

Replies arrive on one exclusive queue per process. Each request has a deadline on the client's side.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence

from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import ReplyEnvelope, encode_commands
from sandbox_broker.contract.commands import Command, R
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.connection import Disconnected, open_channel, run_with_reconnect, translating_errors
from sandbox_broker.messaging.outcome import NoReply, ServiceUnavailable, UnexpectedReply, read_reply
from sandbox_broker.messaging.publisher import PUBLISH_TIMEOUT_SEC, Publisher, Unroutable
from sandbox_broker.messaging.subscription import PUBLISHED_AT, SUBSCRIBE_TIMEOUT_SEC
from sandbox_broker.observability import log_context, tracing


class RpcClient:
    """RPC client for commands. `run` keeps its reply queue open."""

    def __init__(
        self, url: str, name: str, publisher: Publisher, *, exchange: topology.Exchange = topology.COMMANDS
    ) -> None:
        """`exchange` is the command exchange of this service (see topology)."""
        self._url = url
        self._name = f"{name}-replies"
        self._publisher = publisher
        self._exchange = exchange.name
        self._reply_queue: str | None = None
        self._connected = asyncio.Event()
        self._waiting: dict[str, tuple[asyncio.Future[tuple[Reply, ...]], int]] = {}

    @property
    def connected(self) -> bool:
        return self._reply_queue is not None and self._publisher.connected

    async def run(self) -> None:
        await run_with_reconnect(self._url, self._name, self._session)

    async def _session(self, connection: AbstractConnection) -> None:
        with translating_errors():
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):  # a node without a majority declares no queue
                channel = await open_channel(connection, confirms=False)
                queue = (await channel.queue_declare(exclusive=True, auto_delete=True)).queue or ""
                await channel.queue_bind(queue, topology.REPLIES.name, routing_key=queue)
            lost = channel.closing

            def cancelled(_: object) -> None:
                if not lost.done():
                    lost.set_exception(Disconnected("the reply queue was deleted"))

            channel.on_consumer_cancel_callbacks.add(cancelled)
            await channel.basic_consume(queue, self._answered, no_ack=True)
            self._reply_queue = queue
            self._connected.set()
            try:
                await lost
            finally:
                self._reply_queue = None
                self._connected.clear()
                for future, _ in self._waiting.values():
                    if not future.done():
                        future.set_exception(Disconnected("the connection was lost while waiting for the reply"))
                self._waiting.clear()

    async def _answered(self, delivery: DeliveredMessage) -> None:
        waiting = self._waiting.pop(delivery.header.properties.correlation_id or "", None)
        if waiting is None or waiting[0].done():
            return  # the caller has stopped waiting
        future, expected = waiting
        try:
            replies = ReplyEnvelope.model_validate_json(delivery.body).replies
            if len(replies) != expected:
                raise ValueError(f"{len(replies)} replies to {expected} commands")  # noqa: TRY301 (handled like a reply that cannot be decoded)
            future.set_result(replies)
        except ValueError as error:
            future.set_exception(error)

    async def send(
        self, queue: topology.Queue, commands: Sequence[Command], *, timeout_sec: float
    ) -> asyncio.Future[tuple[Reply, ...]]:
        """Publish one envelope. Return after its confirm, with a future for the replies in the order of the
        commands.

        After `timeout_sec` the future fails with TimeoutError, and RabbitMQ drops the envelope unless it has been
        delivered. Raises Disconnected or Unroutable. The future may also fail with Disconnected, or with ValueError
        if the reply cannot be decoded.
        """
        if self._reply_queue is None:
            raise Disconnected("not connected to RabbitMQ")
        correlation_id = uuid.uuid4().hex
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Reply, ...]] = loop.create_future()
        self._waiting[correlation_id] = (future, len(commands))
        timer = loop.call_later(timeout_sec, _expire, future)
        future.add_done_callback(lambda done: self._forget(correlation_id, timer, done))
        properties = Basic.Properties(
            content_type="application/json",
            delivery_mode=2,
            correlation_id=correlation_id,
            reply_to=self._reply_queue,
            headers={PUBLISHED_AT: round(time.time() * 1000)},
            expiration=str(max(1, round(timeout_sec * 1000))),
        )
        try:
            await self._publisher.publish(
                self._exchange,
                queue.name,
                encode_commands(commands),
                properties,
                timeout_sec=min(timeout_sec, PUBLISH_TIMEOUT_SEC),
            )
        except BaseException:  # cancellation included, because an unsent envelope gets no reply
            future.cancel()
            raise
        return future

    def _forget(
        self, correlation_id: str, timer: asyncio.TimerHandle, done: asyncio.Future[tuple[Reply, ...]]
    ) -> None:
        timer.cancel()
        self._waiting.pop(correlation_id, None)
        if not done.cancelled():
            done.exception()  # retrieved here, because asyncio warns if the caller has stopped waiting

    async def request(self, queue: topology.Queue, command: Command[R], *, timeout_sec: float) -> R:
        """Send one command as soon as a connection is open, and return its reply.

        Raises CommandRefused, ServiceUnavailable, NoReply or UnexpectedReply.
        """
        (reply,) = await self.request_all(queue, [command], timeout_sec=timeout_sec)
        return read_reply(command, reply)

    async def request_all(
        self, queue: topology.Queue, commands: Sequence[Command], *, timeout_sec: float
    ) -> tuple[Reply, ...]:
        """Send the commands in one envelope as soon as a connection is open, and return a reply for each.

        A command without a `request_id` or `traceparent` gets the values of the current log context and span.
        Raises ServiceUnavailable, NoReply or UnexpectedReply. Refusals are among the replies.
        """
        deadline = asyncio.get_running_loop().time() + timeout_sec
        commands = [
            command.model_copy(
                update={
                    "request_id": command.request_id or log_context.request_id(),
                    "traceparent": command.traceparent or tracing.traceparent(),
                }
            )
            for command in commands
        ]
        try:
            async with asyncio.timeout_at(deadline):
                await self._publisher.wait_connected()
                await self._connected.wait()
                left = deadline - asyncio.get_running_loop().time()
                return await (await self.send(queue, commands, timeout_sec=left))
        except (Disconnected, Unroutable) as error:
            raise ServiceUnavailable(str(error)) from error
        except TimeoutError:
            raise NoReply(f"no reply in {timeout_sec:g} s") from None
        except ValueError as error:
            raise UnexpectedReply(str(error)) from error


def _expire(future: asyncio.Future[tuple[Reply, ...]]) -> None:
    if not future.done():
        future.set_exception(TimeoutError("no reply in time"))
