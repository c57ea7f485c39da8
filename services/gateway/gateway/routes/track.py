"""Track routes. The scripts of lab authors call them for a student."""

import hmac
import time
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
from fastapi import APIRouter, Request, Response
from starlette.types import Scope

from gateway import metrics
from gateway.allocator_client import ClientDisconnected
from gateway.api.errors import ApiError, from_refusal
from gateway.api.responses import STUDENT_WAITING, responses
from gateway.api.schemas.track import Lease, Release, Sandbox, StandbyLease, Waiting
from gateway.context import Context
from gateway.queries import sandboxes
from gateway.web import auth, headers
from gateway.web.direct_routes import DirectResponse
from gateway.web.headers import Allocation, Fields, Holder, LeaseSecret
from sandbox_broker.contract.commands import AllocateSandbox, Command, R, ReleaseSandbox
from sandbox_broker.contract.replies import LeaseGranted, StudentWaiting
from sandbox_broker.messaging.outcome import CommandRefused, NoReply, ServiceUnavailable
from sandbox_broker.observability import tracing

COMMON_ERRORS = (
    "MISSING_SANDBOX_ID",
    "INVALID_HEADER",
    "UNAUTHORIZED",
    "FORBIDDEN",
    "FORBIDDEN_SCOPE",
    "DATABASE_UNAVAILABLE",
    "PAYLOAD_TOO_LARGE",
    "RATE_LIMITED",
    "INTERNAL_ERROR",
)

router = APIRouter(prefix="/v1", tags=["track"])


ALLOCATE = "/v1/allocate"


async def fast_allocate(scope: Scope, fields: Fields) -> DirectResponse:
    """Handle POST /v1/allocate as a direct route: see main.DIRECT_ROUTES."""
    context: Context = scope["app"].state.context
    context.auth.require_track_token(scope)
    headers.refuse_repeated(scope, fields)
    holder, allocation = headers.read_holder(scope, fields), headers.read_allocation_headers(fields)
    state = scope["state"]
    ids = state["ids"] = {"holder": holder}
    if allocation.track_name is not None:
        ids["track_name"] = allocation.track_name
    if context.students_per_address is not None:
        context.students_per_address.count(state["client"].counted, holder)
    command = AllocateSandbox(
        request_id=state["request_id"],
        holder=holder,
        track_name=allocation.track_name,
        name_prefix=allocation.name_prefix,
        idempotency_key=allocation.idempotency_key,
        wait_sec=headers.read_wait_sec(scope, fields),
        mode=allocation.mode,
        access=allocation.access,
        traceparent=tracing.traceparent(),
        secret_hash=headers.read_secret_hash(scope, fields),
        sender=auth.build_student_sender(scope),
    )
    began = time.perf_counter()
    try:
        reply = await request_allocator(scope, command, timeout_code="ALLOCATION_TIMEOUT")
    except ApiError as error:
        metrics.ALLOCATIONS.labels(outcome=error.code.lower()).inc()
        raise
    except ClientDisconnected:
        metrics.ALLOCATIONS.labels(outcome="client_gone").inc()
        raise
    finally:
        metrics.ALLOCATION_LATENCY.observe(time.perf_counter() - began)
    if isinstance(reply, StudentWaiting):
        metrics.WAITING.inc()
        wait_headers = [(name.lower().encode(), value.encode()) for name, value in waiting_headers(reply).items()]
        return DirectResponse(202, render_place(reply), wait_headers)
    ids["sandbox_id"] = reply.sandbox_id
    if reply.new:
        metrics.ALLOCATED.inc()
        return DirectResponse(201, render_lease(reply))
    metrics.REPEATED.inc()
    metrics.IDEMPOTENT_HITS.inc()
    return DirectResponse(200, render_lease(reply))


def render_lease(reply: LeaseGranted) -> bytes:
    """Return the JSON of `Lease`, or of `StandbyLease` if the lease is or was in standby.

    Each allocation needs one. With the models it takes five times as long.
    """
    lease: dict[str, object] = {
        "sandbox_id": reply.sandbox_id,
        "name": reply.name,
        "external_id": reply.external_id,
        "allocated_at": reply.allocated_at,
        "expires_at": reply.expires_at,
        "sfdc_account_id": reply.sfdc_account_id,
    }
    if reply.mode != "active" or reply.claimed_at is not None:
        lease |= {"mode": reply.mode, "claimed_at": reply.claimed_at}
    return orjson.dumps(lease)


def render_place(reply: StudentWaiting) -> bytes:
    """Return the JSON of `Waiting`."""
    return Waiting.model_validate(reply, from_attributes=True).model_dump_json().encode()


def waiting_headers(reply: StudentWaiting) -> dict[str, str]:
    return {"Retry-After": str(reply.retry_after), "Preference-Applied": headers.WAIT_APPLIED}


def lease_response(reply: LeaseGranted, status: int) -> Response:
    return Response(render_lease(reply), status, media_type="application/json")


def waiting_response(reply: StudentWaiting) -> Response:
    return Response(render_place(reply), 202, waiting_headers(reply), media_type="application/json")


