"""Deletes in CSP what was released, within the throttles, one run at a time.

A run asks the allocator for one deletion after the other. Each claim also keeps the run on duty: as long as it
lasts, no other run is given anything, on whatever replica. So the throttles hold for all replicas together, and a
run whose process has died or frozen is succeeded when its last claim ends.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass

import structlog

from reaper.asking import REQUEST_TIMEOUT_SEC, NoAnswer, ask
from reaper.circuit import State
from reaper.deletion import Deleter
from reaper.jobs import Jobs
from reaper.settings import Settings
from sandbox_broker.bus import Requester
from sandbox_broker.messages import (
    ClaimDeletions,
    DeletionsClaimed,
    DeletionsHurried,
    EndCleanup,
    HurryDeletions,
    Refused,
)

CLAIM_MARGIN_SEC = 10.0
HURRY_PIECE = 500
MIN_PAUSE_SEC = 0.2
NO_ANSWER_PAUSE_SEC = 5.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Batch:
    """What the workers of one batch share."""

    run_id: uuid.UUID
    left: int
    """Deletions that may still be begun."""
    tried: int = 0
    on_duty: bool = True
    next_in_sec: float | None = None


class CleanUp:
    def __init__(self, settings: Settings, requester: Requester, deleter: Deleter, jobs: Jobs) -> None:
        self._settings = settings
        self._requester = requester
        self._deleter = deleter
        self._jobs = jobs
        self._woken = asyncio.Event()
        self._run_id = uuid.uuid4()
        # From asking for a deletion over CSP's answer and its record to when the next is asked for.
        pause_sec = max(settings.cleanup_batch_delay_sec, settings.cleanup_per_sandbox_delay_sec)
        self._claim_sec = 3 * REQUEST_TIMEOUT_SEC + deleter.longest_sec + pause_sec + CLAIM_MARGIN_SEC

    def wake(self) -> None:
        """There may be something to delete."""
        self._woken.set()

    async def run(self) -> None:
        """Deletes whatever is due, each time it is woken or the next is due, for ever."""
        pause_sec: float | None = None
        while True:
            try:
                async with asyncio.timeout(pause_sec):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            pause_sec = await self._work_through()

    async def _work_through(self) -> float | None:
        """One run. Returns in how many seconds to look again at the latest."""
        if self._deleter.state is State.OPEN:
            return await self._give_up_for_now()
        try:
            pause_sec = await self._delete_all_due(self._run_id)
            # If we die before this, the duty ends with the last claim.
            await ask(self._requester, EndCleanup(run_id=self._run_id))
        except NoAnswer as error:
            log.warning("cleanup.postponed", error=str(error))
            message = f"The allocator did not answer: {error}. What is pending is deleted later, by itself."
            await self._jobs.fail(Refused(code="ALLOCATOR_UNAVAILABLE", message=message))
            return NO_ANSWER_PAUSE_SEC  # then the same run goes on: it may still be on duty
        self._run_id = uuid.uuid4()
        return pause_sec

    async def _delete_all_due(self, run_id: uuid.UUID) -> float | None:
        while allowed := self._allowed():
            if self._jobs.waiting and not await self._hurry(run_id):
                return MIN_PAUSE_SEC
            batch = _Batch(run_id, allowed)
            await self._work_off(batch)
            if batch.tried == 0:
                # Our claim on what CSP refused us would end before: it is another run's by now, or done.
                if not batch.on_duty or batch.next_in_sec is None or batch.next_in_sec > self._claim_sec:
                    self._deleter.refusal_is_over()
                if batch.on_duty:
                    await self._jobs.complete()
                return None if batch.next_in_sec is None else max(batch.next_in_sec, MIN_PAUSE_SEC)
            await asyncio.sleep(self._settings.cleanup_batch_delay_sec)
        return await self._give_up_for_now()

    def _allowed(self) -> int:
        """How many deletions the next batch may have."""
        return {State.CLOSED: self._settings.cleanup_batch_size, State.HALF_OPEN: 1, State.OPEN: 0}[
            self._deleter.state
        ]

    async def _give_up_for_now(self) -> float:
        pause_sec = self._deleter.half_open_in_sec
        log.warning("cleanup.paused", reason=self._deleter.obstacle, pause_sec=round(pause_sec, 1))
        message = (
            f"{self._deleter.obstacle}, so deletions pause. They go on by themselves; "
            f"the next try is in {pause_sec:.0f} s."
        )
        await self._jobs.fail(Refused(code="CSP_UNAVAILABLE", message=message))
        return pause_sec

    async def _hurry(self, run_id: uuid.UUID) -> bool:
        """Makes all due for the jobs that wait; False while another run is at work. Nothing of this run is in
        hand meanwhile."""
        jobs = self._jobs.waiting
        command = HurryDeletions(run_id=run_id, limit=HURRY_PIECE, claim_sec=self._claim_sec)
        while True:
            reply = await ask(self._requester, command)
            assert isinstance(reply, DeletionsHurried)  # noqa: S101 (the contract of HurryDeletions)
            if not reply.on_duty:
                return False
            if reply.hurried < HURRY_PIECE:
                break
        for job in jobs:
            job.begun = True
        return True

    async def _work_off(self, batch: _Batch) -> None:
        workers = (self._work(batch) for _ in range(min(self._settings.cleanup_concurrency, batch.left)))
        # Who stops does not stop the others half-way: each finishes and reports what it has begun.
        for result in await asyncio.gather(*workers, return_exceptions=True):
            if result is not None:
                raise result

    async def _work(self, batch: _Batch) -> None:
        """Deletes one after the other until the batch is used up, nothing is due, or CSP is in trouble."""
        while batch.left > 0:
            batch.left -= 1
            asked_at = time.monotonic()
            claimed = await self._claim(batch.run_id)
            if not claimed.deletions:
                batch.left, batch.on_duty, batch.next_in_sec = 0, claimed.on_duty, claimed.next_in_sec
                return
            for deletion in claimed.deletions:
                batch.tried += 1
                outcome = await self._deleter.delete(batch.run_id, deletion, asked_at + REQUEST_TIMEOUT_SEC)
                self._jobs.count(outcome)
            if self._deleter.state is not State.CLOSED:
                batch.left = 0
            await asyncio.sleep(self._settings.cleanup_per_sandbox_delay_sec)

    async def _claim(self, run_id: uuid.UUID) -> DeletionsClaimed:
        command = ClaimDeletions(run_id=run_id, limit=1, claim_sec=self._claim_sec)
        reply = await ask(self._requester, command)
        assert isinstance(reply, DeletionsClaimed)  # noqa: S101 (the contract of ClaimDeletions)
        return reply
