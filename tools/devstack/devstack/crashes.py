"""Lets a process kill or freeze itself at a named point, once file to: for tests that start a service with some of
its functions wrapped.

A file says where, as in `allocator: after commit` or `allocator: after commit, frozen`. Of several processes the
first to reach the point removes the file and stops, as by `kill -9` or `kill -STOP`.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class CrashPoints:
    """Those of one process."""

    file: Path
    module: str

    def reach(self, point: str) -> None:
        """Stops the process if this is the point."""
        try:
            where, _, how = self.file.read_text().partition(", ")
            if where != f"{self.module}: {point}":
                return
            self.file.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGSTOP if how == "frozen" else signal.SIGKILL)

    def wrap(
        self, work: Callable[..., Awaitable[Any]], before: str | None, after: str | None
    ) -> Callable[..., Any]:
        """The function, with a point before it and one after it."""

        async def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                self.reach(before)
            result = await work(*arguments, **named)
            if after:
                self.reach(after)
            return result

        return wrapped
