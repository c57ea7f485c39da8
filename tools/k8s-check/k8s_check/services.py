"""What the code says of each thing that a container may run: its settings, its port, its routes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic_settings import BaseSettings
from starlette.applications import Starlette
from starlette.routing import Route

import allocator.main
import allocator.settings
import csp_syncer.main
import csp_syncer.settings
import gateway.main
import gateway.settings
import reaper.main
import reaper.settings
from sandbox_broker import declare, migrate
from sandbox_broker.observability import health


@dataclass(frozen=True, slots=True)
class Program:
    settings: type[BaseSettings]
    create_app: Callable[[Any], Starlette] | None = None
    """None: it serves nothing, and ends."""
    port: str | None = None
    """The field of the settings that is its port."""
    ops_port: str | None = None
    """The field that moves /healthz, /readyz and /metrics to a port of their own, if it is set."""

    @property
    def fields(self) -> set[str]:
        return set(self.settings.model_fields)

    @property
    def required(self) -> set[str]:
        return {name for name, field in self.settings.model_fields.items() if field.is_required()}


SERVICES: Mapping[str, Program] = {
    "gateway": Program(gateway.settings.Settings, gateway.main.create_app, "gateway_port", "ops_port"),
    "allocator": Program(allocator.settings.Settings, allocator.main.create_app, "allocator_port"),
    "reaper": Program(reaper.settings.Settings, reaper.main.create_app, "reaper_port"),
    "csp-syncer": Program(csp_syncer.settings.Settings, csp_syncer.main.create_app, "csp_syncer_port"),
}
"""By the name of the image."""

COMMANDS: Mapping[str, Program] = {
    "sandbox_broker.migrate": Program(migrate.Settings),
    "sandbox_broker.declare": Program(declare.Settings),
}
"""By the module that any of the images can run instead of its service."""

SECRETS = frozenset(
    {
        "amqp_url",
        "database_url",
        "broker_api_token",
        "broker_admin_token",
        "csp_api_token",
        "niosxaas_password",
    }
)
"""Settings that hold a password or a token; a test compares this with the settings' types."""

OPERATIONS = frozenset(route.path for route in health.routes({}))

STAND_INS: Mapping[str, str] = {
    "amqp_url": "amqp://stand-in:stand-in@rabbitmq/",
    "database_url": "postgresql://stand-in:stand-in@postgres/sandbox_broker",
    "broker_api_token": "stand-in-of-the-track-token",
    "broker_admin_token": "stand-in-of-the-admin-token",
}
"""For what only the cluster knows."""


def of_container(container: Mapping[str, Any]) -> Program | None:
    """None: it runs nothing of ours. Raises ValueError when it runs something of ours that does not exist."""
    _, ours, image = str(container["image"]).split("@")[0].rpartition("sandbox-broker/")
    if not ours:
        return None
    name = image.split(":")[0]
    command = container.get("command")
    if command is None:
        if name not in SERVICES:
            raise ValueError(f"there is no service {name}")
        return SERVICES[name]
    module = command[-1]
    if command[:-1] != ["python", "-m"] or module not in COMMANDS:
        raise ValueError(f"{' '.join(command)} is none of {', '.join(f'python -m {name}' for name in COMMANDS)}")
    return COMMANDS[module]


def ports(program: Program, settings: BaseSettings) -> list[int]:
    """The ports that the program listens on."""
    values = [getattr(settings, name) for name in (program.port, program.ops_port) if name is not None]
    return [value for value in values if value is not None]


def paths(program: Program, settings: BaseSettings) -> dict[str, int]:
    """The paths that answer GET, and the port of each."""
    if program.create_app is None or program.port is None:
        return {}
    listens_on = ports(program, settings)
    return {
        route.path: listens_on[-1] if route.path in OPERATIONS else listens_on[0]
        for route in program.create_app(settings).routes
        if isinstance(route, Route) and "GET" in (route.methods or ())
    }


def routes(program: Program, settings: BaseSettings) -> dict[str, int]:
    """Return the paths that are served for any method, and the port of each."""
    if program.create_app is None or program.port is None:
        return {}
    app = program.create_app(settings)
    described = app.openapi()["paths"] if isinstance(app, FastAPI) else {}
    return dict.fromkeys(described, ports(program, settings)[0]) | paths(program, settings)
