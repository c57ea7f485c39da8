"""CPU time and memory of processes, as the operating system counts them."""

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import asyncpg
import psutil

Pids = Mapping[str, Sequence[int]]
"""The processes of each part of the system, by the part's name."""

_SHARED_OR_OURS = """
SELECT pid FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND (datname = current_database() OR datname IS NULL)
"""


@dataclass
class Used:
    seconds: float = 0.0


@contextmanager
def of_children() -> Iterator[Used]:
    """What all processes that we have started, and that ended within the block, have used in their lives."""
    used = Used()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield used
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds(pids: Sequence[int]) -> dict[int, float]:
    """CPU seconds that each process has used so far; those that are gone are left out."""
    return {pid: used for pid in pids if (used := _seconds(pid)) is not None}


def _seconds(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return None
    return float(times.user + times.system)


async def postgres(connection: asyncpg.Connection) -> list[int]:
    """PostgreSQL's processes on this machine that work for this database: its backends, and what all share
    (writers, checkpointer). Empty when the server is on another machine or in a container."""
    pids = [row["pid"] for row in await connection.fetch(_SHARED_OR_OURS)]
    return [pid for pid in pids if _named(pid, "postgres")]


def listener(port: int) -> list[int]:
    """The process on this machine that listens on the port; empty when we may not see it."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    listening = (c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port)
    return sorted({c.pid for c in listening if c.pid is not None})


def _named(pid: int, name: str) -> bool:
    try:
        return psutil.Process(pid).name() == name
    except psutil.NoSuchProcess:
        return False


def memory(pid: int) -> float:
    """MB in RAM."""
    return float(psutil.Process(pid).memory_info().rss) / 1e6
