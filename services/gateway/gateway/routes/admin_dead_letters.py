"""Admin routes for dead letters: list, show, replay and drop."""

import uuid

from fastapi import APIRouter, Request

from gateway.api.errors import ApiError
from gateway.api.responses import responses
from gateway.api.schemas.dead_letters import DeadLetter, DeadLetterDropped, DeadLetterPage, DeadLetterReplayed
from gateway.context import Context
from gateway.queries import dead_letters
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from gateway.routes.admin_read import LISTING_ERRORS, Cursor, Limit
from sandbox_broker.contract.commands import DropDeadLetter, ReplayDeadLetter

ACTION_ERRORS = (*COMMON_ERRORS, "DEAD_LETTER_NOT_FOUND", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT")

router = APIRouter(prefix="/v1/admin/dead-letters", tags=["admin"])


@router.get("", responses=responses(*LISTING_ERRORS))
async def get_dead_letters(request: Request, limit: Limit = 50, cursor: Cursor = "") -> DeadLetterPage:
    """List the messages that a service could not process, newest first. Replayed and dropped messages are not
    listed."""
    context: Context = request.app.state.context
    return await dead_letters.dead_letters_page(context.engine, limit=limit, cursor=cursor)


@router.get(
    "/{dead_letter_id}", responses=responses(*COMMON_ERRORS, "DEAD_LETTER_NOT_FOUND", "DATABASE_UNAVAILABLE")
)
async def get_dead_letter(request: Request, dead_letter_id: str) -> DeadLetter:
    """Return a dead letter with its payload."""
    context: Context = request.app.state.context
    letter = await dead_letters.dead_letter(context.engine, _parse_id(dead_letter_id))
    if letter is None:
        raise _not_found()
    return letter


@router.post("/{dead_letter_id}/replay", responses=responses(*ACTION_ERRORS, "NOT_REPLAYABLE"))
async def replay_dead_letter(request: Request, dead_letter_id: str) -> DeadLetterReplayed:
    """Put the message back into its queue, with its original ids. Completed commands do not take effect twice. If
    the service still cannot process the message, it becomes a new dead letter."""
    command = ReplayDeadLetter(request_id=request.state.request_id, dead_letter_id=_parse_id(dead_letter_id))
    reply = await request_maintenance(request, command)
    return DeadLetterReplayed.model_validate(reply, from_attributes=True)


@router.delete("/{dead_letter_id}", responses=responses(*ACTION_ERRORS))
async def drop_dead_letter(request: Request, dead_letter_id: str) -> DeadLetterDropped:
    """Delete the record of the dead letter."""
    command = DropDeadLetter(request_id=request.state.request_id, dead_letter_id=_parse_id(dead_letter_id))
    await request_maintenance(request, command)
    return DeadLetterDropped(dead_letter_id=command.dead_letter_id)


def _parse_id(dead_letter_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(dead_letter_id)
    except ValueError:
        raise _not_found() from None


def _not_found() -> ApiError:
    return ApiError("DEAD_LETTER_NOT_FOUND", parameters={"cause": "unknown_id"})
