"""Requests to the allocator, the only service that writes the pool."""

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Refused, Reply
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable
from sandbox_broker.messaging.rpc_client import RpcClient

REQUEST_TIMEOUT_SEC = 10.0


class CommandNotDone(Exception):
    """The allocator refused the command or did not answer. Due work stays due, so a later run finds it."""


async def request_reply(requester: RpcClient, command: Command) -> Reply:
    """Return the allocator's reply. Raises CommandNotDone, also for a refusal."""
    try:
        reply = await requester.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=REQUEST_TIMEOUT_SEC)
    except (Disconnected, Unroutable, TimeoutError, ValueError) as error:  # ValueError: an unreadable reply
        raise CommandNotDone(str(error)) from error
    if isinstance(reply, Refused):
        raise CommandNotDone(reply.message)
    return reply
