"""What the gateway reads page by page. Each page is found along one index and costs the same wherever it is.

Where several filters are given, the narrowest is the one that has the index; rows are looked at for the others,
1,000 a page at most. So a page may hold fewer rows than were asked for, or
none, and still have a cursor: the listing has ended when there is none.
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
from gateway.queries.sandboxes import NONE_OF_EACH, reading, seconds, stats
from sandbox_broker.contract.types import SandboxStatus
from sandbox_broker.database.schema import leases, pool_changes, pool_counts, prefix_end, sandboxes

LOOK = 1_000
"""Rows that are looked at for one page."""

FEW: frozenset[SandboxStatus] = frozenset({"pending_deletion", "deletion_failed", "stale"})
"""States that few sandboxes are in."""

# As the indexes have them.
_holder = literal_column("('' || leases.holder)", Text())
_sandbox_id = literal_column("('' || sandboxes.sandbox_id)", Text())
_lease_id = literal_column("(0 + leases.lease_id)", BigInteger())

_ALL = true()

GroupedBy = Literal["track_name", "name_prefix"]
GROUP_KEY = (str,)
"""The value of the group."""


@dataclass(frozen=True, slots=True)
class SandboxFilter:
    status: SandboxStatus | None = None
    name_prefix: str | None = None
    track_name: str | None = None
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class AllocationFilter:
    track_name: str | None = None
    holder: str | None = None
    since: int | None = None
    """Unix seconds; this one counts."""
    until: int | None = None
    """Unix seconds; this one counts no more."""


@dataclass(frozen=True, slots=True)
class _Way:
    """An index to walk along: `key` is what it is ordered by."""

    table: Table
    key: Sequence[ColumnElement[Any]]
    within: Sequence[ColumnElement[bool]] = ()
    first: Any = None
    """Bound of the first part of the key: it is `first` or greater, or, descending, less than `first`."""
    descending: bool = False

    @property
    def types(self) -> list[type]:
        """The Python types of the key, for its cursors."""
        return [part.type.python_type for part in self.key]

    def begins(self, key: Sequence[Any] | None) -> ColumnElement[bool]:
        """Return the condition where the walk begins: after `key`, which a cursor holds, or else at `first`.

        Only one of both, because of two bounds the database would take either and walk to the other. A key before
        `first` is therefore refused: ApiError INVALID_CURSOR.
        """
        if key is not None:
            if self.first is not None and (key[0] >= self.first if self.descending else key[0] < self.first):
                raise cursors.invalid_cursor()
            return self.after(key)
        if self.first is None:
            return _ALL
        here = self.key[0]
        condition: ColumnElement[bool] = here < self.first if self.descending else here >= self.first
        return condition

    def after(self, key: Sequence[Any]) -> ColumnElement[bool]:
        here, there = tuple_(*self.key), tuple_(*map(literal, key))
        return here < there if self.descending else here > there

    def order(self, key: Sequence[ColumnElement[Any]], *, backwards: bool = False) -> list[ColumnElement[Any]]:
        return [part.desc() if self.descending != backwards else part.asc() for part in key]


_NEWEST_LEASE = (leases.c.allocated_at, _lease_id)


def _seconds_of(column: ColumnElement[datetime]) -> Label[Any]:
    return seconds(column).label(column.name)


_SUMMARY = (
    sandboxes.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    sandboxes.c.sfdc_account_id,
    sandboxes.c.status,
    _seconds_of(sandboxes.c.status_since),
    _seconds_of(sandboxes.c.missing_since),
    _seconds_of(sandboxes.c.deletion_requested_at),
    sandboxes.c.deletion_attempts,
    sandboxes.c.deletion_error,
    leases.c.holder,
    leases.c.track_name,
    _seconds_of(leases.c.allocated_at),
    _seconds_of(leases.c.expires_at),
)

_ALLOCATION = (
    leases.c.lease_id,
    leases.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    leases.c.holder,
    leases.c.track_name,
    _seconds_of(leases.c.allocated_at),
    _seconds_of(leases.c.expires_at),
    _seconds_of(leases.c.ended_at),
    func.floor(func.extract("epoch", func.coalesce(leases.c.ended_at, func.now()) - leases.c.allocated_at)).label(
        "duration_sec"
    ),
    leases.c.end_reason,
    leases.c.end_note,
)


async def sandboxes_page(engine: AsyncEngine, wanted: SandboxFilter, *, limit: int, cursor: str) -> SandboxPage:
    """In the order of the filter that has the index: the newest lease first for a student or a track, by name for a
    prefix, the oldest first for a state; without filters by sandbox id. Raises ApiError INVALID_CURSOR."""
    filters = _filters(wanted)
    way = filters[0][0] if filters else _Way(sandboxes, [sandboxes.c.sandbox_id])
    others = [condition for _, condition in filters[1:]]
    rows, following = await _page(
        engine, way, _SUMMARY, sandboxes, others, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [SandboxSummary.model_validate(row) for row in rows]
    return SandboxPage(sandboxes=page, count=len(page), cursor=following)


def _filters(wanted: SandboxFilter) -> list[tuple[_Way, ColumnElement[bool]]]:
    """Of each filter that is given, the narrowest first, its way, and its condition where another has the way."""
    found: list[tuple[_Way, ColumnElement[bool]]] = []
    if wanted.holder is not None:
        found.append((_Way(leases, _NEWEST_LEASE, [_holder == wanted.holder], descending=True), _ALL))
    if wanted.track_name is not None:
        of_track = leases.c.track_name == wanted.track_name
        found.append((_Way(leases, _NEWEST_LEASE, [of_track], descending=True), of_track))
    if wanted.name_prefix is not None:
        starts = sandboxes.c.name >= wanted.name_prefix
        ends = sandboxes.c.name < prefix_end(wanted.name_prefix)
        by_name = _Way(sandboxes, (sandboxes.c.name, _sandbox_id), [ends], wanted.name_prefix)
        found.append((by_name, starts & ends))
    if wanted.status is not None:
        by_status = _way_of(wanted.status), sandboxes.c.status == wanted.status
        found.insert(0 if wanted.status in FEW and wanted.holder is None else len(found), by_status)
    return found


def _way_of(status: SandboxStatus) -> _Way:
    if status == "available":
        since = sandboxes.c.available_since
        return _Way(sandboxes, (since, sandboxes.c.sandbox_id), [since.is_not(None)])
    if status == "allocated":
        return _Way(leases, (leases.c.expires_at, leases.c.lease_id), [leases.c.end_reason.is_(None)])
    # A literal, as the condition of the index has it.
    key = (sandboxes.c.status_since, sandboxes.c.sandbox_id)
    return _Way(sandboxes, key, [sandboxes.c.status == literal_column(f"'{status}'")])


async def allocations_page(
    engine: AsyncEngine, wanted: AllocationFilter, *, limit: int, cursor: str
) -> Allocations:
    """The newest first. Raises ApiError INVALID_CURSOR."""
    of_track = leases.c.track_name == wanted.track_name
    within: list[ColumnElement[bool]] = []
    others: list[ColumnElement[bool]] = []
    if wanted.holder is not None:
        within.append(_holder == wanted.holder)
    if wanted.track_name is not None:
        (within if wanted.holder is None else others).append(of_track)
    if wanted.since is not None:
        within.append(leases.c.allocated_at >= _time(wanted.since))
    until = None if wanted.until is None else _time(wanted.until)
    way = _Way(leases, _NEWEST_LEASE, within, until, descending=True)
    rows, following = await _page(
        engine, way, _ALLOCATION, leases, others, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [Allocation.model_validate(row) for row in rows]
    return Allocations(allocations=page, count=len(page), cursor=following)


async def _page(
    engine: AsyncEngine,
    way: _Way,
    columns: Sequence[ColumnElement[Any]],
    of: Table,
    others: Sequence[ColumnElement[bool]],
    *,
    limit: int,
    cursor: str,
    wanted: SandboxFilter | AllocationFilter,
) -> tuple[Sequence[RowMapping], str | None]:
    """The rows of a page, and the cursor of the next, or None at the end. `of`: what each row has for certain. The
    lease of a record that has been purged has no sandbox, and many sandboxes have no lease."""
    begins = way.begins(cursors.decode(cursor, way.types, wanted) if cursor else None)
    look = LOOK if others else limit + 1
    keys = [f"key_{place}" for place in range(len(way.key))]
    looked = (
        select(way.table.c.sandbox_id, *(part.label(key) for part, key in zip(way.key, keys, strict=True)))
        .where(*way.within, begins)
        .order_by(*way.order(way.key))
        .limit(look)
        .cte("looked")
    )
    last = (
        select(*(looked.c[key].label(f"last_{key}") for key in keys), _count_of(looked).label("looked"))
        .order_by(*way.order([looked.c[key] for key in keys], backwards=True))
        .limit(1)
        .subquery("last")
    )
    other = leases if of is sandboxes else sandboxes
    found = looked.join(of, of.c.sandbox_id == looked.c.sandbox_id)
    found = found.outerjoin(other, other.c.sandbox_id == looked.c.sandbox_id)
    shown = (
        select(*columns, *(looked.c[key] for key in keys))
        .select_from(found)
        .where(*others)
        .order_by(*way.order([looked.c[key] for key in keys]))
        .limit(limit + 1)
        .subquery("shown")
    )
    query = (
        select(last, shown)
        .select_from(last.outerjoin(shown, true()))
        .order_by(*way.order([shown.c[key] for key in keys]))
    )
    async with reading(engine) as connection:
        rows = (await connection.execute(query)).mappings().all()
    page = [row for row in rows if row["sandbox_id"] is not None]
    if len(page) > limit:
        following = [page[limit - 1][key] for key in keys]
    elif rows and rows[0]["looked"] == look:
        following = [rows[0][f"last_{key}"] for key in keys]
    else:
        return page, None
    return page[:limit], cursors.encode(following, wanted)


def _count_of(looked: CTE) -> ScalarSelect[int]:
    return select(func.count()).select_from(looked).scalar_subquery()


def _time(unix_seconds: int) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)


async def grouped_stats(engine: AsyncEngine, by: GroupedBy, *, limit: int, cursor: str) -> GroupedStats:
    """The groups by their values, in byte order. Raises ApiError INVALID_CURSOR."""
    after = cursors.decode(cursor, GROUP_KEY, by)[0] if cursor else ""
    counted = pool_counts.c.value
    changed = (pool_changes.c.track_name if by == "track_name" else pool_changes.c.stem).collate("C")
    added_up = select(counted).where(pool_counts.c.kind == by, counted >= after if not cursor else counted > after)
    logged = select(changed).where(changed >= after if not cursor else changed > after)
    some = added_up.distinct().order_by(counted).limit(limit + 1).subquery()
    values = union(select(some), logged).subquery()
    async with reading(engine) as connection:
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
        groups: dict[str, dict[str, int]] = {value: {} for value in page[:limit]}
        for value, status, number in rows:
            groups[value][status] = int(number)
    shown = [
        StatsGroup(value=value, total=sum(counts.values()), **{**NONE_OF_EACH, **counts})
        for value, counts in groups.items()
        if any(counts.values())
    ]
    whole = await stats(engine)
    following = cursors.encode([page[limit - 1]], by) if len(page) > limit else None
    return GroupedStats(**whole.model_dump(), by=by, groups=shown, cursor=following)
