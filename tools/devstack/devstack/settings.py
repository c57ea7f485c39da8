"""What devstack decides on, from the environment, then the clone's `.env` file, then development defaults."""

import getpass
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dotenv import dotenv_values

from devstack.errors import CannotRun

ROOT = Path(__file__).resolve().parents[3]

PORTS = {
    "GATEWAY_PORT": 8080,
    "ALLOCATOR_PORT": 9101,
    "REAPER_PORT": 9102,
    "CSP_SYNCER_PORT": 9103,
    "CSP_SIMULATOR_PORT": 9200,
}
"""Variable and default of every port that `make run` listens on."""

TOKENS = ("BROKER_API_TOKEN", "BROKER_ADMIN_TOKEN", "CSP_API_TOKEN")

POSTGRES_IMAGE = "postgres:17.11"
RABBITMQ_IMAGE = "rabbitmq:4.3-management"

_DEFAULTS = {
    "BIND_HOST": "127.0.0.1,::1",  # a development broker is reached from this machine only
    "DRAIN_SEC": "0",  # no proxy has to notice that the gateway stops
    "LOG_FORMAT": "console",
    "LOG_LEVEL": "INFO",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """An empty variable counts as not set."""

    root: Path
    environment: Mapping[str, str]
    """Everything the services are to find in their environment, apart from what devstack finds out."""
    database_url: str | None
    amqp_url: str | None
    csp_base_url: str | None
    """None: the simulator is ours."""
    ports: Mapping[str, int]
    tokens: Mapping[str, str]
    """By variable. `local_tokens.add_generated_tokens` adds those that the user did not set."""
    generated_tokens: frozenset[str]
    """Variables of the tokens that the user did not set."""
    postgres_servers: tuple[str, ...]
    """URLs to try on this machine, without a database."""
    rabbitmq_server: str
    postgres_image: str
    rabbitmq_image: str
    demo: bool = False
    """Whether it is `make demo`, whose accounts and database are others than those of `make run`."""

    @property
    def state_directory(self) -> Path:
        directory = self.root / ".devstack"
        return directory / "demo" if self.demo else directory

    @property
    def database_name(self) -> str:
        """One database per clone, and one more for the demo and each CSP that is not the simulator."""
        kind = "demo" if self.demo else "dev"
        return f"sandbox_broker_{kind}_{digest(str(self.root) + (self.csp_base_url or ''))}"

    @property
    def bind_hosts(self) -> tuple[str, ...]:
        """Addresses that the services listen on; one empty text for all addresses."""
        return tuple(part.strip() for part in self.environment["BIND_HOST"].split(","))

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['GATEWAY_PORT']}"

    @property
    def simulator_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['CSP_SIMULATOR_PORT']}"


def load(
    environ: Mapping[str, str] | None = None,
    root: Path = ROOT,
    *,
    defaults: Mapping[str, str] | None = None,
    demo: bool = False,
) -> Settings:
    """`defaults` are for what neither the environment nor the file sets. Raises CannotRun, with one line that names
    the variable, when one makes no sense."""
    real = dict(os.environ if environ is None else environ)
    from_file = {name: value for name, value in dotenv_values(root / ".env").items() if value is not None}
    merged = {**_DEFAULTS, **(defaults or {}), **from_file, **real}

    def value(name: str) -> str | None:
        return real.get(name) or from_file.get(name) or None

    csp_base_url = value("CSP_BASE_URL")
    if csp_base_url is not None and value("CSP_API_TOKEN") is None:
        raise CannotRun("CSP_API_TOKEN is not set; the CSP at CSP_BASE_URL wants one")
    bind_hosts = {part.strip() for part in merged["BIND_HOST"].split(",")}
    if bind_hosts.isdisjoint({"", "127.0.0.1", "0.0.0.0"}):
        raise CannotRun(
            "BIND_HOST must be empty or hold 127.0.0.1, where `make run` asks the services if they are ready"
        )
    rabbitmq_port = _port("RABBITMQ_NODE_PORT", value("RABBITMQ_NODE_PORT"), 5672)
    return Settings(
        root=root,
        environment=merged,
        database_url=value("DATABASE_URL"),
        amqp_url=value("AMQP_URL"),
        csp_base_url=csp_base_url,
        ports={name: _port(name, value(name), default) for name, default in PORTS.items()},
        tokens={name: token for name in TOKENS if (token := value(name)) is not None},
        generated_tokens=frozenset(name for name in TOKENS if value(name) is None),
        postgres_servers=_postgres_servers(value),
        rabbitmq_server=f"amqp://guest:guest@127.0.0.1:{rabbitmq_port}/",
        postgres_image=value("POSTGRES_IMAGE") or POSTGRES_IMAGE,
        rabbitmq_image=value("RABBITMQ_IMAGE") or RABBITMQ_IMAGE,
        demo=demo,
    )


def digest(text: str) -> str:
    """Eight hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _postgres_servers(value: Callable[[str], str | None]) -> tuple[str, ...]:
    """PG* variables say where and who, as for libpq's clients, but never a socket's directory."""
    host = value("PGHOST") or "127.0.0.1"
    if host.startswith("/"):
        host = "127.0.0.1"
    port = _port("PGPORT", value("PGPORT"), 5432)
    named = value("PGUSER")
    users = [named] if named else list(dict.fromkeys(["postgres", getpass.getuser()]))
    password = value("PGPASSWORD")
    secret = f":{quote(password, safe='')}" if password else ""
    return tuple(f"postgresql://{quote(user, safe='')}{secret}@{host}:{port}" for user in users)


def _port(name: str, value: str | None, default: int) -> int:
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 65535:
        raise CannotRun(f"{name} must be a port between 1 and 65535, not {value!r}")
    return int(value)
