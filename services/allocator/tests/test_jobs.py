"""Jobs: recorded any number of times while they run, final after their end."""

import asyncio
import json
import uuid

import pytest

from allocator.handlers.jobs import record_job
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import RecordJob
from sandbox_broker.contract.replies import Recorded
from sandbox_broker.contract.types import JobState

from .allocator_harness import Pool

JOB = uuid.uuid4()


async def record(session: WriteSession, state: JobState = "running", **progress: int) -> bool:
    command = RecordJob(
        job_id=JOB,
        kind="cleanup",
        state=state,
        progress=progress,
        result=None if state == "running" else {"deleted": 7, "message": "as asked"},
    )
    reply = await record_job(session, command)
    assert isinstance(reply, Recorded)
    return reply.changed


async def test_a_job_starts_progresses_and_ends(pool: Pool) -> None:
    session = await pool.write_session()
    assert await record(session)
    await pool.execute("UPDATE jobs SET started_at = '2020-01-01', updated_at = '2020-01-01'")
    assert await record(session, deleted=3)
    assert json.loads(await pool.value("SELECT progress FROM jobs WHERE job_id = $1", JOB)) == {"deleted": 3}
    assert await pool.value("SELECT result IS NULL AND updated_at > now() - interval '1 minute' FROM jobs")
    assert await record(session, "completed", deleted=7)
    assert await pool.value("SELECT (kind, state) = ('cleanup', 'completed') FROM jobs")
    assert json.loads(await pool.value("SELECT result FROM jobs")) == {"deleted": 7, "message": "as asked"}
    assert await pool.value("SELECT started_at < '2020-01-02' FROM jobs")


@pytest.mark.parametrize("ended", ["completed", "held", "failed"])
@pytest.mark.parametrize("late", ["running", "completed", "held", "failed"])
async def test_the_final_state_of_a_job_does_not_change(pool: Pool, ended: JobState, late: JobState) -> None:
    session = await pool.write_session()
    assert await record(session, ended, deleted=7)
    before = await pool.state()
    assert not await record(session, late, deleted=8)
    assert await pool.state() == before


async def test_one_of_concurrent_final_states_counts(pool: Pool) -> None:
    sessions = [await pool.write_session() for _ in range(4)]
    states: list[JobState] = ["completed", "failed", "completed", "failed"]
    changed = await asyncio.gather(*map(record, sessions, states))
    assert changed.count(True) == 1
