"""Commands of brokerctl. Each calls the admin API and prints the result as a screen, or with --json as one line."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.live import Live

from brokerctl import access, audit, dead_letters, output, policies, progress, restore, stock, tokens
from brokerctl.answers import (
    Allocation,
    Extension,
    Lease,
    PoolHistory,
    Sandbox,
    SandboxSummary,
    StateCounts,
    Stats,
    StudentForgotten,
    SyncState,
    TransitionResult,
    WaitingStudent,
)
from brokerctl.attention import STATUS_TIMEOUT_SEC, fetch_status
from brokerctl.client import AdminClient, quote_segment
from brokerctl.errors import EXIT_ATTENTION, EXIT_INTERRUPTED, CommandError, Refused
from brokerctl.options import JsonOption, LimitOption, YesOption, confirm_action, create_client, print_result

app = typer.Typer(
    name="brokerctl",
    help="Operate the Sandbox Broker from a terminal: see its status, and repair the parts that need attention.",
    epilog="Exit status: 0 done or all well, 1 refused, 2 wrong command or settings, 3 no answer or temporarily "
    "unavailable, 4 something needs attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dead_letters.app, name="dlq")
app.add_typer(restore.app, name="restore")
app.add_typer(stock.app, name="stock")
app.add_typer(access.app, name="access")
app.add_typer(policies.app, name="policy")
app.add_typer(tokens.app, name="token")
app.command("audit")(audit.show_audit)

SandboxIdArgument = Annotated[str, typer.Argument(metavar="ID", help="Sandbox id: the csp_id in CSP.")]


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="BROKERCTL_CONFIG",
            help="File with BROKER_API_URL and BROKER_ADMIN_TOKEN; the environment wins. "
            "Default: brokerctl.env in the user's configuration folder.",
        ),
    ] = None,
) -> None:
    context.obj = config


WithinOption = Annotated[
    float,
    typer.Option(min=0.01, help="Seconds to wait for the gateway's answer. Raise it for a slow connection."),
]


@app.command("status")
def show_status(
    context: typer.Context, as_json: JsonOption = False, within: WithinOption = STATUS_TIMEOUT_SEC
) -> None:
    """Show components, pool, queues and CSP. Exit with status 4 if something needs attention."""
    client = create_client(context)
    result = fetch_status(client, within)
    print_result(as_json, result, lambda: output.render_status(client.url, result))
    if result["attention"]:
        raise typer.Exit(EXIT_ATTENTION)


@app.command("watch")
def watch_status(
    context: typer.Context,
    as_json: JsonOption = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 2.0,
    within: WithinOption = STATUS_TIMEOUT_SEC,
) -> None:
    """Repeat status until Ctrl-C. With --json, or without a terminal, print one line per update."""
    client = create_client(context)
    # Set the handler explicitly, because shells start background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if as_json or not output.console.is_terminal:
            while True:
                result = fetch_status(client, within)
                if as_json:
                    output.print_json(result)
                else:
                    output.console.print(output.format_status_line(result), soft_wrap=True)
                time.sleep(every)
        with Live(
            _render_current_status(client, within), console=output.console, auto_refresh=False, screen=True
        ) as live:
            while True:
                time.sleep(every)
                live.update(_render_current_status(client, within), refresh=True)
    except KeyboardInterrupt:
        pass


def _render_current_status(client: AdminClient, timeout_sec: float) -> RenderableType:
    return output.render_status(client.url, fetch_status(client, timeout_sec))


@app.command("pool")
def show_pool(
    context: typer.Context,
    *,
    as_json: JsonOption = False,
    by: Annotated[
        Literal["track_name", "name_prefix"] | None, typer.Option(help="Also count by this field.")
    ] = None,
    status: Annotated[str | None, typer.Option(help="List the sandboxes in this state.")] = None,
    prefix: Annotated[str | None, typer.Option(help="List the sandboxes with this name prefix.")] = None,
    track: Annotated[str | None, typer.Option(help="List the sandboxes of this track.")] = None,
    mode: Annotated[
        Literal["standby", "active"] | None, typer.Option(help="List the leased sandboxes in this mode.")
    ] = None,
    hours: Annotated[
        int | None, typer.Option(min=1, max=168, help="Show the counts over this time until now.")
    ] = None,
    limit: LimitOption = 50,
) -> None:
    """Count the sandboxes by state, now or over time, or list them by a filter."""
    client = create_client(context)
    if hours is not None:
        history = client.get("stats/history", PoolHistory, hours=hours)
        print_result(as_json, history, lambda: output.render_pool_history(history))
        return
    if status or prefix or track or mode:
        filters = {"status": status, "name_prefix": prefix, "track_name": track, "mode": mode}
        entries = list(client.iterate_entries("sandboxes", "sandboxes", SandboxSummary, limit, **filters))
        print_result(as_json, entries, lambda: output.render_sandboxes(entries))
        return
    counts = client.get("stats", Stats, by=by, limit=min(limit, 500) if by else None)
    print_result(as_json, counts, lambda: output.render_pool_counts(counts))


@app.command("sandbox")
def show_sandbox(context: typer.Context, sandbox_id: SandboxIdArgument, as_json: JsonOption = False) -> None:
    """Show one sandbox with its history: each transition, its time, reason and actor."""
    result = create_client(context).get(f"sandboxes/{quote_segment(sandbox_id)}", Sandbox)
    print_result(as_json, result, lambda: output.render_sandbox(result))


@app.command("who")
def show_leases_of_student(
    context: typer.Context,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Student id: INSTRUQT_PARTICIPANT_ID.")],
    as_json: JsonOption = False,
    limit: LimitOption = 50,
) -> None:
    """List the present and past sandboxes of a student, newest first."""
    entries = list(
        create_client(context).iterate_entries("allocations", "allocations", Allocation, limit, holder=student)
    )
    if not entries and not as_json:
        output.console.print(output.printable_text(f"{student} never had a sandbox."))
        return
    print_result(as_json, entries, lambda: output.render_allocations(entries))


@app.command("forget")
def forget_student(
    context: typer.Context,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Student id: INSTRUQT_PARTICIPANT_ID.")],
    *,
    reason: Annotated[str | None, typer.Option(help="Reason; the broker keeps it in the audit.")] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replace a student id everywhere by a pseudonym. Refused while the student has a lease."""
    confirm_action(yes, f"Replace the id {student} by a pseudonym for ever?")
    result = create_client(context).request("POST", "forget", StudentForgotten, {"student": student}, reason=reason)
    line = f"{result['leases']} past leases have the pseudonym {result['pseudonym']} now."
    print_result(as_json, result, lambda: output.printable_text(line))


