"""Routes that change a lease: extend it, claim a standby lease, replace a broken sandbox.

Students change their own lease within the limits of its policy. Administrators change the lease of any student.
"""

import json
import uuid
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from gateway import metrics
from gateway.api.errors import ApiError
from gateway.api.responses import STUDENT_WAITING, responses
from gateway.api.schemas.track import Extension, ExtensionRequest, Lease, ReplacementRequest, StandbyLease
from gateway.audit import audited
from gateway.routes import admin_actions, track
from gateway.web import auth, headers
from gateway.web.bodies import describe_body, read_body
from gateway.web.headers import ExtensionKey, Holder, LeaseSecret, NewHolder, WaitSec
from sandbox_broker.contract.commands import ClaimLease, Command, ExtendLease, R, ReplaceSandbox
from sandbox_broker.contract.replies import LeaseExtended, LeaseGranted, StudentWaiting
from sandbox_broker.contract.types import Message
from sandbox_broker.observability import tracing

MAX_HOURS = 87_600
"""Longest extension in one request: ten years."""
_EXTENSION_IDS = uuid.UUID("6f1d5a52-8ad1-4b0c-9d0e-3a3f6c1f7c55")
"""Namespace of the extension ids that come from an idempotency key."""

_ERRORS = ("SANDBOX_NOT_FOUND", "LEASE_ENDED", "DATABASE_BEHIND", "ALLOCATOR_UNAVAILABLE", "LEASE_CHANGE_TIMEOUT")

router = APIRouter(prefix="/v1", tags=["track"])
admin_router = APIRouter(prefix="/v1/admin", tags=["admin"])

