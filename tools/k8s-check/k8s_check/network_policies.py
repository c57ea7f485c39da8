"""NetworkPolicies: the allowed connections against those the code makes.

The settings determine the connections: a program with DATABASE_URL connects to PostgreSQL, and so on. The policies
must allow every such connection at both ends, and no other connection from or to a pod of this project.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from k8s_check import monitoring, programs
from k8s_check.manifests import (
    Manifest,
    PodTemplate,
    find_manifest,
    is_selector_match,
    list_pod_templates,
    select_kind,
)
from k8s_check.references import resolve_backend_ports, resolve_port

POSTGRES, RABBITMQ, CSP = "PostgreSQL", "RabbitMQ", "CSP"
INGRESS, MONITORING, DNS = "the ingress controller", "Prometheus", "DNS"
OTHER_NAMESPACE, PRIVATE_NETWORK = "a pod of another namespace", "an address of the private network"

SERVER_BY_SETTING = {
    "database_url": (POSTGRES, 5432),
    "amqp_url": (RABBITMQ, 5672),
    "csp_base_url": (CSP, 443),
}
"""Server and port by the setting with its address."""

_OUTSIDERS = {OTHER_NAMESPACE, PRIVATE_NETWORK, CSP, INGRESS, DNS}
_OPERATOR_NAMESPACES = {"cnpg-system", "rabbitmq-system", "keda"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a connection: a pod, or an address outside the cluster."""

    name: str
    labels: Mapping[str, str] | None = None
    """Labels, only for a pod."""
    namespace: str | None = None
    """Namespace of a pod, only if it is not the namespace of this project."""
    address: str | None = None
    """IP address, only for an endpoint outside the cluster."""


@dataclass(frozen=True, slots=True)
class Connection:
    source: str
    target: str
    port: int

    def __str__(self) -> str:
        return f"{self.source} to {self.target}, port {self.port}"


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    pods = [pod for pod in list_pod_templates(manifests) if _list_programs(pod)]
    endpoints = [
        *(Endpoint(pod.name, pod.labels) for pod in pods),
        *_list_servers(manifests),
        *_list_outside_endpoints(),
    ]
    needed = set(_list_needed_connections(manifests, pods))
    allowed = set(_list_allowed_connections(manifests, endpoints))
    names = {pod.name for pod in pods}
    for connection in sorted(needed - allowed, key=str):
        yield f"NetworkPolicy: {connection} is needed, but not allowed"
    for connection in sorted(allowed - needed, key=str):
        # Connections between servers, their operators and Prometheus are not defined by our code.
        to_server = connection.target in {POSTGRES, RABBITMQ} and connection.source in _OUTSIDERS
        if connection.source in names or connection.target in names or to_server:
            yield f"NetworkPolicy: {connection} is allowed, but the code does not need it"


def _list_programs(pod: PodTemplate) -> list[programs.Program]:
    """List the programs of this project in a pod. The module `containers` reports unknown ones."""
    result = []
    for container in pod.containers:
        try:
            program = programs.find_program(container)
        except ValueError:
            continue
        if program is not None:
            result.append(program)
    return result


def _list_servers(manifests: Sequence[Manifest]) -> Iterator[Endpoint]:
    """List the pods of PostgreSQL and RabbitMQ, with or without an operator."""
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "StatefulSet":
            server = {"postgres": POSTGRES, "rabbitmq": RABBITMQ}[name]
            yield Endpoint(server, manifest["spec"]["template"]["metadata"]["labels"])
        elif manifest["kind"] == "Cluster":
            yield Endpoint(POSTGRES, manifest["spec"]["inheritedMetadata"]["labels"])
        elif manifest["kind"] == "RabbitmqCluster":
            yield Endpoint(RABBITMQ, {"app.kubernetes.io/name": name})  # set by the operator


def _list_outside_endpoints() -> Iterator[Endpoint]:
    yield Endpoint(INGRESS, {}, namespace="ingress-nginx")
    yield Endpoint(MONITORING, {}, namespace="monitoring")
    yield Endpoint(DNS, {"k8s-app": "kube-dns"}, namespace="kube-system")
    yield Endpoint(OTHER_NAMESPACE, {}, namespace="default")
    yield Endpoint(CSP, address="203.0.113.10")  # any public address
    yield Endpoint(PRIVATE_NETWORK, address="10.96.0.1")
    for namespace in sorted(_OPERATOR_NAMESPACES):
        yield Endpoint(namespace, {}, namespace=namespace)


