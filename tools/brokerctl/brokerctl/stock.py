"""The `stock` commands: show the stock of each name prefix, and resume a stopped one."""

import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from brokerctl import output
from brokerctl.answers import Stock, StockLevel, StockResumed
from brokerctl.attention import format_age
from brokerctl.errors import EXIT_ATTENTION
from brokerctl.options import JsonOption, create_client, print_result

BAR_CELLS = 10
MAX_SILENCE_SEC = 300
"""Longest time between two claims of the provisioner. Its tick comes every minute."""
STATE_COLOURS = {"full": "green", "filling": "yellow", "limited": "yellow", "stopped": "bold red"}

app = typer.Typer(
    help="Stock: sandboxes that the broker creates in advance, per name prefix.", invoke_without_command=True
)


@app.callback()
def show_stock(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the stock of each name prefix, or run a subcommand. Exit with status 4 if a prefix is stopped.

    The bar shows available (#), creating (+) and missing (.) sandboxes of the target.
    """
    if context.invoked_subcommand is not None:
        return
    result = create_client(context).get("stock", Stock)
    print_result(as_json, result, lambda: render_stock(result))
    if any(level["state"] == "stopped" for level in result["stock"]):
        raise typer.Exit(EXIT_ATTENTION)


@app.command("resume")
def resume_stock(
    context: typer.Context,
    name_prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Name prefix from brokerctl stock.")],
    as_json: JsonOption = False,
) -> None:
    """Create accounts for a stopped prefix again, after the cause is repaired."""
    result = create_client(context).post("stock/resume", StockResumed, name_prefix=name_prefix)
    line = (
        f"The stock of {result['name_prefix']} is resumed."
        if result["changed"]
        else f"The stock of {result['name_prefix']} was not stopped. Nothing was changed."
    )
    print_result(as_json, result, lambda: output.printable_text(line))


def render_stock(stock: Stock) -> RenderableType:
    """Render the levels as a table, then the problems and their remedies."""
    if not stock["stock"]:
        return output.printable_text("No policy has a stock rule. docs/stock.md describes them.")
    counts = ("available", "leased", "creating", "waiting", "min", "max")
    table = output.build_table(
        ("prefix", "stock", *counts, "empty in", "creation", "state"), (), numbers=(*counts, "empty in", "creation")
    )
    for level in stock["stock"]:
        table.add_row(
            output.printable_text(level["name_prefix"]),
            output.printable_text(format_bar(level)),
            *(
                output.printable_text(number)
                for number in (
                    level["available"],
                    level["allocated"],
                    level["creating"],
                    level["waiting"],
                    level["min"],
                    level["max"],
                )
            ),
            output.printable_text(format_span(level["exhaustion_sec"])),
            output.printable_text(format_span(level["creation"]["p50_sec"])),
            output.printable_text(level["state"], STATE_COLOURS.get(level["state"], "")),
        )
    lines = [output.printable_text(line) for line in find_problems(stock, time.time())]
    return Group(table, *([Text(), *lines] if lines else []))


def format_bar(level: StockLevel) -> str:
    """Return the stock as a bar: # available, + creating, . missing; full at the target."""
    target = max(1, level["target"])
    filled = min(BAR_CELLS, level["available"] * BAR_CELLS // target)
    coming = min(BAR_CELLS, (level["available"] + level["creating"]) * BAR_CELLS // target)
    return "#" * filled + "+" * (coming - filled) + "." * (BAR_CELLS - coming)


def format_span(seconds: float | None) -> str:
    """Return a rounded duration, "-" for None."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds)} s"


def find_problems(stock: Stock, now: float) -> Iterator[str]:
    """Yield a line for each problem, with the next action."""
    for level in stock["stock"]:
        prefix, p90 = level["name_prefix"], level["creation"]["p90_sec"]
        if level["state"] == "stopped":
            yield (
                f"{prefix} is stopped: {level['stop_reason']}. Repair the cause, then run "
                f"brokerctl stock resume {prefix}"
            )
        elif level["state"] == "limited":
            yield f"{prefix} has reached its max of {level['max']}. Raise max in the policy {level['policy']}."
        elif level["failures"]:
            yield f"{prefix}: {level['failures']} failed attempts in a row: {level['last_error']}"
        exhaustion = level["exhaustion_sec"]
        if level["min"] and exhaustion is not None and p90 is not None and exhaustion < p90:
            yield (
                f"{prefix} will be empty in {format_span(exhaustion)}, before a creation ends "
                f"({format_span(p90)}). Raise min in the policy {level['policy']}."
            )
    asked_at = stock["asked_at"]
    if stock["stock"] and (asked_at is None or now - asked_at > MAX_SILENCE_SEC):
        yield (
            f"The provisioner last asked for creations: {format_age(asked_at, now)}. Set STOCK_ENABLED=true, "
            "and check that a provisioner runs."
        )
