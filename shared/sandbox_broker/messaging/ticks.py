"""Timers over RabbitMQ: every replica of a service publishes ticks, and one replica consumes them.

A tick queue holds at most one message and has a single active consumer. Therefore replicas or an outage never pile
up work, and two runs never overlap. Early ticks from other replicas are dropped, so there is one run per period. A
lost tick costs one period.
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable

import structlog
from aio_pika.abc import AbstractConnection

from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import Disconnected, delete_replaced, run_with_reconnect
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.observability import log_context, tracing
from sandbox_broker.runtime.service import run_periodically

TOLERANCE = 0.1
"""Fraction of the period by which a tick may arrive early."""

log = structlog.get_logger()


async def publish_ticks(publisher: Publisher, queue: topology.Queue, period_sec: float) -> None:
    """Publish a tick now and then once per period, until cancelled."""

    async def tick() -> None:
        try:
            await publisher.publish(topology.TICKS.name, queue.name, b"{}")
        except (Disconnected, Unroutable) as error:
            log.warning("tick.not_sent", queue=queue.name, error=str(error))

    await publisher.wait_connected()
    await run_periodically(period_sec, tick)


async def consume_ticks(
    url: str, queue: topology.Queue, period_sec: float, work: Callable[[], Awaitable[object]]
) -> None:
    """Run `work` once per period while ticks arrive, until cancelled. Delete the queue that `queue` replaces."""
    loop = asyncio.get_running_loop()
    not_before = -math.inf

    async def session(connection: AbstractConnection) -> None:
        nonlocal not_before
        subscription = await Subscription.open(connection, queue, prefetch=1)
        moved = False
        while deliveries := await subscription.batch(1):
            # Each tick tries again, because services of an earlier version may consume the old queue for a while.
            moved = moved or await delete_replaced(connection, queue)
            if loop.time() >= not_before:
                not_before = loop.time() + (1 - TOLERANCE) * period_sec
                with log_context.bound(request_id=f"tick-{secrets.token_hex(6)}"), tracing.root_span(queue.name):
                    await work()
            await subscription.ack(deliveries[0])

    await run_with_reconnect(url, queue.name, session)
