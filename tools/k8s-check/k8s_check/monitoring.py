"""What the Prometheus operator is told: the alerts of deploy/prometheus, and to read every pod under the right job.

As a program this makes the PrometheusRule, since kustomize cannot put one file into another.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

import yaml

from k8s_check.manifests import Manifest, Pods, named, of_kind, pods, selects

JOB, PORT = "sandbox-broker", "ops"

_HEAD = f"""\
# Made from deploy/prometheus/alerts.yml by make docs.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {JOB}
spec:
"""


def rule(alerts: str) -> str:
    return _HEAD + indent(alerts, "  ")


def problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    rules = named(manifests, "PrometheusRule", JOB)
    if rules is None:
        return
    if rules["spec"] != yaml.safe_load((deploy / "prometheus" / "alerts.yml").read_text()):
        yield f"PrometheusRule {JOB}: deploy/prometheus/alerts.yml has other alerts: run make docs"
    monitors = list(of_kind(manifests, "PodMonitor"))
    for pod in pods(manifests):
        ports = {port.get("name") for container in pod.containers for port in container.get("ports", [])}
        if PORT in ports and not any(_reads(monitor, pod) for monitor in monitors):
            yield f"{pod.title}: no PodMonitor reads its metrics as job {JOB}"


def _reads(monitor: Manifest, pod: Pods) -> bool:
    spec = monitor["spec"]
    return (
        selects(spec["selector"], pod.labels)
        and pod.labels.get(spec.get("jobLabel")) == JOB
        and any(endpoint["port"] == PORT for endpoint in spec["podMetricsEndpoints"])
    )


if __name__ == "__main__":
    sys.stdout.write(rule(sys.stdin.read()))
