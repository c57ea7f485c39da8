"""Scenarios in which students allocate during maintenance, and the same load without it for comparison.

The load is moderate and leaves the processors idle most of the time. Under full load, maintenance would compete
with it for CPU time, and the slowest responses would only measure the operating system's scheduler.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

import asyncpg

from bench import load, maintenance, meter, pool
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.servers import TOKEN, Servers
from bench.sizes import Sizes

_CONNECTIONS = 50
"""Connections with a listing of 100,000 accounts; fewer with a smaller one, so that the pool lasts as long."""
_THINK_MS = 100
"""Mean pause of a connection between requests: 500 requests per second if responses took no time."""
_MAX_DURATION_SEC = 90
"""Upper bound of the load. The pool, half of a listing, lasts for 100 s."""
_POLL_INTERVAL_SEC = 0.1
_MAX_LAG_SEC = 1.0
"""Lag at which the events of the maintenance count as published. Students' events keep it above 0."""
_RETENTION_SEC = 30 * 24 * 3600

# Inserts deleted sandboxes past the retention period, each with its ended lease.
_INSERT_DELETED = """
WITH used AS (
    INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since, deletion_requested_at, deleted_at)
    SELECT 'used-' || n, md5('used-' || n)::uuid, 'used-' || n, 'deleted', deleted, deleted, deleted
    FROM generate_series(1, $1::int) n, (SELECT now() - interval '40 days') AS ago (deleted)
    RETURNING sandbox_id, deleted_at
)
INSERT INTO leases (sandbox_id, holder, track_name, allocated_at, expires_at, ended_at, end_reason)
SELECT sandbox_id, 'student-of-' || sandbox_id, 'bench-track',
    deleted_at - interval '1 hour', deleted_at, deleted_at, 'student'
FROM used
"""


MaintenanceWork = Callable[[asyncpg.Connection], Awaitable[object]]
"""Starts maintenance and waits for its end. The connection is for polling."""


async def run_without_maintenance(servers: Servers, sizes: Sizes) -> Run:
    async def work(_: asyncpg.Connection) -> None:
        pass

    sandboxes = sizes.accounts // 2
    await pool.fill(servers.broker.database, sandboxes)
    paced = await _run_paced(servers, sizes, work)
    return await _verify(servers, paced, sandboxes=sandboxes)


