"""What the runs of a scenario say together: the median of each figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.meter import Run


@dataclass(frozen=True, slots=True)
class Row:
    """Latencies in ms, CPU in seconds for 1,000 requests, memory in MB."""

    throughput: float
    sustained: float
    p50: float | None
    p99: float | None
    slowest: float | None
    errors: int
    """Of all runs together."""
    cpu: Mapping[str, float]
    memory: Mapping[str, float]
    peak: Mapping[str, float]
    lag_sec: float
    drained_sec: float
    more: Mapping[str, float]
    """What else was measured, by names that tell the units."""


def row(runs: Sequence[Run]) -> Row:
    def middle(figure: Callable[[Run], float]) -> float:
        return median(figure(run) for run in runs)

    def known(figure: Callable[[Run], float | None]) -> float | None:
        figures = [value for run in runs if (value := figure(run)) is not None]
        return median(figures) if figures else None

    def of_parts(figures: Callable[[Run], Mapping[str, float]]) -> dict[str, float]:
        return {part: median(figures(run)[part] for run in runs) for part in figures(runs[0])}

    return Row(
        throughput=middle(lambda run: run.throughput),
        sustained=middle(lambda run: run.sustained),
        p50=known(lambda run: run.load.p50),
        p99=known(lambda run: run.load.p99),
        slowest=known(lambda run: run.load.slowest),
        errors=sum(run.load.errors for run in runs),
        cpu=of_parts(lambda run: run.cpu_per_thousand),
        memory=of_parts(lambda run: run.memory),
        peak=of_parts(lambda run: run.peak),
        lag_sec=middle(lambda run: run.lag.seconds),
        drained_sec=middle(lambda run: run.drained),
        more=of_parts(lambda run: run.more),
    )
