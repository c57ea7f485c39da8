"""A line that comes again and again is written a while, and then counted.

The first LINES of one kind in an interval are let through; how many more there were is told at its end. A kind
is one event name, so that a storm of one error hides no other. Only warnings and errors are judged: a line at
info tells of one thing that happened, and is part of somebody's story.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

LINES = 50
INTERVAL_SEC = 10.0
MAX_KINDS = 500
"""That are told apart; our own event names are fewer."""
OTHER = "other"


@dataclass(slots=True)
class _Window:
    ends_at: float
    lines: int = 0
    suppressed: int = 0


class Storms:
    def __init__(
        self,
        tell: Callable[[str, int], None],
        *,
        lines: int = LINES,
        interval_sec: float = INTERVAL_SEC,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tell` is called with a kind and the number of its lines that were not let through; in a thread, since a
        service may have stopped to log just then."""
        self._tell = tell
        self._lines = lines
        self._interval_sec = interval_sec
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def lets_through(self, kind: str) -> bool:
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
            begins = window.suppressed == 1
        if begins:
            timer = threading.Timer(window.ends_at - now, self._end, (kind, window))
            timer.daemon = True
            timer.start()
        return False

    def flush(self) -> None:
        """Tells now what would be told later: the process ends."""
        for kind, window in list(self._windows.items()):
            self._end(kind, window)

    def _end(self, kind: str, window: _Window) -> None:
        with self._lock:
            suppressed, window.suppressed = window.suppressed, 0
        if suppressed:
            self._tell(kind, suppressed)
