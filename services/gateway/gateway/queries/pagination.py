"""Keyset pagination: a page of a listing is a scan of one index.

All pages of a listing therefore cost the same. With several filters, the most selective filter determines the
index. The query then examines at most MAX_EXAMINED rows for the other filters. A page may therefore hold fewer rows
than `limit`, or no rows, and still have a cursor. The last page has no cursor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    RowMapping,
    ScalarSelect,
    Table,
    func,
    literal,
    select,
    true,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.queries import cursors
from gateway.queries.sandboxes import read_connection
from sandbox_broker.database.schema import leases, sandboxes

MAX_EXAMINED = 1_000
"""Limit of rows to examine for one page, if there are several filters."""

EVERY_ROW = true()


@dataclass(frozen=True, slots=True)
class IndexScan:
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
            return EVERY_ROW
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


async def fetch_page(
    engine: AsyncEngine,
    scan: IndexScan,
    columns: Sequence[ColumnElement[Any]],
    required: Table,
    other_conditions: Sequence[ColumnElement[bool]],
    *,
    limit: int,
    cursor: str,
    wanted: object,
) -> tuple[Sequence[RowMapping], str | None]:
    """Return the rows of a page, and the cursor of the next page or None. `wanted` are the filters: the cursor
    contains a checksum of their repr.

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
