"""Pages of sandboxes."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Text, and_, literal_column
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.api.schemas.pool import SandboxPage, SandboxSummary
from gateway.queries.allocation_pages import NEWEST_LEASE, indexed_holder
from gateway.queries.pagination import EVERY_ROW, IndexScan, fetch_page
from gateway.queries.sandboxes import label_unix_seconds
from sandbox_broker.contract.types import LeaseMode, SandboxStatus
from sandbox_broker.database.schema import leases, prefix_end, sandboxes

SPARSE_STATUSES: frozenset[SandboxStatus] = frozenset({"pending_deletion", "deletion_failed", "stale"})
"""Statuses of few sandboxes."""

# The expression of the index. Another expression would not match the index.
_sandbox_id = literal_column("('' || sandboxes.sandbox_id)", Text())

_COLUMNS = (
    sandboxes.c.sandbox_id,
    sandboxes.c.name,
    sandboxes.c.external_id,
    sandboxes.c.sfdc_account_id,
    sandboxes.c.status,
    label_unix_seconds(sandboxes.c.status_since),
    label_unix_seconds(sandboxes.c.missing_since),
    label_unix_seconds(sandboxes.c.deletion_requested_at),
    sandboxes.c.deletion_attempts,
    sandboxes.c.deletion_error,
    leases.c.holder,
    leases.c.track_name,
    label_unix_seconds(leases.c.allocated_at),
    label_unix_seconds(leases.c.expires_at),
)


@dataclass(frozen=True, slots=True)
class SandboxFilter:
    """Filters of the sandbox listing. Cursors contain a checksum of the repr, so every change invalidates them."""

    status: SandboxStatus | None = None
    name_prefix: str | None = None
    track_name: str | None = None
    holder: str | None = None
    mode: LeaseMode | None = None
    """Mode of the active lease."""


async def sandboxes_page(engine: AsyncEngine, wanted: SandboxFilter, *, limit: int, cursor: str) -> SandboxPage:
    """Return a page of sandboxes. The most selective filter determines the order.

    The order is: for a holder or track the newest lease first, for a name prefix by name, for the status
    `allocated` and for a mode by expiry, for any other status the oldest first, and without filters by sandbox id.
    Raises ApiError INVALID_CURSOR or DATABASE_UNAVAILABLE.
    """
    filters = _rank_filters(wanted)
    scan = filters[0][0] if filters else IndexScan(sandboxes, [sandboxes.c.sandbox_id])
    other_conditions = [condition for _, condition in filters[1:]]
    rows, next_cursor = await fetch_page(
        engine, scan, _COLUMNS, sandboxes, other_conditions, limit=limit, cursor=cursor, wanted=wanted
    )
    page = [SandboxSummary.model_validate(row) for row in rows]
    return SandboxPage(sandboxes=page, count=len(page), cursor=next_cursor)


def _rank_filters(wanted: SandboxFilter) -> list[tuple[IndexScan, ColumnElement[bool]]]:
    """Return the scan and the condition of each filter, the most selective filter first.

    The first filter needs its scan only. The conditions of the others apply to the rows of this scan.
    """
    ranked: list[tuple[IndexScan, ColumnElement[bool]]] = []
    if wanted.holder is not None:
        ranked.append(
            (IndexScan(leases, NEWEST_LEASE, [indexed_holder == wanted.holder], descending=True), EVERY_ROW)
        )
    if wanted.track_name is not None:
        in_track = leases.c.track_name == wanted.track_name
        ranked.append((IndexScan(leases, NEWEST_LEASE, [in_track], descending=True), in_track))
    if wanted.name_prefix is not None:
        min_name = sandboxes.c.name >= wanted.name_prefix
        max_name = sandboxes.c.name < prefix_end(wanted.name_prefix)
        name_scan = IndexScan(sandboxes, (sandboxes.c.name, _sandbox_id), [max_name], wanted.name_prefix)
        ranked.append((name_scan, min_name & max_name))
    if wanted.status is not None:
        status_filter = _status_scan(wanted.status), sandboxes.c.status == wanted.status
        ranked.insert(
            0 if wanted.status in SPARSE_STATUSES and wanted.holder is None else len(ranked), status_filter
        )
    if wanted.mode is not None:
        # A literal instead of a parameter, because it must match the condition of the partial index.
        conditions = [leases.c.mode == literal_column(f"'{wanted.mode}'"), leases.c.end_reason.is_(None)]
        mode_scan = IndexScan(leases, (leases.c.expires_at, leases.c.lease_id), conditions)
        is_sparse = wanted.mode == "standby" and wanted.holder is None
        ranked.insert(0 if is_sparse else len(ranked), (mode_scan, and_(*conditions)))
    return ranked


def _status_scan(status: SandboxStatus) -> IndexScan:
    if status == "available":
        since = sandboxes.c.available_since
        return IndexScan(sandboxes, (since, sandboxes.c.sandbox_id), [since.is_not(None)])
    if status == "allocated":
        return IndexScan(leases, (leases.c.expires_at, leases.c.lease_id), [leases.c.end_reason.is_(None)])
    # A literal instead of a parameter, because it must match the condition of the partial index.
    key = (sandboxes.c.status_since, sandboxes.c.sandbox_id)
    return IndexScan(sandboxes, key, [sandboxes.c.status == literal_column(f"'{status}'")])
