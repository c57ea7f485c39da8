"""The record of every call to the APIs, for tests to look at afterwards."""

import time
from collections import deque
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_CALLS = 100_000


@dataclass(frozen=True, slots=True)
class Running:
    method: str
    path: str
    at: float  # Unix seconds of the arrival
    begun: float  # the same on the monotonic clock, which all processes of this machine share


@dataclass(frozen=True, slots=True)
class Call(Running):
    seq: int  # rises by one per ended call; clearing the record does not start it again
    status: int | None  # None if the client went away without an answer
    ended_at: float
    ended: float
    duration_ms: float


class Calls:
    """Passes calls on to `app` and keeps the last 100,000 of them, in the order they ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running: dict[int, Running] = {}
        self._calls: deque[Call] = deque(maxlen=MAX_CALLS)
        self._begun = 0
        self._seq = 0

    def select(
        self, method: str | None = None, path_contains: str = "", status: int | None = None, after_seq: int = 0
    ) -> list[Call]:
        """The calls that have ended; `method`, `path_contains` and `status` must all hold."""
        return [
            call
            for call in self._calls
            if call.seq > after_seq and status in (None, call.status) and _matches(call, method, path_contains)
        ]

    def running(self, method: str | None = None, path_contains: str = "") -> list[Running]:
        """The calls that have arrived and not ended, the oldest first."""
        return [call for call in self._running.values() if _matches(call, method, path_contains)]

    def clear(self) -> None:
        self._calls.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._begun += 1
        key, call = self._begun, Running(scope["method"], scope["path"], time.time(), time.monotonic())
        self._running[key] = call
        try:
            await self._app(scope, receive, note_status)
        finally:
            del self._running[key]
            self._end(call, status)

    def _end(self, call: Running, status: int | None) -> None:
        self._seq += 1
        ended_at, ended = time.time(), time.monotonic()
        duration_ms = round((ended - call.begun) * 1000, 3)
        self._calls.append(
            Call(call.method, call.path, call.at, call.begun, self._seq, status, ended_at, ended, duration_ms)
        )


def _matches(call: Running, method: str | None, path_contains: str) -> bool:
    return (method is None or call.method == method.upper()) and path_contains in call.path
