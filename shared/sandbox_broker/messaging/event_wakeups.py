"""Wake-ups by event: an event on the queue of a service only starts work that the database decides."""

from collections.abc import Callable
from datetime import UTC, datetime

import orjson
from aio_pika.abc import AbstractConnection

from sandbox_broker.contract import topology
from sandbox_broker.messaging.subscription import Subscription
from sandbox_broker.observability.metrics import QUEUE_WAIT

PREFETCH = 200


async def wake_on_events(queue: topology.Queue, wake: Callable[[], None], connection: AbstractConnection) -> None:
    """Call `wake` for each batch of events, until the connection is lost. A lost or repeated event does no harm,
    because the woken work asks the allocator what is due."""
    subscription = await Subscription.open(connection, queue, prefetch=PREFETCH)
    while deliveries := await subscription.batch(PREFETCH):
        wake()
        _observe_wait(queue, deliveries[0].body)
        await subscription.ack(deliveries[-1], all_before=True)


def _observe_wait(queue: topology.Queue, body: bytes) -> None:
    """Observe the age of an event, counted from the change that it reports: its time in the outbox is included."""
    try:
        happened_at = datetime.fromisoformat(orjson.loads(body)["time"])
    except (ValueError, KeyError, TypeError):
        return
    age_sec = (datetime.now(UTC) - happened_at).total_seconds()
    QUEUE_WAIT.labels(queue.name).observe(max(0.0, age_sec))
