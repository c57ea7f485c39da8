"""Tokens of `make run` and `make demo`: one random set for each clone, stored in `.devstack/`."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dotenv import dotenv_values

from devstack.settings import TOKENS, Settings


def add_generated_tokens(settings: Settings) -> Settings:
    """Return the settings with a generated token in place of each missing token."""
    if not settings.generated_tokens:
        return settings
    stored = _load_or_create(settings.root / ".devstack" / "tokens.env")
    generated = {name: stored[name] for name in settings.generated_tokens}
    return replace(settings, tokens={**generated, **settings.tokens})


def write_brokerctl_file(settings: Settings) -> None:
    """Write the address and the admin token of this run to the file read by the clone's brokerctl.

    A token set by the user is not written to disk. In that case the file of an earlier run is removed.
    """
    path = settings.root / ".devstack" / "brokerctl.env"
    if "BROKER_ADMIN_TOKEN" not in settings.generated_tokens:
        path.unlink(missing_ok=True)
        return
    _write(
        path,
        {
            "BROKER_API_URL": f"{settings.gateway_url}/v1",
            "BROKER_ADMIN_TOKEN": settings.tokens["BROKER_ADMIN_TOKEN"],
        },
    )


def _load_or_create(path: Path) -> Mapping[str, str]:
    """Return the tokens of the file. Generates and stores missing ones."""
    tokens = {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}
    missing = [name for name in TOKENS if name not in tokens]
    if missing:
        tokens |= {name: secrets.token_hex(16) for name in missing}
        _write(path, tokens)
    return tokens


def _write(path: Path, variables: Mapping[str, str]) -> None:
    """Replace the file atomically. Only its owner can read it at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in variables.items())
    new.replace(path)
