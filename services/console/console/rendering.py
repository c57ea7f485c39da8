"""Templates, and the filters that turn values of the API into text for people."""

import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from console.session import read_person

FOLDER = Path(__file__).parent
VENDOR = FOLDER / "static" / "vendor"

NONE = "\N{EN DASH}"
"""Text of a value that does not exist."""

STATUS_WORDS = {
    "available": "Available",
    "allocated": "Leased",
    "pending_deletion": "Being deleted",
    "deletion_failed": "Deletion failed",
    "stale": "Stale",
    "deleted": "Deleted",
}
END_WORDS = {
    "student": "released by the student",
    "expired": "expired",
    "admin": "released by an administrator",
    "unclaimed": "never claimed",
    "broken": "replaced as broken",
    "play_ended": "the play ended",
}


def render(request: Request, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
    """Return a page. `request.state` has the flash message of a previous action."""
    environment: Environment = request.app.state.templates
    theme = request.cookies.get("theme", "")
    html = environment.get_template(template).render(
        request=request,
        path=request.url.path,
        person=read_person(request),
        flash=request.session.pop("flash", None),
        theme=theme if theme in ("light", "dark") else "",
        now=int(time.time()),
        **values,
    )
    return HTMLResponse(html, status_code)


def build_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=replace_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        age=format_age, duration=format_duration, number=format_number, at=render_time, thousands=format_number
    )
    environment.globals.update(
        icon=icon, sparkline=sparkline, with_query=with_query, STATUS_WORDS=STATUS_WORDS, END_WORDS=END_WORDS
    )
    return environment


def replace_control_characters(value: Any) -> Any:
    """Replace control and other invisible characters of text, because names come from outside. HTML of our own
    (Markup) stays."""
    if isinstance(value, str) and not isinstance(value, Markup) and not value.isprintable():
        return "".join(
            char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in value
        )
    return NONE if value is None else value


def format_number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def format_duration(seconds: float | None) -> str:
    """Return a duration in its two largest units, like `2 h 5 min`."""
    if seconds is None:
        return NONE
    parts: list[str] = []
    left = round(abs(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {unit}")
            left %= size
        elif parts:
            break
    return " ".join(parts) or "0 s"


def format_age(at: float | None, now: float | None = None) -> str:
    """Return a time relative to now, like `5 min ago` or `in 2 h 30 min`."""
    if at is None:
        return "never"
    difference = (time.time() if now is None else now) - at
    if abs(difference) < 2:
        return "now"
    if difference < 0:  # the end of a lease: an hour more or less matters
        return f"in {format_duration(difference)}"
    return f"{' '.join(format_duration(difference).split(' ')[:2])} ago"


def render_time(at: float | None) -> Markup:
    """Return the relative time with the absolute one as its title."""
    if at is None:
        return Markup('<span class="muted">{}</span>').format(NONE)
    moment = datetime.fromtimestamp(at, UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(), f"{moment:%Y-%m-%d %H:%M:%S} UTC", format_age(at)
    )


@cache
def icon(name: str) -> Markup:
    """Return an icon of Feather as inline SVG. Names are constants of the templates."""
    svg = (VENDOR / "icons" / f"{name}.svg").read_text()
    return Markup(re.sub(r"<svg [^>]*>", '<svg class="icon" viewBox="0 0 24 24" aria-hidden="true">', svg, count=1))  # noqa: S704 (a file of our image)


def sparkline(values: Sequence[float], *, width: int = 120, height: int = 32) -> Markup:
    """Return a small line chart as SVG, which needs no script."""
    if len(values) < 2:
        return Markup("")
    low, high = min(values), max(values)
    span = (high - low) or 1
    points = " ".join(
        f"{index * width / (len(values) - 1):.1f},{height - 3 - (value - low) / span * (height - 6):.1f}"
        for index, value in enumerate(values)
    )
    return Markup(
        '<svg class="sparkline" viewBox="0 0 {w} {h}" preserveAspectRatio="none" aria-hidden="true">'
        '<polygon points="0,{h} {p} {w},{h}"/><polyline points="{p}"/></svg>'
    ).format(w=width, h=height, p=points)


def with_query(request: Request, **changes: Any) -> str:
    """Return the address of this page with other query parameters. None removes a parameter."""
    merged: Mapping[str, Any] = {**dict(request.query_params), **changes}
    query = urlencode({name: value for name, value in merged.items() if value not in (None, "")})
    return f"{request.url.path}?{query}" if query else request.url.path


def sort_rows(rows: Sequence[Any], wanted: str, allowed: Sequence[str]) -> list[Any]:
    """Return the rows of a page in the order of a column: `name`, or `-name` for descending. Missing values come
    last."""
    column = wanted.removeprefix("-")
    if column not in allowed:
        return list(rows)
    present = [row for row in rows if row[column] is not None]
    ordered = sorted(present, key=lambda row: row[column], reverse=wanted.startswith("-"))
    return ordered + [row for row in rows if row[column] is None]
