"""Waiting line: load, look for sandboxes, join, leave, and end overdue places.

Students wait for these statements, so the rules of `sql.allocations` for generic plans apply.
`allocations.allocate_chosen` serves the line: it removes a place in the statement that grants the lease.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any, NamedTuple, TypedDict

from pydantic import Field, TypeAdapter

from allocator.sql.allocations import PICK_ANY, PICK_BY_PREFIX, PLACE_DATA
from allocator.waiting_estimate import Creation
from allocator.waiting_line import Place, WaitEnd
from allocator.write_session import GUARD, ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import AllocateSandbox, ReplaceSandbox
from sandbox_broker.database.schema import prefix_end

_PLACE = """
waiting_id, holder, name_prefix, command::text AS command, floor(extract(epoch FROM waiting_since))::bigint AS since
"""
LOAD = f"""
WITH {GUARD}
SELECT epoch, place.* FROM guard LEFT JOIN LATERAL (
    SELECT {_PLACE} FROM waiting ORDER BY waiting_id
) place ON true
"""

# Parameters: epoch, waiting holders that repeat their request, their new commands (NULL if unchanged), the holders
# and the idempotency keys of new requests, the prefixes to look for with their ends, the number of sandboxes per
# prefix.
# The last row has, instead of sandboxes, the holders of new requests with an active lease or a used key, and the
# length of the line.
LOOK = f"""
WITH {GUARD},
refreshed AS (
    UPDATE waiting w SET asked_at = now(), command = coalesce(r.command::jsonb, w.command)
    FROM guard CROSS JOIN unnest($2::text[], $3::text[]) AS r (holder, command)
    WHERE w.holder = ANY (ARRAY[r.holder COLLATE "C"])
),
settled AS (
    SELECT r.holder
    FROM guard CROSS JOIN unnest($4::text[], $5::text[]) AS r (holder, idempotency_key)
    LEFT JOIN LATERAL (
        SELECT lease_id FROM leases active WHERE active.holder = r.holder AND active.ended_at IS NULL LIMIT 1
    ) active ON true
    LEFT JOIN LATERAL (
        SELECT lease_id FROM leases keyed
        WHERE keyed.idempotency_key = r.idempotency_key AND keyed.idempotency_key IS NOT NULL LIMIT 1
    ) keyed ON true
    WHERE num_nonnulls(active.lease_id, keyed.lease_id) > 0
),
wanted AS MATERIALIZED (
    SELECT w.*, $8::int AS number FROM guard CROSS JOIN unnest($6::text[], $7::text[]) AS w (prefix, prefix_end)
)
SELECT d.prefix, ARRAY({PICK_BY_PREFIX}) AS ids, NULL::bigint AS waiting FROM wanted d WHERE d.prefix <> ''
UNION ALL
SELECT d.prefix, ARRAY({PICK_ANY}), NULL FROM wanted d WHERE d.prefix = ''
UNION ALL
SELECT NULL, ARRAY(SELECT holder FROM settled), (SELECT count(*) FROM waiting counted) FROM guard
"""

JOIN = f"""
WITH {GUARD},
joined AS (
    INSERT INTO waiting (holder, name_prefix, track_name, command, ends_at)
    SELECT r.holder, r.name_prefix, r.track_name, r.command::jsonb, now() + r.wait_sec * interval '1 second'
    FROM guard CROSS JOIN unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::float[])
        WITH ORDINALITY AS r (holder, name_prefix, track_name, command, wait_sec, number)
    ORDER BY r.number
    RETURNING *
),
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'waiting.started', jsonb_build_object({PLACE_DATA},
        'ends_at', floor(extract(epoch FROM ends_at))::bigint)
    FROM joined
)
SELECT {_PLACE} FROM joined ORDER BY waiting_id
"""

_END = f"""
announced AS (
    INSERT INTO outbox (type, data)
    SELECT 'waiting.ended', jsonb_build_object({PLACE_DATA}, 'reason', reason,
        'waited_sec', floor(extract(epoch FROM now() - waiting_since))::bigint)
    FROM ended
)
SELECT epoch, ended.holder, ended.reason FROM guard LEFT JOIN ended ON true
"""

LEAVE = f"""
WITH {GUARD},
ended AS (
    DELETE FROM waiting w USING guard WHERE w.holder = ANY ($2::text[] COLLATE "C")
    RETURNING w.*, $3::text AS reason
),
{_END}
"""

# The condition on waiting_id has every plan use the index, like the other statements for students.
END_OVERDUE = f"""
WITH {GUARD},
ended AS (
    DELETE FROM waiting w USING guard
    WHERE w.waiting_id > 0
      AND (w.ends_at <= now() OR w.asked_at < now() - $2::interval AND w.holder <> ALL ($3::text[] COLLATE "C"))
    RETURNING w.*, CASE WHEN w.ends_at <= now() THEN 'timed_out' ELSE 'left' END AS reason
),
{_END}
"""

# Failed creations and those of a stopped prefix bring no sandbox. The condition on the name has every plan use the
# index of creations in flight.
COMING = f"""
WITH {GUARD},
coming AS MATERIALIZED (
    SELECT c.creation_id, c.name, c.name_prefix, c.due_at, c.state = 'created' OR c.claim IS NOT NULL AS in_hand,
        CASE WHEN c.state = 'created' THEN c.first_claimed_at
            ELSE to_timestamp((c.history -> -1 ->> 'at')::float) END AS begun_at
    FROM guard, creations c
    WHERE c.in_flight AND c.name > '' AND c.state <> 'failed' AND (
        c.state = 'created' OR c.claim IS NOT NULL OR EXISTS (
            SELECT FROM stock_prefixes p WHERE p.name_prefix = c.name_prefix AND p.stopped_at IS NULL
        )
    )
),
measured AS MATERIALIZED (
    SELECT p.name_prefix, times.* FROM (SELECT DISTINCT name_prefix FROM coming) p
    CROSS JOIN LATERAL (
        SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY sec) AS p50_sec,
            percentile_cont(0.9) WITHIN GROUP (ORDER BY sec) AS p90_sec
        FROM (
            SELECT extract(epoch FROM m.imported_at - m.first_claimed_at)::float AS sec FROM creations m
            WHERE m.name_prefix = p.name_prefix AND m.imported_at IS NOT NULL
            ORDER BY m.imported_at DESC LIMIT 50
        ) newest
    ) times
)
SELECT epoch, coming.name, in_hand, p50_sec, p90_sec,
    greatest(extract(epoch FROM now() - begun_at), 0)::float AS elapsed_sec,
    greatest(extract(epoch FROM due_at - now()), 0)::float AS due_in_sec
