"""Invariant check: reports every violation of a rule, however it arose, and none for a sound pool."""

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

from allocator import metrics
from allocator.background import invariant_check, outbox_relay
from allocator.handlers import deletions, leases
from allocator.routing import MAINTENANCE
from allocator.write_session import WriteSession
from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.processes import spawn
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import ClaimDeletions, ExpireLeases, RecordDeletion
from sandbox_broker.contract.replies import DeletionsClaimed
from sandbox_broker.database.primary import Primary

from .allocator_harness import (
    RUN,
    Pool,
    account,
    allocate,
    allocate_command,
    granted_lease,
    release,
    release_command,
    sync,
)
from .bus_harness import connect_client

Violations = dict[str, list[str]]


async def find_violations(pool: Pool) -> Violations:
    """Return the reported ids by rule."""
    connection = await asyncpg.connect(pool.url)
    try:
        await connection.execute(invariant_check.SESSION_SETTINGS)
        rows = await invariant_check.fetch_violations(connection)
        assert all(row["number"] >= len(row["ids"]) > 0 for row in rows)
        return {row["rule"]: row["ids"] for row in rows}
    finally:
        await connection.close()


async def second_lease_of_a_sandbox(pool: Pool) -> Violations:
    sandbox_id = await pool.lease("ann")
    await pool.execute("DROP INDEX leases_one_per_sandbox")
    await pool.execute("INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ($1, 'bob', now())", sandbox_id)
    return {
        "one_lease_per_sandbox": [sandbox_id],
        "unique_indexes_are_there": ["leases_one_per_sandbox"],
    }


async def second_lease_of_a_holder(pool: Pool) -> Violations:
    await pool.lease("ann")
    await pool.lease("bob")
    await pool.execute("DROP INDEX leases_one_per_holder")
    await pool.execute("UPDATE leases SET holder = 'ann'")
    return {"one_lease_per_holder": ["ann"], "unique_indexes_are_there": ["leases_one_per_holder"]}


async def second_sandbox_of_an_account(pool: Pool) -> Violations:
    await pool.lease("ann")
    await pool.lease("bob")
    await pool.execute("DROP INDEX sandboxes_one_per_account")
    await pool.execute("UPDATE sandboxes SET external_id = 'account'")
    return {"one_lease_per_account": ["account"], "unique_indexes_are_there": ["sandboxes_one_per_account"]}


async def lease_of_a_deleted_sandbox(pool: Pool) -> Violations:
    sandbox_id = await pool.lease("ann")
    await pool.execute("UPDATE sandboxes SET status = 'deleted'")
    return {"leased_is_allocated": [sandbox_id]}


async def lease_of_a_sandbox_without_a_record(pool: Pool) -> Violations:
    sandbox_id = await pool.lease("ann")
    await pool.execute("DELETE FROM sandboxes")
    return {"leased_is_allocated": [sandbox_id]}


async def allocated_sandbox_without_a_lease(pool: Pool) -> Violations:
    await pool.lease("ann")
    (sandbox_id,) = await pool.fill(1, "allocated")
    return {"allocated_is_leased": [sandbox_id]}


async def available_sandbox_with_a_past_lease(pool: Pool) -> Violations:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET status = 'available'")
    return {"available_was_never_leased": [sandbox_id]}


async def overdue_lease(pool: Pool) -> Violations:
    return {"leases_end": [await pool.overdue("ann", timedelta(days=2))]}


async def deletion_without_a_due_time(pool: Pool) -> Violations:
    sandbox_id = await pool.pending()
    await pool.execute("UPDATE sandboxes SET deletion_due_at = NULL")
    return {"deletions_are_due": [sandbox_id]}


async def unpublished_event(pool: Pool) -> Violations:
    await pool.lease("ann")
    await pool.execute("UPDATE outbox SET occurred_at = now() - interval '1 hour'")
    return {"events_are_published": [str(await pool.value("SELECT event_id FROM outbox"))]}


async def uncounted_change(pool: Pool) -> Violations:
    await pool.fill(3)
    await pool.execute("DELETE FROM pool_changes")
    await pool.execute("INSERT INTO pool_counts VALUES ('pool', '', 'stale', 2)")
    return {"counters_are_exact": ["available: 0 counted, 3 there", "stale: 2 counted, 0 there"]}


async def uncounted_allocation(pool: Pool) -> Violations:
    await pool.lease("ann")
    await pool.execute("DELETE FROM pool_changes")
    return {"counters_are_exact": ["allocated: 0 counted, 1 there"]}


