"""When the reaper works: on its ticks, and as soon as an event tells of a release."""

from aio_pika.abc import AbstractConnection

from reaper.handlers import Reaper
from sandbox_broker import topology
from sandbox_broker.bus import Subscription

PREFETCH = 200


class Schedule:
    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    async def cleanup_tick(self) -> None:
        self._reaper.wake()

    async def events(self, connection: AbstractConnection) -> None:
        """An event only wakes; what is due is asked of the allocator, so a lost or repeated one is harmless."""
        subscription = await Subscription.open(connection, topology.REAPER_EVENTS, prefetch=PREFETCH)
        while deliveries := await subscription.batch(PREFETCH):
            self._reaper.wake()
            await subscription.ack(deliveries[-1], all_before=True)
