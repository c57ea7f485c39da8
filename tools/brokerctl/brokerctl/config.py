"""Address and token of the broker, from the environment or from a file of the same variables."""

import ipaddress
import os
import re
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
    proxy: str | None = field(default=None, repr=False)
    """HTTP proxy for `url`, unless NO_PROXY names its host."""


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
    if not (token.isascii() and token.isprintable()):
        raise Misconfigured("BROKER_ADMIN_TOKEN must be one line of printable ASCII. Set the token alone.")
    url = _normalize_url(read_value("BROKER_API_URL") or DEFAULT_URL)
    return Config(url, token, _find_proxy(url, environ))


def _normalize_url(value: str) -> str:
    if not _is_url(value):
        # Without the value, because it may hold a password.
        raise Misconfigured("BROKER_API_URL must be like https://broker.example.com/v1.")
    return value.rstrip("/").removesuffix("/v1").rstrip("/")


def _find_proxy(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the proxy of the environment. A gateway on this machine is never called through a proxy."""
    parts = urlsplit(url)
    if _is_loopback(parts.hostname or ""):
        return None
    for name in (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper()):
        if value := environ.get(name, "").strip():
            proxy = value if "://" in value else f"http://{value}"
            if not _is_url(proxy, may_have_user=True):
                raise Misconfigured(
                    f"{name} must be like http://proxy.example.com:3128, an HTTP proxy. Percent-encode special "
                    "characters in its user name and password."
                )
            return proxy
    return None


def _is_url(value: str, *, may_have_user: bool = False) -> bool:
    """Return whether `value` is an http or https URL without a query. An unescaped password makes it invalid."""
    user = r"([^@/?#\[\]\s]+@)?" if may_have_user else ""
    matched = re.fullmatch(
        rf"https?://{user}(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:(?P<port>\d{{1,5}}))?(/[^@?#\s]*)?", value
    )
    return matched is not None and 0 < int(matched["port"] or 80) < 65536


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
