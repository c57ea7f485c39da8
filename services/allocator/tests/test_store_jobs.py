"""Jobs: recorded as often as one likes, and final once they have ended."""

import asyncio
import json
import uuid

import pytest

from allocator.handlers.jobs import record_job
from allocator.writer import Writer
from sandbox_broker.contract.commands import RecordJob
from sandbox_broker.contract.replies import Recorded
from sandbox_broker.contract.types import JobState

from .allocator_harness import Pool

JOB = uuid.uuid4()


async def record(writer: Writer, state: JobState = "running", **progress: int) -> bool:
    command = RecordJob(
        job_id=JOB,
        kind="cleanup",
        state=state,
        progress=progress,
        result=None if state == "running" else {"deleted": 7, "message": "as asked"},
    )
    reply = await record_job(writer, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def test_a_job_begins_goes_on_and_ends(pool: Pool) -> None:
    writer = await pool.writer()
    assert await record(writer)
    await pool.execute("UPDATE jobs SET started_at = '2020-01-01', updated_at = '2020-01-01'")
    assert await record(writer, deleted=3)
    assert json.loads(await pool.value("SELECT progress FROM jobs WHERE job_id = $1", JOB)) == {"deleted": 3}
    assert await pool.value("SELECT result IS NULL AND updated_at > now() - interval '1 minute' FROM jobs")
    assert await record(writer, "completed", deleted=7)
    assert await pool.value("SELECT (kind, state) = ('cleanup', 'completed') FROM jobs")
    assert json.loads(await pool.value("SELECT result FROM jobs")) == {"deleted": 7, "message": "as asked"}
    assert await pool.value("SELECT started_at < '2020-01-02' FROM jobs")


@pytest.mark.parametrize("ended", ["completed", "held", "failed"])
@pytest.mark.parametrize("late", ["running", "completed", "held", "failed"])
async def test_what_has_ended_stays_as_it_ended(pool: Pool, ended: JobState, late: JobState) -> None:
    writer = await pool.writer()
    assert await record(writer, ended, deleted=7)
    before = await pool.state()
    assert not await record(writer, late, deleted=8)
    assert await pool.state() == before


async def test_of_two_endings_at_once_one_counts(pool: Pool) -> None:
    writers = [await pool.writer() for _ in range(4)]
    states: list[JobState] = ["completed", "failed", "completed", "failed"]
    changed = await asyncio.gather(*map(record, writers, states))
    assert changed.count(True) == 1
