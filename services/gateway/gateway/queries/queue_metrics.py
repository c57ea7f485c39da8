"""Queue metrics: depth, age of the oldest message, and number of consumers of each queue.

The gateway measures them because the consumers of a queue may be down. It uses passive declarations, which need no
permission on the queue and no management API. RabbitMQ does not report the age of the oldest message, and a queue
with a single active consumer delivers to no other client. The gateway therefore estimates the age: the oldest
message arrived after the gateway last saw the queue empty.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from gateway import metrics
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.queue_inspector import QueueUnavailable
from sandbox_broker.runtime.service import run_periodically

PERIOD_SEC = 5.0
ANSWER_TIMEOUT_SEC = 2.0
"""Timeout of RabbitMQ's answer about one queue."""

log = structlog.get_logger()


class QueueMetrics:
    """Polls all queues and sets their gauges."""

    def __init__(self, publisher: Publisher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._publisher = publisher
        self._clock = clock
        self._empty_at: dict[str, float] = {}
        self._unavailable: set[str] = set()

    async def watch(self) -> None:
        """Measure every PERIOD_SEC until cancelled."""
        await run_periodically(PERIOD_SEC, self.measure)

    async def measure(self) -> None:
        """Measure all queues concurrently, so that a queue without an answer does not delay the others."""
        await asyncio.gather(*(self._measure_queue(queue.name) for queue in topology.QUEUES))

    async def _measure_queue(self, name: str) -> None:
        """Set the gauges of a queue. Remove them without an answer, because an old value would hide the problem."""
        try:
            info = await self._publisher.inspect_queue(name, timeout_sec=ANSWER_TIMEOUT_SEC)
        except Disconnected as error:
            for gauge in (metrics.QUEUE_DEPTH, metrics.QUEUE_AGE, metrics.QUEUE_CONSUMERS):
                gauge.remove(name)
            if isinstance(error, QueueUnavailable) and name not in self._unavailable:
                self._unavailable.add(name)
                log.warning("queue.unavailable", queue=name, error=str(error))
            return
        if name in self._unavailable:
            self._unavailable.remove(name)
            log.info("queue.available", queue=name)
        now = self._clock()
        if info.messages == 0 or name not in self._empty_at:
            self._empty_at[name] = now
        metrics.QUEUE_DEPTH.labels(name).set(info.messages)
        metrics.QUEUE_AGE.labels(name).set(now - self._empty_at[name])
        metrics.QUEUE_CONSUMERS.labels(name).set(info.consumers)
