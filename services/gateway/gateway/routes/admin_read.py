"""The admin routes that look at the whole, at the pool, at who had what, and at what differs from CSP."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.api.errors import ApiError
from gateway.api.schemas import (
    Allocations,
    GroupedStats,
    Leaks,
    SandboxPage,
    SandboxStory,
    Stats,
    Status,
    responses,
)
from gateway.context import Context
from gateway.queries import cursors, leaks, pagination, sandboxes
from gateway.queries.pagination import AllocationFilter, GroupedBy, SandboxFilter
from gateway.routes.admin_actions import ALWAYS
from sandbox_broker.contract.types import MAX_ID_LENGTH, SandboxStatus

router = APIRouter(prefix="/v1/admin", tags=["admin"])

PAGED = (*ALWAYS, "INVALID_CURSOR", "DATABASE_UNAVAILABLE")

Limit = Annotated[int, Query(ge=1, le=500)]
Cursor = Annotated[
    str, Query(max_length=cursors.MAX_LENGTH, description="that of the page before; the filters stay the same")
]
Text = Annotated[str | None, Query(max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]*$")]
"""As in the headers that it comes from; blank is no filter."""
Time = Annotated[int | None, Query(ge=0, le=253_402_300_799, description="Unix seconds")]


@router.get("/status", responses=responses(*ALWAYS))
async def get_status(request: Request) -> Status:
    """What is up and what is not, the queues, the pool, and what our records tell of CSP. What does not answer in
    0.3 s is reported as down, so that this always answers at once."""
    context: Context = request.app.state.context
    return await context.outlook.status()


@router.get("/stats", responses=responses(*PAGED))
async def get_stats(
    request: Request, *, by: GroupedBy | None = None, limit: Limit = 50, cursor: Cursor = ""
) -> GroupedStats | Stats:
    """How many sandboxes are in each state; with `by` also for each track, or for each beginning of their names,
    which is all before their number."""
    context: Context = request.app.state.context
    if by is None:
        return await sandboxes.stats(context.engine)
    return await pagination.grouped_stats(context.engine, by, limit=limit, cursor=cursor)


@router.get("/sandboxes", responses=responses(*PAGED))
async def get_sandboxes(
    request: Request,
    *,
    status: SandboxStatus | None = None,
    name_prefix: Text = None,
    track_name: Text = None,
    holder: Text = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> SandboxPage:
    """The sandboxes that all filters given are true of. `name_prefix` is exact, without wildcards."""
    context: Context = request.app.state.context
    wanted = SandboxFilter(status, name_prefix or None, track_name or None, holder or None)
    return await pagination.sandboxes_page(context.engine, wanted, limit=limit, cursor=cursor)


@router.get("/sandboxes/{sandbox_id}", responses=responses(*ALWAYS, "SANDBOX_NOT_FOUND", "DATABASE_UNAVAILABLE"))
async def get_sandbox(request: Request, sandbox_id: str) -> SandboxStory:
    """All about one, with its history: each transition, when, why, and by whom."""
    context: Context = request.app.state.context
    found = await sandboxes.story(context.engine, sandbox_id) if "\0" not in sandbox_id else None
    if found is None:
        raise ApiError("SANDBOX_NOT_FOUND", "There is no such sandbox. See GET /v1/admin/sandboxes.")
    return found


@router.get("/allocations", responses=responses(*PAGED))
async def get_allocations(
    request: Request,
    *,
    track_name: Text = None,
    holder: Text = None,
    since: Time = None,
    until: Time = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> Allocations:
    """Which student had which sandbox when, how long, and how it ended; the newest first. Of the leases that began
    at `since` or later, and before `until`."""
    context: Context = request.app.state.context
    wanted = AllocationFilter(track_name or None, holder or None, since, until)
    return await pagination.allocations_page(context.engine, wanted, limit=limit, cursor=cursor)


@router.get("/leaks", responses=responses(*PAGED))
async def get_leaks(request: Request, limit: Limit = 50, cursor: Cursor = "") -> Leaks:
    """Where CSP and we differ: accounts in CSP that are not in the pool, and sandboxes that a student holds and CSP
    no longer lists. By sandbox id."""
    context: Context = request.app.state.context
    return await leaks.page(context.engine, limit=limit, cursor=cursor)
