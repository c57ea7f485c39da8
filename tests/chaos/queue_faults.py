"""Queues that are deleted, overflow, or contain unreadable messages."""

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from aiormq.channel import Channel
from aiormq.exceptions import AMQPError
from pamqp.commands import Basic

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import AllocateSandbox, ReleaseSandbox, StageListing, SyncPool
from sandbox_broker.messaging.connection import open_channel
from tests.chaos.faults import Fault, FaultAction
from tests.chaos.stack import ChaosBroker

OVERFLOW_SEC = 4.0
FLOOD_PUBLISHERS = 30
MAX_LENGTH = 5

REPLY_QUEUE = "amq.gen-"
LIST_QUEUE_NAMES = '[element(4, amqqueue:get_name(Q)) || Q <- rabbit_amqqueue:list(<<"/">>)].'
"""Read the names from the database of RabbitMQ, because list_queues calls every queue process and may block."""
DELETE_REPLY_QUEUES = f"""
[rabbit_amqqueue:delete(Q, false, false, <<"chaos">>) || Q <- rabbit_amqqueue:list(<<"/">>),
    binary:match(element(4, amqqueue:get_name(Q)), <<"{REPLY_QUEUE}">>) =/= nomatch].
"""


def _build_poison_bodies() -> list[bytes]:
    """Build message bodies that every consumer must survive. Even executed they would have no effect."""
    allocate = AllocateSandbox(request_id="poison", holder="poison").model_dump()
    entries: list[Any] = [
        None,
        7,
        "nonsense",
        [],
        {},
        {"type": "Unheard"},
        {**allocate, "version": 99},
        {**allocate, "holder": None},
        {**allocate, "holder": "new\nline"},
        {**allocate, "holder": "x" * 10_000},
        {**allocate, "idempotency_key": ["a", "list"]},
        {"type": "ReleaseSandbox", "request_id": "poison", "sandbox_id": "\0", "holder": "poison"},
        {"type": "ClaimDeletions", "run_id": "none", "limit": 1, "claim_sec": 1},
        {"type": "ExpireLeases", "grace_sec": 1e300, "limit": 1},
        {"type": "RecordDeletionFailure", "attempts": 2**70},
        {"type": "RefreshSandboxes", "listing_id": 2**70, "limit": 1},
    ]
    strange_replies = [
        b'{"replies": []}',
        b'{"replies": [{"type": "LeaseGranted"}]}',
    ]
    return [
        b"",
        b"\0",
        b"\xff\xfe\0\xd8",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"commands": null}',
        b'{"commands": []}',
        b'{"commands": 7}',
        b'{"commands": [NaN]}',
        b'{"commands": [1e999]}',
        b'{"commands": ["\\ud800"]}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"commands": [' + b"[" * 5_000 + b"]" * 5_000 + b"]}",
        b'"' + b"x" * (1 << 20) + b'"',
        *(json.dumps({"commands": [entry]}).encode() for entry in entries),
        json.dumps({"commands": [*entries, *entries]}).encode(),
        json.dumps({"commands": [{"type": "Unheard"}] * 1_000}).encode(),
        *strange_replies,
    ]


def _build_misrouted_commands() -> list[tuple[str, topology.Queue, bytes]]:
    """Build valid commands that the service of the queue must not execute, as (exchange name, queue, body)."""
    commands, default = topology.COMMANDS.name, ""
    allocate = encode_commands([AllocateSandbox(request_id="poison", holder="poison")])
    stage = encode_commands([StageListing(listing_id=1, accounts=())])
    return [
        (commands, topology.ALLOCATOR_COMMANDS, encode_commands([SyncPool(request_id="poison")])),
        (commands, topology.ALLOCATOR_MAINTENANCE, allocate),
        (commands, topology.ALLOCATOR_MAINTENANCE, stage),
        (default, topology.ALLOCATOR_COMMANDS, allocate),
        (commands, topology.SYNCER_COMMANDS, allocate),
        (commands, topology.REAPER_COMMANDS, allocate),
        (default, topology.REAPER_EVENTS, stage),
    ]


