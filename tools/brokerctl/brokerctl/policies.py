"""The `policy` commands: apply a file of policies, and show the applied ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from brokerctl import output
from brokerctl.answers import Policies, PolicyChanges
from brokerctl.errors import Refused
from brokerctl.options import JsonOption, create_client, print_result

app = typer.Typer(help="Policies: lease times, quotas, waiting and stock of labs.", no_args_is_help=True)


@app.command("apply")
def apply_policies(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with all policies.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the difference.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace all policies by those of the file, and print the difference.

    Policies that the file lacks are removed. One error refuses the whole file. Leases keep their terms.
    """
    from brokerctl.policy_file import read_policy_file  # noqa: PLC0415 (the YAML library loads slowly)

    client = create_client(context)
    wanted = read_policy_file(file)
    before = client.get("policies", Policies)["policies"]
    try:
        answer = client.put("policies", PolicyChanges, {"policies": wanted.policies}, dry_run=dry_run or None)
    except Refused as error:
        raise wanted.locate(error) from None
    print_result(as_json, answer, lambda: _render_changes(answer, before, wanted.policies, dry_run))


@app.command("show")
def show_policies(context: typer.Context, as_json: JsonOption = False) -> None:
    """Print all policies as YAML, which policy apply accepts."""
    from brokerctl.policy_file import format_policies  # noqa: PLC0415

    answer = create_client(context).get("policies", Policies)
    if as_json:
        output.print_json(answer)
    else:
        text = output.printable_text(format_policies(answer["policies"]), kept="\n")
        output.console.print(text, soft_wrap=True, end="")


def _render_changes(
    answer: PolicyChanges, before: list[dict[str, Any]], after: list[dict[str, Any]], dry_run: bool
) -> RenderableType:
    if not answer["changes"]:
        return output.printable_text("The policies are the same. Nothing was changed.")
    rows = list(_list_changed_values(answer, before, after))
    title = "Dry run: nothing was changed." if dry_run else "The policies are applied. Leases keep their terms."
    table = output.build_table(("policy", "change", "field", "before", "after"), rows)
    return Group(output.printable_text(title), Text(), table)


def _list_changed_values(
    answer: PolicyChanges, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> Iterator[tuple[object, ...]]:
    old = {policy["name"]: policy for policy in before}
    new = {policy["name"]: policy for policy in after}
    for change in answer["changes"]:
        name = change["name"]
        for field in change["fields"] or [""]:
            values = (policies.get(name, {}).get(field) for policies in (old, new))
            yield name, change["change"], field, *(format_value(value) for value in values)


def format_value(value: Any) -> str:
    """Return a value of a policy for a table: nested fields as `name_prefix: lab-, min: 20`."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {format_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return str(value)
