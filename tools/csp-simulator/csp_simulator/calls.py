"""The record of every call to the CSP API, for tests to look at afterwards."""

import time
from collections import deque
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_CALLS = 100_000


@dataclass(frozen=True, slots=True)
class Call:
    seq: int  # rises by one per answered call; clearing the record does not start it again
    at: float  # Unix seconds of the arrival
    method: str
    path: str
    status: int
    duration_ms: float


class Calls:
    """Passes calls on to `app` and keeps the last 100,000 of them, in the order they ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._calls: deque[Call] = deque(maxlen=MAX_CALLS)
        self._seq = 0

    def select(self, method: str | None, path_contains: str) -> list[Call]:
        return [
            call
            for call in self._calls
            if (method is None or call.method == method.upper()) and path_contains in call.path
        ]

    def clear(self) -> None:
        self._calls.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        at, start, status = time.time(), time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            self._seq += 1
            duration_ms = round((time.perf_counter() - start) * 1000, 3)
            self._calls.append(Call(self._seq, at, scope["method"], scope["path"], status, duration_ms))
