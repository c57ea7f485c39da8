"""What the gateway reads from the database by itself. It never writes."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from sqlalchemy import ColumnElement, case, func, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.errors import ApiError
from gateway.schemas import AppliedSync, HeldSync, Job, Leak, Leaks, Sandbox, Stats, SyncState
from sandbox_broker import db
from sandbox_broker.messages import SandboxStatus
from sandbox_broker.tables import PROOF_GRACE, csp_accounts, csp_listings, jobs, leases, sandboxes

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
            _seconds(leases.c.allocated_at).label("allocated_at"),
            _seconds(leases.c.expires_at).label("expires_at"),
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
    gone = (sandboxes.c.status == "allocated") & sandboxes.c.missing_since.is_not(None)
    query = select(sandboxes.c.status, func.count(), func.count().filter(gone)).group_by(sandboxes.c.status)
    async with _reading(engine) as connection:
        rows = (await connection.execute(query)).all()
    counts = {status: int(number) for status, number, _ in rows}
    by_status = {status: counts.get(status, 0) for status in get_args(SandboxStatus)}
    return Stats(total=sum(by_status.values()), missing=sum(int(missing) for _, _, missing in rows), **by_status)


async def sync_state(engine: AsyncEngine) -> SyncState:
    listing = (
        select(
            csp_listings.c.listing_id,
            _seconds(csp_listings.c.begun_at).label("begun_at"),
            _seconds(csp_listings.c.applied_at).label("applied_at"),
            _seconds(csp_listings.c.held_at).label("held_at"),
            csp_listings.c.outcome,
        )
        .order_by(csp_listings.c.listing_id.desc())
        .limit(1)
    )
    applied = csp_listings.c.applied_at.is_not(None)
    async with _reading(engine) as connection:
        newest = await connection.execute(listing.where(applied | csp_listings.c.held_at.is_not(None)))
        last = await connection.execute(listing.where(applied))
        held, done = newest.mappings().one_or_none(), last.mappings().one_or_none()
    return SyncState(
        applied=AppliedSync.model_validate({**done, **done["outcome"]}) if done else None,
        held=HeldSync.model_validate({**held, **held["outcome"]}) if held and held["held_at"] is not None else None,
    )


async def leaks(engine: AsyncEngine, limit: int, after: str) -> Leaks:
    """Differences to the last listing that was applied, those behind the sandbox id `after`."""
    latest = (
        select(csp_listings.c.listing_id, csp_listings.c.begun_at)
        .where(csp_listings.c.applied_at.is_not(None))
        .order_by(csp_listings.c.listing_id.desc())
        .limit(1)
        .cte("latest")
    )
    unknown = sandboxes.c.sandbox_id.is_(None)
    deleted = (sandboxes.c.status == "deleted") & (sandboxes.c.status_since <= latest.c.begun_at - PROOF_GRACE)
    in_csp = (
        select(
            csp_accounts.c.sandbox_id,
            csp_accounts.c.external_id,
            csp_accounts.c.name,
            case((unknown, "unknown"), else_="deleted").label("kind"),
            _seconds(sandboxes.c.status_since).label("since"),
        )
        .select_from(
            latest.join(csp_accounts, csp_accounts.c.listing_id == latest.c.listing_id).outerjoin(
                sandboxes, sandboxes.c.sandbox_id == csp_accounts.c.sandbox_id
            )
        )
        .where(csp_accounts.c.external_id.is_not(None), csp_accounts.c.sandbox_id > after, unknown | deleted)
        .order_by(csp_accounts.c.sandbox_id)
        .limit(limit + 1)
    )
    missing = (
        select(
            sandboxes.c.sandbox_id,
            sandboxes.c.external_id,
            sandboxes.c.name,
            literal("missing").label("kind"),
            _seconds(sandboxes.c.missing_since).label("since"),
        )
        .where(
            sandboxes.c.status == "allocated",
            sandboxes.c.missing_since.is_not(None),
            sandboxes.c.sandbox_id > after,
        )
        .order_by(sandboxes.c.sandbox_id)
        .limit(limit + 1)
    )
    both = union_all(in_csp.subquery().select(), missing.subquery().select())
    async with _reading(engine) as connection:
        rows = (await connection.execute(both.order_by("sandbox_id").limit(limit + 1))).mappings().all()
        listed_at = await connection.scalar(select(_seconds(latest.c.begun_at)))
    page = [Leak.model_validate(row) for row in rows[:limit]]
    return Leaks(
        leaks=page,
        count=len(page),
        cursor=page[-1].sandbox_id if len(rows) > limit else None,
        listed_at=listed_at,
    )


async def job(engine: AsyncEngine, job_id: uuid.UUID) -> Job | None:
    """None if there is no such job."""
    silent_since = func.now() - timedelta(seconds=JOB_SILENCE_SEC)
    query = select(
        jobs.c.job_id,
        jobs.c.kind,
        jobs.c.state,
        jobs.c.progress,
        jobs.c.result,
        _seconds(jobs.c.started_at).label("started_at"),
        _seconds(jobs.c.updated_at).label("updated_at"),
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


def _seconds(time: ColumnElement[datetime]) -> ColumnElement[int]:
    return func.floor(func.extract("epoch", time))


@asynccontextmanager
async def _reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.connect() as connection:
            yield connection
    except db.CONNECTION_ERRORS as error:
        raise ApiError("DATABASE_UNAVAILABLE", "The database does not answer. Try again shortly.") from error
