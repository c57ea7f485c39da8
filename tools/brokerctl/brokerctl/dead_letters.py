"""The `dlq` commands: list, show, replay and drop dead letters."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, TypeVar

import typer

from brokerctl import output
from brokerctl.answers import DeadLetter, DeadLetterDropped, DeadLetterReplayed, DeadLetterSummary
from brokerctl.client import AdminClient, quote_segment
from brokerctl.errors import CommandError, Misconfigured
from brokerctl.options import JsonOption, LimitOption, YesOption, confirm_action, create_client, print_result

MAX_DEAD_LETTERS = 100_000
"""The broker keeps no more than this."""

T = TypeVar("T")

app = typer.Typer(help="Dead letters: messages that could not be processed.", no_args_is_help=True)

IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids from dlq list.")]
AllOption = Annotated[bool, typer.Option("--all", help="All dead letters.")]


@app.command("list")
def list_dead_letters(context: typer.Context, as_json: JsonOption = False, limit: LimitOption = 50) -> None:
    """List the dead letters, newest first: time, service and reason."""
    result = list(create_client(context).iterate_entries("dead-letters", "dead_letters", DeadLetterSummary, limit))
    if not result and not as_json:
        output.console.print("There are no dead letters.")
        return
    print_result(as_json, result, lambda: output.render_dead_letters(result))


@app.command("show")
def show_dead_letter(
    context: typer.Context,
    dead_letter_id: Annotated[str, typer.Argument(metavar="ID", help="Id from dlq list.")],
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter with its payload."""
    result = create_client(context).get(f"dead-letters/{quote_segment(dead_letter_id)}", DeadLetter)
    print_result(as_json, result, lambda: output.render_dead_letter(result))


@app.command("replay")
def replay_dead_letters(
    context: typer.Context,
    ids: IdsArgument = None,
    all_: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back into their queues, after the fault is repaired.

    Commands run again only if they have had no effect yet. A message that fails again becomes a new dead letter.
    """
    client = create_client(context)

    def replay(dead_letter_id: str) -> DeadLetterReplayed:
        return client.post(f"dead-letters/{quote_segment(dead_letter_id)}/replay", DeadLetterReplayed)

    _run_for_each(_select_ids(client, ids, all_, yes, "Replay"), replay, _describe_replay, as_json)


def _describe_replay(answer: DeadLetterReplayed) -> str:
    skipped = (
        f", without {answer['skipped']} allocations of students who have got a sandbox since"
        if answer["skipped"]
        else ""
    )
    if answer["published"]:
        return f"{answer['dead_letter_id']} is back in {answer['queue']}{skipped}."
    return f"{answer['dead_letter_id']} is done: all its students have got a sandbox since."


@app.command("drop")
def drop_dead_letters(
    context: typer.Context,
    ids: IdsArgument = None,
    all_: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove dead letters without processing them."""
    client = create_client(context)

    def drop(dead_letter_id: str) -> DeadLetterDropped:
        return client.delete(f"dead-letters/{quote_segment(dead_letter_id)}", DeadLetterDropped)

    selected = _select_ids(client, ids, all_, yes, "Drop")
    _run_for_each(selected, drop, lambda answer: f"{answer['dead_letter_id']} is dropped.", as_json)


def _select_ids(client: AdminClient, ids: list[str] | None, all_: bool, yes: bool, verb: str) -> list[str]:
    """Return `ids`, or with --all the ids of all dead letters after a confirmation."""
    if bool(ids) == all_:
        raise Misconfigured("Give ids of dead letters, or --all. brokerctl dlq list shows the ids.")
    if ids:
        return ids
    entries = client.iterate_entries("dead-letters", "dead_letters", DeadLetterSummary, MAX_DEAD_LETTERS)
    all_ids = [entry["dead_letter_id"] for entry in entries]
    if all_ids:
        confirm_action(yes, f"{verb} {len(all_ids)} dead letters?")
    return all_ids


def _run_for_each(
    ids: list[str],
    action: Callable[[str], T],
    describe: Callable[[T], str],
    as_json: bool,
) -> None:
    """Run the action for every id, also after an error. Print all errors but the last, and raise the last."""
    last_error: CommandError | None = None
    for dead_letter_id in ids:
        try:
            answer = action(dead_letter_id)
        except CommandError as error:
            if last_error is not None:
                output.print_error(last_error, as_json)
            last_error = error
        else:
            print_result(as_json, answer, partial(output.printable_text, describe(answer)))
    if last_error is not None:
        raise last_error
