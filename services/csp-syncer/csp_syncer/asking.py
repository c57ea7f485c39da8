"""Asks the allocator, who alone writes the pool."""

from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Requester, Unroutable
from sandbox_broker.messages import Command, Refused, Reply

REQUEST_TIMEOUT_SEC = 30.0


class Stopped(Exception):
    """A step was refused; the refusal is the answer to all of it."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


async def ask(requester: Requester, command: Command, *, timeout_sec: float | None = None) -> Reply:
    """Any reply but a refusal; raises Stopped."""
    try:
        reply = await requester.request(
            topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=timeout_sec or REQUEST_TIMEOUT_SEC
        )
    except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: garbled
        refusal = Refused(code="ALLOCATOR_UNAVAILABLE", message=f"The allocator did not answer: {error}")
        raise Stopped(refusal) from error
    if isinstance(reply, Refused):
        raise Stopped(reply)
    return reply
