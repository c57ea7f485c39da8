"""The checker catches every mutant within its round, on the running broker, and finds nothing in the same round
without it."""

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from signal import SIGCONT

import aio_pika
import asyncpg
import pytest

from sandbox_broker import topology
from tests.chaos import checker
from tests.chaos.collecting import collect
from tests.chaos.evidence import Evidence
from tests.chaos.mutants import ALLOCATORS, MUTANTS, Mutant, Trial
from tests.chaos.stack import EVENTS_QUEUE, Chaos, chaos
from tests.integration.stack import ROOT, eventually

LAUNCHER = ROOT / "tests" / "chaos" / "mutating.py"
SANDBOXES = 20
REST_SEC = 20.0
SETTINGS = {
    "LAB_DURATION_HOURS": "4",
    "SYNC_INTERVAL_SEC": "3600",
    "CLEANUP_INTERVAL_SEC": "1",
}
LEFT = """
SELECT count(*) FROM (
    SELECT FROM sandboxes WHERE status = 'pending_deletion' UNION ALL SELECT FROM outbox
) left_to_do
"""


@pytest.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chaos]:
    """Two of each service, with servers of their own."""
    async with chaos(tmp_path_factory.mktemp("mutants"), environment=SETTINGS) as broker:
        broker.stack.launcher = (str(LAUNCHER),)
        yield broker


async def run(broker: Chaos, mutant: Mutant, *bugs: str) -> Evidence:
    await replace_allocators(broker, bugs)
    trial = Trial(broker)
    try:
        await broker.stack.fill(SANDBOXES)
        await mutant.round(trial)
    finally:
        broker.crash_at.unlink(missing_ok=True)
        for name in ALLOCATORS:
            broker.process(name).send(SIGCONT)
        await trial.students.close()
    with suppress(AssertionError):  # then the evidence shows what is left
        await eventually(lambda: is_at_rest(broker), within_sec=REST_SEC)
    evidence = await collect(broker, trial.history, [], trial.recoveries)
    return dataclasses.replace(evidence, covered=trial.covered)


async def replace_allocators(broker: Chaos, bugs: tuple[str, ...]) -> None:
    """Kills both; who starts them again gives them the bugs. What the round before has left is thrown away."""
    broker.stack.environment["PLANTED"] = ",".join(bugs)
    killed = [broker.process(name) for name in ALLOCATORS]
    for process in killed:
        process.kill()
        await process.wait()
    connection = await aio_pika.connect(broker.rabbitmq.url)
    async with connection, connection.channel() as channel:
        for queue in (topology.ALLOCATOR_COMMANDS.name, topology.ALLOCATOR_MAINTENANCE.name, EVENTS_QUEUE):
            await (await channel.get_queue(queue)).purge()

    async def both_stand_by() -> bool:
        return all(
            any(topology.ALLOCATOR_COMMANDS.name in line for line in broker.process(name).tail)
            and broker.process(name) not in killed
            for name in ALLOCATORS
        )

    await eventually(both_stand_by)


async def is_at_rest(broker: Chaos) -> bool:
    return bool(await broker.stack.database.fetchval(LEFT) == 0)


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
        await database.execute("TRUNCATE leases")  # nothing of it may be left that the index forbids
        await database.execute(definition)


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_round_is_clean_without_the_mutant(broker: Chaos, name: str) -> None:
    mutant = MUTANTS[name]
    assert checker.check(await run(broker, mutant, *mutant.in_both)) == []


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_mutant_is_caught(broker: Chaos, name: str) -> None:
    mutant = MUTANTS[name]
    async with without_index(broker.stack.database, mutant.dropped_index):
        evidence = await run(broker, mutant, *mutant.in_both, *mutant.bugs)
    assert list(mutant.caught_by(evidence))
