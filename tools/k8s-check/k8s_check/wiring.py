"""What a container gets and offers, against what its program reads and serves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from k8s_check import exposure, services
from k8s_check.manifests import Manifest, Pods, named, of_kind, pods, selects, title
from k8s_check.references import backend_ports, target_port
from k8s_check.services import Program
from sandbox_broker.observability.health import CHECK_TIMEOUT_SEC

STOP_SEC = 30
"""A service that is told to stop has ended by then."""

_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.containers:
            found = _container(manifests, pod, container)
            yield from (f"{pod.title}, container {container['name']}: {problem}" for problem in found)
    yield from _ingresses(manifests)


def _container(manifests: Sequence[Manifest], pod: Pods, container: Mapping[str, Any]) -> Iterator[str]:
    try:
        program = services.of_container(container)
    except ValueError as error:
        yield str(error)
        return
    if program is None:
        return
    variables, missing = environment(manifests, container)
    yield from missing
    yield from _variables(program, variables)
    settings, wrong = settle(program, variables)
    yield from wrong
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    if program.create_app is not None and grace <= STOP_SEC:
        yield f"has {grace} s to stop, and may need {STOP_SEC}: set terminationGracePeriodSeconds"
    if settings is not None:
        yield from _ports(program, settings, container)
        if program.create_app is not None:
            yield from _probes(program, settings, pod, container)


def environment(
    manifests: Sequence[Manifest], container: Mapping[str, Any]
) -> tuple[dict[str, str | None], list[str]]:
    """The variables, None for one whose value only the cluster knows; and which ConfigMaps there are not."""
    variables: dict[str, str | None] = {}
    missing: list[str] = []
    for source in container.get("envFrom", []):
        if "configMapRef" not in source:
            missing.append(f"envFrom {', '.join(source)}: name each variable that comes from a secret")
        elif (found := named(manifests, "ConfigMap", source["configMapRef"]["name"])) is None:
            missing.append(f"there is no ConfigMap {source['configMapRef']['name']}")
        else:
            variables.update(found.get("data", {}))
    for entry in container.get("env", []):
        variables[entry["name"]] = entry.get("value")
    return variables, missing


def _variables(program: Program, variables: Mapping[str, str | None]) -> Iterator[str]:
    for name in sorted(set(variables) - {field.upper() for field in program.fields}):
        yield f"{name} is no setting of this program"
    for field in sorted(program.required):
        if field.upper() not in variables:
            yield f"{field.upper()} is required, and is not set"
    for field in sorted(services.SECRETS & program.fields):
        if variables.get(field.upper()) is not None:
            yield f"{field.upper()} must come from a secret"


def settle(program: Program, variables: Mapping[str, str | None]) -> tuple[BaseSettings | None, list[str]]:
    """The settings as the program would read them, or None and what is wrong with them."""
    values = {
        name.lower(): services.STAND_INS.get(name.lower(), "stand-in") if value is None else value
        for name, value in variables.items()
    }
    stand_ins: dict[str, Any] = {field: services.STAND_INS.get(field, "stand-in") for field in program.required}
    try:
        return program.settings(_env_file=None, **(stand_ins | values)), []
    except ValidationError as error:
        return None, [f"{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()]


def _ports(program: Program, settings: BaseSettings, container: Mapping[str, Any]) -> Iterator[str]:
    served = services.ports(program, settings)
    declared = {port["containerPort"] for port in container.get("ports", [])}
    for port in sorted(declared - set(served)):
        yield f"port {port} is not served; served: {', '.join(map(str, served)) or 'none'}"
    for port in served:
        if port not in declared:
            yield f"port {port} is served and not declared"


def _probes(program: Program, settings: BaseSettings, pod: Pods, container: Mapping[str, Any]) -> Iterator[str]:
    served = services.paths(program, settings)
    for kind in _PROBES:
        probe = container.get(kind)
        if probe is None or "httpGet" not in probe:
            yield f"has no {kind} over HTTP"
            continue
        path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
        if path not in served:
            yield f"{kind}: {path} is not served"
        number = target_port(pod, port)
        if number is None:
            yield f"{kind}: port {port} is not declared"
        elif path in served and served[path] != number:
            yield f"{kind}: {path} is served on port {served[path]}, not on {number}"
        if kind == "readinessProbe" and path != "/readyz":
            yield f"{kind}: /readyz is what says whether it can work"
        if kind == "readinessProbe" and probe.get("timeoutSeconds", 1) <= CHECK_TIMEOUT_SEC:
            yield f"{kind}: /readyz takes up to {CHECK_TIMEOUT_SEC:g} s to say what does not answer"
        if kind != "readinessProbe" and path == "/readyz":
            yield f"{kind}: a restart mends nothing when another server is away; use /healthz"


def _ingresses(manifests: Sequence[Manifest]) -> Iterator[str]:
    served_by: dict[str, dict[str, int]] = {}
    for ingress in of_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                name = backend["name"]
                if name not in served_by:  # the OpenAPI document takes long
                    served_by[name] = _served_by(manifests, name)
                served = served_by[name]
                matched = {port for route, port in served.items() if exposure.covers(path, route)}
                if served and not matched:
                    yield f"{title(ingress)}: {path['path']} ({path['pathType']}) is not served by {name}"
                for port in backend_ports(manifests, backend):
                    if matched and port not in matched:
                        yield f"{title(ingress)}: {path['path']} is not served on port {port} of {name}"


def _served_by(manifests: Sequence[Manifest], service_name: str) -> dict[str, int]:
    service = named(manifests, "Service", service_name)
    if service is None:
        return {}
    served: dict[str, int] = {}
    for pod in pods(manifests):
        if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
            for container in pod.containers:
                program = services.of_container(container)
                if program is not None:
                    settings, _ = settle(program, environment(manifests, container)[0])
                    served |= services.routes(program, settings) if settings is not None else {}
    return served
