"""Private PostgreSQL and RabbitMQ servers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractIncomingMessage

from devstack import postgres, rabbitmq
from devstack.conditions import wait_until
from devstack.errors import CannotRun
from devstack.postgres import PrivatePostgres
from devstack.private import make_directory, service_account, write
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


@pytest.mark.parametrize(
    ("variable", "find", "programs"),
    [
        ("POSTGRES_BIN_DIR", postgres.find_binaries, ("initdb", "postgres")),
        ("RABBITMQ_BIN_DIR", rabbitmq.find_binaries, ("rabbitmq-server", "rabbitmqctl")),
    ],
    ids=["postgresql", "rabbitmq"],
)
def test_a_variable_names_the_directory_of_the_programs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    find: Callable[[], Path | None],
    programs: tuple[str, str],
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    first, second = programs
    (tmp_path / first).touch()
    with pytest.raises(CannotRun, match=f"{variable} is {tmp_path}, and {second} "):
        find()
    (tmp_path / second).touch()
    assert find() == tmp_path


@pytest.mark.usefixtures("rabbitmq_binaries")
async def test_a_private_rabbitmq_prefers_the_erlang_beside_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = rabbitmq.find_binaries()
    assert binaries is not None
    account = service_account("rabbitmq")
    directory = make_directory("programs", account)
    try:
        for program in binaries.iterdir():
            (directory / program.name).symlink_to(program.resolve())
        real = shutil.which("erl", path=f"{binaries}:{os.environ['PATH']}")
        (directory / "erl").unlink(missing_ok=True)
        write(directory / "erl", f'#!/bin/sh\ntouch "$HOME/erl-used"\nexec {real} "$@"\n', account, mode=0o700)
        monkeypatch.setenv("RABBITMQ_BIN_DIR", str(directory))

        async with PrivateRabbitMQ() as server:
            assert server._directory is not None
            assert (server._directory / "erl-used").exists()
    finally:
        shutil.rmtree(directory)


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
    # The segment exists until the orphaned processes have ended.
    await wait_until(lambda: segment not in shared_memory_segments())


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
