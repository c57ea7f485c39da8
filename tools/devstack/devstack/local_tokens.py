"""Tokens of `make run` and `make demo`: random, one set for each checkout, kept in its `.devstack/`."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dotenv import dotenv_values

from devstack.settings import TOKENS, Settings


def add_generated_tokens(settings: Settings) -> Settings:
    """Return the settings with a generated token for each that the user did not set."""
    if not settings.generated_tokens:
        return settings
    kept = _load_or_create(settings.root / ".devstack" / "tokens.env")
    generated = {name: kept[name] for name in settings.generated_tokens}
    return replace(settings, tokens={**generated, **settings.tokens})


def write_brokerctl_file(settings: Settings) -> None:
    """Write the address of this run and its admin token where the checkout's brokerctl finds them.

    A token that the user set is not written to disk; the file of an earlier run is removed then.
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
    """Return the tokens of the file, after adding those that it lacks."""
    kept = {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}
    missing = [name for name in TOKENS if name not in kept]
    if missing:
        kept |= {name: secrets.token_hex(16) for name in missing}
        _write(path, kept)
    return kept


def _write(path: Path, variables: Mapping[str, str]) -> None:
    """Replace the file in one step, readable by its owner only from the beginning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in variables.items())
    new.replace(path)
