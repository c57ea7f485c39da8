"""Admin routes that read: status, pool statistics, sandboxes, allocations and leaks."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.api.errors import ApiError
from gateway.api.responses import responses
from gateway.api.schemas.pool import Allocations, GroupedStats, Leaks, PoolHistory, SandboxPage, SandboxStory, Stats
from gateway.api.schemas.status import Status, WhoAmI
from gateway.api.schemas.waiting import WaitingPage
from gateway.context import Context
from gateway.queries import cursors, leaks, sandboxes
from gateway.queries.allocation_pages import LATEST, AllocationFilter, allocations_page
from gateway.queries.grouped_stats import GroupedBy, grouped_stats
from gateway.queries.pool_history import pool_history
from gateway.queries.sandbox_pages import SandboxFilter, sandboxes_page
from gateway.queries.waiting_pages import waiting_page
from gateway.routes.admin_actions import COMMON_ERRORS
from gateway.web.auth import Caller
from sandbox_broker.contract.types import MAX_ID_LENGTH, LeaseMode, SandboxStatus

router = APIRouter(prefix="/v1/admin", tags=["admin"])

LISTING_ERRORS = (*COMMON_ERRORS, "INVALID_CURSOR", "DATABASE_UNAVAILABLE")

Limit = Annotated[int, Query(ge=1, le=500)]
Cursor = Annotated[
    str, Query(max_length=cursors.MAX_LENGTH, description="`cursor` of the previous page. Keep the filters.")
]
Text = Annotated[str | None, Query(max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]*$")]
"""Printable ASCII, as in the headers of an allocation. An empty text is no filter."""
Time = Annotated[int | None, Query(ge=0, le=LATEST, description="Unix seconds")]


@router.get("/whoami", responses=responses(*COMMON_ERRORS))
async def get_whoami(request: Request) -> WhoAmI:
    """Return the role of the token of this request."""
    caller: Caller = request.scope["state"]["caller"]
    return WhoAmI(name=None if caller.named is None else caller.named.name, role=caller.role)


@router.get("/status", responses=responses(*COMMON_ERRORS))
async def get_status(request: Request) -> Status:
    """Return the status of all components, the queues, the pool, and the recorded state of CSP. A component that
    does not respond in 0.3 s is reported as down, so the report always arrives at once."""
    context: Context = request.app.state.context
    return await context.status_reporter.report()


@router.get("/stats", responses=responses(*LISTING_ERRORS))
async def get_stats(
    request: Request, *, by: GroupedBy | None = None, limit: Limit = 50, cursor: Cursor = ""
) -> GroupedStats | Stats:
    """Return the number of sandboxes in each status. With `by`, also return these numbers per track or per name
    prefix. The prefix is the name without its final number."""
    context: Context = request.app.state.context
    if by is None:
        return await sandboxes.pool_stats(context.engine)
    return await grouped_stats(context.engine, by, limit=limit, cursor=cursor)


@router.get("/stats/history", responses=responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE"))
async def get_stats_history(
    request: Request, hours: Annotated[int, Query(ge=1, le=168, description="length of the period")] = 24
) -> PoolHistory:
    """Return the number of sandboxes in each status over time. The broker keeps a week."""
    context: Context = request.app.state.context
    return await pool_history(context.engine, hours)


@router.get("/sandboxes", responses=responses(*LISTING_ERRORS))
async def get_sandboxes(
    request: Request,
    *,
    status: SandboxStatus | None = None,
    name_prefix: Text = None,
    track_name: Text = None,
    holder: Text = None,
    mode: Annotated[LeaseMode | None, Query(description="mode of the active lease")] = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> SandboxPage:
    """List the sandboxes that match all filters. `name_prefix` has no wildcards. `mode=standby` lists those whose
    standby lease no student has claimed yet."""
    context: Context = request.app.state.context
    wanted = SandboxFilter(status, name_prefix or None, track_name or None, holder or None, mode)
    return await sandboxes_page(context.engine, wanted, limit=limit, cursor=cursor)


@router.get(
    "/sandboxes/{sandbox_id}", responses=responses(*COMMON_ERRORS, "SANDBOX_NOT_FOUND", "DATABASE_UNAVAILABLE")
)
async def get_sandbox(request: Request, sandbox_id: str) -> SandboxStory:
    """Return a sandbox with its history: the time, reason and actor of each transition."""
    context: Context = request.app.state.context
    details = await sandboxes.sandbox_details(context.engine, sandbox_id) if "\0" not in sandbox_id else None
    if details is None:
        raise ApiError("SANDBOX_NOT_FOUND", parameters={"cause": "unknown_to_admin"})
    return details


@router.get("/allocations", responses=responses(*LISTING_ERRORS))
async def get_allocations(
    request: Request,
    *,
    track_name: Text = None,
    holder: Text = None,
    since: Time = None,
    until: Time = None,
    held_at: Time = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> Allocations:
    """List leases, newest first, with their student, sandbox, duration and end. `since` (inclusive) and `until`
    (exclusive) limit the time of allocation. `held_at` selects the leases that were active at this time."""
    context: Context = request.app.state.context
    wanted = AllocationFilter(track_name or None, holder or None, since, until, held_at)
    return await allocations_page(context.engine, wanted, limit=limit, cursor=cursor)


@router.get("/leaks", responses=responses(*LISTING_ERRORS))
async def get_leaks(request: Request, limit: Limit = 50, cursor: Cursor = "") -> Leaks:
    """List the differences between CSP and the pool, by sandbox id: accounts in CSP that are not in the pool, and
    allocated sandboxes that CSP no longer lists."""
    context: Context = request.app.state.context
    return await leaks.leaks_page(context.engine, limit=limit, cursor=cursor)


@router.get("/waiting", responses=responses(*LISTING_ERRORS))
async def get_waiting(request: Request, limit: Limit = 50, cursor: Cursor = "") -> WaitingPage:
    """List the students in the waiting line in the order of their arrival. Replacements of broken sandboxes are
    served before all others."""
    context: Context = request.app.state.context
    return await waiting_page(context.engine, limit=limit, cursor=cursor)
