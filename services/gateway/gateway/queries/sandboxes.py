"""Read queries of the gateway: sandboxes, pool statistics, syncs and jobs. The gateway never writes."""

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, get_args

from sqlalchemy import ColumnElement, Label, func, literal_column, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.api.error_table import ERRORS
from gateway.api.errors import ApiError
from gateway.api.schemas.actions import Job
from gateway.api.schemas.pool import Actor, SandboxStory, Stats, Transition
from gateway.api.schemas.sync import AppliedSync, HeldSync, SyncState
from gateway.api.schemas.track import Sandbox
from sandbox_broker.contract.types import SandboxStatus
from sandbox_broker.database import connections
from sandbox_broker.database.schema import (
    applied_listing,
    decided_listing,
    history,
    jobs,
    leases,
    outbox,
    pool_totals,
    sandboxes,
)
from sandbox_broker.observability import tracing

JOB_REPORT_TIMEOUT_SEC = 120
"""Longest time between two reports of a running job. Its worker reports at least once a minute."""
WORKER_LOST = "The worker stopped reporting. No data is lost. Start the job again."

ZERO_COUNTS: Mapping[str, int] = dict.fromkeys(get_args(SandboxStatus), 0)

MAX_TRANSITIONS = 500
"""Limit of transitions in the details of a sandbox. Older ones are left out."""

STATUS_AFTER_EVENT: Mapping[str, SandboxStatus] = {
    "sandbox.discovered": "available",
    "sandbox.allocated": "allocated",
    "lease.claimed": "allocated",
    "lease.extended": "allocated",
    "sandbox.deletion_requested": "pending_deletion",
    "sandbox.replaced": "pending_deletion",
    "sandbox.deleted": "deleted",
    "sandbox.deletion_failed": "deletion_failed",
    "sandbox.stale": "stale",
    "sandbox.restored": "available",
    "access.ready": "allocated",
    "access.failed": "allocated",
    "access.ended": "pending_deletion",
    "access.removed": "pending_deletion",
    "access.remains": "deleted",
}
"""Status of a sandbox after an event, by event type."""
ACTOR_OF_EVENT: Mapping[str, Actor] = {
    "student": "student",
    "admin": "administrator",
    "expired": "broker",
    "play_ended": "instruqt",
    "unclaimed": "broker",
    "broken": "broker",
    "sandbox.discovered": "csp",
    "sandbox.allocated": "student",
    "lease.claimed": "student",
    "lease.extended": "student",
    "sandbox.replaced": "student",
    "sandbox.deletion_requested": "broker",
    "sandbox.deleted": "broker",
    "sandbox.deletion_failed": "broker",
    "sandbox.stale": "csp",
    "sandbox.restored": "csp",
    "access.ready": "broker",
    "access.failed": "broker",
    "access.ended": "broker",
    "access.removed": "broker",
    "access.remains": "broker",
}
"""Actor that caused an event, by the reason of the event, or by its type if it has no reason."""

_TIMES = (
    "status_since",
    "missing_since",
    "deletion_requested_at",
    "deletion_due_at",
    "deletion_hold_until",
    "deleted_at",
)


_replacement = leases.alias("replacement")


def unix_seconds(time: ColumnElement[datetime]) -> ColumnElement[int]:
    """Return the SQL expression of `time` in whole Unix seconds."""
    return func.floor(func.extract("epoch", time))


LEASE_DETAILS = (
    leases.c.mode,
    unix_seconds(leases.c.claimed_at).label("claimed_at"),
    leases.c.first_holder,
    leases.c.extended_sec,
    leases.c.policy,
    leases.c.max_extension_sec,
    leases.c.replaces,
    select(_replacement.c.sandbox_id)
    .where(_replacement.c.replaces == leases.c.sandbox_id)
    .limit(1)
    .scalar_subquery()
    .label("replaced_by"),
)
"""Columns of schemas.pool.LeaseDetails."""


@dataclass(frozen=True, slots=True)
class HeldSandbox:
    """A sandbox and its current or last lease. All fields are None if it was never leased."""

    holder: str | None = None
    sandbox: Sandbox | None = None
    token: str | None = None
    """Name of the token that the lease was made with."""
    secret_hash: bytes | None = None
    """SHA-256 of the lease secret."""


