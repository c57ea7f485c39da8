"""Replay of events from the history of the sandboxes."""

from dataclasses import dataclass

from sqlalchemy import RowMapping, Text, cast, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.event_feed import StreamedEvent
from gateway.queries.sandboxes import read_connection
from sandbox_broker.contract.events import encode_event
from sandbox_broker.database.schema import history, outbox

MAX_REPLAYED = 1000
OVERLAP = 100
"""Events before the last one that are repeated. Statements that run at the same time may publish their events in
another order than their numbers."""


@dataclass(frozen=True, slots=True)
class Replay:
    events: list[StreamedEvent]
    complete: bool
    """False if the client missed more than MAX_REPLAYED events. `events` is empty then."""


async def read_events_after(engine: AsyncEngine, sequence: int) -> Replay:
    """Return the events of sandboxes after this number, and OVERLAP events before it.

    Events without a sandbox, such as `sync.completed`, are not in the history. Raises ApiError
    DATABASE_UNAVAILABLE.
    """
    query = (
        select(
            history.c.outbox_id,
            cast(history.c.event_id, Text).label("event_id"),
            history.c.type,
            history.c.sandbox_id,
            history.c.occurred_at,
            cast(history.c.data, Text).label("data"),
            select(func.min(outbox.c.outbox_id) - 1).scalar_subquery().label("published_until"),
        )
        .where(history.c.outbox_id > sequence - OVERLAP, history.c.event_id.is_not(None))
        .order_by(history.c.outbox_id)
        .limit(OVERLAP + MAX_REPLAYED + 1)
    )
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query)).mappings().all()
    if len([row for row in rows if row["outbox_id"] > sequence]) > MAX_REPLAYED:
        return Replay([], complete=False)
    return Replay([_to_event(row) for row in rows], complete=True)


def _to_event(row: RowMapping) -> StreamedEvent:
    sequence: int = row["outbox_id"]
    body = encode_event(
        row["event_id"], row["type"], row["sandbox_id"], row["occurred_at"], row["data"], sequence=sequence
    )
    published_until: int | None = row["published_until"]
    overtakes = published_until is not None and published_until < sequence
    return StreamedEvent(str(sequence), row["type"], body.decode(), str(published_until) if overtakes else None)
