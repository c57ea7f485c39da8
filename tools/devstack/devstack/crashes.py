"""Crash points: a process kills or freezes itself at a named point.

Tests start a service with wrapped functions and write the point to a file, as in `allocator: after commit` or
`allocator: after commit, frozen`. The first process to reach the point removes the file and sends itself SIGKILL or
SIGSTOP.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUEST_SENT_SEC = 0.001
"""Time in which a request leaves the process."""


@dataclass(frozen=True, slots=True)
class CrashPoints:
    """Crash points of one process."""

    file: Path
    module: str

    def reach(self, point: str) -> None:
        """Kill or freeze the process if the file names this point."""
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
        """Return `work` with a crash point before and after it."""

        async def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                self.reach(before)
            result = await work(*arguments, **named)
            if after:
                self.reach(after)
            return result

        return wrapped

    def wrap_call(self, work: Callable[..., Awaitable[Any]], during: str) -> Callable[..., Any]:
        """Return `work`, which calls a server, with a crash point after the request. The server completes it."""

        async def wrapped(*arguments: Any, **named: Any) -> Any:
            running = asyncio.ensure_future(work(*arguments, **named))
            await asyncio.wait([running], timeout=REQUEST_SENT_SEC)
            self.reach(during)
            return await running

        return wrapped
