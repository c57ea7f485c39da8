"""Address and token of the broker, from the environment or from a file of the same variables."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from brokerctl.errors import Misconfigured

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Config:
    url: str
    """Base URL of the gateway, without /v1."""
    token: str = field(repr=False)


def default_config_file(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    return Path(home) / "brokerctl.env"


def checkout_config_file() -> Path:
    """Return the file that `make run` writes in the checkout whose .venv this program is installed in."""
    return Path(sys.prefix).parent / ".devstack" / "brokerctl.env"


def load_config(
    file: Path | None, environ: Mapping[str, str] = os.environ, *, checkout_file: Path | None = None
) -> Config:
    """Read BROKER_API_URL and BROKER_ADMIN_TOKEN. The environment wins over the file.

    BROKER_ADMIN_TOKEN may be a list, as in the gateway's settings; the first token is used. `checkout_file` is read
    only if neither variable, nor `file`, nor the user's configuration file is set, so that its token never goes to
    another broker. Raises `Misconfigured`.
    """
    path = file or default_config_file(environ)
    if file is not None and not file.is_file():
        raise Misconfigured(f"The file {file} does not exist. Correct --config, or leave it out.")
    is_unset = not path.is_file() and environ.keys().isdisjoint(("BROKER_API_URL", "BROKER_ADMIN_TOKEN"))
    source = checkout_file if is_unset and checkout_file is not None else path
    file_values = dotenv_values(source, interpolate=False) if source.is_file() else {}

    def read_value(name: str) -> str:
        return (environ.get(name) or file_values.get(name) or "").strip()

    token = read_value("BROKER_ADMIN_TOKEN").split(",")[0].strip()
    if not token:
        raise Misconfigured(f"BROKER_ADMIN_TOKEN is not set. Set it, or write it into {path}; make run prints it.")
    return Config(_normalize_url(read_value("BROKER_API_URL") or DEFAULT_URL), token)


def _normalize_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises ValueError if the port is not a number
    except ValueError:
        valid = False
    if not valid:
        raise Misconfigured(f"BROKER_API_URL must be like https://broker.example.com/v1, not {value!r}.")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")
