"""What the reaper asks of the allocator, and waits for."""

from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Requester, Unroutable
from sandbox_broker.messages import Command, Refused, Reply

REQUEST_TIMEOUT_SEC = 10.0


class NoAnswer(Exception):
    """The allocator did not do what was asked; whatever is due stays due, and is found again."""


async def ask(requester: Requester, command: Command) -> Reply:
    """Raises NoAnswer, also for a refusal."""
    try:
        reply = await requester.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=REQUEST_TIMEOUT_SEC)
    except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: garbled
        raise NoAnswer(str(error)) from error
    if isinstance(reply, Refused):
        raise NoAnswer(reply.message)
    return reply
