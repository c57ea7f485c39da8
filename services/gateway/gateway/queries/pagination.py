"""Keyset pagination of sandboxes, allocations and grouped statistics.

Each page is a scan of one index, so all pages of a listing cost the same. With several filters, the most selective
filter determines the index. The query then examines at most MAX_EXAMINED rows for the other filters. A page may
therefore hold fewer rows than `limit`, or no rows, and still have a cursor. The last page has no cursor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Label,
    RowMapping,
    ScalarSelect,
    Table,
    Text,
    func,
    literal,
    literal_column,
    select,
    true,
    tuple_,
    union,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas import Allocation, Allocations, GroupedStats, SandboxPage, SandboxSummary, StatsGroup
from gateway.queries import cursors
from gateway.queries.sandboxes import ZERO_COUNTS, pool_stats, read_connection, unix_seconds
from sandbox_broker.contract.types import SandboxStatus
from sandbox_broker.database.schema import leases, pool_changes, pool_counts, prefix_end, sandboxes

MAX_EXAMINED = 1_000
"""Limit of rows to examine for one page, if there are several filters."""

SPARSE_STATUSES: frozenset[SandboxStatus] = frozenset({"pending_deletion", "deletion_failed", "stale"})
"""Statuses of few sandboxes."""

# The expressions of the indexes. Other expressions would not match the indexes.
_holder = literal_column("('' || leases.holder)", Text())
_sandbox_id = literal_column("('' || sandboxes.sandbox_id)", Text())
_lease_id = literal_column("(0 + leases.lease_id)", BigInteger())

_ALL = true()

GroupedBy = Literal["track_name", "name_prefix"]
GROUP_KEY_TYPES = (str,)
"""Types of the key of a cursor of groups: the value of the group."""


@dataclass(frozen=True, slots=True)
class SandboxFilter:
    """Filters of the sandbox listing. Cursors contain a checksum of the repr, so every change invalidates them."""

    status: SandboxStatus | None = None
    name_prefix: str | None = None
    track_name: str | None = None
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class AllocationFilter:
    """Filters of the allocation listing. Cursors contain a checksum of the repr, as in SandboxFilter."""

    track_name: str | None = None
    holder: str | None = None
    since: int | None = None
    """Unix seconds, inclusive."""
    until: int | None = None
    """Unix seconds, exclusive."""


@dataclass(frozen=True, slots=True)
class _IndexScan:
    """Scan of one index in the order of `key`, the columns of the index."""

    table: Table
    key: Sequence[ColumnElement[Any]]
    conditions: Sequence[ColumnElement[bool]] = ()
    first: Any = None
    """Bound of the first column of the key: inclusive minimum, or exclusive maximum if `descending`."""
    descending: bool = False

    @property
    def types(self) -> list[type]:
        """Python types of the key, for its cursors."""
        return [part.type.python_type for part in self.key]

    def lower_bound(self, key: Sequence[Any] | None) -> ColumnElement[bool]:
        """Return the condition for the start of the scan: after `key` (from a cursor), or at `first` without a key.

        The condition has one bound only, because PostgreSQL may start the scan at either of two bounds and filter
        the rows up to the other. Raises ApiError INVALID_CURSOR for a key before `first`.
        """
        if key is not None:
            if self.first is not None and (key[0] >= self.first if self.descending else key[0] < self.first):
                raise cursors.invalid_cursor()
            return self.after(key)
        if self.first is None:
            return _ALL
        column = self.key[0]
        condition: ColumnElement[bool] = column < self.first if self.descending else column >= self.first
        return condition

    def after(self, key: Sequence[Any]) -> ColumnElement[bool]:
        """Return the condition for rows after `key` in the order of the scan."""
        columns, values = tuple_(*self.key), tuple_(*map(literal, key))
        return columns < values if self.descending else columns > values

    def order(self, key: Sequence[ColumnElement[Any]], *, backwards: bool = False) -> list[ColumnElement[Any]]:
        """Return the ORDER BY clause for `key`, the columns of the scan's key in another relation."""
        return [part.desc() if self.descending != backwards else part.asc() for part in key]


_NEWEST_LEASE = (leases.c.allocated_at, _lease_id)


def _unix_seconds_of(column: ColumnElement[datetime]) -> Label[Any]:
    return unix_seconds(column).label(column.name)


_SUMMARY = (
    sandboxes.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    sandboxes.c.sfdc_account_id,
    sandboxes.c.status,
    _unix_seconds_of(sandboxes.c.status_since),
    _unix_seconds_of(sandboxes.c.missing_since),
    _unix_seconds_of(sandboxes.c.deletion_requested_at),
    sandboxes.c.deletion_attempts,
    sandboxes.c.deletion_error,
    leases.c.holder,
    leases.c.track_name,
    _unix_seconds_of(leases.c.allocated_at),
    _unix_seconds_of(leases.c.expires_at),
)

