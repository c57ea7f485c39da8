"""Clean-ups that an administrator waits for."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field

import structlog

from reaper.asking import NoAnswer, ask
from reaper.deletion import Outcome
from sandbox_broker import story
from sandbox_broker.bus import Requester
from sandbox_broker.messages import CleanedUp, JobState, RecordJob, Refused
from sandbox_broker.service import every

PERIOD_SEC = 10.0
"""How often a job that runs is heard of."""

log = structlog.get_logger()

Answer = CleanedUp | Refused


@dataclass(slots=True)
class Job:
    job_id: uuid.UUID
    answer: asyncio.Future[Answer]
    request_id: str
    begun: bool = False
    """What it has to delete was made due."""
    deleted: int = 0
    failed: int = 0
    since: float = field(default_factory=time.monotonic)


class Jobs:
    """Those that wait or run. A clean-up run works for all of them at once."""

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self._jobs: dict[uuid.UUID, Job] = {}

    def join(self, job_id: uuid.UUID, request_id: str) -> asyncio.Future[Answer]:
        """What will hold the answer; the same for a command that is delivered twice."""
        if job_id not in self._jobs:
            self._jobs[job_id] = Job(job_id, asyncio.get_running_loop().create_future(), request_id)
            log.info("job.joined", job_id=str(job_id))
        return self._jobs[job_id].answer

    @property
    def waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if not job.begun]

    def count(self, outcome: Outcome) -> None:
        for job in self._jobs.values():
            if job.begun:
                job.deleted += outcome is Outcome.DELETED
                job.failed += outcome is Outcome.FAILED

    async def complete(self) -> None:
        """Answers those that have begun: nothing is left to do."""
        for job in [job for job in self._jobs.values() if job.begun]:
            duration_ms = round((time.monotonic() - job.since) * 1000)
            await self._end(job, CleanedUp(deleted=job.deleted, failed=job.failed, duration_ms=duration_ms))

    async def fail(self, refusal: Refused) -> None:
        for job in list(self._jobs.values()):
            await self._end(job, refusal)

    async def _end(self, job: Job, answer: Answer) -> None:
        del self._jobs[job.job_id]
        state: JobState
        if isinstance(answer, CleanedUp):
            state, result = "completed", answer.model_dump(include={"deleted", "failed", "duration_ms"})
        else:
            state, result = "failed", answer.model_dump(include={"code", "message"})
        progress = {"deleted": job.deleted, "failed": job.failed}
        command = RecordJob(job_id=job.job_id, kind="cleanup", state=state, progress=progress, result=result)
        with story.bound(request_id=job.request_id):
            log.info("job.ended", job_id=str(job.job_id), state=state, **progress)
            await self._record(command)
        job.answer.set_result(answer)

    async def report(self) -> None:
        """Tells once in a while how they go, for ever: one that is silent counts as dead."""

        async def report_all() -> None:
            for job in list(self._jobs.values()):
                progress = {"deleted": job.deleted, "failed": job.failed}
                await self._record(RecordJob(job_id=job.job_id, kind="cleanup", progress=progress))

        await every(PERIOD_SEC, report_all)

    async def _record(self, command: RecordJob) -> None:
        try:
            await ask(self._requester, command)
        except NoAnswer as error:
            log.warning("job.not_recorded", job_id=str(command.job_id), error=str(error))
