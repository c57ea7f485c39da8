"""What contradicts a rule of the pool is seen and named, however it has come about; a pool that keeps its rules is
never suspected."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from allocator import invariants, metrics, outbox
from allocator.handlers import deletions, leases
from allocator.lanes import MAINTENANCE
from allocator.writer import Writer
from devstack.ports import free_port
from devstack.processes import spawn
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import ClaimDeletions, ExpireLeases, RecordDeletion
from sandbox_broker.contract.replies import DeletionsClaimed

from .allocator_harness import RUN, Pool, account, allocate, ask, done, granted, release, sync, until
from .bus_harness import client

Found = dict[str, list[str]]


async def found(pool: Pool) -> Found:
    """The ids that each violated rule names."""
    connection = await asyncpg.connect(pool.url)
    try:
        await connection.execute(invariants.SETTINGS)
        rows = await invariants.violations(connection)
        assert all(row["number"] >= len(row["ids"]) > 0 for row in rows)
        return {row["rule"]: row["ids"] for row in rows}
    finally:
        await connection.close()


async def second_lease_of_a_sandbox(pool: Pool) -> Found:
    sandbox_id = await pool.lease("ann")
    await pool.execute("DROP INDEX leases_one_per_sandbox")
    await pool.execute("INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ($1, 'bob', now())", sandbox_id)
    return {
        "one_lease_per_sandbox": [sandbox_id],
        "unique_indexes_are_there": ["leases_one_per_sandbox"],
    }


async def second_lease_of_a_holder(pool: Pool) -> Found:
    await pool.lease("ann")
    await pool.lease("bob")
    await pool.execute("DROP INDEX leases_one_per_holder")
    await pool.execute("UPDATE leases SET holder = 'ann'")
    return {"one_lease_per_holder": ["ann"], "unique_indexes_are_there": ["leases_one_per_holder"]}


async def second_sandbox_of_an_account(pool: Pool) -> Found:
    await pool.lease("ann")
    await pool.lease("bob")
    await pool.execute("DROP INDEX sandboxes_one_per_account")
    await pool.execute("UPDATE sandboxes SET external_id = 'account'")
    return {"one_lease_per_account": ["account"], "unique_indexes_are_there": ["sandboxes_one_per_account"]}


async def lease_of_a_sandbox_that_is_deleted_under_its_student(pool: Pool) -> Found:
    sandbox_id = await pool.lease("ann")
    await pool.execute("UPDATE sandboxes SET status = 'deleted'")
    return {"leased_is_allocated": [sandbox_id]}


async def lease_of_a_sandbox_without_a_record(pool: Pool) -> Found:
    sandbox_id = await pool.lease("ann")
    await pool.execute("DELETE FROM sandboxes")
    return {"leased_is_allocated": [sandbox_id]}


async def sandbox_that_is_allocated_to_nobody(pool: Pool) -> Found:
    await pool.lease("ann")
    (sandbox_id,) = await pool.fill(1, "allocated")
    return {"allocated_is_leased": [sandbox_id]}


async def sandbox_that_is_available_after_its_lease(pool: Pool) -> Found:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = 'available'")
    return {"available_was_never_leased": [sandbox_id]}


async def lease_that_nobody_ends(pool: Pool) -> Found:
    return {"leases_end": [await pool.overdue("ann", timedelta(days=2))]}


async def deletion_that_is_never_due(pool: Pool) -> Found:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET deletion_due_at = NULL")
    return {"deletions_are_due": [sandbox_id]}


async def event_that_nobody_publishes(pool: Pool) -> Found:
    await pool.lease("ann")
    await pool.execute("UPDATE outbox SET occurred_at = now() - interval '1 hour'")
    return {"events_are_published": [str(await pool.value("SELECT event_id FROM outbox"))]}


async def change_that_was_not_counted(pool: Pool) -> Found:
    await pool.fill(3)
    await pool.execute("DELETE FROM pool_changes")
    await pool.execute("INSERT INTO pool_counts VALUES ('pool', '', 'stale', 2)")
    return {"counters_are_exact": ["available: 0 counted, 3 there", "stale: 2 counted, 0 there"]}


async def allocation_that_was_not_counted(pool: Pool) -> Found:
    await pool.lease("ann")
    await pool.execute("DELETE FROM pool_changes")
    return {"counters_are_exact": ["allocated: 0 counted, 1 there"]}


async def index_that_is_no_longer_valid(pool: Pool) -> Found:
    await pool.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'leases_one_per_idempotency_key'::regclass"
    )
    return {"unique_indexes_are_there": ["leases_one_per_idempotency_key"]}


PLANTED: list[tuple[str, Callable[[Pool], Awaitable[Found]]]] = [
    ("one_lease_per_sandbox", second_lease_of_a_sandbox),
    ("one_lease_per_holder", second_lease_of_a_holder),
    ("one_lease_per_account", second_sandbox_of_an_account),
    ("leased_is_allocated", lease_of_a_sandbox_that_is_deleted_under_its_student),
    ("leased_is_allocated", lease_of_a_sandbox_without_a_record),
    ("allocated_is_leased", sandbox_that_is_allocated_to_nobody),
    ("available_was_never_leased", sandbox_that_is_available_after_its_lease),
    ("leases_end", lease_that_nobody_ends),
    ("deletions_are_due", deletion_that_is_never_due),
    ("events_are_published", event_that_nobody_publishes),
    ("counters_are_exact", change_that_was_not_counted),
    ("counters_are_exact", allocation_that_was_not_counted),
    ("unique_indexes_are_there", index_that_is_no_longer_valid),
]


@pytest.fixture
async def schema(pool: Pool) -> AsyncIterator[None]:
    """Brings back the indexes that a test takes away."""
    indexes = {
        row["name"]: row["definition"]
        for row in await pool.rows(
            "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition "
            "FROM pg_index WHERE indexrelid::regclass::text = ANY ($1)",
            invariants.UNIQUE_INDEXES,
        )
    }
    yield
    await pool.execute("TRUNCATE sandboxes, leases")
    await pool.execute("UPDATE pg_index SET indisvalid = true WHERE NOT indisvalid")
    for name, definition in indexes.items():
        if await pool.value("SELECT to_regclass($1) IS NULL", name):
            await pool.execute(definition)


@pytest.mark.usefixtures("schema")
@pytest.mark.parametrize(("rule", "plant"), PLANTED, ids=lambda part: getattr(part, "__name__", None))
async def test_it_is_seen_and_nothing_else_is_suspected(
    pool: Pool, rule: str, plant: Callable[[Pool], Awaitable[Found]]
) -> None:
    assert await found(pool) == {}
    expected = await plant(pool)
    assert rule in expected
    assert await found(pool) == expected


def test_every_rule_is_violated_once_at_least() -> None:
    assert {rule for rule, _ in PLANTED} == set(invariants.RULES)


async def test_ten_examples_are_named_and_all_are_counted(pool: Pool) -> None:
    ids = await pool.fill(12, "allocated")
    connection = await asyncpg.connect(pool.url)
    try:
        (row,) = await invariants.violations(connection)
    finally:
        await connection.close()
    assert (row["rule"], row["number"], row["ids"]) == ("allocated_is_leased", 12, sorted(ids)[:10])


async def test_all_sandboxes_are_searched_only_when_the_counters_miss_one(pool: Pool) -> None:
    await pool.lease("ann")
    connection = await asyncpg.connect(pool.url)

    async def searched() -> int:
        explained = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {invariants.VIOLATIONS}", *invariants.PARAMETERS
        )
        (loops,) = _loops(json.loads(explained)[0]["Plan"], "s")
        return loops

    try:
        assert await searched() == 0
        await pool.fill(1, "allocated")
        assert await searched() == 1
    finally:
        await connection.close()


def _loops(node: dict[str, Any], alias: str) -> Iterator[int]:
    """How often the table of that name in the statement was read."""
    if node.get("Alias") == alias and "Relation Name" in node:
        yield node["Actual Loops"]
    for inner in node.get("Plans", ()):
        yield from _loops(inner, alias)


async def test_a_pool_in_which_everything_happens_at_once_is_not_suspected(pool: Pool) -> None:
    await sync(await pool.writer(lane=MAINTENANCE), [account(number) for number in range(1, 121)])
    writers = [await pool.writer() for _ in range(4)]
    maintainer = await pool.writer(lane=MAINTENANCE)
    over = asyncio.Event()

    async def student(number: int, writer: Writer) -> None:
        for visit in range(5):
            holder = f"student-{number}-{visit}"
            (reply,) = await allocate(writer, ask(holder, track="dns"))
            if visit % 2:
                await release(writer, done(granted(reply).sandbox_id, holder))
            else:
                await writer.connection.execute("UPDATE leases SET expires_at = now() WHERE holder = $1", holder)

    async def maintain() -> None:
        while not over.is_set():
            await leases.expire_leases(maintainer, ExpireLeases(grace_sec=0, limit=10))
            reply = await deletions.claim_deletions(maintainer, ClaimDeletions(run_id=RUN, limit=5, claim_sec=60))
            assert isinstance(reply, DeletionsClaimed)
            for deletion in reply.deletions:
                await deletions.record_deletion(maintainer, RecordDeletion(sandbox_id=deletion.sandbox_id))
            await maintainer.connection.execute(outbox.COUNT)

    looks: list[Found] = []

    async def look() -> None:
        while not over.is_set() or not looks:
            looks.append(await found(pool))

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(maintain()), group.create_task(look())]
        async with asyncio.TaskGroup() as students:
            for number, writer in enumerate(writers):
                students.create_task(student(number, writer))
        over.set()
    assert all(other.done() for other in others)
    assert [one for one in looks if one] == []
    assert await found(pool) == {}


@pytest.fixture(autouse=True)
def no_metric() -> Iterator[None]:
    metrics.INVARIANT_VIOLATIONS.clear()
    yield
    metrics.INVARIANT_VIOLATIONS.clear()


def shown() -> dict[str, float]:
    (family,) = metrics.INVARIANT_VIOLATIONS.collect()
    return {sample.labels["rule"]: sample.value for sample in family.samples}


async def epoch(pool: Pool) -> int:
    number: int = await pool.value("SELECT max(epoch) FROM allocator_epoch")
    return number


async def test_every_rule_has_its_metric_which_returns_to_nothing(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "allocated")
    await invariants.check(pool.url, await epoch(pool))
    assert shown() == {**dict.fromkeys(invariants.RULES, 0.0), "allocated_is_leased": 1.0}
    await pool.execute("DELETE FROM sandboxes WHERE sandbox_id = $1", sandbox_id)
    await invariants.check(pool.url, await epoch(pool))
    assert shown() == dict.fromkeys(invariants.RULES, 0.0)


@pytest.mark.parametrize("at_work", ["never", "no longer"])
async def test_an_allocator_that_is_not_at_work_shows_nothing(pool: Pool, at_work: str) -> None:
    await pool.fill(1, "allocated")
    await invariants.check(pool.url, await epoch(pool))
    assert shown()
    await invariants.check(pool.url, 0 if at_work == "never" else await epoch(pool) + 1)
    assert shown() == {}


async def test_one_that_cannot_look_shows_nothing(pool: Pool) -> None:
    await invariants.check(pool.url, await epoch(pool))
    assert shown()
    await invariants.check(pool.url.replace("/broker_test", "/not_there"), await epoch(pool))
    assert shown() == {}


async def test_it_cannot_write(pool: Pool) -> None:
    connection = await asyncpg.connect(pool.url)
    try:
        await connection.execute(invariants.SETTINGS)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("DELETE FROM sandboxes")
    finally:
        await connection.close()


@dataclass
class Running:
    url: str

    async def metrics(self) -> str:
        """Nothing yet while it starts."""
        async with httpx.AsyncClient(trust_env=False) as browser:
            try:
                return (await browser.get(f"{self.url}/metrics")).text
            except httpx.TransportError:
                return ""

    async def violations(self) -> dict[str, str]:
        lines = (line.rsplit(" ", 1) for line in (await self.metrics()).splitlines())
        return {name: value for name, value in lines if name.startswith("broker_invariant_violations{")}


@asynccontextmanager
async def running(amqp_url: str, database_url: str, lines: list[str]) -> AsyncIterator[Running]:
    port = free_port()
    process = await spawn(
        "allocator",
        [sys.executable, "-m", "allocator"],
        cwd=Path(__file__).parent,  # no .env here
        env=os.environ
        | {
            "AMQP_URL": amqp_url,
            "DATABASE_URL": database_url,
            "ALLOCATOR_PORT": str(port),
            "INVARIANT_CHECK_SEC": "0.2",
        },
        on_line=lines.append,
    )
    started = Running(f"http://127.0.0.1:{port}")
    try:
        await until(started.metrics)
        yield started
        assert await process.stop() == 0
    finally:
        process.kill()


async def test_the_allocator_at_work_looks_and_the_one_that_stands_by_does_not(
    pool: Pool, clean_queues: str
) -> None:
    lines: list[str] = []
    (sandbox_id,) = await pool.fill(1)
    async with (
        client(clean_queues) as asking,
        running(clean_queues, pool.url, lines) as active,
    ):
        await asking.ask([ExpireLeases(grace_sec=0, limit=1)], queue=topology.ALLOCATOR_MAINTENANCE)
        async with running(clean_queues, pool.url, []) as standby:

            async def all_is_well() -> bool:
                values = (await active.violations()).values()
                return len(values) == len(invariants.RULES) and set(values) == {"0.0"}

            await until(all_is_well)
            await pool.execute("UPDATE sandboxes SET status = 'allocated'")

            async def is_seen() -> bool:
                seen = await active.violations()
                return seen['broker_invariant_violations{rule="allocated_is_leased"}'] == "1.0"

            await until(is_seen)
            assert await standby.violations() == {}
    logged: list[dict[str, Any]] = [json.loads(line) for line in lines if "invariant.violated" in line]
    assert logged[0]["rule"] == "allocated_is_leased"
    assert (logged[0]["number"], logged[0]["ids"]) == (1, [sandbox_id])
