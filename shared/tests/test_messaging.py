"""Publisher, consumer and RPC client, with and without a working connection."""

import asyncio
import contextlib
import statistics
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aio_pika
import pytest
import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage
from hypothesis import given
from hypothesis import strategies as some
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from prometheus_client import REGISTRY

from devstack.conditions import wait_until
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.testing import empty_queues
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import decode_commands, encode_commands
from sandbox_broker.contract.commands import BeginListing, ClaimDeletions, Command, RecordDeletion, ReleaseSandbox
from sandbox_broker.contract.replies import ListingBegun, Recorded, Refused, Reply
from sandbox_broker.messaging import connection, publisher
from sandbox_broker.messaging import subscription as subscription_module
from sandbox_broker.messaging.connection import Disconnected, run_with_reconnect
from sandbox_broker.messaging.outcome import CommandRefused, NoReply, ServiceUnavailable, UnexpectedReply
from sandbox_broker.messaging.publisher import OutboundMessage, Publisher, Unroutable
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.messaging.subscription import Subscription, publish_replies
from sandbox_broker.observability import log_context
from sandbox_broker.runtime.service import cancel_and_wait

from .shared_harness import PATIENCE_SEC, TcpProxy, assert_no_leaks, background_tasks, open_tcp_proxy

QUEUE = topology.ALLOCATOR_COMMANDS
FILLED = topology.SYNC_TICKS  # a queue of length 1
BLOCKING_MESSAGES = 32
"""Number of unanswered messages to a quorum queue after which RabbitMQ confirms nothing on the channel."""
AT_ONCE_SEC = 2.0
"""Less than all time-outs of the messaging package."""


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


@pytest.fixture
async def amqp_proxy(clean_queues: str) -> AsyncIterator[TcpProxy]:
    async with open_tcp_proxy(clean_queues, 5672) as line:
        yield line


