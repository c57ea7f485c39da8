"""Log lines written in blocks: one write for many lines, because each write wakes the reader of the pipe."""

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

BLOCK_SEC = 0.05
"""Longest time that a line waits for others while an event loop runs. A killed process loses these lines."""
MAX_LINES = 1000


class LogBlocks:
    """Output for log lines, with the methods of a structlog logger. The owner calls `flush` at exit.

    Information waits for the end of its block. Warnings and errors end the block, because they may be the last
    lines of the process. Without an event loop each line is written at once.
    """

    def __init__(self, output: Callable[[], BinaryIO] = lambda: sys.stdout.buffer) -> None:
        self._output = output
        self._lines: list[bytes] = []
        self._has_timer = False
        self._lock = threading.Lock()

    def info(self, line: bytes | str) -> None:
        """Add a line without its line break. Raises OSError if it writes and fails."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.warning(line)
            return
        with self._lock:
            self._lines.append(_encode(line))
            is_full = len(self._lines) >= MAX_LINES
            starts_timer = not self._has_timer
            self._has_timer = True
        if is_full:
            self.flush()
        if starts_timer:
            loop.call_later(BLOCK_SEC, self._end_block)

    debug = info

    def warning(self, line: bytes | str) -> None:
        """Write a line and all lines before it. Raises OSError if that fails."""
        with self._lock:
            self._lines.append(_encode(line))
        self.flush()

    error = critical = warning

    def flush(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                output = self._output()
                output.write(b"\n".join([*lines, b""]))
                output.flush()

    def _end_block(self) -> None:
        self._has_timer = False
        self.flush()


def _encode(line: bytes | str) -> bytes:
    return line if isinstance(line, bytes) else line.encode(errors="backslashreplace")
