"""Console text of JSON log lines, compared with the text of structlog."""

from collections.abc import Callable
from io import StringIO
from typing import Any

import orjson
import pytest
import structlog

from devstack.log_line import render_log_line

AT = {"level": "info", "timestamp": "2026-11-30T09:01:36.518960Z"}
LINES: list[dict[str, Any]] = [
    {
        **AT,
        "event": "request.handled",
        "status": 201,
        "duration_ms": 73.8,
        "path": "/v1/allocate",
        "service": "gateway",
    },
    {**AT, "event": "an.event.with.a.name.of.more.than.thirty.characters"},
    {**AT, "event": "sync.completed", "level": "warning", "restored": None, "held": True, "names": ["a b", "c"]},
    {
        **AT,
        "event": "sync.held",
        "level": "critical",
        "reason": "it's 1=1",
        "name": 'sp"a ce',
        "empty": "",
        "ä": "ö",
    },
]


@pytest.mark.parametrize("line", LINES)
def test_the_text_is_that_of_structlog(line: dict[str, Any]) -> None:
    expected = structlog.dev.ConsoleRenderer(colors=False)(None, "info", dict(line))
    assert render_log_line(orjson.dumps(line).decode()) == expected


@pytest.mark.parametrize(
    "line", ["", "Traceback (most recent call last):", "{", "{}", "[1]", '{"event": 1, "level": 2}']
)
def test_other_lines_stay_as_they_are(line: str) -> None:
    assert render_log_line(line) == line


def fail() -> None:
    raise ValueError("wrong\nvalue")


def fail_with_cause() -> None:
    try:
        fail()
    except ValueError as error:
        raise KeyError("name") from error


def fail_in_handler() -> None:
    try:
        fail()
    finally:
        raise AssertionError


def fail_with_note() -> None:
    try:
        fail()
    except ValueError as error:
        error.add_note("a note")
        raise


@pytest.mark.parametrize("failing", [fail, fail_with_cause, fail_in_handler, fail_with_note])
def test_a_traceback_is_that_of_python(failing: Callable[[], None]) -> None:
    try:
        failing()
    except (ValueError, KeyError, AssertionError) as error:
        expected = StringIO()
        structlog.dev.plain_traceback(expected, (type(error), error, error.__traceback__))
        exception = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)(
            (type(error), error, error.__traceback__)
        )
    line = orjson.dumps({**AT, "event": "task.failed", "exception": exception}).decode()
    head, *trace = render_log_line(line).split("\n")
    assert head == f"{AT['timestamp']} [info     ] task.failed"
    # Python also marks the columns.
    assert [text for text in trace if text.strip(" ^~")] == [
        text for text in expected.getvalue().split("\n") if text.strip(" ^~")
    ]


def test_the_exceptions_of_a_group_are_shown() -> None:
    error = ExceptionGroup("two", [ValueError("first"), KeyError("second")])
    exception = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)((type(error), error, None))
    text = render_log_line(orjson.dumps({**AT, "event": "task.failed", "exception": exception}).decode())
    assert "\nExceptionGroup: two (2 sub-exceptions)\n" in text
    assert "\n  | ValueError: first\n" in text
    assert text.endswith("\n  | KeyError: 'second'")
