"""Log rate limit: write repeated log lines up to a limit, then count them.

The first LINES of each kind in an interval pass. At its end, the number of suppressed lines is reported. A kind is
an event name, so many lines of one error hide no other error. The limit applies to warnings and errors only,
because info lines are the log of single requests.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LINES = 50
INTERVAL_SEC = 10.0
MAX_KINDS = 500
"""Maximum number of kinds with their own limit. The event names of this project are fewer."""
OTHER = "other"


@dataclass(slots=True)
class _Window:
    ends_at: float
    lines: int = 0
    suppressed: int = 0


class LogRateLimit:
    def __init__(
        self,
        report: Callable[[str, int], None],
        *,
        lines: int = LINES,
        interval_sec: float = INTERVAL_SEC,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` is called with a kind and the number of its suppressed lines. It runs in a timer thread, because
        no further log call may follow."""
        self._report = report
        self._lines = lines
        self._interval_sec = interval_sec
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def allow(self, kind: str) -> bool:
        now = self._clock()
        with self._lock:
            if kind not in self._windows and len(self._windows) >= MAX_KINDS:
                kind = OTHER
            window = self._windows.get(kind)
            if window is None or now >= window.ends_at:
                window = self._windows[kind] = _Window(now + self._interval_sec)
            if window.lines < self._lines:
                window.lines += 1
                return True
            window.suppressed += 1
            is_first = window.suppressed == 1
        if is_first:
            timer = threading.Timer(window.ends_at - now, self._end, (kind, window))
            timer.daemon = True
            timer.start()
        return False

    def flush(self) -> None:
        """Report all suppressed lines now, before the process ends."""
        for kind, window in list(self._windows.items()):
            self._end(kind, window)

    def _end(self, kind: str, window: _Window) -> None:
        with self._lock:
            suppressed, window.suppressed = window.suppressed, 0
        if suppressed:
            self._report(kind, suppressed)