class Bus:
    """A publisher and an RPC client, like in a service."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.publisher = Publisher(url, "test")
        self.rpc_client = RpcClient(url, "test", self.publisher)

    def put(self, body: bytes = b"{}", queue: topology.Queue = QUEUE, **options: Any) -> Awaitable[None]:
        return self.publisher.publish("", queue.name, body, **options)

    def ask(self, timeout_sec: float = 15.0) -> Awaitable[ListingBegun]:
        return self.rpc_client.request(QUEUE, BeginListing(), timeout_sec=timeout_sec)


Connected = Callable[[str], contextlib.AbstractAsyncContextManager[Bus]]


@pytest.fixture
def connected() -> Connected:
    @asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Bus]:
        made = Bus(url)
        async with background_tasks(made.publisher.run(), made.rpc_client.run()):
            await wait_until(lambda: made.rpc_client.connected)
            yield made

    return opened


@pytest.fixture
async def bus(clean_queues: str, connected: Connected) -> AsyncIterator[Bus]:
    async with connected(clean_queues) as made:
        yield made


@pytest.fixture
async def proxied_bus(amqp_proxy: TcpProxy, connected: Connected) -> AsyncIterator[Bus]:
    async with connected(amqp_proxy.url) as made:
        yield made


@pytest.fixture(scope="module")
async def private_server(server_programs: None) -> AsyncIterator[PrivateRabbitMQ]:
    async with PrivateRabbitMQ() as server:
        yield server


@pytest.fixture
async def private(private_server: PrivateRabbitMQ) -> PrivateRabbitMQ:
    await empty_queues(private_server.url)  # of messages from other tests, which may be no commands
    return private_server


@pytest.fixture
async def consuming(clean_queues: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(clean_queues) as opened:
        yield opened


@pytest.fixture
def logged() -> Iterator[list[structlog.typing.EventDict]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


Handle = Callable[[DeliveredMessage, Sequence[Any]], Awaitable[None]]


async def consume(url: str, handle: Handle) -> None:
    """Consume commands like the allocator, until cancelled."""

    async def session(opened: AbstractConnection) -> None:
        subscription = await Subscription.open(opened, QUEUE, prefetch=20)
        while deliveries := await subscription.batch(10):
            for delivery in deliveries:
                await handle(delivery, decode_commands(delivery.body))
            await subscription.ack(deliveries[-1], all_before=True)

    await run_with_reconnect(url, "test-worker", session)


def replying(publisher: Publisher, times: int = 1) -> Handle:
    async def handle(delivery: DeliveredMessage, commands: Sequence[Command]) -> None:
        for _ in range(times):
            await publish_replies(publisher, delivery, [ListingBegun(listing_id=n) for n, _ in enumerate(commands)])

    return handle


async def bodies(subscription: Subscription, number: int) -> list[bytes]:
    """Return the bodies of the next deliveries, unacknowledged."""
    received: list[bytes] = []
    async with asyncio.timeout(AT_ONCE_SEC * 5):
        while len(received) < number:
            received += [delivery.body for delivery in await subscription.batch(number - len(received))]
    return received


# Publishing


async def test_a_published_message_is_in_the_queue(bus: Bus, consuming: AbstractConnection) -> None:
    await bus.put(b"here")
    subscription = await Subscription.open(consuming, QUEUE, prefetch=1)
    assert await bodies(subscription, 1) == [b"here"]


async def test_an_unroutable_message_raises_an_error(bus: Bus) -> None:
    with pytest.raises(Unroutable, match="nobody"):
        await bus.publisher.publish(topology.COMMANDS.name, "nobody", b"{}")
    await bus.publisher.publish(topology.EVENTS.name, "nobody", b"{}", mandatory=False)
    await bus.put()


async def test_publishing_without_a_connection_fails_at_once(clean_queues: str) -> None:
    made = Bus(clean_queues)
    async with asyncio.timeout(AT_ONCE_SEC):
        with pytest.raises(Disconnected):
            await made.put()
        with pytest.raises(Disconnected):
            await made.publisher.count_consumers(QUEUE.name)
        with pytest.raises(Disconnected):
            await made.rpc_client.send(QUEUE, [BeginListing()], timeout_sec=1)
    assert not made.rpc_client.connected


async def test_an_invalid_message_does_not_close_the_connection(bus: Bus) -> None:
    with pytest.raises(ValueError, match="too long"):
        await bus.publisher.publish("", "x" * 256, b"{}")
    await bus.put()


async def test_consumers_counts_the_consumers_of_a_queue(bus: Bus, consuming: AbstractConnection) -> None:
    assert await bus.publisher.count_consumers(QUEUE.name) == 0
    await Subscription.open(consuming, QUEUE, prefetch=1)
    assert await bus.publisher.count_consumers(QUEUE.name) == 1


async def test_inspection_of_a_missing_queue_does_not_affect_publishing(bus: Bus) -> None:
    publishing = [asyncio.ensure_future(bus.put()) for _ in range(50)]
    for _ in range(3):
        with pytest.raises(Disconnected):
            await bus.publisher.count_consumers("nowhere")
    await asyncio.gather(*publishing)
    assert bus.publisher.connected
    assert await bus.publisher.count_consumers(QUEUE.name) == 0


async def test_a_reset_connection_fails_all_open_publishes_and_reconnects(
    proxied_bus: Bus, amqp_proxy: TcpProxy
) -> None:
    amqp_proxy.pause()
    publishing = [asyncio.ensure_future(proxied_bus.put(b"x" * 1000)) for _ in range(300)]
    await asyncio.wait(publishing, timeout=0.05)
    amqp_proxy.reset()
    amqp_proxy.resume()
    async with asyncio.timeout(AT_ONCE_SEC):
        results = await asyncio.gather(*publishing, return_exceptions=True)
    assert {type(result) for result in results} == {Disconnected}
    await proxied_bus.publisher.wait_connected()
    await proxied_bus.put()


def outgoing(count: int) -> list[OutboundMessage]:
    return [
        OutboundMessage(QUEUE.name, f"{number}".encode(), f"id-{number}", "text/plain") for number in range(count)
    ]


async def test_publish_all_keeps_the_order(bus: Bus, consuming: AbstractConnection) -> None:
    assert await bus.publisher.publish_all("", outgoing(300)) == 300
    await asyncio.gather(bus.put(b"beside"), bus.publisher.publish_all("", outgoing(2)))
    subscription = await Subscription.open(consuming, QUEUE, prefetch=500)
    deliveries: list[DeliveredMessage] = []
    while len(deliveries) < 303:
        deliveries += await subscription.batch(500)
    assert [delivery.body for delivery in deliveries[:300]] == [f"{number}".encode() for number in range(300)]
    first = deliveries[0].header.properties
    assert (first.message_id, first.content_type, first.delivery_mode) == ("id-0", "text/plain", 2)
    assert {delivery.body for delivery in deliveries[300:]} == {b"beside", b"0", b"1"}


@pytest.mark.parametrize("others", [9, 10, 11])
async def test_publish_all_waits_for_room_in_the_write_queue(bus: Bus, others: int) -> None:
    """The write queue of the client library holds ten chunks."""
    before = [bus.put() for _ in range(others)]
    published = await asyncio.gather(*before, bus.publisher.publish_all("", outgoing(3)))
    assert published == [*others * [None], 3]


async def test_publish_all_accepts_unroutable_messages(bus: Bus) -> None:
    nowhere = [OutboundMessage("nowhere", b"x", f"id-{number}", "text/plain") for number in range(3)]
    assert await bus.publisher.publish_all("", nowhere) == 3


async def test_publish_all_returns_the_confirmed_count_after_a_reset(
    proxied_bus: Bus, amqp_proxy: TcpProxy
) -> None:
    amqp_proxy.pause()
    publishing = asyncio.ensure_future(proxied_bus.publisher.publish_all("", outgoing(300)))
    await asyncio.wait([publishing], timeout=0.05)
    amqp_proxy.reset()
    amqp_proxy.resume()
    async with asyncio.timeout(AT_ONCE_SEC):
        assert await publishing == 0
    await proxied_bus.publisher.wait_connected()
    assert await proxied_bus.publisher.publish_all("", outgoing(300)) == 300


async def test_publish_all_without_a_connection_fails_at_once(clean_queues: str) -> None:
    with pytest.raises(Disconnected):
        await Bus(clean_queues).publisher.publish_all("", outgoing(2))


async def test_publish_all_times_out_for_an_unresponsive_server(proxied_bus: Bus, amqp_proxy: TcpProxy) -> None:
    amqp_proxy.pause()
    assert await proxied_bus.publisher.publish_all("", outgoing(2), timeout_sec=0.2) == 0
    amqp_proxy.resume()
    assert await proxied_bus.publisher.publish_all("", outgoing(2)) == 2


async def test_closing_fails_all_open_publishes(clean_queues: str) -> None:
    made = Bus(clean_queues)
    running = asyncio.create_task(made.publisher.run())
    await made.publisher.wait_connected()
    publishing = [asyncio.ensure_future(made.put(b"x" * 100_000)) for _ in range(300)]
    await asyncio.sleep(0)
    running.cancel()
    async with asyncio.timeout(AT_ONCE_SEC * 2):
        results = await asyncio.gather(*publishing, return_exceptions=True)
    assert {type(result) for result in results} <= {Disconnected, type(None)}
    await cancel_and_wait(running)


async def test_a_cancelled_publish_does_not_affect_others(bus: Bus) -> None:
    publishing = [asyncio.ensure_future(bus.put()) for _ in range(100)]
    await asyncio.sleep(0)
    for task in publishing[::2]:
        task.cancel()
    results = await asyncio.gather(*publishing, return_exceptions=True)
    assert {type(result) for result in results[::2]} == {asyncio.CancelledError}
    assert results[1::2] == [None] * 50
    await bus.put()


async def test_an_unresponsive_server_raises_disconnected_and_cancels_no_task(
    amqp_proxy: TcpProxy, connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_SEC", 1)
    async with connected(amqp_proxy.url) as made:
        amqp_proxy.pause()
        late = asyncio.ensure_future(made.put(timeout_sec=60))
        with pytest.raises(Disconnected):
            await made.put(timeout_sec=0.2)
        with pytest.raises(Disconnected):
            await late  # raised by the heartbeat
        await wait_until(lambda: not made.rpc_client.connected)
        amqp_proxy.resume()
        await wait_until(lambda: made.rpc_client.connected)
        await made.put()


# Consuming


async def test_a_batch_holds_stored_deliveries_in_order_up_to_the_limit(
    bus: Bus, consuming: AbstractConnection
) -> None:
    sent = [b"%d" % number for number in range(25)]
    for body in sent:
        await bus.put(body)
    subscription = await Subscription.open(consuming, QUEUE, prefetch=100)
    received: list[bytes] = []
    while len(received) < len(sent):
        batch = await subscription.batch(10)
        assert 1 <= len(batch) <= 10
        received += [delivery.body for delivery in batch]
        await subscription.ack(batch[-1], all_before=True)
    assert received == sent


async def test_the_prefetch_count_limits_deliveries(bus: Bus, consuming: AbstractConnection) -> None:
    for _ in range(5):
        await bus.put()
    subscription = await Subscription.open(consuming, QUEUE, prefetch=2)
    assert len(await bodies(subscription, 2)) == 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(subscription.batch(1), 0.1)


async def test_unacknowledged_deliveries_are_redelivered(clean_queues: str, bus: Bus) -> None:
    sent = [b"1", b"2", b"3", b"4"]
    for body in sent:
        await bus.put(body)
    async with await aio_pika.connect(clean_queues) as first:
        subscription = await Subscription.open(first, QUEUE, prefetch=10)
        deliveries: list[DeliveredMessage] = []
        while len(deliveries) < len(sent):
            deliveries += await subscription.batch(10)
        await subscription.ack(deliveries[1], all_before=True)
    async with await aio_pika.connect(clean_queues) as second:
        again = await Subscription.open(second, QUEUE, prefetch=10)
        assert await bodies(again, 2) == [b"3", b"4"]


async def test_a_cancelled_wait_loses_no_delivery(bus: Bus, consuming: AbstractConnection) -> None:
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    for number in range(50):
        waiting = asyncio.create_task(subscription.batch(10))
        publishing = asyncio.ensure_future(bus.put(b"%d" % number))
        await asyncio.wait([waiting, publishing], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await asyncio.wait([waiting, publishing])
        batch = await subscription.batch(10) if waiting.cancelled() else waiting.result()
        assert [delivery.body for delivery in batch] == [b"%d" % number]
        await subscription.ack(batch[-1])


async def test_a_rejected_delivery_goes_to_the_dead_letters(bus: Bus, consuming: AbstractConnection) -> None:
    await bus.put(b"poison")
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    (delivery,) = await subscription.batch(10)
    await subscription.reject(delivery)
    dead = await Subscription.open(consuming, topology.DEAD_LETTER_QUEUE, prefetch=10)
    assert await bodies(dead, 1) == [b"poison"]


async def delete_queue(opened: AbstractConnection, subscription: Subscription) -> None:
    async with opened.channel() as channel:
        await channel.queue_delete(QUEUE.name)


async def close_channel(opened: AbstractConnection, subscription: Subscription) -> None:
    await subscription._channel.close()


async def close_connection(opened: AbstractConnection, subscription: Subscription) -> None:
    await opened.close()


async def end(opened: AbstractConnection, subscription: Subscription) -> None:
    subscription.end()


async def break_channel(opened: AbstractConnection, subscription: Subscription) -> None:
    await subscription._channel.basic_ack(4711)


@pytest.mark.parametrize("ending", [delete_queue, close_channel, close_connection, end, break_channel])
async def test_a_subscription_ends(consuming: AbstractConnection, ending: Any) -> None:
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    waiting = asyncio.create_task(subscription.batch(10))
    await asyncio.sleep(0)
    await ending(consuming, subscription)
    async with asyncio.timeout(AT_ONCE_SEC):
        assert await waiting == []
        assert await subscription.batch(10) == []


async def test_settling_a_delivery_of_a_lost_channel_is_harmless(bus: Bus, consuming: AbstractConnection) -> None:
    await bus.put()
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    (delivery,) = await subscription.batch(10)
    await consuming.close()
    await subscription.ack(delivery)
    await subscription.reject(delivery)
    assert await subscription.batch(10) == []


async def test_a_missing_queue_raises_disconnected(consuming: AbstractConnection) -> None:
    with pytest.raises(Disconnected, match="nowhere"):
        await Subscription.open(consuming, topology.Queue("nowhere", "allocator"), prefetch=1)


async def test_a_consumer_recovers_from_the_deletion_of_its_queue(
    clean_queues: str, bus: Bus, consuming: AbstractConnection
) -> None:
    async with background_tasks(consume(clean_queues, replying(bus.publisher))):
        assert await bus.ask() == ListingBegun(listing_id=0)
        async with consuming.channel() as channel:
            await channel.queue_delete(QUEUE.name)
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(ServiceUnavailable):
                    assert await bus.ask() == ListingBegun(listing_id=0)
                    break
                await asyncio.sleep(0.01)


# Requests


async def test_replies_have_the_order_of_the_commands(clean_queues: str, bus: Bus) -> None:
    async with background_tasks(consume(clean_queues, replying(bus.publisher))):
        replies = await (await bus.rpc_client.send(QUEUE, [BeginListing()] * 5, timeout_sec=15))
    assert replies == tuple(ListingBegun(listing_id=number) for number in range(5))
    assert bus.rpc_client._waiting == {}


async def test_concurrent_requests_are_answered(clean_queues: str, bus: Bus) -> None:
    async with background_tasks(consume(clean_queues, replying(bus.publisher))):
        assert await asyncio.gather(*(bus.ask() for _ in range(200))) == [ListingBegun(listing_id=0)] * 200
    assert bus.rpc_client._waiting == {}


async def test_a_request_past_its_deadline_times_out_and_is_forgotten(
    bus: Bus, consuming: AbstractConnection
) -> None:
    with pytest.raises(NoReply, match="no reply in"):
        await bus.ask(timeout_sec=0.3)
    replies = await bus.rpc_client.send(QUEUE, [BeginListing()], timeout_sec=0.3)
    with pytest.raises(TimeoutError, match="no reply"):
        await replies
    await wait_until(lambda: bus.rpc_client._waiting == {})
    # RabbitMQ drops them a little later, because their expiration started at their arrival.
    async with consuming.channel() as channel, asyncio.timeout(PATIENCE_SEC):
        queue = await channel.declare_queue(QUEUE.name, passive=True)
        while queue.declaration_result.message_count:
            await asyncio.sleep(0.01)
            queue = await channel.declare_queue(QUEUE.name, passive=True)
    await bus.put(b"behind them")
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    assert await bodies(subscription, 1) == [b"behind them"]


async def test_the_time_out_includes_the_wait_for_a_connection(clean_queues: str) -> None:
    made = Bus(clean_queues)
    with pytest.raises(NoReply, match=r"no reply in 0\.05 s"):
        await made.ask(timeout_sec=0.05)


async def test_a_late_or_duplicate_reply_is_ignored(clean_queues: str, bus: Bus) -> None:
    late: list[DeliveredMessage] = []

    async def keep(delivery: DeliveredMessage, _: Sequence[Command]) -> None:
        late.append(delivery)

    async with background_tasks(consume(clean_queues, keep)):
        with pytest.raises(NoReply):
            await bus.ask(timeout_sec=0.5)
        await wait_until(lambda: late)
    async with background_tasks(consume(clean_queues, replying(bus.publisher, times=3))):
        await publish_replies(bus.publisher, late[0], [ListingBegun(listing_id=99)])
        assert await asyncio.gather(*(bus.ask() for _ in range(20))) == [ListingBegun(listing_id=0)] * 20
    assert bus.rpc_client.connected


@pytest.mark.parametrize(
    "body", [b"nonsense", b'{"replies": [{"type": "Recorded", "version": 2}]}', b'{"replies": []}']
)
async def test_an_invalid_reply_fails_only_its_request(clean_queues: str, bus: Bus, body: bytes) -> None:
    spoilt = False

    async def handle(delivery: DeliveredMessage, commands: Sequence[Command]) -> None:
        nonlocal spoilt
        request = delivery.header.properties
        if spoilt:
            await publish_replies(bus.publisher, delivery, [ListingBegun(listing_id=0)] * len(commands))
            return
        spoilt = True
        properties = Basic.Properties(correlation_id=request.correlation_id)
        await bus.publisher.publish(topology.REPLIES.name, request.reply_to or "", body, properties)

    async with background_tasks(consume(clean_queues, handle)):
        results = await asyncio.gather(*(bus.ask() for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(result, UnexpectedReply) for result in results) == 1
    assert results.count(ListingBegun(listing_id=0)) == 2
    assert bus.rpc_client._waiting == {}


async def test_a_refusal_raises_its_code(clean_queues: str, bus: Bus) -> None:
    async def refuse(delivery: DeliveredMessage, _: Sequence[Command]) -> None:
        await publish_replies(bus.publisher, delivery, [Refused(code="SYNC_HELD", message="because")])

    async with background_tasks(consume(clean_queues, refuse)):
        with pytest.raises(CommandRefused) as refused:
            await bus.ask()
    assert refused.value.code == "SYNC_HELD"


async def test_a_reply_that_cannot_be_encoded_is_refused(clean_queues: str, bus: Bus) -> None:
    """The other replies of its message arrive."""

    async def reply(delivery: DeliveredMessage, commands: Sequence[BeginListing]) -> None:
        replies: dict[str, Reply] = {
            "bad": Refused(code="SYNC_HELD", message="\ud800"),
            "good": ListingBegun(listing_id=1),
        }
        await publish_replies(bus.publisher, delivery, [replies[str(command.request_id)] for command in commands])

    async with background_tasks(consume(clean_queues, reply)):
        with structlog.testing.capture_logs() as logs:
            outcomes = await asyncio.gather(
                *(
                    bus.rpc_client.request(QUEUE, BeginListing(request_id=request_id), timeout_sec=15)
                    for request_id in ("good", "bad", "good")
                ),
                return_exceptions=True,
            )
    assert [getattr(outcome, "code", "ListingBegun") for outcome in outcomes] == [
        "ListingBegun",
        "INTERNAL_ERROR",
        "ListingBegun",
    ]
    assert [line["reply"] for line in logs if line["event"] == "reply.not_encoded"] == ["Refused"]


async def test_a_reply_to_another_command_is_unexpected(clean_queues: str, bus: Bus) -> None:
    async def reply_wrongly(delivery: DeliveredMessage, _: Sequence[Command]) -> None:
        await publish_replies(bus.publisher, delivery, [Recorded(changed=True)])

    async with background_tasks(consume(clean_queues, reply_wrongly)):
        with pytest.raises(UnexpectedReply, match="Recorded is no reply to BeginListing"):
            await bus.ask()


async def test_a_cancelled_request_is_forgotten(bus: Bus) -> None:
    requests = [asyncio.ensure_future(bus.ask()) for _ in range(20)]
    await wait_until(lambda: len(bus.rpc_client._waiting) == 20)
    for task in requests:
        task.cancel()
    await asyncio.wait(requests)
    await wait_until(lambda: bus.rpc_client._waiting == {})


async def test_an_unroutable_request_is_forgotten(bus: Bus) -> None:
    with pytest.raises(ServiceUnavailable, match="nowhere"):
        await bus.rpc_client.request(topology.Queue("nowhere", "allocator"), BeginListing(), timeout_sec=5)
    await wait_until(lambda: bus.rpc_client._waiting == {})


async def test_a_reply_to_a_missing_requester_is_not_an_error(bus: Bus, consuming: AbstractConnection) -> None:
    await bus.put(properties=Basic.Properties(reply_to="gone", correlation_id="1"))
    subscription = await Subscription.open(consuming, QUEUE, prefetch=1)
    (delivery,) = await subscription.batch(1)
    await publish_replies(bus.publisher, delivery, [Recorded(changed=True)])


async def test_a_delivery_that_expires_in_the_consumer_is_dropped(
    clean_queues: str, bus: Bus, consuming: AbstractConnection
) -> None:
    subscription = await Subscription.open(consuming, QUEUE, prefetch=2)
    await bus.put(b"late", properties=Basic.Properties(expiration="200"))
    await bus.put(b"in time", properties=Basic.Properties(expiration="60000"))
    await wait_until(lambda: subscription._inbox.qsize() == 2)
    await asyncio.sleep(0.25)  # longer than the expiration
    deliveries = await subscription.batch(10)
    assert [delivery.body for delivery in deliveries] == [b"in time"]
    await subscription.ack(deliveries[0])  # only this delivery, because the earlier one is acknowledged
    await consuming.close()
    async with await aio_pika.connect(clean_queues) as later, later.channel() as channel:
        assert (await channel.declare_queue(QUEUE.name, passive=True)).declaration_result.message_count == 0


async def test_a_reply_waits_until_its_publisher_is_connected(clean_queues: str, bus: Bus) -> None:
    publisher = Publisher(clean_queues, "late")
    async with background_tasks(consume(clean_queues, replying(publisher))):
        requests = asyncio.ensure_future(bus.ask())
        with structlog.testing.capture_logs() as logs:
            await wait_until(lambda: "reply.delayed" in [line["event"] for line in logs])
        async with background_tasks(publisher.run()):
            assert await requests == ListingBegun(listing_id=0)


async def test_a_reply_that_cannot_be_published_is_dropped(
    bus: Bus, consuming: AbstractConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription_module, "REPLY_RETRY_SEC", 0.3)
    await bus.put(properties=Basic.Properties(reply_to="somebody", correlation_id="1"))
    subscription = await Subscription.open(consuming, QUEUE, prefetch=1)
    (delivery,) = await subscription.batch(1)
    with structlog.testing.capture_logs() as logs:
        await publish_replies(Publisher(bus.url, "never"), delivery, [Recorded(changed=True)])
    assert "reply.lost" in [line["event"] for line in logs]


async def test_a_reply_without_a_confirm_delays_no_other_reply(
    bus: Bus, consuming: AbstractConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription_module, "REPLY_RETRY_SEC", 1000)
    monkeypatch.setattr(subscription_module, "REPLY_CONFIRM_SEC", 0)
    await bus.put(properties=Basic.Properties(reply_to="on a lost node", correlation_id="1"))
    subscription = await Subscription.open(consuming, QUEUE, prefetch=1)
    (delivery,) = await subscription.batch(1)
    with structlog.testing.capture_logs() as logs:
        await publish_replies(bus.publisher, delivery, [Recorded(changed=True)])
    assert "reply.not_confirmed" in [line["event"] for line in logs]


async def test_a_connection_declares_an_incomplete_topology(clean_queues: str) -> None:
    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as channel:
        await channel.exchange_delete(topology.EVENTS.name)
        await channel.exchange_delete(topology.marker_name())
        async with background_tasks((publisher := Publisher(clean_queues, "declares")).run()):
            await asyncio.wait_for(publisher.wait_connected(), PATIENCE_SEC)
            await channel.declare_exchange(topology.EVENTS.name, passive=True)


async def test_a_connection_does_not_declare_an_existing_topology(
    clean_queues: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A declaration would wait for the leader of each queue, and RabbitMQ would log its refusal as an error."""

    async def declare(channel: object) -> None:
        raise AssertionError("declared again")

    monkeypatch.setattr(topology, "declare", declare)
    async with background_tasks((publisher := Publisher(clean_queues, "asks")).run()):
        await asyncio.wait_for(publisher.wait_connected(), PATIENCE_SEC)


