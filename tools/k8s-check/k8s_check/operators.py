"""Oldest supported version of each operator, with the table of docs/deployment.md.

`python -m k8s_check.operators` prints the table.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k8s_check.manifests import Manifest

Resource = Mapping[str, Any]

_VERSION = re.compile(r"v?(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Operator:
    name: str
    minimum: tuple[int, int]
    reason: str
    """Reason for the minimum, for the table."""
    api_version: str
    kinds: tuple[str, ...]
    namespace: str
    image: str | None = None
    """Last part of the image name of its Deployment."""
    annotation: str | None = None
    """Annotation of its CustomResourceDefinitions that holds the version."""

    def __str__(self) -> str:
        return f"{self.name} {self.minimum[0]}.{self.minimum[1]}"


OPERATORS = (
    Operator(
        "CloudNativePG",
        (1, 28),
        "`failoverQuorum`: promotes only a standby with every confirmed lease",
        "postgresql.cnpg.io/v1",
        ("Cluster",),
        "cnpg-system",
        image="cloudnative-pg",
    ),
    Operator(
        "RabbitMQ Cluster Operator",
        (2, 17),
        "starts its pods under the restricted profile of Pod Security",
        "rabbitmq.com/v1beta1",
        ("RabbitmqCluster",),
        "rabbitmq-system",
        image="cluster-operator",
    ),
    Operator(
        "RabbitMQ Messaging Topology Operator",
        (1, 18),
        "released together with version 2.17 of the Cluster Operator",
        "rabbitmq.com/v1beta1",
        ("User", "Permission", "Policy"),
        "rabbitmq-system",
        image="messaging-topology-operator",
    ),
    Operator(
        "KEDA",
        (2, 18),
        "`fallback` for a trigger with `metricType: Value`",
        "keda.sh/v1alpha1",
        ("ScaledObject", "TriggerAuthentication"),
        "keda",
        image="keda",
    ),
    Operator(
        "Prometheus Operator",
        (0, 60),
        "oldest definitions that the manifests were validated against",
        "monitoring.coreos.com/v1",
        ("PodMonitor", "PrometheusRule"),
        "monitoring",
        image="prometheus-operator",
        annotation="operator.prometheus.io/version",
    ),
    Operator(
        "Gateway API",
        (1, 2),
        "`timeouts` of an HTTPRoute in the standard channel",
        "gateway.networking.k8s.io/v1",
        ("HTTPRoute",),
        "envoy-gateway-system",
        annotation="gateway.networking.k8s.io/bundle-version",
    ),
    Operator(
        "External Secrets Operator",
        (0, 16),
        "version v1 of its API",
        "external-secrets.io/v1",
        ("ExternalSecret",),
        "external-secrets",
        image="external-secrets",
    ),
)

API_VERSIONS = frozenset(operator.api_version for operator in OPERATORS)
"""API versions of custom resources. Kubernetes' own schemas lack them."""


def find_problems(manifests: Sequence[Manifest], resources: Sequence[Resource]) -> Iterator[str]:
    """Compare the versions of the operators that `manifests` use with the minimum.

    `resources` are CustomResourceDefinitions and Deployments of a cluster. Without any Deployment, an operator
    whose definitions carry no version is not checked.
    """
    has_deployments = any(resource["kind"] == "Deployment" for resource in resources)
    for operator in OPERATORS:
        if not any(_is_resource_of(operator, manifest) for manifest in manifests):
            continue
        versions = sorted(_list_versions(operator, resources))
        if not versions and has_deployments and operator.image is not None:
            yield f"{operator} is required, but no Deployment runs the image {operator.image}"
        for version in versions:
            if version < operator.minimum:
                yield f"{operator} is required, but the cluster has {version[0]}.{version[1]}"


def _is_resource_of(operator: Operator, manifest: Manifest) -> bool:
    return manifest["apiVersion"] == operator.api_version and manifest["kind"] in operator.kinds


def _list_versions(operator: Operator, resources: Sequence[Resource]) -> Iterator[tuple[int, int]]:
    for resource in resources:
        text = None
        if resource["kind"] == "CustomResourceDefinition" and operator.annotation is not None:
            if resource["spec"]["group"] == operator.api_version.partition("/")[0]:
                text = resource["metadata"].get("annotations", {}).get(operator.annotation)
        elif resource["kind"] == "Deployment" and operator.image is not None:
            for container in resource["spec"]["template"]["spec"]["containers"]:
                name, _, tag = container["image"].partition("@")[0].rpartition(":")
                if name.rpartition("/")[2] == operator.image:
                    text = tag
        if text is not None and (match := _VERSION.match(text)) is not None:
            yield int(match[1]), int(match[2])


def format_table() -> str:
    rows = [
        "| software | minimum | namespace | reason for the minimum |",
        "| --- | --- | --- | --- |",
        *(
            f"| {operator.name} | {operator.minimum[0]}.{operator.minimum[1]} | `{operator.namespace}` "
            f"| {operator.reason} |"
            for operator in OPERATORS
        ),
    ]
    return "\n".join(rows) + "\n"


def find_documentation_problems(page: Path) -> Iterator[str]:
    if format_table() not in page.read_text():
        yield f"{page.name}: its table of operators differs from `python -m k8s_check.operators`: replace it"


if __name__ == "__main__":
    sys.stdout.write(format_table())
