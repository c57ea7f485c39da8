"""Jobs of administrators (sync and clean-up), which may take longer than an HTTP request."""

import asyncio
import uuid
from collections.abc import Callable

from fastapi import Request, Response

from gateway.api.errors import ApiError, from_refusal
from gateway.api.schemas.actions import JobRunning
from gateway.audit import audited
from gateway.context import Context
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command, R, RecordJob
from sandbox_broker.contract.types import JobKind
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.outcome import CommandRefused, NoReply, ServiceUnavailable


async def run_job(
    request: Request,
    response: Response,
    kind: JobKind,
    queue: topology.Queue,
    build_command: Callable[[uuid.UUID], Command[R]],
    *,
    unavailable: str,
) -> R | JobRunning:
    """Start the job. Return its reply, or the 202 response with the job id if there is no reply in time.

    The job is recorded before the command is sent, so that the job in a 202 response always exists. `unavailable`
    is the error code for a queue without consumers. Raises ApiError.
    """
    context: Context = request.app.state.context
    loop = asyncio.get_running_loop()
    deadline = loop.time() + context.settings.admin_wait_sec
    job_id = uuid.uuid4()
    job = audited(request, RecordJob(request_id=request.state.request_id, job_id=job_id, kind=kind))
    try:
        if await context.publisher.count_consumers(queue.name) == 0:
            raise ApiError(unavailable, parameters={"cause": "not_running"})
        if await context.publisher.count_consumers(topology.ALLOCATOR_MAINTENANCE.name) == 0:
            raise ApiError("ALLOCATOR_UNAVAILABLE", parameters={"cause": "not_running"})
        request.scope["state"]["ids"] = {"job_id": str(job_id)}
        await _record_job(context, job, deadline)
        return await context.rpc_client.request(queue, build_command(job_id), timeout_sec=deadline - loop.time())
    except CommandRefused as error:
        raise from_refusal(error.refusal) from error
    except (Disconnected, ServiceUnavailable) as error:
        raise ApiError(unavailable, parameters={"cause": "queue_down"}) from error
    except NoReply:
        running = JobRunning(job_id=job_id, job_url=f"/v1/admin/jobs/{job_id}")
        response.status_code = 202
        response.headers["Location"] = running.job_url
        return running


async def _record_job(context: Context, command: RecordJob, deadline: float) -> None:
    remaining_sec = deadline - asyncio.get_running_loop().time()
    try:
        await context.rpc_client.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=remaining_sec)
    except NoReply as error:
        raise ApiError("ALLOCATOR_UNAVAILABLE", parameters={"cause": "job_not_recorded"}) from error
