"""Summary printed by `make run` after the start: addresses, tokens and example commands."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from devstack.settings import Settings

_METRICS = {
    "gateway": "GATEWAY_PORT",
    "allocator": "ALLOCATOR_PORT",
    "reaper": "REAPER_PORT",
    "csp-syncer": "CSP_SYNCER_PORT",
    "provisioner": "PROVISIONER_PORT",
    "console": "CONSOLE_PORT",
}


def summary_lines(
    settings: Settings, counts: Mapping[str, Any] | None, *, seconds: float, set_up: float
) -> Iterator[str]:
    """Yield the summary line by line. `set_up` is the part of `seconds` spent on PostgreSQL and RabbitMQ."""
    gateway = settings.gateway_url
    track_token = _token(settings, "BROKER_API_TOKEN")
    script = settings.root / "instruqt" / "instruqt_broker_allocation.py"
    brokerctl = Path(sys.executable).with_name("brokerctl")
    yield ""
    yield f"Ready after {seconds:.1f} s ({set_up:.1f} s of it for PostgreSQL and RabbitMQ). {_pool_line(counts)}"
    yield ""
    yield f"  console        {settings.console_url}  (sign in with the admin token)"
    yield f"  API            {gateway}/v1"
    yield f"  docs           {gateway}/v1/docs"
    for number, (name, variable) in enumerate(_METRICS.items()):
        label = "metrics" if number == 0 else ""
        yield f"  {label:<14} http://127.0.0.1:{settings.ports[variable]}/metrics  ({name})"
    if settings.csp_base_url is None:
        yield f"  CSP simulator  {settings.simulator_url}/v2  (control: {settings.simulator_url}/_control)"
    else:
        yield f"  CSP            {settings.csp_base_url}"
    yield f"  track token    {track_token}"
    yield f"  admin token    {_token(settings, 'BROKER_ADMIN_TOKEN')}"
    if settings.generated_tokens & {"BROKER_API_TOKEN", "BROKER_ADMIN_TOKEN"}:
        yield "                 (random, stored in .devstack/tokens.env; `make clean` removes them)"
    yield ""
    yield "Lease a sandbox with the Instruqt script, from any folder:"
    yield ""
    yield f"  BROKER_API_URL={gateway}/v1 BROKER_API_TOKEN={track_token} INSTRUQT_PARTICIPANT_ID=student-1 \\"
    yield f"    python3 {script}"
    yield ""
    if settings.csp_base_url is None:
        yield "With --access, the script also fetches a login inside the sandbox (docs/access.md)."
        yield ""
    yield "or with curl:"
    yield ""
    yield f"  curl -X POST {gateway}/v1/allocate -H 'X-Instruqt-Sandbox-ID: student-1' \\"
    yield f'    -H "Authorization: Bearer {track_token}"'
    yield ""
    yield "Show the status of the broker (docs/brokerctl.md):"
    yield ""
    yield f"  BROKER_API_URL={gateway}/v1 BROKER_ADMIN_TOKEN={_token(settings, 'BROKER_ADMIN_TOKEN')} \\"
    yield f"    {brokerctl} status"
    if "BROKER_ADMIN_TOKEN" in settings.generated_tokens:
        yield ""
        yield "or, because brokerctl reads address and token from .devstack/brokerctl.env:"
        yield ""
        yield f"  {brokerctl} status"
    yield ""
    yield "Ctrl-C stops everything."
    yield ""


def _token(settings: Settings, name: str) -> str:
    """Return a generated token, or the variable name of a token set by the user."""
    return settings.tokens[name] if name in settings.generated_tokens else f"${name}"


def _pool_line(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return "The state of the pool could not be read."
    states = {name: number for name, number in counts.items() if isinstance(number, int) and name != "total"}
    shown = ", ".join(f"{number} {name}" for name, number in states.items() if number or name == "available")
    return f"Pool: {shown}."
