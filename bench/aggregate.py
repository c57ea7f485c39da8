"""Aggregate the runs of a scenario: the median of each figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.meter import Run


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """Figures of all runs of a scenario: latencies in ms, CPU in seconds per 1,000 requests, memory in MB.

    The field names are keys in the JSON results file.
    """

    throughput: float
    sustained: float
    p50: float | None
    p99: float | None
    slowest: float | None
    errors: int
    """Sum over all runs."""
    cpu: Mapping[str, float]
    memory: Mapping[str, float]
    peak: Mapping[str, float]
    lag_sec: float
    drained_sec: float
    more: Mapping[str, float]
    """Figures of this scenario alone. The names include the units."""


def aggregate_runs(runs: Sequence[Run]) -> ScenarioResult:
    def median_of(figure: Callable[[Run], float]) -> float:
        return median(figure(run) for run in runs)

    def median_if_measured(figure: Callable[[Run], float | None]) -> float | None:
        figures = [value for run in runs if (value := figure(run)) is not None]
        return median(figures) if figures else None

    def medians_by_key(figures: Callable[[Run], Mapping[str, float]]) -> dict[str, float]:
        return {key: median(figures(run)[key] for run in runs) for key in figures(runs[0])}

    return ScenarioResult(
        throughput=median_of(lambda run: run.throughput),
        sustained=median_of(lambda run: run.sustained),
        p50=median_if_measured(lambda run: run.load.p50),
        p99=median_if_measured(lambda run: run.load.p99),
        slowest=median_if_measured(lambda run: run.load.slowest),
        errors=sum(run.load.errors for run in runs),
        cpu=medians_by_key(lambda run: run.cpu_per_thousand),
        memory=medians_by_key(lambda run: run.memory),
        peak=medians_by_key(lambda run: run.peak),
        lag_sec=median_of(lambda run: run.lag.seconds),
        drained_sec=median_of(lambda run: run.drained),
        more=medians_by_key(lambda run: run.more),
    )
