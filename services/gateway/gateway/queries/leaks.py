"""Query of leaks: differences between the accounts in CSP and the pool, with keyset pagination.

Leaks are rare, so the cost of a page is the number of accounts that it examines. This number is limited. A page may
therefore hold fewer leaks than `limit` and still have a cursor, as in pagination.py.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, case, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import Leak, Leaks
from gateway.queries import cursors
from gateway.queries.sandboxes import read_connection, unix_seconds
from sandbox_broker.database.schema import PROOF_GRACE, applied_listing, csp_accounts, sandboxes

KEY_TYPES = (str,)
"""Types of the key of a cursor: the sandbox id."""
MAX_EXAMINED = 4_000
"""Limit of accounts to examine for one page."""


async def leaks_page(engine: AsyncEngine, *, limit: int, cursor: str) -> Leaks:
    """Return a page of differences to the last applied listing, in the order of sandbox ids.

    Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE.
    """
    after = cursors.decode(cursor, KEY_TYPES, "leaks")[0] if cursor else ""
    latest = select(
        applied_listing.c.listing_id,
        applied_listing.c.begun_at,
        unix_seconds(applied_listing.c.begun_at).label("at"),
    )
    async with read_connection(engine) as connection:
        listing = (await connection.execute(latest)).one_or_none()
        if listing is None:
            return Leaks(leaks=[], count=0, cursor=None, listed_at=None)
        account = csp_accounts.c.sandbox_id
        listed = (csp_accounts.c.listing_id == listing.listing_id) & (account > after)
        end = await connection.scalar(
            select(account).where(listed).order_by(account).offset(MAX_EXAMINED - 1).limit(1)
        )
        in_range = sandboxes.c.sandbox_id > after
        if end is not None:
            listed, in_range = listed & (account <= end), in_range & (sandboxes.c.sandbox_id <= end)
        in_csp, missing = _leaked_in_csp(listed, in_range, listing.begun_at), _missing_in_csp(in_range)
        both = union_all(
            in_csp.order_by("sandbox_id").limit(limit + 1).subquery().select(),
            missing.order_by("sandbox_id").limit(limit + 1).subquery().select(),
        )
        rows = (await connection.execute(both.order_by("sandbox_id").limit(limit + 1))).mappings().all()
    page = [Leak.model_validate(row) for row in rows[:limit]]
    last = page[-1].sandbox_id if len(rows) > limit else end
    next_cursor = None if last is None else cursors.encode([last], "leaks")
    return Leaks(leaks=page, count=len(page), cursor=next_cursor, listed_at=listing.at)


def _leaked_in_csp(listed: ColumnElement[bool], in_range: ColumnElement[bool], begun_at: datetime) -> Select[Any]:
    """Select the listed accounts whose sandbox is unknown, or was deleted PROOF_GRACE before the listing.

    Younger deletions are no leaks, because a listing of CSP may lag behind its deletions.
    """
    unknown = sandboxes.c.sandbox_id.is_(None)
    deleted = (sandboxes.c.status == "deleted") & (sandboxes.c.status_since <= begun_at - PROOF_GRACE)
    return (
        select(
            csp_accounts.c.sandbox_id,
            csp_accounts.c.external_id,
            csp_accounts.c.name,
            case((unknown, "unknown"), else_="deleted").label("kind"),
            unix_seconds(sandboxes.c.status_since).label("since"),
        )
        .select_from(
            csp_accounts.outerjoin(sandboxes, (sandboxes.c.sandbox_id == csp_accounts.c.sandbox_id) & in_range)
        )
        .where(listed, csp_accounts.c.external_id.is_not(None), unknown | deleted)
    )


def _missing_in_csp(in_range: ColumnElement[bool]) -> Select[Any]:
    """Select the allocated sandboxes that the listing lacks."""
    return select(
        sandboxes.c.sandbox_id,
        sandboxes.c.external_id,
        sandboxes.c.name,
        literal("missing").label("kind"),
        unix_seconds(sandboxes.c.missing_since).label("since"),
    ).where(in_range, sandboxes.c.missing_since.is_not(None), sandboxes.c.status == "allocated")
