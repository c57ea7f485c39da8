"""The admin routes about what could not be processed."""

import base64
import codecs
import uuid
from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Request
from sqlalchemy import func, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.errors import ApiError, raise_for_refusal
from gateway.api.schemas import (
    DeadLetter,
    DeadLetterDropped,
    DeadLetterPage,
    DeadLetterReplayed,
    DeadLetterSummary,
    responses,
)
from gateway.context import Context
from gateway.queries import cursors
from gateway.queries.sandboxes import reading, seconds
from gateway.routes.admin_actions import ALWAYS, maintain
from gateway.routes.admin_read import PAGED, Cursor, Limit
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import DropDeadLetter, ReplayDeadLetter
from sandbox_broker.contract.replies import Recorded
from sandbox_broker.database.schema import dead_letters

LISTING = "dead_letters"
KEY = (datetime, uuid.UUID)
"""The time of death and the id."""
MAX_SHOWN = 64 * 1024
"""Bytes of a payload."""

CHANGED = (*ALWAYS, "DEAD_LETTER_NOT_FOUND", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT")

router = APIRouter(prefix="/v1/admin/dead-letters", tags=["admin"])

_SUMMARY = (
    dead_letters.c.dead_letter_id,
    seconds(dead_letters.c.died_at).label("died_at"),
    func.split_part(dead_letters.c.queue, ".", 1).label("service"),
    dead_letters.c.queue,
    dead_letters.c.reason,
    dead_letters.c.commands,
    func.octet_length(dead_letters.c.body).label("size"),
)


@router.get("", responses=responses(*PAGED))
async def get_dead_letters(request: Request, limit: Limit = 50, cursor: Cursor = "") -> DeadLetterPage:
    """Messages that could not be processed, the newest first, until they are replayed or dropped."""
    context: Context = request.app.state.context
    return await page(context.engine, limit=limit, cursor=cursor)


@router.get("/{dead_letter_id}", responses=responses(*ALWAYS, "DEAD_LETTER_NOT_FOUND", "DATABASE_UNAVAILABLE"))
async def get_dead_letter(request: Request, dead_letter_id: str) -> DeadLetter:
    """One of them, with its payload."""
    context: Context = request.app.state.context
    found = await letter(context.engine, _uuid(dead_letter_id))
    if found is None:
        raise _not_found()
    return found


@router.post("/{dead_letter_id}/replay", responses=responses(*CHANGED, "NOT_REPLAYABLE"))
async def replay_dead_letter(request: Request, dead_letter_id: str) -> DeadLetterReplayed:
    """Puts it back into its queue, with the ids that it had: what was done already is not done again. What still
    cannot be processed becomes a new dead letter."""
    command = ReplayDeadLetter(request_id=request.state.request_id, dead_letter_id=_uuid(dead_letter_id))
    reply = await maintain(request, command)
    if not isinstance(reply, replies.DeadLetterReplayed):
        raise_for_refusal(reply)
    return DeadLetterReplayed.model_validate(reply, from_attributes=True)


@router.delete("/{dead_letter_id}", responses=responses(*CHANGED))
async def drop_dead_letter(request: Request, dead_letter_id: str) -> DeadLetterDropped:
    """Forgets it."""
    command = DropDeadLetter(request_id=request.state.request_id, dead_letter_id=_uuid(dead_letter_id))
    reply = await maintain(request, command)
    if not isinstance(reply, Recorded):
        raise_for_refusal(reply)
    return DeadLetterDropped(dead_letter_id=command.dead_letter_id)


async def page(engine: AsyncEngine, *, limit: int, cursor: str) -> DeadLetterPage:
    """The newest first. Raises ApiError INVALID_CURSOR."""
    key = tuple_(dead_letters.c.died_at, dead_letters.c.dead_letter_id)
    query = select(dead_letters.c.died_at.label("exactly"), *_SUMMARY).order_by(
        dead_letters.c.died_at.desc(), dead_letters.c.dead_letter_id.desc()
    )
    if cursor:
        query = query.where(key < tuple_(*map(literal, cursors.decode(cursor, KEY, LISTING))))
    async with reading(engine) as connection:
        rows = (await connection.execute(query.limit(limit + 1))).mappings().all()
    shown = [DeadLetterSummary.model_validate(row) for row in rows[:limit]]
    following = None
    if len(rows) > limit:
        last = rows[limit - 1]
        following = cursors.encode([last["exactly"], last["dead_letter_id"]], LISTING)
    return DeadLetterPage(dead_letters=shown, count=len(shown), cursor=following)


async def letter(engine: AsyncEngine, dead_letter_id: uuid.UUID) -> DeadLetter | None:
    """None if there is no such letter."""
    query = select(
        *_SUMMARY,
        dead_letters.c.message_id,
        dead_letters.c.correlation_id,
        dead_letters.c.content_type,
        func.substring(dead_letters.c.body, 1, MAX_SHOWN).label("beginning"),
    ).where(dead_letters.c.dead_letter_id == dead_letter_id)
    async with reading(engine) as connection:
        row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None
    payload, encoding = _readable(row["beginning"], whole=row["size"] <= MAX_SHOWN)
    return DeadLetter.model_validate({**row, "payload": payload, "encoding": encoding})


def _readable(body: bytes, *, whole: bool) -> tuple[str, Literal["utf-8", "base64"]]:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(body, final=whole), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(body).decode(), "base64"


def _uuid(dead_letter_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(dead_letter_id)
    except ValueError:
        raise _not_found() from None


def _not_found() -> ApiError:
    return ApiError("DEAD_LETTER_NOT_FOUND", "There is no such dead letter. See GET /v1/admin/dead-letters.")
