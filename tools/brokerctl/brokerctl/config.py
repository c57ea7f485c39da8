"""Where the broker is and who we are: from the environment, then from a file of the same variables."""

import os
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


def load(file: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """BROKER_API_URL and BROKER_ADMIN_TOKEN, of which the first counts where it is a list. Raises Misconfigured."""
    path = file or default_file(environ)
    if file is not None and not file.is_file():
        raise Misconfigured(f"There is no file {file}. Correct --config, or leave it out.")
    found = dotenv_values(path, interpolate=False) if path.is_file() else {}

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
