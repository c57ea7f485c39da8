"""Containers against the code they run: settings, ports, probes, and the routes behind an Ingress."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from k8s_check import programs
from k8s_check.manifests import (
    Manifest,
    PodTemplate,
    find_manifest,
    is_selector_match,
    list_pod_templates,
)
from k8s_check.programs import Program
from k8s_check.published_routes import list_published_routes
from k8s_check.references import resolve_backend_ports, resolve_port
from sandbox_broker.observability.health import CHECK_TIMEOUT_SEC

STOP_SEC = 30
"""Longest time from SIGTERM to the end of a service."""

_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in list_pod_templates(manifests):
        for container in pod.containers:
            problems = _check_container(manifests, pod, container)
            yield from (f"{pod.title}, container {container['name']}: {problem}" for problem in problems)
    yield from _check_published_routes(manifests)


def _check_container(
    manifests: Sequence[Manifest], pod: PodTemplate, container: Mapping[str, Any]
) -> Iterator[str]:
    try:
        program = programs.find_program(container)
    except ValueError as error:
        yield str(error)
        return
    if program is None:
        return
    variables, env_problems = read_environment(manifests, container)
    yield from env_problems
    yield from _check_variables(program, variables)
    settings, settings_problems = load_settings(program, variables)
    yield from settings_problems
    grace_sec = pod.spec.get("terminationGracePeriodSeconds", 30)
    if program.create_app is not None and grace_sec <= STOP_SEC:
        yield (
            f"terminationGracePeriodSeconds is {grace_sec}, and the service may need {STOP_SEC} s to stop: set a "
            "longer time"
        )
    if settings is not None:
        yield from _check_ports(program, settings, container)
        if program.create_app is not None:
            yield from _check_probes(program, settings, pod, container)


def read_environment(
    manifests: Sequence[Manifest], container: Mapping[str, Any]
) -> tuple[dict[str, str | None], list[str]]:
    """Return the container's variables and a list of problems. A value that only the cluster knows is None."""
    variables: dict[str, str | None] = {}
    problems: list[str] = []
    for source in container.get("envFrom", []):
        if "configMapRef" not in source:
            problems.append(f"envFrom {', '.join(source)}: name each variable with a value from a secret in env")
        elif (config_map := find_manifest(manifests, "ConfigMap", source["configMapRef"]["name"])) is None:
            problems.append(f"ConfigMap {source['configMapRef']['name']} does not exist")
        else:
            variables.update(config_map.get("data", {}))
    for entry in container.get("env", []):
        variables[entry["name"]] = entry.get("value")
    return variables, problems


def _check_variables(program: Program, variables: Mapping[str, str | None]) -> Iterator[str]:
    known = {field.upper() for field in program.fields} | programs.list_proxy_variables(program)
    for name in sorted(set(variables) - known):
        yield f"{name} is not a setting of this program"
    for field in sorted(program.required):
        if field.upper() not in variables:
            yield f"{field.upper()} is required, but not set"
    for field in sorted(programs.SECRET_SETTINGS & program.fields):
        if variables.get(field.upper()) is not None:
            yield f"{field.upper()} must come from a secret"


def load_settings(program: Program, variables: Mapping[str, str | None]) -> tuple[BaseSettings | None, list[str]]:
    """Load the program's settings from the variables, or return the problems of invalid ones."""
    return _load_settings(program, frozenset(variables.items()))


@cache  # settings of CSP build a TLS context, and overlays share most containers
def _load_settings(
    program: Program, variables: frozenset[tuple[str, str | None]]
) -> tuple[BaseSettings | None, list[str]]:
    values = {
        name.lower(): programs.PLACEHOLDERS.get(name.lower(), "placeholder") if value is None else value
        for name, value in variables
    }
    placeholders: dict[str, Any] = {
        field: programs.PLACEHOLDERS.get(field, "placeholder") for field in program.required
    }
    try:
        return program.settings(_env_file=None, **(placeholders | values)), []
    except ValidationError as error:
        return None, [f"{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()]


def _check_ports(program: Program, settings: BaseSettings, container: Mapping[str, Any]) -> Iterator[str]:
    served = programs.list_ports(program, settings)
    declared = {port["containerPort"] for port in container.get("ports", [])}
    for port in sorted(declared - set(served)):
        yield f"port {port} is declared, but the program serves {', '.join(map(str, served)) or 'no port'}"
    for port in served:
        if port not in declared:
            yield f"port {port} is served, but not declared"


def _check_probes(
    program: Program, settings: BaseSettings, pod: PodTemplate, container: Mapping[str, Any]
) -> Iterator[str]:
    served_paths = programs.map_get_paths(program, settings)
    for kind in _PROBES:
        probe = container.get(kind)
        if probe is None or "httpGet" not in probe:
            yield f"has no {kind} over HTTP"
            continue
        path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
        if path not in served_paths:
            yield f"{kind}: {path} is not served"
        number = resolve_port(pod, port)
        if number is None:
            yield f"{kind}: port {port} is not declared"
        elif path in served_paths and served_paths[path] != number:
            yield f"{kind}: {path} is served on port {served_paths[path]}, not on {number}"
        if kind == "readinessProbe" and path != "/readyz":
            yield f"{kind}: use /readyz, because it reports whether the service can work"
        if kind == "readinessProbe" and probe.get("timeoutSeconds", 1) <= CHECK_TIMEOUT_SEC:
            yield f"{kind}: /readyz may take {CHECK_TIMEOUT_SEC:g} s: set a longer timeoutSeconds"
        if kind != "readinessProbe" and path == "/readyz":
            yield f"{kind}: use /healthz, because a restart does not help when another server is down"


def _check_published_routes(manifests: Sequence[Manifest]) -> Iterator[str]:
    paths_by_service: dict[str, dict[str, int]] = {}
    for route in list_published_routes(manifests):
        if route.service not in paths_by_service:  # read once, because building an OpenAPI document is slow
            paths_by_service[route.service] = _map_paths_behind(manifests, route.service)
        served_paths = paths_by_service[route.service]
        ports = {port for path, port in served_paths.items() if route.is_match(path)}
        if served_paths and not ports:
            yield f"{route.title}: {route.service} serves no path for {route}"
        for port in resolve_backend_ports(manifests, route):
            if ports and port not in ports:
                yield f"{route.title}: {route.service} does not serve {route.path} on port {port}"


def _map_paths_behind(manifests: Sequence[Manifest], service_name: str) -> dict[str, int]:
    """Return the port of each path of the programs behind a Kubernetes Service."""
    service = find_manifest(manifests, "Service", service_name)
    if service is None:
        return {}
    served_paths: dict[str, int] = {}
    for pod in list_pod_templates(manifests):
        if is_selector_match({"matchLabels": service["spec"]["selector"]}, pod.labels):
            for container in pod.containers:
                program = programs.find_program(container)
                if program is not None:
                    settings, _ = load_settings(program, read_environment(manifests, container)[0])
                    served_paths |= programs.map_paths(program, settings) if settings is not None else {}
    return served_paths
