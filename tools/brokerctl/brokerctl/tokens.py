"""The `token` commands: create, list, revoke, contain and resume named tokens."""

from typing import Annotated, Literal

import typer
from rich.console import Group, RenderableType

from brokerctl import output
from brokerctl.answers import IssuedToken, Token, TokenResumed, Tokens, TokenSuspended
from brokerctl.client import quote_segment
from brokerctl.options import JsonOption, YesOption, confirm_action, create_client, print_result

app = typer.Typer(
    help="Named tokens: one for each lab and each person, with a role and limits.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the token.")]
ReasonOption = Annotated[str | None, typer.Option(help="Reason; the broker keeps it in the audit.")]


@app.command("create")
def create_token(
    context: typer.Context,
    name: NameArgument,
    *,
    role: Annotated[Literal["track", "viewer", "operator", "admin"], typer.Option(help="Role of the token.")],
    track: Annotated[
        list[str] | None, typer.Option(help="Lab that it may lease for; repeat for several. Default: all.")
    ] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(help="Name prefix that it may ask for; repeat for several. Default: all.")
    ] = None,
    max_active: Annotated[int | None, typer.Option(min=0, help="Limit of active leases.")] = None,
    max_new_per_hour: Annotated[int | None, typer.Option(min=0, help="Limit of new leases within an hour.")] = None,
    max_rate: Annotated[int | None, typer.Option(min=0, help="Limit of new leases within a minute.")] = None,
    expires_at: Annotated[int | None, typer.Option(min=0, help="End in Unix seconds. Default: never.")] = None,
    reason: ReasonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a token and print it. The broker keeps only a hash and cannot show it again."""
    body = {
        "name": name,
        "role": role,
        "tracks": track or [],
        "prefixes": prefix or [],
        "max_active": max_active,
        "max_new_per_hour": max_new_per_hour,
        "max_rate": max_rate,
        "expires_at": expires_at,
    }
    result = create_client(context).request("POST", "tokens", IssuedToken, body, reason=reason)
    print_result(as_json, result, lambda: output.printable_text(result["token"]))


@app.command("list")
def list_tokens(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the tokens with their limits and last use. The secrets are not known."""
    result = create_client(context).get("tokens", Tokens)
    print_result(as_json, result, lambda: render_tokens(result["tokens"]))


@app.command("revoke")
def revoke_token(
    context: typer.Context, name: NameArgument, reason: ReasonOption = None, as_json: JsonOption = False
) -> None:
    """Revoke a token for ever. Gateways refuse it within 5 s. Its leases stay."""
    create_client(context).delete(f"tokens/{quote_segment(name)}", type(None), reason=reason)
    print_result(as_json, {"name": name}, lambda: output.printable_text(f"The token {name} is revoked."))


@app.command("contain")
def contain_token(
    context: typer.Context,
    name: NameArgument,
    *,
    release: Annotated[bool, typer.Option("--release", help="Also end all active leases of the token.")] = False,
    reason: ReasonOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Suspend a leaked token, and list its active leases. `brokerctl token resume` ends the suspension."""
    if release:
        confirm_action(yes, f"End all leases of the token {name}? Their sandboxes are deleted.")
    result = create_client(context).post(
        f"tokens/{quote_segment(name)}/suspend", TokenSuspended, release="true" if release else None, reason=reason
    )
    print_result(as_json, result, lambda: render_containment(result))


@app.command("resume")
def resume_token(
    context: typer.Context, name: NameArgument, reason: ReasonOption = None, as_json: JsonOption = False
) -> None:
    """End the suspension of a token."""
    result = create_client(context).post(f"tokens/{quote_segment(name)}/resume", TokenResumed, reason=reason)
    line = f"The token {name} is valid again." if result["changed"] else f"The token {name} was not suspended."
    print_result(as_json, result, lambda: output.printable_text(line))


def render_tokens(tokens: list[Token]) -> RenderableType:
    if not tokens:
        return output.printable_text("There is no named token. brokerctl token create makes one.")
    rows = [
        (
            token["name"],
            token["role"],
            ", ".join([*token["tracks"], *(f"{prefix}*" for prefix in token["prefixes"])]) or "all",
            _format_limits(token),
            output.format_time(token["expires_at"]) if token["expires_at"] is not None else "never",
            "suspended" if token["suspended_at"] is not None else "",
            output.format_time(token["last_used_at"]) if token["last_used_at"] is not None else "never",
        )
        for token in tokens
    ]
    return output.build_table(("name", "role", "scope", "limits", "expires", "state", "last use"), rows)


def _format_limits(token: Token) -> str:
    limits = {
        "active": token["max_active"],
        "per hour": token["max_new_per_hour"],
        "per minute": token["max_rate"],
    }
    return ", ".join(f"{value} {name}" for name, value in limits.items() if value is not None) or "none"


def render_containment(result: TokenSuspended) -> RenderableType:
    lines = [f"The token {result['name']} is suspended. {len(result['released'])} leases were ended."]
    leases = result["leases"]
    if not leases:
        return output.printable_text(f"{lines[0]} It has no active lease.")
    rows = [
        (lease["sandbox_id"], lease["holder"], lease["track_name"] or "", output.format_time(lease["allocated_at"]))
        for lease in leases
    ]
    table = output.build_table(("sandbox", "student", "track", "since"), rows)
    return Group(output.printable_text(f"{lines[0]} Active leases, at most 500:"), table)