_ALLOCATION = (
    leases.c.lease_id,
    leases.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    leases.c.holder,
    leases.c.track_name,
    _unix_seconds_of(leases.c.allocated_at),
    _unix_seconds_of(leases.c.expires_at),
    _unix_seconds_of(leases.c.ended_at),
    func.floor(func.extract("epoch", func.coalesce(leases.c.ended_at, func.now()) - leases.c.allocated_at)).label(
        "duration_sec"
    ),
    leases.c.end_reason,
    leases.c.end_note,
)


async def sandboxes_page(engine: AsyncEngine, wanted: SandboxFilter, *, limit: int, cursor: str) -> SandboxPage:
    """Return a page of sandboxes. The most selective filter determines the order.

    The order is: for a holder or track the newest lease first, for a name prefix by name, for the status
    `allocated` by expiry, for any other status the oldest first, and without filters by sandbox id. Raises ApiError
    INVALID_CURSOR or DATABASE_UNAVAILABLE.
    """
    filters = _rank_filters(wanted)
    scan = filters[0][0] if filters else _IndexScan(sandboxes, [sandboxes.c.sandbox_id])
    other_conditions = [condition for _, condition in filters[1:]]
    rows, next_cursor = await _fetch_page(
        engine, scan, _SUMMARY, sandboxes, other_conditions, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [SandboxSummary.model_validate(row) for row in rows]
    return SandboxPage(sandboxes=page, count=len(page), cursor=next_cursor)


def _rank_filters(wanted: SandboxFilter) -> list[tuple[_IndexScan, ColumnElement[bool]]]:
    """Return the scan and the condition of each filter, the most selective filter first.

    The first filter needs its scan only. The conditions of the others apply to the rows of this scan.
    """
    ranked: list[tuple[_IndexScan, ColumnElement[bool]]] = []
    if wanted.holder is not None:
        ranked.append((_IndexScan(leases, _NEWEST_LEASE, [_holder == wanted.holder], descending=True), _ALL))
    if wanted.track_name is not None:
        in_track = leases.c.track_name == wanted.track_name
        ranked.append((_IndexScan(leases, _NEWEST_LEASE, [in_track], descending=True), in_track))
    if wanted.name_prefix is not None:
        min_name = sandboxes.c.name >= wanted.name_prefix
        max_name = sandboxes.c.name < prefix_end(wanted.name_prefix)
        name_scan = _IndexScan(sandboxes, (sandboxes.c.name, _sandbox_id), [max_name], wanted.name_prefix)
        ranked.append((name_scan, min_name & max_name))
    if wanted.status is not None:
        status_filter = _status_scan(wanted.status), sandboxes.c.status == wanted.status
        ranked.insert(
            0 if wanted.status in SPARSE_STATUSES and wanted.holder is None else len(ranked), status_filter
        )
    return ranked


def _status_scan(status: SandboxStatus) -> _IndexScan:
    if status == "available":
        since = sandboxes.c.available_since
        return _IndexScan(sandboxes, (since, sandboxes.c.sandbox_id), [since.is_not(None)])
    if status == "allocated":
        return _IndexScan(leases, (leases.c.expires_at, leases.c.lease_id), [leases.c.end_reason.is_(None)])
    # A literal instead of a parameter, because it must match the condition of the partial index.
    key = (sandboxes.c.status_since, sandboxes.c.sandbox_id)
    return _IndexScan(sandboxes, key, [sandboxes.c.status == literal_column(f"'{status}'")])


async def allocations_page(
    engine: AsyncEngine, wanted: AllocationFilter, *, limit: int, cursor: str
) -> Allocations:
    """Return a page of leases, newest first. Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE."""
    in_track = leases.c.track_name == wanted.track_name
    scan_conditions: list[ColumnElement[bool]] = []
    other_conditions: list[ColumnElement[bool]] = []
    if wanted.holder is not None:
        scan_conditions.append(_holder == wanted.holder)
    if wanted.track_name is not None:
        (scan_conditions if wanted.holder is None else other_conditions).append(in_track)
    if wanted.since is not None:
        scan_conditions.append(leases.c.allocated_at >= _datetime(wanted.since))
    until = None if wanted.until is None else _datetime(wanted.until)
    scan = _IndexScan(leases, _NEWEST_LEASE, scan_conditions, until, descending=True)
    rows, next_cursor = await _fetch_page(
        engine, scan, _ALLOCATION, leases, other_conditions, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [Allocation.model_validate(row) for row in rows]
    return Allocations(allocations=page, count=len(page), cursor=next_cursor)


async def _fetch_page(
    engine: AsyncEngine,
    scan: _IndexScan,
    columns: Sequence[ColumnElement[Any]],
    required: Table,
    other_conditions: Sequence[ColumnElement[bool]],
    *,
    limit: int,
    cursor: str,
    wanted: SandboxFilter | AllocationFilter,
) -> tuple[Sequence[RowMapping], str | None]:
    """Return the rows of a page, and the cursor of the next page or None.

    Each row has a record in the table `required`; its record in the other table is optional. A lease remains after
    the purge of its sandbox, and many sandboxes have no lease.
    """
    lower_bound = scan.lower_bound(cursors.decode(cursor, scan.types, wanted) if cursor else None)
    examined = MAX_EXAMINED if other_conditions else limit + 1
    keys = [f"key_{index}" for index in range(len(scan.key))]
    looked = (
        select(scan.table.c.sandbox_id, *(part.label(key) for part, key in zip(scan.key, keys, strict=True)))
        .where(*scan.conditions, lower_bound)
        .order_by(*scan.order(scan.key))
        .limit(examined)
        .cte("looked")
    )
    last = (
        select(*(looked.c[key].label(f"last_{key}") for key in keys), _count_of(looked).label("looked"))
        .order_by(*scan.order([looked.c[key] for key in keys], backwards=True))
        .limit(1)
        .subquery("last")
    )
    optional = leases if required is sandboxes else sandboxes
    joined = looked.join(required, required.c.sandbox_id == looked.c.sandbox_id)
    joined = joined.outerjoin(optional, optional.c.sandbox_id == looked.c.sandbox_id)
    shown = (
        select(*columns, *(looked.c[key] for key in keys))
        .select_from(joined)
        .where(*other_conditions)
        .order_by(*scan.order([looked.c[key] for key in keys]))
        .limit(limit + 1)
        .subquery("shown")
    )
    query = (
        select(last, shown)
        .select_from(last.outerjoin(shown, true()))
        .order_by(*scan.order([shown.c[key] for key in keys]))
    )
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query)).mappings().all()
    page = [row for row in rows if row["sandbox_id"] is not None]
    if len(page) > limit:
        next_key = [page[limit - 1][key] for key in keys]
    elif rows and rows[0]["looked"] == examined:
        next_key = [rows[0][f"last_{key}"] for key in keys]
    else:
        return page, None
    return page[:limit], cursors.encode(next_key, wanted)


