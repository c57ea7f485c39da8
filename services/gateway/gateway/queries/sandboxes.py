"""What the gateway reads from the database by itself. It never writes."""

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, get_args

from sqlalchemy import ColumnElement, func, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.api.errors import ApiError
from gateway.api.schemas import (
    Actor,
    AppliedSync,
    HeldSync,
    Job,
    Sandbox,
    SandboxStory,
    Stats,
    SyncState,
    Transition,
)
from sandbox_broker.contract.types import SandboxStatus
from sandbox_broker.database import connections
from sandbox_broker.database.schema import (
    csp_listings,
    history,
    jobs,
    leases,
    outbox,
    pool_changes,
    pool_counts,
    sandboxes,
)
from sandbox_broker.observability import tracing

JOB_SILENCE_SEC = 120
"""Who works on a job tells at least once a minute; one that was silent for this long is dead."""
ABANDONED = "Whoever worked on it has died. Nothing is lost: start it again."

NONE_OF_EACH: Mapping[str, int] = dict.fromkeys(get_args(SandboxStatus), 0)

STORY_LENGTH = 500
"""Transitions that are shown of one sandbox, the newest."""

ENTERED: Mapping[str, SandboxStatus] = {
    "sandbox.discovered": "available",
    "sandbox.allocated": "allocated",
    "sandbox.deletion_requested": "pending_deletion",
    "sandbox.deleted": "deleted",
    "sandbox.deletion_failed": "deletion_failed",
    "sandbox.stale": "stale",
    "sandbox.restored": "available",
}
"""The state that each event is about."""
BY: Mapping[str, Actor] = {
    "student": "student",
    "admin": "administrator",
    "expired": "broker",
    "sandbox.discovered": "csp",
    "sandbox.allocated": "student",
    "sandbox.deletion_requested": "broker",
    "sandbox.deleted": "broker",
    "sandbox.deletion_failed": "broker",
    "sandbox.stale": "csp",
    "sandbox.restored": "csp",
}
"""Who caused it: by the reason of the event, otherwise by its type."""

_TIMES = (
    "status_since",
    "missing_since",
    "deletion_requested_at",
    "deletion_due_at",
    "deleted_at",
)


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
            seconds(leases.c.allocated_at).label("allocated_at"),
            seconds(leases.c.expires_at).label("expires_at"),
        )
        .select_from(sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id))
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    async with reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    if row["holder"] is None:
        return HeldSandbox(None, None)
    return HeldSandbox(row["holder"], Sandbox.model_validate({**row, "allocated_to_track": row["holder"]}))


async def story(engine: AsyncEngine, sandbox_id: str) -> SandboxStory | None:
    """All that is known of a sandbox; None if there is no such."""
    query = (
        select(
            sandboxes,
            leases.c.holder,
            leases.c.idempotency_key,
            seconds(leases.c.allocated_at).label("allocated_at"),
            seconds(leases.c.expires_at).label("expires_at"),
            seconds(leases.c.ended_at).label("ended_at"),
            leases.c.end_reason,
            leases.c.end_note,
            *(seconds(sandboxes.c[name]).label(f"{name}_sec") for name in _TIMES),
        )
        .select_from(sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id))
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    kept = select(history.c.outbox_id, history.c.type, history.c.occurred_at, history.c.data)
    kept = kept.where(history.c.sandbox_id == sandbox_id)
    waiting = select(outbox.c.outbox_id, outbox.c.type, outbox.c.occurred_at, outbox.c.data)
    waiting = waiting.where(outbox.c.subject == sandbox_id)
    events = union_all(kept, waiting).subquery()
    newest = select(events.c.type, seconds(events.c.occurred_at).label("at"), events.c.data)
    newest = newest.order_by(events.c.outbox_id.desc()).limit(STORY_LENGTH)
    async with reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
        told = (await connection.execute(newest)).all()
    if row is None:
        return None
    times = {name: row[f"{name}_sec"] for name in _TIMES}
    return SandboxStory.model_validate(
        {**row, **times, "history": [_transition(*event) for event in reversed(told)]}
    )


def _transition(kind: str, at: int, data: Mapping[str, Any]) -> Transition:
    reason = data.get("reason")
    return Transition(
        at=at,
        event=kind,
        status=ENTERED[kind],
        by=BY[reason] if reason and not data.get("reopened") else BY[kind],
        reason="CSP still lists it" if data.get("reopened") else reason,
        holder=data.get("holder"),
        track_name=data.get("track_name"),
        error=data.get("error"),
        request_id=data.get("request_id"),
    )


async def stats(engine: AsyncEngine) -> Stats:
    pool = pool_counts.c.kind == "pool"
    both = union_all(
        select(pool_counts.c.status, pool_counts.c.number).where(pool),
        select(pool_changes.c.status, pool_changes.c.number),
    ).subquery()
    query = select(both.c.status, func.sum(both.c.number)).group_by(both.c.status)
    missing = select(func.count()).where(sandboxes.c.status == "allocated", sandboxes.c.missing_since.is_not(None))
    async with reading(engine) as connection:
        rows = (await connection.execute(query)).all()
        gone = (await connection.execute(missing)).scalar_one()
    counts = {**NONE_OF_EACH, **{status: int(number) for status, number in rows}}
    return Stats(total=sum(counts.values()), missing=gone, **counts)


async def sync_state(engine: AsyncEngine) -> SyncState:
    listing = (
        select(
            csp_listings.c.listing_id,
            seconds(csp_listings.c.begun_at).label("begun_at"),
            seconds(csp_listings.c.applied_at).label("applied_at"),
            seconds(csp_listings.c.held_at).label("held_at"),
            csp_listings.c.outcome,
        )
        .order_by(csp_listings.c.listing_id.desc())
        .limit(1)
    )
    applied = csp_listings.c.applied_at.is_not(None)
    async with reading(engine) as connection:
        newest = await connection.execute(listing.where(applied | csp_listings.c.held_at.is_not(None)))
        last = await connection.execute(listing.where(applied))
        held, done = newest.mappings().one_or_none(), last.mappings().one_or_none()
    return SyncState(
        applied=AppliedSync.model_validate({**done, **done["outcome"]}) if done else None,
        held=HeldSync.model_validate({**held, **held["outcome"]}) if held and held["held_at"] is not None else None,
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
        seconds(jobs.c.started_at).label("started_at"),
        seconds(jobs.c.updated_at).label("updated_at"),
        ((jobs.c.state == "running") & (jobs.c.updated_at < silent_since)).label("abandoned"),
    ).where(jobs.c.job_id == job_id)
    async with reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    found = Job.model_validate(row)
    if row["abandoned"]:
        return found.model_copy(update={"state": "failed", "result": {"message": ABANDONED}})
    return found


def seconds(time: ColumnElement[datetime]) -> ColumnElement[int]:
    return func.floor(func.extract("epoch", time))


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        with tracing.child_span("read", "client", attributes={"db.system.name": "postgresql"}):
            async with engine.connect() as connection:
                yield connection
    except connections.CONNECTION_ERRORS as error:
        raise ApiError("DATABASE_UNAVAILABLE", "The database does not answer. Try again shortly.") from error