async def invalid_index(pool: Pool) -> Violations:
    await pool.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'leases_one_per_idempotency_key'::regclass"
    )
    return {"unique_indexes_are_there": ["leases_one_per_idempotency_key"]}


PLANTED: list[tuple[str, Callable[[Pool], Awaitable[Violations]]]] = [
    ("one_lease_per_sandbox", second_lease_of_a_sandbox),
    ("one_lease_per_holder", second_lease_of_a_holder),
    ("one_lease_per_account", second_sandbox_of_an_account),
    ("leased_is_allocated", lease_of_a_deleted_sandbox),
    ("leased_is_allocated", lease_of_a_sandbox_without_a_record),
    ("allocated_is_leased", allocated_sandbox_without_a_lease),
    ("available_was_never_leased", available_sandbox_with_a_past_lease),
    ("leases_end", overdue_lease),
    ("deletions_are_due", deletion_without_a_due_time),
    ("events_are_published", unpublished_event),
    ("counters_are_exact", uncounted_change),
    ("counters_are_exact", uncounted_allocation),
    ("unique_indexes_are_there", invalid_index),
]


@pytest.fixture
async def schema(pool: Pool) -> AsyncIterator[None]:
    """Restore dropped indexes."""
    indexes = {
        row["name"]: row["definition"]
        for row in await pool.rows(
            "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition "
            "FROM pg_index WHERE indexrelid::regclass::text = ANY ($1)",
            invariant_check.UNIQUE_INDEXES,
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
async def test_each_violation_is_reported_and_no_other(
    pool: Pool, rule: str, plant: Callable[[Pool], Awaitable[Violations]]
) -> None:
    assert await find_violations(pool) == {}
    expected = await plant(pool)
    assert rule in expected
    assert await find_violations(pool) == expected


def test_every_rule_has_a_violation_test() -> None:
    assert {rule for rule, _ in PLANTED} == set(invariant_check.RULES)


async def test_a_report_counts_all_violations_and_names_ten(pool: Pool) -> None:
    ids = await pool.fill(12, "allocated")
    connection = await asyncpg.connect(pool.url)
    try:
        (row,) = await invariant_check.fetch_violations(connection)
    finally:
        await connection.close()
    assert (row["rule"], row["number"], row["ids"]) == ("allocated_is_leased", 12, sorted(ids)[:10])


async def test_sandboxes_are_scanned_only_when_the_counters_disagree(pool: Pool) -> None:
    await pool.lease("ann")
    connection = await asyncpg.connect(pool.url)

    async def count_scans() -> int:
        explained = await connection.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {invariant_check.VIOLATIONS}", *invariant_check.PARAMETERS
        )
        (loops,) = _loops(json.loads(explained)[0]["Plan"], "s")
        return loops

    try:
        assert await count_scans() == 0
        await pool.fill(1, "allocated")
        assert await count_scans() == 1
    finally:
        await connection.close()


def _loops(node: dict[str, Any], alias: str) -> Iterator[int]:
    """Yield the number of scans of the table with this alias."""
    if node.get("Alias") == alias and "Relation Name" in node:
        yield node["Actual Loops"]
    for inner in node.get("Plans", ()):
        yield from _loops(inner, alias)


async def test_a_busy_pool_has_no_violations(pool: Pool) -> None:
    await sync(await pool.write_session(lane=MAINTENANCE), [account(number) for number in range(1, 121)])
    sessions = [await pool.write_session() for _ in range(4)]
    maintainer = await pool.write_session(lane=MAINTENANCE)
    finished = asyncio.Event()

    async def student(number: int, session: WriteSession) -> None:
        for visit in range(5):
            holder = f"student-{number}-{visit}"
            (reply,) = await allocate(session, allocate_command(holder, track="dns"))
            if visit % 2:
                await release(session, release_command(granted_lease(reply).sandbox_id, holder))
            else:
                await session.connection.execute("UPDATE leases SET expires_at = now() WHERE holder = $1", holder)

    async def maintain() -> None:
        while not finished.is_set():
            await leases.expire_leases(maintainer, ExpireLeases(grace_sec=0, limit=10))
            reply = await deletions.claim_deletions(maintainer, ClaimDeletions(run_id=RUN, limit=5, claim_sec=60))
            assert isinstance(reply, DeletionsClaimed)
            for deletion in reply.deletions:
                await deletions.record_deletion(maintainer, RecordDeletion(sandbox_id=deletion.sandbox_id))
            await maintainer.connection.execute(outbox_relay.UPDATE_COUNTERS)

    checks: list[Violations] = []

    async def check() -> None:
        while not finished.is_set() or not checks:
            checks.append(await find_violations(pool))

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(maintain()), group.create_task(check())]
        async with asyncio.TaskGroup() as students:
            for number, session in enumerate(sessions):
                students.create_task(student(number, session))
        finished.set()
    assert all(other.done() for other in others)
    assert [violations for violations in checks if violations] == []
    assert await find_violations(pool) == {}


