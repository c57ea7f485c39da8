"""Options and helpers shared by several commands."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from brokerctl import output
from brokerctl.client import AdminClient
from brokerctl.config import checkout_config_file, load_config
from brokerctl.errors import Misconfigured

JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON; errors too, on standard error.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Maximum number of entries.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def create_client(context: typer.Context) -> AdminClient:
    """Load the configuration and create a client. Raises `Misconfigured`.

    Commands call this themselves, because --help must work without a configuration.
    """
    return AdminClient(load_config(context.obj, checkout_file=checkout_config_file()))


def print_result(as_json: bool, result: Any, render: Callable[[], RenderableType]) -> None:
    if as_json:
        output.print_json(result)
    else:
        output.console.print(render())


def confirm_action(yes: bool, question: str) -> None:
    """Ask for confirmation, unless --yes was given. Raises `Misconfigured` if standard input is not a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Misconfigured(f"{question} There is no terminal to ask on. Repeat the command with --yes.")
    typer.confirm(question, abort=True)
