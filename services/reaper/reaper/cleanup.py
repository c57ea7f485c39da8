"""Clean-up runs: delete released sandboxes in CSP within the throttles, one run at a time.

A run claims one deletion after the other from the allocator. Each claim also renews the run's leader lease. While
the lease lasts, the allocator gives no deletion to another run of any replica. So the throttles hold for all
replicas together. When the process of a run dies or freezes, another run takes over once the last claim has ended.

A run starts with the deletion that has been due longest. After a failure it prefers deletions that never failed,
and each further failure moves it to the other end of their queue. So accounts that CSP cannot delete do not block
the others, neither while the circuit breaker is closed nor while it is half open and permits one deletion. Once no
deletion is due, the next run starts with the longest due one again.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Literal

import structlog

from reaper.admin_jobs import AdminJobs
from reaper.deletion import Deleter, Outcome
from reaper.settings import Settings
from sandbox_broker.contract.commands import ClaimDeletions, EndCleanup, HurryDeletions
from sandbox_broker.contract.replies import DeletionsClaimed, refuse
from sandbox_broker.csp.circuit_breaker import State
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone

CLAIM_MARGIN_SEC = 10.0
EXPEDITE_BATCH_SIZE = 500
"""Deletions that one command makes due."""
MIN_PAUSE_SEC = 0.2
NO_REPLY_PAUSE_SEC = 5.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Batch:
    """State that the workers of one batch share."""

    run_id: uuid.UUID
    remaining: int
    """Deletions that may still start."""
    attempted: int = 0
    is_leader: bool = True
    next_in_sec: float | None = None
    """Time until the next deletion is due; None when none is pending."""


class CleanUp:
    def __init__(self, settings: Settings, allocator: MaintenanceClient, deleter: Deleter, jobs: AdminJobs) -> None:
        self._settings = settings
        self._allocator = allocator
        self._deleter = deleter
        self._jobs = jobs
        self._wake_event = asyncio.Event()
        self._run_id = uuid.uuid4()
        self._untried: Literal["oldest", "newest"] | None = None
        # A claim lasts for its request, the deletion in CSP, the record, and the pause before the next claim.
        pause_sec = max(settings.cleanup_batch_delay_sec, settings.cleanup_per_sandbox_delay_sec)
        self._claim_sec = 3 * allocator.timeout_sec + deleter.max_duration_sec + pause_sec + CLAIM_MARGIN_SEC

    def wake(self) -> None:
        """Start a run, because a deletion may be due."""
        self._wake_event.set()

    async def run(self) -> None:
        """Delete due sandboxes for ever: after each wake-up, and when the next deletion becomes due."""
        pause_sec: float | None = None
        while True:
            try:
                async with asyncio.timeout(pause_sec):
                    await self._wake_event.wait()
            except TimeoutError:
                pass
            self._wake_event.clear()
            pause_sec = await self._run_once()

    async def _run_once(self) -> float | None:
        """Do one run. Return the seconds until the next run at the latest, or None to wait for a wake-up."""
        if self._deleter.state is State.OPEN:
            return await self._pause()
        try:
            pause_sec = await self._drain(self._run_id)
            # If this process dies before this line, the leader lease ends with the last claim.
            await self._allocator.request(EndCleanup(run_id=self._run_id))
        except CommandNotDone as error:
            log.warning("cleanup.postponed", error=str(error))
            await self._jobs.fail(refuse("ALLOCATOR_UNAVAILABLE", cause="cleanup_postponed", problem=str(error)))
            # Keep the run id, because this run may still hold the leader lease.
            return NO_REPLY_PAUSE_SEC
        self._run_id = uuid.uuid4()
        return pause_sec

    async def _drain(self, run_id: uuid.UUID) -> float | None:
        """Delete until no deletion is due or the circuit breaker opens. Return like `_run_once`."""
        while batch_size := self._compute_batch_size():
            if self._jobs.waiting and not await self._expedite(run_id):
                return MIN_PAUSE_SEC
            batch = _Batch(run_id, batch_size)
            await self._run_batch(batch)
            if batch.attempted == 0:
                # This run's claim on a deletion that CSP refused would have ended by then. So another run has
                # taken it over, or it is done.
                if not batch.is_leader or batch.next_in_sec is None or batch.next_in_sec > self._claim_sec:
                    self._deleter.clear_unauthorized()
                if batch.is_leader:
                    if self._deleter.state is State.CLOSED:
                        self._untried = None
                    await self._jobs.complete()
                return None if batch.next_in_sec is None else max(batch.next_in_sec, MIN_PAUSE_SEC)
            await asyncio.sleep(self._settings.cleanup_batch_delay_sec)
        return await self._pause()

    def _compute_batch_size(self) -> int:
        """Return the number of deletions of the next batch."""
        return {State.CLOSED: self._settings.cleanup_batch_size, State.HALF_OPEN: 1, State.OPEN: 0}[
            self._deleter.state
        ]

    async def _pause(self) -> float:
        """Fail the open jobs, because the circuit breaker is open. Return the seconds until it is half open."""
        pause_sec = self._deleter.seconds_until_half_open
        log.warning("cleanup.paused", reason=self._deleter.obstacle, pause_sec=round(pause_sec, 1))
        await self._jobs.fail(
            refuse(
                "CSP_UNAVAILABLE",
                cause="deletions_paused",
                problem=self._deleter.obstacle,
                pause_sec=round(pause_sec),
            )
        )
        return pause_sec

    async def _expedite(self, run_id: uuid.UUID) -> bool:
        """Make all pending deletions due for the waiting jobs. Return False while another run is the leader.

        No worker of this run is active meanwhile.
        """
        jobs = self._jobs.waiting
        command = HurryDeletions(run_id=run_id, limit=EXPEDITE_BATCH_SIZE, claim_sec=self._claim_sec)
        while True:
            reply = await self._allocator.request(command)
            if not reply.on_duty:
                return False
            if reply.hurried < EXPEDITE_BATCH_SIZE:
                break
        for job in jobs:
            job.is_expedited = True
        return True

    async def _run_batch(self, batch: _Batch) -> None:
        workers = (self._worker(batch) for _ in range(min(self._settings.cleanup_concurrency, batch.remaining)))
        # A failing worker does not cancel the others, so each finishes and records the deletion that it began.
        for result in await asyncio.gather(*workers, return_exceptions=True):
            if result is not None:
                raise result

    async def _worker(self, batch: _Batch) -> None:
        """Delete one sandbox after the other until the batch is full, none is due, or CSP fails."""
        while batch.remaining > 0:
            batch.remaining -= 1
            requested_at = time.monotonic()
            untried = self._untried
            claimed = await self._claim(batch.run_id, untried)
            if not claimed.deletions:
                batch.remaining, batch.is_leader, batch.next_in_sec = 0, claimed.on_duty, claimed.next_in_sec
                return
            for deletion in claimed.deletions:
                batch.attempted += 1
                outcome = await self._deleter.delete(
                    batch.run_id, deletion, requested_at + self._allocator.timeout_sec
                )
                self._jobs.count_outcome(outcome)
                if outcome is Outcome.FAILED and untried == self._untried:
                    self._untried = "oldest" if untried == "newest" else "newest"
            if self._deleter.state is not State.CLOSED:
                batch.remaining = 0
            await asyncio.sleep(self._settings.cleanup_per_sandbox_delay_sec)

    async def _claim(self, run_id: uuid.UUID, untried: Literal["oldest", "newest"] | None) -> DeletionsClaimed:
        return await self._allocator.request(
            ClaimDeletions(run_id=run_id, limit=1, claim_sec=self._claim_sec, untried=untried)
        )
