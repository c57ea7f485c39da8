"""uvicorn server with a drain before its stop."""

import signal
import time
from types import FrameType

import structlog
import uvicorn
from starlette.applications import Starlette

STOP_SEC = 25
"""Seconds from the signal until open requests are cut off. Platforms kill the process after 30 s, and the tasks
must end before that."""

log = structlog.get_logger()


class Server(uvicorn.Server):
    """uvicorn server with a drain of `drain_sec` after SIGTERM, with `app.state.stopping` set.

    During the drain /readyz answers 503, so that proxies send new requests to other replicas. Each response closes
    its connection, so that clients connect to another replica. Afterwards uvicorn stops listening and closes idle
    connections. Without the drain, a request sent at that moment would be lost.

    SIGINT skips the drain, because a developer waits at the keyboard. A failed task skips it too, because the
    service cannot work any more.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, *, drain_sec: float) -> None:
        super().__init__(config)
        self._state = app.state
        self._drain_sec = drain_sec
        self._drained_at: float | None = None
        self._skip_drain = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and not self._skip_drain:
            self._skip_drain = self.should_exit = True  # uvicorn handles a second SIGINT and stops at once
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return True when the server stops. uvicorn calls this ten times per second."""
        if not await super().on_tick(counter):
            return False
        if self._drained_at is None:
            self._drained_at = time.monotonic() + self._drain_sec
            self._start_draining()
        failed = getattr(self._state, "failed", False)
        return self._skip_drain or failed or time.monotonic() >= self._drained_at

    def _start_draining(self) -> None:
        log.info("service.stopping", drain_sec=self._drain_sec)
        self._state.stopping = True
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # the next tick rebuilds the default headers from these
        self.server_state.default_headers.append(close)
