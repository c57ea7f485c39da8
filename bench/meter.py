"""Puts load on a system and reads what that cost it."""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from bench import pool, process_stats
from bench.load import LoadResult
from bench.servers import Target
from sandbox_broker.service import cancel

_BETWEEN_LOOKS_SEC = 0.25


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a scenario."""

    load: LoadResult
    seconds: float
    """How long the load lasted."""
    cpu: Mapping[str, float]
    """CPU seconds that each part has used, the publishing of the last event included."""
    memory: Mapping[str, float]
    """MB in RAM of each of our own processes, at the end."""
    peak: Mapping[str, float]
    """The same, when it was most; looked at every quarter of a second."""
    lag: pool.OutboxLag
    """Of the events, at the end of the load."""
    drained: float
    """Seconds from there until every event was published."""
    problems: tuple[str, ...] = ()
    more: Mapping[str, float] = field(default_factory=dict)
    """What else this scenario has measured, by names that tell the units."""

    @property
    def throughput(self) -> float:
        return self.load.requests / self.seconds

    @property
    def sustained(self) -> float:
        """Requests in each second until the last event was published."""
        return self.load.requests / (self.seconds + self.drained)

    @property
    def cpu_per_thousand(self) -> dict[str, float]:
        return {part: used * 1_000 / max(self.load.requests, 1) for part, used in self.cpu.items()}

    def having(self, problems: tuple[str, ...]) -> "Run":
        return dataclasses.replace(self, problems=(*self.problems, *problems))

    def telling(self, more: Mapping[str, float]) -> "Run":
        return dataclasses.replace(self, more={**self.more, **more})

    def lasting(self, seconds: float) -> "Run":
        return dataclasses.replace(self, seconds=seconds)


async def measure(target: Target, put_load: Callable[[], Awaitable[LoadResult]], *, events: bool) -> Run:
    """`events`: the load writes events, which a relay publishes."""
    meter = _Meter(target)
    await meter.look(first=True)
    loaded = await meter.watch(put_load())
    lag, drained = pool.OutboxLag(), 0.0
    if events:
        lag = await pool.read_outbox_lag(target.database)
        drained = await pool.wait_until_idle(target.database)
    await meter.look()
    return Run(
        loaded,
        loaded.seconds,
        {**meter.used(), "load": loaded.cpu_sec},
        memory(target),
        meter.peak,
        lag,
        drained,
        (f"{loaded.errors} requests failed",) if loaded.errors else (),
    )


def memory(target: Target) -> dict[str, float]:
    """MB in RAM of each of our own processes."""
    return {part: process_stats.read_memory_mb(process.pid) for part, process in target.processes.items()}


class _Meter:
    """Adds up the CPU time of processes, and sees their memory. It looks often: one that has ended, as PostgreSQL's
    backends do, cannot be asked any more."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._at_first: dict[tuple[str, int], float] = {}
        self._at_last: dict[tuple[str, int], float] = {}
        self.peak = memory(target)

    async def watch(self, loading: Awaitable[LoadResult]) -> LoadResult:
        task = asyncio.ensure_future(loading)
        try:
            while not task.done():
                await self.look()
                await asyncio.wait([task], timeout=_BETWEEN_LOOKS_SEC)
            return await task
        finally:
            await cancel(task)

    async def look(self, *, first: bool = False) -> None:
        for part, pids in (await self._target.pids()).items():
            for pid, used in process_stats.read_cpu_seconds(pids).items():
                self._at_first.setdefault((part, pid), used if first else 0.0)
                self._at_last[part, pid] = used
        self.peak = {part: max(mb, self.peak[part]) for part, mb in memory(self._target).items()}

    def used(self) -> dict[str, float]:
        parts: defaultdict[str, float] = defaultdict(float)
        for (part, pid), used in self._at_last.items():
            parts[part] += used - self._at_first[part, pid]
        return dict(parts)
