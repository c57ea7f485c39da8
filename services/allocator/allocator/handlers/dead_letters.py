"""Dead letters: put back into their queue, or dropped."""

import structlog

from allocator import dead_letters, domain
from allocator.writer import Writer
from sandbox_broker.contract import replies, topology
from sandbox_broker.contract.commands import DropDeadLetter, ReplayDeadLetter
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable

log = structlog.get_logger()

REPLAYABLE = frozenset(binding.queue.name for binding in topology.BINDINGS if binding.exchange is topology.COMMANDS)
"""Queues of commands only, because the sender of a letter can invent the queue in its headers."""


async def replay_dead_letter(writer: Writer, command: ReplayDeadLetter) -> Reply:
    """Published first and then forgotten: who dies in between does it again, which changes nothing, since each
    command is carried out once however often it comes."""
    letter = await dead_letters.find(writer.connection, writer.epoch, command.dead_letter_id)
    if letter is None:
        return domain.no_such_dead_letter(command.dead_letter_id)
    if letter.queue not in REPLAYABLE:
        return domain.not_replayable(letter.queue)
    if not dead_letters.has_replayable(letter):
        return domain.sent_by_service_only()
    served = await dead_letters.served(writer.connection, writer.epoch, letter)
    body, skipped = dead_letters.without_allocations(letter.body, served)
    if body is not None:
        try:
            await writer.publisher.publish(topology.COMMANDS.name, letter.queue, body, letter.properties)
        except (Disconnected, Unroutable) as error:
            return domain.not_replayed(str(error))
    await dead_letters.drop(writer.connection, writer.epoch, letter.dead_letter_id)
    log.info(
        "dead_letter.replayed",
        request_id=command.request_id,
        dead_letter_id=str(letter.dead_letter_id),
        queue=letter.queue,
        published=body is not None,
        skipped=skipped,
    )
    return replies.DeadLetterReplayed(
        dead_letter_id=letter.dead_letter_id, queue=letter.queue, published=body is not None, skipped=skipped
    )


async def drop_dead_letter(writer: Writer, command: DropDeadLetter) -> Reply:
    if not await dead_letters.drop(writer.connection, writer.epoch, command.dead_letter_id):
        return domain.no_such_dead_letter(command.dead_letter_id)
    log.info("dead_letter.dropped", request_id=command.request_id, dead_letter_id=str(command.dead_letter_id))
    return replies.Recorded(changed=True)
