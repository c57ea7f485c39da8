"""Admin routes for the stock: levels of the stock rules, creation intents, and the end of a stop."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.api.responses import responses
from gateway.api.schemas.stock import CreationPage, Stock, StockResumed
from gateway.context import Context
from gateway.queries import stock
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from gateway.routes.admin_read import LISTING_ERRORS, Cursor, Limit, Text
from sandbox_broker.contract.commands import ResumeStock
from sandbox_broker.contract.types import MAX_ID_LENGTH

router = APIRouter(prefix="/v1/admin/stock", tags=["admin"])


@router.get("", responses=responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE"))
async def get_stock(request: Request) -> Stock:
    """Return the level of each stock rule: sandboxes, creation intents in flight, forecast, measured creation
    times, and the last error."""
    context: Context = request.app.state.context
    return await stock.stock(context.engine)


@router.get("/creations", responses=responses(*LISTING_ERRORS))
async def get_creations(
    request: Request, name_prefix: Text = None, limit: Limit = 50, cursor: Cursor = ""
) -> CreationPage:
    """List creation intents with their history, newest first. `name_prefix` is the prefix of a stock rule."""
    context: Context = request.app.state.context
    return await stock.creations_page(context.engine, name_prefix or None, limit=limit, cursor=cursor)


@router.post(
    "/resume",
    responses=responses(*COMMON_ERRORS, "STOCK_RULE_NOT_FOUND", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"),
)
async def resume_stock(
    request: Request,
    name_prefix: Annotated[str, Query(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]+$")],
) -> StockResumed:
    """Create accounts for a stopped prefix again, after the cause of the stop is repaired. A repeated call succeeds
    and changes nothing."""
    command = ResumeStock(request_id=request.state.request_id, name_prefix=name_prefix)
    reply = await request_maintenance(request, command)
    return StockResumed(name_prefix=name_prefix, changed=reply.changed)
