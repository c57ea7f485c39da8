"""Terminal output of many processes: complete lines, each tagged with the name of its process."""

import asyncio
import os
import sys
import zlib
from typing import BinaryIO

_COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_DIM, _RED = 2, 31


class Terminal:
    """Writes lines to one stream. All calls come from one thread, so lines never mix."""

    def __init__(self, stream: BinaryIO | None = None, *, colours: bool | None = None, width: int = 13) -> None:
        self._stream = sys.stdout.buffer if stream is None else stream
        self._colours = _wants_colours(self._stream) if colours is None else colours
        self._width = width
        self.lost = asyncio.Event()
        """Set after the terminal or pipe is closed. Further output is discarded."""
        self._flush_is_due = False

    def print_log_line(self, tag: str, text: str) -> None:
        """Print a log line of a process."""
        self._write(f"{self._paint(f'{tag:<{self._width}}│', _colour(tag))} {text}")

    def print_line(self, text: str = "") -> None:
        """Print a line of devstack."""
        self._write(text)

    def print_step(self, text: str) -> None:
        """Print a progress line in dim colour."""
        self._write(self._paint(f"• {text}", _DIM))

    def print_error(self, text: str) -> None:
        self._write(self._paint(text, _RED))

    def _paint(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text

    def _write(self, text: str) -> None:
        if self.lost.is_set():
            return
        try:
            self._stream.write(text.encode(errors="replace") + b"\n")
        except OSError:
            self.lost.set()
        if not self._flush_is_due:
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Flush now, or in an event loop once for all lines of this turn, because each write wakes the reader."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._flush()
        else:
            self._flush_is_due = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        try:
            self._stream.flush()
        except OSError:
            self.lost.set()


def _wants_colours(stream: BinaryIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ


def _colour(tag: str) -> int:
    return _COLOURS[zlib.crc32(tag.encode()) % len(_COLOURS)]
