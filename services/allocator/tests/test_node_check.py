"""Check of the allocator's RabbitMQ node by a message that has no effect."""

import asyncio

from allocator.background import node_check
from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel_and_wait

from .allocator_harness import Pool
from .bus_harness import Client, run_allocator


async def test_the_check_is_confirmed_and_has_no_effect(pool: Pool, clean_queues: str, client: Client) -> None:
    checks = 0

    class CountingPublisher(Publisher):
        async def publish(self, *arguments: object, **options: object) -> None:
            nonlocal checks
            await super().publish(*arguments, **options)  # type: ignore[arg-type]  # passed on as they are
            checks += 1

    async with run_allocator(
        clean_queues, pool.url, publisher=CountingPublisher(clean_queues, "test")
    ) as allocator:
        checking = asyncio.create_task(node_check.check_node_periodically(allocator.publisher))
        try:
            await wait_until(lambda: checks >= 2)
            assert allocator.consumer.epoch == 0  # no command has reached the allocator
            assert await client.message_count(topology.ALLOCATOR_COMMANDS.name) == 0
        finally:
            await cancel_and_wait(checking)
