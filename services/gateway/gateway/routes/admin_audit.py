"""Admin route for the audit."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.api.responses import responses
from gateway.api.schemas.audit import AuditPage
from gateway.context import Context
from gateway.queries.audit_pages import AuditFilter, audit_page
from gateway.routes.admin_read import LISTING_ERRORS, Cursor, Limit, Text, Time

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.get("/audit", responses=responses(*LISTING_ERRORS))
async def get_audit(
    request: Request,
    *,
    actor: Text = None,
    action: Text = None,
    object_: Annotated[Text, Query(alias="object")] = None,
    since: Time = None,
    until: Time = None,
    limit: Limit = 50,
    cursor: Cursor = "",
) -> AuditPage:
    """List the commands of administrators and the refusals for scope that match all filters, newest first. `object`
    is the id or name of a sandbox, job, token, dead letter or lab."""
    context: Context = request.app.state.context
    wanted = AuditFilter(actor or None, action or None, object_ or None, since, until)
    return await audit_page(context.engine, wanted, limit=limit, cursor=cursor)
