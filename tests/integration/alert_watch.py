"""Prometheus with the alerts of deploy/prometheus beside a running broker."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import prometheus
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.prometheus import Prometheus
from tests.integration.monitoring_files import ALERTS
from tests.integration.stack import PORTS, Stack

SCRAPE_INTERVAL_SEC = 1
"""Default interval of scraping and of rule evaluation."""
_MINUTES = re.compile(r"\b(\d+)m\b")


@asynccontextmanager
async def watch_alerts(
    stack: Stack,
    directory: Path,
    rules: str,
    *,
    scrape_interval_sec: float = SCRAPE_INTERVAL_SEC,
    evaluation_interval_sec: float = SCRAPE_INTERVAL_SEC,
) -> AsyncIterator[Prometheus]:
    """Run Prometheus with these rules on the services of the broker."""
    ports = {name: int(stack.environment[variable]) for name, variable in PORTS.items()}
    file = directory / "rules.yml"
    file.write_text(rules)
    try:
        async with prometheus.start_prometheus(
            ports,
            directory,
            free_port(),
            Terminal(),
            rules=file,
            scrape_interval_sec=scrape_interval_sec,
            evaluation_interval_sec=evaluation_interval_sec,
        ) as running:
            yield running
    except CannotRun as reason:
        pytest.fail(f"this test needs Prometheus: {reason}")


def read_rules_with_seconds() -> str:
    """Return the rules with seconds in place of the minutes of windows and waiting times: 60 times faster."""
    rules: dict[str, Any] = yaml.safe_load(ALERTS.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+)m\]", r"[\1s]", rule["expr"])
            if "for" in rule:
                rule["for"] = _MINUTES.sub(r"\1s", rule["for"])
    return yaml.safe_dump(rules)


async def read_fired_alerts(watch: Prometheus) -> tuple[set[str], int]:
    """Return the names of the alerts that fired in the last ten minutes, and the most that fired at once.

    Only alerts about CSP, the stock and logins count: a busy machine slows all services, and the forecast of the
    pool does not scale.
    """
    firing = 'ALERTS{alertstate="firing", alertname=~"Broker(Access|Creations|Csp|Deletions|Stock|Sync).+"}'
    fired = await watch.query(f"group by (alertname) (last_over_time({firing}[10m]))")
    (most,) = await watch.query(f"max_over_time(count({firing})[10m:{SCRAPE_INTERVAL_SEC}s])")
    return {sample["metric"]["alertname"] for sample in fired}, int(most["value"][1])
