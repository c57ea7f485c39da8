"""Clean-up jobs that administrators started with POST /v1/admin/cleanup."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field

import structlog

from reaper.deletion import Outcome
from sandbox_broker.contract.commands import RecordJob
from sandbox_broker.contract.replies import CleanedUp, Refused
from sandbox_broker.contract.types import JobState
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.outcome import CommandNotDone
from sandbox_broker.observability import log_context
from sandbox_broker.runtime.service import run_periodically

REPORT_PERIOD_SEC = 10.0
"""Period of progress reports. The gateway shows a job without reports for two minutes as failed."""

log = structlog.get_logger()

JobReply = CleanedUp | Refused


@dataclass(slots=True)
class Job:
    job_id: uuid.UUID
    reply: asyncio.Future[JobReply]
    request_id: str
    is_expedited: bool = False
    """All pending deletions were made due for this job, so it counts deletions from now on."""
    deleted: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)


class AdminJobs:
    """Open jobs. One clean-up run works for all of them."""

    def __init__(self, allocator: MaintenanceClient) -> None:
        self._allocator = allocator
        self._jobs: dict[uuid.UUID, Job] = {}

    def join(self, job_id: uuid.UUID, request_id: str) -> asyncio.Future[JobReply]:
        """Add the job, and return the future of its reply. A repeated command gets the same future."""
        if job_id not in self._jobs:
            self._jobs[job_id] = Job(job_id, asyncio.get_running_loop().create_future(), request_id)
            log.info("job.joined", job_id=str(job_id))
        return self._jobs[job_id].reply

    @property
    def waiting(self) -> list[Job]:
        """Jobs whose pending deletions were not made due yet."""
        return [job for job in self._jobs.values() if not job.is_expedited]

    def count_outcome(self, outcome: Outcome) -> None:
        for job in self._jobs.values():
            if job.is_expedited:
                job.deleted += outcome is Outcome.DELETED
                job.failed += outcome is Outcome.FAILED

    async def complete(self) -> None:
        """Complete all expedited jobs, because no due deletion is left."""
        for job in [job for job in self._jobs.values() if job.is_expedited]:
            duration_ms = round((time.monotonic() - job.started) * 1000)
            await self._end(job, CleanedUp(deleted=job.deleted, failed=job.failed, duration_ms=duration_ms))

    async def fail(self, refusal: Refused) -> None:
        """Fail all jobs with this refusal."""
        for job in list(self._jobs.values()):
            await self._end(job, refusal)

    async def _end(self, job: Job, reply: JobReply) -> None:
        del self._jobs[job.job_id]
        state: JobState
        if isinstance(reply, CleanedUp):
            state, result = "completed", reply.model_dump(include={"deleted", "failed", "duration_ms"})
        else:
            state, result = "failed", reply.to_job_result()
        progress = {"deleted": job.deleted, "failed": job.failed}
        command = RecordJob(job_id=job.job_id, kind="cleanup", state=state, progress=progress, result=result)
        with log_context.bound(request_id=job.request_id):
            log.info("job.ended", job_id=str(job.job_id), state=state, **progress)
            await self._record(command)
        job.reply.set_result(reply)

    async def report(self) -> None:
        """Report the progress of all jobs once per period, for ever."""

        async def report_all() -> None:
            for job in list(self._jobs.values()):
                progress = {"deleted": job.deleted, "failed": job.failed}
                await self._record(RecordJob(job_id=job.job_id, kind="cleanup", progress=progress))

        await run_periodically(REPORT_PERIOD_SEC, report_all)

    async def _record(self, command: RecordJob) -> None:
        try:
            await self._allocator.request(command)
        except CommandNotDone as error:
            log.warning("job.not_recorded", job_id=str(command.job_id), error=str(error))
