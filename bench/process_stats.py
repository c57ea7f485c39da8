"""CPU time and memory of processes, as reported by the operating system."""

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import asyncpg
import psutil

Pids = Mapping[str, Sequence[int]]
"""Process ids by component name (`server`, `allocator`, `postgres`, `rabbitmq`, …)."""

# `datname IS NULL` selects the background processes that serve all databases.
_BACKEND_PIDS = """
SELECT pid FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND (datname = current_database() OR datname IS NULL)
"""


@dataclass
class CpuTime:
    seconds: float = 0.0


@contextmanager
def measure_children_cpu() -> Iterator[CpuTime]:
    """Measure the CPU time of child processes that end within the block.

    `seconds` is set when the block ends. It covers the whole life of these children.
    """
    cpu_time = CpuTime()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield cpu_time
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_time.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_cpu_seconds(pids: Sequence[int]) -> dict[int, float]:
    """Return the CPU seconds used so far by each process. Processes that have ended are omitted."""
    return {pid: seconds for pid in pids if (seconds := _read_cpu_seconds(pid)) is not None}


def _read_cpu_seconds(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return None
    return float(times.user + times.system)


def read_memory_mb(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    return float(psutil.Process(pid).memory_info().rss) / 1e6


async def find_postgres_pids(connection: asyncpg.Connection) -> list[int]:
    """Return the local PostgreSQL processes that work for the database of `connection`.

    These are its backends and the background processes of the server (writers, checkpointer). The list is empty
    when the server runs on another machine or in a container.
    """
    pids = [row["pid"] for row in await connection.fetch(_BACKEND_PIDS)]
    return [pid for pid in pids if _has_name(pid, "postgres")]


def find_listener_pids(port: int) -> list[int]:
    """Return the id of the process that listens on a TCP port of this machine.

    The list is empty if the operating system denies access to other processes.
    """
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    listening = (c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port)
    return sorted({c.pid for c in listening if c.pid is not None})


def _has_name(pid: int, name: str) -> bool:
    try:
        return psutil.Process(pid).name() == name
    except psutil.NoSuchProcess:
        return False
