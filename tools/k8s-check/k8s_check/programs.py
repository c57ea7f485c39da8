"""Programs of the images: their settings, ports and routes, read from the code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic_settings import BaseSettings
from starlette.applications import Starlette
from starlette.routing import Mount, Route

import allocator.main
import allocator.settings
import console.main
import console.settings
import csp_syncer.main
import csp_syncer.settings
import gateway.main
import gateway.settings
import provisioner.main
import provisioner.settings
import reaper.main
import reaper.settings
from sandbox_broker import declare, migrate
from sandbox_broker.observability import health


@dataclass(frozen=True, slots=True)
class Program:
    settings: type[BaseSettings]
    create_app: Callable[[Any], Starlette] | None = None
    """Application of a service. Other programs end by themselves and serve no requests."""
    port: str | None = None
    """Settings field that holds the port."""
    ops_port: str | None = None
    """Settings field with a separate port for /healthz, /readyz and /metrics. The field may be unset."""

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
    "provisioner": Program(provisioner.settings.Settings, provisioner.main.create_app, "provisioner_port"),
    "console": Program(console.settings.Settings, console.main.create_app, "console_port"),
}
"""Services by image name."""

COMMANDS: Mapping[str, Program] = {
    "sandbox_broker.migrate": Program(migrate.Settings),
    "sandbox_broker.declare": Program(declare.Settings),
}
"""Programs by module. Every image can run them instead of its service."""

SECRET_SETTINGS = frozenset(
    {
        "amqp_url",
        "database_url",
        "broker_api_token",
        "broker_admin_token",
        "console_admin_token",
        "console_operator_token",
        "console_secret",
        "console_viewer_token",
        "csp_api_token",
        "csp_login_password",
        "access_keys",
        "instruqt_webhook_secret",
        "niosxaas_password",
        "token_pepper",
        "oidc_client_secret",
        "pseudonym_key",
    }
)
"""Settings with a password or a token. A test compares them with the types of the settings."""

PROXY_VARIABLES = frozenset({"HTTPS_PROXY", "NO_PROXY"})
"""Variables of the HTTP client of CSP. They are no settings."""

OPS_PATHS = frozenset(route.path for route in health.routes({}))

PLACEHOLDERS: Mapping[str, str] = {
    "amqp_url": "amqp://placeholder:placeholder@rabbitmq/",
    "database_url": "postgresql://placeholder:placeholder@postgres/sandbox_broker",
    "broker_api_token": "placeholder-of-the-track-token",
    "broker_admin_token": "placeholder-of-the-admin-token",
    "token_pepper": "placeholder-of-the-token-pepper",
    "pseudonym_key": "placeholder-of-the-pseudonym-key",
    "access_keys": "cGxhY2Vob2xkZXItb2YtdGhlLWFjY2Vzcy1rZXktMDE=",
    "csp_login_password": "placeholder-of-the-login-password",
    "console_admin_token": "placeholder-of-the-admin-token",
    "console_operator_token": "placeholder-of-the-operator-token",
    "console_secret": "placeholder-of-the-secret",
    "console_viewer_token": "placeholder-of-the-viewer-token",
    "oidc_client_secret": "placeholder-of-the-client-secret",
    "instruqt_webhook_secret": "whsec_cGxhY2Vob2xkZXItb2YtdGhlLXdlYmhvb2stc2VjcmV0",
}
"""Valid values for settings with a real value only in the cluster."""


def find_program(container: Mapping[str, Any]) -> Program | None:
    """Return the program of a container, or None for an image of another project.

    Raises ValueError if an image of this project has an unknown name or an unknown command.
    """
    _, prefix, image = str(container["image"]).split("@")[0].rpartition("sandbox-broker/")
    if not prefix:
        return None
    name = image.split(":")[0]
    command = container.get("command")
    if command is None:
        if name not in SERVICES:
            raise ValueError(f"service {name} does not exist")
        return SERVICES[name]
    module = command[-1]
    if command[:-1] != ["python", "-m"] or module not in COMMANDS:
        raise ValueError(f"{' '.join(command)} is not one of {', '.join(f'python -m {name}' for name in COMMANDS)}")
    return COMMANDS[module]


def list_proxy_variables(program: Program) -> frozenset[str]:
    return PROXY_VARIABLES if "csp_base_url" in program.fields else frozenset()


def list_ports(program: Program, settings: BaseSettings) -> list[int]:
    """List the ports that the program listens on: its main port, then its ops port."""
    values = [getattr(settings, name) for name in (program.port, program.ops_port) if name is not None]
    return [value for value in values if value is not None]


@cache  # building the application of the gateway is slow
def map_get_paths(program: Program, settings: BaseSettings) -> dict[str, int]:
    """Return the port of each GET route, by path."""
    if program.create_app is None or program.port is None:
        return {}
    ports = list_ports(program, settings)
    return {
        route.path: ports[-1] if route.path in OPS_PATHS else ports[0]
        for route in program.create_app(settings).routes
        if isinstance(route, Route) and "GET" in (route.methods or ())
    }


@cache
def map_paths(program: Program, settings: BaseSettings) -> dict[str, int]:
    """Return the port of each route of any method, by path."""
    if program.create_app is None or program.port is None:
        return {}
    app = program.create_app(settings)
    api_paths = app.openapi()["paths"] if isinstance(app, FastAPI) else {}
    api_paths = [*api_paths, *(route.path for route in app.routes if isinstance(route, Mount))]
    return dict.fromkeys(api_paths, list_ports(program, settings)[0]) | map_get_paths(program, settings)
