"""Webhook of Instruqt: the end of a play ends the lease of its student, and the place in the waiting line.

It complements the cleanup script of a track, which cannot run on a machine that has failed.
"""

import re
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from gateway import metrics
from gateway.allocator_client import ClientDisconnected
from gateway.api.errors import ApiError
from gateway.api.responses import responses
from gateway.api.schemas.instruqt import EventOutcome, EventResult, InstruqtEvent
from gateway.context import Context
from gateway.routes.track import request_allocator
from gateway.web.headers import WebhookHeaders
from gateway.web.webhook_signature import InvalidSignature
from sandbox_broker.contract.commands import EndPlay
from sandbox_broker.contract.types import MAX_ID_LENGTH, MAX_TIME
from sandbox_broker.observability import tracing

EVENTS = "/v1/instruqt/events"

_MAX_LOGGED = 100
"""Longest part of an event type in a log line, in characters."""
_PARTICIPANT_ID = re.compile(f"[ -~]{{1,{MAX_ID_LENGTH}}}")

log = structlog.get_logger()

router = APIRouter(prefix="/v1/instruqt", tags=["instruqt"])


@router.post(
    EVENTS.removeprefix(router.prefix),
    responses=responses(
        "INVALID_EVENT",
        "INVALID_SIGNATURE",
        "EVENTS_NOT_CONFIGURED",
        "PAYLOAD_TOO_LARGE",
        "RATE_LIMITED",
        "INTERNAL_ERROR",
        "DATABASE_BEHIND",
        "ALLOCATOR_UNAVAILABLE",
        "RELEASE_TIMEOUT",
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": InstruqtEvent.model_json_schema()}},
        }
    },
)
async def receive_event(request: Request, _: WebhookHeaders) -> EventResult:
    """Receive a webhook of Instruqt. The end of a play ends the lease of its participant, and the place in the
    waiting line. A repeated event changes nothing. The signature (Standard Webhooks, or Svix) takes the place of a
    token."""
    context: Context = request.app.state.context
    if not context.webhooks.is_enabled:
        raise ApiError("EVENTS_NOT_CONFIGURED")
    body = await _read_body(request)
    try:
        sent_at = context.webhooks.verify(dict(request.scope["headers"]), body)
    except InvalidSignature as error:
        metrics.INSTRUQT_EVENTS.labels(outcome="invalid_signature").inc()
        raise context.auth.limit_failures(request.scope) or ApiError(
            "INVALID_SIGNATURE", parameters={"problem": str(error)}
        ) from error
    event = _parse_event(body)
    holder = event.get("participant_id")
    request.scope["state"]["ids"] = ids = {"event_type": event["type"][:_MAX_LOGGED]}
    if not isinstance(holder, str) or not _PARTICIPANT_ID.fullmatch(holder):
        holder = None
    else:
        ids["holder"] = holder
    outcome, sandbox_id = await _handle_event(request, event["type"], holder, _event_time(event, sent_at))
    metrics.INSTRUQT_EVENTS.labels(outcome=outcome).inc()
    ids["outcome"] = outcome
    if sandbox_id is not None:
        ids["sandbox_id"] = sandbox_id
    return EventResult(outcome=outcome)


async def _handle_event(
    request: Request, event_type: str, holder: str | None, ended_at: int
) -> tuple[EventOutcome, str | None]:
    """End the lease or the wait of the participant if the event is the end of the play. Return the outcome and the
    sandbox of the lease."""
    context: Context = request.app.state.context
    if event_type not in context.settings.instruqt_end_events:
        return "ignored", None
    if holder is None:  # for example the end of a prepared play that no student has started
        return "no_participant", None
    if context.settings.instruqt_events_shadow:
        return "shadow", None
    command = EndPlay(
        request_id=request.state.request_id,
        holder=holder,
        ended_at=ended_at,
        traceparent=tracing.traceparent(),
    )
    reply = await request_allocator(request.scope, command, timeout_code="RELEASE_TIMEOUT")
    return reply.outcome, reply.sandbox_id


async def _read_body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise ClientDisconnected from error


def _parse_event(body: bytes) -> dict[str, Any]:
    """Return the event as a JSON object with a text `type`. Raises ApiError INVALID_EVENT.

    An unusable optional field is no error, because the sender repeats a refused event for days and then stops
    sending events.
    """
    try:
        event = orjson.loads(body)
    except ValueError:
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        metrics.INSTRUQT_EVENTS.labels(outcome="invalid_event").inc()
        raise ApiError("INVALID_EVENT")
    return event


def _event_time(event: dict[str, Any], sent_at: int) -> int:
    """Return the time of the event in Unix seconds, or `sent_at` if the event has none. A repeated attempt has a
    later `sent_at`."""
    try:
        time = datetime.fromisoformat(event["timestamp"])
    except (KeyError, TypeError, ValueError):
        return sent_at
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return min(max(0, int(time.timestamp())), MAX_TIME)
