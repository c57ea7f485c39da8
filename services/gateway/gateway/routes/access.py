"""Routes for the login inside a sandbox: the student's script fetches it, an administrator rotates its keys."""

from fastapi import APIRouter, Request, Response

from gateway import metrics
from gateway.api.errors import ApiError
from gateway.api.responses import ACCESS_PENDING, responses
from gateway.api.schemas.access import AccessFailed, AccessPending, AccessReady, KeysRotated
from gateway.context import Context
from gateway.queries import access
from gateway.routes import admin_actions, track
from gateway.web.headers import Holder, LeaseSecret
from sandbox_broker.contract.commands import RotateAccessKeys
from sandbox_broker.runtime.access_keys import UnknownKey

RETRY_AFTER_SEC = 5
KEYS_PER_COMMAND = 500
NOT_CONFIGURED = (
    "The broker creates no logins, because ACCESS_KEYS is not set. The operator follows docs/access.md. The broker "
    "creates the login afterwards."
)

router = APIRouter(prefix="/v1", tags=["track"])
admin_router = APIRouter(prefix="/v1/admin/access", tags=["admin"])


@router.get(
    "/sandboxes/{sandbox_id}/access",
    response_model=AccessReady | AccessFailed,
    responses={
        202: ACCESS_PENDING,
        **responses(
            *track.COMMON_ERRORS,
            "NOT_SANDBOX_OWNER",
            "SANDBOX_NOT_FOUND",
            "ACCESS_NOT_REQUESTED",
            "ACCESS_ENDED",
            "ACCESS_UNREADABLE",
            "DATABASE_UNAVAILABLE",
        ),
    },
)
async def get_access(request: Request, sandbox_id: str, holder: Holder, _: LeaseSecret = None) -> Response:
    """Return the login inside the student's sandbox. A lease has one if its policy grants it (`access`), or if the
    allocation asked for it (`X-Sandbox-Access: user`). Repeat the request while it is `pending`. After the end of
    the lease the login does not exist any more."""
    request.scope["state"]["ids"] = {"holder": holder, "sandbox_id": sandbox_id}
    try:
        body = await _find_access(request, sandbox_id, holder)
    except ApiError as error:
        metrics.ACCESS_REQUESTS.labels(error.code.lower()).inc()
        raise
    metrics.ACCESS_REQUESTS.labels(body.status).inc()
    headers = {"Retry-After": str(body.retry_after)} if isinstance(body, AccessPending) else {}
    status = 202 if isinstance(body, AccessPending) else 200
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


async def _find_access(
    request: Request, sandbox_id: str, holder: str
) -> AccessReady | AccessFailed | AccessPending:
    context: Context = request.app.state.context
    login = await access.find_login(context.engine, sandbox_id) if "\0" not in sandbox_id else None
    if login is None:
        raise ApiError("SANDBOX_NOT_FOUND", parameters={"cause": "unknown_id"})
    track.check_access(request, login.token, login.secret_hash)
    if login.holder != holder:
        raise ApiError("NOT_SANDBOX_OWNER", parameters={"sandbox_id": sandbox_id})
    if login.has_ended:
        raise ApiError("ACCESS_ENDED", parameters={"sandbox_id": sandbox_id})
    if login.state is None:
        raise ApiError("ACCESS_NOT_REQUESTED", parameters={"sandbox_id": sandbox_id})
    if context.access_keys is None:
        return AccessFailed(reason=NOT_CONFIGURED)
    if login.state == "failed":
        return AccessFailed(reason=login.error or "")
    if login.email is None or login.password is None or login.user_id is None:
        return AccessPending(retry_after=RETRY_AFTER_SEC)
    try:
        password = context.access_keys.decrypt(login.password)
    except UnknownKey:
        raise ApiError("ACCESS_UNREADABLE") from None
    return AccessReady(
        email=login.email,
        password=password,
        user_id=login.user_id,
        login_url=context.settings.access_login_url,
    )


@admin_router.post(
    "/rotate-keys",
    responses=responses(
        *admin_actions.COMMON_ERRORS, "ACCESS_NOT_CONFIGURED", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"
    ),
)
async def rotate_keys(request: Request) -> KeysRotated:
    """Encrypt the passwords of logins again with the first key of `ACCESS_KEYS`, 500 in one request. Repeat the
    request until `remaining` is 0. Then remove the other keys from `ACCESS_KEYS`. Passwords do not change."""
    command = RotateAccessKeys(request_id=request.state.request_id, limit=KEYS_PER_COMMAND)
    reply = await admin_actions.request_maintenance(request, command)
    return KeysRotated.model_validate(reply, from_attributes=True)
