"""Audit: commands of administrators and refusals for scope."""

from collections.abc import Sequence
from typing import NamedTuple

from allocator.write_session import GUARD, WriteSession

RECORD = f"""
WITH {GUARD},
recorded AS (
    INSERT INTO audit (actor, action, object, reason, request_id, address, outcome)
    SELECT e.* FROM guard CROSS JOIN unnest(
        $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[]
    ) AS e
)
SELECT epoch FROM guard
"""


class Entry(NamedTuple):
    actor: str
    action: str
    object: str | None
    reason: str | None
    request_id: str | None
    address: str | None
    outcome: str
    """done, unchanged, or the code of the refusal."""


async def record(session: WriteSession, entries: Sequence[Entry]) -> None:
    await session.fetch(RECORD, *(list(column) for column in zip(*entries, strict=True)))