async def test_a_deleted_reply_queue_fails_open_requests_and_is_declared_again(clean_queues: str) -> None:
    made = Bus(clean_queues)
    owner: list[AbstractConnection] = []  # only the owner may delete an exclusive queue

    async def session(opened: AbstractConnection) -> None:
        owner.append(opened)
        await made.rpc_client._session(opened)

    async with background_tasks(made.publisher.run(), run_with_reconnect(clean_queues, "test", session)):
        requests = asyncio.ensure_future(made.ask())
        await wait_until(lambda: made.rpc_client._waiting)
        queue = made.rpc_client._reply_queue
        assert queue is not None
        async with owner[0].channel() as channel:
            await channel.queue_delete(queue)
        async with asyncio.timeout(AT_ONCE_SEC):
            with pytest.raises(ServiceUnavailable, match="lost"):
                await requests
        await wait_until(lambda: made.rpc_client.connected)
        assert made.rpc_client._reply_queue != queue
        async with background_tasks(consume(clean_queues, replying(made.publisher))):
            assert await made.ask() == ListingBegun(listing_id=0)


# Failures of the server


async def test_a_killed_server_fails_open_requests_and_the_client_recovers(
    private: PrivateRabbitMQ, connected: Connected
) -> None:
    async with connected(private.url) as made:
        requests = [asyncio.ensure_future(made.ask()) for _ in range(50)]
        await wait_until(lambda: len(made.rpc_client._waiting) == 50)
        await wait_until(lambda: not made.publisher._limits)
        await private.sync_queue_metadata()
        publishing = [asyncio.ensure_future(made.put(b"x" * 10_000, FILLED)) for _ in range(300)]
        await private.kill()
        async with asyncio.timeout(AT_ONCE_SEC * 3):  # less than the 15 s of a request, on a busy machine too
            results = await asyncio.gather(*requests, return_exceptions=True)
            published = await asyncio.gather(*publishing, return_exceptions=True)
        assert {type(result) for result in results} == {ServiceUnavailable}
        assert {type(result) for result in published} <= {Disconnected, type(None)}
        assert made.rpc_client._waiting == {}
        await wait_until(lambda: not made.rpc_client.connected and not made.publisher.connected)
        await private.start()
        await wait_until(lambda: made.rpc_client.connected)
        async with background_tasks(consume(private.url, replying(made.publisher))):
            assert await made.ask() == ListingBegun(listing_id=0)


