"""Record of the calls to the simulated APIs, for tests to read."""

import time
from collections import deque
from dataclasses import asdict, dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_CALLS = 100_000
ACCOUNT_NAME = "csp_simulator.account_name"
"""Key of the ASGI scope in which a handler leaves the account name of its call."""


@dataclass(frozen=True, slots=True)
class RunningCall:
    method: str
    path: str
    at: float  # arrival, Unix seconds
    begun: float  # arrival on the monotonic clock, which all processes of this machine share


@dataclass(frozen=True, slots=True)
class EndedCall(RunningCall):
    seq: int  # rises by one per ended call, also after the record is cleared
    status: int | None  # missing if the client disconnected before the response
    ended_at: float
    ended: float
    duration_ms: float
    account_name: str | None  # name of the created account, or of the look-up


class CallRecorder:
    """ASGI middleware that keeps the last 100,000 calls in the order they ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running: dict[int, RunningCall] = {}
        self._ended: deque[EndedCall] = deque(maxlen=MAX_CALLS)
        self._next_key = 0
        self._seq = 0

    def list_ended(
        self, method: str | None = None, path_contains: str = "", status: int | None = None, after_seq: int = 0
    ) -> list[EndedCall]:
        """List the ended calls that match all given filters."""
        return [
            call
            for call in self._ended
            if call.seq > after_seq and status in (None, call.status) and _is_match(call, method, path_contains)
        ]

    def list_running(self, method: str | None = None, path_contains: str = "") -> list[RunningCall]:
        """List the running calls, oldest first."""
        return [call for call in self._running.values() if _is_match(call, method, path_contains)]

    def clear(self) -> None:
        self._ended.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._next_key += 1
        key, call = self._next_key, RunningCall(scope["method"], scope["path"], time.time(), time.monotonic())
        self._running[key] = call
        try:
            await self._app(scope, receive, record_status)
        finally:
            del self._running[key]
            self._record_end(call, status, scope.get(ACCOUNT_NAME))

    def _record_end(self, call: RunningCall, status: int | None, account_name: str | None) -> None:
        self._seq += 1
        ended_at, ended = time.time(), time.monotonic()
        duration_ms = round((ended - call.begun) * 1000, 3)
        self._ended.append(
            EndedCall(
                **asdict(call),
                seq=self._seq,
                status=status,
                ended_at=ended_at,
                ended=ended,
                duration_ms=duration_ms,
                account_name=account_name,
            )
        )


def _is_match(call: RunningCall, method: str | None, path_contains: str) -> bool:
    return (method is None or call.method == method.upper()) and path_contains in call.path
