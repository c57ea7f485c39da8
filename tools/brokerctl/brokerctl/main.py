"""The commands. Each asks the admin API and shows the answer: as a screen, or with --json as one line."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.live import Live

from brokerctl import dlq, outlook, progress, screens
from brokerctl.api import Api, path
from brokerctl.options import Json, Limit, Yes, confirm, connect, show
from brokerctl.problems import ATTENTION, INTERRUPTED, Problem, Refused

app = typer.Typer(
    name="brokerctl",
    help="The Sandbox Broker from a terminal: what is up, what needs attention, and what to do about it.",
    epilog="Exit status: 0 done or all well, 1 refused, 2 wrong command or settings, 3 no answer or not now, "
    "4 something needs attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dlq.app, name="dlq")

SandboxId = Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id: CSP's csp_id.")]


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="BROKERCTL_CONFIG",
            help="A file with BROKER_API_URL and BROKER_ADMIN_TOKEN; the environment wins. "
            "Default: brokerctl.env in the folder of the user's settings.",
        ),
    ] = None,
) -> None:
    context.obj = config


Within = Annotated[
    float, typer.Option(min=0.01, help="Seconds for the gateway to answer in; more over a slow line.")
]


@app.command()
def status(context: typer.Context, as_json: Json = False, within: Within = outlook.STATUS_SEC) -> None:
    """One screen: parts, pool, queues, CSP, and what needs attention (then the exit status is 4)."""
    api = connect(context)
    found = outlook.ask(api, within)
    show(as_json, found, lambda: screens.status(api.url, found))
    if found["attention"]:
        raise typer.Exit(ATTENTION)


@app.command()
def watch(
    context: typer.Context,
    as_json: Json = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    within: Within = outlook.STATUS_SEC,
) -> None:
    """The same, again and again, until Ctrl-C. With --json, or where nobody watches, a line for each look."""
    api = connect(context)
    # Also where whoever has started us ignores it, as shells do for what runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if as_json or not screens.console.is_terminal:
            while True:
                found = outlook.ask(api, within)
                if as_json:
                    screens.as_json(found)
                else:
                    screens.console.print(screens.line(found), soft_wrap=True)
                time.sleep(every)
        with Live(_look(api, within), console=screens.console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(every)
                live.update(_look(api, within), refresh=True)
    except KeyboardInterrupt:
        pass


def _look(api: Api, within: float) -> RenderableType:
    return screens.status(api.url, outlook.ask(api, within))


@app.command()
def pool(
    context: typer.Context,
    *,
    as_json: Json = False,
    by: Annotated[Literal["track_name", "name_prefix"] | None, typer.Option(help="Count by this too.")] = None,
    status: Annotated[str | None, typer.Option(help="List the sandboxes in this state.")] = None,
    prefix: Annotated[str | None, typer.Option(help="List those whose name begins so.")] = None,
    track: Annotated[str | None, typer.Option(help="List those of a lab.")] = None,
    limit: Limit = 50,
) -> None:
    """How many sandboxes are in each state, or which ones."""
    api = connect(context)
    if status or prefix or track:
        filters = {"status": status, "name_prefix": prefix, "track_name": track}
        found = list(api.pages("sandboxes", "sandboxes", limit, **filters))
        show(as_json, found, lambda: screens.sandboxes(found))
        return
    counts = api.get("stats", by=by, limit=min(limit, 500) if by else None)
    show(as_json, counts, lambda: screens.pool(counts))


@app.command()
def sandbox(context: typer.Context, sandbox_id: SandboxId, as_json: Json = False) -> None:
    """The story of one sandbox: each transition, when, why and by whom."""
    found = connect(context).get(f"sandboxes/{path(sandbox_id)}")
    show(as_json, found, lambda: screens.story(found))


@app.command()
def who(
    context: typer.Context,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Their id: INSTRUQT_PARTICIPANT_ID.")],
    as_json: Json = False,
    limit: Limit = 50,
) -> None:
    """Which sandboxes a student has and had, the newest first."""
    found = list(connect(context).pages("allocations", "allocations", limit, holder=student))
    if not found and not as_json:
        screens.console.print(screens.text(f"{student} never had a sandbox."))
        return
    show(as_json, found, lambda: screens.allocations(found))


@app.command()
def sync(
    context: typer.Context,
    as_json: Json = False,
    show_only: Annotated[
        bool, typer.Option("--show", help="Sync nothing: show the last listing, and what a held one would change.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Apply also a listing that would be held.")] = False,
    yes: Yes = False,
) -> None:
    """Brings the pool in line with CSP now. A listing that lacks too much of the pool is held, and shown."""
    api = connect(context)
    if show_only:
        found = api.get("sync")
        show(as_json, found, lambda: screens.sync_state(found))
        if found["held"] is not None:
            raise typer.Exit(ATTENTION)
        return
    if force:
        if not as_json:
            screens.console.print(screens.sync_state(api.get("sync")))
        confirm(yes, "Fetch a new listing, and apply it whatever it lacks?")
    try:
        done = progress.run(
            api,
            "sync",
            title="CSP is being listed",
            told=lambda: _counts(api, "available", "stale"),
            force="true" if force else None,
        )
    except Refused as problem:
        if problem.code != "SYNC_HELD":
            raise
        if not as_json:
            screens.console.print(screens.sync_state(api.get("sync")))
        advice = f"{problem.message} brokerctl sync --force applies it."
        raise Refused(advice, detail={**problem.detail, "message": advice}) from None
    show(as_json, done, lambda: screens.facts({name.replace("_", " "): value for name, value in done.items()}))


@app.command()
def cleanup(context: typer.Context, as_json: Json = False) -> None:
    """Deletes now what is pending, whatever its backoff says, and waits for the end of it."""
    api = connect(context)
    done = progress.run(
        api,
        "cleanup",
        title="Sandboxes are being deleted",
        told=lambda: _counts(api, "pending_deletion", "deletion_failed"),
    )
    show(as_json, done, lambda: screens.facts({name.replace("_", " "): value for name, value in done.items()}))


def _counts(api: Api, *states: str) -> str:
    counts = api.get("stats")
    return ", ".join(f"{counts[state]} {state.replace('_', ' ')}" for state in states)


@app.command()
def release(
    context: typer.Context,
    sandbox_id: SandboxId,
    reason: Annotated[str, typer.Option(help="Why; it is kept with the lease.")],
    as_json: Json = False,
) -> None:
    """Ends a student's lease; the sandbox will be deleted, and the student can get another."""
    _changed(connect(context).post(f"sandboxes/{path(sandbox_id)}/release", reason=reason), as_json)


@app.command()
def retry(context: typer.Context, sandbox_id: SandboxId, as_json: Json = False) -> None:
    """Sends a deletion that has failed for good back, to be tried anew."""
    _changed(connect(context).post(f"sandboxes/{path(sandbox_id)}/retry-deletion"), as_json)


def _changed(found: dict[str, Any], as_json: bool) -> None:
    asked = screens.clock(found["deletion_requested_at"])
    line = f"Sandbox {found['sandbox_id']} is {found['status']}, since {asked}."
    show(as_json, found, lambda: screens.text(line))


def main() -> None:
    try:
        app()
    except Problem as problem:
        screens.complain(problem, "--json" in sys.argv)
        sys.exit(problem.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
