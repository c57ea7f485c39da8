"""Soak test: a million sandboxes from discovery to purge, to detect growth of memory, tables and latency.

Students allocate and release over HTTP. The real path of a released sandbox through the reaper, CSP and the
csp-syncer is throttled and takes seconds, so SQL takes it instead: it makes the same row changes and writes the
same events as the allocator. Each sandbox that is pending deletion becomes deleted and is replaced by a new one.
The reaper runs too and deletes as many sandboxes as its throttle allows. The allocator purges the records of
deleted sandboxes on the csp-syncer's command, after ten seconds instead of 30 days.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import asyncpg

from bench import load, maintenance, meter, pool
from bench.load import LoadResult, Workload
from bench.meter import Run
from bench.replenish import GrowingPool, run_periodically
from bench.servers import TOKEN, Servers, Target
from bench.sizes import Sizes
from sandbox_broker.messaging.rpc_client import RpcClient

_SANDBOXES = 20_000
_MAX_HELD = 1_000
"""Sandboxes held by students at any moment."""
_CONNECTIONS = 50
_MAX_DURATION_SEC = 3_600
_REPLACE_INTERVAL_SEC = 0.05
_BATCH_SIZE = 1_000
_SAMPLE_INTERVAL_SEC = 0.5
_SAMPLES_PER_LOG_TRUNCATION = 20
_RETENTION_SEC = 10.0
_PURGE_PAUSE_SEC = 0.1
_REAPER_CHECK_INTERVAL_SEC = 10.0
_VACUUM_INTERVAL_SEC = 60.0
_TABLES = ("sandboxes", "leases", "outbox")

# Changes the same rows as the allocator does for a deletion, in batches. It waits for locked rows, because the
# reaper may be claiming them: SKIP LOCKED would leave such a sandbox undeleted after the last batch.
_DELETE_BATCH = """
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
_COUNT_DELETED = "SELECT count(*) FROM sandboxes WHERE status = 'deleted'"
_COUNT_PENDING = "SELECT count(*) FROM sandboxes WHERE status = 'pending_deletion'"
_TABLE_SIZES = """
SELECT relname::text AS name, n_dead_tup AS dead,
    pg_table_size(relid) / 1e6 AS rows_mb, pg_indexes_size(relid) / 1e6 AS indexes_mb
FROM pg_stat_user_tables WHERE relname = ANY($1)
"""


@dataclass(slots=True, kw_only=True)
class RenewedPool(GrowingPool):
    """Pool in which a new sandbox replaces each deleted one."""

    rpc_client: RpcClient
    purged: int = 0
    purges_postponed: int = 0
    reaper_check_at: float = 0.0

    async def replace_released(self) -> None:
        """Delete and replace all sandboxes with the status `pending_deletion`."""
        while deleted := await self.connection.fetchval(_DELETE_BATCH, _BATCH_SIZE):
            await self.add_sandboxes(deleted)
        if time.monotonic() >= self.reaper_check_at:
            await self.replace_deleted_by_reaper()
            self.reaper_check_at = time.monotonic() + _REAPER_CHECK_INTERVAL_SEC

    async def replace_deleted_by_reaper(self) -> None:
        deleted_total = self.purged + await self.connection.fetchval(_COUNT_DELETED)
        if deleted_total > self.added:
            await self.add_sandboxes(deleted_total - self.added)

    async def purge_batch(self) -> None:
        purged = await maintenance.purge_batch(self.rpc_client, deleted_for_sec=_RETENTION_SEC)
        if purged is None:
            self.purges_postponed += 1
        else:
            self.purged += purged


@dataclass(frozen=True, slots=True)
class Sample:
    """Progress and memory at one moment of the run."""

    at_sec: float
    leases: int
    memory: Mapping[str, float]
    """Resident memory of each service in MB."""


