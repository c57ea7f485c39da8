"""Pages that only read."""

import asyncio
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from console.api_client import ApiProblem, quote_segment
from console.rendering import render, sort_rows
from console.web import AdminApi, SignedIn, require_role

PAGE_SIZE = 50
CHART_FIELDS = ("available", "allocated", "pending_deletion", "waiting")
PERIODS = {1: "1 hour", 6: "6 hours", 24: "1 day", 168: "7 days"}
LEASE_SORTS = ("holder", "track_name", "name", "allocated_at", "expires_at")
SANDBOX_SORTS = ("name", "status", "holder", "track_name", "status_since", "expires_at")
ATTENTION_PAGES = {
    "pool_empty": "/sync",
    "pool_low": "/sync",
    "deletions_failed": "/deletions",
    "sandboxes_missing": "/sync",
    "stock_stopped": "/policies",
    "stock_low": "/policies",
    "sync_held": "/sync",
    "listing_unfinished": "/sync",
    "listing_old": "/sync",
    "deletions_failing": "/deletions",
    "deletions_late": "/deletions",
    "dead_letters": "/dead-letters",
}
"""Code of an attention item -> page for the next step. Other items have none, because the step is outside of the
console."""

Text = Annotated[str, Query(max_length=128)]
ObjectText = Annotated[str, Query(alias="object", max_length=128)]
Cursor = Annotated[str, Query(max_length=1024)]

router = APIRouter()


async def _or_problem(call: Awaitable[Any]) -> Any:
    """Return the result, or None if a part of the broker does not answer. Raises ApiProblem for other problems."""
    try:
        return await call
    except ApiProblem as problem:
        if not problem.is_outage:
            raise
        return None


@router.get("/")
async def show_overview(
    request: Request, api: AdminApi, _: SignedIn, hours: Annotated[int, Query(ge=1, le=168)] = 24
) -> Response:
    hours = hours if hours in PERIODS else 24
    status, history, stock, waiting, groups = await asyncio.gather(
        api.get("status"),
        _or_problem(api.get("stats/history", hours=hours)),
        _or_problem(api.get("stock")),
        _or_problem(api.get("waiting", limit=5)),
        _or_problem(api.get("stats", by="name_prefix", limit=12)),
    )
    samples = [] if history is None else history["samples"]
    chart = {name: [sample[name] for sample in samples] for name in ("at", *CHART_FIELDS)}
    hour_ago = next((sample for sample in samples if sample["at"] >= time.time() - 3600), None)
    return render(
        request,
        "overview.html",
        status=status,
        pool=status["pool"] or groups,  # a slow database may answer the second query
        items=[{**item, "page": ATTENTION_PAGES.get(item["code"])} for item in status["attention"]],
        chart=chart,
        hour_ago=hour_ago,
        stock=stock,
        waiting=waiting,
        groups=[] if groups is None else [group for group in groups["groups"] if _is_in_use(group)],
        hours=hours,
        periods=PERIODS,
    )


def _is_in_use(group: dict[str, Any]) -> bool:
    return bool(group["total"] - group["deleted"])


@router.get("/leases")
async def show_leases(
    request: Request,
    api: AdminApi,
    _: SignedIn,
    *,
    student: Text = "",
    track: Text = "",
    at: Text = "",
    only: Annotated[str, Query(pattern="^(active|all)$")] = "active",
    sort: Text = "",
    cursor: Cursor = "",
) -> Response:
    held_at, problem = parse_time(at)
    page = await api.get(
        "allocations", **lease_filters(student, track, held_at, only), limit=PAGE_SIZE, cursor=cursor
    )
    return render(
        request,
        "leases.html",
        leases=sort_rows(page["allocations"], sort, LEASE_SORTS),
        cursor=page["cursor"],
        filters={"student": student, "track": track, "at": at, "only": only},
        problem=problem,
        sort=sort,
    )


def lease_filters(student: str, track: str, held_at: int | None, only: str) -> dict[str, Any]:
    """Return the parameters of GET /allocations. Active leases are those that are held now."""
    if held_at is None and only == "active":
        held_at = int(time.time())
    return {"holder": student, "track_name": track, "held_at": held_at}


def parse_time(text: str) -> tuple[int | None, str | None]:
    """Return the Unix seconds of a time in UTC from a form, and the problem with it."""
    if not text:
        return None, None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None, "The time is not readable. Write it like 2026-03-27T14:00."
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()), None