async def test_an_unresponsive_queue_is_named_and_retried(
    private: PrivateRabbitMQ, connected: Connected, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(subscription_module, "SUBSCRIBE_TIMEOUT_SEC", 0.5)
    server = f"whereis('%2F_{QUEUE.name}')"

    def errors() -> list[str]:
        return [entry["error"] for entry in logged if entry["event"] == "rabbitmq.disconnected"]

    with private.log_in_errors():
        async with connected(private.url) as made:
            await private.run_rabbitmqctl("eval", f"sys:suspend({server}).")
            async with background_tasks(consume(private.url, replying(made.publisher))):
                await wait_until(errors)
                assert set(errors()) == {f"the queue {QUEUE.name} does not answer"}
                await private.run_rabbitmqctl("eval", f"sys:resume({server}).")
                assert await made.ask(timeout_sec=60) == ListingBegun(listing_id=0)


@pytest.mark.parametrize("together", [False, True])
async def test_a_connection_without_confirms_is_replaced(
    private: PrivateRabbitMQ, connected: Connected, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(publisher, "SILENT_SEC", 0.2)
    server = f"whereis('%2F_{QUEUE.name}')"
    sent = 0

    async with connected(private.url) as made:

        async def put_elsewhere() -> None:
            while True:
                with contextlib.suppress(Disconnected):
                    await made.put(queue=FILLED)
                await asyncio.sleep(0.01)  # pace of the load, not a wait for a condition

        async def is_replaced() -> bool:
            nonlocal sent
            sent += 1
            with contextlib.suppress(Disconnected):
                if together:
                    await made.publisher.publish_all("", outgoing(1), timeout_sec=0.5)
                else:
                    await made.put(timeout_sec=0.5)
            return made.publisher._channel is not channel

        await made.put()
        channel = made.publisher._channel
        await private.run_rabbitmqctl("eval", f"sys:suspend({server}).")
        async with background_tasks(put_elsewhere()):  # the confirm of another queue is no reason to stay
            await wait_until(is_replaced)
        assert sent < BLOCKING_MESSAGES
        await private.run_rabbitmqctl("eval", f"sys:resume({server}).")
        await made.publisher.wait_connected()
        await made.put(timeout_sec=15)


async def is_refused(blocked: publisher.Publisher) -> bool:
    try:
        await blocked.publish("", QUEUE.name, encode_commands([BeginListing()]), timeout_sec=0.5)
    except Disconnected:
        return True
    return False


async def test_an_alarm_blocks_publishers_but_not_consumers(
    private: PrivateRabbitMQ, connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "SILENT_SEC", 0.2)
    received: list[Any] = []

    async def handle(_: DeliveredMessage, commands: Sequence[Any]) -> None:
        received.extend(commands)

    sent = [RecordDeletion(sandbox_id=f"alarm-{number}") for number in range(3)]
    async with connected(private.url) as made, connected(private.url) as other:
        for command in sent:
            await made.put(encode_commands([command]))
        channels = [made.publisher._channel, other.publisher._channel]
        await private.run_rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
        try:
            for blocked in (made.publisher, other.publisher):
                await wait_until(partial(is_refused, blocked))  # the alarm may begin after the command has returned
            assert [made.publisher._channel, other.publisher._channel] == channels
            async with background_tasks(consume(private.url, handle)):
                await wait_until(lambda: set(sent) <= set(received))
        finally:
            await private.run_rabbitmqctl("set_vm_memory_high_watermark", "0.4")
        await made.put(queue=FILLED, timeout_sec=15)
        await other.put(queue=FILLED, timeout_sec=15)


async def test_one_refused_message_is_enough_to_replace_the_connection(
    private: PrivateRabbitMQ, connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service may send the next message to the queue only minutes later."""
    monkeypatch.setattr(publisher, "REFUSED_SEC", 0.2)
    policy = '{"max-length": 1, "overflow": "reject-publish"}'
    await private.run_rabbitmqctl("set_policy", "--apply-to", "queues", "limit", f"^{QUEUE.name}$", policy)
    try:
        async with connected(private.url) as made:

            async def is_refused() -> bool:
                try:
                    await made.put()
                except Disconnected:
                    return True
                return False

            await wait_until(is_refused)
            channel = made.publisher._channel
            await wait_until(lambda: made.publisher._channel not in (channel, None))
    finally:
        await private.run_rabbitmqctl("clear_policy", "limit")
    await private.run_rabbitmqctl("purge_queue", QUEUE.name)


@pytest.mark.parametrize("together", [False, True])
async def test_a_channel_that_only_nacks_is_replaced(
    private: PrivateRabbitMQ, connected: Connected, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """If a limit is lifted while it is exceeded, RabbitMQ 3.10 refuses all messages on the old channel."""
    monkeypatch.setattr(publisher, "REFUSED_SEC", 0.2)
    policy = '{"max-length": 1, "overflow": "reject-publish"}'
    async with connected(private.url) as made:
        await private.run_rabbitmqctl("set_policy", "--apply-to", "queues", "limit", f"^{QUEUE.name}$", policy)
        try:

            async def refused() -> bool:
                with contextlib.suppress(Disconnected):
                    await made.put(queue=FILLED)  # the confirm of another queue is no reason to stay
                    if together:
                        return await made.publisher.publish_all("", outgoing(1)) == 0
                    await made.put()
                    return False
                return True

            async with asyncio.timeout(20):
                while not await refused():
                    pass
        finally:
            await private.run_rabbitmqctl("clear_policy", "limit")
        async with asyncio.timeout(20):
            while await refused():  # noqa: ASYNC110 (no event exists)
                await asyncio.sleep(0.05)
        await private.run_rabbitmqctl("purge_queue", QUEUE.name)


# Reconnection


async def test_a_missing_server_is_retried_with_a_growing_backoff(
    monkeypatch: pytest.MonkeyPatch, logged: list[structlog.typing.EventDict]
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def never(_: AbstractConnection) -> None:
        pytest.fail("connected to a closed port")

    monkeypatch.setattr(asyncio, "sleep", note)
    try:
        async with background_tasks(run_with_reconnect("amqp://guest:secret@127.0.0.1:1/", "test", never)):
            async with asyncio.timeout(60):
                while len(pauses) < 200:
                    await sleep(0.01)
    finally:
        monkeypatch.undo()
    assert 0.05 <= pauses[0] <= 0.2
    assert max(pauses) <= connection.MAX_BACKOFF_SEC
    assert statistics.median(pauses) >= connection.MAX_BACKOFF_SEC / 2  # the backoff restarts after a long attempt
    assert len(set(pauses)) > 100
    assert {entry["event"] for entry in logged} == {"rabbitmq.disconnected"}
    assert "secret" not in repr(logged)


async def test_a_session_that_ends_repeatedly_is_delayed(clean_queues: str) -> None:
    loop = asyncio.get_running_loop()
    began: list[float] = []

    async def session(_: AbstractConnection) -> None:
        began.append(loop.time())

    async with background_tasks(run_with_reconnect(clean_queues, "test", session)):
        await wait_until(lambda: len(began) == 4)
    assert began[-1] - began[0] > 0.1 + 0.2 + 0.4


async def test_a_conflicting_queue_is_logged_and_retried(
    clean_queues: str, logged: list[structlog.typing.EventDict]
) -> None:
    name = topology.SYNC_TICKS.name
    made = Publisher(clean_queues, "test")
    async with await aio_pika.connect(clean_queues) as opened, opened.channel() as channel:
        await channel.exchange_delete(topology.marker_name())  # another version has declared the queue
        await channel.queue_delete(name)
        await channel.declare_queue(name, durable=True)
        async with background_tasks(made.run()):
            await wait_until(lambda: logged)
            assert not made.connected
            assert logged[0]["event"] == "rabbitmq.disconnected"
            assert name in logged[0]["error"]
            await channel.queue_delete(name)
            await made.wait_connected()


@pytest.mark.parametrize("error", [TimeoutError("ours"), OSError("ours"), ValueError("ours"), KeyError("ours")])
async def test_an_error_of_the_session_is_raised(clean_queues: str, error: Exception) -> None:
    async def session(_: AbstractConnection) -> None:
        raise error

    with pytest.raises(type(error), match="ours"):
        await asyncio.wait_for(run_with_reconnect(clean_queues, "test", session), 20)


async def test_connections_have_names_on_the_server(private: PrivateRabbitMQ, connected: Connected) -> None:
    async with connected(private.url):
        listed = await private.run_rabbitmqctl("list_connections", "timeout", "client_properties")
    assert "test-publish" in listed
    assert "test-replies" in listed


@pytest.mark.parametrize(("nodes", "limits"), [(1, [5, 10, 10, 5, 10]), (2, [2, 2, 4, 4, 8, 2, 2])])
async def test_attempts_get_more_time_until_one_succeeds(
    nodes: int, limits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that is too busy to connect within the usual limit."""
    attempts: list[float] = []
    succeeding = len(limits) - 2
    done = asyncio.Event()

    async def connect(node_url: str, name: str, timeout_sec: float) -> aio_pika.Connection:
        attempts.append(timeout_sec)
        if len(attempts) == succeeding:
            return aio_pika.Connection(aio_pika.connection.make_url(node_url))
        if len(attempts) == len(limits):
            done.set()
        raise Disconnected("no answer") from TimeoutError()

    async def end(_: AbstractConnection) -> None:
        raise Disconnected("lost")

    monkeypatch.setattr(connection, "_connect_to_node", connect)
    monkeypatch.setattr(connection, "MAX_BACKOFF_SEC", 0.0)
    url = ",".join(f"amqp://node-{number}.test" for number in range(nodes))
    async with background_tasks(run_with_reconnect(url, "test", end)):
        await done.wait()
    assert attempts == limits


@pytest.mark.parametrize("silent", [False, True], ids=["answering", "silent"])
async def test_cancellation_closes_the_connections_in_bounded_time(amqp_proxy: TcpProxy, silent: bool) -> None:
    made = Bus(amqp_proxy.url)
    loop = asyncio.get_running_loop()
    async with background_tasks(
        made.publisher.run(), made.rpc_client.run(), consume(amqp_proxy.url, replying(made.publisher))
    ):
        assert await made.ask() == ListingBegun(listing_id=0)
        if silent:
            amqp_proxy.pause()
        requests = [asyncio.ensure_future(made.ask()) for _ in range(10)]
        await asyncio.sleep(0)
        cancelled_at = loop.time()
    assert loop.time() - cancelled_at < (3 * connection.CONNECT_TIMEOUT_SEC + 1 if silent else AT_ONCE_SEC)
    amqp_proxy.reset()
    amqp_proxy.resume()
    for task in requests:
        task.cancel()
    await asyncio.wait(requests)


async def test_cancellation_during_connect_leaks_no_connection(amqp_proxy: TcpProxy) -> None:
    for delay in (0, 0.001, 0.003, 0.01, 0.02, 0.03):
        made = Publisher(amqp_proxy.url, "test")
        running = asyncio.create_task(made.run())
        await asyncio.sleep(delay)
        await cancel_and_wait(running)
        assert running.cancelled()


# Metrics and ids


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_the_queue_wait_is_measured_by_queue(clean_queues: str, bus: Bus) -> None:
    before = sample("broker_queue_wait_seconds_count", queue=QUEUE.name)
    async with background_tasks(consume(clean_queues, replying(bus.publisher))):
        await bus.ask()
    assert sample("broker_queue_wait_seconds_count", queue=QUEUE.name) == before + 1
    assert sample("broker_queue_wait_seconds_sum", queue=QUEUE.name) < 3600


async def test_a_command_carries_the_request_id_of_the_log_context(clean_queues: str, bus: Bus) -> None:
    seen: list[str | None] = []

    async def handle(delivery: DeliveredMessage, commands: Sequence[Command]) -> None:
        seen.extend(command.request_id for command in commands)
        await replying(bus.publisher)(delivery, commands)

    async with background_tasks(consume(clean_queues, handle)):
        with log_context.bound(request_id="r-1"):
            await bus.ask()
            own = ClaimDeletions(request_id="r-2", run_id=uuid.UUID(int=1), limit=1, claim_sec=1)
            with pytest.raises(UnexpectedReply):
                await bus.rpc_client.request(QUEUE, own, timeout_sec=15)
        await bus.ask()
    assert seen == ["r-1", "r-2", None]


async def test_request_ids_of_expired_messages_are_logged(consuming: AbstractConnection, bus: Bus) -> None:
    subscription = await Subscription.open(consuming, QUEUE, prefetch=10)
    ids = [f"r-{number}" for number in range(120)]
    body = encode_commands([ReleaseSandbox(request_id=id_, sandbox_id="7", holder="ada") for id_ in ids])
    await bus.put(body, properties=Basic.Properties(expiration="200"))
    await bus.put(b"in time")
    await wait_until(lambda: subscription._inbox.qsize() == 2)
    await asyncio.sleep(0.25)  # longer than the expiration
    with structlog.testing.capture_logs() as logs:
        await subscription.batch(10)
    logged_ids = [line["request_ids"] for line in logs if line["event"] == "message.expired"]
    assert [id_ for line in logged_ids for id_ in line] == ids
    assert len(logged_ids) > 1


async def test_lost_connections_are_measured(amqp_proxy: TcpProxy, proxied_bus: Bus) -> None:
    assert sample("broker_rabbitmq_connected", connection="test-publish") == 1
    before = sample("broker_rabbitmq_disconnects_total", connection="test-publish")
    amqp_proxy.reset()
    await wait_until(lambda: sample("broker_rabbitmq_disconnects_total", connection="test-publish") == before + 1)
    await wait_until(lambda: sample("broker_rabbitmq_connected", connection="test-publish") == 1)


@given(
    exchange=some.sampled_from(["events", ""]),
    routing_key=some.sampled_from(["sandbox.allocated", "k" * 200]),
    body=some.binary(min_size=1, max_size=600),
    message_id=some.text(some.characters(codec="ascii"), min_size=1, max_size=255),
    hidden=some.sampled_from([None, "newest"]),
    channel=some.integers(1, 2000),
)
def test_the_frames_of_a_message_are_those_of_the_library(
    exchange: str, routing_key: str, body: bytes, message_id: str, hidden: str | None, channel: int
) -> None:
    message = OutboundMessage(routing_key, body, message_id, "text/plain", hidden_routing_key=hidden)
    properties = Basic.Properties(
        content_type="text/plain",
        delivery_mode=2,
        message_id=message_id,
        headers={"BCC": [hidden]} if hidden else None,
    )
    expected = (
        Basic.Publish(exchange=exchange, routing_key=routing_key),
        ContentHeader(properties=properties, body_size=len(body)),
        ContentBody(body),
    )
    assert message.frames(exchange, channel) == b"".join(frame.marshal(part, channel) for part in expected)
