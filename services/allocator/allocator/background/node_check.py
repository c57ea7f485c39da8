"""Check of the allocator's RabbitMQ node: a message to a quorum queue, which only a majority of the nodes confirms.

An allocator without work publishes nothing else. A node of RabbitMQ 4 that is cut off from the other nodes keeps
its clients, so without the check an allocator would wait there for commands that cannot arrive. The publisher
notices the missing confirm, and the allocator leaves the node (`leave_other_nodes`).
"""

import contextlib

from pamqp.commands import Basic

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import ServeWaiting
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.runtime import service

PERIOD_SEC = 2.0
# RabbitMQ drops the message as soon as it has confirmed it. If it is delivered before, it does no harm.
EXPIRES_AT_ONCE = Basic.Properties(content_type="application/json", delivery_mode=2, expiration="0")


async def check_node_periodically(publisher: Publisher) -> None:
    body = encode_commands([ServeWaiting()])

    async def check() -> None:
        with contextlib.suppress(Disconnected, Unroutable):  # the publisher handles the missing confirm
            await publisher.publish(topology.COMMANDS.name, topology.ALLOCATOR_COMMANDS.name, body, EXPIRES_AT_ONCE)

    await service.run_periodically(PERIOD_SEC, check)
