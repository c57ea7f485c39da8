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

MAX_REFUSALS_PER_MINUTE = 10
"""Entries of one token within any minute, after which its refusals for scope are only counted. A leaked token must
not fill the table."""

# The newest entries of the actor are counted in the same statement. Only the allocator with the current epoch
# writes, so two statements of one epoch never count at the same time.
RECORD_REFUSALS = f"""
WITH {GUARD},
refused AS MATERIALIZED (
    SELECT e.*, row_number() OVER (PARTITION BY e.actor ORDER BY e.place) AS place_of_actor
    FROM unnest(
        $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[]
    ) WITH ORDINALITY AS e (actor, action, object, reason, request_id, address, outcome, place)
),
counted AS MATERIALIZED (
    SELECT a.actor, n.recent FROM (SELECT DISTINCT actor FROM refused) a CROSS JOIN LATERAL (
        SELECT count(*) AS recent FROM (
            SELECT newest.at FROM audit newest WHERE newest.actor = a.actor
            ORDER BY newest.audit_id DESC LIMIT {MAX_REFUSALS_PER_MINUTE}
        ) newest WHERE newest.at > now() - interval '1 minute'
    ) n
),
recorded AS (
    INSERT INTO audit (actor, action, object, reason, request_id, address, outcome)
    SELECT r.actor, r.action, r.object, r.reason, r.request_id, r.address, r.outcome
    FROM guard CROSS JOIN refused r JOIN counted c ON c.actor = r.actor
    WHERE c.recent + r.place_of_actor <= {MAX_REFUSALS_PER_MINUTE}
    ORDER BY r.place
    RETURNING 1
)
SELECT epoch, (SELECT count(*) FROM recorded) AS count FROM guard
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
    await session.fetch(RECORD, *_columns(entries))


async def record_refusals(session: WriteSession, entries: Sequence[Entry]) -> int:
    """Record refusals within the limit of each actor; return the number of recorded ones."""
    count: int = (await session.fetch_one(RECORD_REFUSALS, *_columns(entries)))["count"]
    return count


def _columns(entries: Sequence[Entry]) -> list[list[str | None]]:
    return [list(column) for column in zip(*entries, strict=True)]
