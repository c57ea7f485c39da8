"""Queries of dead letters: the listing, and one dead letter with its payload."""

import base64
import codecs
import uuid
from datetime import datetime
from typing import Literal

from sqlalchemy import RowMapping, func, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.dead_letters import DeadLetter, DeadLetterPage, DeadLetterSummary
from gateway.queries import cursors
from gateway.queries.sandboxes import read_connection, unix_seconds
from sandbox_broker.contract import topology
from sandbox_broker.database.schema import dead_letters

LISTING = "dead_letters"
"""Name of the listing in the checksum of its cursors. A change invalidates cursors in use."""
KEY_TYPES = (datetime, uuid.UUID)
"""Types of the key of a cursor: the time of death and the id."""
MAX_PAYLOAD_BYTES = 64 * 1024
"""Longest payload to return. A longer one is cut."""

_SUMMARY = (
    dead_letters.c.dead_letter_id,
    unix_seconds(dead_letters.c.died_at).label("died_at"),
    dead_letters.c.queue,
    dead_letters.c.reason,
    dead_letters.c.commands,
    func.octet_length(dead_letters.c.body).label("size"),
)


async def dead_letters_page(engine: AsyncEngine, *, limit: int, cursor: str) -> DeadLetterPage:
    """Return a page of dead letters, newest first. Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE."""
    key = tuple_(dead_letters.c.died_at, dead_letters.c.dead_letter_id)
    query = select(dead_letters.c.died_at.label("exactly"), *_SUMMARY).order_by(
        dead_letters.c.died_at.desc(), dead_letters.c.dead_letter_id.desc()
    )
    if cursor:
        query = query.where(key < tuple_(*map(literal, cursors.decode(cursor, KEY_TYPES, LISTING))))
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query.limit(limit + 1))).mappings().all()
    page = [DeadLetterSummary.model_validate(_with_service(row)) for row in rows[:limit]]
    next_cursor = None
    if len(rows) > limit:
        last = rows[limit - 1]
        next_cursor = cursors.encode([last["exactly"], last["dead_letter_id"]], LISTING)
    return DeadLetterPage(dead_letters=page, count=len(page), cursor=next_cursor)


async def dead_letter(engine: AsyncEngine, dead_letter_id: uuid.UUID) -> DeadLetter | None:
    """Return a dead letter with its payload, or None if the id is unknown. Raises ApiError DATABASE_UNAVAILABLE."""
    query = select(
        *_SUMMARY,
        dead_letters.c.message_id,
        dead_letters.c.correlation_id,
        dead_letters.c.content_type,
        func.substring(dead_letters.c.body, 1, MAX_PAYLOAD_BYTES).label("beginning"),
    ).where(dead_letters.c.dead_letter_id == dead_letter_id)
    async with read_connection(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    payload, encoding = _encode_payload(row["beginning"], complete=row["size"] <= MAX_PAYLOAD_BYTES)
    return DeadLetter.model_validate({**_with_service(row), "payload": payload, "encoding": encoding})


def _with_service(row: RowMapping) -> dict[str, object]:
    return {**row, "service": topology.owner_of(row["queue"])}


def _encode_payload(body: bytes, *, complete: bool) -> tuple[str, Literal["utf-8", "base64"]]:
    """Return `body` as text if it is UTF-8, otherwise in base64.

    The cut of an incomplete body may split a character. The text then ends before this character.
    """
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(body, final=complete), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(body).decode(), "base64"
