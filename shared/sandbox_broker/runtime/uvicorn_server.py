"""uvicorn's server, which takes leave before it goes."""

import signal
import time
from types import FrameType

import structlog
import uvicorn
from starlette.applications import Starlette

STOP_SEC = 25
"""From the signal until what is still unanswered is cut off. Platforms kill after 30 s, and the tasks have to end
before that."""

log = structlog.get_logger()


class Server(uvicorn.Server):
    """Serves for `drain_sec` more after a SIGTERM, with `app.state.stopping` set. Meanwhile /readyz answers 503, so
    that proxies send new requests elsewhere, and each response closes its connection, so that clients look for
    another server. What uvicorn does at once, stop listening and close idle connections, then hits nobody: a
    request that is on its way into such a closing is lost.

    SIGINT comes from somebody who waits at a keyboard, and a service whose task has failed is of no use: both
    leave this out.
    """

    def __init__(self, config: uvicorn.Config, app: Starlette, *, drain_sec: float) -> None:
        super().__init__(config)
        self._state = app.state
        self._drain_sec = drain_sec
        self._drained_at: float | None = None
        self._hurry = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and not self._hurry:
            self._hurry = self.should_exit = True  # a second one is for uvicorn, which then waits for nothing
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second, until it answers True."""
        if not await super().on_tick(counter):
            return False
        if self._drained_at is None:
            self._drained_at = time.monotonic() + self._drain_sec
            self._take_leave()
        failed = getattr(self._state, "failed", False)
        return self._hurry or failed or time.monotonic() >= self._drained_at

    def _take_leave(self) -> None:
        log.info("service.stopping", drain_sec=self._drain_sec)
        self._state.stopping = True
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # of these the next tick makes the default headers anew
        self.server_state.default_headers.append(close)
