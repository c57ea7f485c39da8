"""The admin routes that change something, or tell how that goes."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gateway import admin_jobs
from gateway.api.errors import ApiError, raise_for_refusal
from gateway.api.schemas import JOB_RUNNING, Cleanup, Job, JobRunning, Release, responses
from gateway.context import Context
from gateway.queries import sandboxes
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow, Command, EndLease, RetryDeletion
from sandbox_broker.contract.replies import CleanedUp, Reply, SandboxReleased
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable
from sandbox_broker.observability import log_context

ALWAYS = ("INVALID_REQUEST", "UNAUTHORIZED", "FORBIDDEN", "PAYLOAD_TOO_LARGE", "RATE_LIMITED", "INTERNAL_ERROR")

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/cleanup",
    responses={
        202: JOB_RUNNING,
        **responses(*ALWAYS, "CSP_UNAVAILABLE", "REAPER_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE"),
    },
)
async def cleanup(request: Request, response: Response) -> Cleanup | JobRunning:
    """Deletes what is pending now, whatever its backoff says. A call while one runs joins it."""
    reply = await admin_jobs.run(
        request,
        response,
        "cleanup",
        topology.REAPER_COMMANDS,
        lambda job_id: CleanUpNow(request_id=request.state.request_id, job_id=job_id),
        unavailable=("REAPER_UNAVAILABLE", "reaper"),
    )
    if isinstance(reply, JobRunning):
        return reply
    if not isinstance(reply, CleanedUp):
        raise_for_refusal(reply)
    return Cleanup(deleted=reply.deleted, failed=reply.failed, duration_ms=reply.duration_ms)


@router.post(
    "/sandboxes/{sandbox_id}/release",
    responses=responses(
        *ALWAYS, "SANDBOX_NOT_FOUND", "NOT_ALLOCATED", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"
    ),
)
async def release(
    request: Request,
    sandbox_id: str,
    reason: Annotated[str, Query(min_length=1, max_length=500, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")],
) -> Release:
    """Ends the lease, whoever holds it; the sandbox will be deleted. Repeating it is success. `reason` is kept."""
    request.scope["state"]["ids"] = {"sandbox_id": sandbox_id}
    return await _released(request, partial(EndLease, sandbox_id=sandbox_id, note=reason))


@router.post(
    "/sandboxes/{sandbox_id}/retry-deletion",
    responses=responses(
        *ALWAYS, "SANDBOX_NOT_FOUND", "NOT_DELETION_FAILED", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"
    ),
)
async def retry_deletion(request: Request, sandbox_id: str) -> Release:
    """Sends a failed deletion back: `deletion_failed` becomes `pending_deletion`, all attempts before it again."""
    request.scope["state"]["ids"] = {"sandbox_id": sandbox_id}
    return await _released(request, partial(RetryDeletion, sandbox_id=sandbox_id))


async def _released(request: Request, command: Callable[..., Command]) -> Release:
    try:
        asked = command(request_id=request.state.request_id)
    except ValueError:  # no id can look like that
        raise ApiError("SANDBOX_NOT_FOUND", "There is no such sandbox. See GET /v1/admin/sandboxes.") from None
    reply = await maintain(request, asked)
    if not isinstance(reply, SandboxReleased):
        raise_for_refusal(reply)
    return Release.model_validate(reply, from_attributes=True)


async def maintain(request: Request, command: Command) -> Reply:
    """Asks the allocator for what no student waits for."""
    context: Context = request.app.state.context
    try:
        if await context.publisher.consumers(topology.ALLOCATOR_MAINTENANCE.name) == 0:
            raise ApiError("ALLOCATOR_UNAVAILABLE", "No allocator is running. Start it, then try again.")
        with log_context.bound(request_id=request.state.request_id):
            return await context.requester.request(
                topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=context.settings.admin_wait_sec
            )
    except (Disconnected, Unroutable) as error:
        raise ApiError("ALLOCATOR_UNAVAILABLE", "The queue is down. Try again shortly.") from error
    except TimeoutError as error:
        raise ApiError(
            "MAINTENANCE_TIMEOUT", "No answer in time. It may still be done: look before you ask again."
        ) from error


@router.get("/jobs/{job_id}", responses=responses(*ALWAYS, "JOB_NOT_FOUND", "DATABASE_UNAVAILABLE"))
async def get_job(request: Request, job_id: str) -> Job:
    """How a sync or clean-up goes, and what came of it."""
    context: Context = request.app.state.context
    found = await sandboxes.job(context.engine, _uuid(job_id))
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
