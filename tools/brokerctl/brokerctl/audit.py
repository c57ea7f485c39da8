"""The `audit` command: who did what, why, and from where."""

import signal
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.text import Text

from brokerctl import output
from brokerctl.answers import AuditEntry
from brokerctl.client import AdminClient
from brokerctl.options import JsonOption, LimitOption, create_client

FOLLOW_SEC = 2.0
FOLLOW_LIMIT = 500
"""Entries that a poll reads at most."""


def show_audit(
    context: typer.Context,
    *,
    name: Annotated[str | None, typer.Option("--object", help="Sandbox, job, token, dead letter or lab.")] = None,
    actor: Annotated[str | None, typer.Option(help="Name of a token.")] = None,
    action: Annotated[str | None, typer.Option(help="Action, for example lease.release.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print new entries until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    limit: LimitOption = 50,
) -> None:
    """List commands of administrators and refusals for scope, the newest last. With --json, one line per entry."""
    client = create_client(context)
    filters = {"object": name, "actor": actor, "action": action}
    entries = _read(client, max(limit, FOLLOW_LIMIT) if follow else limit, filters)
    _print(reversed(entries[:limit]), as_json)
    if not follow:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            # An entry can become visible after one with a higher id, so the highest id is not enough.
            known = {entry["audit_id"] for entry in entries}
            time.sleep(FOLLOW_SEC)
            entries = _read(client, FOLLOW_LIMIT, filters)
            _print((entry for entry in reversed(entries) if entry["audit_id"] not in known), as_json)
    except KeyboardInterrupt:
        pass


def _read(client: AdminClient, limit: int, filters: dict[str, str | None]) -> list[AuditEntry]:
    return list(client.iterate_entries("audit", "entries", AuditEntry, limit, **filters))


def _print(entries: Iterable[AuditEntry], as_json: bool) -> None:
    for entry in entries:
        if as_json:
            output.print_json(entry)
        else:
            output.console.print(format_entry(entry), soft_wrap=True)


def format_entry(entry: AuditEntry) -> Text:
    """Return one line: time, actor, action, object, outcome, reason, and the place of the client."""
    parts: list[Any] = [
        output.format_time(entry["at"]),
        entry["actor"],
        entry["action"],
        entry["object"] or "-",
        entry["outcome"],
        f"reason: {entry['reason']}" if entry["reason"] else "no reason",
        f"from {entry['address'] or 'unknown'}",
        f"request {entry['request_id'] or 'unknown'}",
    ]
    return output.printable_text("  ".join(map(str, parts)))
