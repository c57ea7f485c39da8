"""Run load against a system and measure its CPU time, memory and event lag."""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from bench import pool, process_stats
from bench.load import LoadResult
from bench.servers import Target
from sandbox_broker.runtime.service import cancel_and_wait

_SAMPLE_INTERVAL_SEC = 0.25


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one run of a scenario. The field names are keys in the JSON results file."""

    load: LoadResult
    seconds: float
    """Duration of the load."""
    cpu: Mapping[str, float]
    """CPU seconds of each component, until the last event is published."""
    memory: Mapping[str, float]
    """Resident memory of each of the benchmark's own processes in MB, at the end."""
    peak: Mapping[str, float]
    """Largest resident memory in MB, sampled four times per second."""
    lag: pool.OutboxLag
    """Unpublished events at the end of the load."""
    drained: float
    """Seconds from the end of the load until all events are published."""
    problems: tuple[str, ...] = ()
    more: Mapping[str, float] = field(default_factory=dict)
    """Figures of this scenario alone. The names include the units."""

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return self.load.requests / self.seconds

    @property
    def sustained(self) -> float:
        """Requests per second, counted until the last event is published."""
        return self.load.requests / (self.seconds + self.drained)

    @property
    def cpu_per_thousand(self) -> dict[str, float]:
        """CPU seconds of each component per 1,000 requests."""
        requests = max(self.load.requests, 1)
        return {component: seconds * 1_000 / requests for component, seconds in self.cpu.items()}

    def with_problems(self, problems: tuple[str, ...]) -> "Run":
        return dataclasses.replace(self, problems=(*self.problems, *problems))

    def with_figures(self, more: Mapping[str, float]) -> "Run":
        return dataclasses.replace(self, more={**self.more, **more})

    def with_duration(self, seconds: float) -> "Run":
        return dataclasses.replace(self, seconds=seconds)


async def measure_load(
    target: Target, generate_load: Callable[[], Awaitable[LoadResult]], *, has_events: bool
) -> Run:
    """Generate load and return its figures. With `has_events`, also measure and await the outbox relay."""
    sampler = _UsageSampler(target)
    await sampler.sample(first=True)
    result = await sampler.sample_while(generate_load())
    lag, drained = pool.OutboxLag(), 0.0
    if has_events:
        lag = await pool.read_outbox_lag(target.database)
        drained = await pool.wait_until_idle(target.database)
    await sampler.sample()
    return Run(
        result,
        result.seconds,
        {**sampler.cpu_seconds(), "load": result.cpu_sec},
        read_memory(target),
        sampler.peak,
        lag,
        drained,
        (f"{result.errors} requests failed",) if result.errors else (),
    )


def read_memory(target: Target) -> dict[str, float]:
    """Return the resident memory of each of the benchmark's own processes in MB."""
    return {component: process_stats.read_memory_mb(process.pid) for component, process in target.processes.items()}


class _UsageSampler:
    """Sum of CPU time and peak of memory per component.

    Samples are frequent, because the CPU time of a process cannot be read after its end. PostgreSQL backends end
    during a run.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._first: dict[tuple[str, int], float] = {}
        self._last: dict[tuple[str, int], float] = {}
        self.peak = read_memory(target)

    async def sample_while(self, work: Awaitable[LoadResult]) -> LoadResult:
        """Sample until `work` ends. Returns its result."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await self.sample()
                await asyncio.wait([task], timeout=_SAMPLE_INTERVAL_SEC)
            return await task
        finally:
            await cancel_and_wait(task)

    async def sample(self, *, first: bool = False) -> None:
        """Read all processes. Unless this is the first sample, a new process is counted from its start."""
        for component, pids in (await self._target.find_pids()).items():
            for pid, seconds in process_stats.read_cpu_seconds(pids).items():
                self._first.setdefault((component, pid), seconds if first else 0.0)
                self._last[component, pid] = seconds
        self.peak = {
            component: max(mb, self.peak[component]) for component, mb in read_memory(self._target).items()
        }

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each component since the first sample."""
        totals: defaultdict[str, float] = defaultdict(float)
        for (component, pid), seconds in self._last.items():
            totals[component] += seconds - self._first[component, pid]
        return dict(totals)