FROM guard LEFT JOIN coming ON true LEFT JOIN measured USING (name_prefix)
ORDER BY due_at, creation_id
"""

NEVER = timedelta(days=36_500)

Request = AllocateSandbox | ReplaceSandbox
_COMMANDS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="type")])


class Joining(NamedTuple):
    """New student in the line."""

    holder: str
    command: Request
    name_prefix: str | None
    track_name: str | None
    wait_sec: float
    """Longest wait."""


class EndedRow(TypedDict):
    holder: str | None
    """None in the only row if no place ended."""
    reason: WaitEnd


async def load(session: WriteSession) -> None:
    """Load the line of the session."""
    rows = await session.fetch(LOAD)
    session.waiting_line.fill(
        (_place(row) for row in rows if row["waiting_id"] is not None),
        epoch=session.epoch,
        now=asyncio.get_running_loop().time(),
    )


async def look(
    session: WriteSession,
    *,
    repeated: Mapping[str, Request | None],
    requests: Sequence[AllocateSandbox],
    prefixes: Sequence[str],
    number: int,
) -> tuple[dict[str, list[str]], set[str]]:
    """Keep the places of the holders in `repeated`, and look for sandboxes.

    Return up to `number` available sandboxes per prefix, and the holders among the new `requests` that need none,
    because they have a lease or their idempotency key is used. Raises ConcurrentUpdate if a person has changed the
    table, so that the copy of the line is loaded again.
    """
    rows = await session.fetch(
        LOOK,
        list(repeated),
        [command and command.model_dump_json() for command in repeated.values()],
        [command.holder for command in requests],
        [command.idempotency_key for command in requests],
        prefixes,
        [prefix_end(prefix) if prefix else "" for prefix in prefixes],
        number,
    )
    if rows[-1]["waiting"] != len(session.waiting_line.places):
        session.waiting_line.epoch = 0
        raise ConcurrentUpdate
    return {row["prefix"]: row["ids"] for row in rows[:-1]}, set(rows[-1]["ids"])


async def join(session: WriteSession, joining: Sequence[Joining]) -> None:
    """Add a place for each student at the end of the line, in this order."""
    with session.waiting_line.changing():
        rows = await session.fetch(
            JOIN,
            [student.holder for student in joining],
            [student.name_prefix for student in joining],
            [student.track_name for student in joining],
            [student.command.model_dump_json() for student in joining],
            [student.wait_sec for student in joining],
        )
    session.waiting_line.add(map(_place, rows))


async def load_coming(session: WriteSession) -> list[Creation]:
    """Return the creations in flight whose prefix has measured creation times, in the order in which they begin."""
    return [
        Creation(
            name=row["name"],
            is_in_hand=row["in_hand"],
            median_sec=row["p50_sec"],
            slow_sec=row["p90_sec"],
            elapsed_sec=row["elapsed_sec"] or 0,
            due_in_sec=row["due_in_sec"],
        )
        for row in await session.fetch(COMING)
        if row["p50_sec"] is not None
    ]


async def leave(session: WriteSession, holders: Sequence[str], reason: WaitEnd) -> list[EndedRow]:
    """End the places of the holders."""
    return await _end(session, LEAVE, list(holders), reason)


async def end_overdue(session: WriteSession, *, ttl: timedelta | None, asked: Sequence[str]) -> list[EndedRow]:
    """End each place after its longest wait. With `ttl`, also end each place without a repeated request for this
    long.

    `asked` are holders that have repeated their request since the last look. The table does not show it yet.
    """
    return await _end(session, END_OVERDUE, ttl or NEVER, list(asked))


async def _end(session: WriteSession, statement: str, *arguments: object) -> list[EndedRow]:
    with session.waiting_line.changing():
        rows: list[EndedRow] = await session.fetch(statement, *arguments)
    ended = [row for row in rows if row["holder"] is not None]
    session.waiting_line.remove(row["holder"] for row in ended if row["holder"] is not None)
    return ended


def _place(row: Mapping[str, Any]) -> tuple[str, Place]:
    """Return the holder and the place."""
    return row["holder"], Place(
        waiting_id=row["waiting_id"],
        waiting_since=row["since"],
        prefix=row["name_prefix"] or "",
        command=_COMMANDS.validate_json(row["command"]),
    )