async def held_sandbox(engine: AsyncEngine, sandbox_id: str) -> HeldSandbox | None:
    """Return the sandbox with its current or last holder, or None if the id is unknown."""
    query = (
        select(
            sandboxes.c.sandbox_id,
            sandboxes.c.name,
            sandboxes.c.external_id,
            sandboxes.c.status,
            sandboxes.c.sfdc_account_id,
            leases.c.holder,
            leases.c.track_name,
            leases.c.token,
            leases.c.secret_hash,
            unix_seconds(leases.c.allocated_at).label("allocated_at"),
            unix_seconds(leases.c.expires_at).label("expires_at"),
        )
        .select_from(sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id))
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    async with read_connection(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    if row["holder"] is None:
        return HeldSandbox()
    sandbox = Sandbox.model_validate({**row, "allocated_to_track": row["holder"]})
    return HeldSandbox(row["holder"], sandbox, row["token"], row["secret_hash"])


async def sandbox_details(engine: AsyncEngine, sandbox_id: str) -> SandboxStory | None:
    """Return a sandbox with its lease and its transitions, oldest first, or None if the id is unknown.

    Events that the outbox relay has not published yet are included.
    """
    query = (
        select(
            sandboxes,
            leases.c.holder,
            leases.c.idempotency_key,
            unix_seconds(leases.c.allocated_at).label("allocated_at"),
            unix_seconds(leases.c.expires_at).label("expires_at"),
            unix_seconds(leases.c.ended_at).label("ended_at"),
            leases.c.end_reason,
            leases.c.end_note,
            *LEASE_DETAILS,
            *(unix_seconds(sandboxes.c[name]).label(f"{name}_sec") for name in _TIMES),
        )
        .select_from(sandboxes.outerjoin(leases, leases.c.sandbox_id == sandboxes.c.sandbox_id))
        .where(sandboxes.c.sandbox_id == sandbox_id)
    )
    published = select(history.c.outbox_id, history.c.type, history.c.occurred_at, history.c.data)
    published = published.where(history.c.sandbox_id == sandbox_id)
    unpublished = select(outbox.c.outbox_id, outbox.c.type, outbox.c.occurred_at, outbox.c.data)
    unpublished = unpublished.where(outbox.c.subject == sandbox_id)
    events = union_all(published, unpublished).subquery()
    newest = select(events.c.type, unix_seconds(events.c.occurred_at).label("at"), events.c.data)
    newest = newest.order_by(events.c.outbox_id.desc()).limit(MAX_TRANSITIONS)
    async with read_connection(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
        transitions = (await connection.execute(newest)).all()
    if row is None:
        return None
    times = {name: row[f"{name}_sec"] for name in _TIMES}
    return SandboxStory.model_validate(
        {**row, **times, "history": list(_describe_transitions(reversed(transitions), row["status"]))}
    )


def _describe_transitions(events: Iterable[Any], status: SandboxStatus) -> Iterator[Transition]:
    """Yield a transition for each event, given as type, time and data, oldest first.

    An event that this version does not know keeps the status, at first `status`. An event with an unknown reason
    counts as caused by the broker.
    """
    for event_type, at, data in events:
        status = STATUS_AFTER_EVENT.get(event_type, status)
        yield _transition(event_type, at, data, status)


def _transition(event_type: str, at: int, data: Mapping[str, Any], status: SandboxStatus) -> Transition:
    reason = data.get("reason")
    return Transition(
        at=at,
        event=event_type,
        status=status,
        by=ACTOR_OF_EVENT.get(reason if reason and not data.get("reopened") else event_type, "broker"),
        reason="CSP still lists it" if data.get("reopened") else data.get("note") or reason,
        holder=data.get("holder"),
        track_name=data.get("track_name"),
        error=data.get("error"),
        request_id=data.get("request_id"),
    )


async def pool_stats(engine: AsyncEngine) -> Stats:
    """Return the number of sandboxes in each status, of allocated sandboxes that CSP no longer lists or whose lease
    is in standby, and of broken sandboxes on hold."""
    missing = select(func.count()).where(sandboxes.c.status == "allocated", sandboxes.c.missing_since.is_not(None))
    # Literals, because they must match the conditions of the partial indexes.
    standby = select(func.count()).where(
        leases.c.mode == literal_column("'standby'"), leases.c.end_reason.is_(None)
    )
    on_hold = select(func.count()).where(
        sandboxes.c.deletion_hold_until > func.now(), sandboxes.c.status == "pending_deletion"
    )
    # One statement, because the round trips would cost the gateway more than the counting.
    numbers = union_all(
        select(pool_totals.c.status, pool_totals.c.number),
        *(
            select(literal_column(f"'{name}'"), query.scalar_subquery())
            for name, query in (("missing", missing), ("standby", standby), ("on_hold", on_hold))
        ),
    )
    async with read_connection(engine) as connection:
        rows = await connection.execute(numbers)
    counts = {**ZERO_COUNTS, **dict(rows.all())}
    return Stats(total=sum(counts[status] for status in ZERO_COUNTS), **counts)


async def sync_state(engine: AsyncEngine) -> SyncState:
    """Return the last applied listing, and the newest listing if it is held."""
    applied_query = select(
        applied_listing.c.listing_id,
        unix_seconds(applied_listing.c.begun_at).label("begun_at"),
        unix_seconds(applied_listing.c.applied_at).label("applied_at"),
        applied_listing.c.outcome,
    )
    held_query = select(
        decided_listing.c.listing_id,
        unix_seconds(decided_listing.c.begun_at).label("begun_at"),
        unix_seconds(decided_listing.c.held_at).label("held_at"),
        decided_listing.c.outcome,
    ).where(decided_listing.c.held_at.is_not(None))
    async with read_connection(engine) as connection:
        held = (await connection.execute(held_query)).mappings().one_or_none()
        applied = (await connection.execute(applied_query)).mappings().one_or_none()
    return SyncState(
        applied=AppliedSync.model_validate({**applied, **applied["outcome"]}) if applied else None,
        held=HeldSync.model_validate({**held, **held["outcome"]}) if held else None,
    )


async def find_job(engine: AsyncEngine, job_id: uuid.UUID) -> Job | None:
    """Return the job, or None if the id is unknown. A job without recent reports counts as failed."""
    oldest_report = func.now() - timedelta(seconds=JOB_REPORT_TIMEOUT_SEC)
    query = select(
        jobs.c.job_id,
        jobs.c.kind,
        jobs.c.state,
        jobs.c.progress,
        jobs.c.result,
        unix_seconds(jobs.c.started_at).label("started_at"),
        unix_seconds(jobs.c.updated_at).label("updated_at"),
        ((jobs.c.state == "running") & (jobs.c.updated_at < oldest_report)).label("abandoned"),
    ).where(jobs.c.job_id == job_id)
    async with read_connection(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    job = Job.model_validate({**row, "result": _word_result(row["result"])})
    if row["abandoned"]:
        return job.model_copy(update={"state": "failed", "result": {"message": WORKER_LOST}})
    return job


def _word_result(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the result of a job with the message of its refusal (see `Refused.to_job_result`)."""
    if result is None or "parameters" not in result or result["code"] not in ERRORS:
        return result
    code, parameters = result["code"], json.loads(result["parameters"])
    return {"code": code, "message": ERRORS[code].word(parameters)}


def label_unix_seconds(column: ColumnElement[datetime]) -> Label[int]:
    """Return `column` in whole Unix seconds, under its own name."""
    return unix_seconds(column).label(column.name)


@asynccontextmanager
async def read_connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Yield a database connection. Connection errors become ApiError DATABASE_UNAVAILABLE."""
    try:
        with tracing.child_span("read", "client", attributes={"db.system.name": "postgresql"}):
            async with engine.connect() as connection:
                yield connection
    except connections.CONNECTION_ERRORS as error:
        raise ApiError("DATABASE_UNAVAILABLE", "The database does not answer. Try again shortly.") from error
