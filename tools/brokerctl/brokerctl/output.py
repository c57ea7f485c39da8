"""Terminal output: screens built from the API's answers, JSON lines and error messages."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from brokerctl.attention import format_age
from brokerctl.errors import CommandError

SANDBOX_STATES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")
COMPONENT_COLOURS = {"up": "green", "partly": "yellow", "down": "bold red", "unknown": "yellow"}

console = Console(markup=False, highlight=False, emoji=False)
error_console = Console(stderr=True, markup=False, highlight=False, emoji=False)


def print_json(result: Any) -> None:
    """Print the result as one line of JSON."""
    print(json.dumps(result), flush=True)


def print_error(error: CommandError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error.detail}), file=sys.stderr)
    else:
        for line in (f"brokerctl: {error.message}", *error.lines):
            error_console.print(printable_text(line), soft_wrap=True)


def printable_text(value: object, style: str = "", *, kept: str = "") -> Text:
    """Return the value as text without control characters, because untrusted input must not drive the terminal.

    `kept` are control characters that stay, such as the line breaks of a payload.
    """
    shown = "-" if value is None else str(value)
    safe = "".join(char if char.isprintable() or char in kept else "\N{REPLACEMENT CHARACTER}" for char in shown)
    return Text(safe, style=style)


def format_time(timestamp: float | None) -> str | None:
    """Return local time and age of a Unix timestamp."""
    if timestamp is None:
        return None
    at = datetime.fromtimestamp(timestamp).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S} ({format_age(timestamp, time.time())})"


def build_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    """Build a table. The columns in `numbers` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(printable_text(column), justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable_text(value) for value in row))
    return table


