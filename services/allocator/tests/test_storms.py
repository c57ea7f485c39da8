"""Many students at once, and two allocators that both believe they are the one."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.replies import Reply

from .allocator_harness import Pool, ask, done, granted
from .bus_harness import Client, allocator, client

STORMS = {
    "200 students, 200 sandboxes": ([ask(f"student-{number}") for number in range(200)], 200),
    "50 copies of one student": ([ask("ann", key="k" if number % 2 else None) for number in range(50)], 200),
    "300 students, 200 sandboxes": ([ask(f"student-{number}") for number in range(300)], 200),
    "100 students, 3 copies each": ([ask(f"student-{number % 100}") for number in range(300)], 100),
}


@pytest.fixture
async def two_allocators(clean_queues: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """Both consume at once, as when RabbitMQ promotes a standby while the old consumer still works."""
    arguments = topology.ALLOCATOR_COMMANDS.arguments
    assert isinstance(arguments, dict)
    connection = await aio_pika.connect(clean_queues)
    async with connection, connection.channel() as channel:

        async def forget_queues() -> None:
            for queue in topology.QUEUES:
                await channel.queue_delete(queue.name)

        await forget_queues()
        with monkeypatch.context() as patch:
            patch.delitem(arguments, "x-single-active-consumer")
            async with (
                allocator(clean_queues, pool.url),
                allocator(clean_queues, pool.url),
                client(clean_queues) as asking,
            ):
                yield asking
        await forget_queues()
        await topology.declare(channel)


@pytest.mark.parametrize("storm", STORMS)
async def test_two_allocators_that_work_at_once_lease_nothing_twice(
    pool: Pool, two_allocators: Client, storm: str
) -> None:
    commands, sandboxes = STORMS[storm]
    await pool.fill(sandboxes)

    async def send(command: AllocateSandbox) -> Reply:
        return await two_allocators.ask_one(command)

    replies = await asyncio.gather(*map(send, commands))
    leases = [granted(reply) for reply in replies if reply.type == "LeaseGranted"]
    students = len({command.holder for command in commands})
    assert len({lease.sandbox_id for lease in leases}) == min(students, sandboxes)
    assert await pool.value("SELECT count(*) FROM leases") == min(students, sandboxes)
    by_student: dict[str, set[str]] = {}
    for command, reply in zip(commands, replies, strict=True):
        if reply.type == "LeaseGranted":
            by_student.setdefault(command.holder, set()).add(granted(reply).sandbox_id)
    assert {len(ids) for ids in by_student.values()} == {1}
    await pool.sound()


async def test_students_come_and_go_under_two_allocators_with_every_message_delivered_twice(
    pool: Pool, two_allocators: Client
) -> None:
    students, labs = 25, 3
    await pool.fill(students * labs)

    async def student(name: str) -> None:
        for lab in range(labs):
            first = await two_allocators.publish([ask(name, key=f"{name}-{lab}")], times=2)
            (lease,), (again,) = await two_allocators.answers(first, times=2)
            assert granted(lease).sandbox_id == granted(again).sandbox_id
            second = await two_allocators.publish([done(granted(lease).sandbox_id, name)], times=2)
            (over,), (over_again,) = await two_allocators.answers(second, times=2)
            assert over.type == over_again.type == "SandboxReleased"

    await asyncio.gather(*(student(f"student-{number}") for number in range(students)))
    assert await pool.value("SELECT count(*) FROM leases") == students * labs
    assert await pool.value("SELECT count(*) FROM leases WHERE ended_at IS NULL") == 0
    await pool.sound()