async def run_soak(servers: Servers, sizes: Sizes) -> Run:
    target = servers.broker
    samples: list[Sample] = []

    async def sample_until_done() -> None:
        async with target.connect() as connection:
            while samples[-1].leases < sizes.cycles:
                await asyncio.sleep(_SAMPLE_INTERVAL_SEC)
                samples.append(await _take_sample(target, connection))
                if len(samples) % _SAMPLES_PER_LOG_TRUNCATION == 0:
                    servers.truncate_logs()  # the logs of a million cycles would fill the disk

    async def generate_load() -> LoadResult:
        return await load.run_wrk(
            target.url,
            TOKEN,
            Workload(max_held=_MAX_HELD),
            connections=_CONNECTIONS,
            seconds=_MAX_DURATION_SEC,
            until=sample_until_done,
        )

    await pool.fill(target.database, _SANDBOXES)
    samples.append(await _take_sample(target, target.database))
    async with maintenance.connect_rpc_client(servers) as rpc_client, target.connect() as connection:
        renewed = RenewedPool(connection, _SANDBOXES, rpc_client=rpc_client)
        async with (
            _vacuum_periodically(target),
            run_periodically(_REPLACE_INTERVAL_SEC, renewed.replace_released),
            run_periodically(_PURGE_PAUSE_SEC, renewed.purge_batch),
        ):
            run = await meter.measure_load(target, generate_load, has_events=True)
        await renewed.replace_released()
        await renewed.replace_deleted_by_reaper()
    problems = await _find_problems(target.database, run.load, renewed)
    purge_figures = {"records purged": renewed.purged, "purges postponed": renewed.purges_postponed}
    table_figures = await _read_table_sizes(target.database)
    return run.with_problems(problems).with_figures(summarize_samples(samples) | table_figures | purge_figures)


@asynccontextmanager
async def _vacuum_periodically(target: Target) -> AsyncIterator[None]:
    """Vacuum during the block if the server runs without autovacuum, unlike production.

    Cost delay and interval are autovacuum's defaults.
    """
    if await target.database.fetchval("SHOW autovacuum") == "on":
        yield
        return
    async with target.connect() as connection:
        await connection.execute("SET vacuum_cost_delay = '2ms'")
        statement = f"VACUUM (ANALYZE) {', '.join(_TABLES)}"
        async with run_periodically(_VACUUM_INTERVAL_SEC, partial(connection.execute, statement)):
            yield


async def _find_problems(database: asyncpg.Connection, result: LoadResult, renewed: RenewedPool) -> tuple[str, ...]:
    new, released = result.new or 0, result.released or 0
    ended = await pool.count_ended_leases(database, "student")
    pending = await database.fetchval(_COUNT_PENDING)
    counts = {
        "confirmed releases are missing": max(0, released - ended),
        "releases were not confirmed to a client": max(0, ended - released - _CONNECTIONS),
        "sandboxes are still pending deletion": pending,
    }
    return (
        *await pool.find_problems(
            database, sandboxes=renewed.sandboxes, confirmed=new, cut_off=_CONNECTIONS, purged=renewed.purged
        ),
        *(f"{count} {problem}" for problem, count in counts.items() if count),
    )


async def _take_sample(target: Target, connection: asyncpg.Connection) -> Sample:
    return Sample(time.monotonic(), await pool.count_allocations(connection), meter.read_memory(target))


async def _read_table_sizes(database: asyncpg.Connection) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row in await database.fetch(_TABLE_SIZES, _TABLES):
        figures[f"{row['name']}, rows MB"] = float(row["rows_mb"])
        figures[f"{row['name']}, indexes MB"] = float(row["indexes_mb"])
        figures[f"{row['name']}, dead rows"] = float(row["dead"])
    return figures


def summarize_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Compare throughput and memory between the beginning and the end of the run."""
    first, last = samples[0], samples[-1]
    leases = last.leases - first.leases
    middle = next(sample for sample in samples if sample.leases >= first.leases + leases / 2)
    first_tenth_sec = _interpolate_time(samples, 0.1) - first.at_sec
    last_tenth_sec = last.at_sec - _interpolate_time(samples, 0.9)
    figures = {
        "cycles": float(leases),
        "first tenth, cycles/s": leases / 10 / first_tenth_sec,
        "last tenth, cycles/s": leases / 10 / last_tenth_sec,
        "last tenth ÷ first": first_tenth_sec / last_tenth_sec,
    }
    for moment, sample in (("start", first), ("middle", middle), ("end", last)):
        figures |= {f"{component} MB at the {moment}": mb for component, mb in sample.memory.items()}
    figures["memory at the end ÷ middle"] = max(
        last.memory[component] / mb for component, mb in middle.memory.items()
    )
    return figures


def _interpolate_time(samples: Sequence[Sample], fraction: float) -> float:
    """Return the time at which `fraction` of the leases existed, interpolated between two samples."""
    leases = samples[0].leases + fraction * (samples[-1].leases - samples[0].leases)
    index = next(number for number, sample in enumerate(samples) if sample.leases >= leases)
    earlier, later = samples[max(index - 1, 0)], samples[index]
    weight = (leases - earlier.leases) / max(later.leases - earlier.leases, 1)
    return earlier.at_sec + weight * (later.at_sec - earlier.at_sec)
