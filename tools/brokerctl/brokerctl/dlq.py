"""Dead letters: messages that could not be processed."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from brokerctl import screens
from brokerctl.api import Api, path
from brokerctl.options import Json, Limit, Yes, confirm, connect, show
from brokerctl.problems import Misconfigured, Problem

ALL = 100_000
"""The broker keeps no more."""

app = typer.Typer(help="Messages that could not be processed: list, show, replay, drop.", no_args_is_help=True)

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="As dlq list shows them.")]
All = Annotated[bool, typer.Option("--all", help="All that there are.")]


@app.command("list")
def list_(context: typer.Context, as_json: Json = False, limit: Limit = 50) -> None:
    """Which there are, the newest first: when each died, in which service, and why."""
    found = list(connect(context).pages("dead-letters", "dead_letters", limit))
    if not found and not as_json:
        screens.console.print("There are no dead letters.")
        return
    show(as_json, found, lambda: screens.dead_letters(found))


@app.command("show")
def show_(
    context: typer.Context,
    dead_letter_id: Annotated[str, typer.Argument(metavar="ID", help="As dlq list shows it.")],
    as_json: Json = False,
) -> None:
    """One of them, with its payload."""
    found = connect(context).get(f"dead-letters/{path(dead_letter_id)}")
    show(as_json, found, lambda: screens.dead_letter(found))


@app.command()
def replay(
    context: typer.Context, ids: Ids = None, all_: All = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Puts them back into their queues, once what was wrong is repaired. What was done already is not done again;
    what still cannot be processed becomes a new dead letter."""
    api = connect(context)

    def replay_one(dead_letter_id: str) -> dict[str, Any]:
        return api.post(f"dead-letters/{path(dead_letter_id)}/replay")

    _each(_wanted(api, ids, all_, yes, "Replay"), replay_one, _replayed, as_json)


def _replayed(answer: dict[str, Any]) -> str:
    skipped = (
        f", without {answer['skipped']} allocations of students who were served since" if answer["skipped"] else ""
    )
    if answer["published"]:
        return f"{answer['dead_letter_id']} is back in {answer['queue']}{skipped}."
    return f"{answer['dead_letter_id']} is done: all its students were served since."


@app.command()
def drop(
    context: typer.Context, ids: Ids = None, all_: All = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Forgets them."""
    api = connect(context)

    def drop_one(dead_letter_id: str) -> dict[str, Any]:
        return api.delete(f"dead-letters/{path(dead_letter_id)}")

    wanted = _wanted(api, ids, all_, yes, "Drop")
    _each(wanted, drop_one, lambda answer: f"{answer['dead_letter_id']} is dropped.", as_json)


def _wanted(api: Api, ids: list[str] | None, all_: bool, yes: bool, verb: str) -> list[str]:
    if bool(ids) == all_:
        raise Misconfigured("Name the dead letters, or give --all. brokerctl dlq list shows them.")
    if ids:
        return ids
    found = [str(entry["dead_letter_id"]) for entry in api.pages("dead-letters", "dead_letters", ALL)]
    if found:
        confirm(yes, f"{verb} {len(found)} dead letters?")
    return found


def _each(
    ids: list[str],
    act: Callable[[str], dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    as_json: bool,
) -> None:
    """All of them, whatever comes of one; raises the last problem."""
    last: Problem | None = None
    for dead_letter_id in ids:
        try:
            answer = act(dead_letter_id)
        except Problem as problem:
            if last is not None:
                screens.complain(last, as_json)
            last = problem
        else:
            show(as_json, answer, partial(screens.text, told(answer)))
    if last is not None:
        raise last
