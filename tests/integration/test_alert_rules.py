"""Alert rules: validated and tested by promtool, with existing metrics and sections of the runbook."""

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
    find_metrics,
    list_queries,
    read_alerts,
    read_expressions,
)
from tests.integration.stack import PORTS, Stack


@pytest.fixture
async def promtool(server_programs: None) -> str:
    try:
        return await prometheus.find_promtool(Terminal())
    except CannotRun as reason:
        pytest.fail(f"this test needs Prometheus: {reason}")


async def test_the_configuration_and_the_rules_are_valid(promtool: str) -> None:
    code, output = await run([promtool, "check", "config", ALERTS.with_name("prometheus.yml")])
    assert code == 0, output


async def test_each_alert_has_a_firing_and_a_quiet_test_case(promtool: str) -> None:
    code, output = await run([promtool, "test", "rules", ALERT_TESTS], timeout=170)
    assert code == 0, output
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    names = {alert["alert"] for alert in read_alerts()}
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == names
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == names


def test_each_alert_has_a_test_case_in_which_its_series_vanish() -> None:
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    vanishing = [test for test in tests if all("stale" in entry["values"] for entry in test["input_series"])]
    samples = [
        sample
        for test in vanishing
        for case in test.get("promql_expr_test", [])
        for sample in case.get("exp_samples", [])
    ]
    tested = {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
    names = {alert["alert"] for alert in read_alerts()}
    # The absence of series is the condition of the first two. A target that is removed from Prometheus is not down.
    assert names - tested == {"BrokerNotScraped", "BrokerInvariantsNotChecked", "BrokerInstanceDown"}


async def test_metrics_of_alerts_and_dashboards_are_exported(stack: Stack) -> None:
    exported: set[str] = set()
    for variable in PORTS.values():
        text = (await stack.client.get(f"http://127.0.0.1:{stack.environment[variable]}/metrics")).text
        exported |= set(re.findall(r"^# TYPE (broker_\w+) ", text, re.MULTILINE))
    used = {name for expression in read_expressions() for name in find_metrics(expression)}
    assert len(used) > 30
    assert used - exported == set()


def test_each_alert_links_to_its_section_of_the_runbook() -> None:
    sections = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in read_alerts()]
    for alert in read_alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_panels_named_in_the_runbook_exist() -> None:
    titles = {file.stem: {title for title, _ in list_queries(json.loads(file.read_text()))} for file in DASHBOARDS}
    page = " ".join(RUNBOOK.read_text().split())
    references = re.findall(r'[Dd]ashboard \*(\w+)\*, panels? ((?:"[^"]+"(?:, | and )?)+)', page)
    assert {dashboard.lower() for dashboard, _ in references} == titles.keys()
    for dashboard, quoted in references:
        assert set(re.findall(r'"([^"]+)"', quoted)) <= titles[dashboard.lower()]