@app.command("leases")
def show_leases(
    context: typer.Context,
    *,
    as_json: JsonOption = False,
    track: Annotated[str | None, typer.Option(help="Leases of this track.")] = None,
    at: Annotated[
        datetime | None, typer.Option(help="Leases that were active at this local time, like 2026-03-27T14:00:00.")
    ] = None,
    limit: LimitOption = 50,
) -> None:
    """List the leases of all students, newest first."""
    held_at = None if at is None else int(at.timestamp())
    filters = {"track_name": track, "held_at": held_at}
    entries = list(
        create_client(context).iterate_entries("allocations", "allocations", Allocation, limit, **filters)
    )
    print_result(as_json, entries, lambda: output.render_allocations(entries))


@app.command("waiting")
def show_waiting_line(context: typer.Context, as_json: JsonOption = False, limit: LimitOption = 50) -> None:
    """List the students that wait for a sandbox, in the order of their arrival."""
    entries = list(create_client(context).iterate_entries("waiting", "waiting", WaitingStudent, limit))
    if not entries and not as_json:
        output.console.print("No student waits.")
        return
    print_result(as_json, entries, lambda: output.render_waiting_line(entries))


@app.command("sync")
def sync_pool(
    context: typer.Context,
    as_json: JsonOption = False,
    show_only: Annotated[
        bool, typer.Option("--show", help="Do not sync: show the last listing, and the changes of a held one.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Apply the listing even if it would be held.")] = False,
    yes: YesOption = False,
) -> None:
    """Bring the pool in line with CSP now. The broker holds a listing in which too many sandboxes are missing."""
    client = create_client(context)
    if show_only:
        state = client.get("sync", SyncState)
        print_result(as_json, state, lambda: output.render_sync_state(state))
        if state["held"] is not None:
            raise typer.Exit(EXIT_ATTENTION)
        return
    if force:
        if not as_json:
            output.console.print(output.render_sync_state(client.get("sync", SyncState)))
        confirm_action(yes, "Fetch a new listing and apply it, even if sandboxes are missing from it?")
    try:
        result = progress.run_job(
            client,
            "sync",
            title="Fetching the listing from CSP",
            describe=lambda: _format_state_counts(client, "available", "stale"),
            force="true" if force else None,
        )
    except Refused as error:
        if error.code != "SYNC_HELD":
            raise
        if not as_json:
            output.console.print(output.render_sync_state(client.get("sync", SyncState)))
        message = f"{error.message} brokerctl sync --force applies it."
        raise Refused(message, detail={**error.detail, "message": message}) from None
    print_result(as_json, result, lambda: _render_job_result(result))


