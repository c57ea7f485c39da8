"""Admin routes for syncs with CSP and for the purge of records."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from gateway import admin_jobs
from gateway.api.errors import ApiError
from gateway.api.responses import JOB_RUNNING, responses
from gateway.api.schemas.actions import JobRunning, Purge
from gateway.api.schemas.sync import Sync, SyncState
from gateway.context import Context
from gateway.queries import sandboxes
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords, SyncPool

BATCH_SIZE = 500
"""Limit of records per command. The gateway repeats the command until no records are left."""

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/sync",
    responses={
        202: JOB_RUNNING,
        **responses(
            *COMMON_ERRORS,
            "SYNC_HELD",
            "LISTING_OUTDATED",
            "CSP_UNAVAILABLE",
            "SYNCER_UNAVAILABLE",
            "ALLOCATOR_UNAVAILABLE",
        ),
    },
)
async def sync(request: Request, response: Response, force: bool = False) -> Sync | JobRunning:
    """Sync the pool with CSP now. If a sync is running, the call joins it. A listing that is empty, lacks too many
    sandboxes of the pool, or has too many new accounts, is held. `GET /v1/admin/sync` shows its changes. `force`
    fetches a new listing and applies it even then. It affects this sync only."""
    reply = await admin_jobs.run_job(
        request,
        response,
        "sync",
        topology.SYNCER_COMMANDS,
        lambda job_id: SyncPool(request_id=request.state.request_id, force=force, job_id=job_id),
        unavailable="SYNCER_UNAVAILABLE",
    )
    if isinstance(reply, JobRunning):
        return reply
    return Sync.model_validate(reply, from_attributes=True)


@router.get("/sync", responses=responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE"))
async def get_sync(request: Request) -> SyncState:
    """Return the changes of the last applied listing. If the newest listing is held, also return the reason and its
    changes."""
    context: Context = request.app.state.context
    return await sandboxes.sync_state(context.engine)


@router.post(
    "/auto-delete-stale", responses=responses(*COMMON_ERRORS, "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT")
)
async def auto_delete_stale(
    request: Request, grace_period_hours: Annotated[float, Query(ge=0, le=24 * 365)] = 24
) -> Purge:
    """Mark sandboxes as deleted that have been stale for `grace_period_hours`. The broker also does this regularly,
    after 24 hours."""
    return await _purge_all(request, DeleteStale(stale_for_sec=grace_period_hours * 3600, limit=BATCH_SIZE))


@router.post("/bulk-delete", responses=responses(*COMMON_ERRORS, "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"))
async def bulk_delete(request: Request, status: Literal["stale", "deletion_failed"]) -> Purge:
    """Purge all records in this status, without a request to CSP. A sandbox with a past lease never returns to the
    pool. If CSP still lists it, it is shown as a leak."""
    return await _purge_all(request, PurgeRecords(status=status, limit=BATCH_SIZE))


async def _purge_all(request: Request, command: DeleteStale | PurgeRecords) -> Purge:
    context: Context = request.app.state.context
    loop = asyncio.get_running_loop()
    started = loop.time()
    deleted = 0
    while True:
        reply = await request_maintenance(request, command)
        deleted += reply.count
        elapsed_sec = loop.time() - started
        if reply.count < command.limit:
            return Purge(deleted=deleted, duration_ms=round(elapsed_sec * 1000))
        if elapsed_sec > context.settings.admin_wait_sec:
            raise ApiError("MAINTENANCE_TIMEOUT", parameters={"cause": "more_records", "done": deleted})
