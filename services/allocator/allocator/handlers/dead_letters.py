"""Dead letters: replay into their queue, or drop."""

from collections.abc import Collection, Mapping
from typing import Any

import orjson
import structlog
from pamqp.commands import Basic

from allocator import domain
from allocator.sql import dead_letters
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies, topology
from sandbox_broker.contract.codec import InvalidCommand, InvalidEnvelope, decode_commands
from sandbox_broker.contract.commands import DropDeadLetter, ReplayDeadLetter
from sandbox_broker.contract.replies import Reply, refuse
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable

log = structlog.get_logger()

REPLAYABLE = frozenset(binding.queue.name for binding in topology.BINDINGS if binding.exchange is topology.COMMANDS)
"""Queues of commands only, because the sender of a letter can invent the queue in its headers."""


async def replay_dead_letter(session: WriteSession, command: ReplayDeadLetter) -> Reply:
    """Publish the message again, then delete the dead letter.

    A crash in between publishes the message twice. Each command still takes effect once. Completed allocations are
    left out (see `remove_allocations`).
    """
    letter = await dead_letters.find(session, dead_letter_id=command.dead_letter_id)
    if letter is None:
        return refuse("DEAD_LETTER_NOT_FOUND", dead_letter_id=str(command.dead_letter_id))
    if letter["queue"] not in REPLAYABLE:
        return refuse("NOT_REPLAYABLE", cause="queue", queue=letter["queue"])
    if not _has_replayable_command(letter["body"]):
        return refuse("NOT_REPLAYABLE", cause="sender")
    body, skipped = await _remove_completed_allocations(session, letter)
    if body is not None:
        properties = Basic.Properties(
            content_type=letter["content_type"],
            delivery_mode=2,
            message_id=letter["message_id"],
            correlation_id=letter["correlation_id"],
        )
        try:
            await session.publisher.publish(topology.COMMANDS.name, letter["queue"], body, properties)
        except (Disconnected, Unroutable) as error:
            return refuse("ALLOCATOR_UNAVAILABLE", cause="not_published", problem=str(error))
    await dead_letters.delete(session, dead_letter_id=command.dead_letter_id)
    log.info(
        "dead_letter.replayed",
        request_id=command.request_id,
        dead_letter_id=str(command.dead_letter_id),
        queue=letter["queue"],
        published=body is not None,
        skipped=skipped,
    )
    return replies.DeadLetterReplayed(
        dead_letter_id=command.dead_letter_id, queue=letter["queue"], published=body is not None, skipped=skipped
    )


async def drop_dead_letter(session: WriteSession, command: DropDeadLetter) -> Reply:
    if not await dead_letters.delete(session, dead_letter_id=command.dead_letter_id):
        return refuse("DEAD_LETTER_NOT_FOUND", dead_letter_id=str(command.dead_letter_id))
    log.info("dead_letter.dropped", request_id=command.request_id, dead_letter_id=str(command.dead_letter_id))
    return replies.Recorded(changed=True)


def _has_replayable_command(body: bytes) -> bool:
    """Return whether a replay can run a command of the message.

    A replay uses the exchange of the gateway and gives no command more rights. Commands of the reaper and the
    csp-syncer are refused there.
    """
    try:
        entries = decode_commands(body)
    except InvalidEnvelope:
        return True
    return any(
        isinstance(entry, InvalidCommand) or topology.can_carry(topology.COMMANDS.name, entry) for entry in entries
    )


async def _remove_completed_allocations(
    session: WriteSession, letter: dead_letters.DeadLetterRow
) -> tuple[bytes | None, int]:
    """Return the message without the allocations of students with a lease since; see
    `remove_allocations`."""
    holders = [
        holder
        for entry in domain.raw_commands(letter["body"])
        if (holder := _holder_of_allocation(entry)) is not None
    ]
    if not holders:
        return letter["body"], 0
    served = await dead_letters.served_holders(session, holders=holders, died_at=letter["died_at"])
    return remove_allocations(letter["body"], served)


def remove_allocations(body: bytes, holders: Collection[str]) -> tuple[bytes | None, int]:
    """Return the envelope without the allocations of `holders` (None if no command is left) and their number.

    Otherwise a student would get a second sandbox after the release of the first.
    """
    if not holders:
        return body, 0
    envelope = orjson.loads(body)
    commands = [
        entry
        for entry in envelope["commands"]
        if not (isinstance(entry, dict) and _holder_of_allocation(entry) in holders)
    ]
    skipped = len(envelope["commands"]) - len(commands)
    return orjson.dumps({**envelope, "commands": commands}) if commands else None, skipped


def _holder_of_allocation(entry: Mapping[str, Any]) -> str | None:
    """Return the holder if the raw command is an allocation. PostgreSQL cannot compare a holder with NUL."""
    holder = entry.get("holder")
    return (
        holder
        if entry.get("type") == "AllocateSandbox" and isinstance(holder, str) and "\0" not in holder
        else None
    )