@app.command("cleanup")
def run_cleanup(context: typer.Context, as_json: JsonOption = False) -> None:
    """Delete all pending sandboxes now, regardless of their backoff, and wait for the result."""
    client = create_client(context)
    result = progress.run_job(
        client,
        "cleanup",
        title="Deleting sandboxes",
        describe=lambda: _format_state_counts(client, "pending_deletion", "deletion_failed"),
    )
    print_result(as_json, result, lambda: _render_job_result(result))


def _render_job_result(result: Mapping[str, Any]) -> RenderableType:
    return output.build_field_list({name.replace("_", " "): value for name, value in result.items()})


def _format_state_counts(client: AdminClient, *states: str) -> str:
    counts: Mapping[str, Any] = client.get("stats", StateCounts)
    return ", ".join(f"{counts[state]} {state.replace('_', ' ')}" for state in states)


@app.command("release")
def release_sandbox(
    context: typer.Context,
    sandbox_id: SandboxIdArgument,
    reason: Annotated[str, typer.Option(help="Reason; the broker keeps it with the lease.")],
    as_json: JsonOption = False,
) -> None:
    """End a student's lease. The sandbox is deleted, and the student can get another one."""
    result = create_client(context).post(
        f"sandboxes/{quote_segment(sandbox_id)}/release", TransitionResult, reason=reason
    )
    _print_transition(result, as_json)


@app.command("extend")
def extend_lease(
    context: typer.Context,
    sandbox_id: SandboxIdArgument,
    *,
    hours: Annotated[float, typer.Option(help="Hours to add to the end of the lease; may be a fraction.")],
    reason: Annotated[str, typer.Option(help="Reason; the broker keeps it in the history of the sandbox.")],
    as_json: JsonOption = False,
) -> None:
    """Extend a student's lease, without the limit of its policy."""
    result = create_client(context).post(
        f"sandboxes/{quote_segment(sandbox_id)}/extend", Extension, hours=hours, reason=reason
    )
    line = f"The lease of sandbox {sandbox_id} ends {output.format_time(result['expires_at'])}."
    print_result(as_json, result, lambda: output.printable_text(line))


@app.command("replace")
def replace_sandbox(
    context: typer.Context,
    sandbox_id: SandboxIdArgument,
    reason: Annotated[str, typer.Option(help="Reason; the broker keeps it with the lease.")],
    as_json: JsonOption = False,
) -> None:
    """Give a student another sandbox instead of a broken one, which is kept for inspection."""
    result = create_client(context).post(f"sandboxes/{quote_segment(sandbox_id)}/replace", Lease, reason=reason)
    line = f"Sandbox {result['sandbox_id']} ({result['name']}) replaces {sandbox_id}."
    print_result(as_json, result, lambda: output.printable_text(line))


@app.command("retry")
def retry_deletion(
    context: typer.Context,
    sandbox_id: SandboxIdArgument,
    as_json: JsonOption = False,
    end_hold: Annotated[
        bool, typer.Option("--end-hold", help="Also delete a broken sandbox that is kept for inspection.")
    ] = False,
) -> None:
    """Retry a permanently failed deletion."""
    result = create_client(context).post(
        f"sandboxes/{quote_segment(sandbox_id)}/retry-deletion",
        TransitionResult,
        end_hold="true" if end_hold else None,
    )
    _print_transition(result, as_json)


def _print_transition(result: TransitionResult, as_json: bool) -> None:
    requested_at = output.format_time(result["deletion_requested_at"])
    line = f"Sandbox {result['sandbox_id']} is {result['status']}, since {requested_at}."
    print_result(as_json, result, lambda: output.printable_text(line))


def main() -> None:
    try:
        app()
    except CommandError as error:
        output.print_error(error, "--json" in sys.argv)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader, for example head, has closed the pipe. Python flushes stdout at exit and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
