"""CSV without formulas: a spreadsheet must not execute text that a student chose."""

import csv
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def render_cell(value: object) -> str:
    """Return the text of a cell. Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))
    return f"'{text}" if text.startswith(_FORMULA_STARTS) or str(value).startswith(_FORMULA_STARTS) else text


async def render_csv(columns: Sequence[str], rows: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    """Yield the header and one line for each row."""
    yield _line(columns)
    async for row in rows:
        yield _line([render_cell(row[column]) for column in columns])


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()
