"""Monitoring files: alerts of deploy/prometheus, dashboards of deploy/grafana, docs/runbook.md."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.integration.stack import ROOT

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
ALERT_TESTS = ROOT / "deploy" / "prometheus" / "alerts.test.yml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
RUNBOOK = ROOT / "docs" / "runbook.md"


def read_alerts() -> list[dict[str, Any]]:
    return [rule for rule in _read_rules() if "alert" in rule]


def _read_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def list_queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the panel title and the expression of every query."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def read_expressions() -> list[str]:
    """Return the expressions of all alerts, recorded values and dashboards."""
    dashboard_queries = [query for file in DASHBOARDS for _, query in list_queries(json.loads(file.read_text()))]
    return [rule["expr"] for rule in _read_rules()] + dashboard_queries


def find_metrics(expression: str) -> set[str]:
    """Return the broker's metrics in an expression. A histogram's series are reduced to its name."""
    names = re.findall(r"\bbroker_[a-z_]+", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