def build_field_list(fields: Mapping[str, object]) -> Table:
    """Build a list of names and values, omitting fields with the value None."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            grid.add_row(printable_text(name), value if isinstance(value, Text) else printable_text(value))
    return grid


def render_status(url: str, status: Mapping[str, Any]) -> RenderableType:
    """Render the result of `attention.fetch_status` as one screen."""
    components = Text("   ").join(
        Text.assemble(printable_text(f"{name} "), printable_text(state, COMPONENT_COLOURS.get(state, "")))
        for name, state in _collect_component_states(status).items()
    )
    summary = build_field_list(
        {
            "broker": printable_text(f"{url}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"),
            "components": components,
            "pool": status.get("pool") and _format_pool(status["pool"]),
            "CSP": status.get("csp") and _format_csp(status["csp"]),
            "dead letters": status.get("dead_letters"),
        }
    )
    blocks: list[RenderableType] = [summary]
    if status.get("queues"):
        columns = ("queue", "messages", "consumers")
        rows = [
            ["?" if entry[column] is None else entry[column] for column in columns] for entry in status["queues"]
        ]
        blocks += [Text(), build_table(columns, rows, numbers=columns[1:])]
    if status["attention"]:
        items = build_table(
            ("needs attention", "problem", "what to do"),
            [(item["part"], _describe_problem(item), _describe_next_step(item)) for item in status["attention"]],
        )
        items.columns[0].style = "bold red"
        blocks += [Text(), items]
    else:
        blocks += [Text(), Text("Nothing needs attention.", style="green")]
    return Group(*blocks)


def _describe_problem(item: Mapping[str, Any]) -> str:
    return f"{item['problem']}. {item['effect']}" if item["effect"] else str(item["problem"])


def _describe_next_step(item: Mapping[str, Any]) -> str:
    return f"{item['advice']} Run: {item['command']}" if item["command"] else str(item["advice"])


def format_status_line(status: Mapping[str, Any]) -> Text:
    """Format the result of `attention.fetch_status` as one line for a file or a pipe."""
    phrases = [", ".join(f"{name} {state}" for name, state in _collect_component_states(status).items())]
    if status.get("pool"):
        phrases.append(_format_pool(status["pool"]))
    phrases += [f"{item['part']}: {item['problem']}" for item in status["attention"]] or ["nothing needs attention"]
    return printable_text(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {' '.join('; '.join(phrases).split())}")


def _collect_component_states(status: Mapping[str, Any]) -> dict[str, str]:
    states = {"gateway": status["gateway"]["state"]}
    for name, key in (("RabbitMQ", "rabbitmq"), ("PostgreSQL", "database")):
        states[name] = status[key]["state"] if key in status else "unknown"
    return states | {entry["service"]: entry["state"] for entry in status.get("services", ())}


def _format_pool(pool: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{pool[state]} {state.replace('_', ' ')}" for state in SANDBOX_STATES[:-1])
    parts = [f"{pool['total'] - pool['deleted']} in total"]
    parts += [f"{pool[name]} {name.replace('_', ' ')}" for name in ("standby", "on_hold") if pool.get(name)]
    return f"{counts} ({', '.join(parts)})"


def _format_csp(csp: Mapping[str, Any]) -> str:
    now = time.time()
    phrases = [f"listed {format_age(csp['listed_at'], now)}"]
    if csp["unfinished_since"] is not None:
        phrases.append(f"a listing that began {format_age(csp['unfinished_since'], now)} has not arrived")
    if csp["held"]:
        phrases.append("the newest listing is held")
    if csp["pending_since"] is not None:
        phrases.append(f"the oldest pending deletion was requested {format_age(csp['pending_since'], now)}")
    return "; ".join(phrases)


def render_pool_counts(counts: Mapping[str, Any]) -> RenderableType:
    totals = build_table(
        (*SANDBOX_STATES, "total"),
        [tuple(counts[state] for state in (*SANDBOX_STATES, "total"))],
        numbers=(*SANDBOX_STATES, "total"),
    )
    if "groups" not in counts:
        return totals
    columns = (counts["by"], *SANDBOX_STATES, "total")
    rows = [(group["value"], *(group[state] for state in columns[1:])) for group in counts["groups"]]
    return Group(totals, Text(), build_table(columns, rows, numbers=columns[1:]))


def render_sandboxes(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["sandbox_id"],
            entry["name"],
            entry["status"],
            format_time(entry["status_since"]),
            entry["holder"],
            entry["track_name"],
            entry["deletion_error"],
        )
        for entry in entries
    ]
    return build_table(("sandbox", "name", "status", "since", "holder", "track", "error"), rows)


TIMESTAMP_FIELDS = (
    "status_since",
    "missing_since",
    "allocated_at",
    "expires_at",
    "ended_at",
    "deletion_requested_at",
    "deletion_due_at",
    "deletion_hold_until",
    "deleted_at",
    "claimed_at",
)


def render_sandbox(sandbox: Mapping[str, Any]) -> RenderableType:
    """Render one sandbox: its fields, then its history as a table."""
    fields = {
        name.replace("_", " "): format_time(value) if name in TIMESTAMP_FIELDS else value
        for name, value in sandbox.items()
        if name != "history"
    }
    rows = [
        (
            format_time(step["at"]),
            step["event"],
            step["by"],
            step["holder"],
            step["error"] or step["reason"],
        )
        for step in sandbox["history"]
    ]
    return Group(build_field_list(fields), Text(), build_table(("time", "event", "by", "holder", "reason"), rows))


def render_allocations(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["sandbox_id"],
            entry["name"],
            entry["track_name"],
            format_time(entry["allocated_at"]),
            "has it now" if entry["ended_at"] is None else format_time(entry["ended_at"]),
            entry["end_note"] or entry["end_reason"],
            _format_claim(entry),
            f"{entry.get('extended_sec', 0) / 3600:g} h" if entry.get("extended_sec") else None,
            entry.get("policy"),
        )
        for entry in entries
    ]
    columns = ("sandbox", "name", "track", "from", "until", "end reason", "standby", "extended", "policy")
    return build_table(columns, rows)


def _format_claim(lease: Mapping[str, Any]) -> str | None:
    """Format the claim of a standby lease. None: the lease was never in standby."""
    if lease.get("claimed_at") is not None:
        return f"claimed {format_time(lease['claimed_at'])}"
    return "not claimed" if lease.get("mode") == "standby" else None


def render_pool_history(history: Mapping[str, Any]) -> RenderableType:
    columns = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "waiting")
    rows = [(format_time(sample["at"]), *(sample[name] for name in columns)) for sample in history["samples"]]
    return build_table(("time", *columns), rows, numbers=columns)


def render_waiting_line(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            number,
            entry["holder"],
            entry["name_prefix"] or "any",
            entry["track_name"],
            format_time(entry["waiting_since"]),
            format_time(entry["asked_at"]),
        )
        for number, entry in enumerate(entries, start=1)
    ]
    columns = ("place", "student", "name prefix", "track", "waiting since", "last request")
    return build_table(columns, rows, numbers=("place",))


def render_sync_state(state: Mapping[str, Any]) -> RenderableType:
    """Render the last applied listing, and the changes of a held listing if there is one."""
    applied, held = state["applied"], state["held"]
    blocks: list[RenderableType] = []
    if applied is None:
        blocks.append(Text("No CSP listing has been applied yet."))
    else:
        counts = ", ".join(
            f"{applied[name]} {name.replace('_', ' ')}"
            for name in ("synced", "discovered", "restored", "marked_stale", "reopened", "leaked")
        )
        blocks.append(build_field_list({"last applied": format_time(applied["applied_at"]), "changes": counts}))
    if held is not None:
        rows = [
            (
                f"{change.replace('_', ' ')}",
                held[change]["count"],
                ", ".join(example["name"] for example in held[change]["examples"]),
            )
            for change in ("stale", "missing", "moved", "discovered", "restored")
        ]
        heading = build_field_list(
            {"held since": printable_text(format_time(held["held_at"]), "bold red"), "reason": held["reason"]}
        )
        changes = build_table(("sandboxes would be", "count", "examples"), rows, numbers=("count",))
        blocks += [Text(), heading, Text(), changes]
    return Group(*blocks)


def render_dead_letters(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["dead_letter_id"],
            format_time(entry["died_at"]),
            entry["service"],
            ", ".join(entry["commands"]) or None,
            entry["reason"],
        )
        for entry in entries
    ]
    return build_table(("dead letter", "died", "service", "commands", "reason"), rows)


def render_dead_letter(letter: Mapping[str, Any]) -> RenderableType:
    """Render one dead letter: its fields, then its payload."""
    fields = {
        name.replace("_", " "): value for name, value in letter.items() if name not in ("payload", "encoding")
    }
    fields |= {"died at": format_time(letter["died_at"]), "commands": ", ".join(letter["commands"]) or None}
    payload = letter["payload"]
    if letter["encoding"] == "utf-8":
        with contextlib.suppress(ValueError):  # a payload that is not JSON is shown unchanged
            payload = json.dumps(json.loads(payload), indent=2, ensure_ascii=False)
    heading = printable_text(f"payload ({letter['encoding']})", "bold")
    return Group(build_field_list(fields), Text(), heading, printable_text(payload, kept="\n\t"))
