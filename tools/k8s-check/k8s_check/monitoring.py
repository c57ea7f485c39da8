"""Resources of the Prometheus operator: the alerts of deploy/prometheus, and one scrape job for every pod.

As a program, this module generates the PrometheusRule, because kustomize cannot embed one file in another.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

from k8s_check.manifests import (
    Manifest,
    OperatorPods,
    PodTemplate,
    find_manifest,
    is_selector_match,
    list_operator_pods,
    list_pod_templates,
    load_yaml,
    select_kind,
)

JOB, PORT_NAME = "sandbox-broker", "ops"

_HEAD = f"""\
# Generated from deploy/prometheus/alerts.yml by make docs.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {JOB}
spec:
"""


def build_prometheus_rule(alerts: str) -> str:
    """Return the manifest as YAML. `alerts` is the YAML text of a Prometheus rule file."""
    return _HEAD + indent(alerts, "  ")


def find_problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    rules = find_manifest(manifests, "PrometheusRule", JOB)
    if rules is None:
        return
    if [rules["spec"]] != load_yaml((deploy / "prometheus" / "alerts.yml").read_text()):
        yield f"PrometheusRule {JOB}: differs from deploy/prometheus/alerts.yml: run make docs"
    monitors = list(select_kind(manifests, "PodMonitor"))
    for pod in list_pod_templates(manifests):
        ports = {port.get("name") for container in pod.containers for port in container.get("ports", [])}
        if PORT_NAME in ports and not any(_is_scraped_by(pod, monitor) for monitor in monitors):
            yield f"{pod.title}: no PodMonitor scrapes it as job {JOB}"
    for pods in list_operator_pods(manifests):
        if not any(_is_server_scraped_by(pods, monitor) for monitor in monitors):
            yield f"{pods.title}: no PodMonitor scrapes its pods"


def _is_scraped_by(pod: PodTemplate, monitor: Manifest) -> bool:
    spec = monitor["spec"]
    return (
        is_selector_match(spec["selector"], pod.labels)
        and pod.labels.get(spec.get("jobLabel")) == JOB
        and any(endpoint["port"] == PORT_NAME for endpoint in spec["podMetricsEndpoints"])
    )


def _is_server_scraped_by(pods: OperatorPods, monitor: Manifest) -> bool:
    spec = monitor["spec"]
    return is_selector_match(spec["selector"], pods.labels) and spec.get("jobLabel") in pods.labels


if __name__ == "__main__":
    sys.stdout.write(build_prometheus_rule(sys.stdin.read()))
