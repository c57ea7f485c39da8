"""Performance goals. A missed goal does not fail the benchmark, because figures depend on the machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.aggregate import ScenarioResult

Results = Mapping[str, ScenarioResult]
"""Results by scenario name."""

_CLAIM = ("claim-8", "claim-16", "claim-50")
_LEASE = ("lease-8", "lease-16", "lease-50")
_COMPONENTS = ("server", "allocator", "postgres", "rabbitmq")


@dataclass(frozen=True, slots=True)
class Goal:
    name: str
    figure: Callable[[Results], float]
    """Raises KeyError if a required scenario has not run."""
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class GoalResult:
    """Value of a goal. The field names are keys in the JSON results file."""

    name: str
    value: float
    target: str
    met: bool


def _throughput_ratio(results: Results, name: str, *others: str) -> float:
    """Return the throughput of a scenario divided by the best throughput of the others."""
    return results[name].throughput / max(results[other].throughput for other in others)


def _latency_ratio(results: Results, quantile: str, name: str, other: str) -> float:
    return float(getattr(results[name], quantile) / getattr(results[other], quantile))


GOALS = (
    Goal("throughput at 200 ÷ baseline", lambda r: _throughput_ratio(r, "ours-200", "baseline-200"), at_least=7),
    Goal("throughput at 200 ÷ pgbench claim", lambda r: _throughput_ratio(r, "ours-200", *_CLAIM), at_least=1),
    Goal("throughput at 200 ÷ pgbench lease", lambda r: _throughput_ratio(r, "ours-200", *_LEASE), at_least=1.5),
    Goal("p99 at 200 ÷ baseline", lambda r: _latency_ratio(r, "p99", "ours-200", "baseline-200"), at_most=0.15),
    Goal("p50 at 1 ÷ baseline", lambda r: _latency_ratio(r, "p50", "ours-1", "baseline-1"), at_most=1.6),
    Goal(
        "processor time of an allocation at 200 ÷ floor",
        lambda r: sum(r["ours-200"].cpu[component] for component in _COMPONENTS) / r["floor-200"].cpu["server"],
        at_most=8,
    ),
    Goal("class start, slowest (ms)", lambda r: r["class-start"].slowest or 0.0, at_most=1_000),
    Goal(
        "class start beside 100,000 events, slowest ÷ without",
        lambda r: _latency_ratio(r, "slowest", "class-beside-events", "class-start"),
        at_most=1.5,
    ),
    Goal(
        "throughput at 1,000,000 sandboxes ÷ 1,000",
        lambda r: _throughput_ratio(r, "pool-1000000", "pool-1000"),
        at_least=0.95,
    ),
    Goal(
        "throughput with 200 prefixes ÷ without",
        lambda r: _throughput_ratio(r, "prefix-200", "ours-200"),
        at_least=0.6,
    ),
    Goal(
        "throughput with policies ÷ without",
        lambda r: _throughput_ratio(r, "policies", "ours-200"),
        at_least=0.97,
    ),
    Goal(
        "throughput with 500 named tokens ÷ without",
        lambda r: _throughput_ratio(r, "tokens-500", "ours-200"),
        at_least=0.97,
    ),
    Goal(
        "throughput with 500 students in line ÷ without",
        lambda r: _throughput_ratio(r, "waiting-500", "prefix-20"),
        at_least=0.9,
    ),
    Goal(
        "p99 beside a sync ÷ without",
        lambda r: _latency_ratio(r, "p99", "sync-beside", "beside-nothing"),
        at_most=2,
    ),
    Goal(
        "p99 beside expiry ÷ without",
        lambda r: _latency_ratio(r, "p99", "expiry-beside", "beside-nothing"),
        at_most=2,
    ),
    Goal(
        "p99 beside a purge ÷ without",
        lambda r: _latency_ratio(r, "p99", "purge-beside", "beside-nothing"),
        at_most=2,
    ),
    Goal(
        "p99 beside slow clients ÷ without",
        lambda r: _latency_ratio(r, "p99", "slow-clients", "beside-nothing"),
        at_most=2,
    ),
    Goal("a sync beside students (s)", lambda r: r["sync-beside"].more["sync s"], at_most=60),
    Goal(
        "a replacement beside students, p95 (ms)",
        lambda r: r["replace-beside"].more["replacement p95 ms"],
        at_most=100,
    ),
    Goal("long run, last tenth ÷ first", lambda r: r["long"].more["last tenth ÷ first"], at_least=0.95),
    Goal("long run, largest service (MB)", lambda r: max(r["long"].memory.values()), at_most=150),
    Goal(
        "long run, memory at the end ÷ middle", lambda r: r["long"].more["memory at the end ÷ middle"], at_most=1.1
    ),
)


def evaluate_goals(results: Results) -> list[GoalResult]:
    """Evaluate each goal unless one of its scenarios has not run, or was too short for a response."""
    evaluated = []
    for goal in GOALS:
        try:
            value = goal.figure(results)
        except (KeyError, ZeroDivisionError):
            continue
        if goal.at_least is not None:
            evaluated.append(GoalResult(goal.name, value, f"≥ {goal.at_least:g}", value >= goal.at_least))
        elif goal.at_most is not None:
            evaluated.append(GoalResult(goal.name, value, f"≤ {goal.at_most:g}", value <= goal.at_most))
    return evaluated
