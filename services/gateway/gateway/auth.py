"""Who may call: bearer tokens, from a list each, so that they are rotated without downtime."""

import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr

from gateway.errors import ApiError
from gateway.headers import BLANKS

# For the OpenAPI document and the docs page alone; the judging is done below.
_track_token = HTTPBearer(scheme_name="trackToken", auto_error=False, description="One of BROKER_API_TOKEN")
_admin_token = HTTPBearer(
    scheme_name="adminToken",
    auto_error=False,
    description="One of BROKER_ADMIN_TOKEN; it works on track routes too",
)


class Tokens:
    """A comma-separated list of tokens; a candidate is compared with all of them in constant time."""

    def __init__(self, listed: SecretStr) -> None:
        self._tokens = [part.strip().encode() for part in listed.get_secret_value().split(",") if part.strip()]

    def hold(self, candidate: bytes) -> bool:
        return bool(sum([hmac.compare_digest(token, candidate) for token in self._tokens]))


def _candidate(request: Request) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip(BLANKS)
    if scheme.lower() != "bearer" or not token:
        raise _unauthorized("Send the header 'Authorization: Bearer <token>'.")
    return token.encode("latin-1")  # how it was decoded, so these are the bytes that were sent


def _unauthorized(message: str) -> ApiError:
    return ApiError("UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"})


def _unknown() -> ApiError:
    return _unauthorized("This token is not known here. Check it, or ask the operator for a new one.")


def track(api: Tokens, admin: Tokens) -> Callable[..., Awaitable[None]]:
    """The dependency of track routes: either token will do."""

    async def require_token(
        request: Request, _: object = Security(_track_token), __: object = Security(_admin_token)
    ) -> None:
        candidate = _candidate(request)
        if not (api.hold(candidate) | admin.hold(candidate)):
            raise _unknown()

    return require_token


def administration(api: Tokens, admin: Tokens) -> Callable[..., Awaitable[None]]:
    """The dependency of admin routes: the admin token alone."""

    async def require_admin_token(request: Request, _: object = Security(_admin_token)) -> None:
        candidate = _candidate(request)
        if admin.hold(candidate):
            return
        if api.hold(candidate):
            raise ApiError("FORBIDDEN", "This route needs the admin token; yours is a track token.")
        raise _unknown()

    return require_admin_token