def _count_of(looked: CTE) -> ScalarSelect[int]:
    return select(func.count()).select_from(looked).scalar_subquery()


def _datetime(timestamp: int) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)


async def grouped_stats(engine: AsyncEngine, by: GroupedBy, *, limit: int, cursor: str) -> GroupedStats:
    """Return the pool statistics and a page of groups, in the byte order of their values.

    Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE.
    """
    after = cursors.decode(cursor, GROUP_KEY_TYPES, by)[0] if cursor else ""
    counted = pool_counts.c.value
    changed = (pool_changes.c.track_name if by == "track_name" else pool_changes.c.stem).collate("C")
    summed = select(counted).where(pool_counts.c.kind == by, counted >= after if not cursor else counted > after)
    unsummed = select(changed).where(changed >= after if not cursor else changed > after)
    first_values = summed.distinct().order_by(counted).limit(limit + 1).subquery()
    values = union(select(first_values), unsummed).subquery()
    async with read_connection(engine) as connection:
        page = (await connection.scalars(select(values.c[0]).order_by(values.c[0]).limit(limit + 1))).all()
        numbers = union_all(
            select(counted.label("value"), pool_counts.c.status, pool_counts.c.number).where(
                pool_counts.c.kind == by, counted.in_(page[:limit])
            ),
            select(changed, pool_changes.c.status, pool_changes.c.number).where(changed.in_(page[:limit])),
        ).subquery()
        rows = await connection.execute(
            select(numbers.c.value, numbers.c.status, func.sum(numbers.c.number)).group_by(
                numbers.c.value, numbers.c.status
            )
        )
        counts_by_value: dict[str, dict[str, int]] = {value: {} for value in page[:limit]}
        for value, status, number in rows:
            counts_by_value[value][status] = int(number)
    groups_with_sandboxes = [
        StatsGroup(value=value, total=sum(counts.values()), **{**ZERO_COUNTS, **counts})
        for value, counts in counts_by_value.items()
        if any(counts.values())
    ]
    total = await pool_stats(engine)
    next_cursor = cursors.encode([page[limit - 1]], by) if len(page) > limit else None
    return GroupedStats(**total.model_dump(), by=by, groups=groups_with_sandboxes, cursor=next_cursor)
