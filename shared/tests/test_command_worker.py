"""Command worker: it replies to each command, and sends failed commands to the dead letters."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import CleanUpNow, Command, SyncPool
from sandbox_broker.contract.replies import PoolSynced, Refused, Reply
from sandbox_broker.messaging.command_worker import serve_commands
from sandbox_broker.messaging.connection import run_with_reconnect
from sandbox_broker.messaging.outcome import CommandRefused
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient

from .shared_harness import PATIENCE_SEC, assert_no_leaks, background_tasks

QUEUE = topology.SYNCER_COMMANDS
SYNCED = PoolSynced(synced=1, marked_stale=0, restored=0, duration_ms=1)


@pytest.fixture(autouse=True)
async def check_leaks() -> AsyncIterator[None]:
    async with assert_no_leaks():
        yield


async def handle(command: Command) -> Reply | None:
    """Handle commands like the csp-syncer. A forced sync raises an unexpected error."""
    if not isinstance(command, SyncPool):
        return None
    if command.force:
        raise KeyError("a fault of ours")
    return SYNCED


@pytest.fixture
async def rpc_client(clean_queues: str) -> AsyncIterator[RpcClient]:
    publisher = Publisher(clean_queues, "test")
    rpc_client = RpcClient(clean_queues, "test", publisher)

    async def session(connection: aio_pika.abc.AbstractConnection) -> None:
        await serve_commands(connection, QUEUE, publisher, handle)

    serving = partial(run_with_reconnect, clean_queues, "serving", session)
    async with background_tasks(publisher.run(), rpc_client.run(), serving()):
        yield rpc_client


@pytest.fixture
async def channel(clean_queues: str) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(clean_queues) as connection, connection.channel() as opened:
        yield opened


async def dead_letter(channel: AbstractChannel) -> tuple[Any, dict[str, Any]]:
    """Return the body and the headers of the next dead letter."""
    queue = await channel.get_queue(topology.DEAD_LETTER_QUEUE.name)
    async with asyncio.timeout(PATIENCE_SEC):
        while (message := await queue.get(no_ack=True, fail=False)) is None:  # noqa: ASYNC110 (no event exists)
            await asyncio.sleep(0.01)
    return json.loads(message.body), dict(message.headers)


async def ask(rpc_client: RpcClient, command: Command) -> Reply:
    """Return the reply, also if it is a refusal."""
    try:
        reply: Reply = await rpc_client.request(QUEUE, command, timeout_sec=PATIENCE_SEC)
    except CommandRefused as error:
        return error.refusal
    return reply


async def test_a_failed_command_is_dead_lettered_and_does_not_block_the_queue(
    rpc_client: RpcClient, channel: AbstractChannel
) -> None:
    for number in range(2):
        failing = SyncPool(request_id=f"r-{number}", force=True)
        reply = await ask(rpc_client, failing)
        assert isinstance(reply, Refused)
        assert reply.code == "INTERNAL_ERROR"
        assert await ask(rpc_client, SyncPool(request_id="behind")) == SYNCED
        body, headers = await dead_letter(channel)
        assert body == {"commands": [failing.model_dump()]}
        assert headers["x-first-death-queue"] == QUEUE.name
        assert headers["x-reason"] == "KeyError: 'a fault of ours'"


async def test_a_command_for_another_service_is_refused_and_dead_lettered(
    rpc_client: RpcClient, channel: AbstractChannel
) -> None:
    command = CleanUpNow(request_id="r", job_id=uuid.UUID(int=7))
    reply = await ask(rpc_client, command)
    assert isinstance(reply, Refused)
    assert reply.code == "INVALID_COMMAND"
    body, headers = await dead_letter(channel)
    assert body == {"commands": [command.model_dump(mode="json")]}
    assert headers["x-reason"] == f"CleanUpNow is not for {QUEUE.name}"


async def test_a_command_over_a_foreign_exchange_is_refused_and_dead_lettered(
    rpc_client: RpcClient, channel: AbstractChannel
) -> None:
    """The default exchange represents all exchanges that may not carry the command."""
    command = SyncPool(request_id="r", force=True)
    await channel.default_exchange.publish(aio_pika.Message(encode_commands([command])), QUEUE.name)
    body, headers = await dead_letter(channel)
    assert body == {"commands": [command.model_dump(mode="json")]}
    assert headers["x-reason"] == "SyncPool may not be sent over the exchange ''"
    assert await ask(rpc_client, SyncPool(request_id="behind")) == SYNCED


async def test_only_the_invalid_entry_of_an_envelope_is_dead_lettered(
    rpc_client: RpcClient, channel: AbstractChannel
) -> None:
    poison = {"type": "SyncPool", "version": 2, "request_id": "r"}
    commands = [poison, SyncPool(request_id="r").model_dump()]
    exchange = await channel.get_exchange(topology.COMMANDS.name, ensure=False)
    await exchange.publish(aio_pika.Message(json.dumps({"commands": commands}).encode()), QUEUE.name)
    body, headers = await dead_letter(channel)
    assert body == {"commands": [poison]}
    assert "version" in headers["x-reason"]
    assert await ask(rpc_client, SyncPool(request_id="behind")) == SYNCED
