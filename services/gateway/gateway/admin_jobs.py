"""Work that an administrator starts and that may take longer than a request: the answer, if it comes in time, or
a job to ask after."""

import asyncio
import uuid
from collections.abc import Callable

from fastapi import Request, Response

from gateway.api.errors import ApiError, raise_for_refusal
from gateway.api.schemas import JobRunning
from gateway.context import Context
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command, RecordJob
from sandbox_broker.contract.replies import Recorded, Reply
from sandbox_broker.contract.types import JobKind
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Unroutable


async def run(
    request: Request,
    response: Response,
    kind: JobKind,
    queue: topology.Queue,
    command: Callable[[uuid.UUID], Command],
    *,
    unavailable: tuple[str, str],
) -> Reply | JobRunning:
    """Sends the command that starts the job. Its record is made first: whoever is told of a job finds it.

    `unavailable` is the error when nobody works on that queue: its code, and the service's name.
    """
    context: Context = request.app.state.context
    loop = asyncio.get_running_loop()
    deadline = loop.time() + context.settings.admin_wait_sec
    job_id = uuid.uuid4()
    code, service = unavailable
    try:
        if await context.publisher.consumers(queue.name) == 0:
            raise ApiError(code, f"No {service} is running. Start it, then try again.")
        if await context.publisher.consumers(topology.ALLOCATOR_MAINTENANCE.name) == 0:
            raise ApiError("ALLOCATOR_UNAVAILABLE", "No allocator is running. Start it, then try again.")
        request.scope["state"]["ids"] = {"job_id": str(job_id)}
        await _record(context, RecordJob(request_id=request.state.request_id, job_id=job_id, kind=kind), deadline)
        return await context.requester.request(queue, command(job_id), timeout_sec=deadline - loop.time())
    except (Disconnected, Unroutable) as error:
        raise ApiError(code, "The queue is down. Try again shortly.") from error
    except TimeoutError:
        running = JobRunning(job_id=job_id, job_url=f"/v1/admin/jobs/{job_id}")
        response.status_code = 202
        response.headers["Location"] = running.job_url
        return running


async def _record(context: Context, command: RecordJob, deadline: float) -> None:
    left = deadline - asyncio.get_running_loop().time()
    try:
        reply = await context.requester.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=left)
    except TimeoutError as error:
        raise ApiError("ALLOCATOR_UNAVAILABLE", "The allocator does not answer. Try again shortly.") from error
    if not isinstance(reply, Recorded):
        raise_for_refusal(reply)
