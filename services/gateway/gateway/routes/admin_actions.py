"""Admin routes for actions: clean up, release a sandbox, retry a deletion, and show the state of a job."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gateway import admin_jobs
from gateway.api.errors import ApiError, from_refusal
from gateway.api.responses import JOB_RUNNING, responses
from gateway.api.schemas.actions import Cleanup, Job, JobRunning, RestoreConfirmed
from gateway.api.schemas.track import Release
from gateway.audit import audited
from gateway.context import Context
from gateway.queries import sandboxes
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import CleanUpNow, Command, ConfirmRestore, EndLease, R, RetryDeletion
from sandbox_broker.contract.replies import SandboxReleased
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.outcome import CommandRefused, NoReply, ServiceUnavailable
from sandbox_broker.observability import log_context

COMMON_ERRORS = (
    "INVALID_REQUEST",
    "UNAUTHORIZED",
    "FORBIDDEN",
    "DATABASE_UNAVAILABLE",
    "PAYLOAD_TOO_LARGE",
    "RATE_LIMITED",
    "INTERNAL_ERROR",
)

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/cleanup",
    responses={
        202: JOB_RUNNING,
        **responses(*COMMON_ERRORS, "CSP_UNAVAILABLE", "REAPER_UNAVAILABLE", "ALLOCATOR_UNAVAILABLE"),
    },
)
async def cleanup(request: Request, response: Response) -> Cleanup | JobRunning:
    """Delete all pending sandboxes in CSP now, without waiting for their backoff. If a clean-up is running, the
    call joins it."""
    reply = await admin_jobs.run_job(
        request,
        response,
        "cleanup",
        topology.REAPER_COMMANDS,
        lambda job_id: CleanUpNow(request_id=request.state.request_id, job_id=job_id),
        unavailable="REAPER_UNAVAILABLE",
    )
    if isinstance(reply, JobRunning):
        return reply
    return Cleanup(deleted=reply.deleted, failed=reply.failed, duration_ms=reply.duration_ms)


@router.post(
    "/sandboxes/{sandbox_id}/release",
    responses=responses(
        *COMMON_ERRORS, "SANDBOX_NOT_FOUND", "NOT_ALLOCATED", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"
    ),
)
async def release(
    request: Request,
    sandbox_id: str,
    reason: Annotated[str, Query(min_length=1, max_length=500, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")],
) -> Release:
    """End the lease of any holder and mark the sandbox for deletion. A repeated call succeeds. The lease record
    keeps `reason`."""
    request.scope["state"]["ids"] = {"sandbox_id": sandbox_id}
    return await _release_by(request, partial(EndLease, sandbox_id=sandbox_id, note=reason))


@router.post(
    "/sandboxes/{sandbox_id}/retry-deletion",
    responses=responses(
        *COMMON_ERRORS, "SANDBOX_NOT_FOUND", "NOT_DELETION_FAILED", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"
    ),
)
async def retry_deletion(
    request: Request,
    sandbox_id: str,
    end_hold: Annotated[bool, Query(description="also delete a broken sandbox before its hold has ended")] = False,
) -> Release:
    """Retry a failed deletion: `deletion_failed` becomes `pending_deletion`, and the count of attempts restarts.
    With `end_hold`, the call also ends the hold of a broken sandbox."""
    request.scope["state"]["ids"] = {"sandbox_id": sandbox_id}
    return await _release_by(request, partial(RetryDeletion, sandbox_id=sandbox_id, end_hold=end_hold))


@router.post(
    "/restore/confirm", responses=responses(*COMMON_ERRORS, "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT")
)
async def confirm_restore(request: Request) -> RestoreConfirmed:
    """Accept a database that lacks the newest lease, after the steps for the restore of a backup. Until then,
    allocations are refused with `DATABASE_BEHIND`. A repeated call succeeds and changes nothing."""
    reply = await request_maintenance(request, ConfirmRestore(request_id=request.state.request_id))
    return RestoreConfirmed(changed=reply.changed)


async def _release_by(request: Request, build_command: Callable[..., Command[SandboxReleased]]) -> Release:
    try:
        command = build_command(request_id=request.state.request_id)
    except ValueError:  # invalid sandbox id
        raise ApiError("SANDBOX_NOT_FOUND", parameters={"cause": "unknown_to_admin"}) from None
    reply = await request_maintenance(request, command)
    return Release.model_validate(reply, from_attributes=True)


async def request_maintenance(request: Request, command: Command[R]) -> R:
    """Send a command of an administrator to the maintenance queue of the allocator and return its reply.

    Raises ApiError ALLOCATOR_UNAVAILABLE, MAINTENANCE_TIMEOUT or the code of a refusal.
    """
    context: Context = request.app.state.context
    command = audited(request, command)
    try:
        if await context.publisher.count_consumers(topology.ALLOCATOR_MAINTENANCE.name) == 0:
            raise ApiError("ALLOCATOR_UNAVAILABLE", parameters={"cause": "not_running"})
        with log_context.bound(request_id=request.state.request_id):
            return await context.rpc_client.request(
                topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=context.settings.admin_wait_sec
            )
    except CommandRefused as error:
        raise from_refusal(error.refusal) from error
    except (Disconnected, ServiceUnavailable) as error:
        raise ApiError("ALLOCATOR_UNAVAILABLE", parameters={"cause": "queue_down"}) from error
    except NoReply as error:
        raise ApiError("MAINTENANCE_TIMEOUT") from error


@router.get("/jobs/{job_id}", responses=responses(*COMMON_ERRORS, "JOB_NOT_FOUND", "DATABASE_UNAVAILABLE"))
async def get_job(request: Request, job_id: str) -> Job:
    """Return the progress and the result of a sync or clean-up."""
    context: Context = request.app.state.context
    job = await sandboxes.find_job(context.engine, _parse_id(job_id))
    if job is None:
        raise _job_not_found()
    return job


def _parse_id(job_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(job_id)
    except ValueError:
        raise _job_not_found() from None


def _job_not_found() -> ApiError:
    return ApiError("JOB_NOT_FOUND", "There is no such job. Use the job_id of the response that started it.")
