"""Soak test: replacement of deleted sandboxes, and the summary of samples."""

import asyncio
from functools import partial

import asyncpg
import pytest

from bench import pool
from bench.soak import RenewedPool, Sample, summarize_samples
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient

from .conftest import SANDBOXES, count_available

LEASES = 3


@pytest.fixture
def rpc_client(amqp_url: str) -> RpcClient:
    """RPC client without a connection, because these tests send no command."""
    return RpcClient(amqp_url, "bench", Publisher(amqp_url, "bench"))


async def release_all(database: asyncpg.Connection) -> None:
    """End all leases, as the allocator does on a release."""
    await database.execute("UPDATE leases SET ended_at = now(), end_reason = 'student'")
    await database.execute(
        "UPDATE sandboxes SET status = 'pending_deletion', deletion_due_at = now() WHERE status = 'allocated'"
    )


async def test_each_released_sandbox_is_deleted_and_replaced(
    database: asyncpg.Connection, rpc_client: RpcClient
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release_all(database)
    renewed = RenewedPool(database, SANDBOXES, rpc_client=rpc_client)
    await renewed.replace_released()
    assert await count_available(database) == SANDBOXES
    assert await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'deleted'") == LEASES
    events = await database.fetch("SELECT type, count(*) FROM outbox GROUP BY type ORDER BY type")
    assert [tuple(row) for row in events] == [("sandbox.deleted", LEASES), ("sandbox.discovered", LEASES)]
    assert await pool.find_problems(database, sandboxes=renewed.sandboxes, confirmed=LEASES) == ()


async def test_sandboxes_deleted_by_the_reaper_are_replaced_once(
    database: asyncpg.Connection, rpc_client: RpcClient
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release_all(database)
    await database.execute("UPDATE sandboxes SET status = 'deleted' WHERE status = 'pending_deletion'")
    renewed = RenewedPool(database, SANDBOXES, rpc_client=rpc_client)
    await renewed.replace_deleted_by_reaper()
    await renewed.replace_deleted_by_reaper()
    assert (renewed.added, await count_available(database)) == (LEASES, SANDBOXES)


async def test_a_row_locked_by_the_reaper_is_replaced_after_the_lock_is_released(
    database: asyncpg.Connection, clean_database: str, rpc_client: RpcClient
) -> None:
    await pool.insert_leases(database, "student", LEASES)
    await release_all(database)
    reaper = await asyncpg.connect(clean_database)
    renewed = RenewedPool(database, SANDBOXES, rpc_client=rpc_client)
    async with reaper.transaction():
        await reaper.execute("""
            UPDATE sandboxes SET deletion_due_at = now() + interval '1 minute'
            WHERE sandbox_id IN (SELECT sandbox_id FROM sandboxes WHERE status = 'pending_deletion' LIMIT 1)
        """)
        replacing = asyncio.create_task(renewed.replace_released())
        is_blocked = partial(reaper.fetchval, "SELECT cardinality(pg_blocking_pids($1)) > 0")
        while not (replacing.done() or await is_blocked(database.get_server_pid())):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.01)
    await replacing
    await reaper.close()
    assert await count_available(database) == SANDBOXES
    assert await database.fetchval("SELECT count(*) FROM sandboxes WHERE status = 'deleted'") == LEASES


def test_throughput_of_the_first_and_last_tenth() -> None:
    # 100 leases per second in the first half, then 50.
    samples = [Sample(second, 100 * second, {"server": 80.0}) for second in range(6)]
    samples += [Sample(5 + second, 500 + 50 * second, {"server": 80.0}) for second in range(1, 11)]
    figures = summarize_samples(samples)
    assert (figures["first tenth, cycles/s"], figures["last tenth, cycles/s"]) == (100.0, 50.0)
    assert figures["last tenth ÷ first"] == 0.5


def test_bounds_of_the_tenths_are_interpolated_between_samples() -> None:
    samples = [
        Sample(0, 0, {"server": 80.0}),
        Sample(10, 500, {"server": 80.0}),
        Sample(30, 1000, {"server": 80.0}),
    ]
    assert summarize_samples(samples)["last tenth ÷ first"] == 0.5


def test_memory_growth_is_that_of_the_service_that_grew_most() -> None:
    samples = [
        Sample(0, 0, {"server": 10.0, "reaper": 10.0}),
        Sample(1, 60, {"server": 100.0, "reaper": 50.0}),
        Sample(2, 100, {"server": 100.0, "reaper": 75.0}),
    ]
    figures = summarize_samples(samples)
    assert (figures["reaper MB at the start"], figures["reaper MB at the end"]) == (10.0, 75.0)
    assert figures["memory at the end ÷ middle"] == 1.5
