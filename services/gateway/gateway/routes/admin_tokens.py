"""Admin routes for named tokens: issue, list, revoke, suspend and resume."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from gateway.api.errors import ApiError
from gateway.api.responses import responses
from gateway.api.schemas.tokens import IssuedToken, TokenRequest, TokenResumed, Tokens, TokenSuspended
from gateway.context import Context
from gateway.queries import tokens
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from gateway.web.bodies import describe_body, read_body
from sandbox_broker.contract.commands import EndTokenLeases, IssueToken, RevokeToken, SuspendToken
from sandbox_broker.contract.tokens import TokenGrant

BATCH_SIZE = 500
"""Leases per command. The gateway repeats the command until none is left."""

CHANGE_ERRORS = (*COMMON_ERRORS, "TOKEN_NOT_FOUND", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT")

router = APIRouter(prefix="/v1/admin/tokens", tags=["admin"])

Name = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


@router.post(
    "",
    status_code=201,
    openapi_extra=describe_body(TokenRequest),
    responses=responses(*COMMON_ERRORS, "TOKEN_EXISTS", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"),
)
async def issue_token(request: Request) -> IssuedToken:
    """Issue a named token. Only this response shows it. Limits and scopes need the role `track`."""
    body = await read_body(request, TokenRequest)
    context: Context = request.app.state.context
    new = context.tokens.generate()
    command = IssueToken(
        request_id=request.state.request_id,
        key_id=new.key_id,
        token_hash=new.token_hash,
        pepper_id=new.pepper_id,
        grant=TokenGrant.model_validate(body.model_dump()),
    )
    await request_maintenance(request, command)
    await context.tokens.refresh()
    return IssuedToken(name=body.name, role=body.role, token=new.token)


@router.get("", responses=responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE"))
async def get_tokens(request: Request) -> Tokens:
    """List the named tokens by name, without their secrets and without revoked ones."""
    context: Context = request.app.state.context
    return Tokens(tokens=await tokens.list_tokens(context.engine))


@router.delete("/{name}", status_code=204, responses=responses(*CHANGE_ERRORS))
async def revoke_token(request: Request, name: Name) -> Response:
    """Revoke a token for ever. All gateways refuse it within 5 s. Its leases stay. A repeated call succeeds."""
    await request_maintenance(request, RevokeToken(request_id=request.state.request_id, name=name))
    await _refresh(request)
    return Response(status_code=204)


@router.post("/{name}/suspend", responses=responses(*CHANGE_ERRORS, "DATABASE_UNAVAILABLE"))
async def suspend_token(
    request: Request,
    name: Name,
    release: Annotated[bool, Query(description="also end all active leases of the token")] = False,
) -> TokenSuspended:
    """Suspend a token, and list its active leases. `release` ends them, and their sandboxes are deleted. A repeated
    call succeeds."""
    request_id = request.state.request_id
    reply = await request_maintenance(request, SuspendToken(request_id=request_id, name=name))
    released: list[str] = []
    note = request.query_params.get("reason") or f"token {name} was suspended"
    while release:
        ended = await request_maintenance(
            request, EndTokenLeases(request_id=request_id, name=name, note=note, limit=BATCH_SIZE)
        )
        released += ended.sandbox_ids
        if len(ended.sandbox_ids) < BATCH_SIZE:
            break
    await _refresh(request)
    context: Context = request.app.state.context
    return TokenSuspended(
        name=name,
        changed=reply.changed,
        released=released,
        leases=await tokens.active_leases(context.engine, name),
    )


@router.post("/{name}/resume", responses=responses(*CHANGE_ERRORS))
async def resume_token(request: Request, name: Name) -> TokenResumed:
    """End the suspension of a token. A repeated call succeeds."""
    command = SuspendToken(request_id=request.state.request_id, name=name, suspended=False)
    reply = await request_maintenance(request, command)
    await _refresh(request)
    return TokenResumed(name=name, changed=reply.changed)


async def _refresh(request: Request) -> None:
    """Refresh the tokens of this gateway. Its own refresh follows within a second if the database is down."""
    context: Context = request.app.state.context
    try:
        await context.tokens.refresh()
    except ApiError:
        return
