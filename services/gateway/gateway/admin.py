"""The admin routes: what the operator calls."""

import uuid

from fastapi import APIRouter, Request

from gateway import views
from gateway.context import Context
from gateway.errors import ApiError, refuse
from gateway.schemas import Job, Stats, Sync, responses
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Unroutable
from sandbox_broker.messages import PoolSynced, SyncPool

_ALWAYS = ("INVALID_REQUEST", "UNAUTHORIZED", "FORBIDDEN", "PAYLOAD_TOO_LARGE", "INTERNAL_ERROR")

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.get("/stats", responses=responses(*_ALWAYS, "DATABASE_UNAVAILABLE"))
async def get_stats(request: Request) -> Stats:
    """How many sandboxes are in each state."""
    context: Context = request.app.state.context
    return await views.stats(context.engine)


@router.post(
    "/sync",
    responses=responses(
        *_ALWAYS,
        "SYNC_HELD",
        "LISTING_OUTDATED",
        "CSP_UNAVAILABLE",
        "SYNCER_UNAVAILABLE",
        "ALLOCATOR_UNAVAILABLE",
        "SYNC_TIMEOUT",
    ),
)
async def sync(request: Request, force: bool = False) -> Sync:
    """Brings the pool in line with CSP now; a call while one runs joins it."""
    context: Context = request.app.state.context
    command = SyncPool(request_id=request.state.request_id, force=force)
    try:
        if await context.publisher.consumers(topology.SYNCER_COMMANDS.name) == 0:
            raise ApiError("SYNCER_UNAVAILABLE", "No csp-syncer is running. Start it, then try again.")
        reply = await context.requester.request(
            topology.SYNCER_COMMANDS, command, timeout_sec=context.settings.admin_wait_sec
        )
    except (Disconnected, Unroutable) as error:
        raise ApiError("SYNCER_UNAVAILABLE", "The queue is down. Try again shortly.") from error
    except TimeoutError as error:
        raise ApiError("SYNC_TIMEOUT", "The sync is still running. Ask again to join it.") from error
    if not isinstance(reply, PoolSynced):
        refuse(reply)
    return Sync(
        status="completed",
        synced=reply.synced,
        marked_stale=reply.marked_stale,
        restored=reply.restored,
        duration_ms=reply.duration_ms,
    )


@router.get("/jobs/{job_id}", responses=responses(*_ALWAYS, "JOB_NOT_FOUND", "DATABASE_UNAVAILABLE"))
async def get_job(request: Request, job_id: str) -> Job:
    """How a sync or clean-up goes, and what came of it."""
    context: Context = request.app.state.context
    found = await views.job(context.engine, _uuid(job_id))
    if found is None:
        raise _no_such_job()
    return found


def _uuid(job_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(job_id)
    except ValueError:
        raise _no_such_job() from None


def _no_such_job() -> ApiError:
    return ApiError("JOB_NOT_FOUND", "There is no such job. Use the job_id that starting it has answered.")
