"""`brokerctl stock`: bar, durations, and problems with the next action."""

from io import StringIO
from typing import Any, cast

import pytest
from rich.console import Console

from brokerctl.answers import Stock, StockLevel
from brokerctl.stock import find_problems, format_bar, format_span, render_stock

NOW = 1_728_054_123.0


def build_level(**changes: Any) -> StockLevel:
    level = {
        "name_prefix": "lab-",
        "policy": "adventure",
        "state": "filling",
        "min": 20,
        "max": 60,
        "target": 20,
        "available": 10,
        "allocated": 7,
        "creating": 5,
        "waiting": 0,
        "exhaustion_sec": None,
        "creation": {"count": 0, "p50_sec": None, "p90_sec": None},
        "failures": 0,
        "last_error": None,
        "stop_reason": None,
    }
    return cast(StockLevel, {**level, **changes})


def build_stock(*levels: StockLevel, asked_at: float | None = NOW) -> Stock:
    return {"stock": list(levels), "asked_at": asked_at}


@pytest.mark.parametrize(
    ("available", "creating", "target", "bar"),
    [
        (0, 0, 20, ".........."),
        (10, 5, 20, "#####++..."),
        (20, 0, 20, "##########"),
        (50, 5, 20, "##########"),
        (0, 0, 0, ".........."),
        (1, 0, 0, "##########"),
    ],
)
def test_the_bar_shows_available_creating_and_missing_sandboxes(
    available: int, creating: int, target: int, bar: str
) -> None:
    assert format_bar(build_level(available=available, creating=creating, target=target)) == bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0 s"), (119, "119 s"), (150, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_a_span_has_one_unit(seconds: float | None, text: str) -> None:
    assert format_span(seconds) == text


def test_a_full_stock_has_no_problem() -> None:
    assert list(find_problems(build_stock(build_level()), NOW)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"state": "stopped", "stop_reason": "quota of 50"},
            "quota of 50. Repair the cause, then run brokerctl stock",
        ),
        ({"state": "limited"}, "has reached its max of 60. Raise max in the policy adventure."),
        ({"failures": 3, "last_error": "CSP said 503"}, "3 failed attempts in a row: CSP said 503"),
        (
            {"exhaustion_sec": 90.0, "creation": {"count": 9, "p50_sec": 120.0, "p90_sec": 180.0}},
            "will be empty in 90 s, before a creation ends (3 min)",
        ),
    ],
)
def test_a_problem_names_the_next_action(changes: dict[str, Any], expected: str) -> None:
    (line,) = find_problems(build_stock(build_level(**changes)), NOW)
    assert line.startswith("lab-")
    assert expected in line


def test_a_prefix_created_on_demand_is_expected_to_be_empty() -> None:
    measured = {"count": 9, "p50_sec": 120.0, "p90_sec": 180.0}
    level = build_level(min=0, exhaustion_sec=0.0, creation=measured)
    assert list(find_problems(build_stock(level), NOW)) == []


@pytest.mark.parametrize("asked_at", [None, NOW - 301])
def test_a_silent_provisioner_is_reported(asked_at: float | None) -> None:
    (line,) = find_problems(build_stock(build_level(), asked_at=asked_at), NOW)
    assert "STOCK_ENABLED=true" in line


def test_the_table_has_a_row_for_each_prefix() -> None:
    console = Console(file=StringIO(), width=160)
    console.print(render_stock(build_stock(build_level(), build_level(name_prefix="other-"))))
    text = cast(StringIO, console.file).getvalue()
    assert "#####++..." in text
    assert "other-" in text
