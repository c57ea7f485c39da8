"""Where the broker is and who we are: from the environment, then from a file of the same variables."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from brokerctl.problems import Misconfigured

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Config:
    url: str
    """Without /v1."""
    token: str = field(repr=False)


def default_file(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    return Path(home) / "brokerctl.env"


def checkout_file() -> Path:
    """Return the file that `make run` writes in the checkout whose .venv this program is installed in."""
    return Path(sys.prefix).parent / ".devstack" / "brokerctl.env"


def load(file: Path | None, environ: Mapping[str, str] = os.environ, *, local_broker: Path | None = None) -> Config:
    """Return BROKER_API_URL and BROKER_ADMIN_TOKEN, of which the first counts where it is a list.

    `local_broker` is read only where nothing else is set: neither variable, no `file`, no file of the user. So the
    local token never goes to another broker. Raises Misconfigured.
    """
    path = file or default_file(environ)
    if file is not None and not file.is_file():
        raise Misconfigured(f"There is no file {file}. Correct --config, or leave it out.")
    nothing_is_set = not path.is_file() and environ.keys().isdisjoint(("BROKER_API_URL", "BROKER_ADMIN_TOKEN"))
    source = local_broker if nothing_is_set and local_broker is not None else path
    found = dotenv_values(source, interpolate=False) if source.is_file() else {}

    def value(name: str) -> str:
        return (environ.get(name) or found.get(name) or "").strip()

    token = value("BROKER_ADMIN_TOKEN").split(",")[0].strip()
    if not token:
        raise Misconfigured(f"BROKER_ADMIN_TOKEN is not set. Set it, or write it into {path}; make run prints it.")
    return Config(_url(value("BROKER_API_URL") or DEFAULT_URL), token)


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises on a port that is no number
    except ValueError:
        valid = False
    if not valid:
        raise Misconfigured(f"BROKER_API_URL must be like https://broker.example.com/v1, not {value!r}.")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")
