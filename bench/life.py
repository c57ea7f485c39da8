"""The long run: sandboxes live their whole lives, a million of them, so that what grows is seen to grow.

Students allocate and release over HTTP. What CSP, the reaper and the csp-syncer do for a released sandbox takes
seconds there, which is what their throttles are for. So SQL does it, with the same changes of the same rows and the
same events: what is to be deleted becomes deleted, and for each a new one with a new name comes into the pool. The
reaper is there all the same, and deletes as many in CSP as its throttles let it. The records of what is deleted are
purged by the allocator, on the commands that the csp-syncer sends, after ten seconds instead of 30 days."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import asyncpg

from bench import load, maintenance, meter, pool
from bench.comeback import Pool, repeated
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.servers import TOKEN, Servers, Target
from bench.sizes import Sizes
from sandbox_broker.bus import Requester

_SANDBOXES = 20_000
_HELD = 1_000
"""By students, at any moment."""
_CONNECTIONS = 50
_LONGEST_SEC = 3_600
_STEP_SEC = 0.05
_PIECE = 1_000
_SAMPLE_SEC = 0.5
_FORGET_EVERY = 20
"""Samples."""
_RETENTION_SEC = 10.0
_PURGE_PAUSE_SEC = 0.1
_CATCH_UP_EVERY_SEC = 10.0
_VACUUM_EVERY_SEC = 60.0
_TABLES = ("sandboxes", "leases", "outbox")

# As the allocator records deletions, many at a time. What is locked is waited for: left out, what the reaper is
# just claiming would still be there after the last time.
_DELETE = """
WITH used AS MATERIALIZED (
    SELECT sandbox_id FROM sandboxes WHERE status = 'pending_deletion'
    ORDER BY deletion_due_at LIMIT $1 FOR UPDATE
),
moved AS (
    UPDATE sandboxes s
    SET status = 'deleted', status_since = now(), deleted_at = now(), deletion_due_at = NULL, deletion_claim = NULL
    FROM used WHERE s.sandbox_id = used.sandbox_id
    RETURNING s.sandbox_id, s.external_id, s.name
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.deleted', sandbox_id,
        jsonb_build_object('sandbox_id', sandbox_id, 'external_id', external_id, 'name', name)
    FROM moved
)
SELECT count(*) FROM moved
"""
_DELETED = "SELECT count(*) FROM sandboxes WHERE status = 'deleted'"
_WAITING = "SELECT count(*) FROM sandboxes WHERE status = 'pending_deletion'"
_SIZES = """
SELECT relname::text AS name, n_dead_tup AS dead,
    pg_table_size(relid) / 1e6 AS rows_mb, pg_indexes_size(relid) / 1e6 AS indexes_mb
