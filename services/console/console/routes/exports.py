"""Tables as CSV, with the filters of their pages."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from console.api_client import Api
from console.csv_export import render_csv
from console.routes.pages import ObjectText, Text, lease_filters, parse_time
from console.web import AdminApi, SignedIn, require_role

MAX_ROWS = 10_000
LEASE_COLUMNS = (
    "lease_id",
    "holder",
    "track_name",
    "sandbox_id",
    "name",
    "external_id",
    "mode",
    "policy",
    "allocated_at",
    "claimed_at",
    "expires_at",
    "ended_at",
    "end_reason",
    "end_note",
)
SANDBOX_COLUMNS = (
    "sandbox_id",
    "name",
    "external_id",
    "status",
    "status_since",
    "missing_since",
    "holder",
    "track_name",
    "allocated_at",
    "expires_at",
    "deletion_requested_at",
    "deletion_attempts",
    "deletion_error",
)
DEAD_LETTER_COLUMNS = ("dead_letter_id", "died_at", "service", "queue", "commands", "reason", "size")
TOKEN_COLUMNS = (
    "name",
    "role",
    "tracks",
    "prefixes",
    "max_active",
    "max_new_per_hour",
    "max_rate",
    "issued_at",
    "issued_by",
    "suspended_at",
    "last_used_at",
    "expires_at",
)
AUDIT_COLUMNS = ("at", "actor", "action", "object", "reason", "outcome", "request_id", "address")

router = APIRouter()


@router.get("/leases.csv")
async def export_leases(
    api: AdminApi, _: SignedIn, *, student: Text = "", track: Text = "", at: Text = "", only: Text = "active"
) -> Response:
    held_at, _problem = parse_time(at)
    filters = lease_filters(student, track, held_at, only)
    return await _export(api, "allocations", LEASE_COLUMNS, "leases", entries="allocations", **filters)


@router.get("/sandboxes.csv")
async def export_sandboxes(
    api: AdminApi, _: SignedIn, *, status: Text = "", prefix: Text = "", track: Text = "", student: Text = ""
) -> Response:
    filters = {"status": status, "name_prefix": prefix, "track_name": track, "holder": student}
    return await _export(api, "sandboxes", SANDBOX_COLUMNS, status or "sandboxes", entries="sandboxes", **filters)


@router.get("/dead-letters.csv")
async def export_dead_letters(api: AdminApi, _: SignedIn) -> Response:
    return await _export(api, "dead-letters", DEAD_LETTER_COLUMNS, "dead-letters", entries="dead_letters")


@router.get("/tokens.csv")
async def export_tokens(api: AdminApi, person: SignedIn) -> Response:
    require_role(person, "admin")
    return await _export(api, "tokens", TOKEN_COLUMNS, "tokens", entries="tokens")


@router.get("/audit.csv")
async def export_audit(
    api: AdminApi, person: SignedIn, *, actor: Text = "", action: Text = "", object_: ObjectText = ""
) -> Response:
    require_role(person, "operator")
    filters = {"actor": actor, "action": action, "object": object_}
    return await _export(api, "audit", AUDIT_COLUMNS, "audit", entries="entries", **filters)


async def _export(
    api: Api, path: str, columns: tuple[str, ...], file_name: str, *, entries: str, **filters: Any
) -> Response:
    """Return the first MAX_ROWS rows of a listing of the admin API. `entries` is the field with its rows."""
    first = await api.get(path, **filters, limit=500)  # before the response, so that a refusal is a page

    async def iterate() -> AsyncIterator[dict[str, Any]]:
        page, count = first, 0
        while True:
            for entry in page[entries]:
                yield {name: _format_value(name, entry[name]) for name in columns}
            count += len(page[entries])
            if page.get("cursor") is None or count >= MAX_ROWS:
                return
            page = await api.get(path, **filters, limit=500, cursor=page["cursor"])

    name = f"{file_name}-{datetime.now(UTC):%Y%m%d-%H%M}.csv"
    return StreamingResponse(
        render_csv(columns, iterate()),
        media_type="text/csv",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _format_value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(value)
    is_time = name == "at" or name.endswith(("_at", "_since"))
    return datetime.fromtimestamp(value, UTC).isoformat() if is_time and value is not None else value
