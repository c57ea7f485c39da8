"""Console text of the JSON log lines of the services, with the look of structlog's ConsoleRenderer.

The services write JSON, because console text costs them more processor time, on the way of each request.
"""

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

_CAUSE = "The above exception was the direct cause of the following exception:"
_CONTEXT = "During handling of the above exception, another exception occurred:"
_NEEDS_QUOTES = re.compile(r"[ \t=\r\n\"']").search


def render_log_line(line: str) -> str:
    """Return the text of a log event, with its traceback in further lines. Other lines stay as they are."""
    if not line.startswith("{"):
        return line
    try:
        fields = orjson.loads(line)
        head = f"{fields.pop('timestamp')} [{fields.pop('level'):9}] {fields.pop('event'):30}"
        trace = "".join(f"\n{text}" for text in _format_exceptions(fields.pop("exception", ())))
    except (ValueError, LookupError, TypeError):
        return line
    text = " ".join([head, *[f"{name}={_format(fields[name])}" for name in sorted(fields)]])
    return text.rstrip(" ") + trace


def _format(value: object) -> str:
    return value if isinstance(value, str) and not _NEEDS_QUOTES(value) else repr(value)


def _format_exceptions(exceptions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a traceback. `exceptions` has the raised exception first and its causes behind it."""
    for index, raised in enumerate(reversed(exceptions)):
        if index:
            is_cause = exceptions[-index]["is_cause"]
            yield from ("", _CAUSE if is_cause else _CONTEXT, "")
        frames = [
            traceback.FrameSummary(frame["filename"], frame["lineno"], frame["name"]) for frame in raised["frames"]
        ]
        yield "Traceback (most recent call last):"
        yield from "".join(traceback.format_list(frames)).splitlines()
        yield f"{raised['exc_type']}: {raised['exc_value']}" if raised["exc_value"] else raised["exc_type"]
        yield from raised["exc_notes"]
        for part in raised["exceptions"]:
            yield from (f"  | {text}" for text in _format_exceptions(part))
