"""What the answers look like in a terminal."""

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

from brokerctl.outlook import ago
from brokerctl.problems import Problem

STATES = ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted")
COLOURS = {"up": "green", "partly": "yellow", "down": "bold red", "unknown": "yellow"}

console = Console(markup=False, highlight=False, emoji=False)
errors = Console(stderr=True, markup=False, highlight=False, emoji=False)


def as_json(answer: Any) -> None:
    """For programs: one line."""
    print(json.dumps(answer), flush=True)


def complain(problem: Problem, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": problem.detail}), file=sys.stderr)
    else:
        errors.print(text(f"brokerctl: {problem.message}"), soft_wrap=True)


def text(value: object, style: str = "") -> Text:
    """Whatever it holds: what others have written must not move the cursor of whoever reads it."""
    shown = "-" if value is None else str(value)
    safe = "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in shown)
    return Text(safe, style=style)


def clock(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    at = datetime.fromtimestamp(seconds).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S} ({ago(seconds, time.time())})"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(text(value) for value in row))
    return shown


def facts(pairs: Mapping[str, object]) -> Table:
    """Names and values, without those that are not there."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None:
            shown.add_row(name, value if isinstance(value, Text) else text(value))
    return shown


def status(url: str, found: Mapping[str, Any]) -> RenderableType:
    """One screen."""
    parts = Text("   ").join(
        Text.assemble(f"{name} ", text(state, COLOURS[state])) for name, state in _parts(found).items()
    )
    above = facts(
        {
            "broker": text(f"{url}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"),
            "parts": parts,
            "pool": found.get("pool") and _pool(found["pool"]),
            "CSP": found.get("csp") and _csp(found["csp"]),
            "dead letters": found.get("dead_letters"),
        }
    )
    shown: list[RenderableType] = [above]
    if found.get("queues"):
        columns = ("queue", "messages", "consumers")
        rows = [
            ["?" if entry[column] is None else entry[column] for column in columns] for entry in found["queues"]
        ]
        shown += [Text(), table(columns, rows, numbers=columns[1:])]
    if found["attention"]:
        listed = table(
            ("needs attention", "what", "what to do"),
            [(entry["part"], entry["problem"], entry["advice"]) for entry in found["attention"]],
        )
        listed.columns[0].style = "bold red"
        shown += [Text(), listed]
    else:
        shown += [Text(), Text("Nothing needs attention.", style="green")]
    return Group(*shown)


def line(found: Mapping[str, Any]) -> Text:
    """The status for a file or a pipe, in one line."""
    told = [", ".join(f"{name} {state}" for name, state in _parts(found).items())]
    if found.get("pool"):
        told.append(_pool(found["pool"]))
    told += [f"{entry['part']}: {entry['problem']}" for entry in found["attention"]] or ["nothing needs attention"]
    return text(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {' '.join('; '.join(told).split())}")


def _parts(found: Mapping[str, Any]) -> dict[str, str]:
    """The state of each."""
    states = {"gateway": found["gateway"]["state"]}
    for name, key in (("RabbitMQ", "rabbitmq"), ("PostgreSQL", "database")):
        states[name] = found[key]["state"] if key in found else "unknown"
    return states | {entry["service"]: entry["state"] for entry in found.get("services", ())}


def _pool(pool: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{pool[state]} {state.replace('_', ' ')}" for state in STATES[:-1])
    return f"{counts} ({pool['total'] - pool['deleted']} in all)"


def _csp(csp: Mapping[str, Any]) -> str:
    now = time.time()
    told = [f"listed {ago(csp['listed_at'], now)}"]
    if csp["unfinished_since"] is not None:
        told.append(f"a listing begun {ago(csp['unfinished_since'], now)} is not there yet")
    if csp["held"]:
        told.append("the newest listing is held")
    if csp["pending_since"] is not None:
        told.append(f"the oldest pending deletion was asked for {ago(csp['pending_since'], now)}")
    return "; ".join(told)


def pool(found: Mapping[str, Any]) -> RenderableType:
    counts = table(
        (*STATES, "total"),
        [tuple(found[state] for state in (*STATES, "total"))],
        numbers=(*STATES, "total"),
    )
    if "groups" not in found:
        return counts
    columns = (found["by"], *STATES, "total")
    rows = [(group["value"], *(group[state] for state in columns[1:])) for group in found["groups"]]
    return Group(counts, Text(), table(columns, rows, numbers=columns[1:]))


def sandboxes(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["sandbox_id"],
            entry["name"],
            entry["status"],
            clock(entry["status_since"]),
            entry["holder"],
            entry["track_name"],
            entry["deletion_error"],
        )
        for entry in found
    ]
    return table(("sandbox", "name", "status", "since", "holder", "track", "error"), rows)


TIMES = (
    "status_since",
    "missing_since",
    "allocated_at",
    "expires_at",
    "ended_at",
    "deletion_requested_at",
    "deletion_due_at",
    "deleted_at",
)


def story(found: Mapping[str, Any]) -> RenderableType:
    known = {
        name.replace("_", " "): clock(value) if name in TIMES else value
        for name, value in found.items()
        if name != "history"
    }
    rows = [
        (
            clock(step["at"]),
            step["event"],
            step["by"],
            step["holder"],
            step["error"] or step["reason"],
        )
        for step in found["history"]
    ]
    return Group(facts(known), Text(), table(("when", "what", "by", "holder", "why"), rows))


def allocations(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["sandbox_id"],
            entry["name"],
            entry["track_name"],
            clock(entry["allocated_at"]),
            "has it now" if entry["ended_at"] is None else clock(entry["ended_at"]),
            entry["end_note"] or entry["end_reason"],
        )
        for entry in found
    ]
    return table(("sandbox", "name", "track", "from", "until", "ended by"), rows)


def sync_state(found: Mapping[str, Any]) -> RenderableType:
    applied, held = found["applied"], found["held"]
    shown: list[RenderableType] = []
    if applied is None:
        shown.append(Text("No listing of CSP has been applied yet."))
    else:
        counts = ", ".join(
            f"{applied[name]} {name.replace('_', ' ')}"
            for name in ("synced", "discovered", "restored", "marked_stale", "reopened", "leaked")
        )
        shown.append(facts({"last applied": clock(applied["applied_at"]), "it was": counts}))
    if held is not None:
        rows = [
            (
                f"{change.replace('_', ' ')}",
                held[change]["count"],
                ", ".join(example["name"] for example in held[change]["examples"]),
            )
            for change in ("stale", "missing", "moved", "discovered", "restored")
        ]
        heading = facts({"held": text(clock(held["held_at"]), "bold red"), "because": held["reason"]})
        shown += [Text(), heading, Text(), table(("it would make", "count", "such as"), rows, numbers=("count",))]
    return Group(*shown)


def dead_letters(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    rows = [
        (
            entry["dead_letter_id"],
            clock(entry["died_at"]),
            entry["service"],
            ", ".join(entry["commands"]) or None,
            entry["reason"],
        )
        for entry in found
    ]
    return table(("dead letter", "died", "service", "commands", "why"), rows)


def dead_letter(found: Mapping[str, Any]) -> RenderableType:
    known = {name.replace("_", " "): value for name, value in found.items() if name not in ("payload", "encoding")}
    known |= {"died at": clock(found["died_at"]), "commands": ", ".join(found["commands"]) or None}
    payload = found["payload"]
    if found["encoding"] == "utf-8":
        with contextlib.suppress(ValueError):  # what is no JSON is shown as it is
            payload = json.dumps(json.loads(payload), indent=2, ensure_ascii=False)
    return Group(facts(known), Text(), Text(f"payload ({found['encoding']})", style="bold"), text(payload))
