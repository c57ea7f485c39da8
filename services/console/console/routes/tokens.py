"""Form that creates a named token. Its answer is the only page that shows the token."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from starlette.responses import Response

from console.api_client import ApiProblem
from console.rendering import render
from console.routes.actions import REASON_PROBLEM, is_reason, sign_reason
from console.routes.pages import parse_time
from console.web import AdminApi, SignedIn, require_csrf, require_role

TOKEN_ROLES = {
    "track": "Lab scripts: lease, extend and release sandboxes",
    "viewer": "Instructors: read all pages",
    "operator": "Operators: read, and all actions on leases, syncs and messages",
    "admin": "Administrators: all rights, tokens and policies too",
}
"""Role -> its rights."""
LIMITS = ("max_active", "max_new_per_hour", "max_rate")

router = APIRouter()


@router.get("/tokens/new")
async def show_token_form(request: Request, person: SignedIn) -> Response:
    require_role(person, "admin")
    return _form_page(request, {})


@router.post("/tokens/new", dependencies=[Depends(require_csrf)])
async def create_token(
    request: Request,
    api: AdminApi,
    person: SignedIn,
    *,
    name: Annotated[str, Form()] = "",
    role: Annotated[str, Form()] = "",
    tracks: Annotated[str, Form()] = "",
    prefixes: Annotated[str, Form()] = "",
    max_active: Annotated[str, Form()] = "",
    max_new_per_hour: Annotated[str, Form()] = "",
    max_rate: Annotated[str, Form()] = "",
    expires_at: Annotated[str, Form()] = "",
    reason: Annotated[str, Form()] = "",
) -> Response:
    require_role(person, "admin")
    reason = " ".join(reason.split())
    limits = dict(zip(LIMITS, (max_active, max_new_per_hour, max_rate), strict=True))
    values = {
        "name": name,
        "role": role,
        "tracks": tracks,
        "prefixes": prefixes,
        **limits,
        "expires_at": expires_at,
        "reason": reason,
    }
    end, problem = parse_time(expires_at)
    if any(text and not (text.isascii() and text.isdigit() and len(text) <= 7) for text in limits.values()):
        problem = "Write the limits as whole numbers, or leave them empty."
    if not is_reason(reason):
        problem = REASON_PROBLEM
    if problem is not None:
        return _form_page(request, values, problem=problem, status=400)
    body = {
        "name": name.strip(),
        "role": role,
        "tracks": _split(tracks),
        "prefixes": _split(prefixes),
        **{limit: int(text) if text else None for limit, text in limits.items()},
        "expires_at": end,
    }
    try:
        issued = await api.act("POST", "tokens", body, reason=sign_reason(request, person, reason))
    except ApiProblem as refused:
        return _form_page(request, values, problem=refused.message, status=refused.status or 503)
    return render(request, "token_created.html", 201, issued=issued)


def _form_page(
    request: Request, values: dict[str, str], *, problem: str | None = None, status: int = 200
) -> Response:
    fields: dict[str, Any] = {"role": "track", **values}
    return render(request, "token_new.html", status, roles=TOKEN_ROLES, values=fields, problem=problem)


def _split(text: str) -> list[str]:
    """Return the entries of a text with commas or lines between them."""
    return [entry for part in re.split(r"[,\n]", text) if (entry := part.strip())]
