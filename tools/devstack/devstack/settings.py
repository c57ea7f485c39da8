"""Settings of devstack: from the environment, the clone's `.env` file, and development defaults, in this order."""

import base64
import getpass
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dotenv import dotenv_values

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD
from devstack.errors import CannotRun

ROOT = Path(__file__).resolve().parents[3]

PORTS = {
    "GATEWAY_PORT": 8080,
    "ALLOCATOR_PORT": 9101,
    "REAPER_PORT": 9102,
    "CSP_SYNCER_PORT": 9103,
    "PROVISIONER_PORT": 9104,
    "CONSOLE_PORT": 9105,
    "CSP_SIMULATOR_PORT": 9200,
}
"""Variable -> default of every port used by `make run`."""

TOKENS = ("BROKER_API_TOKEN", "BROKER_ADMIN_TOKEN", "CSP_API_TOKEN", "CONSOLE_SECRET")

POSTGRES_IMAGE = "postgres:17.11"
RABBITMQ_IMAGE = "rabbitmq:4.3-management"

_DEFAULTS = {
    "BIND_HOST": "127.0.0.1,::1",  # a development broker accepts connections from this machine only
    "DRAIN_SEC": "0",  # no proxy needs time to notice the stop
    "LOG_FORMAT": "console",
    "LOG_LEVEL": "INFO",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one run. An empty variable counts as unset."""

    root: Path
    environment: Mapping[str, str]
    """Environment of the services, without the addresses and tokens added by devstack."""
    database_url: str | None
    amqp_url: str | None
    csp_base_url: str | None
    """None for the simulator."""
    ports: Mapping[str, int]
    tokens: Mapping[str, str]
    """Variable -> token. `local_tokens.add_generated_tokens` adds the missing ones."""
    generated_tokens: frozenset[str]
    """Variables of tokens not set by the user."""
    postgres_servers: tuple[str, ...]
    """Candidate URLs on this machine, without a database name."""
    rabbitmq_server: str
    postgres_image: str
    rabbitmq_image: str
    cluster: bool = False
    """Start a RabbitMQ cluster and a PostgreSQL pair."""
    demo: bool = False
    """True for `make demo`, which has its own accounts and database."""

    @property
    def state_directory(self) -> Path:
        directory = self.root / ".devstack"
        return directory / "demo" if self.demo else directory

    @property
    def database_name(self) -> str:
        """Name of the database: separate for each clone, for the demo, and for each real CSP."""
        kind = "demo" if self.demo else "dev"
        return f"sandbox_broker_{kind}_{digest(str(self.root) + (self.csp_base_url or ''))}"

    @property
    def bind_hosts(self) -> tuple[str, ...]:
        """Listen addresses of the services; one empty string for all addresses."""
        return tuple(part.strip() for part in self.environment["BIND_HOST"].split(","))

    @property
    def gateway_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['GATEWAY_PORT']}"

    @property
    def console_url(self) -> str:
        return self.environment.get("CONSOLE_URL") or f"http://127.0.0.1:{self.ports['CONSOLE_PORT']}"

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
    """Load the settings. `defaults` apply to variables set neither in the environment nor in `.env`.

    Raises CannotRun with the name of the variable for an invalid value.
    """
    real = dict(os.environ if environ is None else environ)
    from_file = {name: value for name, value in dotenv_values(root / ".env").items() if value is not None}
    merged = {**_DEFAULTS, **(defaults or {}), **from_file, **real}

    def value(name: str) -> str | None:
        return real.get(name) or from_file.get(name) or None

    csp_base_url = value("CSP_BASE_URL")
    if csp_base_url is not None and value("CSP_API_TOKEN") is None:
        raise CannotRun("CSP_API_TOKEN is not set; the CSP at CSP_BASE_URL requires a token")
    bind_hosts = {part.strip() for part in merged["BIND_HOST"].split(",")}
    if bind_hosts.isdisjoint({"", "127.0.0.1", "0.0.0.0"}):
        raise CannotRun(
            "BIND_HOST must be empty or contain 127.0.0.1, because `make run` probes the services there"
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
        cluster=_cluster(value("CLUSTER"), [name for name in ("DATABASE_URL", "AMQP_URL") if value(name)]),
        demo=demo,
    )


def login_settings(settings: Settings) -> dict[str, str]:
    """Return the settings for logins inside sandboxes of the simulator, none for another CSP.

    The key follows from the admin token, so that a later run reads the passwords of this one.
    """
    if settings.csp_base_url is not None:
        return {}
    key = hashlib.sha256(f"ACCESS_KEYS of {settings.tokens['BROKER_ADMIN_TOKEN']}".encode()).digest()
    return {
        "CSP_LOGIN_EMAIL": DEFAULT_EMAIL,
        "CSP_LOGIN_PASSWORD": DEFAULT_PASSWORD,
        "ACCESS_EMAIL_DOMAIN": "labs.example.com",
        "ACCESS_KEYS": base64.urlsafe_b64encode(key).decode(),
        "ACCESS_LOGIN_URL": settings.simulator_url,
    }


def digest(text: str) -> str:
    """Return eight hexadecimal digits of the text's hash, for unique names."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _postgres_servers(value: Callable[[str], str | None]) -> tuple[str, ...]:
    """Return candidate URLs from libpq's PG* variables. A socket directory in PGHOST is ignored."""
    host = value("PGHOST") or "127.0.0.1"
    if host.startswith("/"):
        host = "127.0.0.1"
    port = _port("PGPORT", value("PGPORT"), 5432)
    user_setting = value("PGUSER")
    users = [user_setting] if user_setting else list(dict.fromkeys(["postgres", getpass.getuser()]))
    password = value("PGPASSWORD")
    secret = f":{quote(password, safe='')}" if password else ""
    return tuple(f"postgresql://{quote(user, safe='')}{secret}@{host}:{port}" for user in users)


def _cluster(value: str | None, named_servers: list[str]) -> bool:
    if value not in (None, "0", "1"):
        raise CannotRun(f"CLUSTER must be 1 or empty, not {value!r}")
    if value == "1" and named_servers:
        raise CannotRun(f"CLUSTER=1 starts servers of its own; remove {' and '.join(named_servers)}")
    return value == "1"


def _port(name: str, value: str | None, default: int) -> int:
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 65535:
        raise CannotRun(f"{name} must be a port between 1 and 65535, not {value!r}")
    return int(value)
