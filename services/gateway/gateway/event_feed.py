"""Event feed: one subscription to `broker.events` for all clients that watch the events.

RabbitMQ sends events to this gateway only while a client watches, because each copy of an event costs RabbitMQ
work.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from pamqp.common import FieldValue

from gateway import metrics
from gateway.api.errors import ApiError
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import Disconnected, open_channel, run_with_reconnect, translating_errors

MAX_BACKLOG = 1000
"""Events that wait for one client. A client with more is slower than the events and is dropped."""
SUBSCRIBE_TIMEOUT_SEC = 3.0
STOP_CHECK_SEC = 0.5
QUEUE_ARGUMENTS: dict[str, FieldValue] = {"x-max-length": 100_000, "x-overflow": "drop-head"}
"""The heartbeats end the connection of a frozen gateway before its queue is full."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StreamedEvent:
    sequence: str | None
    """None for an event from an allocator of an earlier version."""
    type: str
    body: str
    """The CloudEvent as JSON."""
    resume_after: str | None = None
    """Smaller number for an event that has overtaken others: a client that continues after it misses none."""


class EventStream:
    """Events for one client, in the order of their publication."""

    def __init__(self) -> None:
        self._backlog: asyncio.Queue[StreamedEvent | None] = asyncio.Queue()
        self.is_ended = False

    def push(self, event: StreamedEvent) -> None:
        if self.is_ended:
            return
        if self._backlog.qsize() >= MAX_BACKLOG:
            metrics.EVENT_STREAMS_DROPPED.labels("slow").inc()
            self.end()
        else:
            self._backlog.put_nowait(event)

    def end(self) -> None:
        """End the stream at once. The client continues from its last event on a new connection."""
        self.is_ended = True
        self._backlog.put_nowait(None)

    async def next(self, timeout_sec: float) -> StreamedEvent | None:
        """Return the next event; None after the time-out or the end of the stream."""
        try:
            async with asyncio.timeout(timeout_sec):
                event = await self._backlog.get()
        except TimeoutError:
            return None
        return None if self.is_ended else event


class EventFeed:
    """Subscription to the events for all streams of this gateway. `run` keeps it open."""

    def __init__(self, url: str, *, max_streams: int, is_stopping: Callable[[], bool]) -> None:
        self._url = url
        self._max_streams = max_streams
        self._is_stopping = is_stopping
        self._streams: set[EventStream] = set()
        self._subscribed = asyncio.Event()
        """Set while RabbitMQ sends events."""
        self._changed = asyncio.Event()

    @property
    def count(self) -> int:
        """Number of open streams."""
        return len(self._streams)

    def open_stream(self) -> EventStream:
        """Return a new stream, which the caller closes with `close_stream`. Raises ApiError TOO_MANY_STREAMS."""
        if len(self._streams) >= self._max_streams:
            metrics.EVENT_STREAMS_DROPPED.labels("too_many").inc()
            raise ApiError("TOO_MANY_STREAMS")
        stream = EventStream()
        self._streams.add(stream)
        self._changed.set()
        return stream

    def close_stream(self, stream: EventStream) -> None:
        self._streams.discard(stream)
        self._changed.set()

    async def wait_subscribed(self) -> None:
        """Wait until RabbitMQ sends events. Raises ApiError EVENTS_UNAVAILABLE."""
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):
                await self._subscribed.wait()
        except TimeoutError:
            raise ApiError("EVENTS_UNAVAILABLE") from None

    async def run(self) -> None:
        await run_with_reconnect(self._url, "gateway-events", self._session)

    async def end_at_stop(self) -> None:
        """End all streams when the drain begins. An open response would delay the stop of the gateway."""
        while True:
            if self._is_stopping():
                self._end_streams()
            await asyncio.sleep(STOP_CHECK_SEC)

    async def _session(self, connection: AbstractConnection) -> None:
        with translating_errors():
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_SEC):  # a node without a majority declares no queue
                channel = await open_channel(connection, confirms=False)
                declared = await channel.queue_declare(exclusive=True, auto_delete=True, arguments=QUEUE_ARGUMENTS)
            lost = channel.closing

            def cancelled(_: object) -> None:
                if not lost.done():
                    lost.set_exception(Disconnected("the queue of the events was deleted"))

            channel.on_consumer_cancel_callbacks.add(cancelled)
            queue = declared.queue or ""
            await channel.basic_consume(queue, self._deliver, no_ack=True)
            try:
                while True:
                    self._changed.clear()
                    if self._streams and not self._subscribed.is_set():
                        await channel.queue_bind(queue, topology.EVENTS.name, routing_key="#")
                        self._subscribed.set()
                    elif not self._streams and self._subscribed.is_set():
                        self._subscribed.clear()
                        await channel.queue_unbind(queue, topology.EVENTS.name, routing_key="#")
                    await _wait_for_first(self._changed, lost)
            finally:
                self._subscribed.clear()
                # Events that occur until the next connection are only in the history.
                self._end_streams()

    async def _deliver(self, delivery: DeliveredMessage) -> None:
        if not self._streams:
            return
        try:
            event = orjson.loads(delivery.body)
            streamed = StreamedEvent(
                event.get("sequence"), event["type"], delivery.body.decode(), event.get("resumeafter")
            )
        except (ValueError, KeyError, AttributeError) as error:
            log.warning("event.unreadable", error=repr(error))
            return
        for stream in self._streams:
            stream.push(streamed)

    def _end_streams(self) -> None:
        for stream in self._streams:
            stream.end()


async def _wait_for_first(changed: asyncio.Event, lost: asyncio.Future[None]) -> None:
    """Return when `changed` is set. Raises the error of `lost`."""
    waiting = asyncio.create_task(changed.wait())
    try:
        awaited: list[asyncio.Future[Any]] = [waiting, lost]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            await lost
            raise Disconnected("the channel was closed")
    finally:
        waiting.cancel()
