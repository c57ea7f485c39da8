"""Live updates: tells an open page that the broker has changed. The page then fetches itself again."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
from fastapi import APIRouter, Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from console import metrics
from console.web import SignedIn

QUIET_SEC = 2.0
"""Shortest time between two messages. Under load one message stands for many events."""
HEARTBEAT_SEC = 15.0
STOP_CHECK_SEC = 0.5
RETRY_MS = 3000
TIMEOUT = httpx2.Timeout(10, read=60)
"""The gateway sends a heartbeat every 15 s."""

router = APIRouter()


class LiveStreams:
    """Number of open streams, and the end of all of them when the console stops."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def is_full(self) -> bool:
        return len(self.tasks) >= self.limit


@router.get("/events")
async def stream_changes(request: Request, person: SignedIn) -> Response:
    streams: LiveStreams = request.app.state.streams
    if streams.is_full:
        return Response(status_code=503, headers={"Retry-After": "30"})
    upstream: httpx2.Request = request.app.state.http.build_request(
        "GET", "/v1/admin/events", headers={"Authorization": f"Bearer {person.token}"}, timeout=TIMEOUT
    )
    try:
        answer = await request.app.state.http.send(upstream, stream=True)
    except httpx2.HTTPError:
        return Response(status_code=503)
    if not answer.is_success:
        await answer.aclose()
        # 204 ends the attempts of the browser: the token has no rights any more, so retries are useless.
        return Response(status_code=204 if answer.status_code in (401, 403) else 503)
    return ChangesResponse(request, answer, is_again="last-event-id" in request.headers)


class ChangesResponse(StreamingResponse):
    """Events `change`, at most one every QUIET_SEC."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, upstream: httpx2.Response, *, is_again: bool) -> None:
        super().__init__(self._encode(), headers={"X-Accel-Buffering": "no"})
        self._app = request.app
        self._upstream = upstream
        self._changed = asyncio.Event()
        if is_again:  # the page may have missed changes while it was not connected
            self._changed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading = asyncio.create_task(self._read_upstream())
        streams: LiveStreams = self._app.state.streams
        streams.tasks.add(reading)
        self._reading = reading
        metrics.STREAMS.inc()
        try:
            await super().__call__(scope, receive, send)
        finally:
            metrics.STREAMS.dec()
            streams.tasks.discard(reading)
            reading.cancel()
            await asyncio.wait([reading])
            await self._upstream.aclose()

    async def _read_upstream(self) -> None:
        try:
            async for line in self._upstream.aiter_lines():
                if line.startswith("data:"):
                    self._changed.set()
        except httpx2.HTTPError:
            return

    async def _encode(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        yield format_sse_event(comment="connected", retry=RETRY_MS)
        number, heartbeat_at = 0, loop.time() + HEARTBEAT_SEC
        while not (self._reading.done() or getattr(self._app.state, "stopping", False)):
            try:
                async with asyncio.timeout(STOP_CHECK_SEC):
                    await self._changed.wait()
            except TimeoutError:
                if loop.time() >= heartbeat_at:
                    heartbeat_at = loop.time() + HEARTBEAT_SEC
                    yield KEEPALIVE_COMMENT
                continue
            self._changed.clear()
            number += 1
            yield format_sse_event(event="change", data_str="{}", id=str(number))
            await asyncio.sleep(QUIET_SEC)
