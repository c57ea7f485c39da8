"""Topology as data: exchanges, queues, bindings, and the commands that each exchange may carry. `declare` declares
it.

All arguments are valid from RabbitMQ 3.10 on. Limits for operators to tune belong in policies, because a changed
argument would need a new queue.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aio_pika.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity
from pydantic import BaseModel

from sandbox_broker.contract import commands
from sandbox_broker.contract.commands import Command

Service = Literal["allocator", "csp-syncer", "provisioner", "reaper"]
"""Services that consume queues."""


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: Literal["direct", "topic", "headers"]
    commands: frozenset[type[BaseModel]] = frozenset()
    """Command types allowed on the exchange."""


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    owner: Service
    """Service that consumes the queue."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    replaces: str | None = None
    """Queue of earlier versions, replaced by this queue. `connection.delete_replaced` deletes it."""


@dataclass(frozen=True, slots=True)
class Binding:
    queue: Queue
    exchange: Exchange
    routing_key: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


# Each sender of commands has its own exchange, and RabbitMQ lets no other service write to it. A service carries
# out a command only if its exchange may carry the command type. RabbitMQ names the exchange in each delivery, so a
# sender cannot forge it: docs/adr/0015-an-exchange-for-each-sender-of-commands.md.
COMMANDS = Exchange(
    "broker.commands",  # for the gateway, and for the allocator when it replays dead letters
    "direct",
    frozenset(
        {
            commands.AllocateSandbox,
            commands.ClaimLease,
            commands.ApplyPolicies,
            commands.CleanUpNow,
            commands.ConfirmRestore,
            commands.DeleteStale,
            commands.DropDeadLetter,
            commands.EndLease,
            commands.EndPlay,
            commands.EndTokenLeases,
            commands.ExtendLease,
            commands.ForgetStudent,
            commands.IssueToken,
            commands.PurgeRecords,
            commands.RecordJob,
            commands.RecordTokenUses,
            commands.ReleaseSandbox,
            commands.ReplaceSandbox,
            commands.ReplayDeadLetter,
            commands.ResumeStock,
            commands.RetryDeletion,
            commands.RevokeToken,
            commands.RotateAccessKeys,
            commands.ServeWaiting,
            commands.SuspendToken,
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
            commands.PurgeAudit,
            commands.PurgePersonalData,
            commands.PurgeRecords,
            commands.RecordJob,
            commands.RefreshSandboxes,
            commands.StageListing,
            commands.SyncPool,
        }
    ),
)
COMMANDS_FROM_PROVISIONER = Exchange(
    "broker.commands_from_provisioner",
    "direct",
    frozenset(
        {
            commands.ClaimAccess,
            commands.ClaimCreations,
            commands.EndCreations,
            commands.RecordAccess,
            commands.RecordAccessFailure,
            commands.RecordAccessRemoval,
            commands.RecordCreation,
            commands.RecordCreationFailure,
            commands.SyncPool,
        }
    ),
)
EVENTS = Exchange("broker.events", "topic")
TICKS = Exchange("broker.ticks", "direct")
DEAD_LETTERS = Exchange("broker.dead_letters", "headers")
# Each RPC client binds its own reply queue to it, by the queue's name. With the default exchange, a service that
# publishes replies could write to every queue.
REPLIES = Exchange("broker.replies", "direct")

_QUORUM: Mapping[str, Any] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,
    "x-dead-letter-exchange": DEAD_LETTERS.name,
}
_SINGLE: Mapping[str, Any] = {**_QUORUM, "x-single-active-consumer": True}

# At most one tick waits in a queue, so several replicas or an outage never pile up work. RabbitMQ dead-letters a
# dropped tick with the reason `maxlen`. No queue is bound for that reason.
_TICK: Mapping[str, Any] = {**_SINGLE, "x-max-length": 1, "x-overflow": "drop-head"}

# Two queues, so that requests of students never wait behind listings, expiry and records of deletions.
ALLOCATOR_COMMANDS = Queue("allocator.commands", "allocator", _SINGLE)
ALLOCATOR_MAINTENANCE = Queue("allocator.maintenance", "allocator", _SINGLE)
SYNCER_COMMANDS = Queue("csp-syncer.commands", "csp-syncer", _SINGLE)
REAPER_COMMANDS = Queue("reaper.commands", "reaper", _SINGLE)
SYNC_TICKS = Queue("csp-syncer.ticks.sync", "csp-syncer", _TICK, replaces="csp-syncer.ticks")
PURGE_TICKS = Queue("csp-syncer.ticks.purge", "csp-syncer", _TICK, replaces="csp-syncer.purge_ticks")
CLEANUP_TICKS = Queue("reaper.ticks.cleanup", "reaper", _TICK, replaces="reaper.cleanup_ticks")
EXPIRY_TICKS = Queue("reaper.ticks.expiry", "reaper", _TICK, replaces="reaper.expiry_ticks")
PROVISIONER_EVENTS = Queue("provisioner.events", "provisioner", _SINGLE)
STOCK_TICKS = Queue("provisioner.ticks.stock", "provisioner", _TICK)
REAPER_EVENTS = Queue("reaper.events", "reaper", _SINGLE)
DEAD_LETTER_QUEUE = Queue("broker.dead_letters", "allocator", {"x-queue-type": "quorum"})

# It keeps the newest event sandbox.allocated, so that an allocator notices a database without this lease. The
# outbox relay routes the last new lease of each batch to it. No service consumes it, so it is not one of QUEUES.
# Reading it returns the message, which counts as a delivery.
NEWEST_LEASE = Queue(
    "allocator.newest_lease",
    "allocator",
    {**_QUORUM, "x-delivery-limit": 1_000_000_000, "x-max-length": 1, "x-overflow": "drop-head"},
)

