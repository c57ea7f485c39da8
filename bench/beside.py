"""Scenarios in which students allocate while maintenance goes on, and the one without, for comparison.

Students come at a pace that leaves the machine idle for most of the time. At full load, whatever else goes on takes
processor time from it, and the slowest answers tell of the scheduler."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import asyncpg

from bench import load, maintenance, meter, pool
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.servers import TOKEN, Servers
from bench.sizes import Sizes

_CONNECTIONS = 50
"""With a listing of 100,000 accounts; fewer with a smaller one, so that the pool lasts as long."""
_THINK_MS = 100
"""So 500 requests a second, where answers take no time."""
_LONGEST_SEC = 90
"""Half a listing of sandboxes lasts for 100 s, however long the work takes."""
_BETWEEN_LOOKS_SEC = 0.1
_PUBLISHED_SEC = 1.0
"""No event is older, when those of the maintenance are published: those of the students go on."""
_RETENTION_SEC = 30 * 24 * 3600

# Deleted longer ago than records are kept, each after a lease.
_DELETE = """
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


Work = Callable[[asyncpg.Connection], Awaitable[object]]
"""Starts maintenance and follows it to its end; it is given a connection for looking."""


async def nothing(servers: Servers, sizes: Sizes) -> Run:
    """The same load, and no maintenance."""

    async def work(_: asyncpg.Connection) -> None:
        pass

    sandboxes = sizes.accounts // 2
    await pool.fill(servers.ours.database, sandboxes)
    paced = await _paced(servers, sizes, work)
    return await _checked(servers, paced, sandboxes=sandboxes)


async def sync(servers: Servers, sizes: Sizes) -> Run:
    """The csp-syncer brings a listing of which the pool knows half."""
    answers: list[dict[str, int]] = []

    async def work(_: asyncpg.Connection) -> None:
        answers.append(await maintenance.sync(servers))

    await maintenance.list_in_csp(servers, sizes.accounts)
    await pool.fill(servers.ours.database, sizes.accounts // 2)
    paced = await _paced(servers, sizes, work)
    run = await _checked(servers, paced, sandboxes=sizes.accounts)
    expected = {"synced": sizes.accounts, "marked_stale": 0, "restored": 0}
    if [{name: answer[name] for name in expected} for answer in answers] != [expected]:
        run = run.having((f"the sync has done something else: {answers}",))
    return run.telling({"sync s": paced.work_sec, "csp-syncer peak MB": run.peak["csp-syncer"]})


async def expiry(servers: Servers, sizes: Sizes) -> Run:
    """The reaper ends the leases of students who never came back, all of them due at once."""
    database, overdue = servers.ours.database, sizes.accounts // 5
    sandboxes = sizes.accounts // 2 + overdue
    await pool.fill(database, sandboxes)
    await pool.insert_leases(database, "overdue", overdue)
    paced = await _paced(servers, sizes, partial(maintenance.expire, "overdue"))
    run = await _checked(servers, paced, sandboxes=sandboxes, leases=overdue)
    expired = await pool.count_ended_leases(database, "expired")
    if expired != overdue:
        run = run.having((f"{expired} leases have expired, not {overdue}",))
    await pool.truncate_tables(database)  # or the reaper would go on deleting while something else is measured
    return run.telling({"expiry s": paced.work_sec})


async def purge(servers: Servers, sizes: Sizes) -> Run:
    """The records of sandboxes that were deleted long ago are forgotten."""
    database, old, purged = servers.ours.database, sizes.accounts // 2, [0]
    await pool.fill(database, sizes.accounts // 2)
    await database.execute(_DELETE, old)
    await database.execute("VACUUM ANALYZE sandboxes, leases")
    async with maintenance.asking(servers) as requester:

        async def work(_: asyncpg.Connection) -> None:
            purged[0] = await maintenance.purge(requester, deleted_for_sec=_RETENTION_SEC)

        paced = await _paced(servers, sizes, work)
    run = await _checked(servers, paced, sandboxes=sizes.accounts // 2 + old, leases=old, purged=old)
    if purged != [old]:
        run = run.having((f"{purged[0]} records were purged, not {old}",))
    return run.telling({"purge s": paced.work_sec})


@dataclass(frozen=True, slots=True)
class _Paced:
    run: Run
    promised: int
    """Leases, those of the warm-up included."""
    cut_off: int
    """Requests whose answers nobody waited for, at most: one of each connection, in the warm-up and in the load."""
    work_sec: float


async def _paced(servers: Servers, sizes: Sizes, work: Work) -> _Paced:
    """The load lasts until the work is done and its events are published, and as long as any other at least."""
    target, work_sec = servers.ours, 0.0
    connections = max(1, min(_CONNECTIONS, sizes.accounts // 2_000))

    async def followed() -> None:
        nonlocal work_sec
        async with target.connected() as connection:
            began = time.monotonic()
            await work(connection)
            work_sec = time.monotonic() - began
            while (await pool.read_outbox_lag(connection)).seconds > _PUBLISHED_SEC:  # noqa: ASYNC110 (nothing tells us)
                await asyncio.sleep(_BETWEEN_LOOKS_SEC)

    async def until() -> None:
        await asyncio.gather(followed(), asyncio.sleep(sizes.seconds))

    async def put() -> LoadResult:
        return await load.run_wrk(
            target.url, TOKEN, students(), connections=connections, seconds=_LONGEST_SEC, until=until
        )

    students = partial(Workload, think_ms=_THINK_MS)
    warm = await load.run_wrk(target.url, TOKEN, students(), connections=connections, seconds=sizes.warm_up)
    await pool.wait_until_idle(target.database)
    run = await meter.measure(target, put, events=True)
    return _Paced(run, warm.requests + run.load.requests, 2 * connections, work_sec)


async def _checked(servers: Servers, paced: _Paced, *, sandboxes: int, leases: int = 0, purged: int = 0) -> Run:
    """`leases`: that there were before."""
    problems = await pool.find_problems(
        servers.ours.database,
        sandboxes=sandboxes,
        promised=paced.promised + leases,
        cut_off=paced.cut_off,
        purged=purged,
    )
    return paced.run.having(problems)
