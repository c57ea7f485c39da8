"""What the running services tell Prometheus is what docs/metrics.md says, and does not grow with what clients
send."""

import asyncio
import re
import uuid

from sandbox_broker import topology
from tests.integration.stack import ADMIN, ADMIN_TOKEN, PORTS, ROOT, Stack, eventually, track

ROW = re.compile(r"^\| `(broker_[a-z_]+)` \| (\w+) \| (.*?) \| (.*?) \|", re.MULTILINE)
SERVICES = {"gateway": "gateway", "allocator": "allocator", "reaper": "reaper", "csp-syncer": "csp_syncer"}


async def scrape(stack: Stack, service: str) -> str:
    port = stack.environment[PORTS[SERVICES[service]]]
    return (await stack.client.get(f"http://127.0.0.1:{port}/metrics")).text


def names(scraped: str) -> set[str]:
    """As the table has them. A counter's name ends in _total, and its creation time is a series of its own."""
    typed = re.findall(r"^# TYPE (broker_[a-z_]+) (\w+)$", scraped, re.MULTILINE)
    return {name for name, _ in typed if not name.endswith("_created")}


def series(scraped: str) -> set[str]:
    """Every combination of labels."""
    return {line.rpartition(" ")[0] for line in scraped.splitlines() if line.startswith("broker_")}


async def test_each_service_has_the_metrics_of_the_table_and_no_others(stack: Stack) -> None:
    table = ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    for service in SERVICES:
        expected = {name for name, _, _, where in table if where == "all" or service in where.split(", ")}
        assert names(await scrape(stack, service)) == expected


async def test_what_todays_dashboards_use_is_there(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.allocate("ada")
    await stack.release(lease["sandbox_id"], "ada")
    await eventually(stack.nothing_pending)
    everything = "".join([await scrape(stack, service) for service in SERVICES])
    for wanted in (
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
        assert f"\n{wanted}" in everything, wanted


async def test_no_client_can_make_up_a_label(stack: Stack) -> None:
    async def whatever_clients_send(number: int) -> None:
        made_up = uuid.uuid4().hex
        student = {**track(made_up), "X-Instruqt-Track-ID": made_up, "X-Sandbox-Name-Prefix": made_up}
        for method, path, headers in (
            ("POST", "/v1/allocate", student),
            ("POST", "/v1/allocate", {**student, "Authorization": f"Bearer {made_up}"}),
            ("POST", f"/v1/sandboxes/{made_up}/mark-for-deletion", student),
            ("GET", f"/v1/sandboxes/{made_up}", student),
            ("GET", f"/v1/{made_up}", student),
            ("GET", f"/{made_up}", {}),
            (f"M{made_up}", "/v1/allocate", student),
            (f"M{made_up}", "/healthz", {}),
            ("GET", f"/v1/admin/sandboxes?holder={made_up}&track_name={made_up}&name_prefix={made_up}", ADMIN),
            ("GET", f"/v1/admin/sandboxes?cursor={made_up}", ADMIN),
            ("GET", f"/v1/admin/jobs/{made_up}", ADMIN),
            ("POST", f"/v1/admin/sandboxes/{made_up}/release?reason={made_up}", ADMIN),
            ("POST", f"/v1/admin/bulk-delete?status={made_up}", ADMIN),
        ):
            await stack.client.request(method, f"{stack.url}{path}", headers=headers)

    async def queues_are_told() -> bool:
        return (await scrape(stack, "gateway")).count("\nbroker_queue_consumers{") == len(topology.QUEUES)

    await whatever_clients_send(0)
    for service in SERVICES:
        await scrape(stack, service)  # which is a request too
    await eventually(queues_are_told)
    before = {service: series(await scrape(stack, service)) for service in SERVICES}
    await asyncio.gather(*(whatever_clients_send(number) for number in range(10)))
    for service in ("gateway", "allocator", "csp-syncer"):

        async def as_before(service: str = service) -> bool:
            return series(await scrape(stack, service)) == before[service]

        # A queue that could not be looked at for a moment is not told of; a label that was made up stays.
        await eventually(as_before)
    # The reaper works by the clock, so it may have met a new outcome meanwhile; nothing a client has sent.
    assert not any(ADMIN_TOKEN in line for line in series(await scrape(stack, "reaper")))


async def test_queues_and_csp_are_told_of(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.release(lease["sandbox_id"], "ada")
    await eventually(stack.nothing_pending)

    async def told() -> bool:
        gateway, reaper = await scrape(stack, "gateway"), await scrape(stack, "reaper")
        return all(
            wanted in text
            for text, wanted in (
                (gateway, 'broker_queue_consumers{queue="allocator.commands"} 1.0'),
                (gateway, 'broker_queue_depth{queue="broker.dead_letters"} '),
                (gateway, 'broker_queue_oldest_message_age_seconds{queue="reaper.events"} '),
                (reaper, 'broker_csp_request_seconds_count{operation="delete_account",outcome="ok"} '),
                (reaper, 'broker_queue_wait_seconds_count{queue="reaper.events"} '),
                (reaper, "broker_circuit_state 0.0"),
                (reaper, 'broker_rabbitmq_connected{connection="reaper-events"} 1.0'),
            )
        )

    await eventually(told)
