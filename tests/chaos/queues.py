"""Queues that are deleted, that overflow, and that hold what nobody can understand."""

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
from tests.chaos.faults import Act, Fault
from tests.chaos.stack import Chaos

OVERFLOW_SEC = 4.0
FLOOD = 30
"""Publishers that do not stop."""
MAX_LENGTH = 5

REPLY_QUEUE = "amq.gen-"
NAMES = '[element(4, amqqueue:get_name(Q)) || Q <- rabbit_amqqueue:list(<<"/">>)].'
"""Where list_queues asks each queue, and may wait."""
DELETE_REPLY_QUEUES = f"""
[rabbit_amqqueue:delete(Q, false, false, <<"chaos">>) || Q <- rabbit_amqqueue:list(<<"/">>),
    binary:match(element(4, amqqueue:get_name(Q)), <<"{REPLY_QUEUE}">>) =/= nomatch].
"""


def _poison() -> list[bytes]:
    """What the consumers of any queue must get over. None of it would change anything if it were understood."""
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


def _for_others() -> list[tuple[str, topology.Queue, bytes]]:
    """Sound commands that the service of the queue must not carry out, with the exchange that they come over."""
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


async def _poison_all(chaos: Chaos) -> None:
    replies = re.findall(f'{REPLY_QUEUE}[^"]+', await chaos.rabbitmq.run_rabbitmqctl("eval", NAMES))
    queues = [queue for queue in topology.QUEUES if queue is not topology.DEAD_LETTER_QUEUE]
    properties = itertools.cycle(
        (
            Basic.Properties(delivery_mode=2),
            Basic.Properties(delivery_mode=2, correlation_id="poison", reply_to="nobody", expiration="60000"),
            Basic.Properties(content_type="text/html", content_encoding="gzip", headers={"x": [{"y": "z"}, None]}),
        )
    )
    async with _channel(chaos) as channel:
        for name in (*replies, *(queue.name for queue in queues)):
            for body in _poison():
                await channel.basic_publish(body, routing_key=name, properties=next(properties))
        for exchange, queue, body in _for_others():
            await channel.basic_publish(
                body, exchange=exchange, routing_key=queue.name, properties=next(properties)
            )


async def _delete_reply_queues(chaos: Chaos) -> None:
    await chaos.rabbitmq.run_rabbitmqctl("eval", DELETE_REPLY_QUEUES)


def _overflow(how: str, behaviour: str) -> Fault:
    flooding: list[asyncio.Task[None]] = []
    queue = topology.ALLOCATOR_COMMANDS.name

    async def inject(chaos: Chaos) -> None:
        policy = json.dumps({"max-length": MAX_LENGTH, "overflow": behaviour})
        await chaos.rabbitmq.run_rabbitmqctl("set_policy", "--apply-to", "queues", "overflow", f"^{queue}$", policy)
        flooding.append(asyncio.create_task(_flood(chaos, queue)))

    async def heal(chaos: Chaos) -> None:
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        flooding.clear()
        await chaos.rabbitmq.run_rabbitmqctl("clear_policy", "overflow")

    name = f"overflow of the commands, {how}"
    return Fault(
        kind=name, name=name, touches=frozenset({"RabbitMQ"}), inject=inject, heal=heal, lasts_sec=OVERFLOW_SEC
    )


async def _flood(chaos: Chaos, queue: str) -> None:
    """Releases of what does not exist, by nobody, without end."""
    body = encode_commands([ReleaseSandbox(request_id="flood", sandbox_id="none", holder="flood")])
    exchange = topology.COMMANDS.name

    async def publish(channel: Channel) -> None:
        while True:
            with contextlib.suppress(AMQPError):  # that it is refused is the point
                await channel.basic_publish(body, exchange=exchange, routing_key=queue, mandatory=True)

    async with _channel(chaos) as channel, asyncio.TaskGroup() as publishers:
        for _ in range(FLOOD):
            publishers.create_task(publish(channel))


@contextlib.asynccontextmanager
async def _channel(chaos: Chaos) -> AsyncIterator[Channel]:
    async with chaos.connected() as connection:
        yield await open_channel(connection, confirms=True)


def faults() -> list[Fault]:
    def fault(name: str, inject: Act, served_within_sec: float) -> Fault:
        return Fault(
            kind=name,
            name=name,
            touches=frozenset({"RabbitMQ"}),
            inject=inject,
            served_within_sec=served_within_sec,
        )

    return [
        fault("reply queues deleted", _delete_reply_queues, 5),
        fault("poison in every queue", _poison_all, 5),
        _overflow("refused", "reject-publish"),
        _overflow("dropped", "drop-head"),
    ]
