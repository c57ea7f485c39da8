"""Live updates: tells an open page that the broker has changed. The page then fetches itself again."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
from fastapi import APIRouter, Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from console import metrics
from console.live_feed import LiveFeed, LiveFeeds
from console.web import SignedIn

HEARTBEAT_SEC = 15.0
STOP_CHECK_SEC = 0.5
RETRY_MS = 3000
TIMEOUT = httpx2.Timeout(10, read=60)
"""The gateway sends a heartbeat every 15 s."""

router = APIRouter()


class _NoStream(Exception):
    """The gateway opens no stream. `status` is its answer, 0 without one."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@router.get("/events")
async def stream_changes(request: Request, person: SignedIn) -> Response:
    feeds: LiveFeeds = request.app.state.feeds
    if feeds.is_full:
        return Response(status_code=503, headers={"Retry-After": "30"})

    async def connect() -> httpx2.Response:
        headers = {"Authorization": f"Bearer {person.token}"}
        client: httpx2.AsyncClient = request.app.state.http
        try:
            answer = await client.send(
                client.build_request("GET", "/v1/admin/events", headers=headers, timeout=TIMEOUT), stream=True
            )
        except httpx2.HTTPError:
            raise _NoStream(0) from None
        if not answer.is_success:
            await answer.aclose()
            raise _NoStream(answer.status_code)
        return answer

    changed = asyncio.Event()
    try:
        feed = await feeds.join(person.token, changed, connect)
    except _NoStream as error:
        # 204 ends the attempts of the browser: the token has no rights any more, so retries are useless.
        return Response(status_code=204 if error.status in (401, 403) else 503)
    if "last-event-id" in request.headers:  # the page may have missed changes while it was not connected
        changed.set()
    return ChangesResponse(request, person.token, feed, changed)


class ChangesResponse(StreamingResponse):
    """Events `change`. It leaves the feed at its end."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, token: str, feed: LiveFeed, changed: asyncio.Event) -> None:
        super().__init__(self._encode(), headers={"X-Accel-Buffering": "no"})
        self._app = request.app
        self._token = token
        self._feed = feed
        self._changed = changed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics.STREAMS.inc()
        try:
            await super().__call__(scope, receive, send)
        finally:
            metrics.STREAMS.dec()
            await self._app.state.feeds.leave(self._token, self._feed, self._changed)

    async def _encode(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        yield format_sse_event(comment="connected", retry=RETRY_MS)
        number, heartbeat_at = 0, loop.time() + HEARTBEAT_SEC
        while not (self._feed.is_ended or getattr(self._app.state, "stopping", False)):
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
