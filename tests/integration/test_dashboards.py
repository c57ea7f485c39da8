"""Every query of the dashboards has an answer in a real Prometheus that watches the running services."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import yaml

from devstack import prometheus
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.prometheus import Prometheus
from tests.integration.monitoring_files import DASHBOARDS, panels
from tests.integration.stack import PORTS, ROOT, TRACK_TOKEN, Stack, eventually

pytestmark = pytest.mark.timeout(400)

GRAFANA = ROOT / "deploy" / "grafana"
WIDTH = 24
RATE_INTERVAL = "30s"
SCRAPED_SEC = 1


@pytest.fixture
async def watched(stack: Stack, tmp_path: Path) -> AsyncIterator[Prometheus]:
    ports = {name: int(stack.environment[variable]) for name, variable in PORTS.items()}
    rules = tmp_path / "rules.yml"
    always = {"alert": "BrokerTest", "expr": "vector(1)"}
    rules.write_text(json.dumps({"groups": [{"name": "test", "rules": [always]}]}))
    try:
        async with prometheus.start_prometheus(
            ports, tmp_path, free_port(), Terminal(), rules=rules, interval_sec=SCRAPED_SEC
        ) as running:
            yield running
    except CannotRun as reason:
        pytest.fail(f"this test needs Prometheus: {reason}")


async def live_a_little(stack: Stack, number: int) -> None:
    """Something of everything that the dashboards show."""
    lease = (await stack.allocate(f"ada-{number}")).json()
    await stack.allocate(f"ada-{number}")
    await stack.release(lease["sandbox_id"], f"ada-{number}")
    await stack.client.post(f"{stack.url}/v1/allocate", headers={"Authorization": f"Bearer not-{TRACK_TOKEN}"})
    await stack.sync()
    await publish(stack, "allocator.maintenance", b"no envelope")


async def publish(stack: Stack, queue: str, body: bytes) -> None:
    connection = await aio_pika.connect(stack.environment["AMQP_URL"])
    async with connection, connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(body), queue)


async def test_every_query_has_an_answer(stack: Stack, watched: Prometheus) -> None:
    await stack.fill(1000)  # one for each time
    number = 0
    unanswered = {
        (file.name, title, expression)
        for file in DASHBOARDS
        for title, expression in panels(json.loads(file.read_text()))
    }

    async def all_answered() -> bool:
        nonlocal number
        number += 1
        await live_a_little(stack, number)
        for file, title, expression in sorted(unanswered):
            if await watched.query(expression.replace("$__rate_interval", RATE_INTERVAL)):
                unanswered.remove((file, title, expression))
        return not unanswered

    try:
        await eventually(all_answered, every_sec=SCRAPED_SEC)
    except AssertionError:
        pytest.fail(f"no answer to {sorted(unanswered)}")


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_whole(file: Path) -> None:
    """What Grafana would refuse or show badly: there is none here to ask."""
    dashboard: dict[str, Any] = json.loads(file.read_text())
    assert dashboard["uid"] == f"broker-{file.stem}"
    for key in ("id", "title"):
        values = [panel[key] for panel in dashboard["panels"]]
        assert len(set(values)) == len(values)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < WIDTH
        assert not cells & taken
        taken |= cells
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["datasource"]["uid"] == source()["uid"]


def source() -> dict[str, Any]:
    [found] = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yml").read_text())["datasources"]
    return dict(found)


def test_what_compose_mounts_is_where_grafana_looks_for_it() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    [provider] = yaml.safe_load((GRAFANA / "dashboards" / "provider.yml").read_text())["providers"]
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/datasources"] == "/etc/grafana/provisioning/datasources"
    prometheus_mounts = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"])
    assert prometheus_mounts["./deploy/prometheus"] == "/etc/prometheus"