async def run_with_sync(servers: Servers, sizes: Sizes) -> Run:
    """Run while the csp-syncer applies a listing, half of which is already in the pool."""
    responses: list[dict[str, int]] = []

    async def work(_: asyncpg.Connection) -> None:
        responses.append(await maintenance.run_sync(servers))

    await maintenance.put_csp_accounts(servers, sizes.accounts)
    await pool.fill(servers.broker.database, sizes.accounts // 2)
    paced = await _run_paced(servers, sizes, work)
    run = await _verify(servers, paced, sandboxes=sizes.accounts)
    expected = {"synced": sizes.accounts, "marked_stale": 0, "restored": 0}
    if [{name: response[name] for name in expected} for response in responses] != [expected]:
        run = run.with_problems((f"the sync returned unexpected counts: {responses}",))
    return run.with_figures({"sync s": paced.work_sec, "csp-syncer peak MB": run.peak["csp-syncer"]})


async def run_with_expiry(servers: Servers, sizes: Sizes) -> Run:
    """Run while the reaper ends overdue leases, which all become due at once."""
    database, overdue = servers.broker.database, sizes.accounts // 5
    sandboxes = sizes.accounts // 2 + overdue
    await pool.fill(database, sandboxes)
    await pool.insert_leases(database, "overdue", overdue)
    paced = await _run_paced(servers, sizes, partial(maintenance.expire_leases, "overdue"))
    run = await _verify(servers, paced, sandboxes=sandboxes, leases=overdue)
    expired = await pool.count_ended_leases(database, "expired")
    if expired != overdue:
        run = run.with_problems((f"{expired} leases expired, expected {overdue}",))
    await pool.truncate_tables(database)  # stops the reaper's deletions, which would disturb the next scenario
    return run.with_figures({"expiry s": paced.work_sec})


async def run_with_purge(servers: Servers, sizes: Sizes) -> Run:
    """Run while the allocator purges the records of sandboxes deleted long ago."""
    database, old, purged = servers.broker.database, sizes.accounts // 2, [0]
    await pool.fill(database, sizes.accounts // 2)
    await database.execute(_INSERT_DELETED, old)
    await database.execute("VACUUM ANALYZE sandboxes, leases")
    async with maintenance.connect_rpc_client(servers) as rpc_client:

        async def work(_: asyncpg.Connection) -> None:
            purged[0] = await maintenance.purge_deleted(rpc_client, deleted_for_sec=_RETENTION_SEC)

        paced = await _run_paced(servers, sizes, work)
    run = await _verify(servers, paced, sandboxes=sizes.accounts // 2 + old, leases=old, purged=old)
    if purged != [old]:
        run = run.with_problems((f"{purged[0]} records were purged, expected {old}",))
    return run.with_figures({"purge s": paced.work_sec})


async def run_with_replacements(servers: Servers, sizes: Sizes) -> Run:
    """Run while other students replace their broken sandboxes, one after the other."""
    database, broken = servers.broker.database, max(20, sizes.accounts // 200)
    sandboxes = sizes.accounts // 2 + 2 * broken
    durations: list[float] = []

    async def work(connection: asyncpg.Connection) -> None:
        leases = await connection.fetch("SELECT holder, sandbox_id FROM leases WHERE starts_with(holder, 'broken')")
        durations.extend(await maintenance.replace_sandboxes(servers, dict(map(tuple, leases))))

    await pool.fill(database, sandboxes)
    await pool.insert_leases(database, "broken", broken)
    paced = await _run_paced(servers, sizes, work)
    run = await _verify(servers, paced, sandboxes=sandboxes, leases=2 * broken)
    replaced = await pool.count_ended_leases(database, "broken")
    if replaced != broken:
        run = run.with_problems((f"{replaced} sandboxes were replaced, expected {broken}",))
    return run.with_figures({"replacement p95 ms": quantiles(durations, n=20)[-1]})


@dataclass(frozen=True, slots=True)
class _PacedRun:
    run: Run
    confirmed: int
    """New leases confirmed to clients, including the warm-up."""
    cut_off: int
    """Maximum of requests cut off before their response: one per connection, in warm-up and load each."""
    work_sec: float


async def _run_paced(servers: Servers, sizes: Sizes, work: MaintenanceWork) -> _PacedRun:
    """Generate load until the work is done and its events are published, but for `sizes.seconds` at least."""
    target, work_sec = servers.broker, 0.0
    connections = max(1, min(_CONNECTIONS, sizes.accounts // 2_000))

    async def do_work() -> None:
        nonlocal work_sec
        async with target.connect() as connection:
            began = time.monotonic()
            await work(connection)
            work_sec = time.monotonic() - began
            while (await pool.read_outbox_lag(connection)).seconds > _MAX_LAG_SEC:  # noqa: ASYNC110 (no event)
                await asyncio.sleep(_POLL_INTERVAL_SEC)

    async def wait_for_work() -> None:
        await asyncio.gather(do_work(), asyncio.sleep(sizes.seconds))

    async def generate_load() -> LoadResult:
        return await load.run_wrk(
            target.url,
            TOKEN,
            build_workload(),
            connections=connections,
            seconds=_MAX_DURATION_SEC,
            until=wait_for_work,
        )

    build_workload = partial(Workload, think_ms=_THINK_MS)
    warm_up = await load.run_wrk(
        target.url, TOKEN, build_workload(), connections=connections, seconds=sizes.warm_up
    )
    await pool.wait_until_idle(target.database)
    run = await meter.measure_load(target, generate_load, has_events=True)
    return _PacedRun(run, warm_up.requests + run.load.requests, 2 * connections, work_sec)


async def _verify(servers: Servers, paced: _PacedRun, *, sandboxes: int, leases: int = 0, purged: int = 0) -> Run:
    """Verify the database and add the problems to the run. `leases` is the number of leases before the load."""
    problems = await pool.find_problems(
        servers.broker.database,
        sandboxes=sandboxes,
        confirmed=paced.confirmed + leases,
        cut_off=paced.cut_off,
        purged=purged,
    )
    return paced.run.with_problems(problems)
