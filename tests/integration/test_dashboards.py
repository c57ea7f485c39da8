"""Dashboards: every query returns data from a real Prometheus that scrapes the running services."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import yaml

from devstack.conditions import wait_until
from devstack.prometheus import Prometheus
from tests.integration.alert_watch import SCRAPE_INTERVAL_SEC, watch_alerts
from tests.integration.monitoring_files import DASHBOARDS, list_queries
from tests.integration.stack import ADMIN, ROOT, TRACK_TOKEN, Stack, track_headers

pytestmark = pytest.mark.timeout(400)

GRAFANA = ROOT / "deploy" / "grafana"
WIDTH = 24
RATE_INTERVAL = "30s"


@pytest.fixture
async def scraping_prometheus(stack: Stack, tmp_path: Path) -> AsyncIterator[Prometheus]:
    firing_rule = {"alert": "BrokerTest", "expr": "vector(1)"}
    rules = json.dumps({"groups": [{"name": "test", "rules": [firing_rule]}]})
    async with watch_alerts(stack, tmp_path, rules) as running:
        yield running


async def cause_activity(stack: Stack, attempt: int) -> None:
    """Cause events for every panel of the dashboards."""
    lease = (await stack.allocate(f"ada-{attempt}")).json()
    await stack.allocate(f"ada-{attempt}")
    url = f"{stack.url}/v1/sandboxes/{lease['sandbox_id']}/extend"
    await stack.client.post(url, headers=track_headers(f"ada-{attempt}"), json={"hours": 1})
    await stack.release(lease["sandbox_id"], f"ada-{attempt}")
    await stack.client.post(f"{stack.url}/v1/allocate", headers={"Authorization": f"Bearer not-{TRACK_TOKEN}"})
    await stack.sync()
    await publish(stack, "allocator.maintenance", b"no envelope")


async def publish(stack: Stack, queue: str, body: bytes) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(body), queue)


async def test_every_query_returns_data(stack: Stack, scraping_prometheus: Prometheus) -> None:
    await stack.fill(1000)  # one for each repetition
    rule = {"name_prefix": "sandbox-", "min": 1, "max": 2}
    policy = {"name": "stock", "match": {"name_prefix": "sandbox-"}, "stock": rule}
    await stack.client.put(f"{stack.url}/v1/admin/policies", headers=ADMIN, json={"policies": [policy]})
    attempt = 0
    without_data = {
        (file.name, title, expression)
        for file in DASHBOARDS
        for title, expression in list_queries(json.loads(file.read_text()))
    }

    async def have_all_returned_data() -> bool:
        nonlocal attempt
        attempt += 1
        await cause_activity(stack, attempt)
        for file, title, expression in sorted(without_data):
            if await scraping_prometheus.query(expression.replace("$__rate_interval", RATE_INTERVAL)):
                without_data.remove((file, title, expression))
        return not without_data

    try:
        await wait_until(have_all_returned_data, every_sec=SCRAPE_INTERVAL_SEC)
    except AssertionError:
        pytest.fail(f"no data for {sorted(without_data)}")


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_valid(file: Path) -> None:
    """Check rules of Grafana, because the tests run without Grafana."""
    dashboard: dict[str, Any] = json.loads(file.read_text())
    assert dashboard["uid"] == f"broker-{file.stem}"
    for key in ("id", "title"):
        values = [panel[key] for panel in dashboard["panels"]]
        assert len(set(values)) == len(values)
    occupied: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert max(x for x, _ in cells) < WIDTH
        assert not cells & occupied
        occupied |= cells
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["datasource"]["uid"] == read_data_source()["uid"]


def read_data_source() -> dict[str, Any]:
    [source] = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yml").read_text())["datasources"]
    return dict(source)


def test_compose_mounts_the_dashboards_at_the_path_read_by_grafana() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    [provider] = yaml.safe_load((GRAFANA / "dashboards" / "provider.yml").read_text())["providers"]
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/datasources"] == "/etc/grafana/provisioning/datasources"
    prometheus_mounts = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"])
    assert prometheus_mounts["./deploy/prometheus"] == "/etc/prometheus"
