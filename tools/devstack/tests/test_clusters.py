"""RabbitMQ cluster and PostgreSQL pair."""

import asyncio
from contextlib import AsyncExitStack

import aio_pika
import asyncpg
import pytest
from aio_pika.exceptions import AMQPError

from devstack import cluster
from devstack.conditions import wait_until
from devstack.output import Terminal
from devstack.postgres_pair import PostgresPair

pytest_plugins = ("devstack.fixtures",)


@pytest.mark.usefixtures("rabbitmq_binaries", "postgres_binaries")
async def test_ended_nodes_of_the_cluster_are_replaced_and_lose_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RESTART_SEC", 0.5)
    monkeypatch.setattr(cluster, "PROMOTE_SEC", 0.5)
    async with AsyncExitStack() as stack:
        started = await cluster.start_cluster(terminal, stack)
        nodes, pair = started.rabbitmq, started.postgres
        replacing = asyncio.create_task(started.replace_ended_nodes(terminal))
        async with await aio_pika.connect(nodes.nodes[0].url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("kept", durable=True, arguments={"x-queue-type": "quorum"})
            await channel.default_exchange.publish(
                aio_pika.Message(b"a", delivery_mode=aio_pika.DeliveryMode.PERSISTENT), "kept"
            )
        await execute(pair.url, "CREATE TABLE kept AS SELECT 1 AS number")
        directories = [*(node._directory for node in nodes.nodes), pair.primary._directory]

        leader, first_primary = await nodes.find_leader("kept"), pair.primary
        killed = leader.process
        await asyncio.gather(leader.kill(), first_primary.kill())

        other = next(node for node in nodes.nodes if node is not leader)
        bodies: list[bytes] = []

        async def is_message_taken() -> bool:
            if (body := await take_message(other.url, "kept")) is not None:
                bodies.append(body)
            return bool(bodies)

        await wait_until(is_message_taken)
        assert bodies == [b"a"]
        await wait_until(lambda: pair.primary is not first_primary and leader.process is not killed)
        await nodes.wait_until_complete()
        await pair.wait_until_in_sync()
        assert await execute(pair.url, "SELECT number FROM kept") == [(1,)]
        assert not replacing.done()
        replacing.cancel()

    assert not [directory for directory in directories if directory is None or directory.exists()]


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_promoted_standby_has_every_confirmed_transaction() -> None:
    async with PostgresPair() as pair:
        first = pair.primary
        await execute(pair.url, "CREATE TABLE kept AS SELECT 1 AS number")
        await first.kill()

        await pair.promote()

        assert pair.standby is first
        await execute(pair.url, "INSERT INTO kept VALUES (2)")
        await pair.rebuild_standby()
        await pair.primary.kill()
        await pair.promote()
        assert pair.primary is first
        assert await execute(pair.url, "SELECT number FROM kept ORDER BY number") == [(1,), (2,)]


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_primary_confirms_nothing_while_its_standby_is_away() -> None:
    async with PostgresPair() as pair:
        await execute(pair.url, "CREATE TABLE kept (number int)")
        await pair.standby.stop()

        with pytest.raises(TimeoutError):
            await execute(pair.url, "INSERT INTO kept VALUES (1)", timeout_sec=1)

        await pair.standby.start()
        await pair.wait_until_in_sync()
        await execute(pair.url, "INSERT INTO kept VALUES (2)")


@pytest.mark.usefixtures("postgres_binaries")
async def test_a_frozen_primary_continues_after_the_promotion() -> None:
    async with PostgresPair() as pair:
        pair.primary.freeze()
        await pair.promote()

        pair.standby.thaw()

        assert await execute(pair.standby.url, "SHOW cluster_name") == [("server_1",)]
        assert await execute(pair.primary.url, "SHOW cluster_name") == [("server_2",)]


async def take_message(url: str, queue: str) -> bytes | None:
    """Return the body of the first message, or None while RabbitMQ elects a leader."""
    try:
        async with await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            message = await (await channel.get_queue(queue)).get(timeout=30)
            await message.ack()
            return message.body
    except AMQPError:
        return None


async def execute(url: str, statement: str, *, timeout_sec: float = 60) -> list[tuple[object, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement, timeout=timeout_sec)]
    finally:
        connection.terminate()
