"""Metrics of the allocator."""

import structlog
from prometheus_client import REGISTRY

from allocator.background.pool_metrics import PoolMetrics
from allocator.main import create_app
from allocator.settings import Settings
from devstack.conditions import wait_until
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import ExpireLeases
from sandbox_broker.database.connections import create_engine
from sandbox_broker.database.primary import Primary

from .allocator_harness import Pool, allocate_command
from .bus_harness import Allocator, Client


def read_sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_commit_duration_is_measured_per_command_type(pool: Pool, running: Allocator, client: Client) -> None:
    name = "broker_allocator_commit_seconds_count"
    before = read_sample(name, command="AllocateSandbox"), read_sample(name, command="ExpireLeases")
    await pool.fill(2)
    await client.request([allocate_command("ann"), allocate_command("bob")])
    await client.request([ExpireLeases(grace_sec=0, limit=1)], queue=topology.ALLOCATOR_MAINTENANCE)
    assert (read_sample(name, command="AllocateSandbox"), read_sample(name, command="ExpireLeases")) == (
        before[0] + 1,
        before[1] + 1,
    )


async def test_dead_lettered_messages_are_counted(running: Allocator, client: Client) -> None:
    before = read_sample("broker_dead_lettered_total", queue=topology.ALLOCATOR_COMMANDS.name)
    await client.publish(b"nonsense")
    await client.request(b'{"commands": [{"type": "Nonsense"}]}')
    await client.dead_letters(2)
    assert read_sample("broker_dead_lettered_total", queue=topology.ALLOCATOR_COMMANDS.name) == before + 2


async def test_a_standby_replica_exports_the_pool_gauges(pool: Pool, clean_queues: str) -> None:
    await pool.fill(7)
    await pool.execute(
        "INSERT INTO outbox (type, occurred_at, data) VALUES ('sync.held', now() - interval '1 hour', '{}')"
    )
    # Holds the lock of the relay, which would publish the event.
    await pool.value("SELECT pg_advisory_lock(5914033)")
    app = create_app(Settings(amqp_url=clean_queues, database_url=pool.url, _env_file=None))
    async with app.router.lifespan_context(app):

        async def are_exported() -> bool:
            return read_sample("broker_pool_available") == 7 and read_sample("broker_outbox_lag_seconds") >= 3600

        await wait_until(are_exported)
    assert read_sample("broker_pool_exhaustion_seconds") == float("inf")


async def test_a_refused_query_leaves_the_gauges_and_raises_no_error(pool: Pool) -> None:
    engine = create_engine(Primary(pool.url))
    await pool.execute("ALTER TABLE dead_letters RENAME TO hidden_letters")
    try:
        with structlog.testing.capture_logs() as logged:
            await PoolMetrics(engine)._update()
    finally:
        await pool.execute("ALTER TABLE hidden_letters RENAME TO dead_letters")
        await engine.dispose()
    assert [entry["event"] for entry in logged] == ["pool.not_counted"]
