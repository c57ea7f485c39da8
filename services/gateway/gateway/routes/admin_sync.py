"""The admin routes about CSP's listing: sync, what is held, what is to be forgotten."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from gateway import admin_jobs
from gateway.api.errors import ApiError, raise_for_refusal
from gateway.api.schemas import JOB_RUNNING, JobRunning, Purge, Sync, SyncState, responses
from gateway.context import Context
from gateway.queries import sandboxes
from gateway.routes.admin_actions import ALWAYS, maintain
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import DeleteStale, PurgeRecords, SyncPool
from sandbox_broker.contract.replies import PoolSynced, Purged

PIECE = 500
"""Records that one command changes; it is repeated until none is left."""

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/sync",
    responses={
        202: JOB_RUNNING,
        **responses(
            *ALWAYS,
            "SYNC_HELD",
            "LISTING_OUTDATED",
            "CSP_UNAVAILABLE",
            "SYNCER_UNAVAILABLE",
            "ALLOCATOR_UNAVAILABLE",
        ),
    },
)
async def sync(request: Request, response: Response, force: bool = False) -> Sync | JobRunning:
    """Brings the pool in line with CSP now; a call while one runs joins it. A listing that is empty, or lacks too
    much of the pool, is held: `GET /v1/admin/sync` shows what it would change. `force` applies such a listing; it
    fetches a new one, and is for this once."""
    reply = await admin_jobs.run(
        request,
        response,
        "sync",
        topology.SYNCER_COMMANDS,
        lambda job_id: SyncPool(request_id=request.state.request_id, force=force, job_id=job_id),
        unavailable=("SYNCER_UNAVAILABLE", "csp-syncer"),
    )
    if isinstance(reply, JobRunning):
        return reply
    if not isinstance(reply, PoolSynced):
        raise_for_refusal(reply)
    return Sync.model_validate(reply, from_attributes=True)


@router.get("/sync", responses=responses(*ALWAYS, "DATABASE_UNAVAILABLE"))
async def get_sync(request: Request) -> SyncState:
    """What the last listing of CSP has changed; and if the newest is held, why, and what it would change."""
    context: Context = request.app.state.context
    return await sandboxes.sync_state(context.engine)


@router.post("/auto-delete-stale", responses=responses(*ALWAYS, "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"))
async def auto_delete_stale(
    request: Request, grace_period_hours: Annotated[float, Query(ge=0, le=24 * 365)] = 24
) -> Purge:
    """Takes what has been stale for so long as deleted. This also happens by itself, after 24 hours."""
    return await _all(request, DeleteStale(stale_for_sec=grace_period_hours * 3600, limit=PIECE))


@router.post("/bulk-delete", responses=responses(*ALWAYS, "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"))
async def bulk_delete(request: Request, status: Literal["stale", "deletion_failed"]) -> Purge:
    """Forgets all records in this state; CSP is not asked. What was leased once never enters the pool again, and
    if CSP still lists it, it is shown among the leaks."""
    return await _all(request, PurgeRecords(status=status, limit=PIECE))


async def _all(request: Request, command: DeleteStale | PurgeRecords) -> Purge:
    context: Context = request.app.state.context
    loop = asyncio.get_running_loop()
    started = loop.time()
    count = 0
    while True:
        reply = await maintain(request, command)
        if not isinstance(reply, Purged):
            raise_for_refusal(reply)
        count += reply.count
        took_sec = loop.time() - started
        if reply.count < command.limit:
            return Purge(deleted=count, duration_ms=round(took_sec * 1000))
        if took_sec > context.settings.admin_wait_sec:
            raise ApiError("MAINTENANCE_TIMEOUT", f"{count} are done, and more are left. Ask again to go on.")