FROM pg_stat_user_tables WHERE relname = ANY($1)
"""


@dataclass(slots=True, kw_only=True)
class Renewed(Pool):
    """For each sandbox that has been deleted a new one comes."""

    requester: Requester
    purged: int = 0
    purges_postponed: int = 0
    catch_up_at: float = 0.0

    async def renew(self) -> None:
        while deleted := await self.connection.fetchval(_DELETE, _PIECE):
            await self.add(deleted)
        if time.monotonic() >= self.catch_up_at:
            await self.catch_up()
            self.catch_up_at = time.monotonic() + _CATCH_UP_EVERY_SEC

    async def purge(self) -> None:
        purged = await maintenance.purge_piece(self.requester, deleted_for_sec=_RETENTION_SEC)
        if purged is None:
            self.purges_postponed += 1
        else:
            self.purged += purged

    async def catch_up(self) -> None:
        """Also for those that the reaper has deleted."""
        deleted_by_all = self.purged + await self.connection.fetchval(_DELETED)
        if deleted_by_all > self.added:
            await self.add(deleted_by_all - self.added)


@dataclass(frozen=True, slots=True)
class Sample:
    """How far the run is."""

    at_sec: float
    leases: int
    memory: Mapping[str, float]
    """MB of each service."""


async def long(servers: Servers, sizes: Sizes) -> Run:
    target = servers.ours
    samples: list[Sample] = []

    async def until() -> None:
        async with target.connected() as looking:
            while samples[-1].leases < sizes.cycles:
                await asyncio.sleep(_SAMPLE_SEC)
                samples.append(await _sample(target, looking))
                if len(samples) % _FORGET_EVERY == 0:
                    servers.forget_logs()  # of a million lives they would fill a disk

    async def put() -> LoadResult:
        return await load.run_wrk(
            target.url,
            TOKEN,
            Workload(max_held=_HELD),
            connections=_CONNECTIONS,
            seconds=_LONGEST_SEC,
            until=until,
        )

    await pool.fill(target.database, _SANDBOXES)
    samples.append(await _sample(target, target.database))
    async with maintenance.asking(servers) as requester, target.connected() as connection:
        renewed = Renewed(connection, _SANDBOXES, requester=requester)
        async with (
            _vacuumed(target),
            repeated(_STEP_SEC, renewed.renew),
            repeated(_PURGE_PAUSE_SEC, renewed.purge),
        ):
            run = await meter.measure(target, put, events=True)
        await renewed.renew()
        await renewed.catch_up()
    problems = await _problems(target.database, run.load, renewed)
    further = {"records purged": renewed.purged, "purges postponed": renewed.purges_postponed}
    return run.having(problems).telling(progress(samples) | await _table_sizes(target.database) | further)


@asynccontextmanager
async def _vacuumed(target: Target) -> AsyncIterator[None]:
    """Where the server is set up without autovacuum, which production is not, this does what it would do, as gently
    and as often."""
    if await target.database.fetchval("SHOW autovacuum") == "on":
        yield
        return
    async with target.connected() as connection:
        await connection.execute("SET vacuum_cost_delay = '2ms'")
        statement = f"VACUUM (ANALYZE) {', '.join(_TABLES)}"
        async with repeated(_VACUUM_EVERY_SEC, partial(connection.execute, statement)):
            yield


async def _problems(database: asyncpg.Connection, counted: LoadResult, renewed: Renewed) -> tuple[str, ...]:
    new, released = counted.new or 0, counted.released or 0
    ended, waiting = await pool.count_ended_leases(database, "student"), await database.fetchval(_WAITING)
    found = {
        "releases were answered with 200 and have not happened": max(0, released - ended),
        "releases were answered to nobody": max(0, ended - released - _CONNECTIONS),
        "sandboxes still wait for their deletion": waiting,
    }
    return (
        *await pool.find_problems(
            database, sandboxes=renewed.sandboxes, promised=new, cut_off=_CONNECTIONS, purged=renewed.purged
        ),
        *(f"{number} {what}" for what, number in found.items() if number),
    )


async def _sample(target: Target, connection: asyncpg.Connection) -> Sample:
    return Sample(time.monotonic(), await pool.count_allocations(connection), meter.memory(target))


async def _table_sizes(database: asyncpg.Connection) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for row in await database.fetch(_SIZES, _TABLES):
        sizes[f"{row['name']}, rows MB"] = float(row["rows_mb"])
        sizes[f"{row['name']}, indexes MB"] = float(row["indexes_mb"])
        sizes[f"{row['name']}, dead rows"] = float(row["dead"])
    return sizes


def progress(samples: Sequence[Sample]) -> dict[str, float]:
    """Throughput and memory, early and late."""
    first, last = samples[0], samples[-1]
    leases = last.leases - first.leases
    middle = next(sample for sample in samples if sample.leases >= first.leases + leases / 2)
    tenth_sec = _reached(samples, 0.1) - first.at_sec
    last_tenth_sec = last.at_sec - _reached(samples, 0.9)
    figures = {
        "cycles": float(leases),
        "first tenth, cycles/s": leases / 10 / tenth_sec,
        "last tenth, cycles/s": leases / 10 / last_tenth_sec,
        "last tenth ÷ first": tenth_sec / last_tenth_sec,
    }
    for when, sample in (("start", first), ("middle", middle), ("end", last)):
        figures |= {f"{part} MB at the {when}": mb for part, mb in sample.memory.items()}
    figures["memory at the end ÷ middle"] = max(last.memory[part] / mb for part, mb in middle.memory.items())
    return figures


def _reached(samples: Sequence[Sample], share: float) -> float:
    """When so much of the leases was there, between the two samples around it in proportion."""
    wanted = samples[0].leases + share * (samples[-1].leases - samples[0].leases)
    after = next(number for number, sample in enumerate(samples) if sample.leases >= wanted)
    earlier, later = samples[max(after - 1, 0)], samples[after]
    part = (wanted - earlier.leases) / max(later.leases - earlier.leases, 1)
    return earlier.at_sec + part * (later.at_sec - earlier.at_sec)
