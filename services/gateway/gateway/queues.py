"""Looks at every queue, for the metrics: how much waits there, for how long, and whether anybody takes it.

The gateway does that because it is there when whoever works on a queue is not. It asks by the protocol that it
speaks anyway: declaring a queue passively needs no right to it, and no management API. How old the oldest
message is RabbitMQ does not say, and where one consumer at a time may, nobody else can fetch it to see. But it
cannot be older than the last look at which the queue was empty, and where nobody consumes it is hardly younger.
"""

import time
from collections.abc import Callable

from gateway import metrics
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Publisher
from sandbox_broker.service import every

PERIOD_SEC = 5.0


class Queues:
    def __init__(self, publisher: Publisher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._publisher = publisher
        self._clock = clock
        self._empty_at: dict[str, float] = {}

    async def watch(self) -> None:
        await every(PERIOD_SEC, self.look)

    async def look(self) -> None:
        """What cannot be seen has no value: an old one would say that all is well."""
        for queue in topology.QUEUES:
            name = queue.name
            try:
                seen = await self._publisher.look(name)
            except Disconnected:
                for gauge in (metrics.QUEUE_DEPTH, metrics.QUEUE_AGE, metrics.QUEUE_CONSUMERS):
                    gauge.remove(name)
                continue
            now = self._clock()
            if seen.messages == 0 or name not in self._empty_at:
                self._empty_at[name] = now
            metrics.QUEUE_DEPTH.labels(name).set(seen.messages)
            metrics.QUEUE_AGE.labels(name).set(now - self._empty_at[name])
            metrics.QUEUE_CONSUMERS.labels(name).set(seen.consumers)
