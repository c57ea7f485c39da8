"""Pool statistics grouped by track or name prefix, with keyset pagination."""

from typing import Literal

from sqlalchemy import func, select, union, union_all
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import GroupedStats, StatsGroup
from gateway.queries import cursors
from gateway.queries.sandboxes import ZERO_COUNTS, pool_stats, read_connection
from sandbox_broker.database.schema import pool_changes, pool_counts

GroupedBy = Literal["track_name", "name_prefix"]
GROUP_KEY_TYPES = (str,)
"""Types of the key of a cursor of groups: the value of the group."""


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