@router.get("/sandboxes")
async def show_sandboxes(
    request: Request,
    api: AdminApi,
    _: SignedIn,
    *,
    status: Text = "",
    prefix: Text = "",
    track: Text = "",
    student: Text = "",
    sort: Text = "",
    cursor: Cursor = "",
) -> Response:
    page, stats = await asyncio.gather(
        api.get(
            "sandboxes",
            status=status,
            name_prefix=prefix,
            track_name=track,
            holder=student,
            limit=PAGE_SIZE,
            cursor=cursor,
        ),
        api.get("stats"),
    )
    return render(
        request,
        "sandboxes.html",
        sandboxes=sort_rows(page["sandboxes"], sort, SANDBOX_SORTS),
        cursor=page["cursor"],
        stats=stats,
        filters={"status": status, "prefix": prefix, "track": track, "student": student},
        sort=sort,
    )


@router.get("/search")
async def search(api: AdminApi, _: SignedIn, q: Text = "") -> Response:
    """Redirect to the sandbox with this id, otherwise to the leases of the student with this id."""
    query = q.strip()
    if query:
        try:
            await api.get(f"sandboxes/{quote_segment(query)}")
            return RedirectResponse(f"/sandboxes/{quote_segment(query)}", 303)
        except ApiProblem as problem:
            if problem.is_outage:
                raise
    return RedirectResponse(f"/leases?only=all&student={quote_segment(query)}", 303)


@router.get("/sandboxes/{sandbox_id}")
async def show_sandbox(request: Request, api: AdminApi, _: SignedIn, sandbox_id: str) -> Response:
    sandbox = await api.get(f"sandboxes/{quote_segment(sandbox_id)}")
    return render(request, "sandbox.html", sandbox=sandbox)


@router.get("/deletions")
async def show_deletions(request: Request, api: AdminApi, _: SignedIn, cursor: Cursor = "") -> Response:
    failed, pending, status = await asyncio.gather(
        api.get("sandboxes", status="deletion_failed", limit=PAGE_SIZE, cursor=cursor),
        api.get("sandboxes", status="pending_deletion", limit=20),
        api.get("status"),
    )
    return render(
        request,
        "deletions.html",
        failed=failed["sandboxes"],
        cursor=failed["cursor"],
        pending=pending["sandboxes"],
        csp=status["csp"],
        pool=status["pool"],
    )


@router.get("/sync")
async def show_sync(request: Request, api: AdminApi, _: SignedIn) -> Response:
    sync, status, leaks = await asyncio.gather(
        api.get("sync"), api.get("status"), _or_problem(api.get("leaks", limit=20))
    )
    return render(request, "sync.html", sync=sync, csp=status["csp"], leaks=leaks)


@router.get("/dead-letters")
async def show_dead_letters(request: Request, api: AdminApi, _: SignedIn, cursor: Cursor = "") -> Response:
    page = await api.get("dead-letters", limit=PAGE_SIZE, cursor=cursor)
    return render(request, "dead_letters.html", letters=page["dead_letters"], cursor=page["cursor"])


@router.get("/dead-letters/{dead_letter_id}")
async def show_dead_letter(request: Request, api: AdminApi, _: SignedIn, dead_letter_id: str) -> Response:
    letter = await api.get(f"dead-letters/{quote_segment(dead_letter_id)}")
    return render(request, "dead_letter.html", letter=letter)


@router.get("/policies")
async def show_policies(request: Request, api: AdminApi, _: SignedIn) -> Response:
    policies, stock = await asyncio.gather(api.get("policies"), _or_problem(api.get("stock")))
    levels = {level["policy"]: level for level in ([] if stock is None else stock["stock"])}
    return render(request, "policies.html", policies=policies["policies"], levels=levels)


@router.get("/tokens")
async def show_tokens(request: Request, api: AdminApi, person: SignedIn) -> Response:
    require_role(person, "admin")
    found = await api.get("tokens")
    return render(request, "tokens.html", tokens=found["tokens"])


@router.get("/audit")
async def show_audit(
    request: Request,
    api: AdminApi,
    person: SignedIn,
    *,
    actor: Text = "",
    action: Text = "",
    object_: ObjectText = "",
    cursor: Cursor = "",
) -> Response:
    require_role(person, "operator")
    filters = {"actor": actor, "action": action, "object": object_}
    page = await api.get("audit", **filters, limit=PAGE_SIZE, cursor=cursor)
    return render(request, "audit.html", entries=page["entries"], cursor=page["cursor"], filters=filters)