@router.post(
    ALLOCATE.removeprefix(router.prefix),
    response_model=Lease | StandbyLease,
    status_code=201,
    responses={
        200: {"model": Lease | StandbyLease, "description": "The active lease of this student"},
        202: STUDENT_WAITING,
        **responses(
            *COMMON_ERRORS,
            "POOL_EXHAUSTED",
            "QUOTA_EXCEEDED",
            "NOT_SANDBOX_OWNER",
            "IDEMPOTENCY_KEY_CONFLICT",
            "DATABASE_BEHIND",
            "ALLOCATOR_UNAVAILABLE",
            "ALLOCATION_TIMEOUT",
        ),
    },
)
async def allocate(_: Holder, __: Allocation, ___: LeaseSecret = None) -> Response:
    """Lease a sandbox to the student. Return the active lease if the student holds one. Without an available
    sandbox, a student who sends `Prefer: respond-async` gets a place in the waiting line. With `X-Lease-Mode:
    standby`, the time of a new lease starts with its claim."""
    # Only for the OpenAPI document and the Allow header.
    raise AssertionError("never runs, because RequestMiddleware calls fast_allocate")


@router.post(
    "/sandboxes/{sandbox_id}/mark-for-deletion",
    responses=responses(
        *COMMON_ERRORS,
        "NOT_SANDBOX_OWNER",
        "SANDBOX_NOT_FOUND",
        "DATABASE_BEHIND",
        "ALLOCATOR_UNAVAILABLE",
        "RELEASE_TIMEOUT",
    ),
)
async def mark_for_deletion(request: Request, sandbox_id: str, holder: Holder, _: LeaseSecret = None) -> Release:
    """End the student's lease and mark the sandbox for deletion. A repeated or late call succeeds."""
    request.scope["state"]["ids"] = {"holder": holder, "sandbox_id": sandbox_id}
    with known_sandbox():
        command = ReleaseSandbox(
            request_id=request.state.request_id,
            sandbox_id=sandbox_id,
            holder=holder,
            traceparent=tracing.traceparent(),
            secret_hash=headers.read_secret_hash(request.scope),
            sender=auth.build_student_sender(request.scope),
        )
    try:
        reply = await request_allocator(request.scope, command, timeout_code="RELEASE_TIMEOUT")
    except ApiError as error:
        metrics.DELETIONS_MARKED.labels(outcome=error.code.lower()).inc()
        raise
    metrics.DELETIONS_MARKED.labels(outcome="marked").inc()
    return Release.model_validate(reply, from_attributes=True)


@router.get(
    "/sandboxes/{sandbox_id}",
    responses=responses(*COMMON_ERRORS, "NOT_SANDBOX_OWNER", "SANDBOX_NOT_FOUND", "DATABASE_UNAVAILABLE"),
)
async def get_sandbox(request: Request, sandbox_id: str, holder: Holder, _: LeaseSecret = None) -> Sandbox:
    """Return the student's sandbox, also after its release."""
    context: Context = request.app.state.context
    request.scope["state"]["ids"] = {"holder": holder, "sandbox_id": sandbox_id}
    held = await sandboxes.held_sandbox(context.engine, sandbox_id) if "\0" not in sandbox_id else None
    if held is None:
        raise _sandbox_not_found()
    check_access(request, held.token, held.secret_hash)
    if held.sandbox is None or held.holder != holder:
        raise ApiError("NOT_SANDBOX_OWNER", parameters={"sandbox_id": sandbox_id})
    return held.sandbox


def check_access(request: Request, token: str | None, secret_hash: bytes | None) -> None:
    """Check that the sender may see a lease that was made with this token and has a secret with this hash.

    Raises ApiError FORBIDDEN_SCOPE or NOT_SANDBOX_OWNER, or DATABASE_UNAVAILABLE if the token may have been revoked
    meanwhile. The hashes are compared in constant time.
    """
    named = request.state.caller.named
    if named is not None and not request.app.state.context.tokens.is_fresh:
        raise ApiError("DATABASE_UNAVAILABLE")
    if named is not None and named.is_scoped and token != named.name:
        raise ApiError("FORBIDDEN_SCOPE", parameters={"cause": "lease"})
    if secret_hash is not None:
        sent = headers.read_secret_hash(request.scope)
        if not hmac.compare_digest(secret_hash, bytes.fromhex(sent or "")):
            raise ApiError("NOT_SANDBOX_OWNER", parameters={"cause": "secret"})


async def request_allocator(scope: Scope, command: Command[R], *, timeout_code: str) -> R:
    """Send a command to the allocator and return its reply.

    Raises ClientDisconnected, or ApiError ALLOCATOR_UNAVAILABLE, `timeout_code` or the code of a refusal.
    """
    context: Context = scope["app"].state.context
    try:
        return await context.allocator.request(
            command, timeout_sec=context.settings.allocate_timeout_sec, scope=scope
        )
    except CommandRefused as error:
        raise from_refusal(error.refusal) from error
    except ServiceUnavailable as error:
        parameters = {"cause": "unreachable", "problem": str(error)}
        raise ApiError("ALLOCATOR_UNAVAILABLE", parameters=parameters) from error
    except NoReply as error:
        raise ApiError(timeout_code) from error


@contextmanager
def known_sandbox() -> Iterator[None]:
    """Raises ApiError SANDBOX_NOT_FOUND if a command in the block is invalid, because its sandbox id is."""
    try:
        yield
    except ValueError:
        raise _sandbox_not_found() from None


def _sandbox_not_found() -> ApiError:
    return ApiError("SANDBOX_NOT_FOUND", parameters={"cause": "unknown_id"})
