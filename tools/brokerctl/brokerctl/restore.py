"""The `restore` commands: confirm a database that was restored from an older backup."""

import typer

from brokerctl import output
from brokerctl.answers import RestoreConfirmed
from brokerctl.options import JsonOption, YesOption, confirm_action, create_client, print_result

STEPS = (
    "Did you extract the leases since the backup from the logs of the allocators (granted.csv, released.csv)?",
    "Did you import both files with deploy/postgres/after_restore.sql? Without logs: have the last leases expired, "
    "and were all available sandboxes set to pending_deletion?",
    "Sandboxes that the database calls available will be leased. Confirm the restored database?",
)
"""Questions in the order of the runbook, "Backup and restore"."""

app = typer.Typer(help="Restore of an older backup of the database.", no_args_is_help=True)


@app.callback()
def _restore() -> None:
    """Keep `confirm` a subcommand."""


@app.command("confirm")
def confirm_restore(context: typer.Context, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Confirm the restored database after the steps of the runbook. Until then, no sandbox is leased."""
    client = create_client(context)
    for question in STEPS:
        confirm_action(yes, question)
    result = client.post("restore/confirm", RestoreConfirmed)
    line = (
        "The restored database is confirmed. Sandboxes are leased again. Now run brokerctl sync."
        if result["changed"]
        else "Nothing to confirm: the broker knew no lease that the database lacks."
    )
    print_result(as_json, result, lambda: output.printable_text(line))
