"""NetworkPolicies: the allowed connections against those the code makes.

The settings determine the connections: a program with DATABASE_URL connects to PostgreSQL, and so on. The policies
must allow every such connection at both ends, and no other connection from or to a pod of this project.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from urllib.parse import urlsplit

from k8s_check import monitoring, programs
from k8s_check.manifests import (
    Manifest,
    PodTemplate,
    find_manifest,
    is_selector_match,
    list_operator_pods,
    list_pod_templates,
    select_kind,
)
from k8s_check.published_routes import list_published_routes
from k8s_check.references import resolve_backend_ports, resolve_port

POSTGRES, RABBITMQ, PROXY = "PostgreSQL", "RabbitMQ", "the forward proxy"
INGRESS, GATEWAY_API, MONITORING = "the ingress controller", "the proxy of the Gateway API", "Prometheus"
OTHER_NAMESPACE = "a pod of another namespace"

_CSP = {
    "CSP": "203.0.113.10",
    "CSP over IPv6": "2001:db8::10",
    "CSP over NAT64": "64:ff9b::203.0.113.10",
}
"""Addresses like those of CSP, by name. CSP is anywhere on the internet."""

_PRIVATE = {
    "an address of the private network": "10.96.0.1",
    "a private IPv6 address": "fd00::1",
    "the metadata service of the cloud": "169.254.169.254",
}

_DNS_PORTS = {"DNS": 53, "NodeLocal DNSCache": 53, "NodeLocal DNSCache as a pod": 53, "DNS of OpenShift": 5353}

_AMQP_PORT, _AMQPS_PORT = 5672, 5671
_MANAGEMENT_PORT, _MANAGEMENT_TLS_PORT = 15672, 15671
_METRICS_PORTS = {"prometheus": 15692, "prometheus-tls": 15691, "metrics": 9187}
"""Ports of the servers, by the name that a PodMonitor selects."""

_OUTSIDERS = {OTHER_NAMESPACE, INGRESS, GATEWAY_API, *_CSP, *_PRIVATE, *_DNS_PORTS}


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
        *_list_outside_endpoints(manifests),
    ]
    needed = set(_list_needed_connections(manifests, pods))
    needed |= set(_list_needed_server_connections(manifests))
    allowed = set(_list_allowed_connections(manifests, endpoints))
    names = {pod.name for pod in pods}
    for connection in sorted(needed - allowed, key=str):
        yield f"NetworkPolicy: {connection} is needed, but not allowed"
    for connection in sorted(allowed - needed, key=str):
        if (
            connection.target == RABBITMQ
            and connection.port in (_AMQP_PORT, _AMQPS_PORT)
            and (Connection(connection.source, RABBITMQ, _find_amqp_port(manifests)) in needed)
        ):
            continue  # RabbitMQ listens on one of both, so the policies allow both
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
    for manifest in select_kind(manifests, "StatefulSet"):
        server = {"postgres": POSTGRES, "rabbitmq": RABBITMQ}[manifest["metadata"]["name"]]
        yield Endpoint(server, manifest["spec"]["template"]["metadata"]["labels"])
    for pods in list_operator_pods(manifests):
        yield Endpoint(RABBITMQ if pods.title.startswith("RabbitmqCluster") else POSTGRES, pods.labels)


def _list_outside_endpoints(manifests: Sequence[Manifest]) -> Iterator[Endpoint]:
    yield Endpoint(INGRESS, {}, namespace="ingress-nginx")
    yield Endpoint(GATEWAY_API, {}, namespace="envoy-gateway-system")
    yield Endpoint(MONITORING, {}, namespace="monitoring")
    yield Endpoint("DNS", {"k8s-app": "kube-dns"}, namespace="kube-system")
    yield Endpoint("NodeLocal DNSCache", address="169.254.20.10")
    yield Endpoint("NodeLocal DNSCache as a pod", {"k8s-app": "node-local-dns"}, namespace="kube-system")
    openshift = {"dns.operator.openshift.io/daemonset-dns": "default"}
    yield Endpoint("DNS of OpenShift", openshift, namespace="openshift-dns")
    yield Endpoint(OTHER_NAMESPACE, {}, namespace="default")
    for name, address in (_CSP | _PRIVATE).items():
        yield Endpoint(name, address=address)
    for host in {host for pod in list_pod_templates(manifests) for host, _ in _list_proxies(manifests, pod)}:
        yield Endpoint(PROXY, address=host)
    for namespace in ("cnpg-system", "rabbitmq-system", "keda"):
        yield Endpoint(namespace, {}, namespace=namespace)


def _list_proxies(manifests: Sequence[Manifest], pod: PodTemplate) -> Iterator[tuple[str, int]]:
    """Yield address and port of the forward proxy of each container that has one."""
    for container in pod.containers:
        for source in container.get("envFrom", []):
            config_map = find_manifest(manifests, "ConfigMap", source.get("configMapRef", {}).get("name", ""))
            if config_map is not None and (proxy := config_map.get("data", {}).get("HTTPS_PROXY")):
                parts = urlsplit(proxy)
                yield parts.hostname or "", parts.port or 80


def _find_amqp_port(manifests: Sequence[Manifest]) -> int:
    return _AMQPS_PORT if _is_tls_only(manifests) else _AMQP_PORT


def _is_tls_only(manifests: Sequence[Manifest]) -> bool:
    return any(
        cluster["spec"].get("tls", {}).get("disableNonTLSListeners")
        for cluster in select_kind(manifests, "RabbitmqCluster")
    )


def _list_needed_connections(manifests: Sequence[Manifest], pods: Sequence[PodTemplate]) -> Iterator[Connection]:
    for pod in pods:
        for name, port in _DNS_PORTS.items():
            yield Connection(pod.name, name, port)
        proxies = list(_list_proxies(manifests, pod))
        for program in _list_programs(pod):
            if "database_url" in program.fields:
                yield Connection(pod.name, POSTGRES, 5432)
            if "amqp_url" in program.fields:
                yield Connection(pod.name, RABBITMQ, _find_amqp_port(manifests))
            if "broker_api_url" in program.fields:
                yield Connection(pod.name, "gateway", 8080)
            if "csp_base_url" in program.fields:
                yield from (Connection(pod.name, PROXY, port) for _, port in proxies)
                yield from (Connection(pod.name, name, 443) for name in _CSP if not proxies)
        if (metrics_port := resolve_port(pod, monitoring.PORT_NAME)) is not None:
            yield Connection(MONITORING, pod.name, metrics_port)
    for route in list_published_routes(manifests):
        service = find_manifest(manifests, "Service", route.service)
        selector = {"matchLabels": service["spec"]["selector"]} if service is not None else None
        source = INGRESS if route.title.startswith("Ingress") else GATEWAY_API
        for pod in pods:
            if selector is not None and is_selector_match(selector, pod.labels):
                for port in resolve_backend_ports(manifests, route):
                    yield Connection(source, pod.name, port)


def _list_needed_server_connections(manifests: Sequence[Manifest]) -> Iterator[Connection]:
    """Yield the connections of the operators' servers: metrics, and the management API of RabbitMQ."""
    if any(select_kind(manifests, "RabbitmqCluster")):
        port = _MANAGEMENT_TLS_PORT if _is_tls_only(manifests) else _MANAGEMENT_PORT
        yield Connection("rabbitmq-system", RABBITMQ, port)
    if not list_operator_pods(manifests):
        return
    for server in _list_servers(manifests):
        for monitor in select_kind(manifests, "PodMonitor"):
            if server.labels is not None and is_selector_match(monitor["spec"]["selector"], server.labels):
                for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                    yield Connection(MONITORING, server.name, _METRICS_PORTS[endpoint["port"]])