@pytest.fixture(autouse=True)
def clear_metric() -> Iterator[None]:
    metrics.INVARIANT_VIOLATIONS.clear()
    yield
    metrics.INVARIANT_VIOLATIONS.clear()


def exported() -> dict[str, float]:
    (family,) = metrics.INVARIANT_VIOLATIONS.collect()
    return {sample.labels["rule"]: sample.value for sample in family.samples}


async def current_epoch(pool: Pool) -> int:
    number: int = await pool.value("SELECT max(epoch) FROM allocator_epoch")
    return number


async def test_the_metric_of_a_rule_returns_to_zero(pool: Pool) -> None:
    (sandbox_id,) = await pool.fill(1, "allocated")
    await invariant_check.check_invariants(Primary(pool.url), await current_epoch(pool))
    assert exported() == {**dict.fromkeys(invariant_check.RULES, 0.0), "allocated_is_leased": 1.0}
    await pool.execute("DELETE FROM sandboxes WHERE sandbox_id = $1", sandbox_id)
    await invariant_check.check_invariants(Primary(pool.url), await current_epoch(pool))
    assert exported() == dict.fromkeys(invariant_check.RULES, 0.0)


@pytest.mark.parametrize("at_work", ["never", "no longer"])
async def test_an_allocator_without_the_current_epoch_exports_no_violations(pool: Pool, at_work: str) -> None:
    await pool.fill(1, "allocated")
    await invariant_check.check_invariants(Primary(pool.url), await current_epoch(pool))
    assert exported()
    await invariant_check.check_invariants(
        Primary(pool.url), 0 if at_work == "never" else await current_epoch(pool) + 1
    )
    assert exported() == {}


async def test_a_failed_check_exports_no_violations(pool: Pool) -> None:
    await invariant_check.check_invariants(Primary(pool.url), await current_epoch(pool))
    assert exported()
    await invariant_check.check_invariants(
        Primary(pool.url.replace("/broker_test", "/not_there")), await current_epoch(pool)
    )
    assert exported() == {}


async def test_the_check_cannot_write(pool: Pool) -> None:
    connection = await asyncpg.connect(pool.url)
    try:
        await connection.execute(invariant_check.SESSION_SETTINGS)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("DELETE FROM sandboxes")
    finally:
        await connection.close()


@dataclass
class Running:
    url: str

    async def metrics(self) -> str:
        """Return the metrics page; empty while the allocator starts."""
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
        await wait_until(started.metrics)
        yield started
        assert await process.stop() == 0
    finally:
        process.kill()


async def test_only_the_active_allocator_checks_the_invariants(pool: Pool, clean_queues: str) -> None:
    lines: list[str] = []
    (sandbox_id,) = await pool.fill(1)
    async with (
        connect_client(clean_queues) as client,
        running(clean_queues, pool.url, lines) as active,
    ):
        await client.request([ExpireLeases(grace_sec=0, limit=1)], queue=topology.ALLOCATOR_MAINTENANCE)
        async with running(clean_queues, pool.url, []) as standby:

            async def all_is_well() -> bool:
                values = (await active.violations()).values()
                return len(values) == len(invariant_check.RULES) and set(values) == {"0.0"}

            await wait_until(all_is_well)
            await pool.execute("UPDATE sandboxes SET status = 'allocated'")

            async def is_seen() -> bool:
                seen = await active.violations()
                return seen['broker_invariant_violations{rule="allocated_is_leased"}'] == "1.0"

            await wait_until(is_seen)
            assert await standby.violations() == {}
    logged: list[dict[str, Any]] = [json.loads(line) for line in lines if "invariant.violated" in line]
    assert logged[0]["rule"] == "allocated_is_leased"
    assert (logged[0]["number"], logged[0]["ids"]) == (1, [sandbox_id])
