"""Requests to the allocator, the only service that writes the pool."""

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Refused, Reply
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable
from sandbox_broker.messaging.rpc_client import RpcClient

REQUEST_TIMEOUT_SEC = 30.0


class CommandRefused(Exception):
    """A step was refused. Its refusal becomes the reply to the whole sync."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


async def request_reply(requester: RpcClient, command: Command, *, timeout_sec: float | None = None) -> Reply:
    """Return the allocator's reply. Raises CommandRefused for a refusal and when the allocator does not answer."""
    try:
        reply = await requester.request(
            topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=timeout_sec or REQUEST_TIMEOUT_SEC
        )
    except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: an unreadable reply
        refusal = Refused(code="ALLOCATOR_UNAVAILABLE", message=f"The allocator did not answer: {error}")
        raise CommandRefused(refusal) from error
    if isinstance(reply, Refused):
        raise CommandRefused(reply)
    return reply
