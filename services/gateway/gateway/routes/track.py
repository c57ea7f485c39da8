"""The track routes: what lab authors' scripts call."""

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from gateway import metrics
from gateway.allocator_client import Gone, Unavailable
from gateway.api.errors import ApiError, raise_for_refusal
from gateway.api.schemas import Lease, Release, Sandbox, responses
from gateway.context import Context
from gateway.queries import sandboxes
from gateway.web import headers
from gateway.web.headers import Allocation, Holder
from sandbox_broker.contract.commands import AllocateSandbox, Command, ReleaseSandbox
from sandbox_broker.contract.replies import LeaseGranted, Reply, SandboxReleased
from sandbox_broker.observability import tracing

_ALWAYS = (
    "MISSING_SANDBOX_ID",
    "INVALID_HEADER",
    "UNAUTHORIZED",
    "PAYLOAD_TOO_LARGE",
    "RATE_LIMITED",
    "INTERNAL_ERROR",
)

router = APIRouter(prefix="/v1", tags=["track"])


ALLOCATE = "/v1/allocate"


async def fast_allocate(scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/allocate as an ASGI application: see main.Gateway."""
    context: Context = scope["app"].state.context
    context.auth.require_track_token(scope)
    response = await _lease(Request(scope, receive))
    await response(scope, receive, send)


async def _lease(request: Request) -> Response:
    """Leases a sandbox to the student who asks, or gives the one they hold."""
    given = headers.read_fields(request.scope)
    holder, rest = headers.read_holder(request.scope, given), headers.read_allocation_headers(given)
    ids = request.scope["state"]["ids"] = {"holder": holder}
    if rest.track_name is not None:
        ids["track_name"] = rest.track_name
    command = AllocateSandbox(
        request_id=request.state.request_id,
        holder=holder,
        track_name=rest.track_name,
        name_prefix=rest.name_prefix,
        idempotency_key=rest.idempotency_key,
        traceparent=tracing.traceparent(),
    )
    with metrics.ALLOCATION_LATENCY.time():
        try:
            reply = await _ask(request, command, timeout_code="ALLOCATION_TIMEOUT")
            if not isinstance(reply, LeaseGranted):
                raise_for_refusal(reply)
        except ApiError as error:
            metrics.ALLOCATIONS.labels(outcome=error.code.lower()).inc()
            raise
        except Gone:
            metrics.ALLOCATIONS.labels(outcome="client_gone").inc()
            raise
    ids["sandbox_id"] = reply.sandbox_id
    if reply.new:
        metrics.ALLOCATED.inc()
    else:
        metrics.REPEATED.inc()
        metrics.IDEMPOTENT_HITS.inc()
    lease = Lease.model_validate(reply, from_attributes=True)
    return Response(lease.model_dump_json(), 201 if reply.new else 200, media_type="application/json")


@router.post(
    ALLOCATE.removeprefix(router.prefix),
    response_model=Lease,
    status_code=201,
    responses={
        200: {"model": Lease, "description": "The lease that this student already holds"},
        **responses(
            *_ALWAYS,
            "POOL_EXHAUSTED",
            "IDEMPOTENCY_KEY_CONFLICT",
            "ALLOCATOR_UNAVAILABLE",
            "ALLOCATION_TIMEOUT",
        ),
    },
)
async def allocate(request: Request, _: Holder, __: Allocation) -> Response:
    """Leases a sandbox to the student, or gives the one they hold."""
    return await _lease(request)


@router.post(
    "/sandboxes/{sandbox_id}/mark-for-deletion",
    responses=responses(
        *_ALWAYS, "NOT_SANDBOX_OWNER", "SANDBOX_NOT_FOUND", "ALLOCATOR_UNAVAILABLE", "RELEASE_TIMEOUT"
    ),
)
async def mark_for_deletion(request: Request, sandbox_id: str, holder: Holder) -> Release:
    """Ends the student's lease; the sandbox will be deleted. Repeating it, or being late, is success."""
    request.scope["state"]["ids"] = {"holder": holder, "sandbox_id": sandbox_id}
    try:
        command = ReleaseSandbox(
            request_id=request.state.request_id,
            sandbox_id=sandbox_id,
            holder=holder,
            traceparent=tracing.traceparent(),
        )
    except ValueError:
        raise _no_such_sandbox() from None
    try:
        reply = await _ask(request, command, timeout_code="RELEASE_TIMEOUT")
        if not isinstance(reply, SandboxReleased):
            raise_for_refusal(reply)
    except ApiError as error:
        metrics.DELETIONS_MARKED.labels(outcome=error.code.lower()).inc()
        raise
    metrics.DELETIONS_MARKED.labels(outcome="marked").inc()
    return Release.model_validate(reply, from_attributes=True)


@router.get(
    "/sandboxes/{sandbox_id}",
    responses=responses(*_ALWAYS, "NOT_SANDBOX_OWNER", "SANDBOX_NOT_FOUND", "DATABASE_UNAVAILABLE"),
)
async def get_sandbox(request: Request, sandbox_id: str, holder: Holder) -> Sandbox:
    """The student's sandbox, also after its release."""
    context: Context = request.app.state.context
    request.scope["state"]["ids"] = {"holder": holder, "sandbox_id": sandbox_id}
    found = await sandboxes.sandbox(context.engine, sandbox_id) if "\0" not in sandbox_id else None
    if found is None:
        raise _no_such_sandbox()
    if found.sandbox is None or found.holder != holder:
        raise ApiError(
            "NOT_SANDBOX_OWNER",
            "This sandbox is not leased to this student. "
            "Send the X-Instruqt-Sandbox-ID that it was allocated with.",
        )
    return found.sandbox


async def _ask(request: Request, command: Command, *, timeout_code: str) -> Reply:
    context: Context = request.app.state.context
    try:
        return await context.allocator.ask(
            command, timeout_sec=context.settings.allocate_timeout_sec, scope=request.scope
        )
    except Unavailable as error:
        raise ApiError("ALLOCATOR_UNAVAILABLE", f"{error} Nothing is lost: try again shortly.") from error
    except TimeoutError as error:
        raise ApiError(
            timeout_code,
            "No answer in time. The request may still succeed: asking again gives the same result.",
        ) from error


def _no_such_sandbox() -> ApiError:
    return ApiError(
        "SANDBOX_NOT_FOUND", "There is no such sandbox. Use the sandbox_id that the allocation returned."
    )
