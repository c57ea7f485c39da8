"""What the allocator measures of its own work."""

from prometheus_client import REGISTRY

from allocator.main import create_app
from allocator.settings import Settings
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import ExpireLeases

from .allocator_harness import Pool, ask, until
from .bus_harness import Allocator, Client


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_commits_are_timed_by_the_kind_of_command(pool: Pool, running: Allocator, asking: Client) -> None:
    name = "broker_allocator_commit_seconds_count"
    before = sample(name, command="AllocateSandbox"), sample(name, command="ExpireLeases")
    await pool.fill(2)
    await asking.ask([ask("ann"), ask("bob")])
    await asking.ask([ExpireLeases(grace_sec=0, limit=1)], queue=topology.ALLOCATOR_MAINTENANCE)
    assert (sample(name, command="AllocateSandbox"), sample(name, command="ExpireLeases")) == (
        before[0] + 1,
        before[1] + 1,
    )


async def test_what_is_thrown_to_the_dead_letters_is_counted(running: Allocator, asking: Client) -> None:
    before = sample("broker_dead_lettered_total", queue=topology.ALLOCATOR_COMMANDS.name)
    await asking.publish(b"nonsense")
    await asking.ask(b'{"commands": [{"type": "Nonsense"}]}')
    await asking.dead_letters(2)
    assert sample("broker_dead_lettered_total", queue=topology.ALLOCATOR_COMMANDS.name) == before + 2


async def test_the_gauges_of_the_pool_come_without_an_active_lane(pool: Pool, clean_queues: str) -> None:
    """As in a replica that stands by."""
    await pool.fill(7)
    await pool.execute(
        "INSERT INTO outbox (type, occurred_at, data) VALUES ('sync.held', now() - interval '1 hour', '{}')"
    )
    # The relay, which would publish it, is kept out.
    await pool.value("SELECT pg_advisory_lock(5914033)")
    app = create_app(Settings(amqp_url=clean_queues, database_url=pool.url, _env_file=None))
    async with app.router.lifespan_context(app):

        async def counted() -> bool:
            return sample("broker_pool_available") == 7 and sample("broker_outbox_lag_seconds") >= 3600

        await until(counted)
    assert sample("broker_pool_exhaustion_seconds") == float("inf")
