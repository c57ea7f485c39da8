"""Where CSP and the pool differ, page by page. Few accounts are leaks, so what a page costs is the accounts that it
looks at, 4,000 at most; like those of pages.py it may hold less than it was asked for and still have a cursor.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, case, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas import Leak, Leaks
from gateway.queries import cursors
from gateway.queries.sandboxes import reading, seconds
from sandbox_broker.database.schema import PROOF_GRACE, csp_accounts, csp_listings, sandboxes

KEY = (str,)
"""The sandbox id."""
LOOK = 4_000
"""Accounts that are looked at for one page."""


async def page(engine: AsyncEngine, *, limit: int, cursor: str) -> Leaks:
    """Differences to the last listing that was applied, by sandbox id. Raises ApiError INVALID_CURSOR."""
    after = cursors.decode(cursor, KEY, "leaks")[0] if cursor else ""
    latest = (
        select(csp_listings.c.listing_id, csp_listings.c.begun_at, seconds(csp_listings.c.begun_at).label("at"))
        .where(csp_listings.c.applied_at.is_not(None))
        .order_by(csp_listings.c.listing_id.desc())
        .limit(1)
    )
    async with reading(engine) as connection:
        listing = (await connection.execute(latest)).one_or_none()
        if listing is None:
            return Leaks(leaks=[], count=0, cursor=None, listed_at=None)
        account = csp_accounts.c.sandbox_id
        listed = (csp_accounts.c.listing_id == listing.listing_id) & (account > after)
        end = await connection.scalar(select(account).where(listed).order_by(account).offset(LOOK - 1).limit(1))
        near = sandboxes.c.sandbox_id > after
        if end is not None:
            listed, near = listed & (account <= end), near & (sandboxes.c.sandbox_id <= end)
        in_csp, missing = _in_csp(listed, near, listing.begun_at), _missing(near)
        both = union_all(
            in_csp.order_by("sandbox_id").limit(limit + 1).subquery().select(),
            missing.order_by("sandbox_id").limit(limit + 1).subquery().select(),
        )
        rows = (await connection.execute(both.order_by("sandbox_id").limit(limit + 1))).mappings().all()
    shown = [Leak.model_validate(row) for row in rows[:limit]]
    last = shown[-1].sandbox_id if len(rows) > limit else end
    following = None if last is None else cursors.encode([last], "leaks")
    return Leaks(leaks=shown, count=len(shown), cursor=following, listed_at=listing.at)


def _in_csp(listed: ColumnElement[bool], near: ColumnElement[bool], begun_at: datetime) -> Select[Any]:
    unknown = sandboxes.c.sandbox_id.is_(None)
    deleted = (sandboxes.c.status == "deleted") & (sandboxes.c.status_since <= begun_at - PROOF_GRACE)
    return (
        select(
            csp_accounts.c.sandbox_id,
            csp_accounts.c.external_id,
            csp_accounts.c.name,
            case((unknown, "unknown"), else_="deleted").label("kind"),
            seconds(sandboxes.c.status_since).label("since"),
        )
        .select_from(
            csp_accounts.outerjoin(sandboxes, (sandboxes.c.sandbox_id == csp_accounts.c.sandbox_id) & near)
        )
        .where(listed, csp_accounts.c.external_id.is_not(None), unknown | deleted)
    )


def _missing(near: ColumnElement[bool]) -> Select[Any]:
    return select(
        sandboxes.c.sandbox_id,
        sandboxes.c.external_id,
        sandboxes.c.name,
        literal("missing").label("kind"),
        seconds(sandboxes.c.missing_since).label("since"),
    ).where(near, sandboxes.c.missing_since.is_not(None), sandboxes.c.status == "allocated")
