"""What the gateway reads from the database by itself. It never writes."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.errors import ApiError
from gateway.schemas import Job, Sandbox, Stats
from sandbox_broker import db
from sandbox_broker.tables import jobs, leases, sandboxes

JOB_SILENCE_SEC = 120
"""Who works on a job tells at least once a minute; one that was silent for this long is dead."""
ABANDONED = "Whoever worked on it has died. Nothing is lost: start it again."


@dataclass(frozen=True, slots=True)
class HeldSandbox:
    """A sandbox and the student who holds it, or held it last; None if nobody ever did."""

    holder: str | None
    sandbox: Sandbox | None


async def sandbox(engine: AsyncEngine, sandbox_id: str) -> HeldSandbox | None:
    """None if there is no such sandbox."""
    query = (
        select(
            sandboxes.c.sandbox_id,
            sandboxes.c.name,
            sandboxes.c.external_id,
            sandboxes.c.status,
            sandboxes.c.sfdc_account_id,
            leases.c.holder,
            leases.c.track_name,
            func.floor(func.extract("epoch", leases.c.allocated_at)).label("allocated_at"),
            func.floor(func.extract("epoch", leases.c.expires_at)).label("expires_at"),
        )
        .select_from(sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id))
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    async with _reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    if row["holder"] is None:
        return HeldSandbox(None, None)
    return HeldSandbox(row["holder"], Sandbox.model_validate({**row, "allocated_to_track": row["holder"]}))


async def stats(engine: AsyncEngine) -> Stats:
    query = select(sandboxes.c.status, func.count()).group_by(sandboxes.c.status)
    async with _reading(engine) as connection:
        counts = {status: int(number) for status, number in await connection.execute(query)}
    by_status = {status: counts.get(status, 0) for status in Stats.model_fields if status != "total"}
    return Stats(total=sum(by_status.values()), **by_status)


async def job(engine: AsyncEngine, job_id: uuid.UUID) -> Job | None:
    """None if there is no such job."""
    silent_since = func.now() - timedelta(seconds=JOB_SILENCE_SEC)
    query = select(
        jobs.c.job_id,
        jobs.c.kind,
        jobs.c.state,
        jobs.c.progress,
        jobs.c.result,
        func.floor(func.extract("epoch", jobs.c.started_at)).label("started_at"),
        func.floor(func.extract("epoch", jobs.c.updated_at)).label("updated_at"),
        ((jobs.c.state == "running") & (jobs.c.updated_at < silent_since)).label("abandoned"),
    ).where(jobs.c.job_id == job_id)
    async with _reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    found = Job.model_validate(row)
    if row["abandoned"]:
        return found.model_copy(update={"state": "failed", "result": {"message": ABANDONED}})
    return found


@asynccontextmanager
async def _reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.connect() as connection:
            yield connection
    except db.CONNECTION_ERRORS as error:
        raise ApiError("DATABASE_UNAVAILABLE", "The database does not answer. Try again shortly.") from error
