"""The `access` commands: encrypt the passwords of logins inside sandboxes with another key."""

import typer

from brokerctl import output
from brokerctl.answers import KeysRotated
from brokerctl.errors import EXIT_ATTENTION
from brokerctl.options import JsonOption, create_client, print_result

app = typer.Typer(help="Logins inside sandboxes.", no_args_is_help=True)


@app.command("rotate-keys")
def rotate_keys(context: typer.Context, as_json: JsonOption = False) -> None:
    """Encrypt all passwords with the first key of ACCESS_KEYS. Passwords do not change. Exit with status 4 if a
    password cannot be read."""
    client, rotated = create_client(context), 0
    while True:
        result = client.post("access/rotate-keys", KeysRotated)
        rotated += result["rotated"]
        if result["rotated"] == 0 or result["remaining"] == 0:
            break
    total: KeysRotated = {**result, "rotated": rotated}
    print_result(as_json, total, lambda: output.printable_text(format_result(total)))
    if total["remaining"]:
        raise typer.Exit(EXIT_ATTENTION)


def format_result(result: KeysRotated) -> str:
    """Return the result in one line, with the next action."""
    line = f"{result['rotated']} passwords were encrypted with the first key of ACCESS_KEYS."
    if result["remaining"]:
        return f"{line} {result['remaining']} could not be read. Add their key to ACCESS_KEYS of the allocator."
    return f"{line} Remove the other keys from ACCESS_KEYS."
