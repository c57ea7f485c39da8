"""One table for the eye and one file for programs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.goals import Reached
from bench.meter import Run
from bench.rows import Row

_PARTS = ("server", "allocator", "postgres", "rabbitmq", "load")
_HEADINGS = (
    *("scenario", "req/s", "with events", "p50 ms", "p99 ms", "slowest", "errors"),
    *(f"{part} CPU" for part in _PARTS),
    *("lag s", "drain s"),
)


def table(rows: Mapping[str, Row]) -> Iterator[str]:
    """CPU is in seconds for 1,000 requests, which is the same as milliseconds for one."""
    lines = [_cells(name, row) for name, row in rows.items()]
    yield from _aligned([_HEADINGS, *lines])


def _cells(name: str, row: Row) -> tuple[str, ...]:
    return (
        name,
        f"{row.throughput:,.0f}",
        f"{row.sustained:,.0f}",
        *(_number(figure, 1) for figure in (row.p50, row.p99, row.slowest)),
        str(row.errors),
        *(_number(row.cpu.get(part), 3) for part in _PARTS),
        _number(row.lag_sec, 2),
        _number(row.drained_sec, 2),
    )


def more(rows: Mapping[str, Row]) -> Iterator[str]:
    """What only some scenarios measure."""
    lines = [
        (f"{name}: {what}", f"{figure:,.2f}") for name, row in rows.items() for what, figure in row.more.items()
    ]
    if lines:
        yield from _aligned([("further figures", "value"), *lines])


def goals(reached: Iterable[Reached]) -> Iterator[str]:
    lines = [(goal.name, f"{goal.value:,.2f}", goal.target, "met" if goal.met else "not met") for goal in reached]
    if lines:
        yield from _aligned([("goal", "value", "target", ""), *lines])


def _number(figure: float | None, digits: int) -> str:
    return "-" if figure is None else f"{figure:,.{digits}f}"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


def write(
    path: Path,
    *,
    machine: Mapping[str, Any],
    options: Mapping[str, Any],
    rows: Mapping[str, Row],
    reached: Iterable[Reached],
    runs: Mapping[str, Sequence[Run]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "options": options,
        "goals": [asdict(goal) for goal in reached],
        "rows": {name: asdict(row) for name, row in rows.items()},
        "runs": {name: [asdict(run) for run in its] for name, its in runs.items()},
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
