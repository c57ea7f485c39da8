"""Which connections the NetworkPolicies let through, against those that the code makes.

Who talks to whom follows from the settings: a program that has DATABASE_URL talks to PostgreSQL, and so on. Every
connection of theirs must be let through at both its ends, and no other one that begins or ends at a pod of ours.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from k8s_check import monitoring, services
from k8s_check.manifests import Manifest, Pods, named, of_kind, pods, selects
from k8s_check.references import backend_ports, target_port

POSTGRES, RABBITMQ, CSP = "PostgreSQL", "RabbitMQ", "CSP"
INGRESS, MONITORING, DNS = "the ingress controller", "Prometheus", "DNS"
ELSEWHERE, PRIVATE = "a pod of another namespace", "an address of the private network"

TALKS_TO = {
    "database_url": (POSTGRES, 5432),
    "amqp_url": (RABBITMQ, 5672),
    "csp_base_url": (CSP, 443),
}
"""By the setting that says where it is."""

_STRANGERS = {ELSEWHERE, PRIVATE, CSP, INGRESS, DNS}
_OPERATORS = {"cnpg-system", "rabbitmq-system", "keda"}


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a connection."""

    name: str
    labels: Mapping[str, str] | None = None
    """None: it is no pod."""
    namespace: str | None = None
    """None: that of our pods."""
    address: str | None = None
    """Of what is no pod."""


@dataclass(frozen=True, slots=True)
class Flow:
    source: str
    target: str
    port: int

    def __str__(self) -> str:
        return f"{self.source} to {self.target}, port {self.port}"


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    ours = [pod for pod in pods(manifests) if _programs(pod)]
    parties = [*(Party(pod.name, pod.labels) for pod in ours), *_servers(manifests), *_outside()]
    wanted = set(_wanted(manifests, ours))
    open_flows = set(_open(manifests, parties))
    names = {pod.name for pod in ours}
    for flow in sorted(wanted - open_flows, key=str):
        yield f"NetworkPolicy: {flow} is needed, and is not let through"
    for flow in sorted(open_flows - wanted, key=str):
        # What servers, their operators and Prometheus do among themselves is theirs.
        to_server = flow.target in {POSTGRES, RABBITMQ} and flow.source in _STRANGERS
        if flow.source in names or flow.target in names or to_server:
            yield f"NetworkPolicy: {flow} is let through, and nothing in the code needs it"


def _programs(pod: Pods) -> list[services.Program]:
    """Of containers that run something of ours; what is wrong with the others the wiring tells."""
    found = []
    for container in pod.containers:
        try:
            program = services.of_container(container)
        except ValueError:
            continue
        if program is not None:
            found.append(program)
    return found


def _servers(manifests: Sequence[Manifest]) -> Iterator[Party]:
    """PostgreSQL and RabbitMQ, whoever runs them here."""
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "StatefulSet":
            party = {"postgres": POSTGRES, "rabbitmq": RABBITMQ}[name]
            yield Party(party, manifest["spec"]["template"]["metadata"]["labels"])
        elif manifest["kind"] == "Cluster":
            yield Party(POSTGRES, manifest["spec"]["inheritedMetadata"]["labels"])
        elif manifest["kind"] == "RabbitmqCluster":
            yield Party(RABBITMQ, {"app.kubernetes.io/name": name})  # the operator's label


def _outside() -> Iterator[Party]:
    yield Party(INGRESS, {}, namespace="ingress-nginx")
    yield Party(MONITORING, {}, namespace="monitoring")
    yield Party(DNS, {"k8s-app": "kube-dns"}, namespace="kube-system")
    yield Party(ELSEWHERE, {}, namespace="default")
    yield Party(CSP, address="203.0.113.10")  # an address of the internet
    yield Party(PRIVATE, address="10.96.0.1")
    for namespace in sorted(_OPERATORS):
        yield Party(namespace, {}, namespace=namespace)


def _wanted(manifests: Sequence[Manifest], ours: Sequence[Pods]) -> Iterator[Flow]:
    for pod in ours:
        yield Flow(pod.name, DNS, 53)
        for program in _programs(pod):
            for setting, (target, port) in TALKS_TO.items():
                if setting in program.fields:
                    yield Flow(pod.name, target, port)
        if (metrics := target_port(pod, monitoring.PORT)) is not None:
            yield Flow(MONITORING, pod.name, metrics)
    for name, served in _entrances(manifests, ours):
        yield Flow(INGRESS, name, served)


def _entrances(manifests: Sequence[Manifest], ours: Sequence[Pods]) -> Iterator[tuple[str, int]]:
    """The pods that an Ingress leads to, and the port of each that it leads to."""
    backends = [
        path["backend"]["service"]
        for ingress in of_kind(manifests, "Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    for backend, pod in product(backends, ours):
        service = named(manifests, "Service", backend["name"])
        if service is not None and selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
            for port in backend_ports(manifests, backend):
                yield pod.name, port


def _open(manifests: Sequence[Manifest], parties: Sequence[Party]) -> Iterator[Flow]:
    policies = [policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")]
    ports = {22, 53, 80, 443, 5432, 5672, 15672} | _named_ports(policies) | _declared_ports(manifests)
    for source, target, port in product(parties, parties, sorted(ports)):
        if source is target or (source.name not in _inside(parties) and target.name not in _inside(parties)):
            continue
        if _lets(policies, "Egress", source, target, port) and _lets(policies, "Ingress", target, source, port):
            yield Flow(source.name, target.name, port)


def _inside(parties: Sequence[Party]) -> set[str]:
    return {party.name for party in parties if party.labels is not None and party.namespace is None}


def _declared_ports(manifests: Sequence[Manifest]) -> set[int]:
    return {
        port["containerPort"]
        for pod in pods(manifests)
        for container in pod.containers
        for port in container.get("ports", [])
    }


def _named_ports(policies: Sequence[Mapping[str, Any]]) -> set[int]:
    return {
        port["port"]
        for policy in policies
        for rule in [*policy.get("ingress", []), *policy.get("egress", [])]
        for port in rule.get("ports", [])
    }


def _lets(policies: Sequence[Mapping[str, Any]], direction: str, pod: Party, other: Party, port: int) -> bool:
    """Whether the policies let `pod` have this connection with `other`. What is outside our namespace is free."""
    if pod.labels is None or pod.namespace is not None:
        return True
    judging = [
        policy
        for policy in policies
        if selects(policy["podSelector"], pod.labels) and direction in policy["policyTypes"]
    ]
    if not judging:
        return True
    rules = [rule for policy in judging for rule in policy.get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return any(
        (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or any(_covers(covered, port) for covered in rule["ports"]))
        for rule in rules
    )


def _is(peer: Mapping[str, Any], party: Party) -> bool:
    if "ipBlock" in peer:
        if party.address is None:
            return False
        address = ipaddress.ip_address(party.address)
        excluded = (ipaddress.ip_network(block) for block in peer["ipBlock"].get("except", []))
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return inside and not any(address in block for block in excluded)
    if party.labels is None:
        return False
    if "namespaceSelector" in peer:
        # Our own namespace has no name before it is applied; nothing here selects it by one.
        labels = {"kubernetes.io/metadata.name": party.namespace or "ours"}
        in_namespace = selects(peer["namespaceSelector"], labels)
    else:
        in_namespace = party.namespace is None
    return in_namespace and selects(peer.get("podSelector"), party.labels)


def _covers(covered: Mapping[str, Any], port: int) -> bool:
    return bool(covered["port"] <= port <= covered.get("endPort", covered["port"]))
