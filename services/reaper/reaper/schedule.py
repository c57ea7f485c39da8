"""When the reaper works: on its ticks, as soon as an event tells of a release, and when an administrator asks."""

from datetime import UTC, datetime

import orjson
from aio_pika.abc import AbstractConnection

from reaper.cleanup import CleanUp
from reaper.handlers import clean_up_now
from reaper.jobs import Jobs
from sandbox_broker import topology
from sandbox_broker.bus import Publisher, Subscription
from sandbox_broker.messages import CleanUpNow, Command, Reply
from sandbox_broker.metrics import QUEUE_WAIT
from sandbox_broker.serving import serve

PREFETCH = 200


class Schedule:
    def __init__(self, cleanup: CleanUp, jobs: Jobs, publisher: Publisher) -> None:
        self._cleanup = cleanup
        self._jobs = jobs
        self._publisher = publisher

    async def cleanup_tick(self) -> None:
        self._cleanup.wake()

    async def events(self, connection: AbstractConnection) -> None:
        """An event only wakes; what is due is asked of the allocator, so a lost or repeated one is harmless."""
        subscription = await Subscription.open(connection, topology.REAPER_EVENTS, prefetch=PREFETCH)
        while deliveries := await subscription.batch(PREFETCH):
            self._cleanup.wake()
            _observe_wait(deliveries[0].body)
            await subscription.ack(deliveries[-1], all_before=True)

    async def commands(self, connection: AbstractConnection) -> None:
        async def handle(command: Command) -> Reply | None:
            if isinstance(command, CleanUpNow):
                return await clean_up_now(self._cleanup, self._jobs, command)
            return None

        await serve(connection, topology.REAPER_COMMANDS, self._publisher, handle)


def _observe_wait(body: bytes) -> None:
    """An event is as old as what it tells of; the way through the outbox counts."""
    try:
        happened_at = datetime.fromisoformat(orjson.loads(body)["time"])
    except (ValueError, KeyError, TypeError):
        return
    age_sec = (datetime.now(UTC) - happened_at).total_seconds()
    QUEUE_WAIT.labels(topology.REAPER_EVENTS.name).observe(max(0.0, age_sec))
