"""Dead letters: find, check for completed allocations, delete."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import TypedDict

from allocator.write_session import GUARD, WriteSession

FIND = f"""
WITH {GUARD}
SELECT guard.epoch AS writing, d.* FROM guard LEFT JOIN dead_letters d ON d.dead_letter_id = $2
"""
# Requests wait for seconds. A lease newer than one hour before the death of the message is therefore newer than the
# request.
SERVED_HOLDERS = f"""
WITH {GUARD}
SELECT epoch, ARRAY(
    SELECT holder FROM unnest($2::text[]) requested (holder) WHERE EXISTS (
        SELECT FROM leases l
        WHERE '' || l.holder = requested.holder AND l.allocated_at >= $3::timestamptz - interval '1 hour'
    )
) AS holders
FROM guard
"""
DELETE = f"""
WITH {GUARD}, dropped AS (
    DELETE FROM dead_letters d USING guard WHERE d.dead_letter_id = $2 RETURNING 1
)
SELECT epoch, EXISTS (SELECT FROM dropped) AS changed FROM guard
"""


class DeadLetterRow(TypedDict):
    dead_letter_id: uuid.UUID
    died_at: datetime
    queue: str
    body: bytes
    content_type: str | None
    message_id: str | None
    correlation_id: str | None


async def find(session: WriteSession, *, dead_letter_id: uuid.UUID) -> DeadLetterRow | None:
    row: DeadLetterRow = await session.fetch_one(FIND, dead_letter_id)
    return None if row["dead_letter_id"] is None else row


async def served_holders(session: WriteSession, *, holders: Sequence[str], died_at: datetime) -> frozenset[str]:
    """Return the `holders` with a lease since their request, which died at `died_at`."""
    return frozenset((await session.fetch_one(SERVED_HOLDERS, holders, died_at))["holders"])


async def delete(session: WriteSession, *, dead_letter_id: uuid.UUID) -> bool:
    """Delete a dead letter; return whether it existed."""
    changed: bool = (await session.fetch_one(DELETE, dead_letter_id))["changed"]
    return changed