def _list_needed_connections(manifests: Sequence[Manifest], pods: Sequence[PodTemplate]) -> Iterator[Connection]:
    for pod in pods:
        yield Connection(pod.name, DNS, 53)
        for program in _list_programs(pod):
            for setting, (target, port) in SERVER_BY_SETTING.items():
                if setting in program.fields:
                    yield Connection(pod.name, target, port)
        if (metrics_port := resolve_port(pod, monitoring.PORT_NAME)) is not None:
            yield Connection(MONITORING, pod.name, metrics_port)
    for name, port in _list_ingress_backends(manifests, pods):
        yield Connection(INGRESS, name, port)


def _list_ingress_backends(manifests: Sequence[Manifest], pods: Sequence[PodTemplate]) -> Iterator[tuple[str, int]]:
    """Yield the name of every pod behind an Ingress, with each port that the Ingress forwards to."""
    backends = [
        path["backend"]["service"]
        for ingress in select_kind(manifests, "Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    for backend, pod in product(backends, pods):
        service = find_manifest(manifests, "Service", backend["name"])
        if service is not None and is_selector_match({"matchLabels": service["spec"]["selector"]}, pod.labels):
            for port in resolve_backend_ports(manifests, backend):
                yield pod.name, port


def _list_allowed_connections(manifests: Sequence[Manifest], endpoints: Sequence[Endpoint]) -> Iterator[Connection]:
    """Try every pair of endpoints on the ports in the manifests and on common ports."""
    policies = [policy["spec"] for policy in select_kind(manifests, "NetworkPolicy")]
    ports = {22, 53, 80, 443, 5432, 5672, 15672} | _list_policy_ports(policies) | _list_declared_ports(manifests)
    own_pods = {endpoint.name for endpoint in endpoints if _is_own_pod(endpoint)}
    for source, target, port in product(endpoints, endpoints, sorted(ports)):
        if source is target or (source.name not in own_pods and target.name not in own_pods):
            continue
        if _is_allowed(policies, "Egress", source, target, port) and _is_allowed(
            policies, "Ingress", target, source, port
        ):
            yield Connection(source.name, target.name, port)


def _is_own_pod(endpoint: Endpoint) -> bool:
    return endpoint.labels is not None and endpoint.namespace is None


def _list_declared_ports(manifests: Sequence[Manifest]) -> set[int]:
    return {
        port["containerPort"]
        for pod in list_pod_templates(manifests)
        for container in pod.containers
        for port in container.get("ports", [])
    }


def _list_policy_ports(policies: Sequence[Mapping[str, Any]]) -> set[int]:
    return {
        port["port"]
        for policy in policies
        for rule in [*policy.get("ingress", []), *policy.get("egress", [])]
        for port in rule.get("ports", [])
    }


def _is_allowed(
    policies: Sequence[Mapping[str, Any]], direction: str, pod: Endpoint, other: Endpoint, port: int
) -> bool:
    """Check one direction ("Egress" or "Ingress") at one end, `pod`, of a connection with `other`.

    Our policies do not apply to endpoints outside our namespace, so those allow everything.
    """
    if pod.labels is None or pod.namespace is not None:
        return True
    applicable = [
        policy
        for policy in policies
        if is_selector_match(policy["podSelector"], pod.labels) and direction in policy["policyTypes"]
    ]
    if not applicable:
        return True
    rules = [rule for policy in applicable for rule in policy.get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return any(
        (peers not in rule or any(_is_peer(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or any(_is_port_in(port, port_rule) for port_rule in rule["ports"]))
        for rule in rules
    )


def _is_peer(peer: Mapping[str, Any], endpoint: Endpoint) -> bool:
    if "ipBlock" in peer:
        if endpoint.address is None:
            return False
        address = ipaddress.ip_address(endpoint.address)
        excluded = (ipaddress.ip_network(block) for block in peer["ipBlock"].get("except", []))
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return inside and not any(address in block for block in excluded)
    if endpoint.labels is None:
        return False
    if "namespaceSelector" in peer:
        # The name of our namespace is unknown before the overlay is applied. No policy here selects it by name.
        labels = {"kubernetes.io/metadata.name": endpoint.namespace or "ours"}
        in_namespace = is_selector_match(peer["namespaceSelector"], labels)
    else:
        in_namespace = endpoint.namespace is None
    return in_namespace and is_selector_match(peer.get("podSelector"), endpoint.labels)


def _is_port_in(port: int, port_rule: Mapping[str, Any]) -> bool:
    return bool(port_rule["port"] <= port <= port_rule.get("endPort", port_rule["port"]))
