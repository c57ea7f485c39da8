"""Event feed: limits for streams and clients, and its subscription to RabbitMQ."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
import pytest

from devstack.conditions import wait_until
from gateway.api.errors import ApiError
from gateway.event_feed import MAX_BACKLOG, EventFeed, EventStream, StreamedEvent
from sandbox_broker.contract import topology

from .gateway_harness import sample

EVENT = StreamedEvent("7", "sandbox.deleted", "{}")


def build_feed(url: str = "amqp://127.0.0.1:1/", *, max_streams: int = 2, stopping: bool = False) -> EventFeed:
    return EventFeed(url, max_streams=max_streams, is_stopping=lambda: stopping)


@asynccontextmanager
async def running(feed: EventFeed) -> AsyncIterator[None]:
    task = asyncio.create_task(feed.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def publish(url: str, body: bytes) -> None:
    connection = await aio_pika.connect(url)
    async with connection, connection.channel() as channel:
        exchange = await channel.get_exchange(topology.EVENTS.name, ensure=False)
        await exchange.publish(aio_pika.Message(body), "sandbox.deleted", mandatory=False)


async def test_a_slow_client_is_dropped_and_others_are_not() -> None:
    slow, reading = EventStream(), EventStream()
    dropped = sample("broker_event_streams_dropped_total", reason="slow")
    for _ in range(MAX_BACKLOG + 3):
        slow.push(EVENT)
        reading.push(EVENT)
        assert await reading.next(1) == EVENT
    assert slow.is_ended
    assert await slow.next(1) is None
    assert not reading.is_ended
    assert sample("broker_event_streams_dropped_total", reason="slow") == dropped + 1


async def test_the_number_of_streams_is_limited() -> None:
    feed = build_feed(max_streams=1)
    stream = feed.open_stream()
    with pytest.raises(ApiError) as error:
        feed.open_stream()
    assert error.value.code == "TOO_MANY_STREAMS"
    feed.close_stream(stream)
    feed.close_stream(stream)
    assert feed.count == 0
    feed.open_stream()


async def test_without_rabbitmq_the_wait_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.event_feed.SUBSCRIBE_TIMEOUT_SEC", 0.01)
    with pytest.raises(ApiError) as error:
        await build_feed().wait_subscribed()
    assert error.value.code == "EVENTS_UNAVAILABLE"


async def test_a_stop_ends_all_streams() -> None:
    feed = build_feed(stopping=True)
    stream = feed.open_stream()
    task = asyncio.create_task(feed.end_at_stop())
    assert await stream.next(5) is None
    assert stream.is_ended
    task.cancel()


async def test_events_arrive_while_a_stream_is_open(clean_queues: str) -> None:
    feed = build_feed(clean_queues)
    async with running(feed):
        first = feed.open_stream()
        await feed.wait_subscribed()
        await publish(clean_queues, b"no event")
        await publish(clean_queues, b'{"type": "sandbox.deleted", "sequence": "8"}')
        event = await first.next(5)
        assert event == StreamedEvent("8", "sandbox.deleted", '{"type": "sandbox.deleted", "sequence": "8"}')
        overtaking = '{"type": "sandbox.allocated", "sequence": "9", "resumeafter": "3"}'
        await publish(clean_queues, overtaking.encode())
        assert await first.next(5) == StreamedEvent("9", "sandbox.allocated", overtaking, "3")
        feed.close_stream(first)
        await wait_until(lambda: not feed._subscribed.is_set())
        second = feed.open_stream()
        await feed.wait_subscribed()
        await publish(clean_queues, b'{"type": "sandbox.deleted"}')
        event = await second.next(5)
        assert event is not None
        assert event.sequence is None
