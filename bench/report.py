"""Tables for the terminal and a JSON file for programs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.aggregate import ScenarioResult
from bench.goals import GoalResult
from bench.meter import Run

_COMPONENTS = ("server", "allocator", "postgres", "rabbitmq", "load")
_HEADINGS = (
    *("scenario", "req/s", "with events", "p50 ms", "p99 ms", "slowest", "errors"),
    *(f"{component} CPU" for component in _COMPONENTS),
    *("lag s", "drain s"),
)


def format_results(results: Mapping[str, ScenarioResult]) -> Iterator[str]:
    """Format the results as a table. CPU is in seconds per 1,000 requests, equal to milliseconds per request."""
    yield from _align_columns([_HEADINGS, *(_format_row(name, result) for name, result in results.items())])


def _format_row(name: str, result: ScenarioResult) -> tuple[str, ...]:
    return (
        name,
        f"{result.throughput:,.0f}",
        f"{result.sustained:,.0f}",
        *(_format_figure(figure, 1) for figure in (result.p50, result.p99, result.slowest)),
        str(result.errors),
        *(_format_figure(result.cpu.get(component), 3) for component in _COMPONENTS),
        _format_figure(result.lag_sec, 2),
        _format_figure(result.drained_sec, 2),
    )


def format_scenario_figures(results: Mapping[str, ScenarioResult]) -> Iterator[str]:
    """Format the figures that single scenarios add, as a table. Yields no line without such figures."""
    rows = [
        (f"{name}: {figure_name}", f"{figure:,.2f}")
        for name, result in results.items()
        for figure_name, figure in result.more.items()
    ]
    if rows:
        yield from _align_columns([("further figures", "value"), *rows])


def format_goals(goals: Iterable[GoalResult]) -> Iterator[str]:
    rows = [(goal.name, f"{goal.value:,.2f}", goal.target, "met" if goal.met else "not met") for goal in goals]
    if rows:
        yield from _align_columns([("goal", "value", "target", ""), *rows])


def _format_figure(figure: float | None, digits: int) -> str:
    return "-" if figure is None else f"{figure:,.{digits}f}"


def _align_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align the first column to the left and all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


def write_json(
    path: Path,
    *,
    machine: Mapping[str, Any],
    options: Mapping[str, Any],
    results: Mapping[str, ScenarioResult],
    goals: Iterable[GoalResult],
    runs: Mapping[str, Sequence[Run]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "options": options,
        "goals": [asdict(goal) for goal in goals],
        "rows": {name: asdict(result) for name, result in results.items()},
        "runs": {name: [asdict(run) for run in scenario_runs] for name, scenario_runs in runs.items()},
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
