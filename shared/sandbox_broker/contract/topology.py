"""Exchanges, queues, bindings and the commands that each exchange may carry, as data, and the one function that
declares them.

Only arguments that are valid from RabbitMQ 3.10 on are declared here; limits that an operator may want to
tune belong in policies, which need no re-declaration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aio_pika.abc import AbstractChannel
from pydantic import BaseModel

from sandbox_broker.contract import commands
from sandbox_broker.contract.commands import Command


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: Literal["direct", "topic", "headers"]
    commands: frozenset[type[BaseModel]] = frozenset()
    """Types of the commands that may be sent over it."""


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    replaces: str | None = None
    """Name of the queue that earlier versions used instead. `connection.delete_replaced` deletes it."""


@dataclass(frozen=True, slots=True)
class Binding:
    queue: Queue
    exchange: Exchange
    routing_key: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


# Each sender of commands has an exchange of its own, to which RabbitMQ lets no other service write. A service
# carries out a command only if the exchange that the command was published to may carry its type. RabbitMQ names
# that exchange in each delivery, so the sender cannot forge it:
# docs/adr/0015-an-exchange-for-each-sender-of-commands.md.
COMMANDS = Exchange(
    "broker.commands",  # of the gateway, and of the allocator for the replay of dead letters
    "direct",
    frozenset(
        {
            commands.AllocateSandbox,
            commands.CleanUpNow,
            commands.DeleteStale,
            commands.DropDeadLetter,
            commands.EndLease,
            commands.PurgeRecords,
            commands.RecordJob,
            commands.ReleaseSandbox,
            commands.ReplayDeadLetter,
            commands.RetryDeletion,
            commands.SyncPool,
        }
    ),
)
COMMANDS_FROM_REAPER = Exchange(
    "broker.commands_from_reaper",
    "direct",
    frozenset(
        {
            commands.ClaimDeletions,
            commands.EndCleanup,
            commands.ExpireLeases,
            commands.HurryDeletions,
            commands.RecordDeletion,
            commands.RecordDeletionFailure,
            commands.RecordJob,
        }
    ),
)
COMMANDS_FROM_SYNCER = Exchange(
    "broker.commands_from_csp-syncer",
    "direct",
    frozenset(
        {
            commands.ApplyListing,
            commands.BeginListing,
            commands.DeleteStale,
            commands.PurgeRecords,
            commands.RecordJob,
            commands.RefreshSandboxes,
            commands.StageListing,
            commands.SyncPool,
        }
    ),
)
EVENTS = Exchange("broker.events", "topic")
TICKS = Exchange("broker.ticks", "direct")
DEAD_LETTERS = Exchange("broker.dead_letters", "headers")
# Each process that asks binds a queue of its own to it, by the queue's name. Through the default exchange, whoever
# answers could write to every queue.
REPLIES = Exchange("broker.replies", "direct")

_QUORUM: Mapping[str, Any] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,
    "x-dead-letter-exchange": DEAD_LETTERS.name,
}
_SINGLE: Mapping[str, Any] = {**_QUORUM, "x-single-active-consumer": True}

# At most one tick waits, so replicas that all publish ticks, or an outage, never pile up work. RabbitMQ gives a
# tick that it drops for the length to the dead-letter exchange with the reason `maxlen`, which no binding there
# takes.
_TICK: Mapping[str, Any] = {**_SINGLE, "x-max-length": 1, "x-overflow": "drop-head"}

# What students wait for, and what they must not wait for: pieces of listings, expiry, records of deletions.
ALLOCATOR_COMMANDS = Queue("allocator.commands", _SINGLE)
ALLOCATOR_MAINTENANCE = Queue("allocator.maintenance", _SINGLE)
SYNCER_COMMANDS = Queue("csp-syncer.commands", _SINGLE)
REAPER_COMMANDS = Queue("reaper.commands", _SINGLE)
SYNC_TICKS = Queue("csp-syncer.ticks.sync", _TICK, replaces="csp-syncer.ticks")
PURGE_TICKS = Queue("csp-syncer.ticks.purge", _TICK, replaces="csp-syncer.purge_ticks")
CLEANUP_TICKS = Queue("reaper.ticks.cleanup", _TICK, replaces="reaper.cleanup_ticks")
EXPIRY_TICKS = Queue("reaper.ticks.expiry", _TICK, replaces="reaper.expiry_ticks")
REAPER_EVENTS = Queue("reaper.events", _SINGLE)
DEAD_LETTER_QUEUE = Queue("broker.dead_letters", {"x-queue-type": "quorum"})

EXCHANGES: tuple[Exchange, ...] = (
    COMMANDS,
    COMMANDS_FROM_REAPER,
    COMMANDS_FROM_SYNCER,
    EVENTS,
    TICKS,
    DEAD_LETTERS,
    REPLIES,
)
QUEUES: tuple[Queue, ...] = (
    ALLOCATOR_COMMANDS,
    ALLOCATOR_MAINTENANCE,
    SYNCER_COMMANDS,
    REAPER_COMMANDS,
    SYNC_TICKS,
    PURGE_TICKS,
    CLEANUP_TICKS,
    EXPIRY_TICKS,
    REAPER_EVENTS,
    DEAD_LETTER_QUEUE,
)
BINDINGS: tuple[Binding, ...] = (
    Binding(ALLOCATOR_COMMANDS, COMMANDS, ALLOCATOR_COMMANDS.name),
    Binding(ALLOCATOR_MAINTENANCE, COMMANDS, ALLOCATOR_MAINTENANCE.name),
    Binding(SYNCER_COMMANDS, COMMANDS, SYNCER_COMMANDS.name),
    Binding(REAPER_COMMANDS, COMMANDS, REAPER_COMMANDS.name),
    Binding(ALLOCATOR_MAINTENANCE, COMMANDS_FROM_REAPER, ALLOCATOR_MAINTENANCE.name),
    Binding(ALLOCATOR_MAINTENANCE, COMMANDS_FROM_SYNCER, ALLOCATOR_MAINTENANCE.name),
    Binding(SYNCER_COMMANDS, COMMANDS_FROM_SYNCER, SYNCER_COMMANDS.name),
    Binding(SYNC_TICKS, TICKS, SYNC_TICKS.name),
    Binding(PURGE_TICKS, TICKS, PURGE_TICKS.name),
    Binding(CLEANUP_TICKS, TICKS, CLEANUP_TICKS.name),
    Binding(EXPIRY_TICKS, TICKS, EXPIRY_TICKS.name),
    Binding(REAPER_EVENTS, EVENTS, "sandbox.deletion_requested"),
    # A command whose sender has stopped waiting expires and is nobody's problem; what was refused or crashed
    # its consumer again and again is kept, with the reason that RabbitMQ writes into the header.
    Binding(
        DEAD_LETTER_QUEUE,
        DEAD_LETTERS,
        arguments={"x-match": "all-with-x", "x-first-death-reason": "rejected"},
    ),
    Binding(
        DEAD_LETTER_QUEUE,
        DEAD_LETTERS,
        arguments={"x-match": "all-with-x", "x-first-death-reason": "delivery_limit"},
    ),
)


_COMMANDS_OF: Mapping[str, frozenset[type[BaseModel]]] = {
    exchange.name: exchange.commands for exchange in EXCHANGES
}


def can_carry(exchange: str | None, command: Command) -> bool:
    """Whether a command of this type may be sent over the exchange of this name. False for an unknown exchange and
    for the default exchange, whose name is empty."""
    return type(command) in _COMMANDS_OF.get(exchange or "", frozenset())


async def declare(channel: AbstractChannel) -> None:
    """Declares all of it; repeating that is harmless.

    Raises aio_pika.exceptions.ChannelPreconditionFailed when something exists under the same name with other
    arguments.
    """
    for exchange in EXCHANGES:
        await channel.declare_exchange(exchange.name, exchange.kind, durable=True)
    for queue in QUEUES:
        await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
    for binding in BINDINGS:
        queue_object = await channel.get_queue(binding.queue.name, ensure=False)
        await queue_object.bind(
            binding.exchange.name, binding.routing_key, arguments=dict(binding.arguments) or None
        )
