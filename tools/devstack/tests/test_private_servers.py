"""Private PostgreSQL and RabbitMQ servers."""

import asyncio
from pathlib import Path

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractIncomingMessage

from devstack import postgres, rabbitmq
from devstack.postgres import PrivatePostgres
from devstack.rabbitmq import PrivateRabbitMQ

pytest_plugins = ("devstack.fixtures",)


def find_processes(directory: Path) -> list[str]:
    """Return the command lines that contain the directory."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in command:
            commands.append(command)
    return commands


def shared_memory_segments() -> set[str]:
    segments = Path("/proc/sysvipc/shm")
    return {line.split()[1] for line in segments.read_text().splitlines()[1:]} if segments.exists() else set()


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_private_postgresql_keeps_its_data_across_restarts_and_is_removed() -> None:
    async with PrivatePostgres() as server:
        directory = server._directory
        assert directory is not None
        connection = await asyncpg.connect(server.url)
        await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        await connection.close()

        await server.stop()
        assert await postgres.unavailable_reason(server.url) is not None
        await server.start()
        await server.kill()
        await server.start()

        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT number FROM kept") == 7
        await connection.close()
        await server.kill()
        segment = postgres._segment(directory / "data" / "postmaster.pid")
        assert segment is not None

    assert not directory.exists()
    assert find_processes(directory) == []
    async with asyncio.timeout(30):  # the segment exists until the orphaned processes have ended
        while segment in shared_memory_segments():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_private_postgresql_requires_its_password() -> None:
    async with PrivatePostgres() as server:
        reason = await postgres.unavailable_reason(f"postgresql://postgres:guess@127.0.0.1:{server.port}/postgres")

    assert reason is not None
    assert "password" in reason


@pytest.mark.usefixtures("rabbitmq_binaries")
async def test_a_private_rabbitmq_keeps_durable_queues_across_restarts_and_is_removed() -> None:
    async with PrivateRabbitMQ() as server:
        directory, mapper = server._directory, server._mapper
        assert directory is not None
        assert mapper is not None
        async with await aio_pika.connect(server.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("kept", durable=True, arguments={"x-queue-type": "quorum"})
            await channel.default_exchange.publish(
                aio_pika.Message(b"a", delivery_mode=aio_pika.DeliveryMode.PERSISTENT), queue.name
            )

        await server.stop()
        assert await rabbitmq.unavailable_reason(server.url) is not None
        await server.start()
        await server.kill()
        await server.start()

        async with await aio_pika.connect(server.url) as connection:
            channel = await connection.channel()
            message = await (await channel.get_queue("kept")).get(timeout=10)
            assert message.body == b"a"
        assert "sandbox-broker" in await server.run_rabbitmqctl("eval", "node().")
        with pytest.raises(RuntimeError, match="rabbitmqctl nonsense"):
            await server.run_rabbitmqctl("nonsense")

    assert not directory.exists()
    assert find_processes(directory) == []
    assert not mapper.running


async def ignore(_: AbstractIncomingMessage) -> None:
    """Consume a message without acknowledgement."""


async def test_a_consumer_of_a_queue_is_detected(amqp_url: str) -> None:
    assert not await rabbitmq.has_consumers(amqp_url, "observed")
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("observed", exclusive=False, auto_delete=True)
        assert not await rabbitmq.has_consumers(amqp_url, "observed")
        await queue.consume(ignore)
        assert await rabbitmq.has_consumers(amqp_url, "observed")
