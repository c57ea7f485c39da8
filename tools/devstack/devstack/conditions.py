"""Waiting for conditions in tests, because a test must not wait for a fixed time."""

import asyncio
import inspect
import time
from collections.abc import Callable

import asyncpg

_MIN_PAUSE_SEC = 0.005


async def wait_until(condition: Callable[[], object], *, within_sec: float = 120, every_sec: float = 0.2) -> None:
    """Poll `condition`, a function or a coroutine function, until its result is true.

    A pause is a third of the time waited so far, at least 5 ms and at most `every_sec`, because a condition that
    asks the broker takes much processor time. Raises AssertionError with the name of the condition after
    `within_sec`.
    """
    began_at = time.monotonic()
    try:
        async with asyncio.timeout(within_sec) as limit:
            while not await evaluate(condition):
                pause_sec = max(_MIN_PAUSE_SEC, (time.monotonic() - began_at) / 3)
                await asyncio.sleep(min(pause_sec, every_sec))
    except TimeoutError:
        if not limit.expired():
            raise
        name = getattr(condition, "__qualname__", repr(condition))
        raise AssertionError(f"not true within {within_sec:g} s: {name}") from None


async def wait_until_blocked(waiting: asyncpg.Connection, observer: asyncpg.Connection) -> None:
    """Wait until another session blocks the statement of `waiting` with a lock. `observer` is a third connection or
    the blocking one."""
    pid = waiting.get_server_pid()
    await wait_until(lambda: observer.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))


async def evaluate(condition: Callable[[], object]) -> object:
    """Return the result of a function or a coroutine function."""
    result = condition()
    return await result if inspect.isawaitable(result) else result
