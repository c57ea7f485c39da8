"""The alerts are sound: promtool takes and tests them, what they ask for exists, and each leads to its page."""

import json
import re

import pytest
import yaml

from devstack import prometheus
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import run
from tests.integration.monitoring_files import (
    ALERT_TESTS,
    ALERTS,
    DASHBOARDS,
    RUNBOOK,
    alerts,
    expressions,
    metrics,
    panels,
)
from tests.integration.stack import PORTS, Stack


@pytest.fixture
async def promtool() -> str:
    try:
        return await prometheus.find_promtool(Terminal())
    except CannotRun as reason:
        pytest.fail(f"this test needs Prometheus: {reason}")


async def test_prometheus_takes_the_configuration_and_the_rules(promtool: str) -> None:
    code, said = await run([promtool, "check", "config", ALERTS.with_name("prometheus.yml")])
    assert code == 0, said


async def test_each_alert_fires_when_it_should_and_only_then(promtool: str) -> None:
    code, said = await run([promtool, "test", "rules", ALERT_TESTS], timeout=170)
    assert code == 0, said
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    names = {alert["alert"] for alert in alerts()}
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == names
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == names


async def test_whatever_alerts_and_dashboards_ask_for_is_told_by_the_running_services(stack: Stack) -> None:
    told: set[str] = set()
    for variable in PORTS.values():
        text = (await stack.client.get(f"http://127.0.0.1:{stack.environment[variable]}/metrics")).text
        told |= set(re.findall(r"^# TYPE (broker_\w+) ", text, re.MULTILINE))
    asked = {name for expression in expressions() for name in metrics(expression)}
    assert len(asked) > 30
    assert asked - told == set()


def test_each_alert_leads_to_its_section_of_the_runbook() -> None:
    sections = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_the_runbook_names_panels_that_exist() -> None:
    titles = {file.stem: {title for title, _ in panels(json.loads(file.read_text()))} for file in DASHBOARDS}
    page = " ".join(RUNBOOK.read_text().split())
    references = re.findall(r'[Dd]ashboard \*(\w+)\*, panels? ((?:"[^"]+"(?:, | and )?)+)', page)
    assert {dashboard.lower() for dashboard, _ in references} == titles.keys()
    for dashboard, quoted in references:
        assert set(re.findall(r'"([^"]+)"', quoted)) <= titles[dashboard.lower()]
