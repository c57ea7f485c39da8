"""Newest lease: a database without it refuses allocations."""

import asyncio
import json

import aio_pika
import pytest

from allocator.newest_lease import DatabaseBehind, NewestLease
from devstack.conditions import wait_until
from devstack.testing import NewVhost
from sandbox_broker.contract import topology

from .allocator_harness import Pool, allocate_command, granted_lease, refusal_code
from .bus_harness import Client, run_allocator, subscribe_events


async def publish_lease(client: Client, sandbox_id: str) -> None:
    """Publish the event of a lease, and wait until RabbitMQ keeps it."""
    exchange = await client.channel.get_exchange(topology.EVENTS.name, ensure=False)
    message = aio_pika.Message(f'{{"subject": "{sandbox_id}"}}'.encode())
    await exchange.publish(message, topology.NEWEST_LEASE.name)

    async def is_kept() -> bool:
        return await client.message_count(topology.NEWEST_LEASE.name) == 1

    await wait_until(is_kept)


async def test_the_newest_lease_is_read_any_number_of_times(pool: Pool, clean_queues: str, client: Client) -> None:
    await pool.lease("ann")
    database = (await pool.write_session()).connection
    newest_lease = NewestLease(clean_queues)
    await newest_lease.check(database)  # RabbitMQ knows no lease yet
    await publish_lease(client, "lost")
    for _ in range(30):
        with pytest.raises(DatabaseBehind):
            await newest_lease.check(database)
    assert await pool.value("SELECT count(database_behind_at) FROM allocator_epoch") == 1
    assert [await newest_lease.forget(), await newest_lease.forget()] == [True, False]
    await newest_lease.check(database)
    assert await pool.value("SELECT count(database_behind_at) FROM allocator_epoch") == 0


async def test_a_known_lease_and_an_unused_database_are_accepted(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    database = (await pool.write_session()).connection
    newest_lease = NewestLease(clean_queues)
    await publish_lease(client, "of another installation")
    await newest_lease.check(database)
    sandbox_id = await pool.lease("ann")
    await publish_lease(client, sandbox_id)
    await newest_lease.check(database)


async def test_without_the_queue_the_database_is_accepted(pool: Pool, new_vhost: NewVhost) -> None:
    await pool.lease("ann")
    async with new_vhost() as amqp_url:
        await NewestLease(amqp_url).check((await pool.write_session()).connection)


async def test_without_rabbitmq_only_an_unused_database_is_accepted(pool: Pool) -> None:
    database = (await pool.write_session()).connection
    newest_lease = NewestLease("amqp://127.0.0.1:1/")
    await newest_lease.check(database)
    await pool.lease("ann")
    with pytest.raises(ConnectionError):
        await newest_lease.check(database)


async def test_an_allocator_refuses_commands_of_students_until_the_lease_is_known(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    await pool.fill(2)
    await pool.lease("ann")
    await publish_lease(client, "lost")
    async with run_allocator(clean_queues, pool.url):

        async def is_refused() -> bool:  # a slow RabbitMQ is refused with another code
            return refusal_code(await client.request_one(allocate_command("bob"))) == "DATABASE_BEHIND"

        await wait_until(is_refused)
        assert await pool.value("SELECT count(*) FROM leases") == 1
        await NewestLease(clean_queues).forget()

        async def is_granted() -> bool:
            return (await client.request_one(allocate_command("bob"))).type == "LeaseGranted"

        await wait_until(is_granted)
        granted_lease(await client.request_one(allocate_command("bob")))


async def test_the_outbox_relay_keeps_the_last_lease_of_a_batch(
    pool: Pool, clean_queues: str, client: Client
) -> None:
    sandbox_ids = [await pool.lease(holder) for holder in ("ann", "bob", "cem")]
    await pool.execute("INSERT INTO outbox (type, data) VALUES ('pool.exhausted', '{}')")
    async with subscribe_events(clean_queues) as events, run_allocator(clean_queues, pool.url):
        received = [await asyncio.wait_for(events.get(), 20) for _ in range(4)]

        async def is_kept() -> bool:
            return await client.message_count(topology.NEWEST_LEASE.name) == 1

        await wait_until(is_kept)
    queue = await client.channel.get_queue(topology.NEWEST_LEASE.name)
    message = await queue.get(no_ack=True)
    assert json.loads(message.body)["subject"] == sandbox_ids[-1]
    assert [event.headers for event in received] == [{}] * 4


async def test_a_declaration_removes_the_binding_of_all_leases(
    clean_queues: str, client: Client, pool: Pool
) -> None:
    queue = await client.channel.get_queue(topology.NEWEST_LEASE.name)
    await queue.bind(topology.EVENTS.name, "sandbox.allocated")
    await topology.declare(client.channel)
    exchange = await client.channel.get_exchange(topology.EVENTS.name)
    await exchange.publish(aio_pika.Message(b"{}"), "sandbox.allocated")
    assert await client.message_count(topology.NEWEST_LEASE.name) == 0
