"""Pages of the waiting line, in the order of arrival."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.waiting import WaitingPage, WaitingStudent
from gateway.queries import cursors
from gateway.queries.sandboxes import label_unix_seconds, read_connection
from sandbox_broker.database.schema import waiting

LISTING = "waiting"
"""Name of the listing in the checksum of its cursors. A change invalidates cursors in use."""
KEY_TYPES = (int,)
"""Types of the key of a cursor: the number of the place."""

_COLUMNS = (
    waiting.c.waiting_id,
    waiting.c.holder,
    waiting.c.name_prefix,
    waiting.c.track_name,
    label_unix_seconds(waiting.c.waiting_since),
    label_unix_seconds(waiting.c.asked_at),
    label_unix_seconds(waiting.c.ends_at),
)


async def waiting_page(engine: AsyncEngine, *, limit: int, cursor: str) -> WaitingPage:
    """Return a page of the waiting line. Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE."""
    query = select(*_COLUMNS).order_by(waiting.c.waiting_id)
    if cursor:
        (after,) = cursors.decode(cursor, KEY_TYPES, LISTING)
        query = query.where(waiting.c.waiting_id > after)
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query.limit(limit + 1))).mappings().all()
    page = [WaitingStudent.model_validate(row) for row in rows[:limit]]
    next_cursor = cursors.encode([rows[limit - 1]["waiting_id"]], LISTING) if len(rows) > limit else None
    return WaitingPage(waiting=page, count=len(page), cursor=next_cursor)
