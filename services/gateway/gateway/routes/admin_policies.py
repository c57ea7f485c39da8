"""Admin routes for policies: read all, and replace all."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.errors import ApiError
from gateway.api.responses import responses
from gateway.api.schemas.policies import Policies, PolicyChanges
from gateway.context import Context
from gateway.queries import policies
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from sandbox_broker.contract.commands import ApplyPolicies
from sandbox_broker.contract.policies import InvalidPolicies, Policy, PolicyProblem, parse_policies

MAX_NAMED = 3
"""Problems in the message. `fields` has all of them."""

router = APIRouter(prefix="/v1/admin", tags=["admin"])

_BODY = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Policies"}}}}


@router.get("/policies", response_model=Policies, responses=responses(*COMMON_ERRORS, "DATABASE_UNAVAILABLE"))
async def get_policies(request: Request) -> Response:
    """Return all policies, each with the fields that were set. The body is valid for PUT."""
    context: Context = request.app.state.context
    documents = await policies.read_policies(context.engine)
    return Response(orjson.dumps({"policies": documents}), media_type="application/json")


@router.put(
    "/policies",
    openapi_extra={"requestBody": _BODY},
    responses=responses(*COMMON_ERRORS, "INVALID_POLICY", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"),
)
async def put_policies(request: Request, dry_run: bool = False) -> PolicyChanges:
    """Replace all policies, and return the changes. `dry_run` changes nothing. One invalid value refuses all
    policies. Leases keep the terms that they were granted under. A repeated call changes nothing."""
    command = ApplyPolicies(
        request_id=request.state.request_id, policies=_read_policies(await request.body()), dry_run=dry_run
    )
    reply = await request_maintenance(request, command)
    return PolicyChanges.model_validate(reply, from_attributes=True)


def _read_policies(body: bytes) -> tuple[Policy, ...]:
    """Raises ApiError INVALID_POLICY."""
    try:
        content: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _invalid_policy([PolicyProblem(field="body", problem=f"is not JSON: {error}")]) from None
    if not isinstance(content, dict) or content.keys() != {"policies"}:
        problem = 'must be an object with one field, like {"policies": [{"name": "adventure"}]}'
        raise _invalid_policy([PolicyProblem(field="body", problem=problem)])
    try:
        return parse_policies(content["policies"])
    except InvalidPolicies as error:
        raise _invalid_policy(error.problems) from None


def _invalid_policy(problems: list[PolicyProblem]) -> ApiError:
    named = "; ".join(f"{problem['field']} {problem['problem']}" for problem in problems[:MAX_NAMED])
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    return ApiError(
        "INVALID_POLICY",
        f"No policy was applied: {named}{more}. Correct this, then apply all policies again.",
        fields=[{"field": problem["field"], "problem": problem["problem"]} for problem in problems],
    )
