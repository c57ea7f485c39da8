"""Pages of the audit, newest first."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.audit import AuditEntry, AuditPage
from gateway.queries import cursors
from gateway.queries.sandboxes import label_unix_seconds, read_connection
from sandbox_broker.database.schema import audit

KEY_TYPES = (int,)
"""Types of the key of a cursor: the id of the entry."""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Filters of the audit. Cursors contain a checksum of the repr."""

    actor: str | None = None
    action: str | None = None
    object: str | None = None
    since: int | None = None
    """Unix seconds, inclusive."""
    until: int | None = None
    """Unix seconds, exclusive."""


async def audit_page(engine: AsyncEngine, wanted: AuditFilter, *, limit: int, cursor: str) -> AuditPage:
    """Return a page of entries, newest first. Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE."""
    texts = (audit.c.actor, audit.c.action, audit.c.object, audit.c.reason, audit.c.request_id, audit.c.address)
    query = select(audit.c.audit_id, label_unix_seconds(audit.c.at), *texts, audit.c.outcome)
    query = query.order_by(audit.c.audit_id.desc())
    for name in ("actor", "action", "object"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(audit.c[name] == value)
    if wanted.since is not None:
        query = query.where(audit.c.at >= datetime.fromtimestamp(wanted.since, UTC))
    if wanted.until is not None:
        query = query.where(audit.c.at < datetime.fromtimestamp(wanted.until, UTC))
    if cursor:
        (before,) = cursors.decode(cursor, KEY_TYPES, wanted)
        query = query.where(audit.c.audit_id < before)
    async with read_connection(engine) as connection:
        rows = (await connection.execute(query.limit(limit + 1))).mappings().all()
    page = [AuditEntry.model_validate(row) for row in rows[:limit]]
    next_cursor = cursors.encode([page[-1].audit_id], wanted) if len(rows) > limit else None
    return AuditPage(entries=page, count=len(page), cursor=next_cursor)
