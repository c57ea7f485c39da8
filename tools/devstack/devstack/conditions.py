"""Waiting for conditions in tests, because a test must not wait for a fixed time."""

import asyncio
import inspect
from collections.abc import Callable

import asyncpg


async def wait_until(condition: Callable[[], object], *, within_sec: float = 120, every_sec: float = 0.05) -> None:
    """Poll `condition`, a function or a coroutine function, until its result is true.

    The pauses grow to `every_sec`, so that a long wait takes little processor time. Raises AssertionError with the
    name of the condition after `within_sec`.
    """
    pause_sec = 0.005
    try:
        async with asyncio.timeout(within_sec) as limit:
            while not await _evaluate(condition):
                await asyncio.sleep(min(pause_sec, every_sec))
                pause_sec *= 2
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


async def _evaluate(condition: Callable[[], object]) -> object:
    result = condition()
    return await result if inspect.isawaitable(result) else result
