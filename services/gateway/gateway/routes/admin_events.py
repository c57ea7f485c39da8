"""Admin route for events as server-sent events."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from gateway.api.responses import responses
from gateway.context import Context
from gateway.event_feed import EventFeed, EventStream, StreamedEvent
from gateway.queries.event_replay import Replay, read_events_after
from gateway.routes.admin_actions import COMMON_ERRORS

HEARTBEAT_SEC = 15
RETRY_MS = 2000
"""Pause of the client before it connects again."""

router = APIRouter(prefix="/v1/admin", tags=["admin"])

LastEventId = Annotated[
    str,
    Header(
        pattern=r"^[0-9]*$",
        max_length=18,
        description="`id` of the last received event; the stream continues there",
    ),
]

_STREAM = {
    "description": "Server-sent events. `data` is a CloudEvent as in docs/asyncapi.json, `event` its type, `id` "
    "its sequence, or `resumeafter` if it has one. The event `gap` says that the stream leaves out events: read "
    "the state again.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={
        200: _STREAM,
        **responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE", "EVENTS_UNAVAILABLE", "TOO_MANY_STREAMS"),
    },
)
async def get_events(request: Request, last_event_id: LastEventId = "") -> StreamingResponse:
    """Stream the events of the broker as they are published. With `Last-Event-ID`, the stream begins with the
    events of sandboxes since then, from their history; some may be repeated. Each event arrives at least once. A
    client that does not keep up is disconnected and continues with `Last-Event-ID`."""
    context: Context = request.app.state.context
    if "is_head" in request.scope["state"]:  # without a body, the response would never end
        return StreamingResponse(iter(()), media_type=EventStreamResponse.media_type)
    request.scope["state"]["is_stream"] = True
    stream = context.event_feed.open_stream()
    try:
        await context.event_feed.wait_subscribed()
        # After the subscription, so that no event falls between the replay and the live events.
        replay = await read_events_after(context.engine, int(last_event_id)) if last_event_id else None
    except BaseException:  # a cancellation too, because the stream would count for ever
        context.event_feed.close_stream(stream)
        raise
    return EventStreamResponse(context.event_feed, stream, replay)


class EventStreamResponse(StreamingResponse):
    """Response with the replay and then the live events. It closes the stream at its end."""

    media_type = "text/event-stream"

    def __init__(self, feed: EventFeed, stream: EventStream, replay: Replay | None) -> None:
        super().__init__(_encode(stream, replay))
        self._feed = feed
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.close_stream(self._stream)


async def _encode(stream: EventStream, replay: Replay | None) -> AsyncIterator[bytes]:
    yield format_sse_event(comment="connected", retry=RETRY_MS)
    replayed: set[str | None] = set()
    if replay is not None:
        if not replay.complete:
            yield format_sse_event(event="gap", data_str="{}")
        for event in replay.events:
            replayed.add(event.sequence)
            yield _format(event)
    while not stream.is_ended:
        next_event = await stream.next(HEARTBEAT_SEC)
        if next_event is None:
            yield KEEPALIVE_COMMENT
        elif next_event.sequence is None or next_event.sequence not in replayed:
            yield _format(next_event)


def _format(event: StreamedEvent) -> bytes:
    return format_sse_event(event=event.type, data_str=event.body, id=event.resume_after or event.sequence)