EXCHANGES: tuple[Exchange, ...] = (
    COMMANDS,
    COMMANDS_FROM_REAPER,
    COMMANDS_FROM_SYNCER,
    COMMANDS_FROM_PROVISIONER,
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
    STOCK_TICKS,
    REAPER_EVENTS,
    PROVISIONER_EVENTS,
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
    Binding(ALLOCATOR_MAINTENANCE, COMMANDS_FROM_PROVISIONER, ALLOCATOR_MAINTENANCE.name),
    Binding(SYNCER_COMMANDS, COMMANDS_FROM_PROVISIONER, SYNCER_COMMANDS.name),
    Binding(SYNC_TICKS, TICKS, SYNC_TICKS.name),
    Binding(PURGE_TICKS, TICKS, PURGE_TICKS.name),
    Binding(CLEANUP_TICKS, TICKS, CLEANUP_TICKS.name),
    Binding(EXPIRY_TICKS, TICKS, EXPIRY_TICKS.name),
    Binding(STOCK_TICKS, TICKS, STOCK_TICKS.name),
    Binding(REAPER_EVENTS, EVENTS, "sandbox.deletion_requested"),
    Binding(REAPER_EVENTS, EVENTS, "access.removed"),
    # One new lease of each batch is enough to wake the provisioner. Sending all of them would double the work of
    # RabbitMQ.
    Binding(PROVISIONER_EVENTS, EVENTS, NEWEST_LEASE.name),
    Binding(PROVISIONER_EVENTS, EVENTS, "pool.exhausted"),
    Binding(PROVISIONER_EVENTS, EVENTS, "policy.changed"),
    Binding(PROVISIONER_EVENTS, EVENTS, "waiting.started"),
    Binding(PROVISIONER_EVENTS, EVENTS, "stock.resumed"),
    Binding(PROVISIONER_EVENTS, EVENTS, "access.ended"),
    # Expired commands are dropped, because their senders have stopped waiting. Rejected messages, and messages that
    # crash their consumers repeatedly, are kept. RabbitMQ writes the reason into the header.
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


_OWNERS: Mapping[str, Service] = {queue.name: queue.owner for queue in QUEUES}


def owner_of(queue: str) -> str:
    """Return the service that consumes the queue of this name. The name of any other queue begins with its service,
    for example a queue of an earlier version in a dead letter."""
    return _OWNERS.get(queue) or queue.partition(".")[0]


def can_carry(exchange: str | None, command: Command) -> bool:
    """Return whether the exchange of this name may carry the command. False for an unknown exchange and for the
    default exchange, because its name is empty."""
    return type(command) in _COMMANDS_OF.get(exchange or "", frozenset())


_NEWEST_LEASE_BINDING = Binding(NEWEST_LEASE, EVENTS, NEWEST_LEASE.name)
# Of earlier versions: every new lease went to the queue, which doubled the processor time of RabbitMQ.
_REPLACED_BINDING = Binding(NEWEST_LEASE, EVENTS, "sandbox.allocated")


async def declare(channel: AbstractChannel) -> None:
    """Declare all exchanges, queues and bindings, and then the marker. The function is idempotent.

    Raises aio_pika.exceptions.ChannelPreconditionFailed if an exchange or queue exists with other arguments.
    """
    for exchange in EXCHANGES:
        await channel.declare_exchange(exchange.name, exchange.kind, durable=True)
    for queue in (*QUEUES, NEWEST_LEASE):
        await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
    for binding in (*BINDINGS, _NEWEST_LEASE_BINDING):
        queue_object = await channel.get_queue(binding.queue.name, ensure=False)
        await queue_object.bind(
            binding.exchange.name, binding.routing_key, arguments=dict(binding.arguments) or None
        )
    newest_lease = await channel.get_queue(_REPLACED_BINDING.queue.name, ensure=False)
    await newest_lease.unbind(_REPLACED_BINDING.exchange.name, _REPLACED_BINDING.routing_key)
    await channel.declare_exchange(marker_name(), "direct", durable=True, internal=True)


async def is_declared(channel: AbstractChannel) -> bool:
    """Return whether `declare` has completed for this topology. A refused look-up counts as True.

    The look-up needs any permission for the marker since RabbitMQ 4.3.1, and none before. A user without one may
    not declare either. The function asks for no queue, because RabbitMQ may not answer for a queue whose leader is
    frozen. It closes the channel unless the marker exists.
    """
    try:
        await channel.declare_exchange(marker_name(), passive=True)
    except ChannelNotFoundEntity:
        return False
    except ChannelAccessRefused:
        return True
    return True


def marker_name() -> str:
    """Return the name of the exchange that `declare` creates last. It differs for each topology.

    The exchange carries no message. Without a marker, only a user that may declare could see that a binding is
    missing, and RabbitMQ logs each refused declaration as an error.
    """
    described = repr(
        (
            [(exchange.name, exchange.kind) for exchange in EXCHANGES],
            [(queue.name, sorted(queue.arguments.items())) for queue in (*QUEUES, NEWEST_LEASE)],
            [
                (binding.queue.name, binding.exchange.name, binding.routing_key, sorted(binding.arguments.items()))
                for binding in (*BINDINGS, _NEWEST_LEASE_BINDING)
            ],
        )
    )
    return f"broker.topology.{hashlib.sha256(described.encode()).hexdigest()[:12]}"
