"""Bursts of requests at two allocators that both consume the queue."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import aio_pika
import pytest

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.replies import Reply

from .allocator_harness import Pool, allocate_command, granted_lease, release_command
from .bus_harness import Client, connect_client, run_allocator

BURSTS = {
    "200 students, 200 sandboxes": ([allocate_command(f"student-{number}") for number in range(200)], 200),
    "50 copies of one student": (
        [allocate_command("ann", key="k" if number % 2 else None) for number in range(50)],
        200,
    ),
    "300 students, 200 sandboxes": ([allocate_command(f"student-{number}") for number in range(300)], 200),
    "100 students, 3 copies each": ([allocate_command(f"student-{number % 100}") for number in range(300)], 100),
}


@pytest.fixture
async def two_allocators(clean_queues: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """Two active consumers, as when RabbitMQ promotes a standby while the old consumer still works."""
    arguments = topology.ALLOCATOR_COMMANDS.arguments
    assert isinstance(arguments, dict)
    connection = await aio_pika.connect(clean_queues)
    async with connection, connection.channel() as channel:

        async def delete_queues() -> None:
            for queue in topology.QUEUES:
                await channel.queue_delete(queue.name)

        await delete_queues()
        with monkeypatch.context() as patch:
            patch.delitem(arguments, "x-single-active-consumer")
            # Explicitly, because a service does not declare a topology whose marker exists from an earlier test.
            await topology.declare(channel)
            async with (
                run_allocator(clean_queues, pool.url),
                run_allocator(clean_queues, pool.url),
                connect_client(clean_queues) as client,
            ):
                yield client
        await delete_queues()
        await topology.declare(channel)


@pytest.mark.parametrize("burst", BURSTS)
async def test_concurrent_allocators_lease_each_sandbox_once(
    pool: Pool, two_allocators: Client, burst: str
) -> None:
    commands, sandboxes = BURSTS[burst]
    await pool.fill(sandboxes)

    async def send(command: AllocateSandbox) -> Reply:
        """Repeat the request like a student: on a busy machine, a reply may not be written within its second."""
        while True:
            correlation_id = await two_allocators.publish([command])
            with suppress(TimeoutError):
                ((reply,),) = await two_allocators.replies_to(correlation_id, timeout_sec=10)
                return reply

    replies = await asyncio.gather(*map(send, commands))
    leases = [granted_lease(reply) for reply in replies if reply.type == "LeaseGranted"]
    students = len({command.holder for command in commands})
    assert len({lease.sandbox_id for lease in leases}) == min(students, sandboxes)
    assert await pool.value("SELECT count(*) FROM leases") == min(students, sandboxes)
    by_student: dict[str, set[str]] = {}
    for command, reply in zip(commands, replies, strict=True):
        if reply.type == "LeaseGranted":
            by_student.setdefault(command.holder, set()).add(granted_lease(reply).sandbox_id)
    assert {len(ids) for ids in by_student.values()} == {1}
    await pool.assert_sound()


async def test_duplicate_messages_to_concurrent_allocators_take_effect_once(
    pool: Pool, two_allocators: Client
) -> None:
    students, labs = 25, 3
    await pool.fill(students * labs)

    async def student(name: str) -> None:
        for lab in range(labs):
            first = await two_allocators.publish([allocate_command(name, key=f"{name}-{lab}")], times=2)
            (lease,), (repeated,) = await two_allocators.replies_to(first, times=2)
            assert granted_lease(lease).sandbox_id == granted_lease(repeated).sandbox_id
            second = await two_allocators.publish([release_command(granted_lease(lease).sandbox_id, name)], times=2)
            (released,), (released_again,) = await two_allocators.replies_to(second, times=2)
            assert released.type == released_again.type == "SandboxReleased"

    await asyncio.gather(*(student(f"student-{number}") for number in range(students)))
    assert await pool.value("SELECT count(*) FROM leases") == students * labs
    assert await pool.value("SELECT count(*) FROM leases WHERE ended_at IS NULL") == 0
    await pool.assert_sound()
