"""PostgreSQL and RabbitMQ of our own, as `make run` and the integration tests start them."""

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


def processes_below(directory: Path) -> list[str]:
    """Command lines of processes that name the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in command:
            found.append(command)
    return found


def shared_memory_segments() -> set[str]:
    segments = Path("/proc/sysvipc/shm")
    return {line.split()[1] for line in segments.read_text().splitlines()[1:]} if segments.exists() else set()


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_private_postgresql_keeps_its_data_over_a_restart_and_a_crash_and_leaves_nothing() -> None:
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
    assert processes_below(directory) == []
    async with asyncio.timeout(30):  # its orphans notice by themselves, and hold on to it until then
        while segment in shared_memory_segments():  # noqa: ASYNC110 - the kernel tells no event
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_private_postgresql_asks_for_its_password() -> None:
    async with PrivatePostgres() as server:
        reason = await postgres.unavailable_reason(f"postgresql://postgres:guess@127.0.0.1:{server.port}/postgres")

    assert reason is not None
    assert "password" in reason


@pytest.mark.usefixtures("rabbitmq_binaries")
async def test_a_private_rabbitmq_keeps_what_is_durable_over_a_restart_and_a_crash_and_leaves_nothing() -> None:
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
    assert processes_below(directory) == []
    assert not mapper.running


async def ignore(_: AbstractIncomingMessage) -> None:
    """A consumer that leaves every message unacknowledged."""


async def test_a_queue_shows_whether_somebody_consumes_from_it(amqp_url: str) -> None:
    assert not await rabbitmq.has_consumers(amqp_url, "looked-at")
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("looked-at", exclusive=False, auto_delete=True)
        assert not await rabbitmq.has_consumers(amqp_url, "looked-at")
        await queue.consume(ignore)
        assert await rabbitmq.has_consumers(amqp_url, "looked-at")
