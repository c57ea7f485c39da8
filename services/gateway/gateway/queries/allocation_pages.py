"""Pages of allocations: the leases, newest first."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import BigInteger, ColumnElement, Text, func, literal_column
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import Allocation, Allocations
from gateway.queries.pagination import IndexScan, fetch_page
from gateway.queries.sandboxes import LEASE_DETAILS, label_unix_seconds
from sandbox_broker.database.schema import leases, sandboxes

# The expressions of the indexes. Other expressions would not match the indexes.
indexed_holder = literal_column("('' || leases.holder)", Text())
_lease_id = literal_column("(0 + leases.lease_id)", BigInteger())

NEWEST_LEASE = (leases.c.allocated_at, _lease_id)

_COLUMNS = (
    leases.c.lease_id,
    leases.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    leases.c.holder,
    leases.c.track_name,
    label_unix_seconds(leases.c.allocated_at),
    label_unix_seconds(leases.c.expires_at),
    label_unix_seconds(leases.c.ended_at),
    func.floor(func.extract("epoch", func.coalesce(leases.c.ended_at, func.now()) - leases.c.allocated_at)).label(
        "duration_sec"
    ),
    leases.c.end_reason,
    leases.c.end_note,
    *LEASE_DETAILS,
)


LATEST = 253_402_300_799
"""Last second of the year 9999, in Unix seconds: the last that Python's datetime has."""


@dataclass(frozen=True, slots=True)
class AllocationFilter:
    """Filters of the allocation listing. Cursors contain a checksum of the repr, as in
    SandboxFilter."""

    track_name: str | None = None
    holder: str | None = None
    since: int | None = None
    """Unix seconds, inclusive."""
    until: int | None = None
    """Unix seconds, exclusive."""
    held_at: int | None = None
    """Unix seconds: leases that had begun and had not ended."""


async def allocations_page(
    engine: AsyncEngine, wanted: AllocationFilter, *, limit: int, cursor: str
) -> Allocations:
    """Return a page of leases, newest first. Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE."""
    in_track = leases.c.track_name == wanted.track_name
    scan_conditions: list[ColumnElement[bool]] = []
    other_conditions: list[ColumnElement[bool]] = []
    if wanted.holder is not None:
        scan_conditions.append(indexed_holder == wanted.holder)
    if wanted.track_name is not None:
        (scan_conditions if wanted.holder is None else other_conditions).append(in_track)
    if wanted.since is not None:
        scan_conditions.append(leases.c.allocated_at >= _datetime(wanted.since))
    until = None if wanted.until is None else _datetime(wanted.until)
    if wanted.held_at is not None:
        held_at = _datetime(wanted.held_at)
        begun_before = _datetime(min(wanted.held_at + 1, LATEST))
        until = begun_before if until is None else min(until, begun_before)
        other_conditions.append(leases.c.ended_at.is_(None) | (leases.c.ended_at > held_at))
    scan = IndexScan(leases, NEWEST_LEASE, scan_conditions, until, descending=True)
    rows, next_cursor = await fetch_page(
        engine, scan, _COLUMNS, leases, other_conditions, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [Allocation.model_validate(row) for row in rows]
    return Allocations(allocations=page, count=len(page), cursor=next_cursor)


def _datetime(timestamp: int) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)
