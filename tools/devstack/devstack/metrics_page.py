"""`python -m devstack.metrics_page`: print docs/metrics.md, generated from the metrics of each service."""

import json
import subprocess
import sys
from typing import Any

MODULES = {
    "gateway": "gateway",
    "allocator": "allocator",
    "reaper": "reaper",
    "csp-syncer": "csp_syncer",
    "provisioner": "provisioner",
    "console": "console",
}
"""Service name -> module."""

_HEAD = """\
<!-- Made by `make docs` from the metrics that the services register. -->
# Metrics

`GET /metrics` of each service, for Prometheus: the gateway on `OPS_PORT` if that is set and else on its port, the
allocator on 9101, the reaper on 9102, the csp-syncer on 9103, the provisioner on 9104, the console on 9105. Each
also has the `process_…` and `python_…` metrics of the Prometheus client.

No label has a value that a client can make up: endpoints are routes, methods and queues are known ones, outcomes
are codes of [errors](errors.md) or states.

Every allocator counts the pool and every gateway looks at every queue, so that the figures are there when one of
them is not: take `max` over the instances. What a service counts or measures of its own work is summed.

| name | type | labels | service | meaning |
| --- | --- | --- | --- | --- |
"""

# Runs in a separate process for each service, because prometheus_client has one registry per process.
_LIST = """
import importlib, json, sys
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
importlib.import_module(sys.argv[1] + ".main")
collectors = list(REGISTRY._collector_to_names)
print(json.dumps([
    [m._name, m._type, m._labelnames, m._documentation]
    for m in collectors if isinstance(m, MetricWrapperBase) and m._name.startswith("broker_")
] + [
    [m.name, "gauge", [m.label], m.documentation] for m in collectors if type(m).__name__ == "GaugeWithTotal"
]))
"""


def render_page() -> str:
    metrics: dict[str, tuple[Any, list[str]]] = {}
    for service, module in MODULES.items():
        listed = subprocess.run([sys.executable, "-c", _LIST, module], check=True, capture_output=True, text=True)
        for metric in json.loads(listed.stdout):
            metrics.setdefault(metric[0], (metric, []))[1].append(service)
    return _HEAD + "".join(_row(*metrics[name]) for name in sorted(metrics))


def _row(metric: tuple[str, str, list[str], str], services: list[str]) -> str:
    name, kind, labels, meaning = metric
    shown = f"{name}_total" if kind == "counter" else name
    where = "all" if len(services) == len(MODULES) else ", ".join(services)
    return f"| `{shown}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {where} | {meaning} |\n"


if __name__ == "__main__":
    sys.stdout.write(render_page())
