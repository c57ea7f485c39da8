"""Refill: create the accounts that the stock rules need, within the throttles, from one process at a time.

A refill claims one creation after the other from the allocator. Each claim also renews the leader lease of the run.
While the lease lasts, the allocator gives no creation to another run of any replica. So the throttles hold for all
replicas together. When the process of a run dies or freezes, another run takes over once the last claim has ended.

The run keeps its leader lease until its last start is a minute old. Otherwise the next run, with a throttle of its
own, could start as many creations again.
"""

import asyncio
import time
import uuid

import structlog

from provisioner import metrics
from provisioner.creation import Creator
from provisioner.settings import Settings
from provisioner.syncs import SyncRequests
from provisioner.throttle import Throttle
from sandbox_broker.contract.commands import ClaimCreations, EndCreations
from sandbox_broker.contract.replies import CreationsClaimed, DueCreation
from sandbox_broker.csp.circuit_breaker import UNAUTHORIZED, CspCircuit, State
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone

CLAIM_MARGIN_SEC = 10.0
DRY_RUN_LIMIT = 100
"""Missing creations in one log line."""
MIN_PAUSE_SEC = 1.0
"""Pause after a claim without a creation, because a class wakes the refill hundreds of times in a second."""
NO_REPLY_PAUSE_SEC = 5.0

log = structlog.get_logger()


class Refill:
    def __init__(
        self,
        settings: Settings,
        allocator: MaintenanceClient,
        creator: Creator,
        circuit: CspCircuit,
        syncs: SyncRequests,
    ) -> None:
        self._settings = settings
        self._allocator = allocator
        self._creator = creator
        self._circuit = circuit
        self._syncs = syncs
        self._throttle = Throttle(settings.create_per_minute)
        self._wake_event = asyncio.Event()
        self._run_id = uuid.uuid4()
        self._running: set[asyncio.Task[None]] = set()
        self._received: dict[int, float] = {}
        """Time of the monotonic clock at which the claim of each received creation has ended at the latest."""
        self._dry_run_names: tuple[str, ...] = ()
        # A claim lasts for its request, the attempt in CSP, and the record.
        self._claim_sec = 3 * allocator.timeout_sec + creator.max_duration_sec + CLAIM_MARGIN_SEC

    def wake(self) -> None:
        """Claim creations, because the stock may have changed."""
        self._wake_event.set()

    async def run(self) -> None:
        """Create accounts for ever: after each wake-up, and when the next creation or sync is due."""
        if not self._settings.stock_enabled:
            log.info("stock.disabled")
        pause_sec: float | None = None
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    async with asyncio.timeout(pause_sec):
                        await self._wake_event.wait()
                except TimeoutError:
                    pass
                self._wake_event.clear()
                if self._settings.stock_enabled:
                    pause_sec = await self._refill(group)

    async def _refill(self, group: asyncio.TaskGroup) -> float | None:
        """Start all creations that are due and allowed. Return the seconds until the next call at the latest, or
        None to wait for a wake-up."""
        try:
            if self._settings.stock_dry_run:
                await self._log_missing()
                return None
            return _find_earliest(await self._start_due(group), await self._syncs.request_if_due())
        except CommandNotDone as error:
            # The run keeps its id, because it may still hold the leader lease.
            log.warning("stock.postponed", error=str(error))
            return NO_REPLY_PAUSE_SEC

    async def _start_due(self, group: asyncio.TaskGroup) -> float | None:
        while len(self._running) < self._count_allowed():
            if (wait_sec := self._throttle.seconds_until_free(time.monotonic())) > 0:
                return wait_sec
            requested_at = time.monotonic()
            self._received = {key: until for key, until in self._received.items() if until > requested_at}
            claimed = await self._allocator.request(
                ClaimCreations(
                    run_id=self._run_id, limit=1, claim_sec=self._claim_sec, received=tuple(self._received)
                )
            )
            self._syncs.note_awaited(claimed)
            # Also here, because short creations may follow each other for minutes.
            await self._syncs.request_if_due()
            if not claimed.creations:
                # Not at once, although an event may have arrived during the claim.
                await asyncio.sleep(MIN_PAUSE_SEC)
                return await self._end(claimed)
            for creation in claimed.creations:
                self._throttle.record_start(time.monotonic())
                self._received[creation.creation_id] = time.monotonic() + self._claim_sec
                self._start(group, creation, requested_at + self._allocator.timeout_sec)
        if self._circuit.state is State.OPEN and not self._running:
            pause_sec = self._circuit.seconds_until_half_open
            log.warning("stock.paused", reason=self._circuit.obstacle, pause_sec=round(pause_sec, 1))
            return pause_sec
        return None  # the end of a creation wakes the refill

    def _count_allowed(self) -> int:
        """Return the number of creations that may run at once."""
        return {State.CLOSED: self._settings.create_concurrency, State.HALF_OPEN: 1, State.OPEN: 0}[
            self._circuit.state
        ]

    def _start(self, group: asyncio.TaskGroup, creation: DueCreation, begin_by: float) -> None:
        task = group.create_task(self._create(creation, begin_by))
        self._running.add(task)
        metrics.RUNNING.set(len(self._running))

        def end(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            metrics.RUNNING.set(len(self._running))
            self.wake()

        task.add_done_callback(end)

    async def _create(self, creation: DueCreation, begin_by: float) -> None:
        if await self._creator.create(self._run_id, creation, begin_by):
            self._syncs.note_created()

    async def _end(self, claimed: CreationsClaimed) -> float | None:
        """End the run if it has no work left. Return like `_refill`."""
        # This run's claim on a creation that CSP refused would have ended by then. Another run has taken it over.
        if not claimed.on_duty or claimed.next_in_sec is None or claimed.next_in_sec > self._claim_sec:
            UNAUTHORIZED.set(0)
        quiet_in_sec = self._throttle.seconds_until_empty(time.monotonic())
        if claimed.on_duty and not self._running and quiet_in_sec <= 0:
            await self._allocator.request(EndCreations(run_id=self._run_id))
            self._run_id = uuid.uuid4()
        return _find_earliest(claimed.next_in_sec, quiet_in_sec or None)

    async def _log_missing(self) -> None:
        """Log the creations that are missing, once for each change."""
        claimed = await self._allocator.request(
            ClaimCreations(run_id=self._run_id, limit=DRY_RUN_LIMIT, claim_sec=self._claim_sec, dry_run=True)
        )
        names = tuple(creation.name for creation in claimed.creations)
        if names != self._dry_run_names:
            log.info("stock.dry_run", would_create=len(names), names=names)
        self._dry_run_names = names


def _find_earliest(*seconds: float | None) -> float | None:
    """Return the shortest time, None if all are None."""
    return min((time_sec for time_sec in seconds if time_sec is not None), default=None)
