"""What several commands take and do alike."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from brokerctl import screens
from brokerctl.api import Api
from brokerctl.config import checkout_file, load
from brokerctl.problems import Misconfigured

Json = Annotated[bool, typer.Option("--json", help="One line of JSON for programs; errors too, on standard error.")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def connect(context: typer.Context) -> Api:
    """By the file that --config has named; not before it is needed, so that --help needs none. Raises
    Misconfigured."""
    return Api(load(context.obj, local_broker=checkout_file()))


def show(as_json: bool, answer: Any, screen: Callable[[], RenderableType]) -> None:
    if as_json:
        screens.as_json(answer)
    else:
        screens.console.print(screen())


def confirm(yes: bool, question: str) -> None:
    """Raises Misconfigured where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Misconfigured(f"{question} Nobody is there to ask: repeat it with --yes.")
    typer.confirm(question, abort=True)