async def _publish_poison(broker: ChaosBroker) -> None:
    replies = re.findall(f'{REPLY_QUEUE}[^"]+', await broker.rabbitmq.run_rabbitmqctl("eval", LIST_QUEUE_NAMES))
    queues = [queue for queue in topology.QUEUES if queue is not topology.DEAD_LETTER_QUEUE]
    properties = itertools.cycle(
        (
            Basic.Properties(delivery_mode=2),
            Basic.Properties(delivery_mode=2, correlation_id="poison", reply_to="nobody", expiration="60000"),
            Basic.Properties(content_type="text/html", content_encoding="gzip", headers={"x": [{"y": "z"}, None]}),
        )
    )
    async with _open_confirm_channel(broker) as channel:
        for name in (*replies, *(queue.name for queue in queues)):
            for body in _build_poison_bodies():
                await channel.basic_publish(body, routing_key=name, properties=next(properties))
        for exchange, queue, body in _build_misrouted_commands():
            await channel.basic_publish(
                body, exchange=exchange, routing_key=queue.name, properties=next(properties)
            )


async def _delete_reply_queues(broker: ChaosBroker) -> None:
    await broker.rabbitmq.run_rabbitmqctl("eval", DELETE_REPLY_QUEUES)


def _build_overflow_fault(effect: str, overflow_policy: str) -> Fault:
    flood_tasks: list[asyncio.Task[None]] = []
    queue = topology.ALLOCATOR_COMMANDS.name

    async def inject(broker: ChaosBroker) -> None:
        policy = json.dumps({"max-length": MAX_LENGTH, "overflow": overflow_policy})
        await broker.rabbitmq.run_rabbitmqctl(
            "set_policy", "--apply-to", "queues", "overflow", f"^{queue}$", policy
        )
        flood_tasks.append(asyncio.create_task(_flood(broker, queue)))

    async def heal(broker: ChaosBroker) -> None:
        for task in flood_tasks:
            task.cancel()
        await asyncio.gather(*flood_tasks, return_exceptions=True)
        flood_tasks.clear()
        await broker.rabbitmq.run_rabbitmqctl("clear_policy", "overflow")

    name = f"overflow of the commands, {effect}"
    return Fault(
        kind=name, name=name, affects=frozenset({"RabbitMQ"}), inject=inject, heal=heal, duration_sec=OVERFLOW_SEC
    )


async def _flood(broker: ChaosBroker, queue: str) -> None:
    """Publish releases of an unknown sandbox without end."""
    body = encode_commands([ReleaseSandbox(request_id="flood", sandbox_id="none", holder="flood")])
    exchange = topology.COMMANDS.name

    async def publish(channel: Channel) -> None:
        while True:
            with contextlib.suppress(AMQPError):  # the refusal is the purpose of this fault
                await channel.basic_publish(body, exchange=exchange, routing_key=queue, mandatory=True)

    async with _open_confirm_channel(broker) as channel, asyncio.TaskGroup() as publishers:
        for _ in range(FLOOD_PUBLISHERS):
            publishers.create_task(publish(channel))


@contextlib.asynccontextmanager
async def _open_confirm_channel(broker: ChaosBroker) -> AsyncIterator[Channel]:
    async with broker.connect_to_rabbitmq() as connection:
        yield await open_channel(connection, confirms=True)


def list_faults() -> list[Fault]:
    def build_fault(name: str, inject: FaultAction, served_within_sec: float) -> Fault:
        return Fault(
            kind=name,
            name=name,
            affects=frozenset({"RabbitMQ"}),
            inject=inject,
            served_within_sec=served_within_sec,
        )

    return [
        build_fault("reply queues deleted", _delete_reply_queues, 5),
        build_fault("poison in every queue", _publish_poison, 5),
        _build_overflow_fault("refused", "reject-publish"),
        _build_overflow_fault("dropped", "drop-head"),
    ]
