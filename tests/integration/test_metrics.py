"""Metrics of the running services: they match docs/metrics.md, and clients cannot add label values."""

import asyncio
import re
import uuid

import pytest

from allocator.background.invariant_check import RULES
from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from tests.integration.stack import ADMIN, ADMIN_TOKEN, PORTS, ROOT, Stack, track_headers

ROW = re.compile(r"^\| `(broker_[a-z_]+)` \| (\w+) \| (.*?) \| (.*?) \|", re.MULTILINE)
SERVICES = {
    "gateway": "gateway",
    "allocator": "allocator",
    "reaper": "reaper",
    "csp-syncer": "csp_syncer",
    "provisioner": "provisioner",
    "console": "console",
}


async def scrape(stack: Stack, service: str) -> str:
    port = stack.environment[PORTS[SERVICES[service]]]
    return (await stack.client.get(f"http://127.0.0.1:{port}/metrics")).text


def metric_names(scraped: str) -> set[str]:
    """Return the names as in docs/metrics.md: counters with _total, without the _created series."""
    typed = re.findall(r"^# TYPE (broker_[a-z_]+) (\w+)$", scraped, re.MULTILINE)
    return {name for name, _ in typed if not name.endswith("_created")}


def find_series(scraped: str) -> set[str]:
    """Return every metric with its labels."""
    return {line.rpartition(" ")[0] for line in scraped.splitlines() if line.startswith("broker_")}


async def test_each_service_exports_exactly_the_documented_metrics(stack: Stack) -> None:
    table = ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    for service in SERVICES:
        expected = {name for name, _, _, where in table if where == "all" or service in where.split(", ")}
        assert metric_names(await scrape(stack, service)) == expected


async def test_metrics_of_existing_dashboards_are_exported(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.allocate("ada")
    await stack.release(lease["sandbox_id"], "ada")
    await wait_until(stack.nothing_pending)
    exported = "".join([await scrape(stack, service) for service in SERVICES])
    for expected in (
        r'broker_allocate_total{outcome="allocated"}',
        r"broker_allocate_idempotent_hits_total",
        r"broker_allocation_latency_seconds_bucket",
        r'broker_deletion_marked_total{outcome="marked"}',
        r'broker_sync_total{outcome="completed"}',
        r"broker_cleanup_deleted_total",
        r"broker_cleanup_failed_total",
        r"broker_expiry_orphaned_total",
        *(
            f"broker_pool_{state}"
            for state in ("available", "allocated", "pending_deletion", "stale", "deletion_failed", "total")
        ),
        r'broker_request_latency_seconds_count{endpoint="/v1/allocate",method="POST",status="201"}',
    ):
        assert f"\n{expected}" in exported, expected


async def test_clients_cannot_add_label_values(stack: Stack) -> None:
    async def send_random_values(number: int) -> None:
        random_value = uuid.uuid4().hex
        student = {
            **track_headers(random_value),
            "X-Instruqt-Track-ID": random_value,
            "X-Sandbox-Name-Prefix": random_value,
        }
        for method, path, headers in (
            ("POST", "/v1/allocate", student),
            ("POST", "/v1/allocate", {**student, "Authorization": f"Bearer {random_value}"}),
            ("POST", f"/v1/sandboxes/{random_value}/mark-for-deletion", student),
            ("GET", f"/v1/sandboxes/{random_value}", student),
            ("GET", f"/v1/{random_value}", student),
            ("GET", f"/{random_value}", {}),
            (f"M{random_value}", "/v1/allocate", student),
            (f"M{random_value}", "/healthz", {}),
            (
                "GET",
                f"/v1/admin/sandboxes?holder={random_value}&track_name={random_value}&name_prefix={random_value}",
                ADMIN,
            ),
            ("GET", f"/v1/admin/sandboxes?cursor={random_value}", ADMIN),
            ("GET", f"/v1/admin/jobs/{random_value}", ADMIN),
            ("POST", f"/v1/admin/sandboxes/{random_value}/release?reason={random_value}", ADMIN),
            ("POST", f"/v1/admin/bulk-delete?status={random_value}", ADMIN),
        ):
            await stack.client.request(method, f"{stack.url}{path}", headers=headers)

    async def are_measured() -> bool:
        gateway, allocator = await scrape(stack, "gateway"), await scrape(stack, "allocator")
        return gateway.count("\nbroker_queue_consumers{") == len(topology.QUEUES) and allocator.count(
            "\nbroker_invariant_violations{"
        ) == len(RULES)

    await send_random_values(0)
    for service in SERVICES:
        await scrape(stack, service)  # the scrape itself adds a series
    await wait_until(are_measured)  # the first measurements of a restarted service add series
    before = {service: find_series(await scrape(stack, service)) for service in SERVICES}
    await asyncio.gather(*(send_random_values(number) for number in range(10)))
    changed: set[str] = set()

    async def has_same_series() -> bool:
        changed.clear()
        for service in ("gateway", "allocator", "csp-syncer"):
            changed.update(find_series(await scrape(stack, service)) ^ before[service])
        return not changed

    # Polls, because the gateway omits queues that it cannot measure for a moment. A new label would stay.
    try:
        await wait_until(has_same_series)
    except AssertionError:
        pytest.fail(f"other series than before: {sorted(changed)}")
    # The reaper may have added an outcome by its own work, so only client data is excluded here.
    assert not any(ADMIN_TOKEN in line for line in find_series(await scrape(stack, "reaper")))


async def test_queues_and_csp_requests_are_measured(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")
    await wait_until(stack.nothing_pending)

    async def is_measured() -> bool:
        gateway, reaper = await scrape(stack, "gateway"), await scrape(stack, "reaper")
        return all(
            expected in text
            for text, expected in (
                (gateway, 'broker_queue_consumers{queue="allocator.commands"} 1.0'),
                (gateway, 'broker_queue_depth{queue="broker.dead_letters"} '),
                (gateway, 'broker_queue_oldest_message_age_seconds{queue="reaper.events"} '),
                (reaper, 'broker_csp_request_seconds_count{operation="delete_account",outcome="ok"} '),
                (reaper, 'broker_queue_wait_seconds_count{queue="reaper.events"} '),
                (reaper, "broker_circuit_state 0.0"),
                (reaper, 'broker_rabbitmq_connected{connection="reaper-events"} 1.0'),
            )
        )

    await wait_until(is_measured)
