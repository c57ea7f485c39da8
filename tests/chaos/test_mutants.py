"""Mutants on the running broker: the checker detects each in its round, and reports no violation without it."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from signal import SIGCONT
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import pytest

from devstack.conditions import wait_until
from devstack.temporary import truncate_tables
from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.contract import topology
from tests.chaos import checker
from tests.chaos.client import History, Students
from tests.chaos.evidence import Evidence
from tests.chaos.evidence_collector import collect_stack_evidence
from tests.chaos.mutants import ALLOCATE_TIMEOUT_SEC, ALLOCATORS, MUTANTS, MUTATED, Mutant, Trial
from tests.chaos.proxy import HOST, Proxy
from tests.chaos.stack import EVENTS_QUEUE, GRACE_SEC
from tests.integration.stack import Stack, run_stack

LAUNCHER = Path(__file__).with_name("mutating.py")
SANDBOXES = 20
IDLE_TIMEOUT_SEC = 20.0
SETTINGS = {
    "ALLOCATE_TIMEOUT_SEC": str(ALLOCATE_TIMEOUT_SEC),
    "AUTO_EXPIRY_INTERVAL_SEC": "60",
    "CLEANUP_INTERVAL_SEC": "1",
    "GRACE_PERIOD_MINUTES": str(GRACE_SEC / 60),
    "SYNC_INTERVAL_SEC": "3600",
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": "1",
    "CREATE_TIMEOUT_SEC": "1",
    "CREATE_SYNC_SEC": "0.5",
}
COUNT_PENDING_WORK = """
SELECT count(*) FROM (
    SELECT FROM sandboxes WHERE status = 'pending_deletion'
    UNION ALL SELECT FROM outbox
    UNION ALL SELECT FROM creations WHERE in_flight
) pending
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Broker:
    """Broker with one process per service and two allocators. Each round replaces the processes of MUTATED."""

    stack: Stack
    amqp_url: str
    links: dict[str, Proxy]
    stop_at: Path


@pytest.fixture(scope="module")
async def broker(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Broker]:
    async with AsyncExitStack() as resources:
        database_url = await resources.enter_async_context(new_database())
        amqp_url = await resources.enter_async_context(new_vhost())
        links = {
            f"{name} to {server}": await resources.enter_async_context(_create_link(url))
            for name in ALLOCATORS
            for server, url in (("PostgreSQL", database_url), ("RabbitMQ", amqp_url))
        }
        settings_of = {
            name: {
                "DATABASE_URL": _replace_address(links[f"{name} to PostgreSQL"], database_url),
                "AMQP_URL": _replace_address(links[f"{name} to RabbitMQ"], amqp_url),
            }
            for name in ALLOCATORS
        }
        stop_at = tmp_path_factory.mktemp("mutants") / "stop-at"
        stack = await resources.enter_async_context(
            run_stack(
                database_url,
                amqp_url,
                settings={**SETTINGS, "STOP_AT": str(stop_at)},
                settings_of=settings_of,
            )
        )
        async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
            queue = await channel.declare_queue(EVENTS_QUEUE, durable=True)
            await queue.bind(topology.EVENTS.name, "#")
        yield Broker(stack, amqp_url, links, stop_at)


def _create_link(url: str) -> Proxy:
    parts = urlsplit(url)
    return Proxy(parts.port or {"postgresql": 5432, "amqp": 5672}[parts.scheme], parts.hostname or HOST)


def _replace_address(link: Proxy, url: str) -> str:
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}{HOST}:{link.port}").geturl()


async def run_mutant(broker: Broker, mutant: Mutant, *bugs: str) -> Evidence:
    stack, history = broker.stack, History()
    await replace_services(broker, bugs)
    await stack.fill(SANDBOXES)
    async with Students([stack.url], history, random.Random(0)) as students:
        start = partial(start_service, broker, bugs)
        trial = Trial(stack, broker.links, start, broker.stop_at, students, history)
        try:
            await mutant.run_round(trial)
        finally:
            broker.stop_at.unlink(missing_ok=True)
            for name in ALLOCATORS:
                stack.processes[name].send(SIGCONT)
    with suppress(AssertionError):  # the evidence shows the remaining work
        await wait_until(lambda: is_idle(stack), within_sec=IDLE_TIMEOUT_SEC)
    evidence = await collect_stack_evidence(stack, broker.amqp_url, history, [], trial.recoveries)
    return dataclasses.replace(evidence, failover_periods=trial.failover_periods)


async def replace_services(broker: Broker, bugs: Sequence[str]) -> None:
    """Kill the processes of MUTATED, clear the command queue and the outbox, and start new ones with the bugs."""
    stack = broker.stack
    for name in MUTATED:
        if (process := stack.processes.pop(name, None)) is not None:
            process.kill()
            await process.wait()
    await stack.forget_allocators()
    await truncate_tables(stack.database, "TRUNCATE outbox")
    async with await aio_pika.connect(broker.amqp_url) as connection, connection.channel() as channel:
        for queue in (topology.ALLOCATOR_COMMANDS.name, EVENTS_QUEUE):
            await (await channel.get_queue(queue)).purge()
    await asyncio.gather(*(start_service(broker, bugs, name) for name in MUTATED))


async def start_service(broker: Broker, bugs: Sequence[str], name: str) -> None:
    module = MUTATED[name]
    await broker.stack.start_service(
        module,
        name=None if name == module else name,
        launcher=(str(LAUNCHER),),
        settings={"PLANTED": ",".join(bugs)},
    )


async def is_idle(stack: Stack) -> bool:
    return bool(await stack.database.fetchval(COUNT_PENDING_WORK) == 0)


@asynccontextmanager
async def without_index(database: asyncpg.Pool, name: str | None) -> AsyncIterator[None]:
    if name is None:
        yield
        return
    definition = await database.fetchval("SELECT pg_get_indexdef($1::text::regclass)", name)
    await database.execute(f"DROP INDEX {name}")
    try:
        yield
    finally:
        await truncate_tables(database, "TRUNCATE leases")  # remove rows that violate the index
        await database.execute(definition)


@pytest.mark.parametrize("name", MUTANTS)
async def test_round_without_the_mutant_has_no_violations(broker: Broker, name: str) -> None:
    mutant = MUTANTS[name]
    assert checker.check(await run_mutant(broker, mutant, *mutant.baseline_bugs)) == []


@pytest.mark.parametrize("name", MUTANTS)
async def test_mutant_is_detected(broker: Broker, name: str) -> None:
    mutant = MUTANTS[name]
    async with without_index(broker.stack.database, mutant.dropped_index):
        evidence = await run_mutant(broker, mutant, *mutant.baseline_bugs, *mutant.bugs)
    assert list(mutant.detected_by(evidence))
