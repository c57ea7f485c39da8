"""Runs a service that kills or freezes itself at a named point, once told to: `python crashing.py MODULE`.

The file that CRASH_AT names tells the point, as in `allocator: after commit` or `allocator: after commit, frozen`.
Of several processes the first to reach it removes the file and stops, as by `kill -9` or `kill -STOP`. The reaper's
patience is cut short, so that what a dead one has claimed is soon free.
"""

import os
import runpy
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

told = Path(os.environ["CRASH_AT"])
module = sys.argv.pop(1)


def here(point: str) -> None:
    try:
        where, _, how = told.read_text().partition(", ")
        if where != f"{module}: {point}":
            return
        told.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGSTOP if how == "frozen" else signal.SIGKILL)


def crashing(work: Callable[..., Awaitable[Any]], before: str | None, after: str | None) -> Callable[..., Any]:
    async def wrapped(*arguments: Any, **named: Any) -> Any:
        if before:
            here(before)
        result = await work(*arguments, **named)
        if after:
            here(after)
        return result

    return wrapped


if module == "allocator":
    from allocator import consumer, store
    from sandbox_broker import bus

    # Each is one statement, and its end is the commit.
    store.allocate = crashing(store.allocate, "before commit", "after commit")
    store.release = crashing(store.release, "before commit", "after commit")
    consumer.answer = crashing(consumer.answer, None, "after reply")  # type: ignore[attr-defined]
    bus.Subscription.ack = crashing(bus.Subscription.ack, "before ack", None)  # type: ignore[method-assign]
if module == "reaper":
    from reaper import asking, deletion
    from sandbox_broker import csp

    asking.REQUEST_TIMEOUT_SEC = 3
    deletion.CSP_TIMEOUT_SEC = 5

    from reaper import cleanup

    cleanup.CLAIM_MARGIN_SEC = 2
    client = csp.CspClient
    client.delete_account = crashing(client.delete_account, "before CSP", "after CSP")  # type: ignore[method-assign]

runpy.run_module(module, run_name="__main__", alter_sys=True)