Reason = Annotated[str, Query(min_length=1, max_length=500, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")]


@router.post(
    "/sandboxes/{sandbox_id}/extend",
    openapi_extra=describe_body(ExtensionRequest),
    responses=responses(
        *track.COMMON_ERRORS,
        "INVALID_REQUEST",
        "NOT_SANDBOX_OWNER",
        "EXTENSION_LIMIT",
        "NOT_CLAIMED",
        "IDEMPOTENCY_KEY_CONFLICT",
        *_ERRORS,
    ),
)
async def extend(
    request: Request, sandbox_id: str, holder: Holder, key: ExtensionKey, _: LeaseSecret = None
) -> Extension:
    """Move the end of the student's lease to a later time. The policy limits all extensions of a lease together.
    The call succeeds until the lease ends, also in the grace period after `expires_at`. Send an `Idempotency-Key`,
    so that a repeated request does not extend the lease twice."""
    body = await read_body(request, ExtensionRequest)
    return await _extend(request, sandbox_id, holder, key, hours=body.hours)


@admin_router.post(
    "/sandboxes/{sandbox_id}/extend",
    responses=responses(
        *admin_actions.COMMON_ERRORS, "INVALID_HEADER", "NOT_ALLOCATED", "IDEMPOTENCY_KEY_CONFLICT", *_ERRORS
    ),
)
async def extend_for_administrator(
    request: Request,
    sandbox_id: str,
    hours: Annotated[float, Query(gt=0, le=MAX_HOURS, allow_inf_nan=False, examples=[2])],
    reason: Reason,
    key: ExtensionKey,
) -> Extension:
    """Extend the lease of any student, without the limit of its policy. The extension does not use up the limit of
    the student. A standby lease is extended, too: the student can claim it later. Send an `Idempotency-Key`, so
    that a repeated request does not extend the lease twice. The history of the sandbox keeps `reason`."""
    return await _extend(request, sandbox_id, None, key, hours=hours, note=reason)


async def _extend(
    request: Request, sandbox_id: str, holder: str | None, key: str | None, *, hours: float, note: str | None = None
) -> Extension:
    try:
        reply = await _request_change(
            request,
            "extend",
            ExtendLease,
            sandbox_id=sandbox_id,
            holder=holder,
            extension_id=_extension_id(sandbox_id, holder, key),
            extension_sec=max(1, round(hours * 3600)),
            note=note,
        )
    except ApiError as error:
        if error.code == "LEASE_CHANGE_TIMEOUT" and key is None:
            raise ApiError(error.code, parameters={"cause": "without_key"}) from error
        raise
    return Extension.model_validate(reply, from_attributes=True)


def _extension_id(sandbox_id: str, holder: str | None, key: str | None) -> uuid.UUID:
    """Return the same id for each request with this key."""
    if key is None:
        return uuid.uuid4()
    return uuid.uuid5(_EXTENSION_IDS, json.dumps([sandbox_id, holder, key]))


@router.post(
    "/sandboxes/{sandbox_id}/claim",
    response_model=StandbyLease | Lease,
    responses=responses(
        *track.COMMON_ERRORS, "NOT_SANDBOX_OWNER", "ALREADY_CLAIMED", "NEW_HOLDER_HAS_LEASE", *_ERRORS
    ),
)
async def claim(
    request: Request, sandbox_id: str, holder: Holder, new_holder: NewHolder, _: LeaseSecret = None
) -> Response:
    """Start the time of a standby lease when the student arrives. `X-Instruqt-Sandbox-ID` is the id under which the
    lease was taken. With `X-New-Holder`, the lease belongs to this student id from then on. A repeated call returns
    the same lease."""
    reply = await _request_change(
        request, "claim", ClaimLease, sandbox_id=sandbox_id, holder=holder, new_holder=new_holder
    )
    return track.lease_response(reply, 200)


@router.post(
    "/sandboxes/{sandbox_id}/replace",
    status_code=201,
    response_model=Lease | StandbyLease,
    openapi_extra=describe_body(ReplacementRequest),
    responses={
        200: {"model": Lease | StandbyLease, "description": "This sandbox was replaced before by the returned one"},
        202: STUDENT_WAITING,
        **responses(
            *track.COMMON_ERRORS,
            "INVALID_REQUEST",
            "NOT_SANDBOX_OWNER",
            "REPLACEMENT_LIMIT",
            "POOL_EXHAUSTED",
            *_ERRORS,
        ),
    },
)
async def replace(
    request: Request, sandbox_id: str, holder: Holder, wait_sec: WaitSec, _: LeaseSecret = None
) -> Response:
    """Lease another sandbox to the student instead of a broken one, in one step. Without an available sandbox the
    student keeps the broken one, and a student who sends `Prefer: respond-async` gets a place at the head of the
    waiting line. An operator can inspect the broken sandbox for `BROKEN_HOLD_HOURS` before it is
    deleted. A repeated call returns the same new sandbox."""
    body = await read_body(request, ReplacementRequest)
    return await _replace(request, sandbox_id, holder, body.reason, wait_sec)


@admin_router.post(
    "/sandboxes/{sandbox_id}/replace",
    status_code=201,
    response_model=Lease | StandbyLease,
    responses={
        200: {"model": Lease | StandbyLease, "description": "This sandbox was replaced before by the returned one"},
        **responses(*admin_actions.COMMON_ERRORS, "NOT_ALLOCATED", "POOL_EXHAUSTED", *_ERRORS),
    },
)
async def replace_for_administrator(request: Request, sandbox_id: str, reason: Reason) -> Response:
    """Replace the broken sandbox of any student, without the limit of its policy. The student's script finds the
    new sandbox when it repeats its allocation."""
    return await _replace(request, sandbox_id, None, reason)


async def _replace(
    request: Request, sandbox_id: str, holder: str | None, reason: str, wait_sec: int | None = None
) -> Response:
    reply = await _request_change(
        request,
        "replace",
        ReplaceSandbox,
        sandbox_id=sandbox_id,
        holder=holder,
        reason=reason,
        wait_sec=wait_sec,
    )
    if isinstance(reply, StudentWaiting):
        return track.waiting_response(reply)
    return track.lease_response(reply, 201 if reply.new else 200)


async def _request_change(
    request: Request,
    change: Literal["extend", "claim", "replace"],
    kind: Callable[..., Command[R]],
    *,
    sandbox_id: str,
    holder: str | None,
    **fields: object,
) -> R:
    """Send a command of this kind and count its outcome. Without a `holder` an administrator sends it."""
    request.scope["state"]["ids"] = {"sandbox_id": sandbox_id} | ({} if holder is None else {"holder": holder})
    with track.known_sandbox():
        command = kind(
            request_id=request.state.request_id,
            sandbox_id=sandbox_id,
            holder=holder,
            traceparent=tracing.traceparent(),
            secret_hash=headers.read_secret_hash(request.scope),
            sender=None if holder is None else auth.build_student_sender(request.scope),
            **fields,
        )
    if holder is None:
        command = audited(request, command)
    try:
        reply = await track.request_allocator(request.scope, command, timeout_code="LEASE_CHANGE_TIMEOUT")
    except ApiError as error:
        metrics.LEASE_CHANGES.labels(change, error.code.lower()).inc()
        raise
    metrics.LEASE_CHANGES.labels(change, _outcome(reply)).inc()
    return reply


def _outcome(reply: Message) -> str:
    if isinstance(reply, StudentWaiting):
        return "waiting"
    is_new = reply.changed if isinstance(reply, LeaseExtended) else isinstance(reply, LeaseGranted) and reply.new
    return "done" if is_new else "repeated"