def _list_allowed_connections(manifests: Sequence[Manifest], endpoints: Sequence[Endpoint]) -> Iterator[Connection]:
    """Try every pair of endpoints on the ports in the manifests and on common ports."""
    policies = [policy["spec"] for policy in select_kind(manifests, "NetworkPolicy")]
    ports = {22, 53, 80, 443, 5432, 5672, 15672} | _list_policy_ports(policies) | _list_declared_ports(manifests)
    own_pods = {endpoint.name for endpoint in endpoints if _is_own_pod(endpoint)}
    for source, target in product(endpoints, endpoints):
        if source is target or (source.name not in own_pods and target.name not in own_pods):
            continue
        sent = _allowed_ports(policies, "Egress", source, target, ports)
        received = _allowed_ports(policies, "Ingress", target, source, ports)
        for port in sorted(sent & received):
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


def _allowed_ports(
    policies: Sequence[Mapping[str, Any]], direction: str, pod: Endpoint, other: Endpoint, ports: set[int]
) -> set[int]:
    """Return those of `ports` that are allowed in one direction ("Egress" or "Ingress") at one end, `pod`, of a
    connection with `other`.

    Our policies do not apply to endpoints outside our namespace, so those allow everything.
    """
    if pod.labels is None or pod.namespace is not None:
        return ports
    applicable = [
        policy
        for policy in policies
        if is_selector_match(policy["podSelector"], pod.labels) and direction in policy["policyTypes"]
    ]
    if not applicable:
        return ports
    rules = [rule for policy in applicable for rule in policy.get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return {
        port
        for rule in rules
        if peers not in rule or any(_is_peer(peer, other) for peer in rule[peers])
        for port in ports
        if "ports" not in rule or any(_is_port_in(port, port_rule) for port_rule in rule["ports"])
    }


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
