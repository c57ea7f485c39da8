"""Topology on a real server: declarations, and the routing of dead letters."""

import asyncio
from collections.abc import AsyncIterator
from typing import get_args

import aio_pika
import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import ChannelPreconditionFailed

from sandbox_broker.contract import commands, topology
from sandbox_broker.contract.topology import Queue

PATIENCE_SEC = 60.0
COMMANDS = (topology.ALLOCATOR_COMMANDS, topology.SYNCER_COMMANDS)
TICKS = (
    topology.SYNC_TICKS,
    topology.PURGE_TICKS,
    topology.CLEANUP_TICKS,
    topology.EXPIRY_TICKS,
    topology.STOCK_TICKS,
)
DEAD_LETTERING = (*COMMANDS, topology.REAPER_EVENTS, topology.PROVISIONER_EVENTS, *TICKS)


@pytest.fixture
async def channel(clean_queues: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as opened:
        await opened.set_qos(prefetch_count=1)
        yield opened


async def put(channel: AbstractChannel, queue: Queue, body: bytes, **properties: float) -> None:
    await channel.default_exchange.publish(
        Message(body, delivery_mode=2, **properties),  # type: ignore[arg-type]
        routing_key=queue.name,
    )


async def take(channel: AbstractChannel, queue: Queue) -> AbstractIncomingMessage:
    """Consume the next message, unacknowledged. basic.get fails on queues with a single active consumer."""
    opened = await channel.get_queue(queue.name, ensure=False)
    taken: asyncio.Future[AbstractIncomingMessage] = asyncio.get_running_loop().create_future()

    async def deliver(message: AbstractIncomingMessage) -> None:
        taken.set_result(message)

    async with asyncio.timeout(PATIENCE_SEC):
        consumer = await opened.consume(deliver)
        message = await taken
        await opened.cancel(consumer)
    return message


async def length(channel: AbstractChannel, queue: Queue) -> int:
    declared = await channel.declare_queue(queue.name, passive=True)
    return declared.declaration_result.message_count or 0


async def test_declare_is_idempotent(channel: AbstractChannel) -> None:
    await put(channel, topology.DEAD_LETTER_QUEUE, b"kept")
    await topology.declare(channel)
    await topology.declare(channel)
    assert (await take(channel, topology.DEAD_LETTER_QUEUE)).body == b"kept"


async def test_the_topology_is_complete_after_its_declaration(channel: AbstractChannel) -> None:
    assert await topology.is_declared(channel)
    await channel.exchange_delete(topology.marker_name())  # as after a declaration that was interrupted
    assert not await topology.is_declared(channel)


def test_each_topology_has_its_own_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services of a new version declare a binding that is added to existing queues and exchanges."""
    earlier = topology.marker_name()
    monkeypatch.setattr(topology, "BINDINGS", topology.BINDINGS[1:])
    assert topology.marker_name() != earlier


async def test_declare_fails_for_a_queue_with_other_arguments(channel: AbstractChannel, clean_queues: str) -> None:
    await channel.queue_delete(topology.SYNC_TICKS.name)
    await channel.declare_queue(topology.SYNC_TICKS.name, durable=True)
    with pytest.raises(ChannelPreconditionFailed, match=topology.SYNC_TICKS.name):
        await topology.declare(channel)
    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as another:
        await another.queue_delete(topology.SYNC_TICKS.name)  # so that later tests declare it correctly


def test_bindings_and_dead_letter_exchanges_refer_to_declared_names() -> None:
    exchanges = {exchange.name for exchange in topology.EXCHANGES}
    assert len(exchanges) == len(topology.EXCHANGES)
    assert len({queue.name for queue in topology.QUEUES}) == len(topology.QUEUES)
    for binding in topology.BINDINGS:
        assert binding.queue in topology.QUEUES
        assert binding.exchange in topology.EXCHANGES
    assert {binding.queue.name for binding in topology.BINDINGS} == {queue.name for queue in topology.QUEUES}
    for queue in topology.QUEUES:
        assert queue.arguments.get("x-dead-letter-exchange", topology.DEAD_LETTERS.name) in exchanges


@pytest.mark.parametrize(
    ("queue", "service"),
    [
        *((queue.name, queue.owner) for queue in topology.QUEUES),
        (topology.DEAD_LETTER_QUEUE.name, "allocator"),
        *((queue.replaces, queue.owner) for queue in topology.QUEUES if queue.replaces),
        ("forged", "forged"),
        ("", ""),
    ],
)
def test_the_owner_of_a_queue_name_is_its_consumer(queue: str, service: str) -> None:
    assert topology.owner_of(queue) == service


SENDERS = (
    topology.COMMANDS,
    topology.COMMANDS_FROM_REAPER,
    topology.COMMANDS_FROM_SYNCER,
    topology.COMMANDS_FROM_PROVISIONER,
)


def test_every_command_has_an_exchange_that_may_carry_it() -> None:
    carried = set().union(*(exchange.commands for exchange in SENDERS))
    assert carried == set(get_args(get_args(commands.AnyCommand)[0]))
    assert [exchange for exchange in topology.EXCHANGES if exchange.commands] == list(SENDERS)


def test_exchanges_share_only_commands_of_administrators() -> None:
    reaper, syncer = topology.COMMANDS_FROM_REAPER.commands, topology.COMMANDS_FROM_SYNCER.commands
    assert topology.COMMANDS.commands & reaper == {commands.RecordJob}
    assert topology.COMMANDS.commands & syncer == {
        commands.DeleteStale,
        commands.PurgeRecords,
        commands.RecordJob,
        commands.SyncPool,
    }
    assert reaper & syncer == {commands.RecordJob}
    provisioner = topology.COMMANDS_FROM_PROVISIONER.commands
    for others in (topology.COMMANDS.commands, syncer):
        assert provisioner & others == {commands.SyncPool}
    assert not provisioner & reaper


@pytest.mark.parametrize("exchange", ["", "amq.direct", topology.REPLIES.name, topology.EVENTS.name, None])
def test_other_exchanges_carry_no_commands(exchange: str | None) -> None:
    assert not topology.can_carry(exchange, commands.AllocateSandbox(request_id="r", holder="ann"))
    assert not topology.can_carry(exchange, commands.BeginListing())


@pytest.mark.parametrize("queue", topology.QUEUES, ids=lambda queue: queue.name)
def test_every_queue_is_a_quorum_queue(queue: Queue) -> None:
    """The default would be a classic queue, which is down while its node is down."""
    assert queue.arguments["x-queue-type"] == "quorum"


@pytest.mark.parametrize("queue", DEAD_LETTERING, ids=lambda queue: queue.name)
def test_work_queues_have_a_delivery_limit(queue: Queue) -> None:
    assert 1 <= queue.arguments["x-delivery-limit"] <= 100
    assert queue.arguments["x-dead-letter-exchange"] == topology.DEAD_LETTERS.name


@pytest.mark.parametrize("queue", [*COMMANDS, *TICKS], ids=lambda queue: queue.name)
def test_commands_and_ticks_have_one_consumer_at_a_time(queue: Queue) -> None:
    assert queue.arguments["x-single-active-consumer"] is True


@pytest.mark.parametrize("queue", DEAD_LETTERING, ids=lambda queue: queue.name)
async def test_a_rejected_message_is_dead_lettered_with_its_reason(channel: AbstractChannel, queue: Queue) -> None:
    await put(channel, queue, b"poison")
    await (await take(channel, queue)).reject(requeue=False)
    dead = await take(channel, topology.DEAD_LETTER_QUEUE)
    assert dead.body == b"poison"
    assert dead.headers["x-first-death-reason"] == "rejected"
    assert dead.headers["x-first-death-queue"] == queue.name


async def test_an_expired_message_is_dropped(channel: AbstractChannel) -> None:
    await put(channel, topology.ALLOCATOR_COMMANDS, b"too late", expiration=0.001)
    async with asyncio.timeout(PATIENCE_SEC):
        while await length(channel, topology.ALLOCATOR_COMMANDS):  # noqa: ASYNC110 (no event exists)
            await asyncio.sleep(0.01)
    # A later message through the same exchange has arrived, so the expired message would have arrived too.
    await put(channel, topology.ALLOCATOR_COMMANDS, b"poison")
    await (await take(channel, topology.ALLOCATOR_COMMANDS)).reject(requeue=False)
    assert (await take(channel, topology.DEAD_LETTER_QUEUE)).body == b"poison"
    assert await length(channel, topology.DEAD_LETTER_QUEUE) == 0


async def test_a_message_that_crashes_its_consumer_repeatedly_is_dead_lettered(
    channel: AbstractChannel, clean_queues: str
) -> None:
    """A crash closes the channel. RabbitMQ 4.3 counts only these returns, not a basic.nack with requeue."""
    queue = topology.ALLOCATOR_COMMANDS
    await put(channel, queue, b"crash")
    await put(channel, queue, b"behind it")
    crashes = 0
    async with await aio_pika.connect(clean_queues) as connection:
        while True:
            async with connection.channel() as crashing:
                await crashing.set_qos(prefetch_count=1)
                body = (await take(crashing, queue)).body
            if body != b"crash":
                break
            crashes += 1
    assert body == b"behind it"
    assert crashes == queue.arguments["x-delivery-limit"] + 1
    dead = await take(channel, topology.DEAD_LETTER_QUEUE)
    assert (dead.body, dead.headers["x-first-death-reason"]) == (b"crash", "delivery_limit")


async def test_a_poison_message_does_not_block_later_messages(channel: AbstractChannel) -> None:
    for body in (b"1", b"poison", b"3"):
        await put(channel, topology.ALLOCATOR_COMMANDS, body)
    done = []
    for _ in range(3):
        message = await take(channel, topology.ALLOCATOR_COMMANDS)
        if message.body == b"poison":
            await message.reject(requeue=False)
        else:
            done.append(message.body)
            await message.ack()
    assert done == [b"1", b"3"]
    assert (await take(channel, topology.DEAD_LETTER_QUEUE)).body == b"poison"


async def test_one_command_of_an_envelope_can_be_dead_lettered(channel: AbstractChannel) -> None:
    exchange = await channel.get_exchange(topology.DEAD_LETTERS.name, ensure=False)
    await exchange.publish(
        Message(b"poison", headers={"x-first-death-reason": "rejected", "x-reason": "unknown type"}), routing_key=""
    )
    dead = await take(channel, topology.DEAD_LETTER_QUEUE)
    assert (dead.body, dead.headers["x-reason"]) == (b"poison", "unknown type")


@pytest.mark.parametrize("queue", TICKS, ids=lambda queue: queue.name)
async def test_at_most_one_tick_waits_in_a_queue(channel: AbstractChannel, queue: Queue) -> None:
    exchange = await channel.get_exchange(topology.TICKS.name, ensure=False)
    for number in range(20):
        await exchange.publish(Message(b"%d" % number), routing_key=queue.name)
    assert await length(channel, queue) == 1
    assert (await take(channel, queue)).body == b"19"
    assert await length(channel, queue) == 0


async def test_a_replaced_tick_is_not_dead_lettered(channel: AbstractChannel) -> None:
    exchange = await channel.get_exchange(topology.TICKS.name, ensure=False)
    all_dead = await channel.declare_queue(exclusive=True)
    for match in ("maxlen", "rejected"):
        await all_dead.bind(
            topology.DEAD_LETTERS.name, arguments={"x-match": "all-with-x", "x-first-death-reason": match}
        )
    for number in range(20):
        await exchange.publish(Message(b"%d" % number), routing_key=topology.SYNC_TICKS.name)
    await (await take(channel, topology.SYNC_TICKS)).reject(requeue=False)
    # RabbitMQ dead-letters in order, so the replaced ticks come before the rejected tick.
    seen: list[tuple[bytes, object]] = []
    async with asyncio.timeout(PATIENCE_SEC), all_dead.iterator(no_ack=True) as messages:
        async for message in messages:
            seen.append((message.body, message.headers["x-first-death-reason"]))
            if len(seen) == 20:
                break
    assert seen == [*((b"%d" % number, "maxlen") for number in range(19)), (b"19", "rejected")]
    assert (await take(channel, topology.DEAD_LETTER_QUEUE)).body == b"19"
    assert await length(channel, topology.DEAD_LETTER_QUEUE) == 0


async def test_the_reaper_receives_only_deletion_requests(channel: AbstractChannel) -> None:
    exchange = await channel.get_exchange(topology.EVENTS.name, ensure=False)
    for event in ("sandbox.allocated", "sandbox.deletion_requested", "sandbox.deleted"):
        await exchange.publish(Message(event.encode()), routing_key=event, mandatory=False)
    assert (await take(channel, topology.REAPER_EVENTS)).body == b"sandbox.deletion_requested"
    assert await length(channel, topology.REAPER_EVENTS) == 0
